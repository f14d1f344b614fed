"""The learning-rate scheduler of a run, which can begin again in every phase."""

from __future__ import annotations

import copy
from typing import Any

import torch


class LearningRate:
    """A scheduler, its state and its learning rates before the first step.

    Args:
        scheduler: anything with `state_dict` and `load_state_dict`; None if the run has none.
        optimizer: the one whose learning rates are restored where the scheduler does not name its optimizer.
    """

    def __init__(self, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler = scheduler
        self._optimizer = optimizer
        self._first: tuple[Any, list[Any]] | None = None
        if scheduler is not None:
            self._first = copy.deepcopy(scheduler.state_dict()), [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups that the scheduler sets; a wrapped optimizer (OSS) may copy them to its innermost."""
        groups: list[dict[str, Any]] = getattr(self.scheduler, "optimizer", self._optimizer).param_groups
        return groups

    def restart(self) -> None:
        """Sets scheduler and learning rates to what they were when the engine was built."""
        assert self._first is not None
        state, rates = self._first
        self.scheduler.load_state_dict(copy.deepcopy(state))
        for group, rate in zip(self._groups(), rates, strict=True):
            group["lr"] = rate

    def state(self) -> dict[str, Any] | None:
        """The scheduler's state without its functions, which neither JSON nor `load_state_dict` needs."""
        if self.scheduler is None:
            return None
        return {key: value for key, value in self.scheduler.state_dict().items() if not callable(value)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Restores what `state` returned; nothing where either run has no scheduler."""
        if state is not None and self.scheduler is not None:
            self.scheduler.load_state_dict(state)
