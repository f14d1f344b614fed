"""Files from strangers, changed at random or cut at every byte: they work, or end in a ValueError."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest

KINDS = (
    *("config.json", "config.yaml", "masks/masks.safetensors", "masks/pruned.safetensors", "masks/seen.safetensors"),
    *("masks/before.safetensors", "masks/state.json", "manifest", "portable", "sealed/state.json", "sealed/rng_0.json"),
    *("inspect", "compact", "export/gap.json", "export/weights"),
    *("run/gap_history.jsonl", "run/metrics.jsonl", "run/results.json", "exchange/json", "exchange/safetensors"),
    *("rows.jsonl", "rows.parquet"),
)


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, fuzz.Target]]:
    # Thousands of small writes: into memory, where there is such a folder.
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield fuzz.targets(folder)
    shutil.rmtree(folder)


def test_all_kinds_are_listed(targets: dict[str, fuzz.Target]) -> None:
    assert sorted(targets) == sorted(KINDS)


@pytest.mark.parametrize("inputs", [30, pytest.param(120, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_work_or_are_refused(targets: dict[str, fuzz.Target], kind: str, inputs: int) -> None:
    target = targets[kind]
    assert target.run(target.original), "the file as it was written is taken"
    tally = fuzz.fuzz(target, inputs, seed=0)
    assert tally.inputs == inputs and tally.taken + tally.refused == inputs
    assert target.run(target.original)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["masks/masks.safetensors", "portable", "exchange/safetensors", "masks/state.json"])
def test_files_cut_or_flipped_at_every_byte(targets: dict[str, fuzz.Target], kind: str) -> None:
    target = targets[kind]
    whole = target.original
    try:
        for at in range(0, len(whole), 1 + len(whole) // 4000):
            assert not target.run(whole[:at]), f"cut to {at} of {len(whole)} bytes, and taken"
            target.run(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    finally:
        target.path.write_bytes(whole)
        target.seal()
