"""Cuts of a weight over the ranks of a mesh, for property tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hypothesis import strategies as st

from gap_ds.masks.box import Box


@st.composite
def meshes_of(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """The box of each rank of a mesh that cuts any of a weight's dimensions, or none: replicas."""
    boxes = [(tuple(0 for _ in shape), tuple(shape))]
    for size in draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)):
        dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
        cut = []
        for offset, sizes in boxes:
            for rank in range(size):
                if dim is None:
                    cut.append((offset, sizes))
                    continue
                width = -(-sizes[dim] // size)  # as torch.chunk cuts
                lo, hi = min(rank * width, sizes[dim]), min((rank + 1) * width, sizes[dim])
                cut.append(
                    (
                        tuple(at + lo * (i == dim) for i, at in enumerate(offset)),
                        tuple(hi - lo if i == dim else n for i, n in enumerate(sizes)),
                    )
                )
        boxes = cut
    return [Box.of(shape, offset, size) for offset, size in boxes]


@st.composite
def cuts_of(draw: st.DrawFn, shape: Sequence[int], ranks: int) -> list[Box]:
    """Each rank's box: ranges of the flattened weight, one dimension cut as torch.chunk does, or a box each of two."""
    total, offsets = math.prod(shape), [0] * len(shape)
    if draw(st.booleans()):
        edges = [0, *sorted(draw(st.integers(0, total)) for _ in range(ranks - 1)), total]
        return [Box.span(lo, hi - lo, total) for lo, hi in itertools.pairwise(edges)]
    first = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    dims = [draw(st.integers(0, len(shape) - 1)) for _ in range(2)]
    boxes = [(offsets, list(shape))]
    for dim, parts in zip(dims, (first, ranks // first), strict=True):
        boxes = [
            ([*at[:dim], at[dim] + lo, *at[dim + 1 :]], [*size[:dim], hi - lo, *size[dim + 1 :]])
            for at, size in boxes
            for lo, hi in _chunks(size[dim], parts)
        ]
    return [Box.of(shape, at, size) for at, size in boxes]


def _chunks(size: int, parts: int) -> list[tuple[int, int]]:
    width = -(-size // parts)
    return [(min(i * width, size), min((i + 1) * width, size)) for i in range(parts)]
