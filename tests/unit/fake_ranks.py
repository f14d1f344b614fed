"""Ranks as threads: the collectives of a `gap_ds.sharding.comm.Comm`, written without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Ranks:
    """A group; `run` gives each rank's result, or the error that ended it."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [None] * size
        self.wait = threading.Barrier(size, timeout=20).wait

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def target(rank: int) -> None:
            try:
                results[rank] = work(Rank(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Rank:
    writes = True

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def exchange(self, value: Any) -> list[Any]:
        self.ranks.slots[self.rank] = value
        self.ranks.wait()
        values = list(self.ranks.slots)
        self.ranks.wait()
        return values

    def sum(self, counts: Tensor) -> Tensor:
        return torch.stack(self.exchange(counts)).sum(0)

    def all_gather(self, row: Tensor) -> Tensor:
        return torch.stack(self.exchange(row))

    def assemble(self, piece: Tensor, starts: list[int], numels: list[int], total: int) -> Tensor | None:
        pieces = self.exchange(piece)
        whole = torch.empty(total, dtype=piece.dtype)
        for start, numel, part in zip(starts, numels, pieces, strict=True):
            assert part.numel() == numel
            whole[start : start + numel] = part
        return whole if self.rank == 0 else None

    def broadcast_object(self, value: Any) -> Any:
        return self.exchange(value)[0]

    def barrier(self) -> None:
        self.ranks.wait()
