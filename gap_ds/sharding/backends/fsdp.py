"""PyTorch's own sharding: FullyShardedDataParallel (FSDP1) and fully_shard (FSDP2), hybrid sharding included.

    FSDP2                     rows of each parameter: the local tensor of a DTensor
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
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Shard as ShardPlacement

from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, Training, uncompiled
from gap_ds.sharding.backends.plain import Loop, NoSync, load_state, require_world, save_state
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard


def recognises(model: nn.Module) -> bool:
    """True if FSDP shards any part of the model."""
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


def build(model: nn.Module, training: Training) -> Backend:
    """The backend of a model that is sharded by FSDP, compiled or not.

    Raises:
        ValueError: a parameter lies in no one contiguous piece per rank, or is trained without being sharded.
    """
    root = uncompiled(model)
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
        save_state(root, optimizers, folder)

    def load(folder: Path) -> None:
        publish()
        load_state(root, optimizers, folder)

    return Backend(
        name=name,
        forward=model,
        optimizers=optimizers,
        micro_batches=training.gradient_accumulation_steps,
        backward=loop.backward,
        step=loop.step,
        save=save,
        load=load,
        skips_overflow=training.grad_scaler is not None,
        reshards=True,
        **rest,
    )


def _unsharded(name: str, parameter: Tensor) -> Shard:
    """A parameter that FSDP was told to ignore: whole on every rank.

    Raises:
        ValueError: it is trained, so that the ranks' copies would drift apart.
    """
    if parameter.requires_grad:
        raise ValueError(
            f"{name}: is trained but not sharded (FSDP was told to ignore it), so its gradients are not reduced over "
            "the ranks. Freeze it, or let FSDP shard it."
        )
    return Shard(name, tuple(parameter.shape), 0, parameter.numel(), 0, lambda: parameter, trainable=False)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def _fsdp2(model: nn.Module, root: FSDPModule, training: Training) -> Backend:
    assert isinstance(root, nn.Module)
    optimizers = training.optimizers()

    def reshard() -> None:
        """Registers the sharded parameters again where a forward pass has left whole ones, stale from now on."""
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shards() -> list[Shard]:
        reshard()
        return [_rows(clean_name(name), parameter) for name, parameter in root.named_parameters()]

    reshard()
    loop = Loop(training, optimizers, sync=root.set_requires_gradient_sync)
    return _backend(
        "fsdp2",
        model,
        root,
        training,
        loop,
        module=root,
        comm=_mesh_comm(dict(root.named_parameters())),
        shards=shards,
        publish=reshard,
    )


def _rows(name: str, parameter: nn.Parameter) -> Shard:
    """This rank's rows of a parameter; as torch.chunk cuts them, so the last ranks may have fewer or none.

    The owner is the parameter object itself: FSDP2 keeps it for life, the optimizer holds it, and the local tensor is
    taken from it afresh at every use.
    """
    if not isinstance(parameter, DTensor):
        return _unsharded(name, parameter)
    shape = tuple(parameter.shape)
    dim = _sharded_dim(name, parameter)
    start, numel = 0, parameter.to_local().numel()
    if dim is not None:
        size, rank = parameter.device_mesh.size(dim), parameter.device_mesh.get_local_rank(dim)
        rows = -(-shape[0] // size)
        start = min(rank * rows, shape[0]) * (parameter.numel() // max(shape[0], 1))
    return Shard(name, shape, start, numel, 0, lambda: parameter, trainable=parameter.requires_grad)


def _sharded_dim(name: str, parameter: DTensor) -> int | None:
    """The mesh dimension over which a parameter is sharded; None if every rank has it whole.

    Raises:
        ValueError: a rank's piece is no contiguous range of the flattened parameter.
    """
    placements = parameter.placements
    dims = [i for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(dims) > 1:
        raise ValueError(
            f"{name}: is sharded over {len(dims)} mesh dimensions ({placements}), as with tensor parallelism: an entry "
            "would be cut in two ways. Use fully_shard on a mesh of data-parallel dimensions alone."
        )
    for placement in placements:
        if isinstance(placement, ShardPlacement) and placement.dim != 0:
            raise ValueError(
                f"{name}: is sharded on dimension {placement.dim}; only dimension 0 is supported, where a rank's piece "
                "is contiguous. Remove shard_placement_fn, or let it return None for this parameter."
            )
        if not isinstance(placement, Replicate | ShardPlacement):
            raise ValueError(f"{name}: has the placement {placement}; only Shard(0) and Replicate() are supported.")
    return dims[0] if dims else None


def _mesh_comm(parameters: dict[str, nn.Parameter]) -> Comm:
    """The ranks among which all sharded parameters are spread.

    Raises:
        ValueError: not all are spread over the same ranks.
    """
    groups: dict[tuple[int, ...], tuple[str, dist.ProcessGroup]] = {}
    for parameter in parameters.values():
        if isinstance(parameter, DTensor):
            require_world(parameter.device_mesh.size())
            break
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) and (dim := _sharded_dim(clean_name(name), parameter)) is not None:
            group = parameter.device_mesh.get_group(dim)
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), (clean_name(name), group))
    return _one_comm(groups)


def _one_comm(groups: dict[tuple[int, ...], tuple[str, dist.ProcessGroup]]) -> Comm:
    if len(groups) > 1:
        (first, (a, _)), (second, (b, _)) = list(groups.items())[:2]
        raise ValueError(
            f"{a} is sharded over the ranks {list(first)} and {b} over {list(second)}: one group for all parameters is "
            "needed (experts on a separate mesh are not supported). Wrap every module with the same mesh."
        )
    return Comm(next(iter(groups.values()))[1]) if groups else Comm(single=True)


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
        return list(_flat_pieces(root))

    reshard()
    loop = Loop(training, optimizers, sync=NoSync(root), clip=root.clip_grad_norm_)
    return _backend(
        "fsdp1",
        model,
        root,
        training,
        loop,
        module=root.module,
        comm=_handle_comm(root),
        shards=shards,
        publish=reshard,
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
                f"{handle.flat_param._fqns[0]}: is sharded by tensor parallelism and FSDP both: an entry would be cut "
                "in two ways. Use FSDP alone."
            )


def _handle_comm(root: FullyShardedDataParallel) -> Comm:
    """The ranks among which all flat parameters are spread; NO_SHARD: none."""
    groups: dict[tuple[int, ...], tuple[str, dist.ProcessGroup]] = {}
    kinds = {handle.uses_sharded_strategy for handle in _handles(root)}
    if len(kinds) > 1:
        raise ValueError(
            "sharding_strategy=NO_SHARD in one part of the model and another strategy in the rest: a parameter is "
            "either spread over the ranks or not. Use the same sharding_strategy everywhere."
        )
    own, replicas = root.process_group, getattr(root, "_inter_node_pg", None)  # the latter with hybrid sharding
    require_world(dist.get_world_size(own) * (dist.get_world_size(replicas) if replicas is not None else 1))
    for handle in _handles(root):
        if handle.uses_sharded_strategy:
            group = handle.process_group
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), (handle.flat_param._fqns[0], group))
    return _one_comm(groups)


def _flat_pieces(root: FullyShardedDataParallel) -> Iterator[Shard]:
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
            yield Shard(
                name=f"{modules[id(info.module)]}.{info.param_name}".removeprefix("."),
                shape=tuple(shape),
                start=piece.intra_param_start_idx or 0,
                numel=piece.numel_in_shard or 0,
                offset=0 if original else piece.offset_in_shard or 0,
                owner=_always(parameter),
                trainable=parameter.requires_grad,
            )
    for name, parameter in root.named_parameters():
        if id(parameter) not in sharded:
            yield _unsharded(clean_name(name), parameter)


def _always(tensor: Tensor) -> Callable[[], Tensor]:
    """FSDP1 keeps its parameter objects for life; only what their `data` points at changes."""
    return lambda: tensor
