"""PyTorch's own sharding: FullyShardedDataParallel (FSDP1) and fully_shard (FSDP2), hybrid sharding included.

    FSDP2                     a box of each parameter, by default rows: the local tensor of a DTensor
    FSDP1, use_orig_params    the parameters, as 1-D views of the rank's piece (maybe empty) of a flat parameter
    FSDP1, flat               that piece of the flat parameter itself, several parameters one after the other

Where every group of ranks holds the same pieces (hybrid sharding), each group decides for itself, and alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, Training, outermost, uncompiled
from gap_ds.sharding.backends.plain import Loop, NoSync, require_world
from gap_ds.sharding.backends.torch_state import DISTRIBUTED, load_state, save_state
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.mesh import Layout, shard_of
from gap_ds.sharding.shard import Fixed, Shard


def recognises(model: nn.Module) -> bool:
    """True if FSDP shards any part of the model."""
    return any(map(wraps, model.modules()))


def wraps(module: nn.Module) -> bool:
    """True for a module that FSDP shards."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def build(model: nn.Module, training: Training) -> Backend:
    """The backend of a model that is sharded by FSDP, compiled or not.

    Raises:
        ValueError: a parameter lies in no one contiguous piece per rank, or is trained without being sharded.
    """
    root = outermost(model)
    if isinstance(root, FullyShardedDataParallel):
        return _fsdp1(model, root, training)
    if isinstance(root, FSDPModule):
        return _fsdp2(model, root, training)
    raise ValueError(
        f"model={type(root).__name__}: FSDP wraps modules inside it, but not the model itself, so that the gradients "
        "of the rest are not reduced over the ranks. Wrap the outermost module too, and nothing around it."
    )


def _backend(name: str, model: nn.Module, root: nn.Module, training: Training, loop: Loop, **rest: Any) -> Backend:
    publish: Callable[[], None] = rest["publish"]
    optimizers = loop.optimizers

    def save(folder: Path) -> None:
        publish()  # whole parameters that a forward pass has left are not those of the optimizer
        save_state(root, optimizers, folder, training.world)

    def load(folder: Path) -> None:
        publish()
        load_state(root, optimizers, folder, training.world)

    return Backend(
        name=name,
        forward=model,
        optimizers=optimizers,
        micro_batches=training.gradient_accumulation_steps,
        backward=loop.backward,
        step=loop.step,
        save=save,
        load=load,
        skips_overflow=training.skips_overflow,
        reshards=DISTRIBUTED if name in DISTRIBUTED else (name,),
        **rest,
    )


def _unsharded(name: str, parameter: Tensor, rank: int) -> Shard:
    """A parameter that FSDP was told to ignore: whole on every rank, and counted on rank 0.

    Raises:
        ValueError: it is trained, so that the ranks' copies would drift apart.
    """
    if parameter.requires_grad:
        raise ValueError(
            f"{name}: is trained but not sharded (FSDP was told to ignore it), so its gradients are not reduced over "
            "the ranks. Freeze it, or let FSDP shard it."
        )
    return Shard.of_frozen(name, parameter, rank)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def _fsdp2(model: nn.Module, root: FSDPModule, training: Training) -> Backend:
    assert isinstance(root, nn.Module)
    optimizers = training.optimizers()

    def reshard() -> None:
        """Registers the sharded parameters again where a forward pass has left whole ones, stale from now on."""
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def publish() -> None:
        reshard()
        # An event that a loop has set after the optimizer's step does not cover what has changed since: without one the
        # next all-gather waits for all work before it.
        root.set_post_optim_event(None)  # type: ignore[arg-type]

    def shards() -> list[Shard]:
        reshard()
        return [_shard(clean_name(name), parameter) for name, parameter in root.named_parameters()]

    reshard()
    layout = Layout.of(root, shards, training.world)
    loop = Loop(training, optimizers, sync=root.set_requires_gradient_sync)

    def discard() -> None:
        loop.discard()
        for held in _held(root):  # whole gradients of micro-batches that were not reduced
            held.unsharded_accumulated_grad = None
            if hasattr(held, "_unsharded_param"):
                held._unsharded_param.grad = None

    return _backend(
        "fsdp2",
        model,
        root,
        training,
        loop,
        module=uncompiled(root),
        comm=layout.comm,
        shards=layout.shards,
        replicated=layout.replicated,
        publish=publish,
        discard=discard,
    )


def _held(root: nn.Module) -> Iterator[Any]:
    """FSDP2's record of each parameter."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # of earlier torch
            yield from (held for group in groups if group is not None for held in group.fsdp_params)


def _shard(name: str, parameter: nn.Parameter) -> Shard:
    return shard_of(name, parameter) if isinstance(parameter, DTensor) else _unsharded(name, parameter, 0)


def _one_comm(groups: dict[tuple[int, ...], tuple[str, dist.ProcessGroup]], world: Comm) -> Comm:
    if len(groups) > 1:
        (first, (a, _)), (second, (b, _)) = list(groups.items())[:2]
        raise ValueError(
            f"{a} is sharded over the ranks {list(first)} and {b} over {list(second)}: one group for all parameters is "
            "needed (experts on a separate mesh are not supported). Wrap every module with the same mesh."
        )
    return Comm(next(iter(groups.values()))[1], within=world) if groups else Comm(single=True, within=world)


# -- FSDP1 -------------------------------------------------------------------------------------------------------------


def _fsdp1(model: nn.Module, root: FullyShardedDataParallel, training: Training) -> Backend:
    _refuse_fsdp1(model, root)
    optimizers = training.optimizers()

    def reshard() -> None:
        """Frees the whole parameters that the root keeps after a forward pass without a backward pass."""
        for handle in _handles(root):
            if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                handle.reshard(free_unsharded_flat_param=True)

    def shards() -> list[Shard]:
        return list(_flat_pieces(root, comm))

    reshard()
    comm = _handle_comm(root, training.world)
    loop = Loop(training, optimizers, sync=NoSync(root), clip=root.clip_grad_norm_)
    return _backend(
        "fsdp1",
        model,
        root,
        training,
        loop,
        module=root.module,
        comm=comm,
        shards=shards,
        publish=reshard,
        discard=loop.discard,
    )


def _handles(root: nn.Module) -> Iterator[Any]:
    """The handle of each flat parameter, in module order: the same on all ranks."""
    for unit in FullyShardedDataParallel.fsdp_modules(root):
        if unit._handle is not None:
            yield unit._handle


def _refuse_fsdp1(model: nn.Module, root: FullyShardedDataParallel) -> None:
    for name, module in root.named_modules():
        if isinstance(module, FullyShardedDataParallel) and name.endswith("_checkpoint_wrapped_module"):
            raise ValueError(
                f"{clean_name(name)}: activation checkpointing is around FullyShardedDataParallel, which "
                "torch.distributed.checkpoint saves but cannot load. Apply it after the model is wrapped, so that it "
                "lies inside."
            )
    compiled = [m for m in (model, *root.modules()) if uncompiled(m) is not m or m._compiled_call_impl is not None]
    for handle in _handles(root):
        if compiled and not handle._use_orig_params:
            raise ValueError(
                "torch.compile with use_orig_params=False: the compiled model would train other tensors than the flat "
                "parameters. Wrap by FullyShardedDataParallel(..., use_orig_params=True), or do not compile."
            )
        if any(extension is not None for extension in handle.flat_param._param_extensions):
            raise ValueError(
                f"{handle.flat_param._fqns[0]}: is sharded by tensor parallelism and FSDP1 both: a flat parameter does "
                "not record how tensor parallelism has cut it. Use FSDP2 (fully_shard) with tensor parallelism."
            )


def _handle_comm(root: FullyShardedDataParallel, world: Comm) -> Comm:
    """The ranks among which all flat parameters are spread; NO_SHARD: none."""
    groups: dict[tuple[int, ...], tuple[str, dist.ProcessGroup]] = {}
    kinds = {handle.uses_sharded_strategy for handle in _handles(root)}
    if len(kinds) > 1:
        raise ValueError(
            "sharding_strategy=NO_SHARD in one part of the model and another strategy in the rest: a parameter is "
            "either spread over the ranks or not. Use the same sharding_strategy everywhere."
        )
    own, replicas = root.process_group, getattr(root, "_inter_node_pg", None)  # the latter with hybrid sharding
    require_world(dist.get_world_size(own) * (dist.get_world_size(replicas) if replicas is not None else 1), world)
    for handle in _handles(root):
        if handle.uses_sharded_strategy:
            group = handle.process_group
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), (handle.flat_param._fqns[0], group))
    return _one_comm(groups, world)


def _flat_pieces(root: FullyShardedDataParallel, comm: Comm) -> Iterator[Shard]:
    """This rank's piece of every parameter, as each flat parameter's own records have it."""
    modules = {id(module): clean_name(name) for name, module in root.named_modules()}
    sharded: set[int] = set()
    for handle in _handles(root):
        flat = handle.flat_param
        sharded.add(id(flat))
        for i, (info, shape, piece) in enumerate(
            zip(flat._param_infos, flat._shapes, flat._shard_param_infos, strict=True)
        ):
            original: bool = handle._use_orig_params
            parameter: Tensor = flat._params[i] if original else flat
            sharded.add(id(parameter))
            yield Shard.of_range(
                name=f"{modules[id(info.module)]}.{info.param_name}".removeprefix("."),
                shape=tuple(shape),
                start=piece.intra_param_start_idx or 0,
                numel=piece.numel_in_shard or 0,
                offset=0 if original else piece.offset_in_shard or 0,
                owner=Fixed(parameter),  # for life; only what its `data` points at changes
                trainable=parameter.requires_grad,
            )
    for name, parameter in root.named_parameters():
        if id(parameter) not in sharded:
            yield _unsharded(clean_name(name), parameter, comm.rank)
