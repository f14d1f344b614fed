"""Plain PyTorch and DistributedDataParallel: every rank holds every parameter whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, Training, uncompiled
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard
from gap_ds.storage.errors import summarize_error


def recognises(model: nn.Module) -> bool:
    """Any model without sharding."""
    return True


def build(model: nn.Module, training: Training) -> Backend:
    """The backend of a model whose parameters are whole on every rank.

    Raises:
        ValueError: a parameter is sharded in a way that no backend knows.
    """
    wrapper = uncompiled(model)
    ddp = isinstance(wrapper, DistributedDataParallel)
    module = uncompiled(wrapper.module) if isinstance(wrapper, DistributedDataParallel) else wrapper
    optimizer = require_optimizer(training)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{clean_name(name)}: is sharded ({parameter.placements}), but the model is not wrapped by "
                "fully_shard: tensor parallelism alone is not supported. Shard the model by fully_shard."
            )
    loop = Loop(training, sync=NoSync(wrapper) if isinstance(wrapper, DistributedDataParallel) else None)
    return Backend(
        name="ddp" if ddp else "plain",
        forward=model,
        module=module,
        optimizer=optimizer,
        comm=Comm(single=True),
        shards=lambda: whole_shards(module),
        publish=lambda: None,
        backward=loop.backward,
        step=loop.step,
        save=lambda folder: save_state(module, optimizer, folder),
        load=lambda folder: load_state(module, optimizer, folder),
        skips_overflow=training.grad_scaler is not None,
        reshards=True,
    )


def require_optimizer(training: Training) -> torch.optim.Optimizer:
    """The optimizer of a user's own loop.

    Raises:
        ValueError: there is none, or it only wraps the one that updates the weights.
    """
    if not isinstance(training.optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={training.optimizer!r}: must be the torch.optim.Optimizer of the model's parameters, unless "
            "the model is a DeepSpeed engine, which brings its own."
        )
    if isinstance(getattr(training.optimizer, "optim", None), torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={type(training.optimizer).__name__}: shards the optimizer of an unsharded model, so that its "
            "state would be out of reach. Wrap the model by fairscale's ShardedDataParallel (with OSS), or by "
            "fully_shard and use a plain torch optimizer."
        )
    return training.optimizer


def whole_shards(module: nn.Module) -> list[Shard]:
    """Shards that are the parameters themselves.

    Raises:
        ValueError: a parameter does not lie in memory in the order of its indices.
    """

    def shard(name: str, parameter: nn.Parameter) -> Shard:
        if not parameter.is_contiguous():
            raise ValueError(
                f"{clean_name(name)}: is laid out in another memory format (channels_last?), must be contiguous. "
                "Convert the activations only: x.to(memory_format=torch.channels_last) makes convolutions as fast."
            )
        shape = tuple(parameter.shape)
        return Shard(clean_name(name), shape, 0, parameter.numel(), 0, lambda: parameter, parameter.requires_grad)

    return [shard(name, parameter) for name, parameter in module.named_parameters()]


class NoSync:
    """Called with whether the next backward pass is reduced over the ranks: holds `model.no_sync()` open if not."""

    def __init__(self, model: Any) -> None:
        self._model, self._open = model, contextlib.ExitStack()

    def __call__(self, sync: bool) -> None:
        self._open.close()
        if not sync:
            self._open.enter_context(self._model.no_sync())


class Loop:
    """The steps around a bare optimizer: accumulation, loss scaling, clipping, learning rate, cleared gradients.

    Args:
        sync: told before each forward pass whether its backward pass is to be reduced over the ranks.
        clip: clips the gradients of all ranks together at a norm.
        clear: forgets the gradients.
    """

    def __init__(
        self,
        training: Training,
        *,
        sync: Callable[[bool], None] | None = None,
        clip: Callable[[float], Any] | None = None,
        clear: Callable[[], None] | None = None,
    ) -> None:
        assert training.optimizer is not None
        self.training, self.optimizer = training, training.optimizer
        self.sync, self.clip = sync, clip or self._clip_whole
        self.clear = clear or self.optimizer.zero_grad
        self.micro_step = 0
        self._announce()

    def _announce(self) -> None:
        if self.sync is not None and self.training.gradient_accumulation_steps > 1:
            self.sync((self.micro_step + 1) % self.training.gradient_accumulation_steps == 0)

    def _clip_whole(self, norm: float) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def backward(self, loss: Tensor) -> None:
        loss = loss / self.training.gradient_accumulation_steps
        (self.training.grad_scaler.scale(loss) if self.training.grad_scaler else loss).backward()

    def step(self) -> None:
        self.micro_step += 1
        if self.micro_step % self.training.gradient_accumulation_steps == 0:
            self._update()
        self._announce()

    def _update(self) -> None:
        training, scaler = self.training, self.training.grad_scaler
        before = scaler.get_scale() if scaler else None
        if training.gradient_clipping > 0:
            if scaler:
                scaler.unscale_(self.optimizer)
            self.clip(training.gradient_clipping)
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        skipped = scaler is not None and scaler.get_scale() < before
        if training.lr_scheduler is not None and not skipped:
            training.lr_scheduler.step()
        self.clear()


def save_state(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Weights and optimizer state by torch.distributed.checkpoint, which also reshards them."""
    initialise_state(module, optimizer)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    alone = not torch.distributed.is_initialized()
    state = {"model": model_state, "optimizer": optimizer_state}
    try:
        save_distributed(state, checkpoint_id=folder / "state", no_dist=alone)
    except CheckpointException as error:
        raise _first_failure(folder / "state", error) from error


def load_state(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads what `save_state` wrote, into the same module and optimizer. ValueError if it cannot be read."""
    initialise_state(module, optimizer)
    forget_state(optimizer)  # a parameter that had no state when it was saved has none in the file
    model_state, optimizer_state = get_state_dict(module, optimizer)
    model: dict[str, Any] = {"model": model_state}
    state: dict[str, Any] = {"optimizer": optimizer_state}
    path, alone = folder / "state", not torch.distributed.is_initialized()
    try:
        load_distributed(model, checkpoint_id=path, no_dist=alone)
        load_distributed(state, checkpoint_id=path, no_dist=alone, planner=DefaultLoadPlanner(allow_partial_load=True))
    except CheckpointException as error:
        raise _first_failure(path, error) from error
    set_state_dict(module, optimizer, model_state_dict=model["model"], optim_state_dict=state["optimizer"])


def _first_failure(path: Path, error: CheckpointException) -> ValueError:
    """What went wrong on the first of the ranks; it is raised on all, and no Exception, so nobody would expect it."""
    return ValueError(f"{path}: {summarize_error(next(iter(error.failures.values()))[0])}")


def initialise_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer that has not stepped yet the state that it has just before its first step.

    torch.distributed.checkpoint gives it one by a step with zero gradients and learning rate, which it counts.
    """
    if not optimizer.state:
        get_optimizer_state_dict(module, optimizer)
        forget_state(optimizer)


def forget_state(optimizer: torch.optim.Optimizer) -> None:
    """Sets all optimizer state, step counts included, to what it is before the first step."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
