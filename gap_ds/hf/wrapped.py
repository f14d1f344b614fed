"""The common part of Trainer and Accelerate: settings that neither can follow, and the optimizer inside a wrapper."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from gap_ds.method.config import GaPConfig
from gap_ds.sharding.backends import brings_optimizer

#: The folder inside a checkpoint of the Trainer or of Accelerate that holds the masks.
FOLDER = "gap"


def refuse(config: GaPConfig) -> None:
    """Raise ValueError for settings that need a loop of your own."""
    if config.record.has_workers:
        raise ValueError(
            'method="parallel": a worker of parallel GaP is a separate job, which neither the Trainer nor Accelerate '
            "starts. Use gap-ds parallel with a GaPEngine, or another method."
        )
    if config.lr_restart:
        raise ValueError(
            '"lr_restart": the scheduler that the Trainer builds covers the whole training, so starting it again in '
            'every phase would never let the learning rate fall. Set "lr_restart" to false, or use a GaPEngine with a '
            "scheduler that covers one phase."
        )


def innermost(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside Accelerate's wrapper; None for a DeepSpeed engine, which brings its own."""
    if brings_optimizer(model):
        return None
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found
