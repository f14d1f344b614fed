"""Patterns over shards equal those of the whole entry, however it is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fake_meshes import meshes_of
from fake_ranks import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_ds.masks import bitmask, groups, selection
from gap_ds.masks.box import Box
from gap_ds.method.pattern import Block, NofM

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)

#: (pattern, shape, dims): Linear, Conv1D, experts of both orientations, convolutions.
CASES: list[tuple[NofM | Block, tuple[int, ...], tuple[int, int]]] = [
    (NofM(2, 4), (6, 8), (0, 1)),
    (NofM(1, 3), (6, 8), (1, 0)),
    (NofM(2, 4), (3, 4, 8), (1, 2)),
    (NofM(2, 4), (3, 8, 4), (2, 1)),
    (NofM(2, 4), (4, 8, 3), (0, 1)),
    (Block(2, 4), (6, 8), (0, 1)),
    (Block(4, 2), (6, 8), (1, 0)),
    (Block(1, 4), (3, 4, 8), (1, 2)),
    (Block(2, 2), (4, 6, 3), (0, 1)),
]


def on_all(
    pattern: NofM | Block, scores: list[Tensor], dims: tuple[int, int], keep: int, cuts: list[list[Box]]
) -> list[list[Tensor]]:
    """The masks (numel,) of each rank's pieces of all entries."""

    def work(rank: Any) -> list[Tensor]:
        entries = []
        for whole, boxes in zip(scores, cuts, strict=True):
            box = boxes[rank.rank]
            counted = boxes.index(box) == rank.rank
            keys = selection.magnitude_keys(box.cut(whole.flatten()))
            shown = [b if boxes.index(b) == r else Box.span(0, 0, b.total) for r, b in enumerate(boxes)]
            piece = selection.Piece("w", box, keys, 0, counted)
            entries.append(groups.Grouped(piece, tuple(whole.shape), dims, keep, shown, by_magnitude=True))
        bits = groups.select_groups(pattern, entries, rank)
        return [bitmask.unpack(b, e.piece.numel) for b, e in zip(bits, entries, strict=True)]

    results = Ranks(len(cuts[0])).run(work)
    assert not any(isinstance(result, Exception) for result in results), results
    return results


@PROPERTY
@given(st.sampled_from(CASES), st.data())
def test_any_cut_gives_the_mask_of_the_whole(case: Any, data: st.DataObject) -> None:
    """Flat ranges that cut groups, boxes of meshes with replicas; scores of few values, so that blocks tie."""
    pattern, shape, dims = case
    total = math.prod(shape)
    if data.draw(st.booleans()):
        edges = sorted(data.draw(st.lists(st.integers(0, total), min_size=0, max_size=3)))
        boxes = [Box.span(lo, hi - lo, total) for lo, hi in zip([0, *edges], [*edges, total], strict=True)]
    else:
        boxes = data.draw(meshes_of(shape))
    scores = [
        torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 0.1]), min_size=total, max_size=total))).view(
            shape
        )
        for _ in range(2)
    ]
    keep = pattern.budget(shape, data.draw(st.integers(1, total)), dims)
    found = on_all(pattern, scores, dims, keep, [boxes, boxes])
    for e, whole in enumerate(scores):
        expected = pattern.mask(whole, keep, dims).flatten()
        for rank, box in enumerate(boxes):
            assert found[rank][e].tolist() == box.cut(expected).tolist()


def test_a_weight_that_is_nan_stops_all_ranks() -> None:
    boxes = [Box.span(0, 8, 16), Box.span(8, 8, 16)]
    whole = torch.ones(16)
    whole[9] = float("nan")

    def work(rank: Any) -> None:
        box = boxes[rank.rank]
        piece = selection.Piece("w", box, selection.magnitude_keys(box.cut(whole)), 0)
        groups.select_groups(NofM(2, 4), [groups.Grouped(piece, (2, 8), (0, 1), 8, boxes, True)], rank)

    for error in Ranks(2).run(work):
        with pytest.raises(ValueError, match="w: 1 weights are NaN"):
            raise error
