"""ResNet-50 itself on two ranks: every boundary crossed, with exact budgets, on three sharding libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_resnet50_on_three_libraries(tmp_path: Path) -> None:
    """benchmarks/vision.py counts the masks after every boundary and the export at the end, and ends with an error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    for backend in ("zero1", "zero3", "fsdp2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", str(ROOT / "benchmarks" / "vision.py"), "--backend", backend]
        command += [
            "--size",
            "32",
            "--batch",
            "4",
            "--steps",
            "30",
            "--pairs",
            "6",
            "--out",
            str(tmp_path / "out.json"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["backend"] for row in rows] == ["zero1", "zero3", "fsdp2"]
    for row in rows:
        assert row["boundaries"] == 4 and row["entries"] == 54
        assert row["kept"] == round(0.1 * row["weights_in_entries"])
