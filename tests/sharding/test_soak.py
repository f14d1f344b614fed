"""A long run keeps its memory and its descriptors. benchmarks/soak.py writes the figures down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_workers

#: Steps until the allocators have seen everything that comes again.
WARM = 600


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_memory_is_flat_over_hundreds_of_boundaries(tmp_path: Path, kind: str) -> None:
    run_workers("worker_soak.py", 2, tmp_path, kind, "2000", timeout=1100)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"soak.{rank}.json").read_text())
        assert found["boundaries"] >= 399 and found["checkpoints"] == 3  # two, and `latest`
        warm = [row for row in found["usage"] if row["step"] >= WARM]
        assert len({row["descriptors"] for row in warm}) == 1
        assert warm[-1]["resident_bytes"] <= warm[0]["resident_bytes"] + 2 * 2**20
