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
        ("stages_of_a_pipeline", "ranks 0 and 1 have different models (this rank: 8 parameters, 0.weight (8, 8) and"),
        ("stage_without_blocks", "ranks 0 and 1 have different models (this rank: "),
        ("optimizer_of_rank_1_lacks_an_entry", "optimizer=SGD: does not hold layers.2.fc1.weight (1 of 8 are missing)"),
        (
            "config_missing_on_rank_1",
            "partitions=99: the model has 4 blocks with entries, and a partition needs at least one.",
        ),
        ("ddp_over_a_part", "the model is wrapped for 1 of the 2 ranks of the engine."),
        ("fsdp1_over_a_part", "the model is wrapped for 1 of the 2 ranks of the engine."),
        ("fsdp2_over_a_part", "embedding.weight: lies on a mesh of the ranks "),
        ("experts_that_ddp_ignores", "layers.1.fc1.weight: is trained, but DistributedDataParallel was told to ignore"),
        (
            "local_sgd",
            "layers.0.fc1.weight: its masks differ between ranks 0 and 1, so their copies of the weights have",
        ),
    ],
)
def test_all_ranks_say_what_is_wrong(said: Path, case: str, rank: int, sentence: str) -> None:
    assert (said / f"{case}.{rank}").read_text().startswith(sentence)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_ranks_do_not_share_is_found(said: Path, rank: int) -> None:
    text = (said / f"folder_of_each_rank.{rank}").read_text()
    assert ": is not on a disk that all ranks share: this rank does not see what rank 0 wrote." in text


def test_a_rank_that_has_left_is_named_with_the_operation(said: Path) -> None:
    seconds, _, sentence = (said / "left.0").read_text().partition(" ")
    assert float(seconds) < 60
    assert sentence.startswith(
        "gap_ds: the gathering of 4 numbers of the boundary at step 0 among 2 ranks failed: another rank has ended"
    )
