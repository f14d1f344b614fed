"""Moments follow the masks, also those of optimizers that hold state for kept weights alone (`gap_ds.optim`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.masks.local import local
from gap_ds.optim.sparse_state import SparseState
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard


def change_mask(
    optimizers: Optimizers,
    shard: Shard,
    before: Tensor | None,
    bits: Tensor | None,
    first: Mapping[str, float],
    keep: Collection[str],
) -> None:
    """Adapts the moments of an entry to another mask, or to none.

    Those of weights that the mask before has pruned take their first values.

    Args:
        first: other first values, by the moment's name.
        keep: names of moments that stay as they are, where they are held.
    """
    if not shard.numel:
        return
    owner = shard.owner()
    holder = optimizers.holder(owner)
    if isinstance(holder, SparseState) and holder.divides(owner):
        holder.change_mask(owner, shard.offset, bits, first)
        return
    if before is None:
        return
    for name, moment, usual in optimizers.moments(shard):
        if name not in keep:
            bitmask.zero_pruned_(moment, before)
            if (value := first.get(name, usual)) != 0.0:
                moment[~bitmask.unpack(before, shard.numel)] = value


def nbytes(optimizers: Optimizers) -> int:
    """Bytes of all optimizer state on this rank."""
    return sum(_nbytes(state) for optimizer in optimizers for state in optimizer.state.values())


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return local(value).nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_nbytes(part) for part in parts)


# -- optimizers that hold state for kept weights alone -----------------------------------------------------------------


def packing(optimizers: Optimizers) -> str:
    """The class names of such optimizers; empty if there are none."""
    return ", ".join(type(optimizer).__name__ for optimizer in _packing(optimizers))


def divide(optimizers: Optimizers, shards: Collection[Shard]) -> None:
    """Tells them which weights may be masked."""
    owners: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}
    for shard in shards if packing(optimizers) else ():
        if shard.numel:
            owner = shard.owner()
            owners.setdefault(id(owner), (owner, []))[1].append((shard.offset, shard.numel))
    for owner, ranges in owners.values():
        if isinstance(holder := optimizers.holder(owner), SparseState):
            holder.divide(owner, ranges)


def release(optimizers: Optimizers) -> None:
    """Makes all state whole again, with zeros where weights are pruned."""
    for optimizer in _packing(optimizers):
        optimizer.release()


def take_masks(optimizers: Optimizers, shards: Mapping[str, Shard], bits: Mapping[str, Tensor]) -> None:
    """Gives them masks that belong to their state as it is."""
    for name, shard in shards.items() if packing(optimizers) else ():
        if not shard.numel:
            continue
        holder = optimizers.holder(owner := shard.owner())
        if isinstance(holder, SparseState) and holder.divides(owner):
            holder.change_mask(owner, shard.offset, bits.get(name))
    for optimizer in _packing(optimizers):
        optimizer.settle()


def spares(optimizers: Optimizers, shard: Shard, bits: Tensor) -> bool:
    """True if the steps of the optimizer that updates a piece leave the weights alone that this mask prunes."""
    holder = optimizers.holder(owner := shard.owner())
    return isinstance(holder, SparseState) and holder.bits(owner, shard.offset) is bits


def _packing(optimizers: Optimizers) -> Iterator[SparseState]:
    return (optimizer for optimizer in optimizers if isinstance(optimizer, SparseState))
