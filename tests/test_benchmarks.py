"""Every benchmark runs, at its size for tests, and writes what the tables read. Nothing here looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

#: Runs the main functions one after the other in one process: importing torch takes longer than most of them.
ALL = """
import importlib, sys
folder, out, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    sys.argv = [f"{name}.py", "--quick", "--out", out]
    importlib.import_module(name).main()
"""


def run(out: Path, *names: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-c", ALL, str(BENCHMARKS), str(out), *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def check(name: str, result: dict[str, object]) -> None:
    assert result["benchmark"] == name
    assert result["command"] == f"python benchmarks/{name}.py --quick"
    assert {"cpu", "cores", "threads", "load_average", "torch", "gap_ds"} <= set(result["machine"])  # type: ignore[call-overload]
    assert result["rows"]


def test_the_quick_ones(tmp_path: Path) -> None:
    """boundary compares masks with a stable sort, scaling compares 4 ranks with one and bytes with the forecast's."""
    for name, result in run(tmp_path, "masks", "boundary", "scaling", "peers").items():
        check(name, result)
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}\n")
    assert (tmp_path / "scaling.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_others(tmp_path: Path) -> None:
    for name, result in run(tmp_path, "attention", "memory", "startup", "throughput").items():
        check(name, result)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain", "fsdp1", "fsdp2", "fairscale", "zero2", "zero3"])
def test_the_overhead_of_every_backend(tmp_path: Path, backend: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable] if backend == "plain" else command
    command += [str(BENCHMARKS / "overhead.py"), "--quick", "--backend", backend, "--out", str(tmp_path / "o.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    (row,) = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert row["backend"] == backend and row["median_of_ratios"] > 0
