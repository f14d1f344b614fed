"""Weights that something changes between two updates, and hooks that are taken off: found at once in one process."""

from __future__ import annotations

import pytest
import torch
from test_engine import build, train
from torch import nn
from torch.nn.utils import parametrizations

from gap_ds.training.watched import Parts

#: Sparse in the first phase of three steps.
ENTRY = "layers.3.fc.weight"


def test_a_change_in_place_is_found_at_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the part that comes next is another one."""
    monkeypatch.setattr("gap_ds.training.watched._PART", 1)
    engine = build()
    train(engine, 1)
    with torch.no_grad():
        engine.module.get_parameter(ENTRY).add_(1.0)
    with pytest.raises(ValueError, match=r"^layers\.3\.fc\.weight: 27 of its pruned weights are not 0 \(before an upd"):
        train(engine, 1)


def test_a_change_of_kept_weights_alone_is_none() -> None:
    engine = build()
    train(engine, 1)
    with torch.no_grad():
        engine.module.get_parameter(ENTRY).mul_(2.0)
    train(engine, 1)
    assert engine.applied_steps == 2


def test_changes_that_pytorch_does_not_count_are_found_at_the_next_update_of_few_weights() -> None:
    engine = build()
    train(engine, 1)
    engine.module.get_parameter(ENTRY).data.add_(1.0)
    with pytest.raises(ValueError, match=r"^layers\.3\.fc\.weight: 27 of its pruned weights are not 0"):
        train(engine, 1)


def test_changes_that_pytorch_does_not_count_are_found_before_the_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if parts are small: its turn, the last of four, does not come before the masks change."""
    monkeypatch.setattr("gap_ds.training.watched._PART", 1)
    engine = build({"method": "rigl", "sparsity": 0.75, "phase_steps": 6, "update_steps": 3, "finetune_steps": 2})
    for _ in range(2):
        train(engine, 1)
        engine.module.get_parameter(ENTRY).data.add_(1.0)
    with pytest.raises(ValueError, match=r"^layers\.3\.fc\.weight: 27 of its pruned weights are not 0"):
        train(engine, 1)


@pytest.mark.parametrize("updates", [2, 16, 32, 100])
def test_many_weights_are_looked_at_in_parts_all_of_them_before_a_boundary(
    monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    """And in every 32 updates; those on a device, or with a copy there, before the boundary alone."""
    monkeypatch.setattr("gap_ds.training.watched._PART", 10)
    there, here = torch.empty(10_000, device="meta"), torch.empty(10_000)
    pieces = {str(i): [torch.empty(10 + i)] for i in range(64)} | {"device": [there], "offloaded": [here, there]}
    waiting = {"device", "offloaded"}
    parts, most = Parts(pieces), (640 + 63 * 32) // 32 + 10 + 63
    looks = [set(parts.next(rest=False)) for _ in range(updates - 1)]
    assert all(not waiting & look and sum(pieces[name][0].numel() for name in look) <= most for look in looks)
    last = set(parts.next(rest=True))
    assert last.union(*looks) == set(pieces) and waiting <= last
    for start in range(updates - 32):
        assert set().union(*looks[start : start + 32]) >= set(pieces) - waiting


def test_weights_that_are_loaded_and_masked_again_go_on() -> None:
    engine = build()
    train(engine, 1)
    engine.module.load_state_dict(engine.module.state_dict())
    train(engine, 4)
    assert engine.applied_steps == 5


def test_hooks_that_are_taken_off_are_found_at_the_next_update() -> None:
    engine = build()
    train(engine, 1)
    engine.optimizer._optimizer_step_post_hooks.clear()
    with pytest.raises(
        ValueError, match=r"^layers\.0\.fc\.weight: its mask was not applied in a step of optimizer=Adam"
    ):
        train(engine, 1)


def test_a_parameter_that_became_computed_is_named() -> None:
    engine = build()
    train(engine, 1)
    layer = engine.module.get_submodule("layers.3.fc")
    assert isinstance(layer, nn.Linear)
    parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"^layers\.3\.fc\.weight: is no parameter any more"):
        train(engine, 1)
