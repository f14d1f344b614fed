"""Models that transformers or Accelerate spread over a mesh of 4 processes, against one process without sharding."""

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

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WRAP = {
    "auto_wrap_policy": "transformer_based_wrap",
    "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
}
ROWS: list[Row] = [
    {"name": "engine_tp", "what": "engine", "sizes": {"tp_plan": "auto"}},
    {"name": "trainer_fsdp_tp", "what": "trainer", "sizes": {"tp_size": 2, "fsdp_size": 2}},
    {"name": "accelerate_tp", "what": "accelerate", "sizes": {"tp_size": 4}, "mesh": {"tp_size": 4}},
    {
        "name": "accelerate_hsdp",
        "what": "accelerate",
        "mesh": {"dp_replicate_size": 2, "dp_shard_size": 2},
        "fsdp": WRAP,
    },
]
#: DeepSpeed keeps the groups of tensor parallelism for a whole process: all rows have the same.
AUTOTP: list[Row] = [{"name": "autotp", "what": "deepspeed", "stage": 2, "autotp": 2}]
REFUSED: list[Row] = [
    {"name": "autotp_no_box", "what": "deepspeed", "stage": 1, "autotp": 2, "frozen": True},
    {"name": "autotp_zero3", "what": "deepspeed", "stage": 3, "autotp": 2},
]
BACKENDS = {"engine_tp": "plain", "accelerate_tp": "plain", "trainer_fsdp_tp": "fsdp2", "accelerate_hsdp": "fsdp2"}
BACKENDS |= {"autotp": "zero2"}
SHORT: list[str] = []


def table(rows: list[Row]) -> list[Any]:
    return marked(rows, [name for name in SHORT if name in {row["name"] for row in rows}], lambda row: row["name"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("hf_mesh")
    (out / "rows.json").write_text(json.dumps(needed(request, "row")))
    run_workers("worker_hf_mesh.py", 4, out, timeout=400)
    return out


@pytest.mark.parametrize("row", table(ROWS + AUTOTP))
def test_masks_and_weights_are_those_of_one_process(trained: Path, row: Row) -> None:
    for rank in range(4):
        ours, wanted = (parity.result(trained, name, rank) for name in (row["name"], "alone"))
        assert ours["wrong"] == wanted["wrong"] == []
        assert ours["backend"] == BACKENDS[row["name"]]
        entries = ours["stats"]["entries"]
        assert {name: entry["kept"] for name, entry in entries.items()} == {
            e.name: e.keep for e in ours["plan"].entries
        }
        for got, mask in zip(ours["masks"], wanted["masks"], strict=True):
            assert got.keys() == mask.keys() and all(torch.equal(got[name], mask[name]) for name in mask)
        assert parity.largest_difference(ours, wanted) <= 1e-5


@pytest.mark.parametrize("row", table([row for row in ROWS + AUTOTP if row["what"] != "trainer"]))
def test_resuming_equals_never_having_stopped(trained: Path, row: Row) -> None:
    parity.check_resume(trained, row)


@pytest.mark.parametrize("row", table(ROWS + AUTOTP))
def test_the_export_is_the_sparse_model(trained: Path, row: Row) -> None:
    ours = parity.result(trained, row["name"])
    for name, weight in ours["weights"].items():
        assert torch.equal(ours["exported"][name], weight.view(ours["exported"][name].shape)), name
        assert "saved" not in ours or torch.equal(ours["saved"][name], ours["exported"][name]), name
    for entry in ours["plan"].entries:
        assert int(ours["exported"][entry.name].count_nonzero()) == entry.keep


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        pytest.param(REFUSED[0], "which is no box of the whole weight. DeepSpeed ", marks=pytest.mark.full),
        pytest.param(REFUSED[1], "records how weights are cut only for AutoTP", marks=pytest.mark.full),
    ],
    ids=["no_box", "zero3"],
)
def test_other_cuts_of_autotp_are_refused_on_all_ranks(trained: Path, row: Row, sentence: str) -> None:
    for rank in range(4):
        assert sentence in parity.result(trained, row["name"], rank)["refused"]
