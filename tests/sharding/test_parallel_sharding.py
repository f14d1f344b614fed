"""Parallel GaP: jobs of two ranks that meet in a folder, on every kind of backend, against whole models.

Two workers show the sharding of every backend. Three (slow) show the mean over workers, budgets, ramps, a dense
beginning, learning rates and optimizer state where workers meet.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import HERE
from safetensors.torch import load_file

from gap_ds.parallel import launch

pytestmark = pytest.mark.full  # three jobs of two ranks, by the launcher

#: Rows of two and of three workers, and the reference of each.
TWO = {"ddp": "two_False", "zero2": "two_True", "zero3": "two_True", "fsdp2": "two_False"}
RISING = {"ddp_rising": "rising_False", "zero3_rising": "rising_True"}
THREE = {
    **{"zero3_erk": "erk_True", "zero3_global": "global_True"},
    **{"fsdp2_erk": "erk_False", "fsdp2_global": "global_False"},
}
#: (row, reference, worker)
WORKERS = [
    (name, reference, k) for name, reference in [*TWO.items(), *RISING.items(), ("ddp_first", "first")] for k in (0, 1)
]
WORKERS_OF_THREE = [(name, reference, k) for name, reference in THREE.items() for k in (0, 1, 2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("two"), workers=2)


@pytest.fixture(scope="module")
def trained_by_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("three"), workers=3)


def train(out: Path, workers: int) -> Path:
    """Run all rows with this number of workers."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent.parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        if not torch.cuda.is_available():
            patch.setenv("DS_ACCELERATOR", "cpu")
        command = [str(HERE / "worker_parallel.py"), str(out)]
        status = launch.run(command, workers=workers, ranks=2, launcher="torchrun", out=printed)
    errors = [torch.load(path) for path in sorted(out.glob("error.*.pt"))]
    assert status == 0, "\n".join([printed.getvalue()[-6000:], *errors])
    return out


def result(out: Path, name: str, worker: int, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / f"{name}.{worker}.{rank}.pt", weights_only=False)
    return found


def wanted(out: Path, name: str, worker: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / f"reference_{name}.0.0.pt", weights_only=False)[worker]
    return found


@pytest.mark.parametrize(("name", "reference", "worker"), WORKERS)
def test_the_workers_equal_the_reference_bit_for_bit(trained: Path, name: str, reference: str, worker: int) -> None:
    check_worker(trained, name, reference, worker)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reference", "worker"), WORKERS_OF_THREE)
def test_three_workers_equal_the_reference_bit_for_bit(
    trained_by_three: Path, name: str, reference: str, worker: int
) -> None:
    check_worker(trained_by_three, name, reference, worker)


def check_worker(out: Path, name: str, reference: str, worker: int) -> None:
    """Weights, moments and masks, after every phase and at the end; only worker 0 goes on after the last exchange."""
    target = wanted(out, reference, worker)
    for rank in (0, 1):
        ours = result(out, name, worker, rank)
        assert ours["wrong"] == []
        assert ours["steps"] == target["steps"]
        for got, mask in zip(ours["masks"], target["masks"], strict=True):
            assert got.keys() == mask.keys() and all(torch.equal(got[n], mask[n]) for n in mask)
        for key, weight in ours["weights"].items():
            assert torch.equal(weight, target["weights"][key]), key
        for key, moments in ours["moments"].items():
            wanted_moments = target["moments"][key]
            if not moments:  # the state is anew since the last exchange, and no step has made it yet
                assert wanted_moments and not any(moment.any() for moment in wanted_moments), key
                continue
            assert all(torch.equal(a, b) for a, b in zip(moments, wanted_moments, strict=True)), key


@pytest.mark.slow
@pytest.mark.parametrize("reference", sorted(set(THREE.values())))
def test_the_mean_over_three_workers_is_rounded_once(trained_by_three: Path, reference: str) -> None:
    """Sums in fp32 would give some of the weights in no partition other values: these rows find such a fault."""
    assert wanted(trained_by_three, reference, 0)["rounded"] > 0


@pytest.mark.parametrize("name", TWO)
def test_worker_0_fine_tunes_and_exports_and_the_other_ends_before(trained: Path, name: str) -> None:
    check_end(trained, name, [9, 6])


@pytest.mark.parametrize("name", RISING)
def test_with_a_rising_target_worker_0_fine_tunes_alone(trained: Path, name: str) -> None:
    check_end(trained, name, [12, 10])


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_worker_0_of_three_fine_tunes_and_exports(trained_by_three: Path, name: str) -> None:
    check_end(trained_by_three, name, [14, 12, 12] if name.endswith("erk") else [10, 8, 8])


def check_end(out: Path, name: str, steps: list[int]) -> None:
    assert [result(out, name, worker)["steps"] for worker in range(len(steps))] == steps
    exported = load_file(out / f"model_{name}" / "model.safetensors")
    for key, weight in result(out, name, 0)["weights"].items():
        assert torch.equal(exported[key], weight.view(exported[key].shape)), key


def test_a_worker_that_was_killed_after_it_had_published_joins_again(trained: Path) -> None:
    """It trains from its checkpoint, takes the round that it has published, and ends with the same weights."""
    for worker in (0, 1):
        ours, straight = result(trained, "ddp_killed", worker), result(trained, "ddp", worker)
        assert ours["wrong"] == []
        assert all(torch.equal(ours["weights"][n], w) for n, w in straight["weights"].items())
        for key, moments in straight["moments"].items():
            assert all(torch.equal(a, b) for a, b in zip(ours["moments"][key], moments, strict=True)), key


@pytest.mark.parametrize("name", TWO)
def test_the_exchanged_files_have_the_size_of_the_compact_form(trained: Path, name: str) -> None:
    layers = 2 * (2 * ((592 + 7) // 8 + 4 * 118) + 4 * (16 + 16 + 37 + 16))  # entries; norm, biases
    shared = 4 * (11 * 16 + 2 * 16 + 16 * 16 + 16)  # embedding, last norm, the layer that is used now and then
    for round_ in (0, 1):
        for worker in (0, 1):
            folder = trained / f"exchange_{name}" / f"round_{round_}"
            size = (folder / f"worker_{worker}.safetensors").stat().st_size
            header = int.from_bytes((folder / f"worker_{worker}.safetensors").read_bytes()[:8], "little")
            assert size == 8 + header + layers + shared
            assert json.loads((folder / f"worker_{worker}.json").read_text())["bytes"] == size
