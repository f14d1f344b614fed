"""Patterns: the legal sets of kept weights. Unstructured, N of every M along the input dimension, whole blocks.

A pattern is plain data with pure functions: `misfit` (why a shape does not fit), `budget` (the final budget for a
wanted one), `nearest` (the legal number of kept weights next to one, on the way to the budget) and `mask` (the mask for
scores of a whole entry and a legal number). Of equal scores the lowest flat index wins. The others are what
`gap_ds.masks.groups` needs to find the same masks over shards.

    2:4, Linear (2, 8)         block:1x4, Linear (2, 8)
    | x . x . | . . x x |      | x x x x | . . . . |
    | . x x . | x . . x |      | . . . . | x x x x |

`dims` are an entry's output and input dimension. A dimension before both holds one matrix each (experts); dimensions
after both are positions of a convolution's kernel: N:M applies at each position, a block covers the whole kernel.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from gap_ds.method.distribution import round_half_up

#: Longest group of an N:M pattern; hardware and literature use up to 16.
MAX_GROUP = 32


@dataclass(frozen=True)
class Unstructured:
    """Any set is legal. `gap_ds.masks.selection` finds the same masks over shards, without a whole entry."""

    def __str__(self) -> str:
        return "unstructured"

    def misfit(self, shape: Sequence[int], dims: tuple[int, int]) -> str | None:
        """Return None: every shape fits."""
        return None

    def budget(self, shape: Sequence[int], keep: int, dims: tuple[int, int]) -> int:
        """Return `keep`: any budget is legal."""
        return keep

    def nearest(self, shape: Sequence[int], keep: int, dims: tuple[int, int]) -> int:
        """Return `keep`: any number is legal."""
        return keep

    def mask(self, scores: Tensor, keep: int, dims: tuple[int, int]) -> Tensor:
        """Return the mask of the `keep` largest scores."""
        return _largest(scores, keep)


@dataclass(frozen=True)
class NofM:
    """N of every M consecutive weights along the input dimension, as sparse tensor cores require (2:4).

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, section 3.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def grades(self) -> int:
        """Steps from all weights to the target: N falls by one in each."""
        return self.m - self.n

    @property
    def sparsity(self) -> float:
        """The only sparsity that the pattern can have.

        >>> NofM(2, 4).sparsity, NofM(2, 3).sparsity
        (0.5, 0.3333333333333333)
        """
        return (self.m - self.n) / self.m

    def misfit(self, shape: Sequence[int], dims: tuple[int, int]) -> str | None:
        """Return why this shape does not fit, or None."""
        size = shape[dims[1]]
        return f"its input dimension is {size}, which is no multiple of {self.m}" if size % self.m else None

    def budget(self, shape: Sequence[int], keep: int, dims: tuple[int, int]) -> int:
        """Return the only legal budget; `keep` is ignored."""
        return math.prod(shape) // self.m * self.n

    def nearest(self, shape: Sequence[int], keep: int, dims: tuple[int, int]) -> int:
        """Return the number next to `keep` that is the same in every group: on the way to the budget N is larger.

        >>> NofM(2, 4).nearest((2, 8), 11, (0, 1))
        12
        """
        groups = math.prod(shape) // self.m
        return round_half_up(Fraction(keep, groups)) * groups

    def keeping(self, shape: Sequence[int], keep: int) -> NofM:
        """Return the pattern with the N that leaves `keep` weights of an entry: of 0 to M."""
        return NofM(keep * self.m // math.prod(shape), self.m)

    def cell(self, shape: Sequence[int], dims: tuple[int, int]) -> tuple[int, ...]:
        """Return the size of a group in each dimension."""
        return tuple(self.m if dim == dims[1] else 1 for dim in range(len(shape)))

    def band(self, shape: Sequence[int], dims: tuple[int, int]) -> int:
        """Return the length of the shortest stretch of a flattened entry that holds whole groups."""
        return self.m * math.prod(shape[dims[1] + 1 :])

    def flags(self, scores: Tensor, shape: Sequence[int], dims: tuple[int, int]) -> Tensor:
        """Return the mask (N,) for the scores (N,) of a stretch of whole bands of an entry: the N largest of a group.

        >>> NofM(2, 4).flags(torch.tensor([3, 1, 3, 3, 0, 0, 0, 0]), (1, 8), (0, 1)).int().tolist()
        [1, 0, 1, 0, 1, 1, 0, 0]
        """
        # The j-th members of all groups in a row: comparisons of contiguous tensors are several times faster.
        members = scores.view(-1, self.m, math.prod(shape[dims[1] + 1 :])).transpose(0, 1).contiguous()
        # Counts the members of the group ahead of each score: greater, or equal and before it.
        ahead = torch.arange(self.m, dtype=torch.uint8, device=scores.device)[:, None, None].expand_as(members).clone()
        for i in range(self.m - 1):
            beaten = (members[i] < members[i + 1 :]).view(torch.uint8)
            ahead[i + 1 :] -= beaten
            for one in beaten:
                ahead[i] += one
        return (ahead < self.n).transpose(0, 1).flatten()

    def mask(self, scores: Tensor, keep: int, dims: tuple[int, int]) -> Tensor:
        """Return the mask for the scores of a whole entry."""
        assert keep == self.nearest(scores.shape, keep, dims)
        return self.keeping(scores.shape, keep).flags(scores.flatten(), scores.shape, dims).view(scores.shape)


@dataclass(frozen=True)
class Block:
    """Whole blocks of `height` outputs x `width` inputs; of a convolution with the whole kernel.

    A block's score is the sum of its weights' scores: of magnitudes, the L1 norm.
    """

    height: int
    width: int

    def __str__(self) -> str:
        return f"block:{self.height}x{self.width}"

    def misfit(self, shape: Sequence[int], dims: tuple[int, int]) -> str | None:
        """Return why this shape cannot be cut into such blocks, or None."""
        rows, columns = (shape[dim] for dim in dims)
        if rows % self.height or columns % self.width:
            return (
                f"its output x input dimensions are {rows} x {columns}, "
                f"which is not a whole number of {self.height} x {self.width} blocks"
            )
        return None

    def budget(self, shape: Sequence[int], keep: int, dims: tuple[int, int]) -> int:
        """Return the budget in whole blocks, rounded half up, at least one block.

        >>> Block(4, 4).budget((8, 12), 40, (0, 1)), Block(4, 4).budget((8, 4, 3, 3), 1, (0, 1))
        (48, 144)
        """
        size = math.prod(self.cell(shape, dims))
        return round_half_up(Fraction(keep, size)) * size

    def nearest(self, shape: Sequence[int], keep: int, dims: tuple[int, int]) -> int:
        """Return the number of weights in whole blocks, rounded half up, at least one block."""
        return self.budget(shape, keep, dims)

    def cell(self, shape: Sequence[int], dims: tuple[int, int]) -> tuple[int, ...]:
        """Return the size of a block in each dimension; of a convolution's kernel the whole."""
        sides = {dims[0]: self.height, dims[1]: self.width}
        return tuple(n if dim > max(dims) else sides.get(dim, 1) for dim, n in enumerate(shape))

    def band(self, shape: Sequence[int], dims: tuple[int, int]) -> int:
        """Return the length of a stretch of a flattened entry that holds whole blocks: a row of them."""
        return self.cell(shape, dims)[min(dims)] * math.prod(shape[min(dims) + 1 :])

    def sums(self, scores: Tensor, shape: Sequence[int], dims: tuple[int, int]) -> Tensor:
        """Return the sums (B,) of the blocks in a stretch of whole bands of an entry, by flat index of the blocks.

        In fp64, or int64 for integers. They are added one by one in a fixed order: a library's sum may round
        differently with other threads or devices.

        >>> Block(1, 2).sums(torch.tensor([9, 0, 5, 5]), (1, 4), (0, 1)).tolist()
        [9, 10]
        """
        cells = self._cells(scores, shape, dims)
        exact = torch.float64 if scores.is_floating_point() else torch.int64
        total = torch.zeros_like(cells[:, 0, :, 0, 0], dtype=exact)
        for i, j, k in itertools.product(*(range(cells.shape[dim]) for dim in (1, 3, 4))):
            total += cells[:, i, :, j, k]
        return total.flatten()

    def spread(self, kept: Tensor, shape: Sequence[int], dims: tuple[int, int]) -> Tensor:
        """Return the mask (N,) of a stretch of whole bands from the flags (B,) of its blocks."""
        cell = self.cell(shape, dims)
        a, b, kernel = cell[min(dims)], cell[max(dims)], math.prod(cell[max(dims) + 1 :])
        grid = kept.view(-1, 1, shape[max(dims)] // b, 1, 1)
        return grid.expand(-1, a, -1, b, kernel).flatten()

    def mask(self, scores: Tensor, keep: int, dims: tuple[int, int]) -> Tensor:
        """Return the mask of the blocks of largest sum; of equal sums the block with the lowest flat index wins.

        >>> Block(1, 2).mask(torch.tensor([[9, 0, 5, 5], [5, 5, 9, 9]]), 4, (0, 1)).int().tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
        """
        assert max(dims) == min(dims) + 1
        size = math.prod(self.cell(scores.shape, dims))
        assert keep % size == 0
        kept = _largest(self.sums(scores.flatten(), scores.shape, dims), keep // size)
        return self.spread(kept, scores.shape, dims).view(scores.shape)

    def _cells(self, scores: Tensor, shape: Sequence[int], dims: tuple[int, int]) -> Tensor:
        """Scores as (bands, a, blocks in a band, b, kernel)."""
        cell = self.cell(shape, dims)
        b, kernel = cell[max(dims)], math.prod(shape[max(dims) + 1 :])
        return scores.view(-1, cell[min(dims)], shape[max(dims)] // b, b, kernel)


Pattern = Unstructured | NofM | Block


def parse(text: str) -> Pattern:
    """Return the pattern of a config's setting.

    >>> parse("unstructured"), parse("2:4"), parse("block:4x8")
    (Unstructured(), NofM(n=2, m=4), Block(height=4, width=8))

    Raises:
        ValueError: the text is no pattern.
    """
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
        n, m = int(match[1]), int(match[2])
        if n < m <= MAX_GROUP:
            return NofM(n, m)
    if match := re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", text):
        height, width = int(match[1]), int(match[2])
        if height * width > 1:
            return Block(height, width)
    raise ValueError(
        f'must be "unstructured", "N:M" with 1 <= N < M <= {MAX_GROUP} such as "2:4", '
        'or "block:HxW" of at least 2 weights such as "block:4x4"'
    )


def _largest(scores: Tensor, keep: int) -> Tensor:
    """Return the mask of the `keep` largest scores; of equal scores the first wins."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:keep]] = True
    return mask.view(scores.shape)
