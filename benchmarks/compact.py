"""Size of the compact file, compared with zip and zstd of the dense one, and times of writing and loading it.

    python benchmarks/compact.py --presets base --sparsities 0.8 0.9 0.95 --dtypes bfloat16 float32
    python benchmarks/compact.py --presets --models runs/cyclic_80/model

Presets have random weights, and the smallest of each matrix are zero; embeddings are never pruned. Sizes are exact.
Seconds are those of one call, with files in the page cache. zstd (level 3, command line) is left out where it is not
installed. `entries` is the size of the pruned matrices, relative to their dense bytes. `--quick` is a size for tests.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import inference
import measure
import torch
from transformers import AutoModelForSeq2SeqLM

from gap_ds.cli.presets import VOCAB_SIZE
from gap_ds.export import compact, compact_file, load_compact


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--presets", nargs="*", default=["base"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="exported folders, dense")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args()
    if args.quick:
        args.presets, args.sparsities, args.dtypes, args.vocab_size = ["tiny"], [0.9], ["float32"], 500
    rows = [row({"model": path.parent.name}, path) for path in args.models]
    for preset in args.presets:
        for sparsity in args.sparsities:
            for dtype in args.dtypes:
                with tempfile.TemporaryDirectory() as folder:
                    model = inference.build(preset, sparsity, getattr(torch, dtype), args.vocab_size)
                    inference.save_dense(model, Path(folder))
                    rows.append(row({"model": preset, "sparsity": sparsity, "dtype": dtype}, Path(folder)))
    measure.write("compact", rows, args.out)


def row(what: dict[str, Any], dense: Path) -> dict[str, Any]:
    """Compact a dense export, load both, and return sizes and times."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "compact"
        write = measure.seconds(lambda: compact(dense, out))
        figures = compact_file.figures(out)
        loaded: list[Any] = []
        load = measure.seconds(lambda: loaded.append(load_compact(out, dtype="auto")))
        load_dense = measure.seconds(lambda: loaded.append(AutoModelForSeq2SeqLM.from_pretrained(dense, dtype="auto")))
        ours, wanted = (model.state_dict() for model in loaded)
        files = {"dense": dense / "model.safetensors", "compact": out / compact_file.FILE}
        sizes = {kind: path.stat().st_size for kind, path in files.items()}
        for kind, path in files.items():
            sizes[f"{kind}.zip"] = zipped(path, Path(name))
            if shutil.which("zstd"):
                sizes[f"{kind}.zst"] = zstd(path, Path(name))
    return {
        **what,
        **{f"{kind} MB": round(size / 1e6, 2) for kind, size in sizes.items()},
        "entries": round(figures["packed_bytes"] / figures["packed_dense_bytes"], 4),
        "write s": round(write, 2),
        "load s": round(load, 2),
        "load dense s": round(load_dense, 2),
        "equal": ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted),
    }


def zipped(path: Path, folder: Path) -> int:
    with zipfile.ZipFile(folder / "weights.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path)
    return (folder / "weights.zip").stat().st_size


def zstd(path: Path, folder: Path) -> int:
    subprocess.run(["zstd", "-q", "-f", "-3", str(path), "-o", str(folder / "weights.zst")], check=True)
    return (folder / "weights.zst").stat().st_size


if __name__ == "__main__":
    main()
