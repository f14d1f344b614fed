"""Masks that another run has written, taken over by a run of the same model.

Its partitions may have cut the experts of a tensor in another way: then an entry here is a part of an entry there, or
made up of several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.checkpoint.masks_file import FORMAT, VERSION, counts_of
from gap_ds.masks import bitmask
from gap_ds.method.names import rows_of
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.comm import Comm, sum_of
from gap_ds.sharding.shard import Shard
from gap_ds.storage.safetensors import CHUNK, open_tensors


def inherited_budgets(path: Path, plan: Plan) -> dict[str, int]:
    """Weights that each entry of a plan keeps by the masks in a file; those without a mask there are left out.

    Of masks of the same entries the header tells; only where entries were cut in another way, bits are counted.

    Raises:
        ValueError: the file cannot be read, is damaged, or has a mask of what is no entry here.
    """
    with open_tensors(path, (FORMAT, VERSION)) as file:
        stored, kept = _stored(path, file, plan), counts_of(path, file.metadata())
        for entry in plan.entries:
            if entry.name not in kept:
                parts = [(len(f), int(f.count_nonzero())) for f in _flags(file, stored, entry, 0, entry.numel)]
                if sum(n for n, _ in parts) == entry.numel:
                    kept[entry.name] = sum(n for _, n in parts)
    return kept


def read_inherited(path: Path, plan: Plan, shards: Mapping[str, Shard], comm: Comm) -> dict[str, Tensor]:
    """This rank's piece of each entry's mask, on the CPU; reads only the bytes that cover the piece.

    Args:
        plan: with the budgets of `inherited_budgets`.
        shards: this rank's piece of every entry.
    Raises:
        ValueError: the file cannot be read, or a mask does not keep as many weights as the plan: it is damaged. On all
            ranks alike.
    """
    found: dict[str, Tensor] = {}
    with open_tensors(path, (FORMAT, VERSION)) as file:
        stored = _stored(path, file, plan)
        for entry in plan.entries:
            box = shards[entry.name].box
            flags = torch.cat(
                [torch.empty(0, dtype=torch.bool, device="cpu"), *_flags(file, stored, entry, box.start, box.end)]
            )
            found[entry.name] = bitmask.pack(flags if box.is_range else flags[box.indices() - box.start])
    own = [bitmask.count(bits) for bits in found.values()]
    for entry, n in zip(plan.entries, sum_of([shards[name] for name in found], own, comm), strict=True):
        if n != entry.keep:
            raise ValueError(
                f"{path}: the mask of {entry.name} keeps {n} weights instead of {entry.keep}: it is damaged"
            )
    return found


@dataclass(frozen=True)
class _Part:
    """A mask of the file: that of the elements `first` to `last` of a flattened parameter."""

    name: str
    first: int
    last: int


def _stored(path: Path, file: Any, plan: Plan) -> dict[str, list[_Part]]:
    """The masks of each parameter in a file, in the order of their rows."""
    shapes = plan.parameters()
    found: dict[str, list[_Part]] = {}
    for name in file.keys():  # noqa: SIM118 - not a dict
        parameter, rows = rows_of(name)
        if parameter not in shapes:
            raise ValueError(
                f"{path}: holds the mask of {name}, which is no entry here: it is frozen or excluded, or the "
                "model does not have it."
            )
        height, row = shapes[parameter][0], math.prod(shapes[parameter][1:])
        lo, hi = rows or (0, height)
        bits = file.get_slice(name)
        if hi > height or bits.get_shape() != [bitmask.nbytes((hi - lo) * row)] or bits.get_dtype() != "U8":
            raise ValueError(f"{path}: the mask of {name} does not have the size of its entry")
        found.setdefault(parameter, []).append(_Part(name, lo * row, hi * row))
    return {parameter: sorted(parts, key=lambda part: part.first) for parameter, parts in found.items()}


def _flags(file: Any, stored: Mapping[str, Sequence[_Part]], entry: Entry, start: int, end: int) -> Iterator[Tensor]:
    """The flags of the elements `start` to `end` of a flattened entry, one after the other; fewer if some have none."""
    rows = rows_of(entry.name)[1]
    base = 0 if rows is None else rows[0] * math.prod(entry.shape[1:])
    at, end = base + start, base + end
    for part in stored.get(entry.parameter, ()):
        bits = file.get_slice(part.name)
        while part.first <= at < min(end, part.last):
            stop = min(at + CHUNK, end, part.last)
            byte = (at - part.first) // 8
            covering = bits[byte : bitmask.nbytes(stop - part.first)]
            yield bitmask.unpack(covering, stop - at, start=at - part.first - 8 * byte)
            at = stop
