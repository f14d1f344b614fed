"""A group of ranks and the few collectives that the method needs. R ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gap_ds.masks.box import Box
from gap_ds.sharding.shard import Shard
from gap_ds.storage.errors import error_text

ProcessGroup = dist.ProcessGroup
T = TypeVar("T")

#: Weights that travel at a time: of a box that is no range, their places take 8 bytes each.
_PART = 2**21

#: What this process is doing that other ranks take part in, from the outside in: for messages.
_OPERATIONS: list[str] = []


@contextmanager
def operation(name: str) -> Iterator[None]:
    """Names what the collectives inside are for, should one of them fail."""
    _OPERATIONS.append(name)
    try:
        yield
    finally:
        _OPERATIONS.pop()


@contextmanager
def _named(collective: str, size: int) -> Iterator[None]:
    """Says which operation a collective was part of that timed out, or that another rank has left."""
    try:
        yield
    except RuntimeError as error:
        place = f" of {_OPERATIONS[0]}" if _OPERATIONS else ""
        raise RuntimeError(
            f"gap_ds: the {collective}{place} among {size} ranks failed: another rank has ended, is stuck, or is in "
            f"another operation; look at the first error of any rank. ({str(error).strip().splitlines()[0][:300]})"
        ) from error


class Comm:
    """The ranks among which the pieces of a parameter are spread; without a process group, one rank.

    Tensors may be on any device: they travel on the one that the group's library can send from.

    Args:
        group: of torch.distributed; None: all ranks of the job. single: this rank alone.
        within: all ranks that train the model; None: this group.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, single: bool = False, within: Comm | None = None
    ) -> None:
        self._alone = single or not dist.is_initialized()
        self._group = None if self._alone else (group or dist.group.WORLD)
        self.rank = 0 if self._alone else dist.get_rank(self._group)
        self.size = 1 if self._alone else dist.get_world_size(self._group)
        own = [dist.get_rank() if dist.is_initialized() else 0]
        #: The ranks of the job that are in this group, in its order.
        self.ranks = tuple(own if self._alone else dist.get_process_group_ranks(self._group))
        #: True if the first rank that trains the model is in this group: where groups hold the same pieces, that one
        #: writes for all.
        self.writes = (within or self).ranks[0] in self.ranks
        self._device = torch.device("cpu")
        if self._group is not None and "nccl" in str(dist.get_backend(self._group)):
            # A group that is bound to a device refuses tensors of the current one, where that is another.
            self._device = self._group.bound_device_id or torch.device("cuda", torch.cuda.current_device())

    def sum(self, counts: Tensor) -> Tensor:
        """Elementwise sum over the ranks, on the CPU."""
        if self.size == 1:
            return counts
        travelling = counts.to(self._device)
        with _named(f"sum of {counts.numel()} numbers", self.size):
            dist.all_reduce(travelling, group=self._group)
        return travelling.cpu()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None where there is none."""
        return self._group

    def all_gather(self, row: Tensor) -> Tensor:
        """The equally long rows of all ranks, stacked along a new first dimension (R, ...), on the CPU."""
        if self.size == 1:
            return row[None].cpu()
        travelling = row.to(self._device)
        rows = [torch.empty_like(travelling) for _ in range(self.size)]
        with _named(f"gathering of {row.numel()} numbers", self.size):
            dist.all_gather(rows, travelling, group=self._group)
        return torch.stack(rows).cpu()

    def assemble(self, piece: Tensor, places: Sequence[Place], total: int) -> Tensor | None:
        """On rank 0 the tensor (total,) that the ranks' pieces make up, on the CPU; None on the other ranks.

        Only ranks that have something of it send, each part to where it belongs: rank 0 holds the whole once, and where
        the group's library cannot send from the CPU a part on its device, however many ranks there are.

        Args:
            piece: this rank's values, of one dtype on all ranks that have any and on rank 0.
            places: where the values of each rank lie in the whole (`boxes_of`); known to every rank.
        """
        if self.size == 1 or places[0].numel == total:
            return piece.cpu() if self.rank == 0 else None
        whole = torch.empty(total, dtype=piece.dtype, device="cpu") if self.rank == 0 else None
        with _named(f"gathering of a tensor of {total} weights", self.size):
            for rank, there in enumerate(places):
                if self.rank not in (0, rank):
                    continue
                for lo in range(0, there.numel, _PART):
                    hi = min(lo + _PART, there.numel)
                    if whole is None:
                        self._pass(dist.isend, piece[lo:hi].to(self._device), 0)
                    else:
                        part = piece[lo:hi].cpu() if rank == 0 else self._receive(hi - lo, piece.dtype, rank)
                        whole[there.places(lo, hi)] = part
        return whole

    def _receive(self, numel: int, dtype: torch.dtype, rank: int) -> Tensor:
        """A vector that a rank sends, on the CPU."""
        received = torch.empty(numel, dtype=dtype, device=self._device)
        self._pass(dist.irecv, received, rank)
        return received.cpu()

    def _pass(self, way: Callable[..., Any], values: Tensor, rank: int) -> None:
        """Sends to a rank, or receives from it. As a batch, NCCL needs no further connections for that."""
        for work in dist.batch_isend_irecv([dist.P2POp(way, values, group=self._group, group_peer=rank)]):
            work.wait()

    def assemble_everywhere(self, piece: Tensor, shard: Shard) -> Tensor:
        """On every rank the integers of a whole parameter that the ranks' pieces make up, on the device of the piece.

        Each of them is counted on just one rank, so the sum of all pieces, each padded with zeros, is exact; and no
        rank ever holds more than the whole, however unevenly it is cut.

        Args:
            piece: this rank's values (shard.numel,).
        """
        if self.size == 1:
            return piece
        whole = torch.zeros(shard.full_numel, dtype=piece.dtype, device=self._device)
        if shard.counted:
            shard.box.put(whole, piece.to(self._device))
        with _named(f"sum of {shard.full_numel} numbers", self.size):
            dist.all_reduce(whole, group=self._group)
        return whole.to(piece.device)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value of a small plain object, on every rank."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        with _named("broadcast of a small object", self.size):
            dist.broadcast_object_list(box, group=self._group, group_src=0, device=self._device)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            self.sum(torch.zeros(1, device="cpu"))


class Place(Protocol):
    """Where the values of one rank lie in a whole tensor: a `Box`, or the like."""

    @property
    def numel(self) -> int: ...
    def places(self, lo: int, hi: int) -> slice | Tensor: ...


#: Most dimensions of a box that travels.
_DIMS = 8


def boxes_of(shards: Sequence[Shard], comm: Comm) -> list[list[Box]]:
    """For each shard the boxes that the R ranks count, known to every rank; empty where a rank counts nothing.

    >>> boxes_of([Shard.of_range("w", (3, 4), 0, 12, 0, torch.Tensor)], Comm(single=True))
    [[Box(view=(12,), offset=(0,), size=(12,))]]
    """
    if not shards:
        return []
    rows = torch.zeros(len(shards), 3, _DIMS, dtype=torch.int64, device="cpu")
    for row, shard in zip(rows, shards, strict=True):
        box = shard.box if shard.counted else Box.span(0, 0, shard.full_numel)
        assert len(box.view) <= _DIMS, f"{shard.name}: cut along more than {_DIMS} dimensions"
        row[:, : len(box.view)] = torch.tensor([box.view, box.offset, box.size], device="cpu")
    by_rank: list[list[list[list[int]]]] = comm.all_gather(rows).transpose(0, 1).tolist()
    return [[_box(row, shard.full_numel) for row in ranks] for shard, ranks in zip(shards, by_rank, strict=True)]


def _box(row: list[list[int]], total: int) -> Box:
    if not total:
        return Box.span(0, 0, 0)
    view, offset, size = row
    dims = len(view) - view.count(0)
    return Box(tuple(view[:dims]), tuple(offset[:dims]), tuple(size[:dims]))


def sum_of(shards: Iterable[Shard], numbers: Sequence[int], comm: Comm) -> list[int]:
    """The sum over the ranks of a number for each shard, such as of its kept weights, without what is not counted."""
    own = [number if shard.counted else 0 for shard, number in zip(shards, numbers, strict=True)]
    sums: list[int] = own if comm.size == 1 else comm.sum(torch.tensor(own, dtype=torch.int64, device="cpu")).tolist()
    return sums


def some_of(ranks: Iterable[int]) -> str:
    """Ranks for a message, the lowest eight at most."""
    shown = sorted(ranks)
    return ", ".join(map(str, shown[:8])) + (" and others" if len(shown) > 8 else "")


class Apart(ValueError):
    """An error of ranks that work for themselves: the others do not come along, so nobody waits for them."""


def raise_on_all_ranks(world: Comm, work: Callable[[], T]) -> T:
    """Returns the result of `work` on this rank; an error on any rank becomes the same ValueError on all.

    `work` must not leave other ranks waiting: it takes part in no collective, or in all of them even when it fails.
    """
    error: Exception | None = None
    try:
        result = work()
    except Apart:
        raise
    except Exception as caught:  # whatever it is, the others must hear of it before they wait for this rank
        error = caught
    failed = world.all_gather(torch.tensor([error is not None], dtype=torch.int64, device="cpu")).view(-1)
    if not bool(failed.any()):
        return result
    row = torch.zeros(2048, dtype=torch.uint8, device="cpu")
    text = b"" if error is None else error_text(error).encode(errors="replace")[: row.numel()]
    row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    rows = world.all_gather(row)
    first = bytes(rows[int(failed.nonzero()[0, 0])].tolist()).rstrip(b"\0").decode(errors="replace")
    raise ValueError(first) from error
