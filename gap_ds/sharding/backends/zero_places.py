"""Where DeepSpeed keeps a rank's piece of each parameter.

DeepSpeed keeps fp32 weights in flat buffers, one per parameter group (stages 1 and 2, BF16_Optimizer) or sub-group
(stage 3), and the innermost optimizer updates those. The buffers' geometry is read from DeepSpeed's own records:

    stages 1, 2, bf16:  p._hp_mapping      lp_fragment_address: where in p;  hp_fragment_address: where in the buffer
    stage 3:            grad_position      (sub-group, offset, numel) of this rank's piece of p
    stage 0, fp16:      fp32_groups_flat   whole parameters one after the other, or fp32_groups, one tensor each

With AutoTP (stages 1 and 2) a parameter in the module is a rank's cut of it along one dimension, and the records are of
that cut. A rank's piece is then a range of the cut, which must be a box of the whole parameter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gap_ds.masks.box import Box
from gap_ds.method.plan import clean_name
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Item, Shard

#: (start, numel, offset, owner) of this rank's piece of a parameter that is trained
Place = tuple[int, int, int, Callable[[], Tensor]]
Places = Callable[[nn.Parameter], Place]


def shard(name: str, parameter: Any, place: Places, trained: bool, rank: int, cut_at: int) -> Shard:
    """This rank's piece of a parameter; `rank` among those that share it, `cut_at` those of tensor parallelism."""
    name = clean_name(name)
    if not trained:
        start, numel, offset, owner = _untrained_place(parameter)
        counted = rank == 0 or hasattr(parameter, "ds_tensor")  # whole on all ranks, but in stage 3
        box = _box(name, parameter, start, numel, cut_at)
        return Shard(name, *box, offset, owner, trainable=False, counted=counted)
    try:
        start, numel, offset, owner = place(parameter)
    except (AttributeError, KeyError):
        raise ValueError(
            f"{name}: is not among the parameters of the DeepSpeed engine's optimizer, though it requires a gradient. "
            "Build the optimizer over it, or freeze it (requires_grad_(False)) before deepspeed.initialize."
        ) from None

    def copies() -> tuple[Tensor, ...]:
        """The piece of what the forward pass reads, where that is another tensor."""
        held = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
        first = 0 if hasattr(parameter, "ds_tensor") else start
        return () if not numel or owner() is parameter else (held[first : first + numel],)

    return Shard(name, *_box(name, parameter, start, numel, cut_at), offset, owner, copies=copies)


def _box(name: str, parameter: Any, start: int, numel: int, cut_at: int) -> tuple[tuple[int, ...], Box]:
    """The whole shape of a parameter, and the box of a range of what this rank's module has of it.

    Raises:
        ValueError: AutoTP has cut it in a way that makes the range no box.
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    cut = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    if cut is None or cut["conversion"]["replicated"]:
        return shape, Box.span(start, numel, math.prod(shape))
    sides, dim, sizes = Box.span(start, numel, math.prod(shape)).sides(shape), cut["partition_dim"], None
    if cut["sub_param_shard_widths"] is None and cut["conversion"]["unsupported_reason"] is None:
        sizes = cut["partition_sizes"]
    if sides is None or dim is None or sizes is None:
        raise ValueError(
            f"{name}: AutoTP has cut it into {shape}, and ZeRO gives this rank elements {start} to {start + numel} of "
            f"that, which is no box of the whole weight. DeepSpeed {version()} has no option to cut by rows. Set "
            '"autotp_size" to the number of ranks, use stage 3 without AutoTP, or FSDP2 with tensor parallelism.'
        )
    whole = (*shape[:dim], sum(sizes), *shape[dim + 1 :])
    if not numel:
        return whole, Box.span(0, 0, math.prod(whole))
    offset, size = sides
    return whole, Box.of(whole, (*offset[:dim], offset[dim] + sum(sizes[:cut_at]), *offset[dim + 1 :]), size)


def version() -> str:
    """The version of DeepSpeed, for messages."""
    import deepspeed

    return str(deepspeed.__version__)


def _untrained_place(parameter: Any) -> Place:
    if not hasattr(parameter, "ds_tensor"):
        return _whole_place(parameter)
    n = parameter.ds_tensor.ds_numel
    start = min(torch.distributed.get_rank(getattr(parameter, "ds_process_group", None)) * n, parameter.ds_numel)
    return start, min(n, parameter.ds_numel - start), 0, lambda: parameter.ds_tensor


def places(engine: Any, stage: int, world: Comm) -> tuple[Places, Comm, Callable[[], None]]:
    """Where pieces lie, who shares them, and how changes are made known, for the optimizer that DeepSpeed built."""
    optimizer = engine.optimizer
    if stage == 3:
        return (
            _stage3_place(optimizer),
            Comm(optimizer.dp_process_group, within=world),
            partial(_publish_stage3, optimizer),
        )
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2, and stage 1's BF16_Optimizer
        comm = Comm(engine.seq_data_parallel_group, within=world)
        return _fragment_place(optimizer), comm, optimizer.update_lp_params
    if hasattr(optimizer, "fp32_groups_flat") or hasattr(optimizer, "fp32_groups"):  # stage 0 with fp32 copies
        return _copied_place(optimizer), Comm(single=True, within=world), partial(_publish_copies, optimizer)
    return _whole_place, Comm(single=True, within=world), lambda: None


def _owners(buffers: Callable[[], list[Tensor]]) -> Callable[[int], Callable[[], Tensor]]:
    """The owner of all pieces in a group's flat buffer is one callable, because the hook asks each callable once."""
    return functools.cache(lambda group: Item(buffers, group))


def _whole_place(parameter: nn.Parameter) -> Place:
    return 0, parameter.numel(), 0, lambda: parameter


def _fragment_place(optimizer: Any) -> Places:
    """Stages 1 and 2: a fragment of the parameter in its group's flat fp32 partition."""
    name = "single_partition_of_fp32_groups"  # of the ZeRO optimizer; BF16_Optimizer has another word for it
    name = name if hasattr(optimizer, name) else "fp32_groups_flat_partition"
    owners = _owners(lambda: getattr(optimizer, name))

    def place(parameter: Any) -> Place:
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0, lambda: parameter
        low, high, group = mapping.lp_fragment_address, mapping.hp_fragment_address, mapping.param_group_index
        return low.start, low.numel, high.start, owners(group)

    return place


def _stage3_place(optimizer: Any) -> Places:
    """Stage 3: rank r owns elements [r * n, (r + 1) * n) of each parameter; the end of the last piece is padding."""

    owners = _owners(lambda: optimizer.fp32_partitioned_groups_flat)

    def place(parameter: Any) -> Place:
        group, offset, n = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(torch.distributed.get_rank(optimizer.dp_process_group) * n, parameter.ds_numel)
        numel = min(n, parameter.ds_numel - start)
        return start, numel, offset, owners(group)

    return place


def _publish_stage3(optimizer: Any) -> None:
    # The order of DeepSpeed's own step: release gathered parameters, copy the pieces, gather the persistent ones again.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Else the next forward pass gathers the weights from before. An engine without hpz has such copies, too, once
    # another engine of the process has it: DeepSpeed keeps the group for all.
    optimizer.invalidate_secondary_tensor()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _copied_place(optimizer: Any) -> Places:
    """Stage 0 in 16 bits: whole fp32 copies, in one flat tensor per group or one tensor per parameter."""
    flat = hasattr(optimizer, "fp32_groups_flat")
    places: dict[int, Place] = {}
    for g, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for i, parameter in enumerate(group):
            places[id(parameter)] = (0, parameter.numel(), offset if flat else 0, partial(_copy, optimizer, g, i))
            offset += parameter.numel()
    return lambda parameter: places[id(parameter)]


def _copy(optimizer: Any, group: int, index: int) -> Tensor:
    """The fp32 tensor that holds a parameter: its group's flat one, or its own."""
    if hasattr(optimizer, "fp32_groups_flat"):
        return cast(Tensor, optimizer.fp32_groups_flat[group])
    return cast(Tensor, optimizer.fp32_groups[group][index])


def _publish_copies(optimizer: Any) -> None:
    place = _copied_place(optimizer)
    for group in optimizer.fp16_groups:
        for parameter in group:
            _, numel, offset, owner = place(parameter)
            parameter.data.view(-1).copy_(owner().detach().view(-1)[offset : offset + numel])
