"""The learning-rate schedulers of a run, which can begin again in every phase."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gap_ds.sharding.optimizers import Optimizers


class LearningRate:
    """Schedulers, with their states and what they set in the parameter groups before the first step.

    Args:
        schedulers: anything with `state_dict` and `load_state_dict`; empty if the run has none.
        optimizers: those whose learning rates are restored where a scheduler does not name its optimizer.
    """

    def __init__(self, schedulers: Sequence[Any], optimizers: Optimizers) -> None:
        self.schedulers = list(schedulers)
        self._optimizers = optimizers
        self._first = [(copy.deepcopy(s.state_dict()), [_settings(g) for g in self._groups(s)]) for s in schedulers]

    def _groups(self, scheduler: Any) -> list[dict[str, Any]]:
        """The parameter groups that a scheduler sets; a wrapped optimizer (OSS) may copy them to its innermost."""
        optimizer = getattr(scheduler, "optimizer", None)
        groups: list[dict[str, Any]] = self._optimizers.groups() if optimizer is None else optimizer.param_groups
        return groups

    def restart(self) -> None:
        """Sets schedulers and what they set (learning rate, momentum) to what they were when the engine was built."""
        for scheduler, (state, settings) in zip(self.schedulers, self._first, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))
            for group, first in zip(self._groups(scheduler), settings, strict=True):
                for name, value in first.items():
                    if isinstance(group[name], Tensor):
                        group[name].fill_(value)
                    else:
                        group[name] = value

    def state(self) -> list[Any] | None:
        """The schedulers' states as JSON can hold them, without their functions, which no load needs."""
        return [_to_json(scheduler.state_dict()) for scheduler in self.schedulers] or None

    def load(self, states: list[Any] | None) -> None:
        """Restores what `state` returned; nothing where either run has no scheduler."""
        if states is not None and self.schedulers:
            for scheduler, state in zip(self.schedulers, states, strict=True):
                scheduler.load_state_dict(_from_json(state))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Settings of a parameter group that torch's schedulers change: learning rate, and momentum of cyclic ones."""
    found = {name: group[name] for name in ("lr", "momentum", "betas") if name in group}
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()}


_ITEMS, _TENSOR, _TUPLE = "__items__", "__tensor__", "__tuple__"


def _to_json(value: Any) -> Any:
    """A scheduler's state for JSON: dicts with other keys than text, tensors and tuples are marked.

    >>> state = {"milestones": Counter({4: 1}), "betas": (0.9, 0.95), "anneal": len}
    >>> _from_json(_to_json(state))
    {'milestones': Counter({4: 1}), 'betas': (0.9, 0.95)}
    """
    if isinstance(value, dict):
        items = [(k, _to_json(v)) for k, v in value.items() if not callable(v)]
        if not isinstance(value, Counter) and all(isinstance(k, str) for k, _ in items):
            return dict(items)
        return {_ITEMS: [list(item) for item in items], "counter": isinstance(value, Counter)}
    if isinstance(value, list):
        return [_to_json(v) for v in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(v) for v in value]}
    if isinstance(value, Tensor):
        return {_TENSOR: value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return None if callable(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    if _ITEMS in value:
        items = {key: _from_json(v) for key, v in value[_ITEMS]}
        return Counter(items) if value["counter"] else items
    if _TUPLE in value:
        return tuple(_from_json(v) for v in value[_TUPLE])
    if _TENSOR in value:
        return torch.tensor(value[_TENSOR], dtype=getattr(torch, value["dtype"]), device="cpu")
    return {key: _from_json(v) for key, v in value.items()}
