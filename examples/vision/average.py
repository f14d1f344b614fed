"""Exponential moving average of the weights that a rank's optimizer updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KEY = "average"
#: What the engine must know of it (`optimizer_state`): another sequence of the weights, pruned as they are.
STATE = {KEY: "sequence"}


class MovingAverage:
    """Updates after every step: average = decay * average + (1 - decay) * weight, of the masked fp32 weights.

    The averages lie in the optimizer's state, beside the momentum. So every sharding library cuts, saves and restores
    them, and the engine prunes them like the weights. Build it after the engine, whose optimizer hook masks the
    weights, and before a checkpoint is loaded.

    Args:
        optimizer: the innermost one, `engine.optimizer`.
        decay: in (0, 1).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._optimizer, self._decay = optimizer, decay
        for weight, state in optimizer.state.items():  # libraries restore only existing keys
            state[KEY] = weight.detach().clone()
        optimizer.register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state[weight]
            if KEY in state:
                state[KEY].mul_(self._decay).add_(weight.detach(), alpha=1 - self._decay)
            else:
                state[KEY] = weight.detach().clone()

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Swap weights and averages inside the context: an export writes the averages, with the current masks."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, state in self._optimizer.state.items():
            if KEY in state:
                kept = weight.detach().clone()
                weight.copy_(state[KEY])
                state[KEY].copy_(kept)
