"""Blocks that are frozen, unfrozen or added in mid-run are named once in the log; other changes are refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from test_engine import CYCLIC, Model, train
from torch import nn

from gap_ds import GaPEngine


def test_blocks_unfrozen_later_stay_dense_and_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model()
    model.layers[:2].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    engine = GaPEngine(model, CYCLIC, optimizer=optimizer)
    train(engine, 1)
    model.layers[:2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.layers[:2].parameters())})
    with caplog.at_level(logging.WARNING, "gap_ds"):
        while not engine.finished:
            train(engine, 1)
    assert [text.partition(":")[0] for text in caplog.messages] == ["layers.0.fc.weight and 1 others"]
    assert "so it is no entry and stays dense." in caplog.text and "before the engine is built" in caplog.text
    assert model.layers[0].fc.weight.all() and not model.layers[2].fc.weight.all()


def test_blocks_frozen_later_stay_sparse_and_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model()
    engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    train(engine, 1)
    model.layers[0].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "gap_ds"):
        while not engine.finished:
            train(engine, 1)
    assert [text.partition(":")[0] for text in caplog.messages] == ["layers.0.fc.weight"]
    assert "frozen since the engine was built. Masks hold" in caplog.text
    assert int(model.layers[0].fc.weight.count_nonzero()) == 9


def lose_a_block(model: Model) -> None:
    del model.layers[3]


def replace_a_matrix(model: Model) -> None:
    model.layers[3].fc = nn.Linear(6, 6)


def adapt_a_matrix(model: Model) -> None:
    model.layers[3].fc = nn.Sequential(model.layers[3].fc)


def tie_two_matrices(model: Model) -> None:
    model.layers[3].fc.weight = model.layers[2].fc.weight


@pytest.mark.parametrize("change", [lose_a_block, replace_a_matrix, adapt_a_matrix, tie_two_matrices])
def test_a_model_that_has_changed_is_refused_at_the_next_look(change: Callable[[Model], None]) -> None:
    """Masks would go on with the tensors before, and figures would be those of another model."""
    torch.manual_seed(0)
    model = Model()
    engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    train(engine, 1)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")  # a wrapper changes nothing
    engine.check_weights()
    change(model)
    with pytest.raises(
        ValueError, match=r"^layers\.3\.fc\.weight: (the module that held it .* was replaced|is the same)"
    ):
        engine.check_weights()


def test_blocks_added_later_stay_dense_and_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model()
    engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    train(engine, 1)
    model.layers.append(copy.deepcopy(model.layers[3]))
    engine.optimizer.add_param_group({"params": list(model.layers[4].parameters())})
    with caplog.at_level(logging.WARNING, "gap_ds"):
        while not engine.finished:
            train(engine, 1)
    assert [text.partition(",")[0] for text in caplog.messages] == [
        "layers.4.fc.weight: added since the engine was built"
    ]
