"""Exact selection over shards, against a stable sort of the full tensors. Ranks are threads that run the same code."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fake_meshes import meshes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


class Group:
    """Ranks that are threads: each collective waits for all of them. Records the size of all messages."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=300)
        self.slots: list[Any] = [None] * size
        self.sizes: list[int] = []

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


@dataclass
class Rank:
    group: Group
    rank: int

    def sum(self, counts: Tensor) -> Tensor:
        assert counts.dtype == torch.int64
        self.group.sizes.append(counts.numel())
        return torch.stack(self.group.exchange(self.rank, counts)).sum(0)


def on_ranks(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """The results or exceptions of `work` on each of `size` ranks."""
    group, results = Group(size), list[Any]([None] * size)

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(group, rank))
        except Exception as error:
            results[rank] = error
            if isinstance(error, ValueError):
                return  # all ranks must raise it; the barrier times out for one that does not
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


#: (start, numel) of each rank's piece, for each entry
Cuts = list[list[tuple[int, int]]]


def select(
    weights: Sequence[Tensor], cuts: Cuts, budgets: Sequence[int], keep: Sequence[int], rank: Rank
) -> list[Tensor]:
    """The masks (numel,) of this rank's pieces, as bools."""
    pieces = []
    for e, weight in enumerate(weights):
        start, numel = cuts[e][rank.rank]
        keys = selection.magnitude_keys(weight[start : start + numel])
        pieces.append(selection.Piece(f"entry{e}", Box.span(start, numel, len(weight)), keys, budgets[e]))
    bits = selection.select_largest(pieces, keep, rank)
    assert [b.numel() for b in bits] == [bitmask.nbytes(piece.numel) for piece in pieces]
    return [bitmask.unpack(b, piece.numel) for b, piece in zip(bits, pieces, strict=True)]


def assembled(results: Sequence[Any], weights: Sequence[Tensor], cuts: Cuts) -> list[list[bool]]:
    """The full mask of each entry, from all ranks' pieces."""
    full = [[False] * len(weight) for weight in weights]
    for rank, result in enumerate(results):
        assert not isinstance(result, Exception), result
        for e, kept in enumerate(result):
            start, numel = cuts[e][rank]
            full[e][start : start + numel] = kept.tolist()
    return full


def reference(weights: Sequence[Tensor], budgets: Sequence[int], keep: Sequence[int]) -> list[list[bool]]:
    """A stable sort of everything that shares a budget, largest magnitude first: entry order, then flat index."""
    full = [[False] * len(weight) for weight in weights]
    for g, k in enumerate(keep):
        pool = [(e, i, abs(x)) for e, w in enumerate(weights) if budgets[e] == g for i, x in enumerate(w.tolist())]
        for e, i, _ in sorted(pool, key=lambda item: -item[2])[:k]:
            full[e][i] = True
    return full


def whole(weights: Sequence[Tensor]) -> Cuts:
    return [[(0, len(weight))] for weight in weights]


# Half-precision values are exact in fp32 and bf16 keeps few of them apart: ties, zeros of both signs, infinities and
# numbers below the normal range all come up.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, 2.0**-24, -(2.0**-24), 2.0**-140]),
    st.floats(width=16, allow_nan=False),
)


#: By chunk: whether candidates for the threshold are held on to always, sometimes, or (in pieces this small) never.
FEW = {8: 1, 16: 4, 1 << 20: 1 << 20}


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], Cuts, list[int], list[int], int]:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    lists = draw(st.lists(st.lists(values, min_size=1, max_size=15), min_size=1, max_size=5))
    # Repeated, so that ties lie on both sides of the borders of ranks and chunks.
    weights = [torch.tensor(entry * draw(st.integers(1, 4)), dtype=torch.float64).to(dtype) for entry in lists]
    groups = draw(st.integers(1, len(weights)))
    budgets = [e if e < groups else draw(st.integers(0, groups - 1)) for e in range(len(weights))]
    sizes = [sum(len(w) for w, b in zip(weights, budgets, strict=True) if b == g) for g in range(groups)]
    keep = [draw(st.integers(0, size)) for size in sizes]
    ranks = draw(st.integers(1, 3))
    cuts: Cuts = []
    for weight in weights:
        edges = [0, *sorted(draw(st.integers(0, len(weight))) for _ in range(ranks - 1)), len(weight)]
        pieces = [(lo, hi - lo) for lo, hi in itertools.pairwise(edges)]
        if draw(st.booleans()):
            pieces = [(start if numel else 0, numel) for start, numel in pieces]
        cuts.append(draw(st.permutations(pieces)))  # pieces need not be in the order of ranks
    return weights, cuts, budgets, keep, draw(st.sampled_from([8, 16, 1 << 20]))


@PROPERTY
@given(problems(), st.booleans())
def test_equals_a_stable_sort_for_any_sharding(
    problem: tuple[list[Tensor], Cuts, list[int], list[int], int], compiled: bool
) -> None:
    weights, cuts, budgets, keep, chunk = problem
    expected = reference(weights, budgets, keep)
    for g, k in enumerate(keep):
        assert sum(sum(mask) for mask, b in zip(expected, budgets, strict=True) if b == g) == k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", chunk)
        patch.setattr(selection, "_FEW", FEW[chunk])
        patch.setattr(bitmask, "COMPILED", 0 if compiled else 1 << 40)
        results = on_ranks(len(cuts[0]), lambda rank: select(weights, cuts, budgets, keep, rank))
        assert assembled(results, weights, cuts) == expected
    alone = on_ranks(1, lambda rank: select(weights, whole(weights), budgets, keep, rank))
    assert assembled(alone, weights, whole(weights)) == expected


@settings(PROPERTY, max_examples=60)
@given(problems(), st.data())
def test_nan_is_refused_on_all_ranks_by_name(problem: Any, data: st.DataObject) -> None:
    weights, cuts, budgets, keep, _ = problem
    e = data.draw(st.integers(0, len(weights) - 1))
    places = data.draw(st.sets(st.integers(0, len(weights[e]) - 1), min_size=1))
    weights[e][list(places)] = math.nan
    for result in on_ranks(len(cuts[0]), lambda rank: select(weights, cuts, budgets, keep, rank)):
        assert isinstance(result, ValueError), result
        assert str(result).startswith(f"entry{e}: {len(places)} weights are NaN")


def test_a_budget_above_its_weights_is_refused_on_all_ranks() -> None:
    weights = [torch.ones(5), torch.ones(4)]
    cuts = [[(0, 5), (5, 0)], [(0, 2), (2, 2)]]
    for result in on_ranks(2, lambda rank: select(weights, cuts, [0, 1], [5, 5], rank)):
        assert isinstance(result, ValueError), result
        assert "keep=5 exceeds its 4 weights" in str(result)


def test_ties_go_to_the_first_entry_then_the_first_index() -> None:
    weights = [torch.tensor([1.0, -2.0, 1.0]), torch.tensor([2.0, 1.0, -1.0])]
    cuts = [[(0, 1), (1, 2)], [(0, 2), (2, 1)]]
    results = on_ranks(2, lambda rank: select(weights, cuts, [0, 0], [4], rank))
    assert assembled(results, weights, cuts) == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("keep", [0, 1, 5, 8, 9, 17, 24, 25, 39, 40])
def test_ties_on_both_sides_of_a_chunk(monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 8)
    cuts = [[(0, 19), (19, 21)]]
    results = on_ranks(2, lambda rank: select([torch.zeros(40)], cuts, [0], [keep], rank))
    assert assembled(results, [torch.zeros(40)], cuts) == [[i < keep for i in range(40)]]


def test_more_entries_than_bins() -> None:
    """Invalid keys of more entries than bins need more than one row of counts."""
    n = selection.PASSES[31][0][1] + 10
    weights = [torch.tensor([float(e % 7), float(e % 5)]) for e in range(n)]
    keep = [n // 2]
    got = on_ranks(1, lambda rank: select(weights, whole(weights), [0] * n, keep, rank))
    assert assembled(got, weights, whole(weights)) == reference(weights, [0] * n, keep)
    weights[n - 3][1] = math.nan
    (result,) = on_ranks(1, lambda rank: select(weights, whole(weights), [0] * n, keep, rank))
    assert str(result).startswith(f"entry{n - 3}: 1 weights are NaN")


def test_messages_do_not_grow_with_the_weights() -> None:
    """Messages hold counts per budget and entry, whatever the number of weights."""
    weights = [torch.zeros(40_000), torch.randn(40_000, generator=torch.Generator().manual_seed(0))]
    cuts = [[(0, 20_000), (20_000, 20_000)]] * 2
    travelled = []

    def work(rank: Rank) -> list[Tensor]:
        result = select(weights, cuts, [0, 1], [7, 9], rank)
        if rank.rank == 0:
            travelled.extend(rank.group.sizes)
        return result

    on_ranks(2, work)
    assert max(travelled) <= (2 + 1) * 2048
    # Per rank: three histograms, the ties of each entry, and the index of the last tie by its bits, 10 at a time.
    assert len(travelled) <= 2 * (3 + 1 + 2)


def test_single_is_a_group_of_one() -> None:
    weight = torch.tensor([3.0, -1.0, 2.0, 0.0])
    piece = selection.Piece("w", Box.span(0, 4, 4), selection.magnitude_keys(weight), 0)
    (bits,) = selection.select_largest([piece], [2], selection.Single())
    assert bitmask.unpack(bits, 4).tolist() == [True, False, True, False]


# -- several entries, one budget -----------------------------------------------------------------------------------


@PROPERTY
@given(
    st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), min_size=1, max_size=30), min_size=2, max_size=6),
    st.integers(1, 3),
    st.data(),
)
def test_pooled_budgets_with_many_ties(lists: list[list[float]], ranks: int, data: st.DataObject) -> None:
    """One threshold over all entries of a budget; a third of all weights are ties, on both sides of every border."""
    weights = [torch.tensor(entry) for entry in lists]
    budgets = [data.draw(st.integers(0, 1)) for _ in weights]
    sizes = [sum(len(w) for w, b in zip(weights, budgets, strict=True) if b == g) for g in range(2)]
    keep = [data.draw(st.integers(0, size)) for size in sizes]
    cuts: Cuts = []
    for weight in weights:
        edges = [0, *sorted(data.draw(st.integers(0, len(weight))) for _ in range(ranks - 1)), len(weight)]
        cuts.append([(lo, hi - lo) for lo, hi in itertools.pairwise(edges)])
    results = on_ranks(ranks, lambda rank: select(weights, cuts, budgets, keep, rank))
    found = assembled(results, weights, cuts)
    assert found == reference(weights, budgets, keep)
    for g in range(2):
        assert sum(sum(mask) for mask, b in zip(found, budgets, strict=True) if b == g) == keep[g]


def test_a_pooled_budget_may_leave_an_entry_without_weights() -> None:
    weights = [torch.tensor([5.0, 4.0, 3.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.5])]
    cuts = [[(0, 2), (2, 1)], [(0, 0), (0, 2)], [(0, 1), (1, 0)]]
    results = on_ranks(2, lambda rank: select(weights, cuts, [0, 0, 1], [3, 1], rank))
    assert assembled(results, weights, cuts) == [[True, True, True], [False, False], [True]]


# -- ties ----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.data())
def test_any_mesh_selects_what_one_rank_selects(data: st.DataObject) -> None:
    """Weights in few values, so that ties lie on all ranks; two weights of one budget, cut in different ways."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    boxes = data.draw(meshes_of(shape))
    other_cuts = data.draw(st.permutations(boxes))
    weights = [
        torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=n, max_size=n)))
        for n in (math.prod(shape), math.prod(shape))
    ]
    keep = data.draw(st.integers(0, 2 * math.prod(shape)))

    def work(rank: Rank) -> list[Tensor]:
        pieces = []
        for e, (weight, cuts) in enumerate(zip(weights, (boxes, other_cuts), strict=True)):
            box = cuts[rank.rank]
            keys = selection.magnitude_keys(box.cut(weight))
            counted = cuts.index(box) == rank.rank
            pieces.append(selection.Piece(f"entry{e}", box, keys, 0, counted))
        return selection.select_largest(pieces, [keep], rank)

    expected = reference(weights, [0, 0], [keep])
    for rank, bits in enumerate(on_ranks(len(boxes), work)):
        assert not isinstance(bits, Exception), bits
        for mask, cuts, full in zip(bits, (boxes, other_cuts), expected, strict=True):
            box = cuts[rank]
            assert bitmask.unpack(mask, box.numel).tolist() == box.cut(torch.tensor(full)).tolist()


@pytest.mark.parametrize("start", [0, 1, 1023, 1024, 2**20 - 3, 2**40 - 64])
@pytest.mark.parametrize("keep", [1, 5, 63])
def test_ties_of_long_weights_end_at_the_right_index(start: int, keep: int) -> None:
    """All 64 weights, far into a weight of 2^40, are tied, on two ranks in alternating order."""
    sent: list[int] = []

    def work(rank: Rank) -> list[bool]:
        box = Box.span(start + 32 * (1 - rank.rank), 32, 2**40)
        piece = selection.Piece("w", box, selection.magnitude_keys(torch.ones(32)), 0)
        (bits,) = selection.select_largest([piece], [keep], rank)
        if rank.rank == 0:
            sent.extend(rank.group.sizes)
        return bitmask.unpack(bits, 32).tolist()

    second, first = on_ranks(2, work)
    assert first + second == [i < keep for i in range(64)]
    assert len(sent) <= 2 * (3 + 1 + 4) and max(sent) <= 2 * 2048


# -- only among some -----------------------------------------------------------------------------------------------


def select_only(
    weights: Sequence[Tensor],
    among: Sequence[Tensor],
    cuts: Cuts,
    budgets: Sequence[int],
    keep: Sequence[int],
    rank: Rank,
) -> list[Tensor]:
    """The masks (numel,) of this rank's pieces, chosen among the weights of the bool tensors `among`."""
    pieces = []
    for e, weight in enumerate(weights):
        start, numel = cuts[e][rank.rank]
        part = slice(start, start + numel)
        keys = selection.only(selection.magnitude_keys(weight[part]), bitmask.pack(among[e][part]))
        pieces.append(selection.Piece(f"entry{e}", Box.span(start, numel, len(weight)), keys, budgets[e]))
    bits = selection.select_largest(pieces, keep, rank)
    return [bitmask.unpack(b, piece.numel) for b, piece in zip(bits, pieces, strict=True)]


def reference_only(
    weights: Sequence[Tensor], among: Sequence[Tensor], budgets: Sequence[int], keep: Sequence[int]
) -> list[list[bool]]:
    """A stable sort of all weights inside, largest magnitude first, followed by all outside, in order."""
    full = [[False] * len(weight) for weight in weights]
    for g, k in enumerate(keep):
        pool = [
            (not chosen, -abs(x) if chosen else 0.0, e, i)
            for e, (w, a) in enumerate(zip(weights, among, strict=True))
            if budgets[e] == g
            for i, (x, chosen) in enumerate(zip(w.tolist(), a.tolist(), strict=True))
        ]
        for _, _, e, i in sorted(pool)[:k]:
            full[e][i] = True
    return full


@PROPERTY
@given(problems(), st.data())
def test_only_some_equals_a_sort_of_them(
    problem: tuple[list[Tensor], Cuts, list[int], list[int], int], data: st.DataObject
) -> None:
    """Any sharding, shared budgets, ties, infinities; weights outside may even be NaN."""
    weights, cuts, budgets, keep, chunk = problem
    among = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(w), max_size=len(w)))) for w in weights]
    inside = [sum(int(a.sum()) for a, b in zip(among, budgets, strict=True) if b == g) for g in range(len(keep))]
    if data.draw(st.booleans()):
        keep = [min(k, n) for k, n in zip(keep, inside, strict=True)]
    for weight, chosen in zip(weights, among, strict=True):
        for i in range(len(weight)):
            if not chosen[i] and data.draw(st.integers(0, 3)) == 0:
                weight[i] = math.nan
    expected = reference_only(weights, among, budgets, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", chunk)
        patch.setattr(selection, "_FEW", FEW[chunk])
        results = on_ranks(len(cuts[0]), lambda rank: select_only(weights, among, cuts, budgets, keep, rank))
    assert assembled(results, weights, cuts) == expected
    for g, n in enumerate(inside):
        if keep[g] <= n:  # enough are inside: none from outside
            of_g = [(m, a.tolist()) for m, a, b in zip(expected, among, budgets, strict=True) if b == g]
            assert all(chosen or not kept for m, a in of_g for kept, chosen in zip(m, a, strict=True))


@settings(PROPERTY, max_examples=60)
@given(problems(), st.data())
def test_nan_among_the_chosen_is_refused_on_all_ranks_by_name(problem: Any, data: st.DataObject) -> None:
    weights, cuts, budgets, keep, _ = problem
    e = data.draw(st.integers(0, len(weights) - 1))
    places = data.draw(st.sets(st.integers(0, len(weights[e]) - 1), min_size=1))
    weights[e][list(places)] = math.nan
    among = [torch.ones(len(weight), dtype=torch.bool) for weight in weights]
    outside = data.draw(st.sets(st.sampled_from(sorted(places)), max_size=len(places) - 1))
    among[e][list(outside)] = False
    for result in on_ranks(len(cuts[0]), lambda rank: select_only(weights, among, cuts, budgets, keep, rank)):
        assert isinstance(result, ValueError), result
        assert str(result).startswith(f"entry{e}: {len(places) - len(outside)} weights are NaN")


def test_only_puts_zero_inside_above_infinity_outside() -> None:
    weights = [torch.tensor([math.inf, 0.0, -math.inf, math.nan, 0.0, 1.0])]
    among = [torch.tensor([False, True, True, False, True, False])]
    found = {
        keep: assembled(
            on_ranks(1, lambda rank, keep=keep: select_only(weights, among, whole(weights), [0], [keep], rank)),  # type: ignore[misc]
            weights,
            whole(weights),
        )[0]
        for keep in range(7)
    }
    order = [2, 1, 4, 0, 3, 5]  # infinity, the two zeros inside by index, then the outside by index
    assert found == {keep: [i in order[:keep] for i in range(6)] for keep in range(7)}


def test_only_keeps_the_order_of_random_keys() -> None:
    """The largest random key and the one below may become one; there are but 2^31 of them."""
    n = 4096
    among = torch.arange(n) % 3 == 0
    keys = selection.random_keys(5, "w", Box.span(0, n, n), CPU)
    piece = selection.Piece("w", Box.span(0, n, n), selection.only(keys, bitmask.pack(among)), 0)
    (bits,) = selection.select_largest([piece], [100], selection.Single())
    order = sorted((i for i in range(n) if i % 3 == 0), key=lambda i: -hashed(5, "w", i))
    assert bitmask.unpack(bits, n).nonzero()[:, 0].tolist() == sorted(order[:100])


def test_only_leaves_room_above_the_largest_key() -> None:
    numbers = torch.tensor([2**31 - 1, 2**31 - 2, 0, -1, -1], dtype=torch.int32)
    among = torch.tensor([True, True, True, True, False])
    found = selection.only(lambda lo, hi: numbers[lo:hi], bitmask.pack(among))(0, 5)
    assert found.dtype == torch.int32
    assert found.tolist() == [2**31 - 1, 2**31 - 1, 1, selection.INVALID, 0]


# -- keys ----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_magnitude_keys_have_the_order_of_the_magnitudes(numbers: list[float]) -> None:
    keys = selection.magnitude_keys(torch.tensor(numbers, dtype=torch.float32))(0, len(numbers)).tolist()
    assert min(keys) >= 0
    for a, x in zip(keys, numbers, strict=True):
        for b, y in zip(keys, numbers, strict=True):
            assert (a < b) == (abs(x) < abs(y)) and (a == b) == (abs(x) == abs(y))


def test_magnitude_keys_leave_the_weights_alone() -> None:
    weight = torch.tensor([-1.0, math.nan, -0.0])
    before = weight.view(torch.int32).clone()
    assert selection.magnitude_keys(weight)(0, 3)[1] == selection.INVALID
    assert torch.equal(weight.view(torch.int32), before)


def hashed(seed: int, name: str, index: int) -> int:
    """The documented hash of one index, in Python's exact integers."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    a, b = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    low, high = index % 2**32, index // 2**32
    x = low ^ a ^ (high * 0x9E3779B1 % 2**32)
    for constant in (0x85EBCA6B, 0xC2B2AE35, b | 1):
        x = (x ^ (x >> 16)) * constant % 2**32
    return (x ^ (x >> 15)) >> 1


CPU = torch.device("cpu")


@pytest.mark.parametrize("start", [0, 1, 12_345, 2**31 - 3, 2**32 - 3, 5 * 2**32 + 17])
def test_random_keys_are_the_documented_hash(start: int) -> None:
    keys = selection.random_keys(3, "a.weight", Box.span(start, 1 << 17, 2**40), CPU)(0, 8)
    assert keys.dtype == torch.int32
    assert keys.tolist() == [hashed(3, "a.weight", start + i) for i in range(8)]


@settings(PROPERTY, max_examples=100)
@given(st.integers(0, 2**33), st.integers(0, 50), st.integers(1, 50), st.integers(0, 20))
def test_random_keys_do_not_depend_on_the_sharding(start: int, lo: int, numel: int, shift: int) -> None:
    one = selection.random_keys(0, "w", Box.span(start, 1 << 17, 2**40), CPU)(lo + shift, lo + shift + numel)
    other = selection.random_keys(0, "w", Box.span(start + shift, 1 << 17, 2**40), CPU)(lo, lo + numel)
    assert torch.equal(one, other)


def test_random_masks_do_not_depend_on_the_sharding() -> None:
    n, keep = 1001, 137

    def work(cuts: list[tuple[int, int]]) -> Callable[[Rank], Tensor]:
        def run(rank: Rank) -> Tensor:
            start, numel = cuts[rank.rank]
            box = Box.span(start, numel, n)
            piece = selection.Piece("w", box, selection.random_keys(7, "w", box, CPU), 0)
            return bitmask.unpack(selection.select_largest([piece], [keep], rank)[0], numel)

        return run

    expected = torch.zeros(n, dtype=torch.bool)
    order = sorted(range(n), key=lambda i: -hashed(7, "w", i))
    expected[order[:keep]] = True
    for cuts in ([(0, n)], [(0, 333), (333, n - 333)], [(0, 8), (8, 0), (8, n - 8)]):
        assert torch.equal(torch.cat(on_ranks(len(cuts), work(cuts))), expected)


@pytest.mark.parametrize("start", [0, 2**32 - (1 << 15)])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_keys_are_near_uniform(seed: int, start: int) -> None:
    """Chi-square over 256 bins has mean 255 and standard deviation 22.6; also of pairs of neighbours, 16 x 16 bins."""
    keys = selection.random_keys(seed, "layers.0.weight", Box.span(start, 1 << 17, 2**40), CPU)(0, 1 << 16).numpy()
    for bins in (keys >> 23, keys & 255, (keys[:-1] >> 27) * 16 + (keys[1:] >> 27)):
        expected = len(bins) / 256
        chi_square = float((((np.bincount(bins, minlength=256) - expected) ** 2) / expected).sum())
        assert 165 < chi_square < 345


def test_random_keys_differ_by_seed_name_and_high_index() -> None:
    streams = [
        selection.random_keys(seed, name, Box.span(start, 1 << 17, 2**40), CPU)(0, 1000)
        for seed, name, start in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 2**32), (0, "a", 2**33)]
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert int((one == other).sum()) < 3


# -- memory --------------------------------------------------------------------------------------------------------

MEMORY = """
import resource
import torch
from gap_ds.masks import selection
from gap_ds.masks.box import Box

def run(n):
    weights = torch.empty(n).uniform_(-1, 1)  # nothing is freed, so the peak is what is held
    piece = selection.Piece("w", Box.span(0, n, n), selection.magnitude_keys(weights), 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (bits,) = selection.select_largest([piece], [n // 10], selection.Single())
    return bits.numel(), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

torch.set_num_threads(1)
run(1 << 12)
run(1 << 21)  # the scratch of two chunks is allocated once
print(*run(1 << 24))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_scratch_memory_does_not_grow_with_the_piece() -> None:
    """16.8 M weights (67 MB): beyond the mask (2 MB, twice while its chunks are joined) only a chunk's scratch."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back at once what is freed
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    mask_bytes, extra = map(int, result.stdout.split())
    assert mask_bytes == 1 << 21
    assert extra < 2 * mask_bytes + (25 << 20)
