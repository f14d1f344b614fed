"""The optimizer's state as a whole."""

from __future__ import annotations

import torch
from torch import Tensor


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Clears all optimizer state, step counts included, as if training had just begun."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[key] = 0
    for group in optimizer.param_groups:
        if "step" in group:  # DeepSpeed's fused optimizers count here
            group["step"] = 0
