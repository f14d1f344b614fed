"""A group of ranks and the few collectives that the method needs. R ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gap_ds.storage.errors import error_text

T = TypeVar("T")

#: Weights that travel at a time.
_PART = 2**24

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
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, single: bool = False) -> None:
        self._alone = single or not dist.is_initialized()
        self._group = None if self._alone else (group or dist.group.WORLD)
        self.rank = 0 if self._alone else dist.get_rank(self._group)
        self.size = 1 if self._alone else dist.get_world_size(self._group)
        #: Whether global rank 0 is in this group: where groups hold the same pieces, that one writes for all.
        ranks = (
            [0]
            if not dist.is_initialized()
            else [dist.get_rank()]
            if single
            else dist.get_process_group_ranks(self._group)
        )
        self.writes = 0 in ranks
        nccl = not self._alone and "nccl" in str(dist.get_backend(self._group))
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def sum(self, counts: Tensor) -> Tensor:
        """Elementwise sum over the ranks, on the CPU."""
        if self.size == 1:
            return counts
        travelling = counts.to(self._device)
        with _named(f"sum of {counts.numel()} numbers", self.size):
            dist.all_reduce(travelling, group=self._group)
        return travelling.cpu()

    def all_gather(self, row: Tensor) -> Tensor:
        """The equally long rows of all ranks, stacked along a new first dimension (R, ...), on the CPU."""
        if self.size == 1:
            return row[None].cpu()
        travelling = row.to(self._device)
        rows = [torch.empty_like(travelling) for _ in range(self.size)]
        with _named(f"gathering of {row.numel()} numbers", self.size):
            dist.all_gather(rows, travelling, group=self._group)
        return torch.stack(rows).cpu()

    def assemble(self, piece: Tensor, starts: Sequence[int], numels: Sequence[int], total: int) -> Tensor | None:
        """On rank 0 the tensor (total,) that the ranks' pieces make up, on the CPU; None on the other ranks.

        Only ranks that have something of it send, each part to where it belongs: rank 0 holds the whole once, and where
        the group's library cannot send from the CPU a part on its device, however many ranks there are.

        Args:
            piece: this rank's values, `numels[rank]` of them, of one dtype on all ranks that have any and on rank 0.
            starts: where each rank's piece begins; known to every rank.
        """
        if self.size == 1 or numels[0] == total:
            return piece.cpu() if self.rank == 0 else None
        whole = torch.empty(total, dtype=piece.dtype) if self.rank == 0 else None
        with _named(f"gathering of a tensor of {total} weights", self.size):
            for rank, (start, numel) in enumerate(zip(starts, numels, strict=True)):
                if self.rank not in (0, rank):
                    continue
                for lo in range(0, numel, _PART):
                    hi = min(lo + _PART, numel)
                    if whole is None:
                        self._pass(dist.isend, piece[lo:hi].to(self._device), 0)
                    elif rank == 0:
                        whole[start + lo : start + hi] = piece[lo:hi]
                    else:
                        self._receive(whole[start + lo : start + hi], rank)
        return whole

    def _receive(self, part: Tensor, rank: int) -> None:
        """Sets a contiguous part of a tensor on the CPU to what a rank sends."""
        if self._device.type == "cpu":
            self._pass(dist.irecv, part, rank)
            return
        received = torch.empty_like(part, device=self._device)
        self._pass(dist.irecv, received, rank)
        part.copy_(received)

    def _pass(self, way: Callable[..., Any], values: Tensor, rank: int) -> None:
        """Sends to a rank, or receives from it. As a batch, NCCL needs no further connections for that."""
        for work in dist.batch_isend_irecv([dist.P2POp(way, values, group=self._group, group_peer=rank)]):
            work.wait()

    def assemble_everywhere(self, piece: Tensor, start: int, total: int) -> Tensor:
        """On every rank the integers (total,) that the ranks' pieces make up, on the device of the piece.

        Each of them lies in just one piece, so the sum of all pieces, each padded with zeros, is exact; and no rank
        ever holds more than the whole, however unevenly it is cut.

        Args:
            piece: this rank's values; `start`: where they begin.
        """
        if self.size == 1:
            return piece
        whole = torch.zeros(total, dtype=piece.dtype, device=self._device)
        whole[start : start + piece.numel()] = piece
        with _named(f"sum of {total} scores", self.size):
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
            self.sum(torch.zeros(1))


def by_rank(rows: Sequence[Sequence[int]], comm: Comm) -> list[list[list[int]]]:
    """Each number of each row as the list of what the R ranks have there; known to every rank.

    >>> by_rank([(0, 12), (3, 4)], Comm(single=True))
    [[[0], [12]], [[3], [4]]]
    """
    if not rows:
        return []
    table: list[list[list[int]]] = comm.all_gather(torch.tensor(rows, dtype=torch.int64)).permute(1, 2, 0).tolist()
    return table


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
    failed = world.all_gather(torch.tensor([error is not None], dtype=torch.int64)).view(-1)
    if not bool(failed.any()):
        return result
    row = torch.zeros(2048, dtype=torch.uint8)
    text = b"" if error is None else error_text(error).encode(errors="replace")[: row.numel()]
    row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    rows = world.all_gather(row)
    first = bytes(rows[int(failed.nonzero()[0, 0])].tolist()).rstrip(b"\0").decode(errors="replace")
    raise ValueError(first) from error
