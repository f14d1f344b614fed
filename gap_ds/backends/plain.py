"""Plain PyTorch and DistributedDataParallel: every rank holds every parameter whole."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from gap_ds.backends import Backend, Training
from gap_ds.comm import Comm
from gap_ds.plan import clean_name
from gap_ds.shard import Shard


def recognises(model: nn.Module) -> bool:
    """Any model without sharding."""
    return True


def build(model: nn.Module, training: Training) -> Backend:
    """The backend of a model whose parameters are whole on every rank."""
    ddp = isinstance(model, DistributedDataParallel)
    module = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = require_optimizer(training)
    loop = Loop(model, training, optimizer)
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
    )


def require_optimizer(training: Training) -> torch.optim.Optimizer:
    """The optimizer of a user's own loop."""
    if not isinstance(training.optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={training.optimizer!r}: must be the torch.optim.Optimizer of the model's parameters, unless the "
            "model is a DeepSpeed engine, which brings its own."
        )
    return training.optimizer


def whole_shards(module: nn.Module) -> list[Shard]:
    """Shards that are the parameters themselves."""

    def shard(name: str, parameter: nn.Parameter) -> Shard:
        shape = tuple(parameter.shape)
        return Shard(clean_name(name), shape, 0, parameter.numel(), 0, lambda: parameter, parameter.requires_grad)

    return [shard(name, parameter) for name, parameter in module.named_parameters()]


class Loop:
    """The steps around a bare optimizer: accumulation, loss scaling, clipping, learning rate, cleared gradients."""

    def __init__(self, model: nn.Module, training: Training, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.training, self.optimizer = model, training, optimizer
        self.micro_step = 0
        self._announce()

    def _announce(self) -> None:
        """Tells DDP before a forward pass whether its backward pass is to be reduced over the ranks."""
        if isinstance(self.model, DistributedDataParallel):
            last = (self.micro_step + 1) % self.training.gradient_accumulation_steps == 0
            self.model.require_backward_grad_sync = last

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
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, training.gradient_clipping)
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        skipped = scaler is not None and scaler.get_scale() < before
        if training.lr_scheduler is not None and not skipped:
            training.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)


def save_state(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Weights and optimizer state by torch.distributed.checkpoint, which also reshards them."""
    model_state, optimizer_state = get_state_dict(module, optimizer)
    alone = not torch.distributed.is_initialized()
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "state", no_dist=alone)


def load_state(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads what `save_state` wrote, into the same module and optimizer."""
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "state", no_dist=not torch.distributed.is_initialized())
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
