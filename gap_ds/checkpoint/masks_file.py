"""masks.safetensors and pruned.safetensors: bits, and values of pruned weights, in coordinates of the full parameters.

Files do not depend on the backend or on the number of ranks, and no rank ever holds more than one entry whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.comm import Comm, boxes_of, sum_of
from gap_ds.sharding.shard import Shard
from gap_ds.storage.json import parse_json
from gap_ds.storage.safetensors import Layout, Writer, open_tensors

FORMAT = "gap_ds.masks"
FORMAT_VALUES = "gap_ds.pruned"
VERSION = 2


def write_masks(
    path: Path,
    plan: Plan,
    shards: Mapping[str, Shard],
    bits: Mapping[str, Tensor],
    comm: Comm,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes the masks of the sparse entries, from every rank's pieces. All ranks of `comm` must call this.

    Args:
        shards: this rank's piece of every entry.
        bits: packed mask of this rank's piece of every sparse entry; empty where the rank owns nothing.
        about: further metadata of the run, for people.
    """
    kept = _kept(plan, shards, bits, comm)
    metadata = {**(about or {}), "format": FORMAT, "version": str(VERSION), "plan": plan.fingerprint}
    metadata["kept"] = json.dumps(kept)
    layout = {name: (torch.uint8, (bitmask.nbytes(shards[name].full_numel),)) for name in kept}

    def piece(name: str) -> Tensor:
        return bitmask.unpack(bits[name], shards[name].numel).to(torch.uint8)

    _write_pieces(path, metadata, layout, piece, shards, comm, lambda whole: bitmask.pack(whole.bool()))


def read_masks(
    path: Path, plan: Plan, sparse: set[str] | None, shards: Mapping[str, Shard], comm: Comm
) -> dict[str, Tensor]:
    """This rank's piece of each sparse entry's mask, on the CPU; reads only the bytes that cover the piece.

    Args:
        sparse: the entries that must have a mask in the file; None: any.
    Raises:
        ValueError: the file is truncated, of another format, version or plan, its sparse entries are not `sparse`, or
            a mask does not keep as many weights as the header records. On all ranks alike.
    """
    found: dict[str, Tensor] = {}
    with _open(path, FORMAT, plan) as file:
        if sparse is not None:
            _check_names(path, file.keys(), sparse)
        for entry in _entries(plan, set(file.keys())):
            shard, piece = shards[entry.name], file.get_slice(entry.name)
            if piece.get_shape() != [bitmask.nbytes(entry.numel)] or piece.get_dtype() != "U8":
                raise ValueError(f"{path}: the mask of {entry.name} does not have the size of its entry")
            first = shard.box.start // 8
            covering = piece[first : max(first, bitmask.nbytes(shard.box.end))]
            found[entry.name] = bitmask.cut(covering, shard.box, first)
        wanted = counts_of(path, file.metadata())
    for name, n in _kept(plan, shards, found, comm).items():
        if n != wanted.get(name):
            raise ValueError(
                f"{path}: the mask of {name} keeps {n} weights instead of {wanted.get(name)}: it is damaged"
            )
    return found


def kept_weights(path: Path) -> dict[str, int]:
    """Weights that each mask of a file keeps, from its header.

    Raises:
        ValueError: the file cannot be read, or is damaged or of another format or version.
    """
    with _open(path, FORMAT, None) as file:
        return counts_of(path, file.metadata())


def write_values(
    path: Path,
    plan: Plan,
    shards: Mapping[str, Shard],
    names: Container[str],
    values: Callable[[str], Tensor],
    comm: Comm,
    wide: Container[str] = (),
) -> None:
    """Writes a value in fp32 for every weight of the named entries, as `write_masks` writes its bits.

    Args:
        values: from the name of an entry to the values (numel,) of this rank's piece; asked for one at a time.
        wide: names of the entries of which this rank has a piece in fp64; they are written in fp64.
    """
    metadata = {"format": FORMAT_VALUES, "version": str(VERSION), "plan": plan.fingerprint}
    own = {entry.name: shards[entry.name] for entry in _entries(plan, names)}
    # A rank without a piece does not know the dtype of the others, and may be the one that writes.
    rows = comm.all_gather(torch.tensor([int(name in wide) for name in own], dtype=torch.int64, device="cpu"))
    dtypes = [torch.float64 if is_wide else torch.float32 for is_wide in rows.amax(0).tolist()]
    layout = {name: (dtype, (own[name].full_numel,)) for name, dtype in zip(own, dtypes, strict=True)}

    def piece(name: str) -> Tensor:
        return values(name).to(layout[name][0])

    _write_pieces(path, metadata, layout, piece, shards, comm, lambda whole: whole)


def read_values(path: Path, plan: Plan, sparse: set[str], shards: Mapping[str, Shard]) -> Iterator[tuple[str, Tensor]]:
    """Name and this rank's piece, on the CPU, of each entry's values in a file of `write_values`; one at a time.

    Raises:
        ValueError: the file is truncated, of another format, version or plan, or its entries are not `sparse`.
    """
    with _open(path, FORMAT_VALUES, plan) as file:
        _check_names(path, file.keys(), sparse)
        for entry in _entries(plan, sparse):
            shard, piece = shards[entry.name], file.get_slice(entry.name)
            if piece.get_shape() != [entry.numel] or piece.get_dtype() not in ("F32", "F64"):
                raise ValueError(f"{path}: the values of {entry.name} do not have the size of their entry")
            lo, hi = shard.box.start, shard.box.end
            covering = piece[lo:hi]
            yield entry.name, covering if shard.box.is_range else covering[shard.box.indices() - lo]


def _entries(plan: Plan, names: Container[str]) -> list[Entry]:
    return [entry for entry in plan.entries if entry.name in names]


def _kept(plan: Plan, shards: Mapping[str, Shard], bits: Mapping[str, Tensor], comm: Comm) -> dict[str, int]:
    """Weights that each sparse entry keeps, over all ranks."""
    names = [entry.name for entry in _entries(plan, bits)]
    own = [bitmask.count(bits[name]) for name in names]
    return dict(zip(names, sum_of([shards[name] for name in names], own, comm), strict=True))


def _check_names(path: Path, found: Iterable[str], sparse: set[str]) -> None:
    if names := sparse.symmetric_difference(found):
        raise ValueError(f"{path}: holds an entry that is dense by the schedule, or lacks one: {min(names)}")


def counts_of(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """Weights that each mask of a file keeps, from its metadata; ValueError: the metadata is damaged."""
    try:
        return parse_json(metadata["kept"], dict[str, int])
    except (KeyError, ValueError):
        raise ValueError(
            f"{path}: its header does not record how many weights each mask keeps: it is damaged"
        ) from None


@contextmanager
def _open(path: Path, kind: str, plan: Plan | None) -> Iterator[Any]:
    """A safetensors file of this kind, of this plan if one is given; damage anywhere in it becomes a ValueError."""
    with open_tensors(path, (kind, VERSION)) as file:
        written = file.metadata().get("plan")
        if plan is not None and written != plan.fingerprint:
            raise ValueError(
                f"{path}: was written for another plan ({written}, now {plan.fingerprint}): the model, the sparsity, "
                "the distribution, the pattern or the partitions differ. Restore them, or start in a new folder."
            )
        yield file


def _write_pieces(
    path: Path,
    metadata: dict[str, str],
    layout: Layout,
    piece: Callable[[str], Tensor],
    shards: Mapping[str, Shard],
    comm: Comm,
    encode: Callable[[Tensor], Tensor],
) -> None:
    """Writes a vector for each name, put together from every rank's piece, as a safetensors file.

    No rank holds more than one of them whole. All ranks of `comm` must call this; its first one writes, and raises an
    error of the disk at the end.

    Args:
        layout: of the encoded vectors.
        piece: from a name to this rank's values.
        encode: from the whole vector to the one that is written.
    """
    boxes = boxes_of([shards[name] for name in layout], comm)
    with Writer(path, layout, metadata) if comm.rank == 0 else nullcontext() as writer:
        for name, places in zip(layout, boxes, strict=True):
            whole = comm.assemble(piece(name), places, shards[name].full_numel)
            if writer is not None and whole is not None:
                writer.write(name, encode(whole))
