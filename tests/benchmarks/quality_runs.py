"""Helpers of the tests of benchmarks/quality: a small run, and made-up results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QUALITY = ROOT / "benchmarks" / "quality"
sys.path[:0] = [str(QUALITY), str(ROOT / "examples")]

import presets  # noqa: E402
import records  # noqa: E402
import rows  # noqa: E402

SMALL = replace(presets.SMOKE, rows=("dense", "static", "cyclic_3"))


def small_run(name: str = "static", seed: int = 0, preset: presets.Preset = SMALL) -> records.Run:
    row = rows.BY_NAME[name]
    return records.Run(preset, row, 0.0 if row.dense else 0.8, seed)


def record(run: records.Run, bleu: float = 30.0, **others: Any) -> records.Record:
    """A record like those of `collect`, with made-up figures."""
    figures = {"bleu": bleu, "chrf": 55.0, "epochs": 8.0, "training_flops": 0.6, "mean_density": 0.4}
    figures |= {"train_seconds": 90.0, "validation_loss": [3.0, 5.0 - bleu / 10]}
    machine = {"machine": "x86_64 CPU", "cores": 2, "torch": "2.13.0", "gap_ds": "0.1.0"}
    known = {
        "row": run.row.name,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "setup": run.setup,
        "workers": run.row.workers,
    }
    return {**known, **figures, **machine, **others}


def leave_results(run: records.Run, out: Path, **others: Any) -> None:
    """Write the files of a finished run, like the example."""
    for number, folder in enumerate(run.folders(out)):
        folder.mkdir(parents=True)
        arguments = {**records.expected(run.preset), "seed": run.seed, "threads": 1, "dataset": None}
        results = {
            **{"bleu": 30.12345, "bleu_uncased": 31.0, "chrf": 55.0, "signatures": {"bleu": "BLEU|..."}},
            **{"signature": "gap|...", "applied_steps": 80, "steps_per_epoch": 10, "dense": False, "device": "cpu"},
            **{"training_flops": 0.5 + number, "mean_density": 0.4, "entry_sparsity": 0.8, "model_sparsity": 0.7},
            **{"train_seconds": 4.0, "trained_from_step": 0, "score_seconds": 1.0, "torch": "2.13.0"},
            **{"arguments": {**arguments, **others.pop("arguments", {})}, **others},
        }
        (folder / "results.json").write_text(json.dumps(results))
        lines = [
            {"kind": "train", "step": 10, "seconds": 7.0, "loss": 3.0},
            {"kind": "validation", "step": 10, "seconds": 8.0, "loss": 2.00006},
            {"kind": "validation", "step": 20, "seconds": 4.0, "loss": 1.5},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
