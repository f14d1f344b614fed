"""Meshes of tensor, expert, data and context parallelism: every row really trained on 4 processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from launch import run_workers
from parity import Row
from table_rows import marked, needed

from gap_ds.method.names import rows_of

RIGL = {"method": "rigl", "sparsity": 0.8, "phase_steps": 12, "update_steps": 4, "finetune_steps": 3}

#: More partitions than blocks: between the experts of a tensor.
CUT = {"sparsity": 0.8, "partitions": 6, "phase_steps": 2, "rounds": 1, "finetune_steps": 3}

PATTERN = {"sparsity": 0.5, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 3}

ROWS: list[Row] = [
    {"name": "tp_groups", "mesh": "tp_groups"},
    {"name": "fsdp_tp", "mesh": "fsdp_tp"},
    {"name": "fsdp_tp_clip", "mesh": "fsdp_tp", "clip": 0.5},
    {"name": "fsdp_sp", "mesh": "fsdp_sp"},
    {"name": "hsdp_tp", "mesh": "hsdp_tp"},
    {"name": "shard1", "mesh": "shard1"},
    {"name": "cp", "mesh": "cp"},
    {"name": "fsdp_tp_2_4", "mesh": "fsdp_tp", "gap": PATTERN | {"pattern": "2:4"}},
    {"name": "shard1_block", "mesh": "shard1", "gap": PATTERN | {"pattern": "block:4x4"}},
]
MIXTURES: list[Row] = [
    {"name": "ep_groups", "mesh": "ep_groups", "experts": True, "same_as": "mixture_alone"},
    {"name": "fsdp_ep", "mesh": "fsdp_ep", "experts": True, "same_as": "mixture_ddp"},
    {"name": "fsdp_ep_1", "mesh": "fsdp_ep_1", "experts": True, "same_as": "mixture_ddp"},
    {"name": "fsdp_packed", "mesh": "fsdp_packed", "experts": True, "same_as": "mixture_ddp"},
    {
        "name": "rigl_fsdp_ep",
        "mesh": "fsdp_ep",
        "experts": True,
        "same_as": "mixture_rigl_ddp",
        "gap": RIGL,
    },
    *(
        {"name": f"{mesh}_cut", "mesh": mesh, "experts": True, "same_as": "mixture_cut_ddp", "gap": CUT}
        for mesh in ("fsdp_ep", "fsdp_ep_1")
    ),
]
UNSHARDED: list[Row] = [
    {"name": "mixture_alone", "mesh": "alone", "experts": True},
    {"name": "mixture_ddp", "mesh": "ddp", "experts": True},
    {"name": "mixture_rigl_ddp", "mesh": "ddp", "experts": True, "gap": RIGL},
    {"name": "mixture_cut_ddp", "mesh": "ddp", "experts": True, "gap": CUT},
]
CHAINS: list[Row] = [
    {
        "name": f"chain_{'portable' if portable else 'native'}",
        "what": "chain",
        "meshes": ["fsdp4", "fsdp_tp", "tp4", "shard1", "alone"],
        "portable": portable,
    }
    for portable in (False, True)
]
PIPELINE: Row = {"name": "pipeline", "what": "pipeline"}
BOXES: Row = {"name": "boxes", "what": "boxes"}
SUMMANDS: Row = {"name": "summands", "what": "summands"}
#: A pattern on FSDP2 x TP, all placements, and gradients that are sums; each mesh of 4 processes takes 10 s.
SHORT = ["fsdp_tp_2_4", "boxes", "summands"]


def table(rows: list[Row]) -> list[Any]:
    names = {row["name"] for row in rows}
    return marked(rows, [name for name in SHORT if name in names], lambda row: row["name"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder, rows = tmp_path_factory.mktemp("mesh"), needed(request, "row")
    wanted = {row["same_as"] for row in rows if "same_as" in row}
    rows = [row for row in UNSHARDED if row["name"] in wanted] + rows
    (folder / "rows.json").write_text(json.dumps(rows))
    run_workers("worker_mesh.py", 4, folder, timeout=400)
    return folder


@pytest.mark.parametrize("row", table(ROWS + MIXTURES))
def test_invariants_hold_after_every_step(trained: Path, row: Row) -> None:
    for rank in range(4):
        found = parity.result(trained, row["name"], rank)
        assert found["wrong"] == []
        entries = found["stats"]["entries"]
        assert {name: entry["kept"] for name, entry in entries.items()} == {
            e.name: e.keep for e in found["plan"].entries
        }


@pytest.mark.parametrize("row", table(ROWS + CHAINS))
def test_masks_and_weights_are_those_of_the_independent_reference(trained: Path, row: Row) -> None:
    for rank in range(4):
        ours = parity.result(trained, row["name"], rank)
        wanted = ours["reference"]
        for got, mask in zip(ours["masks"], wanted["masks"], strict=True) if "mesh" in row else []:
            assert got.keys() == mask.keys() and all(torch.equal(got[n], mask[n]) for n in mask)
        assert parity.largest_difference(ours, wanted) <= 1e-5


@pytest.mark.parametrize("row", table(MIXTURES))
def test_mixtures_are_those_of_whole_experts(trained: Path, row: Row) -> None:
    for rank in range(4):
        ours, wanted = (parity.result(trained, name, rank) for name in (row["name"], row["same_as"]))
        for got, mask in zip(ours["masks"], wanted["masks"], strict=True):
            assert got.keys() == mask.keys() and all(torch.equal(got[n], mask[n]) for n in mask)
        assert parity.largest_difference(ours, wanted) <= 1e-5


@pytest.mark.parametrize("row", table(ROWS + MIXTURES))
def test_resume_in_mid_phase_equals_never_having_stopped(trained: Path, row: Row) -> None:
    parity.check_resume(trained, row)


@pytest.mark.parametrize("row", table(ROWS + MIXTURES))
def test_export_is_the_sparse_model(trained: Path, row: Row) -> None:
    ours = parity.result(trained, row["name"])
    for name, weight in ours["weights"].items():
        assert torch.equal(ours["exported"][name], weight.view(ours["exported"][name].shape)), name
    for entry in ours["plan"].entries:
        whole, (_, rows) = ours["exported"][entry.parameter], rows_of(entry.name)
        assert int(whole[slice(*rows) if rows else slice(None)].count_nonzero()) <= entry.keep


@pytest.mark.parametrize("row", table([PIPELINE]))
def test_stages_of_a_pipeline_have_the_budgets_and_masks_of_the_whole_model(trained: Path, row: Row) -> None:
    seen: set[str] = set()
    for rank in range(4):
        found = parity.result(trained, row["name"], rank)
        whole = found["whole"]
        entries = found["stats"]["entries"]
        assert entries == {name: whole["stats"]["entries"][name] for name in entries}
        assert all(torch.equal(mask, whole["masks"][name]) for name, mask in found["masks"].items())
        assert parity.largest_difference(found["final"], whole["final"] | {"moments": {}}) <= 1e-5
        seen |= entries.keys()
    assert seen == whole["stats"]["entries"].keys()


@pytest.mark.parametrize("row", table([BOXES]))
def test_boxes_of_all_placements_hold_what_this_rank_has(trained: Path, row: Row) -> None:
    assert [parity.result(trained, row["name"], rank)["wrong"] for rank in range(4)] == [[]] * 4


@pytest.mark.parametrize("row", table([SUMMANDS]))
def test_gradients_that_are_summands_are_summed_for_our_optimizers_and_for_growth(trained: Path, row: Row) -> None:
    for rank in range(4):
        found = parity.result(trained, row["name"], rank)
        for name, weight in found["alone"].items():
            assert torch.equal(found["parts"][name] != 0, weight != 0), name
            torch.testing.assert_close(found["parts"][name], weight, rtol=0, atol=1e-5)
