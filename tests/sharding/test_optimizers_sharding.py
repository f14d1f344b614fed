"""Several optimizers, such as Muon for matrices and AdamW for the rest: masks, checkpoints, moves between backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from parity import largest_difference, result
from table_rows import marked, needed

#: (backend, optimizer of the matrices). Muon on FSDP2 multiplies pieces in 16 bits, which rounds in another way.
ROWS = [("ddp", "muon"), ("fsdp2", "sgd"), ("fsdp2", "muon"), ("ddp", "sgd")]
SHORT = ["ddp-muon", "fsdp2-sgd"]
OTHER = {"ddp": "fsdp2", "fsdp2": "ddp"}


def name_of(row: tuple[str, str]) -> str:
    return "-".join(row)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("optimizers")
    jobs = []
    for kind, matrices in needed(request, "row"):
        name = f"{kind}-{matrices}"
        jobs += [[f"plain-{matrices}", "plain", matrices, ""], [name, kind, matrices, ""]]
        jobs += [[f"{name}-resumed", kind, matrices, name], [f"{name}-moved", OTHER[kind], matrices, name]]
    run_workers("worker_optimizers.py", 2, out, json.dumps(jobs), timeout=300)
    return out


def same(ours: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    return len(ours) == len(wanted) and all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b) for a, b in zip(ours, wanted, strict=True)
    )


def differing(ours: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """The share of all bits of all masks that are not the same."""
    pairs = [(a[name], mask) for a, b in zip(ours, wanted, strict=True) for name, mask in b.items()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)


@pytest.mark.parametrize("row", marked(ROWS, SHORT, name_of))
def test_masks_are_those_of_a_run_without_sharding(trained: Path, row: tuple[str, str]) -> None:
    plain = result(trained, f"plain-{row[1]}")
    for rank in (0, 1):
        ours = result(trained, name_of(row), rank)
        assert ours["kept"] == plain["kept"]
        if row == ("fsdp2", "muon"):
            assert differing(ours["masks"], plain["masks"]) < 0.02
        else:
            assert same(ours["masks"], plain["masks"])
            assert largest_difference(ours["end"], plain["end"]) == 0


@pytest.mark.parametrize("row", marked(ROWS, SHORT, name_of))
def test_a_resumed_run_equals_one_that_never_stopped(trained: Path, row: tuple[str, str]) -> None:
    straight, resumed = result(trained, name_of(row)), result(trained, f"{name_of(row)}-resumed")
    assert same(resumed["masks"], straight["masks"][4:])
    assert largest_difference(resumed["end"], straight["end"]) == 0


@pytest.mark.parametrize("row", marked(ROWS, SHORT, name_of))
def test_another_backend_goes_on_from_the_same_state(trained: Path, row: tuple[str, str]) -> None:
    straight, moved = result(trained, name_of(row)), result(trained, f"{name_of(row)}-moved")
    assert largest_difference(moved["saved"], straight["saved"]) == 0
    assert same(moved["masks"], straight["masks"][4:])


@pytest.mark.full
def test_adagrad_resumes_under_zero3(tmp_path: Path) -> None:
    """DeepSpeed builds it anew over the pieces, and would not load what it has saved."""
    jobs = [["straight", "zero3", "adagrad", ""], ["resumed", "zero3", "adagrad", "straight"]]
    run_workers("worker_optimizers.py", 2, tmp_path, json.dumps(jobs), timeout=300)
    straight, resumed = result(tmp_path, "straight"), result(tmp_path, "resumed")
    assert same(resumed["masks"], straight["masks"][4:])
    assert largest_difference(resumed["end"], straight["end"]) == 0
