"""Cuts of a weight over the ranks of a mesh, for property tests."""

from __future__ import annotations

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
