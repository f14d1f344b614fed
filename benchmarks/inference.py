"""What sparse inference gains on this machine: the same translations dense and sparse, in turns, and sizes of files.

    python benchmarks/inference.py --presets base big --sparsities 0.8 0.9 0.95 --batches 1 4 16 64 --beams 1 4

A model of random weights, its matrices pruned by magnitude, translates random sentences into a fixed number of tokens;
what the weights say has no influence on how fast they are multiplied. Dense and sparse take turns in the order A B B A,
so that whatever else the machine does falls on both alike; reported are medians. Outputs are compared token by token:
with random weights many hypotheses are nearly equal, so a rounding may exchange two of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "translation"))

import model as models

from gap_ds import __version__, compact, sparsify_for_inference
from gap_ds.presets import VOCAB_SIZE

OUT = Path(__file__).parent / "results" / "inference.json"
SOURCE = 24  # tokens of a source sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=list(models.PRESETS), default=["base"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each translation")
    parser.add_argument("--pairs", type=int, default=6, help="timed pairs of translations, dense and sparse")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine(args), "files": [], "speed": []}
    for preset in args.presets:
        for sparsity in args.sparsities:
            for dtype in args.dtypes:
                dense = build(preset, sparsity, getattr(torch, dtype), args.vocab_size)
                what = {"preset": preset, "sparsity": sparsity, "dtype": dtype}
                results["files"].append(what | files(dense))
                show(results["files"][-1])
                for batch in args.batches:
                    for beams in args.beams:
                        results["speed"].append(what | compare(dense, batch, beams, args.tokens, args.pairs))
                        show(results["speed"][-1])
                        write(args.out, results)  # a run that is stopped keeps what it has
    write(args.out, results)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "gap_ds": __version__,
        "torch": torch.__version__,
        "cpu": cpu(),
        "threads": args.threads,
        "tokens": args.tokens,
        "source_tokens": SOURCE,
    }


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def build(preset: str, sparsity: float, dtype: torch.dtype, vocab_size: int) -> Any:
    """A model in evaluation mode; of each matrix inside its layers the smallest weights are zero."""
    torch.manual_seed(0)
    model = models.build_model(models.build_config(preset, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for _, weight in entries(model):
            threshold = weight.abs().flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values
            weight.masked_fill_(weight.abs() <= threshold, 0.0)
    return model.to(dtype)


def entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}.weight", module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".")
    ]


def files(model: Any) -> dict[str, Any]:
    """Bytes of the weights, dense and compact, each also zipped; and whether the compact ones come back bit for bit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "dense", max_shard_size="100GB")
        info = {"signature": "benchmark", "entries": {name: {} for name, _ in entries(model)}}
        (folder / "dense" / "gap.json").write_text(json.dumps(info))
        dense = folder / "dense" / "model.safetensors"
        begin = time.perf_counter()
        figures = compact.compact(folder / "dense", folder / "compact")
        written = time.perf_counter()
        loaded = compact.load_compact(folder / "compact").state_dict()
        seconds = written - begin, time.perf_counter() - written
        saved = model.state_dict()
        return {
            "dense_bytes": dense.stat().st_size,
            "dense_zip_bytes": zipped(dense),
            "compact_bytes": figures["file_bytes"],
            "compact_zip_bytes": zipped(folder / "compact" / compact.FILE),
            "entries_ratio": round(figures["packed_bytes"] / figures["packed_dense_bytes"], 4),
            "write_seconds": round(seconds[0], 2),
            "load_seconds": round(seconds[1], 2),
            "equal": saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved),
        }


def zipped(path: Path) -> int:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path)
    return path.with_suffix(".zip").stat().st_size


def compare(dense: Any, batch: int, beams: int, tokens: int, pairs: int) -> dict[str, Any]:
    """The same translations, dense and sparse in turns."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(models.UNK + 1, dense.config.vocab_size, (batch, SOURCE), generator=generator)
    ids[:, -1] = models.EOS

    def translate(model: Any, count: int = tokens) -> Tensor:
        result: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False,
            min_new_tokens=count, max_new_tokens=count, max_length=None,
        )  # fmt: skip
        return result

    sparse = copy.deepcopy(dense)
    begin = time.perf_counter()
    table = sparsify_for_inference(sparse, lambda model: translate(model, 4))
    choosing = time.perf_counter() - begin
    outputs = {name: translate(model) for name, model in (("dense", dense), ("sparse", sparse))}
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for pair in range(pairs):
        turns = [("dense", dense), ("sparse", sparse)]
        for name, model in turns if pair % 2 == 0 else turns[::-1]:
            begin = time.perf_counter()
            translate(model)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = sorted(a / b for a, b in zip(seconds["dense"], seconds["sparse"], strict=True))
    equal = (outputs["dense"] == outputs["sparse"]).all(dim=1)
    return {
        "batch": batch,
        "beams": beams,
        "dense_sentences_per_second": round(batch / median["dense"], 2),
        "sparse_sentences_per_second": round(batch / median["sparse"], 2),
        "ratio": round(median["dense"] / median["sparse"], 3),
        "ratio_of_pairs": [round(ratios[0], 3), round(statistics.median(ratios), 3), round(ratios[-1], 3)],
        "sparse_layers": sum(len(choice.names) for choice in table if choice.form != "dense"),
        "equal_outputs": int(equal.sum()),
        "choosing_seconds": round(choosing, 2),
        "choices": [{**choice.row(), "names": len(choice.names)} for choice in table],
    }


def show(row: dict[str, Any]) -> None:
    print(json.dumps({key: value for key, value in row.items() if key != "choices"}), flush=True)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
