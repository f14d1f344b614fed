"""benchmarks/inference.py runs at its size for tests, keeps finished rows, and lists missing ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "inference.py"


def run(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.full
def test_a_row_from_an_old_file_and_once_more(tmp_path: Path) -> None:
    out = tmp_path / "inference.json"
    out.write_text(json.dumps({"machine": {}, "speed": [{"preset": "tiny"}]}))  # of an earlier version: dropped
    result = run(out)
    (row,) = result["speed"]
    assert (row["preset"], row["rounds"], row["clock"], row["equal_outputs"]) == ("tiny", 3, "process", 1)
    for name in ("ratio", "noise", "ratio_to_packed"):
        low, high = row[f"{name}_range"]
        assert 0 < low <= row[name] <= high
    assert sum(choice["names"] for choice in row["choices"]) == 33 and row["form"]
    assert all(row[f"{form}_mib"] is None or row[f"{form}_mib"] > 0 for form in ("dense", "packed", "sparse"))
    sizes = {size["dtype"]: size for size in result["files"]}
    assert sizes.keys() == {"float32", "bfloat16"} and all(s["compact MB"] < s["dense MB"] for s in sizes.values())
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "Missing of the 72 cells" in text and "big 95%: 1/1, 1/4" in text and "dense : dense" in text
    assert run(out)["speed"] == result["speed"]  # measured already


@pytest.mark.slow
def test_memory_in_separate_processes(tmp_path: Path) -> None:
    (row,) = run(tmp_path / "inference.json", "--memory")["memory"]
    assert all(row[f"{form}_translating_mib"] > 0 for form in ("dense", "packed", "sparse"))
