"""Masking that is broken on purpose is found at the next boundary at the latest, on all ranks, and nobody hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import run_workers
from table_rows import marked, needed

REVIVED = " of its pruned weights are not 0 (before an update; they were 0 after the update before it). Something chang"
LATE = " of its pruned weights are not 0 (before the first update). Something changed them besides the optimizers that"
UNHOOKED = "its mask was not applied in a step of optimizer="
UNHELD = ": was not masked in an update ("
#: fault -> what both ranks are told
FAULTS = {
    "hook_dropped": f"layers.0.fc1.weight: {UNHOOKED}SGD: the engine's hooks were taken off.",
    "hook_dropped_on_one_rank": f"layers.0.fc1.weight: {UNHOOKED}SGD",
    "hook_dropped_fsdp2": f"layers.0.fc1.weight: {UNHOOKED}AdamW",
    "parameter_replaced": f"layers.3.fc1.weight: 474{REVIVED}",
    "owner_swapped": f"layers.2.fc1.weight{UNHELD}1 entries were not)",
    "data_swapped": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_between_steps": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_on_rank_1": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_in_every_step": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_fsdp1": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_fsdp1_flat": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_fsdp2": f"layers.3.fc1.weight: 245{REVIVED}",
    "revived_zero2": f"layers.3.fc1.weight: 474{REVIVED}",
    "revived_zero3": f"layers.3.fc1.weight: 237{REVIVED}",
    "working_copy_zero1": f"layers.3.fc1.weight: 474{REVIVED}",
    "working_copy_zero2": f"layers.3.fc1.weight: 474{REVIVED}",
    "working_copy_zero3": f"layers.3.fc1.weight: 237{REVIVED}",
    "second_sequence": f"layers.3.fc1.weight: 474{REVIVED}",
    "another_optimizer": f"layers.2.fc1.weight: 474{REVIVED}",
    "optimizer_rebuilt": "layers.0.fc1.weight: weights change, but no step of optimizer=SGD is seen",
    "loaded_late": f"layers.2.fc1.weight: 474{LATE}",
    "loaded_late_zero2": f"layers.2.fc1.weight: 31{LATE}",
    "bit_flipped_on_rank_1": "layers.3.fc1.weight: its masks differ between ranks 0 and 1, so their copies of the wei",
    "groups_emptied": f"layers.2.fc1.weight{UNHELD}4 entries were not)",
    "group_emptied_on_rank_1": f"layers.3.fc1.weight{UNHELD}1 entries were not)",
}
SHORT = [
    "hook_dropped_on_one_rank",
    "parameter_replaced",
    "owner_swapped",
    "revived_on_rank_1",
    "revived_in_every_step",
]
SHORT += ["working_copy_zero2", "working_copy_zero3", "second_sequence", "another_optimizer", "loaded_late"]
SHORT += ["bit_flipped_on_rank_1", "group_emptied_on_rank_1"]
QUIET = ["ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp1_flat", "fsdp2"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("looks")
    run_workers("worker_looks.py", 2, out, *needed(request, "fault"), *needed(request, "quiet"), timeout=300)
    return out


@pytest.mark.parametrize("fault", marked(FAULTS, SHORT))
def test_a_fault_is_found_by_the_next_boundary_on_all_ranks(told: Path, fault: str) -> None:
    for rank in (0, 1):
        sentence = (told / f"{fault}.{rank}").read_text()
        assert sentence.partition(": ")[2].startswith(FAULTS[fault]), sentence
        assert sentence.startswith("ValueError: ")


@pytest.mark.parametrize("quiet", marked(QUIET, ["zero2", "fsdp2"]))
def test_without_a_fault_weights_are_looked_at_in_parts(told: Path, quiet: str) -> None:
    """A look at all before the first update alone: libraries change no weight between two updates. These few weights
    are one part."""
    for rank in (0, 1):
        looks = torch.load(told / f"{quiet}.{rank}.pt")["looks"]
        assert looks == [(0, True, True)] + [(step, False, True) for step in range(1, 7)]
