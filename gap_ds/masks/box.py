"""`Box`: which elements of a tensor a rank has. Nothing else in the library knows geometry.

tensor (4, 6), on 4 ranks, cut along both dimensions:    | 0 0 0 1 1 1 |     rank 3 has the box at (2, 3)
                                                         | 0 0 0 1 1 1 |     of size (2, 3)
                                                         | 2 2 2 3 3 3 |
                                                         | 2 2 2 3 3 3 |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements whose indices are computed at a time, at 8 bytes each.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Box:
    """Elements of a tensor: those at `offset` to `offset + size` in each dimension of a view of it.

    The view has as few dimensions as the box allows, so that equal sets of elements are equal boxes, and a contiguous
    range of the flattened tensor is a box in the view (numel,). Build boxes by `span` and `of`.

    >>> Box.of((4, 6), (2, 0), (2, 6)) == Box.span(12, 12, 24)
    True
    >>> Box.of((4, 6), (2, 3), (2, 3)).indices().tolist()
    [15, 16, 17, 21, 22, 23]
    """

    view: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def span(start: int, numel: int, total: int) -> Box:
        """Return the range [start, start + numel) of a tensor with `total` elements."""
        return Box((total,), (start if numel else 0,), (numel,))

    @staticmethod
    def of(shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> Box:
        """Return the box at `offset` of a tensor of this shape.

        Raises:
            ValueError: the box does not lie inside the tensor.
        """
        if any(
            at < 0 or n < 0 or at + n > of for of, at, n in zip(shape, offset, size, strict=True) if math.prod(size)
        ):
            raise ValueError(f"a box of size {tuple(size)} at {tuple(offset)} is not inside a tensor {tuple(shape)}")
        if not math.prod(size):
            return Box.span(0, 0, math.prod(shape))
        dims: list[tuple[int, int, int]] = []
        for of, at, n in zip(shape, offset, size, strict=True):
            if dims and of == n:  # whole in this dimension: one with the dimension before it
                dims[-1] = tuple(of * number for number in dims[-1])  # type: ignore[assignment]
            elif dims and dims[-1][2] == 1:  # one row before it: a part of that row
                before_of, before_at, _ = dims[-1]
                dims[-1] = (before_of * of, before_at * of + at, n)
            else:
                dims.append((of, at, n))
        view, first, sizes = zip(*dims, strict=True) if dims else ((1,), (0,), (1,))
        return Box(tuple(view), tuple(first), tuple(sizes))

    @property
    def numel(self) -> int:
        """Elements of the box."""
        return math.prod(self.size)

    @property
    def total(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.view)

    @property
    def start(self) -> int:
        """The flat index of the first element."""
        return sum(at * stride for at, stride in zip(self.offset, _strides(self.view), strict=True))

    @property
    def end(self) -> int:
        """The flat index after the last element; `start` of an empty box."""
        if not self.numel:
            return self.start
        last = ((at + n - 1) * of for at, n, of in zip(self.offset, self.size, _strides(self.view), strict=True))
        return sum(last) + 1

    @property
    def is_range(self) -> bool:
        """True if the elements are contiguous in the flattened tensor."""
        return len(self.view) == 1

    def before(self, index: int) -> int:
        """Return how many elements have a flat index below this one, which begins a row of the view."""
        return self._rows_before(index) * math.prod(self.size[1:])

    def between(self, start: int, end: int) -> Box:
        """Return the elements with flat indices start to end, as a box of that stretch; both begin a row of the view.

        >>> Box.of((4, 6), (1, 3), (3, 3)).between(0, 12), Box.span(3, 12, 24).between(12, 24)
        (Box(view=(12,), offset=(9,), size=(3,)), Box(view=(12,), offset=(0,), size=(3,)))
        """
        row = math.prod(self.view[1:])
        lo, hi = self._rows_before(start), self._rows_before(end)
        view = ((end - start) // row, *self.view[1:])
        first = self.offset[0] + lo - start // row if hi > lo else 0
        return Box.of(view, (first, *self.offset[1:]), (hi - lo, *self.size[1:]))

    def _rows_before(self, index: int) -> int:
        """Rows of the box in the view's first dimension that lie before a flat index."""
        row, rest = divmod(index, math.prod(self.view[1:]))
        assert not rest, f"flat index {index} lies inside a row of {self}"
        return min(max(row - self.offset[0], 0), self.size[0])

    def sides(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the offset and size of the box in a tensor of this shape; None if it is no box there, but a range.

        >>> Box.span(12, 12, 24).sides((4, 6)), Box.span(3, 12, 24).sides((4, 6))
        (((2, 0), (2, 6)), None)
        >>> Box.of((2, 12), (0, 3), (2, 3)).sides((4, 6))  # a part of two rows in four
        """
        if not self.numel:
            return (0,) * len(shape), (0,) * len(shape)
        offset: list[int] = []
        size: list[int] = []
        dims = list(shape)
        for of, at, n in zip(self.view, self.offset, self.size, strict=True):
            left = of
            while dims and (left > 1 or not offset):
                if left % (own := dims.pop(0)):
                    return None
                left //= own
                first, count = at // left, max(n // left, 1)
                if count > 1 and (at % left or n % left):
                    return None
                if first % own + count > own:
                    return None
                offset.append(first)
                size.append(count)
                at, n = at - first * left, n if count == 1 else left
            if n > 1 or at:
                return None
        return (*offset, *[0] * len(dims)), (*size, *[1] * len(dims))

    def indices(self, lo: int = 0, hi: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Return the flat indices (hi - lo,), ascending, of elements lo to hi of the box, by default of all."""
        hi = self.numel if hi is None else hi
        if self.is_range:
            return torch.arange(self.offset[0] + lo, self.offset[0] + hi, device=device)
        rest, found = torch.arange(lo, hi, device=device), torch.zeros(hi - lo, dtype=torch.int64, device=device)
        for at, n, stride in reversed(list(zip(self.offset, self.size, _strides(self.view), strict=True))):
            found += (rest % n + at) * stride
            rest //= n
        return found

    def places(self, lo: int, hi: int) -> slice | Tensor:
        """Return where elements lo to hi of the box are in the flattened tensor."""
        return slice(self.start + lo, self.start + hi) if self.is_range else self.indices(lo, hi)

    def positions(self, indices: Tensor) -> Tensor:
        """Return for each flat index (N,) its position in the box, and -1 for those outside.

        >>> Box.of((4, 6), (2, 3), (2, 3)).positions(torch.tensor([0, 15, 21, 20])).tolist()
        [-1, 0, 3, -1]
        """
        rest, inside = indices, torch.ones_like(indices, dtype=torch.bool)
        found, step = torch.zeros_like(indices), 1
        for of, at, n in reversed(list(zip(self.view, self.offset, self.size, strict=True))):
            own = rest % of - at
            inside &= (own >= 0) & (own < n)
            found += own * step
            rest, step = rest // of, step * n
        return torch.where(inside, found, -1)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the elements (numel,) of a flattened tensor (total,); of a range a view."""
        if self.is_range:
            return whole[self.start : self.end]
        return self._view(whole).reshape(-1)

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Set the elements of a flattened tensor (total,) to values (numel,)."""
        self._view(whole).copy_(values.view(self.size))

    def _view(self, whole: Tensor) -> Tensor:
        viewed = whole.view(self.view)
        for dim, (at, n) in enumerate(zip(self.offset, self.size, strict=True)):
            viewed = viewed.narrow(dim, at, n)
        return viewed

    def shared(self, other: Box) -> Iterator[tuple[slice | Tensor, slice | Tensor]]:
        """Yield (positions in this box, positions in the other) of the elements that both have, part by part."""
        lo, hi = max(self.start, other.start), min(self.end, other.end)
        if lo >= hi:
            return
        if self.is_range and other.is_range:
            yield slice(lo - self.start, hi - self.start), slice(lo - other.start, hi - other.start)
            return
        fewer, more = (self, other) if self.numel <= other.numel else (other, self)
        for begin in range(0, fewer.numel, _CHUNK):
            end = min(begin + _CHUNK, fewer.numel)
            there = more.positions(fewer.indices(begin, end))
            here = torch.arange(begin, end, device="cpu")[there >= 0]
            there = there[there >= 0]
            if len(here):
                yield (here, there) if fewer is self else (there, here)

    def overlaps(self, other: Box) -> bool:
        """True if both have an element in common."""
        if self.view == other.view:
            sides = zip(self.offset, self.size, other.offset, other.size, strict=True)
            return all(max(a, b) < min(a + n, b + m) for a, n, b, m in sides)
        return next(self.shared(other), None) is not None


def covers(boxes: Sequence[Box], box: Box) -> bool:
    """Return True if boxes have every element of another one, each of them once.

    >>> halves = [Box.of((4, 6), (0, 0), (4, 3)), Box.of((4, 6), (0, 3), (4, 3))]
    >>> covers(halves, Box.span(0, 24, 24)), covers(halves[:1], Box.span(12, 12, 24))
    (True, False)
    """
    near = [one for one in boxes if one.numel and max(one.start, box.start) < min(one.end, box.end)]
    return sum(_length(at) for one in near for at, _ in box.shared(one)) == box.numel and not _any_overlap(near)


def _any_overlap(boxes: Sequence[Box]) -> bool:
    """True if two of the boxes have an element in common."""
    if len({box.view for box in boxes}) > 1:
        return any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    if len(boxes) < 2:
        return False
    lo = torch.tensor([box.offset for box in boxes], device="cpu")  # (boxes, dimensions)
    hi = lo + torch.tensor([box.size for box in boxes], device="cpu")
    both = (torch.maximum(lo[:, None], lo) < torch.minimum(hi[:, None], hi)).all(-1)
    return int(both.sum()) > len(boxes)


def _length(positions: slice | Tensor) -> int:
    return positions.stop - positions.start if isinstance(positions, slice) else len(positions)


def _strides(view: Sequence[int]) -> list[int]:
    """Steps in the flattened tensor from one element to the next, for each dimension."""
    return list(itertools.accumulate(reversed(view[1:]), lambda a, b: a * b, initial=1))[::-1]
