"""Checks weights or masks against a pattern, chunk by chunk. M of N:M, blocks of H x W."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gap_ds.method.pattern import Block, NofM, Pattern


class Legality:
    """Counts violations of a pattern in one entry, from chunks along its first dimension.

    An entry whose `dims` are not known is legal if it is legal along any dims that its shape can have.

    Args:
        dims: output and input dimension; None if not known.
        exact: of a mask, which has exactly N of M and whole blocks. Weights have at most that: a kept one may be zero.
        keep: budget of the entry, which bounds the blocks that hold a weight.

    >>> good, bad = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]]), torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0]])
    >>> for weights in good, bad:
    ...     legality = Legality(NofM(2, 4), (1, 8), (0, 1), exact=False, keep=4)
    ...     legality.add(weights.bool())
    ...     print(legality.problem())
    None
    groups of 4 that keep more than 2: 1
    """

    def __init__(
        self, pattern: NofM | Block, shape: Sequence[int], dims: tuple[int, int] | None, exact: bool, keep: int
    ) -> None:
        self._pattern, self._shape, self._exact, self._keep = pattern, tuple(shape), exact, keep
        candidates = [dims] if dims is not None else possible_dims(len(shape))
        self._broken = {d: 0 for d in candidates if pattern.misfit(shape, d) is None}
        self._used = dict.fromkeys(self._broken, 0)

    def add(self, kept: Tensor) -> None:
        """Counts a chunk (n, ...) of bools."""
        for dims in self._broken:
            if isinstance(self._pattern, NofM):
                groups = torch.unflatten(kept, dims[1], (-1, self._pattern.m)).sum(dim=dims[1] + 1, dtype=torch.uint8)
                wrong = groups != self._pattern.n if self._exact else groups > self._pattern.n
                self._broken[dims] += int(wrong.sum())
            else:
                self._add_blocks(kept, self._pattern, dims)

    def _add_blocks(self, kept: Tensor, pattern: Block, dims: tuple[int, int]) -> None:
        first, second = sorted(dims)
        a, b = (pattern.height, pattern.width) if dims[0] < dims[1] else (pattern.width, pattern.height)
        matrices, kernel = math.prod(kept.shape[:first]), math.prod(kept.shape[second + 1 :])
        cells = kept.reshape(matrices, kept.shape[first] // a, a, kept.shape[second] // b, b, kernel)
        used = cells.sum(dim=(2, 4, 5), dtype=torch.int64)
        self._used[dims] += int((used > 0).sum()) * a * b * kernel
        if self._exact:
            self._broken[dims] += int(((used > 0) & (used < a * b * kernel)).sum())

    def problem(self) -> str | None:
        """A sentence on how the pattern is broken; None if it is kept."""
        pattern = self._pattern
        if not self._broken:
            return f"a tensor of {' x '.join(map(str, self._shape))} cannot have the pattern {pattern}"
        if isinstance(pattern, NofM):
            broken = min(self._broken.values())
            how = "do not keep" if self._exact else "keep more than"
            return f"groups of {pattern.m} that {how} {pattern.n}: {broken:,}" if broken else None
        dims = min(self._broken, key=lambda d: (self._broken[d], self._used[d]))
        if self._broken[dims]:
            return f"blocks of {pattern.height}x{pattern.width} that are kept in part: {self._broken[dims]:,}"
        if self._used[dims] > self._keep:
            return f"its blocks with weights have room for {self._used[dims]:,}, the budget is {self._keep:,}"
        return None


def multiple(pattern: Pattern) -> int:
    """Chunks must have a multiple of this many rows, so that no group or block is cut along any dims."""
    if isinstance(pattern, NofM):
        return pattern.m
    return math.lcm(pattern.height, pattern.width) if isinstance(pattern, Block) else 1


def possible_dims(n: int) -> list[tuple[int, int]]:
    """Output and input dimension that a tensor of n dimensions can have: a matrix either way, experts, a convolution.

    >>> possible_dims(2), possible_dims(3), possible_dims(1)
    ([(0, 1), (1, 0)], [(0, 1), (1, 0), (1, 2), (2, 1)], [])
    """
    pairs = [(0, 1), (1, 0)] if n >= 2 else []
    return pairs + ([(1, 2), (2, 1)] if n == 3 else [])
