"""Demonstration: train a small Transformer dense and sparse on the shipped corpus and print both BLEU scores.

    make demo        or        python examples/translation/demo.py [--output-dir runs/demo]

Runs `train.py` under the DeepSpeed launcher, on all GPUs, or in two CPU processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gap_ds import GaPConfig
from gap_ds.method import schedule

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GAP = ROOT / "configs" / "gap" / "demo.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "demo")
    args = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    results: dict[str, dict[str, Any]] = {}
    for name, flags in (("dense", ["--dense"]), ("sparse", [])):
        console.rule(f"training the {name} model")
        if status := train(args.output_dir / name, flags):
            return status
        results[name] = json.loads((args.output_dir / name / "results.json").read_text(encoding="utf-8"))
    console.rule("result")
    console.print(table(results))
    console.print(picture(GaPConfig.load(GAP), results["sparse"]["steps_per_epoch"]))
    model = args.output_dir / "sparse" / "model"
    console.print(f"\nThe sparse model: {model}\nAll of it took {time.perf_counter() - started:.0f} s.")
    return 0


def train(folder: Path, flags: list[str]) -> int:
    """Run train.py under the DeepSpeed launcher and return its exit status."""
    ranks = torch.cuda.device_count() or 2
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(ranks), str(HERE / "train.py"), "--gap-config", str(GAP)]
    command += ["--deepspeed_config", str(ROOT / "configs" / "ds" / "zero2.json"), "--output-dir", str(folder)]
    command += ["--vocab-size", "2000", "--warmup-steps", "60", "--lr", "2e-3", "--batch-tokens", "1024"]
    command += ["--dropout", "0", "--samples", "2", "--overwrite", *flags]
    console = Console()
    console.print(" ".join(command), style="dim", soft_wrap=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PATH"] = os.pathsep.join([str(launcher.parent), environment["PATH"]])
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return subprocess.run(command, env=environment, check=False).returncode


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Return the figures of both runs side by side."""
    shown = Table("", *results)
    rows = {
        "BLEU": lambda r: f"{r['bleu']:.1f}",
        "chrF": lambda r: f"{r['chrf']:.1f}",
        "weights kept in the entries": lambda r: f"{r['kept']:,} of {r['numel']:,}",
        "sparsity of the entries": lambda r: f"{r['entry_sparsity']:.0%}",
        "sparsity of the whole model": lambda r: f"{r['model_sparsity']:.0%}",
        "training": lambda r: f"{r['train_seconds']:.0f} s",
    }
    for label, value in rows.items():
        shown.add_row(label, *(value(result) for result in results.values()))
    return shown


def picture(gap: GaPConfig, steps_per_epoch: int) -> str:
    """Return the schedule as text: one line per partition, time from left to right."""
    run = schedule.build(gap, steps_per_epoch)
    total, sparse = run.total_steps, 1 - gap.sparsity
    lines = [f"\nThe schedule of the sparse run ({total} steps; █ dense, ▓▒░ between, · {gap.sparsity:.0%} sparse)"]
    for k in range(gap.kappa):
        alone = [float(partition == k) for partition in range(gap.kappa)]
        keep = [sparse * one for one in alone]
        densities = [run.density_at(total * column // 60, keep, alone) for column in range(60)]
        above = [(d - sparse) / gap.sparsity for d in densities]
        bar = "".join("█▓▒░·"[sum(share < least for least in (1, 0.6, 0.25, 0.02))] for share in above)
        lines.append(f"  partition {k}  {bar}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
