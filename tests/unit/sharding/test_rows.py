"""A piece of some rows of a parameter, from any cut of it, holds what the same rows of the whole tensor hold there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from fake_meshes import cuts_of, meshes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_ds.masks.box import Box, covers
from gap_ds.method.names import with_rows
from gap_ds.sharding.shard import Shard, of_entries


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_rows_of_every_rank_are_the_rows_of_the_whole(data: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    boxes: list[Box] = data.draw(st.one_of(cuts_of(shape, data.draw(st.integers(1, 4))), meshes_of(shape)))
    edges = sorted({0, shape[0], *data.draw(st.lists(st.integers(0, shape[0]), max_size=3))})
    whole, room = torch.arange(1.0, 1 + math.prod(shape)), data.draw(st.integers(0, 3))
    entries = {with_rows("w", lo, hi): whole.view(shape)[lo:hi] for lo, hi in itertools.pairwise(edges)}
    found: dict[str, list[Box]] = {name: [] for name in entries}
    for box in boxes:
        own = box.cut(whole).clone()
        owner = torch.cat([torch.zeros(room), own, torch.zeros(2)])
        shard = Shard("w", shape, box, room, lambda owner=owner: owner, copies=lambda own=own: (2 * own,))
        pieces = of_entries(entries, [shard])
        assert sum(piece.numel for piece in pieces.values()) == box.numel
        for name, rows in entries.items():
            piece, wanted = pieces[name], pieces[name].box.cut(rows.flatten())
            assert piece.shape == rows.shape and torch.equal(shard.part(name, own), wanted)
            assert torch.equal(piece.weight(), wanted)
            assert all(torch.equal(copy, 2 * wanted) for copy in piece.copies())
            # Equal sets of elements are equal boxes, however they came about.
            sides = piece.box.sides(piece.shape)
            assert sides is None or piece.box == Box.of(piece.shape, *sides)
            found[name].append(piece.box)
    for name, rows in entries.items():
        distinct = list(dict.fromkeys(box for box in found[name] if box.numel))
        assert covers(distinct, Box.span(0, rows.numel(), rows.numel()))
