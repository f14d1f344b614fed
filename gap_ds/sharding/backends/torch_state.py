"""Weights and optimizer state by torch.distributed.checkpoint, which stores whole parameters by name and reshards them.

The checkpoints of plain PyTorch, DDP, FSDP1 and FSDP2 are alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping
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
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.distributed.tensor.placement_types import Shard as ShardPlacement

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import OtherOptimizerError
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.storage.errors import summarize_error

#: Backends that can resume each other's checkpoints.
DISTRIBUTED = ("plain", "ddp", "fsdp2")


def save_state(module: nn.Module, optimizers: Optimizers, folder: Path, world: Comm) -> None:
    """Weights and optimizer state by torch.distributed.checkpoint, which also reshards them."""
    with optimizers.aside():
        # Without state as after a reset: torch saves what it makes by a step, and the next step must not go on from it.
        fresh = [i for i, optimizer in enumerate(optimizers) if not optimizer.state]
        stepped = optimizers.stepped
        model, optimizer = _state_dict(module, optimizers)
        state = _in_ranges({"model": model, "optimizer": optimizer}) | {"stepped": stepped, "fresh": fresh}
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
        state: dict[str, Any] = _in_ranges(like)
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
        state = _in_runs(state, like)
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


@torch.no_grad()
def _in_ranges(tree: Any) -> Any:
    """A tree of dicts and lists, in which DTensors that are cut into several runs along a dimension are cut into one.

    torch.distributed.checkpoint takes the piece of each rank for one box of the whole. All ranks must call this.
    """
    return _mapped(lambda tensor: tensor.redistribute(placements=_ranges(tensor)), tree)


@torch.no_grad()
def _in_runs(tree: Any, like: Any) -> Any:
    """A tree that `_in_ranges` has made of the tree `like`, with its DTensors cut as they were. All ranks call this."""
    return _mapped(lambda tensor, before: tensor.redistribute(placements=before.placements), tree, like)


def _mapped(change: Callable[..., Any], *trees: Any) -> Any:
    """The first tree with all tensors changed whose placements in the last tree are not ranges."""
    first, last = trees[0], trees[-1]
    if isinstance(first, dict):
        return {key: _mapped(change, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, list):
        return [_mapped(change, *each) for each in zip(*trees, strict=True)]
    return change(*trees) if isinstance(last, DTensor) and last.placements != _ranges(last) else first


def _ranges(tensor: DTensor) -> tuple[Placement, ...]:
    """Placements of which each gives a rank one range of a dimension.

    A strided placement is one if its groups are those of the placements after it, as FSDP2 makes them over tensor
    parallelism.
    """
    found: list[Placement] = list(tensor.placements)
    for i, own in enumerate(found):
        if isinstance(own, _StridedShard):
            rest = zip(tensor.placements[i + 1 :], tensor.device_mesh.shape[i + 1 :], strict=True)
            groups = math.prod(size for one, size in rest if isinstance(one, ShardPlacement) and one.dim == own.dim)
            found[i] = own if own.split_factor == groups else ShardPlacement(own.dim)
    return tuple(found)
