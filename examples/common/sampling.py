"""Optimizer steps of a fixed number of rows of equal size, the same for any number of ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

PADDING = -1  # row number that only fills a batch

Key = tuple[int, int]  # epoch, row


class Batches:
    """Cuts every epoch's permutation of the rows into optimizer steps of exactly `batch_size` rows.

    The remainder of an epoch is dropped. Steps do not depend on the number of ranks and micro-batches. Micro-batch m of
    a step is number m // world_size of rank m % world_size.
    """

    def __init__(
        self, rows: int, batch_size: int, *, world_size: int = 1, rank: int = 0, accumulation: int = 1, seed: int = 0
    ) -> None:
        parts = world_size * accumulation
        if batch_size % parts:
            raise ValueError(
                f"batch_size={batch_size}: must be a multiple of {parts} ({world_size} ranks x {accumulation} "
                "accumulation steps). Set --batch-size or --accumulation."
            )
        if rows < batch_size:
            raise ValueError(
                f"batch_size={batch_size}: must be at most {rows}, the rows of training. Set --batch-size."
            )
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._parts = [slice(m, None, parts) for m in range(rank, parts, world_size)]
        self.steps_per_epoch = rows // batch_size

    def micro_batches(self, epoch: int, start: int = 0) -> Iterator[list[Key]]:
        """Yield this rank's micro-batches from a step of an epoch on, without end."""
        while True:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._rows)
            for step in range(start, self.steps_per_epoch):
                rows = order[step * self._batch_size : (step + 1) * self._batch_size]
                yield from ([(epoch, int(row)) for row in rows[part]] for part in self._parts)
            epoch, start = epoch + 1, 0


def evaluation_batches(rows: int, batch_size: int, *, world_size: int = 1, rank: int = 0) -> list[list[Key]]:
    """Return this rank's batches: every row is on one rank, and PADDING makes the batches equal in number."""
    own = list(range(rank, rows, world_size))
    most = -(-rows // world_size)
    own += [PADDING] * (most - len(own))
    return [[(0, row) for row in own[i : i + batch_size]] for i in range(0, most, batch_size)]
