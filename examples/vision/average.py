"""Exponential moving average of the weights, over whatever piece of them a rank's optimizer updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class MovingAverage:
    """After every step: average = decay * average + (1 - decay) * weight, from the fp32 values with masks applied.

    The averages lie in the optimizer's state, beside the momentum: so every sharding library cuts, saves and restores
    them, and the engine zeroes those of newly grown weights, which start at zero. Build it after the engine, whose
    hook on the optimizer masks the weights, and before a checkpoint is loaded.

    Args:
        optimizer: the innermost one, `engine.optimizer`.
        decay: in (0, 1).
    """

    KEY = "average"

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._optimizer, self._decay = optimizer, decay
        for weight, state in optimizer.state.items():  # libraries restore only what is there
            state[self.KEY] = weight.detach().clone()
        optimizer.register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state[weight]
            if self.KEY in state:
                state[self.KEY].mul_(self._decay).add_(weight.detach(), alpha=1 - self._decay)
            else:
                state[self.KEY] = weight.detach().clone()

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the optimizer's values are the averages: an export takes them, with the masks of the moment."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, state in self._optimizer.state.items():
            if self.KEY in state:
                kept = weight.detach().clone()
                weight.copy_(state[self.KEY])
                state[self.KEY].copy_(kept)
