"""Partitions that cut the tensors of experts, on 2 ranks: masks and weights are those of plain code on whole tensors.

Under ZeRO-3 gradients of this model differ from plain code's by rounding, with and without gap_ds: weights are compared
to 1e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from table_rows import marked, needed
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("fairscale")

BACKENDS = marked(["fsdp2", "fsdp1", "fsdp1_flat", "zero1", "zero2", "zero3", "fairscale", "oss"], ["fsdp2"], str)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder: Path = tmp_path_factory.mktemp("experts")
    run_workers("worker_experts.py", 2, folder, *needed(request, "backend"), timeout=300)
    return folder


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.0.pt", weights_only=False)
    return found


def rows(weights: dict[str, Tensor], name: str) -> Tensor:
    parameter, _, cut = name.rstrip("]").partition("[")
    return weights[parameter][slice(*map(int, cut.split(":")))] if cut else weights[parameter]


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_groups_of_experts_are_a_stable_sort_of_their_rows(trained: Path, backend: str) -> None:
    ours, wanted = result(trained, backend), result(trained, "plain")
    names = {entry.name for entry in ours["plan"].entries}
    assert "model.layers.0.mlp.experts.gate_up_proj[1:4]" in names and len(names) == 16
    assert ours["wrong"] == []
    for step, masks in enumerate(wanted["masks"]):
        assert ours["masks"][step].keys() == masks.keys()
    kept = {name: row["kept"] for name, row in ours["stats"]["entries"].items()}
    assert kept == {name: int(mask.sum()) for name, mask in wanted["masks"][-1].items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_experts_are_those_of_plain_code(trained: Path, backend: str) -> None:
    ours, wanted = result(trained, backend), result(trained, "plain")
    for step, masks in enumerate(wanted["masks"]):
        assert all(torch.equal(ours["masks"][step][name], mask) for name, mask in masks.items())
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(ours["final"]["weights"][name].view_as(weight), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_resumes_bit_for_bit_and_its_export_has_whole_tensors(trained: Path, backend: str) -> None:
    ours = result(trained, backend)
    for kind in ("weights", "moments"):
        for name, value in ours["final"][kind].items():
            pairs = zip(value, ours["resumed"][kind][name], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), name
    for name, weight in ours["final"]["weights"].items():
        assert torch.equal(ours["exported"][name], weight.view_as(ours["exported"][name]))
    for entry in ours["plan"].entries:
        assert int(rows(ours["exported"], entry.name).count_nonzero()) == entry.keep
