"""Compare the translations of a sparse model in all its forms: dense folder, compact folder, sparsified for inference.

    python benchmarks/forms.py --models runs/zero3/model runs/fsdp2/model --dataset FOLDER --split test_2016_flickr

    dense    the exported folder
    compact  the compact folder made of it
    sparse   the dense folder in the forms chosen here by `sparsify_for_inference`, possibly none
    csr      the dense folder, every sparse layer in compressed rows, without measuring

For each exported model: BLEU of each form on real sentences, the number of sentences with another translation than the
dense folder's, and sentences/s (one pass each, in this order: a rough figure).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import data
import evaluate
import translate

from gap_ds import sparsify_for_inference
from gap_ds.export import INFO, compact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="exported folders, dense")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = data.load_rows(args.dataset, args.split, "en", "de", limit=args.limit)
    sources, references = list(rows["source"]), list(rows["target"])
    measure.write("forms", [row for path in args.models for row in forms(path, sources, references, args)], args.out)


def forms(path: Path, sources: list[str], references: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        compact(path, Path(folder) / "compact")
        models = {
            "dense": translate.load(path, torch.float32)[0],
            "compact": translate.load(Path(folder) / "compact", torch.float32)[0],
            "sparse": translate.load(path, torch.float32)[0],
            "csr": translate.load(path, torch.float32)[0],
        }
    tokenizer = translate.load(path, torch.float32)[1]
    tables = {
        "sparse": translate.sparsify(models["sparse"], tokenizer, sources, args.beams, 2048),
        "csr": sparsify_for_inference(models["csr"], layout="csr"),
    }
    changed = {
        form: sum(len(choice.names) for choice in table if choice.layout != "dense") for form, table in tables.items()
    }
    info = json.loads((path / INFO).read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    result = []
    for form, model in models.items():
        begin = time.perf_counter()
        found[form] = evaluate.translate(model, tokenizer, sources, beams=args.beams)
        seconds = time.perf_counter() - begin
        result.append(
            {
                "model": path.parent.name,
                "form": form,
                "signature": info.get("signature", "").replace("|", " "),
                "sparsity": sparsity(info),
                "layers in another form": changed.get(form, 0),
                "sentences": len(sources),
                "beams": args.beams,
                "BLEU": round(evaluate.score(found[form], references, ["bleu"]).bleu or 0.0, 4),
                "differing": sum(a != b for a, b in zip(found[form], found["dense"], strict=True)),
                "sentences/s": round(len(sources) / seconds, 1),
            }
        )
    return result


def sparsity(info: dict[str, Any]) -> float | None:
    """Return the share of zeros in the entries by gap.json; None if it has no counts."""
    entries = info.get("entries", {}).values()
    if not entries or not all("nonzero" in entry and "numel" in entry for entry in entries):
        return None
    return round(1 - sum(entry["nonzero"] for entry in entries) / sum(entry["numel"] for entry in entries), 4)


if __name__ == "__main__":
    main()
