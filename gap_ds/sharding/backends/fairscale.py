"""fairscale: FullyShardedDataParallel, and OSS with ShardedDataParallel.

fairscale calls itself historical and has had no release since 2022 (0.4.13); PyTorch's FSDP is its successor. It is
supported for those who still train with it.

    FullyShardedDataParallel   rank r has elements [r * n, (r + 1) * n) of a flat parameter (several parameters one
                               after the other) or of a single one; the end of the last pieces is padding
    OSS, ShardedDataParallel   whole parameters, each updated by one rank and then broadcast
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, Training, uncompiled
from gap_ds.sharding.backends.plain import Loop, NoSync, require_world
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Fixed, Shard


def recognises(model: nn.Module) -> bool:
    """True if fairscale shards any part of the model. Does not need fairscale to be installed."""
    return any(map(wraps, model.modules()))


def wraps(module: nn.Module) -> bool:
    """True for a module that fairscale shards."""
    return "fairscale" in sys.modules and (_sharded_ddp(module) or _fully_sharded(module))


def _sharded_ddp(module: nn.Module) -> bool:
    from fairscale.nn.data_parallel import ShardedDataParallel

    return isinstance(module, ShardedDataParallel)


def _fully_sharded(module: nn.Module) -> bool:
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def build(model: nn.Module, training: Training) -> Backend:
    """The backend of a model wrapped by fairscale.

    Raises:
        ValueError: only a part is wrapped, it is compiled, or its setting was not tested.
    """
    if uncompiled(model) is not model or model._compiled_call_impl is not None:
        raise ValueError(
            "torch.compile of a model wrapped by fairscale: its hooks swap the parameters under the compiled code. "
            "Do not compile, or use PyTorch's fully_shard."
        )
    if _sharded_ddp(model):
        return _oss(model, training)
    if _fully_sharded(model):
        return _fsdp(model, training)
    raise ValueError(
        f"model={type(model).__name__}: fairscale wraps modules inside it, but not the model itself, so that the "
        "gradients of the rest are not reduced over the ranks. Wrap the outermost module too, and nothing around it."
    )


# -- OSS and ShardedDataParallel ---------------------------------------------------------------------------------------


def _oss(model: Any, training: Training) -> Backend:
    from fairscale.optim import OSS

    oss = training.optimizer
    if not isinstance(oss, OSS) or model._sharded_optimizers != [oss]:
        raise ValueError(
            f"optimizer={type(oss).__name__}: with ShardedDataParallel it must be the one OSS that the model was "
            "wrapped with. Pass that OSS; several of them are not supported."
        )
    inner = Optimizers([oss.optim], meanings=training.optimizer_state)
    require_world(oss.world_size, training.world)
    comm = Comm(oss.group, within=training.world)

    def shards() -> list[Shard]:
        return [_owned(clean_name(name), p, oss) for name, p in model.module.named_parameters()]

    def load(folder: Path) -> None:
        _load(folder, model, shards(), inner, comm)
        spread()

    def spread(*_: object) -> None:
        OSS._sync_param_groups(inner.groups(), oss.param_groups)
        oss._broadcast_params()

    loop = Loop(
        training,
        Optimizers([oss]),
        sync=NoSync(model),
        clip=oss.clip_grad_norm,
        # Gradients are views of the wrapper's buckets: the optimizer's own zero_grad would cut the tie.
        clear=lambda: model.zero_grad(set_to_none=True),
    )
    return Backend(
        name="oss",
        forward=model,
        module=model.module,
        optimizers=inner,
        micro_batches=training.gradient_accumulation_steps,
        comm=comm,
        shards=shards,
        publish=oss._broadcast_params,
        backward=loop.backward,
        step=loop.step,
        save=lambda folder: _save(folder, model, shards(), inner, comm),
        load=load,
        discard=loop.discard,
        recount=spread,
        skips_overflow=training.skips_overflow,
    )


def _owned(name: str, parameter: nn.Parameter, oss: Any) -> Shard:
    """The whole parameter on the rank that updates it, nothing on the others; what is frozen, whole on all."""
    if not parameter.requires_grad:
        return Shard.of_frozen(name, parameter, oss.rank)
    numel = parameter.numel() if oss._param_to_rank.get(parameter, oss.rank) == oss.rank else 0
    return Shard.of_range(name, tuple(parameter.shape), 0, numel, 0, lambda: parameter)


# -- FullyShardedDataParallel ------------------------------------------------------------------------------------------


def _fsdp(root: Any, training: Training) -> Backend:
    optimizers = training.optimizers()
    units = [module for module in root.modules() if _fully_sharded(module)]
    comm = _comm(units, training.world)

    def use_shards(*_: object) -> None:
        """Frees the whole parameters that the root keeps after a forward pass, and points all at their pieces."""
        for unit in units:
            if all(hasattr(p, "_fp32_shard") for p in unit.params):  # before the first forward pass none has
                unit._free_full_params()
                unit._use_fp32_param_shard()

    def shards() -> list[Shard]:
        use_shards()
        return list(_flat_pieces(root, units, comm))

    def load(folder: Path) -> None:
        use_shards()
        _load(folder, root, shards(), optimizers, comm)

    # A parameter of the root without a gradient in this step is left whole: neither optimizer nor masks may see it so.
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(use_shards)
    loop = Loop(training, optimizers, sync=NoSync(root), clip=root.clip_grad_norm_)
    return Backend(
        name="fairscale_fsdp",
        forward=root,
        module=root.module.module,
        optimizers=optimizers,
        micro_batches=training.gradient_accumulation_steps,
        comm=comm,
        shards=shards,
        publish=use_shards,
        backward=loop.backward,
        step=loop.step,
        save=lambda folder: _save(folder, root, shards(), optimizers, comm),
        load=load,
        discard=loop.discard,
        skips_overflow=training.skips_overflow,
    )


def _comm(units: list[Any], world: Comm) -> Comm:
    """The ranks among which the parameters are spread.

    Raises:
        ValueError: not all are spread over the same ranks.
    """
    groups = {tuple(dist.get_process_group_ranks(unit.process_group)): unit.process_group for unit in units}
    if len(groups) > 1:
        first, second = list(groups)[:2]
        raise ValueError(
            f"process_group: some modules are sharded over the ranks {list(first)}, others over {list(second)}; one "
            "group for all is needed. Wrap every module with the same process_group."
        )
    group = next(iter(groups.values()))
    require_world(group.size(), world)
    return Comm(group, single=group.size() == 1, within=world)


def _flat_pieces(root: nn.Module, units: list[Any], comm: Comm) -> Iterator[Shard]:
    """This rank's piece of every parameter, by fairscale's own records of what lies where in a flat parameter."""
    modules = {id(module): clean_name(name) for name, module in root.named_modules()}
    single = {id(p): clean_name(name) for name, p in nn.Module.named_parameters(root)}
    for unit in units:
        for index, owner in enumerate(unit.params):
            if index < unit._num_flatten_params:
                names = [f"{modules[id(module)]}.{leaf}".removeprefix(".") for _, module, leaf in owner._param_infos]
                shapes = owner._param_shapes
            else:
                names, shapes = [single[id(owner)]], [owner._orig_size]
            width = owner.numel() if owner._is_sharded else owner._orig_size.numel()
            first, begin = comm.rank * width, 0
            for name, shape in zip(names, shapes, strict=True):
                lo = min(max(first, begin), begin + shape.numel())
                hi = min(first + width, begin + shape.numel())
                numel = max(0, hi - lo)
                yield Shard.of_range(
                    name,
                    tuple(shape),
                    lo - begin,
                    numel,
                    lo - first if numel else 0,
                    Fixed(owner),  # for life; only what its `data` points at changes
                    owner.requires_grad,
                )
                begin += shape.numel()


# -- checkpoint --------------------------------------------------------------------------------------------------------


def _file(folder: Path, comm: Comm) -> Path:
    return folder / "state" / f"rank_{comm.rank}_of_{comm.size}.pt"


def _save(folder: Path, model: nn.Module, shards: list[Shard], optimizers: Optimizers, comm: Comm) -> None:
    """This rank's pieces, buffers and optimizer state; tensors and plain values only."""
    path = _file(folder, comm)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "weights": {shard.name: shard.weight().clone() for shard in shards},
        "buffers": {clean_name(name): buffer for name, buffer in model.named_buffers()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, path)


def _load(folder: Path, model: nn.Module, shards: list[Shard], optimizers: Optimizers, comm: Comm) -> None:
    """Reads what `_save` wrote.

    Raises:
        ValueError: it was written by another number of ranks.
    """
    path = _file(folder, comm)
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.pt"))) or "nothing"
        raise ValueError(
            f"{folder}: holds {found}, but not {path.name}: with fairscale a run can only go on with as many ranks as "
            "it was saved with. Resume with that many, or export the model and start anew."
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for shard in shards:
            if shard.numel:
                shard.weight().copy_(state["weights"][shard.name])
        for name, buffer in model.named_buffers():
            buffer.copy_(state["buffers"][clean_name(name)])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
