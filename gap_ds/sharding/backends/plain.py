"""Plain PyTorch, DistributedDataParallel, tensor parallelism: parameters are whole on every rank, or DTensors."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, OtherOptimizerError, Training, uncompiled
from gap_ds.sharding.comm import Apart, Comm
from gap_ds.sharding.mesh import Layout, clip, in_ranges, in_runs, shard_of
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard, Slot
from gap_ds.storage.errors import summarize_error

#: Backends whose checkpoints are alike: torch.distributed.checkpoint stores whole parameters by name.
DISTRIBUTED = ("plain", "ddp", "fsdp2")


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
    module = outer if ddp is None else uncompiled(ddp.module)
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
        skips_overflow=training.grad_scaler is not None,
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
        before = scaler.get_scale() if scaler else None
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
        if scaler is None or scaler.get_scale() >= before:  # else the update was left out
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


def save_state(module: nn.Module, optimizers: Optimizers, folder: Path, world: Comm) -> None:
    """Weights and optimizer state by torch.distributed.checkpoint, which also reshards them."""
    with optimizers.aside():
        # Without state as after a reset: torch saves what it makes by a step, and the next step must not go on from it.
        fresh = [i for i, optimizer in enumerate(optimizers) if not optimizer.state]
        stepped = optimizers.stepped
        model, optimizer = _state_dict(module, optimizers)
        state = in_ranges({"model": model, "optimizer": optimizer}) | {"stepped": stepped, "fresh": fresh}
        try:
            save_distributed(state, checkpoint_id=folder / "state", **_among(world))
        except CheckpointException as error:
            raise _first_failure(folder / "state", error) from error


def _state_dict(module: nn.Module, optimizers: Optimizers) -> tuple[dict[str, Any], Any]:
    """Weights and optimizer state by parameter name; torch makes the state by a step where there is none."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not optimizer.state and "train_mode" in group:
                group["train_mode"] = True  # schedule-free optimizers refuse that step in the other mode
    return get_state_dict(module, list(optimizers))


def _among(world: Comm) -> dict[str, Any]:
    """The ranks that take part, as torch.distributed.checkpoint takes them."""
    return {"process_group": world.group, "no_dist": not dist.is_initialized()}


def load_state(module: nn.Module, optimizers: Optimizers, folder: Path, world: Comm) -> None:
    """Reads what `save_state` wrote into the same module and optimizers. State that was not saved is cleared.

    Raises:
        OtherOptimizerError: another optimizer's state was saved; nothing was changed.
        ValueError: it cannot be read.
    """
    path, ranks = folder / "state", _among(world)
    with optimizers.aside() as aside:  # torch makes the state that is filled by a step, which must not count
        optimizers.clear()
        like = dict(zip(("model", "optimizer"), _state_dict(module, optimizers), strict=True))
        state: dict[str, Any] = in_ranges(like)
        model_state, optimizer_state = state["model"], state["optimizer"]
        by_name = cast(dict[str, dict[str, Any]], optimizer_state["state"])
        made = {name: set(state) for name, state in by_name.items()}
        facts: dict[str, Any] = {"stepped": True, "fresh": []}
        partly = DefaultLoadPlanner(allow_partial_load=True)  # settings of a group, and parameters without a gradient
        try:
            load_distributed(facts, checkpoint_id=path, **ranks, planner=partly)  # earlier versions saved no "fresh"
            saved = _saved_state(path, made)
            _check_groups(path, optimizer_state["param_groups"], ranks)
            frozen = {clean_name(name) for name, p in module.named_parameters() if not p.requires_grad}
            _check_state(path, saved, made, facts["stepped"], optimizers.names, frozen)
            load_distributed({"model": model_state}, checkpoint_id=path, **ranks)
            load_distributed(state, checkpoint_id=path, **ranks, planner=partly)
        except CheckpointException as error:
            raise _first_failure(path, error) from error
        state = in_runs(state, like)
        set_model_state_dict(module, state["model"])
        groups = iter(state["optimizer"]["param_groups"])
        for optimizer in optimizers:
            own = list(itertools.islice(groups, len(optimizer.param_groups)))
            _set_optimizer_state(module, optimizer, own, state["optimizer"]["state"])
        for name, parameter in module.named_parameters():
            if clean_name(name) in made.keys() - saved.keys():
                optimizers.holder(parameter).state.pop(parameter, None)
        optimizers.used = facts["stepped"]
        optimizers.reset(facts["fresh"] if optimizers.used else None)
        aside.keep()


def _set_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], states: Mapping[str, Any]
) -> None:
    """Loads what was saved of one optimizer: its groups, and of the state of all parameters by name that of its own.

    Given several optimizers at once, torch mixes up those without state, and it refuses a second group without
    parameters. Strictly it wants state of all parameters if any has some, which `momentum` set in some groups has not;
    what must be there was checked before.
    """
    before, names = optimizer.param_groups, {name for group in groups for name in group["params"]}
    state: dict[str, Any] = {
        "state": {name: of_one for name, of_one in states.items() if name in names},
        "param_groups": [group for group in groups if group["params"]],
    }
    optimizer.param_groups = [group for group in before if group["params"]]
    try:
        set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(strict=False))
    finally:
        filled = iter(optimizer.param_groups)
        optimizer.param_groups = [next(filled) if group["params"] else group for group in before]
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        if not group["params"]:
            group.update({**saved, "params": []})
    # torch has cast all state but step counts to the dtype of the weights.
    for name, parameter in module.named_parameters():
        own = optimizer.state.get(parameter, {})
        for key, value in state["state"].get(clean_name(name), {}).items() if own else ():
            cast = own.get(key)
            # FSDP1 gives pieces of its flat parameters as other tensors than the optimizer has.
            if isinstance(value, Tensor) and type(value) is type(cast) and value.shape == cast.shape:
                own[key] = cast if value.dtype == cast.dtype else value


def _saved_state(path: Path, known: Iterable[str]) -> dict[str, set[str]]:
    """The names of the optimizer state that a checkpoint holds of each parameter, without reading any of it."""
    saved: dict[str, set[str]] = {}
    for key in FileSystemReader(path).read_metadata().state_dict_metadata:
        if key.startswith("optimizer.state."):
            rest = key.removeprefix("optimizer.state.")
            name = next((name for name in known if rest.startswith(f"{name}.")), rest.rpartition(".")[0])
            saved.setdefault(name, set()).add(rest.removeprefix(f"{name}.").partition(".")[0])
    return saved


def _check_groups(path: Path, groups: Any, ranks: dict[str, Any]) -> None:
    """Checks that parameters were saved in the same groups as they are in now; OtherOptimizerError if not."""
    prefix, now = "optimizer.param_groups.", [set(group["params"]) for group in groups]
    saved = {key for key in FileSystemReader(path).read_metadata().state_dict_metadata if key.startswith(prefix)}
    numbers = {int(key.removeprefix(prefix).partition(".")[0]) for key in saved}
    if len(numbers) != len(now):
        raise OtherOptimizerError(
            f"{path}: was saved with {len(numbers)} parameter groups, and the optimizer now has {len(now)}. Build it "
            "with the same groups in the same order."
        )
    then: dict[str, Any] = {f"{prefix}{i}.params": [] for i in range(len(now))}
    load_distributed(then, checkpoint_id=path, **ranks)
    for i, (names, own) in enumerate(zip(then.values(), now, strict=True)):
        if other := sorted(own.symmetric_difference(names)):
            there, here = ("now", "then") if other[0] in own else ("then", "now")
            raise OtherOptimizerError(
                f"{path}: the optimizer's parameter group {i} holds {other[0]} {there} and not {here}. Build it with "
                "the same groups in the same order."
            )


def _check_state(
    path: Path,
    saved: Mapping[str, set[str]],
    made: Mapping[str, set[str]],
    stepped: bool,
    optimizer: str,
    frozen: Container[str],
) -> None:
    """Checks that saved optimizer state is of the kind that the optimizer makes; OtherOptimizerError if it is not."""
    for name, kinds in saved.items():
        if name in frozen and name not in made:
            raise OtherOptimizerError(
                f"{path}: {name} was trained when it was saved, and is frozen now, so that its optimizer state has no "
                "place. Load the checkpoint first, and freeze (requires_grad_(False)) after that."
            )
        if kinds != made.get(name, set()):
            raise OtherOptimizerError(
                f"{path}: holds the optimizer state {', '.join(sorted(kinds))} of {name}, and {optimizer} has "
                f"{', '.join(sorted(made.get(name, set()))) or 'none'}. Resume with the optimizer it was saved with."
            )
    if stepped and made and not saved:
        raise OtherOptimizerError(
            f"{path}: was saved by an optimizer without state, and {optimizer} has "
            f"{', '.join(sorted(next(iter(made.values()))))}. Resume with the optimizer it was saved with."
        )


def _first_failure(path: Path, error: CheckpointException) -> ValueError:
    """The first rank's error as a ValueError: CheckpointException is raised on all ranks, and is no Exception."""
    return ValueError(f"{path}: {summarize_error(next(iter(error.failures.values()))[0])}")
