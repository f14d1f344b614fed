"""A teacher on two ranks: losses and weights are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import worker_distill as worker
from launch import run_workers
from safetensors.torch import load_file
from table_rows import marked, needed
from torch import Tensor

from gap_ds import GaPEngine

BACKENDS = ("fsdp2", "zero2", "zero3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("distill")
    run_workers("worker_distill.py", 2, out, *needed(request, "backend"), timeout=300)
    return out


@pytest.fixture(scope="module")
def reference() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and final weights of one process; the distances are written without the library."""
    student, teacher = worker.build(1), worker.build(2).eval()
    engine = GaPEngine(student, worker.GAP, optimizer=worker.optimizer(student))
    losses = []
    for step in range(worker.STEPS):
        tokens, kept = worker.batch(step)
        logits, states = engine(tokens)
        with torch.no_grad():
            wanted, wanted_states = teacher(tokens)
        p, q = ((x[kept] / worker.TEMPERATURE).softmax(-1) for x in (wanted, logits))
        loss = worker.TEMPERATURE**2 * (p * (p / q).log()).sum(-1).mean()
        for state, target in zip(states, wanted_states, strict=True):
            loss = loss + (state[kept] - target[kept]).square().mean() / target[kept].square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses, {name: p.detach().clone() for name, p in student.named_parameters()}


@pytest.mark.parametrize("backend", marked(BACKENDS, ["zero2"]))
def test_losses_and_weights_are_those_of_one_process(
    trained: Path, reference: tuple[list[Tensor], dict[str, Tensor]], backend: str
) -> None:
    losses, weights = reference
    torch.testing.assert_close(
        torch.stack(torch.load(trained / f"{backend}.pt")), torch.stack(losses), rtol=1e-5, atol=0
    )
    found = load_file(trained / backend / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[name] == 0, wanted == 0), name
