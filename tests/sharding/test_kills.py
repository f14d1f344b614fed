"""Runs that are killed end in the same bits as the run that never was."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import finish

MOMENTS = {
    "zero2": ["save", "boundary"],
    "fsdp2": ["save", "step"],
    "parallel": ["exchange", "save"],
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, kind: str) -> None:
    wanted = finish(kind, tmp_path / "undisturbed", [], seed=0, rounds=4)
    found = finish(kind, tmp_path / "killed", MOMENTS[kind], seed=1, rounds=4)
    assert found["finals"] == wanted["finals"] and len(wanted["finals"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOMENTS)
def test_a_dozen_kills(tmp_path: Path, kind: str) -> None:
    wanted = finish(kind, tmp_path / "undisturbed", [], seed=0, rounds=40)
    moments = (["exchange", "save", "step"] if kind == "parallel" else ["save", "boundary", "step"]) * 4
    found = finish(kind, tmp_path / "killed", moments, seed=2, rounds=40)
    assert found["finals"] == wanted["finals"]
