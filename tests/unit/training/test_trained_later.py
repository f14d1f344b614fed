"""Blocks that become frozen or trainable in mid-run: the log names them, once, at the next boundary."""

from __future__ import annotations

import logging

import pytest
import torch
from test_engine import CYCLIC, Model, train

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
