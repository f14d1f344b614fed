"""Grown weights: their second moments, and the warm-up of their first steps.

A weight that is grown with both moments of Adam at zero takes steps that are several times too large, because its
second moment is far below its gradient's square while the step count is not reset. Two settings change that:
`regrow_moments` gives the second moment another value, and `regrow_warmup` scales the first steps of grown weights: the
t-th of n by t / n.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard

#: Names of the moments that estimate a gradient's square or its size, in the table of `sharding/meanings.py`.
SECOND_MOMENTS = ("exp_avg_sq", "exp_inf", "max_exp_avg_sq", "square_avg", "variance")
#: Bits of a mean's terms, relative to the largest one: sums of integers do not depend on the cut into pieces.
_BITS = 30


def mean_second_moments(
    shards: Iterable[Shard], bits: Mapping[str, Tensor], optimizers: Optimizers, comm: Comm
) -> dict[tuple[str, str], float]:
    """Mean of each second moment over the kept weights of each entry, by (entry, moment). All ranks call this.

    It is exact to 2^-30 of the largest value, and the same for any cut into pieces. An entry without kept weights or
    without state has 0.
    """
    listed = list(shards)
    found = [
        {
            name: moment[bitmask.unpack(bits[shard.name], shard.numel)].double()
            for name, moment, _ in optimizers.moments(shard)
            if name in SECOND_MOMENTS and shard.counted
        }
        for shard in listed
    ]
    table = [[row.get(name, torch.zeros(0, device="cpu")) for name in SECOND_MOMENTS] for row in found]
    largest = [[float(values.max()) if values.numel() else 0.0 for values in row] for row in table]
    own = torch.tensor(largest, dtype=torch.float64, device="cpu")
    # The largest value's exponent: its fraction lies in [1/2, 1).
    exponents = torch.frexp(comm.all_gather(own).amax(0)).exponent.to(torch.int64)
    rows = [
        [
            [int(torch.ldexp(values, torch.tensor(_BITS, device="cpu") - e).to(torch.int64).sum()), values.numel()]
            for values, e in zip(row, of_entry, strict=True)
        ]
        for row, of_entry in zip(table, exponents, strict=True)
    ]
    sums = comm.sum(torch.tensor(rows, dtype=torch.int64, device="cpu"))
    means = {}
    for shard, row, of_entry in zip(listed, sums.tolist(), exponents.tolist(), strict=True):
        for name, (total, count), e in zip(SECOND_MOMENTS, row, of_entry, strict=True):
            means[shard.name, name] = float(Fraction(total, count or 1) * Fraction(2) ** (e - _BITS))
    return means


class Young:
    """The weights of this rank that were grown last, and the steps that they have taken since.

    While an optimizer steps, this takes 4 bytes for each weight of the entries that have some. The host waits for no
    device: to hold young weights alone it would have to know how many there are.

    Args:
        length: steps of the warm-up; 0: there is none.
    """

    def __init__(self, length: int, optimizers: Optimizers) -> None:
        self.length, self._optimizers = length, optimizers
        #: Of each entry that was grown: bits of the grown weights, and the step before which that happened. The same
        #: entries on all ranks, also those whose warm-up is over.
        self.grown: dict[str, tuple[Tensor, int]] = {}
        self._before: dict[str, list[Tensor]] = {}

    def grow(self, name: str, bits: Tensor, step: int) -> None:
        """Notes which weights of an entry were grown before a step; earlier ones are no longer young."""
        if self.length:
            self.grown[name] = (bits, step)

    def before_update(self, shards: Iterable[Shard], step: int) -> None:
        """Remembers the weights of entries with young ones before the update of a step."""
        for shard in shards:
            if shard.name in self.grown and step - self.grown[shard.name][1] + 1 < self.length:
                self._before[shard.name] = [piece.clone() for piece in self._pieces(shard)]

    def after_update(self, shards: Iterable[Shard], step: int) -> None:
        """Scales the step that young weights have just taken."""
        for shard in shards:
            if (before := self._before.pop(shard.name, None)) is not None:
                bits, since = self.grown[shard.name]
                young, scale = bitmask.unpack(bits, shard.numel), (step - since + 1) / self.length
                pieces = self._pieces(shard)
                # A sequence that the optimizer has made in this step, after a reset, began as the weights.
                before += before[:1] * (len(pieces) - len(before))
                for piece, old in zip(pieces, before, strict=True):
                    torch.where(young, (piece - old).mul_(scale).add_(old), piece, out=piece)

    def _pieces(self, shard: Shard) -> list[Tensor]:
        return [shard.weight(), *self._optimizers.sequences(shard)]
