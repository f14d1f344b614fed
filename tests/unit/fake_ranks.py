"""Ranks as threads: the collectives of a `gap_ds.sharding.comm.Comm`, written without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gap_ds.parallel import Item
from gap_ds.sharding.shard import Shard


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

    def assemble(self, piece: Tensor, places: list[Any], total: int) -> Tensor | None:
        pieces = self.exchange(piece)
        whole = torch.empty(total, dtype=piece.dtype)
        for place, part in zip(places, pieces, strict=True):
            assert place.numel in (0, part.numel())
            if place.numel:
                whole[place.places(0, place.numel)] = part
        return whole if self.rank == 0 else None

    def broadcast_object(self, value: Any) -> Any:
        return self.exchange(value)[0]

    def barrier(self) -> None:
        self.ranks.wait()


def item_of(
    name: str,
    shape: tuple[int, ...],
    partition: int | None,
    start: int,
    numel: int,
    piece: Callable[[], Tensor],
    keep: int | None = None,
    shared_budget: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Item:
    """What is exchanged of a tensor of which this rank has the range [start, start + numel), which is `piece()`."""
    return Item(Shard.of_range(name, shape, start, numel, 0, piece), partition, keep, shared_budget, dtype)


def renamed(item: Item, name: str) -> Item:
    """The same item under another name."""
    return replace(item, shard=replace(item.shard, name=name))
