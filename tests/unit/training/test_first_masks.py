"""First masks where the weights say something: a sparse run's, those of a matrix that is 0, epochs by batches."""

from __future__ import annotations

import logging

import pytest
import torch
from test_engine import CYCLIC, Model, build, train, weights

from gap_ds import GaPEngine

STATIC = {"method": "static", "mask_init": "from_weights", "phase_steps": 1, "rounds": 0, "finetune_steps": 4}


def over(model: Model, config: dict[str, object]) -> GaPEngine:
    return GaPEngine(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_weights_of_a_sparse_run_are_not_masked_at_random(caplog: pytest.LogCaptureFixture) -> None:
    """Plain SGD has no state that would show that it has stepped."""
    caplog.set_level(logging.WARNING)
    trained = build()
    train(trained, 9)
    before = {name: weight.clone() for name, weight in trained.module.state_dict().items()}
    model = Model()
    model.load_state_dict(before)
    engine = over(model, CYCLIC | {"seed": 5})
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert "fc.weight: a part of it is 0, as a sparse run leaves it" in caplog.text
    random = Model()
    random.load_state_dict(before)
    asked = over(random, CYCLIC | {"seed": 5, "mask_init": "random"})
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(asked).items())


def test_a_matrix_of_zeros_is_trained_under_masks_from_weights(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = Model()
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.fc.weight.view(-1)[::2] = 0  # type: ignore[union-attr, operator]
            if i == 1:
                layer.fc.weight.zero_()  # type: ignore[union-attr, operator]
    engine = over(model, STATIC)
    train(engine, 3)
    kept = {name: row["kept"] for name, row in engine.stats()["entries"].items()}
    assert kept == {f"layers.{i}.fc.weight": 36 if i == 1 else 18 for i in range(4)}
    assert "layers.1.fc.weight (and 0 others): is 0 everywhere" in caplog.text


@pytest.mark.parametrize(("batches", "steps"), [(8, 4), (5, 2), (1, 1)])
def test_an_epoch_of_batches_is_never_longer_than_what_is_trained(batches: int, steps: int) -> None:
    config = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 1}
    engine = build(config, batches_per_epoch=batches, gradient_accumulation_steps=2)
    assert engine.schedule.total_steps == 3 * steps
