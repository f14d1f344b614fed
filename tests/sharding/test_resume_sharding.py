"""Runs that go on with another number of ranks, or in another library, from bit for bit the same state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from parity import result
from table_rows import marked, needed

KINDS = ["zero2", "zero3", "fsdp2"]
#: Name of the checkpoint, on whose ranks it was saved -> backend and ranks that go on.
RANKS = [(f"2_{kind}", kind, ranks) for kind in KINDS for ranks in (1, 3)] + [(f"1_{kind}", kind, 2) for kind in KINDS]
BACKENDS = [
    ("2_zero3", "fsdp2"),
    ("2_fsdp2", "zero3"),
    ("2_zero2", "ddp"),
    ("2_zero2", "fsdp1"),
    ("2_fsdp2", "zero2"),
    ("2_fsdp2", "zero3_offload"),
    ("2_fsdp2", "oss"),
    ("2_zero3", "fairscale"),
    ("2_ddp", "zero3"),
]
#: With another arrangement of the parameter groups, or of precision: what is restored is the same, what follows is not.
OTHERS = [("2_fsdp2", "fsdp1_flat"), ("2_fsdp2", "zero2_bf16")]
ALL = [*RANKS, *((saved, on, 2) for saved, on in BACKENDS + OTHERS)]
#: Every kind to another number of ranks, and across libraries.
SHORT = {("2_zero2", "zero2", 1), ("2_zero3", "zero3", 1), ("2_fsdp2", "fsdp2", 1)}
SHORT |= {("2_zero3", "fsdp2", 2)}


def run(out: Path, ranks: int, jobs: list[dict[str, Any]]) -> None:
    run_workers("worker_resume.py", ranks, out, json.dumps(jobs), timeout=400)


def table(rows: list[tuple[str, str, int]]) -> list[Any]:
    return marked(rows, [name_of(row) for row in rows if row in SHORT], name_of)


def name_of(row: tuple[str, str, int]) -> str:
    saved, on, ranks = row
    return f"{saved}_to_{on}_{ranks}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The jobs that the selected tests need: what is saved on 2 ranks or 1, and then what goes on from it."""
    out, rows = tmp_path_factory.mktemp("resume"), needed(request, "row")

    def loads(ranks: int, saved_on: str) -> list[dict[str, Any]]:
        return [{"load": name, "on": on} for name, on, n in rows if n == ranks and name.startswith(saved_on)]

    def saves(ranks: str) -> list[dict[str, Any]]:
        names = dict.fromkeys(name for name, _, _ in rows if name.startswith(ranks))
        return [{"save": name, "on": name[2:]} for name in names]

    bare = [{"save": f"bare_{kind}", "on": kind, "portable": False} for kind in ("zero2", "fsdp2")]
    full = [{"full": f"full_{kind}", "on": kind} for kind in needed(request, "full_on")]
    inherited = [{"inherit": f"inherit_{kind}", "on": kind} for kind in needed(request, "inherited_on")]
    run(out, 2, [*saves("2_"), *loads(2, "2_"), *bare, *full, *inherited])
    run(out, 1, [*saves("1_"), *loads(1, "2_"), *({"load": job["save"], "on": job["on"]} for job in bare)])
    for ranks, saved_on in ((3, "2_"), (2, "1_")):
        if jobs := loads(ranks, saved_on):
            run(out, ranks, jobs)
    return out


def same(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Weights, moments, masks, last values and buffers bit for bit; steps and learning rates."""
    for what in ("weights", "masks", "last", "buffers"):
        assert ours[what].keys() == wanted[what].keys()
        assert all(torch.equal(ours[what][n], t.view(ours[what][n].shape)) for n, t in wanted[what].items()), what
    for name, moments in wanted["moments"].items():
        assert len(ours["moments"][name]) == len(moments) == 2
        for a, b in zip(ours["moments"][name], moments, strict=True):
            assert torch.equal(a, b.view(a.shape)), name
    assert ours["steps"] == wanted["steps"] and set(ours["steps"].values()) == {4.0}
    assert ours["lr"] == wanted["lr"] == [0.008, 0.008] and ours["applied"] == wanted["applied"] == 4


@pytest.mark.parametrize("row", table(ALL))
def test_the_state_is_the_same_bit_for_bit(trained: Path, row: tuple[str, str, int]) -> None:
    saved, _, ranks = row
    wanted = result(trained, f"{saved}_{saved[0]}")
    assert len(wanted["state"]["masks"]) == len(wanted["state"]["last"]) == 4
    assert all(values.count_nonzero() for values in wanted["state"]["last"].values())
    assert float(wanted["state"]["buffers"]["scale"][0]) == 5.0
    for rank in range(ranks):
        found = result(trained, name_of(row), rank)
        assert found["wrong"] == []
        same(found["state"], wanted["state"])
        working = wanted["working"].to(found["working"].dtype)
        assert torch.equal(found["working"], working.view(found["working"].shape))


@pytest.mark.parametrize("row", table([*RANKS, *((saved, on, 2) for saved, on in BACKENDS)]))
def test_training_goes_on_as_the_run_that_was_not_moved(trained: Path, row: tuple[str, str, int]) -> None:
    """Over a boundary, with the same global batches; sums over other ranks are taken in another order."""
    wanted, found = result(trained, f"{row[0]}_{row[0][0]}"), result(trained, name_of(row))
    assert found["later"] == pytest.approx(wanted["later"], abs=1e-5)
    assert found["end"]["masks"].keys() == wanted["end"]["masks"].keys() != wanted["state"]["masks"].keys()
    for name, mask in wanted["end"]["masks"].items():
        assert torch.equal(found["end"]["masks"][name], mask)
    assert found.get("global_steps", 8) == 8


@pytest.mark.parametrize("row", table([("2_ddp", "zero3", 2), ("2_fsdp2", "fsdp2", 1)]))
def test_replicas_are_written_once(trained: Path, row: tuple[str, str, int]) -> None:
    pieces = {"2_ddp": 1, "2_fsdp2": 2}[row[0]]
    assert result(trained, f"{row[0]}_2")["files"] == [f"portable_{i}.safetensors" for i in range(pieces)]


@pytest.mark.full
def test_replicas_of_pieces_are_written_once(tmp_path: Path) -> None:
    """Hybrid sharding: 2 replicas of 2 pieces."""
    run(tmp_path, 4, [{"save": "4_hybrid", "on": "fsdp2_hybrid"}])
    run(tmp_path, 2, [{"load": "4_hybrid", "on": "zero3"}])
    wanted, found = result(tmp_path, "4_hybrid_4"), result(tmp_path, "4_hybrid_to_zero3_2")
    assert wanted["files"] == ["portable_0.safetensors", "portable_1.safetensors"]
    same(found["state"], wanted["state"])


def test_a_checkpoint_that_is_not_portable_says_so(trained: Path) -> None:
    said = result(trained, "bare_zero2_to_zero2_1")["said"]
    assert said.endswith(
        "step_4: was saved by zero2 on 2 ranks, and this is zero2 on 1 ranks: that takes a checkpoint saved with "
        "portable=True. Go on with zero2 on 2 ranks, and save such a one there."
    )


def test_libraries_that_reshard_their_own_files_need_no_portable_ones(trained: Path) -> None:
    same(result(trained, "bare_fsdp2_to_fsdp2_1")["state"], result(trained, "bare_fsdp2_2")["state"])


@pytest.mark.parametrize("inherited_on", marked([*KINDS, "ddp", "fsdp1"], ["zero3"]))
def test_masks_of_a_sparse_model_are_kept_through_fine_tuning(trained: Path, inherited_on: str) -> None:
    for rank in (0, 1):
        found = result(trained, f"inherit_{inherited_on}_2", rank)
        assert found["wrong"] == [] and len(found["masks"]) == 8
        for init in ("from_weights", "from_file"):
            assert found[init].keys() == found["masks"].keys()
            assert all(torch.equal(found[init][name], mask) for name, mask in found["masks"].items())


@pytest.mark.parametrize("full_on", marked([*KINDS, "ddp", "oss"], ["fsdp2"]))
def test_a_full_disk_on_one_rank_stops_the_save_on_all(trained: Path, full_on: str) -> None:
    first, second = (result(trained, f"full_{full_on}_2", rank) for rank in (0, 1))
    assert len(first["said"]) == len(second["said"]) == 4
    for sentence in first["said"] + second["said"]:
        assert ": was not saved, and older checkpoints are as they were (" in sentence
    assert all(seen == first["seen"][0] for seen in first["seen"] + second["seen"])
    assert first["left"] == second["left"] == ["next"]
