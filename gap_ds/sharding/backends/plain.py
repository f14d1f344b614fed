"""Plain PyTorch, DistributedDataParallel, tensor parallelism: parameters are whole on every rank, or DTensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, Training, uncompiled
from gap_ds.sharding.backends.torch_state import DISTRIBUTED, load_state, save_state
from gap_ds.sharding.comm import Apart, Comm
from gap_ds.sharding.mesh import Layout, clip, shard_of
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard, Slot


def recognises(model: nn.Module) -> bool:
    """Any model without sharding."""
    return True


def wraps(module: nn.Module) -> bool:
    """True for DistributedDataParallel."""
    return isinstance(module, DistributedDataParallel)


def build(model: nn.Module, training: Training) -> Backend:
    """The backend of a model whose parameters are whole on every rank, or cut by tensor or expert parallelism.

    Raises:
        ValueError: a parameter is sharded in a way that no backend knows.
    """
    outer = uncompiled(model)
    ddp = outer if isinstance(outer, DistributedDataParallel) else None
    # DataParallel replicates its module in every forward pass: what is trained is the module.
    module = uncompiled(outer.module) if isinstance(outer, DistributedDataParallel | nn.DataParallel) else outer
    if inner := next((name for name, child in module.named_modules() if name and wraps(child)), None):
        raise ValueError(
            f"the model holds DistributedDataParallel in its attribute {inner}, and parameters beside it. Wrap the "
            f"whole model, or pass model.{inner} with an optimizer of its parameters."
        )
    if ddp is not None:
        require_world(dist.get_world_size(ddp.process_group), training.world)
        _refuse_ignored(ddp)
    optimizers = training.optimizers()
    sync = None if ddp is None else NoSync(ddp)
    layout = Layout.of(module, lambda: whole_shards(module), training.world)
    loop = Loop(training, optimizers, sync=sync)
    return Backend(
        name="plain" if ddp is None else "ddp",
        forward=model,
        module=module,
        optimizers=optimizers,
        comm=layout.comm,
        shards=layout.shards,
        replicated=layout.replicated,
        publish=lambda: None,
        backward=loop.backward,
        step=loop.step,
        micro_batches=training.gradient_accumulation_steps,
        save=lambda folder: save_state(module, optimizers, folder, training.world),
        load=lambda folder: load_state(module, optimizers, folder, training.world),
        discard=loop.discard,
        skips_overflow=training.skips_overflow,
        reshards=DISTRIBUTED,
    )


def _refuse_ignored(wrapper: DistributedDataParallel) -> None:
    trained = {name for name, parameter in wrapper.module.named_parameters() if parameter.requires_grad}
    if ignored := sorted(trained & set(wrapper.parameters_to_ignore)):
        raise ValueError(
            f"{clean_name(ignored[0])}: is trained, but DistributedDataParallel was told to ignore it, as experts are "
            "that live on one rank each: its copies on the ranks would get different masks. Let it be reduced over all "
            "ranks, freeze it, or make the experts DTensors on an expert mesh."
        )


def require_world(ranks: int, world: Comm) -> None:
    """Checks that a model is trained by all ranks of the engine.

    Raises:
        Apart: it is trained by fewer, as an expert or a stage of a pipeline is.
    """
    if ranks != world.size:
        raise Apart(
            f"the model is wrapped for {ranks} of the {world.size} ranks of the engine. Wrap it for all of them; where "
            "groups of ranks train models of their own (stages of a pipeline, two models at once), pass group= with "
            "the ranks of this one."
        )


def _held(holder: nn.Module, leaf: str, name: str) -> Tensor:
    if (parameter := holder._parameters.get(leaf)) is None:
        raise ValueError(
            f"{name}: is no parameter any more, but was one when the engine was built. Apply weight_norm, "
            "torch.nn.utils.prune and adapters before, and close() the engine before the model is changed."
        )
    return parameter


def whole_shards(module: nn.Module) -> list[Shard]:
    """Shards that are the parameters, or boxes of DTensors, looked up in their modules at every use: they may change.

    Raises:
        ValueError: a parameter does not lie in memory in the order of its indices.
    """

    holders = {
        id(parameter): (holder, leaf) for holder in module.modules() for leaf, parameter in holder._parameters.items()
    }

    def shard(name: str, parameter: nn.Parameter) -> Shard:
        if not parameter.is_contiguous():
            raise ValueError(
                f"{clean_name(name)}: is laid out in another memory format (channels_last?), must be contiguous. "
                "Convert the activations only: x.to(memory_format=torch.channels_last) makes convolutions as fast."
            )
        shape = tuple(parameter.shape)
        holder, leaf = holders[id(parameter)]
        owner, find = partial(_held, holder, leaf, clean_name(name)), Slot(holder._parameters, sys.intern(leaf))
        if isinstance(parameter, DTensor):
            return replace(shard_of(clean_name(name), parameter, owner), find=find)
        found = Shard.of_range(clean_name(name), shape, 0, parameter.numel(), 0, owner, parameter.requires_grad)
        return replace(found, find=find)

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
        optimizers: Optimizers,
        *,
        sync: Callable[[bool], None] | None = None,
        clip: Callable[[float], Any] | None = None,
        clear: Callable[[], None] | None = None,
    ) -> None:
        self.training, self.optimizers, self.schedulers = training, optimizers, training.schedulers()
        self.sync, self.clip = sync, clip or self._clip_whole
        self.clear = clear or self._clear
        self.micro_step = 0
        self._announce()

    def _announce(self) -> None:
        if self.sync is not None and self.training.gradient_accumulation_steps > 1:
            self.sync((self.micro_step + 1) % self.training.gradient_accumulation_steps == 0)

    def _clip_whole(self, norm: float) -> None:
        parameters = [p for group in self.optimizers.groups() for p in group["params"]]
        clip(parameters, norm)

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        if self.training.gradient_accumulation_steps > 1:
            loss = loss / self.training.gradient_accumulation_steps
        (self.training.grad_scaler.scale(loss) if self.training.grad_scaler else loss).backward()

    def discard(self) -> None:
        self.clear()
        self.micro_step = 0
        self._announce()

    def step(self) -> None:
        self.micro_step += 1
        if self.micro_step % self.training.gradient_accumulation_steps == 0:
            self._update()
        self._announce()

    def _update(self) -> None:
        training, scaler = self.training, self.training.grad_scaler
        # For a scale the host waits for the device.
        before = scaler.get_scale() if scaler and self.schedulers else None
        together = scaler is not None and len(self.optimizers) > 1
        if training.gradient_clipping > 0 or together:
            for optimizer in self.optimizers if scaler else ():
                scaler.unscale_(optimizer)
        if together:
            _overflow_together(scaler, self.optimizers)
        if training.gradient_clipping > 0:
            self.clip(training.gradient_clipping)
        for optimizer in self.optimizers:
            scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        if before is None or scaler.get_scale() >= before:  # else the update was left out
            for scheduler in self.schedulers:
                if not isinstance(scheduler, ReduceLROnPlateau):  # its step takes a metric, which the user has
                    scheduler.step()
        self.clear()


def _overflow_together(scaler: torch.amp.GradScaler, optimizers: Optimizers) -> None:
    """Lets every optimizer leave out the update if the gradients of one overflow: half of it would be no update."""
    found = [scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] for optimizer in optimizers]
    total = sum(flag.cpu() for flags in found for flag in flags.values())
    for flags in found:
        for flag in flags.values():
            flag.copy_(total)
