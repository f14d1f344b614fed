"""The tensors that workers exchange, and how a worker's file holds them. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from gap_ds.masks import codec
from gap_ds.masks.box import Box
from gap_ds.method.names import by_parameter
from gap_ds.method.plan import Plan
from gap_ds.sharding.shard import Shard, of_entries
from gap_ds.storage import safetensors
from gap_ds.storage.errors import printable
from gap_ds.storage.json import parse_table
from gap_ds.storage.safetensors import Layout

FORMAT: Final = "gap_ds.exchange"
VERSION = 2

#: The dtypes that are exchanged unchanged.
DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Item:
    """One tensor of the model, an entry, another parameter or a buffer, and this rank's piece of it.

    partition: the worker that it is taken from; None for a tensor in no partition.
    keep: number of kept weights of an entry; None for any other tensor. With `shared_budget`, the entries of a
        partition share one budget, and only the sum of their `keep` is binding.
    dtype: in the file.
    """

    shard: Shard
    partition: int | None
    keep: int | None = None
    shared_budget: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The name of the entry, or of the tensor in the model."""
        return self.shard.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.shard.shape

    @property
    def box(self) -> Box:
        """Where this rank's piece lies."""
        return self.shard.box

    @property
    def parts(self) -> dict[str, Literal["mask", "values", "whole"]]:
        """The tensors that a file holds of it, by their names in the file."""
        if self.keep is None:
            return {self.name: "whole"}
        return {f"{self.name}.mask": "mask", f"{self.name}.values": "values"}


@dataclass(frozen=True)
class Received:
    """This rank's piece of one tensor after the exchange, on the CPU.

    value: (N,), in fp32 or the dtype of the buffer; exactly +0.0 for the pruned weights of an entry.
    bits: the mask of an entry's piece, as `gap_ds.masks.bitmask` packs it; None for any other tensor.
    """

    name: str
    value: Tensor
    bits: Tensor | None


# -- items ----------------------------------------------------------------------------------------------------------


def items_of(plan: Plan, shards: Sequence[Shard], buffers: Mapping[str, Tensor]) -> list[Item]:
    """Return what is exchanged of a model: its trained parameters and its buffers, each with its partition.

    Frozen parameters are left out, because they are equal on all workers. Call this again for each round: a module may
    have replaced a buffer by another tensor.

    Args:
        shards: this rank's piece of every parameter, in the same order on all ranks.
        buffers: the buffers of a checkpoint by clean name, whole on every rank.
    Raises:
        ValueError: a buffer has a dtype that cannot be exchanged.
    """
    entries = {entry.name: entry for entry in plan.entries}
    of_parameter, pieces = by_parameter(entries), of_entries(entries, shards)
    items = []
    for shard in shards:
        if not shard.trainable:
            continue
        own = [entries[name] for name in of_parameter.get(shard.name, ())]
        items += [Item(pieces[e.name], e.partition, e.keep, plan.shared_budget) for e in own]
        if not own:
            items.append(Item(shard, plan.partition_of(shard.name), None, plan.shared_budget))
    for name, buffer in buffers.items():
        dtype = torch.float32 if buffer.is_floating_point() and buffer.dtype != torch.float64 else buffer.dtype
        if dtype not in DTYPES:
            raise ValueError(f"{name}: a buffer of {buffer.dtype} cannot be exchanged. Make it non-persistent.")
        whole = Box.span(0, buffer.numel(), buffer.numel())
        shard = Shard(name, tuple(buffer.shape), whole, 0, partial(torch.Tensor.reshape, buffer.detach(), (-1,)))
        items.append(Item(shard, plan.partition_of(name), dtype=dtype))
    return items


def selected(items: Sequence[Item], worker: int, unpartitioned: str) -> list[Item]:
    """Return the items in the file of a worker: its partition, and the tensors in no partition that are taken from it.

    Integers in no partition, and with `unpartitioned="first"` all tensors in no partition, are taken from worker 0.
    """
    return [
        item
        for item in items
        if item.partition == worker or (item.partition is None and (worker == 0 or is_averaged(item, unpartitioned)))
    ]


def is_averaged(item: Item, unpartitioned: str) -> bool:
    """Return whether a tensor in no partition becomes the mean over the workers."""
    return unpartitioned == "average" and item.dtype.is_floating_point


def budgets(items: Sequence[Item]) -> dict[str, int]:
    """Return the planned number of kept weights of each entry."""
    return {item.name: item.keep for item in items if item.keep is not None}


def check_items(items: Sequence[Item], workers: int) -> None:
    """Check that a file can hold the items.

    Raises:
        ValueError: two tensors have the same name in the file, or no worker has the partition of an item.
    """
    seen = {"__metadata__"}
    for item in items:
        for name in item.parts:
            if name in seen:
                raise ValueError(f"{name}: two tensors of the exchange would have this name")
            seen.add(name)
        if item.partition is not None and not 0 <= item.partition < workers:
            raise ValueError(f"{item.name}: is in partition {item.partition}, and there are {workers} workers")


def check_kept(items: Sequence[Item], kept: Mapping[str, int]) -> None:
    """Check that masks are pruned to target before they are published; no reader would accept others.

    Raises:
        ValueError: an entry, or the sum of the entries that share a budget, keeps another number of weights.
    """
    for item in items:
        if item.keep is not None and not item.shared_budget and kept[item.name] != item.keep:
            raise ValueError(f"{item.name}: its mask keeps {kept[item.name]} weights instead of {item.keep}")
    budget = sum(budgets(items).values())
    if sum(kept.values()) != budget:
        raise ValueError(f"the entries of the partition keep {sum(kept.values())} weights instead of {budget}")


# -- a worker's file ------------------------------------------------------------------------------------------------


def layout(items: Sequence[Item], kept: Mapping[str, int]) -> Layout:
    """Return the tensors of a file in the order of their bytes: wide dtypes first, so that all are aligned, by name.

    Args:
        kept: number of kept weights of each entry.

    >>> shard = Shard.of_range("w", (3, 4), 0, 12, 0, lambda: torch.ones(12))
    >>> entry = Item(shard, 0, keep=5)
    >>> list(layout([entry], {"w": 5}).items())
    [('w.values', (torch.float32, (5,))), ('w.mask', (torch.uint8, (2,)))]
    """
    tensors: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for item in items:
        tensors |= codec.parts(item.name, item.dtype, item.shape, kept.get(item.name))
    return codec.wide_first(dict(sorted(tensors.items())))


def accept(text: bytes, area: int, items: Sequence[Item], metadata: Mapping[str, str]) -> Layout:
    """Return the tensors of a file with this header and `area` bytes after it, which must be exactly those of `items`.

    The only values taken from the header are the numbers of kept weights of entries that share a budget.

    Raises:
        ValueError: the header is no JSON, a tensor is missing, unknown, or of another kind or place.
    """
    found = parse_table(text)
    kept = budgets(items)
    for item in items:
        match found.get(f"{item.name}.values"):
            case {"shape": [int(n)]} if (
                item.shared_budget and item.keep is not None and 0 <= n <= item.shard.full_numel
            ):
                kept[item.name] = int(n)
    tensors = layout(items, kept)
    wanted = safetensors.header_table(tensors, metadata)
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"lacks {_some(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"holds {_some(unknown)}, which this model does not have there")
    for name in wanted:
        if found[name] != wanted[name]:
            was, now = (printable(json.dumps(table[name])) for table in (found, wanted))
            raise ValueError(f"{name} is {was} instead of {now}")
    budget = sum(budgets(items).values())
    if sum(kept.values()) != budget:
        raise ValueError(f"its entries keep {sum(kept.values())} weights instead of {budget}")
    if area != (size := sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())):
        raise ValueError(f"its tensors have {size} bytes, and {area} follow the header")
    return tensors


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more
