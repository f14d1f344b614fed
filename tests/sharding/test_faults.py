"""Ranks that disagree stop all, by name; a rank that is gone is not waited for in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import run_workers


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    run_workers("worker_faults.py", 2, out, timeout=240)
    return out


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("other_seed", "ranks 0 and 1 have different config (this rank: gap|method:cyclic|"),
        ("other_masks", "layers.3.fc1.weight: its masks differ between ranks 0 and 1, so their copies of"),
        ("loss_on_one_rank", "a loss before the boundary at step 3 was NaN or infinite on rank 1: stopped"),
    ],
)
def test_all_ranks_say_what_is_wrong(said: Path, case: str, rank: int, sentence: str) -> None:
    assert (said / f"{case}.{rank}").read_text().startswith(sentence)


def test_a_rank_that_has_left_is_named_with_the_operation(said: Path) -> None:
    seconds, _, sentence = (said / "left.0").read_text().partition(" ")
    assert float(seconds) < 60
    assert sentence.startswith(
        "gap_ds: the gathering of 4 numbers of the boundary at step 0 among 2 ranks failed: another rank has ended"
    )
