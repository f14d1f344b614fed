"""What the tests of examples/language share with worker_language.py: its scripts, and a short run."""

from __future__ import annotations

import json
from pathlib import Path

from vision import ROOT, load, stop_at

__all__ = ["ROOT", "SCRIPT", "STEPS", "arguments", "load", "stop_at", "write_data", "write_gap"]

SCRIPT = ROOT / "examples" / "language" / "train.py"

GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 3}
STEPS = 7  # of that schedule; 5 make an epoch


def write_data(folder: Path) -> None:
    """Documents of three to twenty words: rows for 5 steps of training, fewer for the rest."""
    words = "the small dog of a man who runs in green parks sees two old boats and their red sails".split()
    for split, count in (("train", 36), ("validation", 9), ("test", 13)):
        texts = [" ".join(words[(i * j + j) % len(words)] for j in range(3 + i % 18)) for i in range(count)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_gap(folder: Path) -> str:
    """The GaP config of the runs, in a file."""
    (folder / "gap.json").write_text(json.dumps(GAP))
    return str(folder / "gap.json")


def arguments(data: Path, out: Path, gap: str, *more: str) -> list[str]:
    """The command line of a run of 7 steps; of an option given twice the last one counts."""
    fixed = "--preset gpt2_tiny --vocab-size 270 --context 32 --batch-size 8 --warmup-steps 2 --log-every 1"
    paths = ["--dataset", str(data), "--gap-config", gap, "--output-dir", str(out)]
    return [*fixed.split(), "--threads", "1", *paths, *more]
