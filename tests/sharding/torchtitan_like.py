"""A trainer with torchtitan's loop, container of optimizers and checkpoints, as far as gap_ds meets them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import toy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


class OptimizersContainer(torch.optim.Optimizer):
    """Several optimizers behind the interface of one. Its step is theirs, and it holds all their parameters itself."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.optimizers = members
        super().__init__([p for one in members for group in one.param_groups for p in group["params"]], {})

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def step(self, closure: Any = None) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.optimizers:
            one.zero_grad(set_to_none)


class Trainer:
    def __init__(self, model: nn.Module, folder: Path, steps: int, interval: int) -> None:
        self.config = SimpleNamespace(
            dump_folder=str(folder),
            checkpoint=SimpleNamespace(enable=True, folder="checkpoint", interval=interval),
            training=SimpleNamespace(steps=steps),
        )
        self.parallel_dims = SimpleNamespace(pp=1)
        self.model_parts = [model]
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = OptimizersContainer(
            [
                torch.optim.AdamW([p for p in trained if p.dim() >= 2], lr=1e-2),
                torch.optim.SGD([p for p in trained if p.dim() < 2], lr=1e-2, momentum=0.9),
            ]
        )
        self.step = 0

    def train(self) -> None:
        self._load()
        batches = iter(lambda: toy.batch(self.step - 1, 0, dist.get_rank(), skip=False), None)
        while self.step < self.config.training.steps:
            self.step += 1
            self.train_step(batches)
            if self.step % self.config.checkpoint.interval == 0 or self.step == self.config.training.steps:
                dcp.save(self._state(), checkpoint_id=self._folder / f"step-{self.step}")

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        self.optimizers.zero_grad()
        self.model_parts[0](*next(data_iterator)).backward()
        self.optimizers.step()

    @property
    def _folder(self) -> Path:
        return Path(self.config.dump_folder, self.config.checkpoint.folder)

    def _state(self) -> dict[str, Any]:
        """Of an optimizer without state, torch makes it by a step with learning rate 0, as torchtitan does."""
        model, optimizer = get_state_dict(self.model_parts[0], list(self.optimizers))
        return {"model": model, "optimizer": optimizer}

    def _load(self) -> None:
        found = [int(path.parent.name.removeprefix("step-")) for path in self._folder.glob("step-*/.metadata")]
        if found:
            self.step = max(found)
            state = self._state()
            dcp.load(state, checkpoint_id=self._folder / f"step-{self.step}")
            set_state_dict(
                self.model_parts[0],
                list(self.optimizers),
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
