"""The file that a worker publishes: which tensors it holds, where they lie, what is accepted as one. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.method.plan import Plan
from gap_ds.sharding.shard import Shard
from gap_ds.storage import safetensors as tensorfile
from gap_ds.storage.errors import printable
from gap_ds.storage.json import parse_table

FORMAT = "gap_ds.exchange"
VERSION = 2

#: What is exchanged as it is.
DTYPES = (
    *(torch.float64, torch.float32),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True)
class Item:
    """One tensor of the model, and this rank's piece of it: flatten(tensor)[start : start + numel] == piece().

    partition: the worker that it comes from; None for what is shared.
    keep: of an entry, the weights that it keeps; None for everything else. With `shared_budget`, the entries
        of a partition share one budget, and only the sum of their `keep` is binding.
    dtype: as it is exchanged.
    """

    name: str
    shape: tuple[int, ...]
    partition: int | None
    start: int
    numel: int
    piece: Callable[[], Tensor] = field(repr=False, compare=False)
    keep: int | None = None
    shared_budget: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def full_numel(self) -> int:
        """Weights of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Received:
    """This rank's piece of one tensor after the exchange, on the CPU.

    value: (N,), in fp32 or the buffer's own dtype; of an entry, exactly +0.0 where it is pruned.
    bits: of an entry, the mask of the piece as `gap_ds.masks.bitmask` packs it; None for everything else.
    """

    name: str
    value: Tensor
    bits: Tensor | None


@dataclass(frozen=True)
class Slot:
    """A tensor in a file: the bytes [begin, end) after the header.

    part: of an entry "values" or "mask"; empty for what is written whole.
    """

    item: Item
    part: Literal["", "values", "mask"]
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def name(self) -> str:
        """Its name in the file."""
        return f"{self.item.name}.{self.part}" if self.part else self.item.name


# -- items ----------------------------------------------------------------------------------------------------------


def items_of(plan: Plan, shards: Sequence[Shard], buffers: Mapping[str, Tensor]) -> list[Item]:
    """What is exchanged of a model: its trained parameters and its buffers, each with the partition it belongs to.

    Frozen parameters are left out: they are equal on all workers. Ask afresh for each round: a module may put another
    tensor in a buffer's place.

    Args:
        shards: this rank's piece of every parameter, in an order that is the same on all ranks.
        buffers: those that a checkpoint holds, by clean name; whole on every rank.
    Raises:
        ValueError: a buffer has a dtype that cannot be exchanged.
    """
    entries = {entry.name: entry for entry in plan.entries}
    items = []
    for shard in shards:
        if not shard.trainable:
            continue
        entry = entries.get(shard.name)
        where = plan.partition_of(shard.name) if entry is None else entry.partition
        keep = None if entry is None else entry.keep
        items.append(
            Item(shard.name, shard.shape, where, shard.start, shard.numel, shard.weight, keep, plan.shared_budget)
        )
    for name, buffer in buffers.items():
        dtype = torch.float32 if buffer.is_floating_point() and buffer.dtype != torch.float64 else buffer.dtype
        if dtype not in DTYPES:
            raise ValueError(f"{name}: a buffer of {buffer.dtype} cannot be exchanged. Make it non-persistent.")
        piece = partial(torch.Tensor.reshape, buffer.detach(), (-1,))
        items.append(Item(name, tuple(buffer.shape), plan.partition_of(name), 0, buffer.numel(), piece, dtype=dtype))
    return items


def selected(items: Sequence[Item], worker: int, shared: str) -> list[Item]:
    """The items that worker's file holds: its own partition, and the shared tensors that are taken from it.

    Shared integers, and with `unpartitioned="first"` all shared tensors, are taken from worker 0 alone.
    """
    return [
        item
        for item in items
        if item.partition == worker or (item.partition is None and (worker == 0 or is_averaged(item, shared)))
    ]


def is_averaged(item: Item, shared: str) -> bool:
    """Whether a shared item becomes the mean over the workers."""
    return shared == "average" and item.dtype.is_floating_point


def budgets(items: Sequence[Item]) -> dict[str, int]:
    """Weights that each entry is to keep."""
    return {item.name: item.keep for item in items if item.keep is not None}


def check_items(items: Sequence[Item], workers: int) -> None:
    """Checks that a file can hold the items: names are those of the file, so no two may be the same.

    Raises:
        ValueError: it cannot, or an item is in a partition that no worker has.
    """
    seen = {"__metadata__"}
    for slot in layout(items, budgets(items)):
        if slot.name in seen:
            raise ValueError(f"{slot.name}: two tensors of the exchange would have this name")
        seen.add(slot.name)
    for item in items:
        if item.partition is not None and not 0 <= item.partition < workers:
            raise ValueError(f"{item.name}: is in partition {item.partition}, and there are {workers} workers")


def check_kept(items: Sequence[Item], kept: Mapping[str, int]) -> None:
    """Checks that what is to be published is pruned to target: no reader would accept it otherwise.

    Raises:
        ValueError: an entry, or the entries that share a budget together, keep another number of weights.
    """
    for item in items:
        if item.keep is not None and not item.shared_budget and kept[item.name] != item.keep:
            raise ValueError(f"{item.name}: its mask keeps {kept[item.name]} weights instead of {item.keep}")
    budget = sum(budgets(items).values())
    if sum(kept.values()) != budget:
        raise ValueError(f"the entries of the partition keep {sum(kept.values())} weights instead of {budget}")


# -- a safetensors file ---------------------------------------------------------------------------------------------


def layout(items: Sequence[Item], kept: Mapping[str, int]) -> list[Slot]:
    """Where the tensors of a file lie: wide dtypes first, so that all are aligned, and by name.

    Args:
        kept: weights that each entry keeps.

    >>> entry = Item("w", (3, 4), 0, 0, 12, lambda: torch.ones(12), keep=5)
    >>> [(slot.name, slot.begin, slot.end) for slot in layout([entry], {"w": 5})]
    [('w.values', 0, 20), ('w.mask', 20, 22)]
    """
    tensors: list[Slot] = []
    for item in items:
        if item.keep is None:
            tensors.append(Slot(item, "", item.dtype, item.shape))
        else:
            tensors.append(Slot(item, "values", torch.float32, (kept[item.name],)))
            tensors.append(Slot(item, "mask", torch.uint8, (bitmask.nbytes(item.full_numel),)))
    slots: list[Slot] = []
    end = 0
    for slot in sorted(tensors, key=lambda slot: (-slot.dtype.itemsize, slot.name)):
        begin, end = end, end + math.prod(slot.shape) * slot.dtype.itemsize
        slots.append(Slot(slot.item, slot.part, slot.dtype, slot.shape, begin, end))
    return slots


def header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of a file, as JSON has it."""
    return tensorfile.header_table({slot.name: (slot.dtype, slot.shape) for slot in slots}, metadata)


def accept(text: bytes, area: int, items: Sequence[Item], metadata: Mapping[str, str]) -> list[Slot]:
    """The tensors of a file with this header and `area` bytes after it, which must be just the one of these items.

    Nothing in the header is followed: all that is taken from it is, where entries share a budget, what each of them
    keeps.

    Raises:
        ValueError: the header is no JSON, a tensor is missing or unknown, or is described in another way.
    """
    found = parse_table(text)
    kept = budgets(items)
    for item in items:
        match found.get(f"{item.name}.values"):
            case {"shape": [int(n)]} if item.shared_budget and item.keep is not None and 0 <= n <= item.full_numel:
                kept[item.name] = int(n)
    slots = layout(items, kept)
    wanted = header(slots, metadata)
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
    if area != (end := slots[-1].end if slots else 0):
        raise ValueError(f"its tensors have {end} bytes, and {area} follow the header")
    return slots


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more


# -- JSON -----------------------------------------------------------------------------------------------------------


def load_record(text: bytes, types: Mapping[str, type]) -> dict[str, Any]:
    """A JSON table of ours, which has exactly these fields beside its format and version.

    Raises:
        ValueError: it is none.
    """
    table = parse_table(text)
    if table.get("format") != FORMAT:
        raise ValueError(f'has not the format "{FORMAT}"')
    if table.get("version") != VERSION:
        raise ValueError(
            f"has the version {str(table.get('version'))[:20]!a}, and this gap_ds reads version {VERSION}: all workers "
            "need one version of gap_ds"
        )
    types = {"format": str, "version": int, **types}
    wrong = [key for key in types if type(table.get(key)) is not types[key]] + sorted(table.keys() - types.keys())
    if wrong:
        raise ValueError(f"has a wrong, missing or unknown field {printable(wrong[0])}")
    return table
