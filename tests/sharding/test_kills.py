"""Runs that are killed and restarted end with the same bits as an undisturbed run. All slow.

Fast tests kill a worker at every access of its exchange folder (unit/parallel/test_exchange), and a save at every
rename (unit/checkpoint/test_folder).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import KINDS, finish

pytestmark = pytest.mark.slow

MOMENTS = {
    "zero2": ["save", "boundary"],
    "fsdp2": ["save", "step"],
    # Rank 0, between the two moments of the third entry that the first boundary (step 3) prunes.
    "zero2_packed": ["0:packing:6:0"],
    "fsdp2_packed": ["0:packing:6:0"],
    "parallel": ["exchange", "save"],
    # Both ranks of worker 1, at the end of its second round (the steps 3 to 5), when it has published and waits.
    "parallel_fsdp2": ["1:exchange:4:0"],
}


@pytest.mark.full
@pytest.mark.parametrize("kind", MOMENTS)
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, kind: str) -> None:
    wanted = finish(kind, tmp_path / "undisturbed", [], seed=0, rounds=4)
    found = finish(kind, tmp_path / "killed", MOMENTS[kind], seed=1, rounds=4)
    workers, ranks = KINDS[kind]
    assert found["finals"] == wanted["finals"] and len(wanted["finals"]) == workers * ranks
    if kind.endswith("_packed"):  # both ranks went on from the checkpoint before that boundary
        assert found["starts"] == [0, 0, 2, 2]
    if kind == "parallel_fsdp2":  # both went on from the checkpoint in the middle of that round
        assert found["starts"] == [0, 0, 0, 0, 4, 4]


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_dozen_kills(tmp_path: Path, kind: str) -> None:
    wanted = finish(kind, tmp_path / "undisturbed", [], seed=0, rounds=40)
    moments = (["exchange", "save", "step"] if kind.startswith("parallel") else ["save", "boundary", "step"]) * 4
    found = finish(kind, tmp_path / "killed", moments, seed=2, rounds=40)
    assert found["finals"] == wanted["finals"]
