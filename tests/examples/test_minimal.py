"""examples/minimal.py trains sparse on one process, and on two with FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]


@pytest.mark.parametrize("launcher", [[], pytest.param(TORCHRUN, marks=pytest.mark.full)], ids=["plain", "fsdp2"])
def test_trains_and_exports_exact_zeros(tmp_path: Path, launcher: list[str]) -> None:
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "examples" / "minimal.py"),
        "--output-dir",
        str(tmp_path / "model"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.partition(":")[0] for line in steps] == [f"step {step}" for step in range(20, 161, 20)]
    assert steps[0].endswith("density 0.467") and steps[-1].endswith("density 0.200")
    losses = [float(line.split()[3].rstrip(",")) for line in steps]
    assert losses[-1] < losses[0] / 2
    # 122,880 weights at 80 %; each of the 21 matrices rounds its budget.
    assert lines[-1] == "98,310 of 122,880 weights in the pruned matrices are exactly 0"
