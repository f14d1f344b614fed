"""Exact top-k over shards: selects the kept weights of entries without gathering them.

Every weight has an integer key, and a budget keeps its `keep` weights with the largest keys. Of equal keys the lowest
(entry order, flat index) wins, so that a mask has exactly `keep` weights and does not depend on the number of ranks. A
rank holds one box of each entry (possibly empty).

The k-th largest key is found by radix selection: three passes over the local weights, each a histogram of some bits of
the keys and one all-reduce of (budgets x bins) counts for all budgets of a boundary at once. If a budget keeps only
some of the ties, the flat index where it stops is found the same way, by the bits of the indices of the ties. Nothing
else is communicated, whatever the size of the model, the number of ranks and the way in which a weight is cut.

E pieces (one per entry, in plan order), G budgets, N weights of a piece, R ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.masks.passes import INFINITY, ByPyTorch, Passes, passes_for
from gap_ds.masks.tally import Part, Tally

#: Bits of a key counted by each pass, most significant first: (shift, bins); of 31-bit keys, and of 63-bit ones.
PASSES = {
    31: ((20, 2048), (10, 1024), (0, 1024)),
    63: ((52, 2048), *((shift, 1024) for shift in (42, 32, 22, 12, 2)), (0, 4)),
}
#: Bits of a flat index counted by each pass over the ties.
_INDEX_BITS = 10
#: Weights processed at a time; bounds the scratch memory of a boundary. On a CPU their keys stay in a core's cache.
_CHUNK = 1 << 18
#: On an accelerator larger chunks amortise the launches.
_DEVICE_CHUNK = 1 << 24
#: Keys with the threshold's first bits are stored if they are at most this fraction, 1 / _FEW, of their piece (2 bits
#: per weight); otherwise every pass finds them again.
_FEW = 16

#: Key of a NaN, which has no place in the order. Any such key stops the selection on all ranks.
INVALID = -1
#: (lo, hi) -> keys of the weights [lo, hi) of a piece, counted from its start: int32 in [0, 2^31), or INVALID; or int64
#: in [0, 2^63).
Keys = Callable[[int, int], Tensor]


def _is_host(device: torch.device) -> bool:
    """True where the host reads results without waiting."""
    return device.type == "cpu"


class Reduce(Protocol):
    """The collective that a selection needs."""

    def sum(self, counts: Tensor) -> Tensor:
        """Return the elementwise sum over the ranks of an int64 tensor."""


class Single:
    """A group of one rank."""

    def sum(self, counts: Tensor) -> Tensor:
        return counts


@dataclass(frozen=True)
class Piece:
    """This rank's weights of one entry, with their keys and the number of their budget.

    counted: False if another rank has the same weights and counts them.
    """

    name: str
    box: Box
    keys: Keys
    budget: int
    counted: bool = True

    @property
    def numel(self) -> int:
        """Weights of the piece."""
        return self.box.numel

    @cached_property
    def _none(self) -> Tensor:
        return self.keys(0, 0)

    @property
    def device(self) -> torch.device:
        """The device of the keys."""
        return self._none.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the keys: int32, or int64 for keys of 63 bits."""
        return self._none.dtype

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (position in the piece, keys) by chunk. The length of every chunk but the last is a multiple of 8."""
        size = _CHUNK if _is_host(self.device) else _DEVICE_CHUNK
        if self.dtype == torch.int64:  # keys of blocks, each of many weights
            size //= 32
        for lo in range(0, self.numel, size):
            yield lo, self.keys(lo, min(lo + size, self.numel))

    @property
    def passes(self) -> Passes:
        """The implementation of the passes for this piece."""
        return passes_for(self.device, self.numel) if self.dtype == torch.int32 else ByPyTorch()


def magnitude_keys(weights: Tensor) -> Keys:
    """Return keys that order the weights of a piece (N,) by magnitude.

    The bit pattern of a non-negative fp32 number, read as an integer, has the order of the number; fp16 and bf16
    convert exactly, and fp64 is rounded: weights that are equal in fp32 have equal keys.

    >>> magnitude_keys(torch.tensor([0.0, -1.0, 1.0, float("nan")]))(0, 4).tolist()
    [0, 1065353216, 1065353216, -1]
    """
    return Magnitudes(weights)


@dataclass(frozen=True)
class Magnitudes:
    """Keys of the magnitudes of weights (N,)."""

    weights: Tensor

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self._passes.magnitude_keys(self.weights[lo:hi].float().contiguous())

    @cached_property
    def _passes(self) -> Passes:
        return passes_for(self.weights.device, self.weights.numel())


def only(keys: Keys, among: Tensor) -> Keys:
    """Return keys that put all weights outside a mask `among` (bits of the piece) below all weights inside it.

    >>> among = bitmask.pack(torch.tensor([False, True, True]))
    >>> only(magnitude_keys(torch.tensor([3.0, 0.0, 1.0])), among)(0, 3).tolist()
    [0, 1, 1065353217]
    """

    def chosen(lo: int, hi: int) -> Tensor:
        found = keys(lo, hi)
        # A NaN outside the mask is ignored; inside it stays INVALID. Above infinity's key there is room to add 1.
        inside = found.clamp(max=2**31 - 2) + (found >= 0)
        return torch.where(bitmask.unpack(among, hi - lo, start=lo), inside, 0)

    return chosen


def first(keys: Keys, among: Tensor, by_magnitude: bool) -> Keys:
    """Return keys that put all weights inside a mask `among` (bits of the piece) above all others.

    Those of magnitudes stay magnitudes: inside they are infinity's.

    >>> among = bitmask.pack(torch.tensor([False, True, False]))
    >>> first(magnitude_keys(torch.tensor([3.0, 0.0, 1.0])), among, True)(0, 3).view(torch.float32).tolist()
    [3.0, inf, 1.0]
    """
    top = INFINITY if by_magnitude else 2**31 - 1

    def chosen(lo: int, hi: int) -> Tensor:
        found = keys(lo, hi).clamp(max=top - 1)
        return torch.where(bitmask.unpack(among, hi - lo, start=lo), top, found)

    return chosen


def magnitudes(name: str, keys: Tensor) -> Tensor:
    """Return the magnitudes (N,) in fp32 that have these keys, as a view.

    Raises:
        ValueError: a weight is NaN.
    """
    if invalid := int((keys < 0).count_nonzero()):
        raise no_order(name, invalid)
    return keys.view(torch.float32)


def no_order(name: str, invalid: int) -> ValueError:
    return ValueError(
        f"{name}: {invalid} weights are NaN, so their magnitudes have no order. The training has "
        "diverged before this boundary: lower the learning rate, or resume from an earlier checkpoint."
    )


def random_keys(seed: int, name: str, box: Box, device: torch.device) -> Keys:
    """Return keys from a hash of (seed, entry name, flat index), the same for any sharding and device.

    The index passes through two rounds of multiply-xorshift (the finaliser of MurmurHash3, modulo 2^32), started from a
    SHA-256 of seed and name.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    a, b = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))

    def keys(lo: int, hi: int) -> Tensor:
        x = box.indices(lo, hi, device)
        # Mix in the upper half of the index, so that keys do not repeat after 2^32 weights.
        x = (x ^ a) & 0xFFFFFFFF ^ ((x >> 32) * 0x9E3779B1 & 0xFFFFFFFF)
        for constant in (0x85EBCA6B, 0xC2B2AE35, b | 1):
            x ^= x >> 16
            # The product may wrap around 2^63; its low 32 bits are right all the same.
            x = (x * constant) & 0xFFFFFFFF
        return ((x ^ (x >> 15)) >> 1).to(torch.int32)

    return keys


def select_largest(pieces: Sequence[Piece], keep: Sequence[int], reduce: Reduce) -> list[Tensor]:
    """Return the bits of the kept weights of each piece: each budget's `keep` largest keys over its entries and ranks.

    All ranks must call this with the same E names, budgets and `keep`.

    Args:
        pieces: this rank's piece of each of the E entries.
        keep: weights that each of the G budgets keeps, at most as many as it has.
    Returns:
        E masks in the layout of `gap_ds.masks.bitmask`, on the device of the keys.
    Raises:
        ValueError: on all ranks, if a key is invalid (a weight is NaN) or a budget exceeds its weights.
    """
    decisions = decide(pieces, keep, reduce)
    return [decision.mask(piece) for piece, decision in zip(pieces, decisions, strict=True)]


@dataclass(frozen=True)
class Decision:
    """Which weights of an entry are kept: keys above the threshold, and at it with a flat index before `end`.

    end: None keeps all weights at the threshold.
    """

    threshold: int
    end: int | None

    def mask(self, piece: Piece) -> Tensor:
        """Return the bits of a piece of the entry, counted or not."""
        bits = torch.empty(bitmask.nbytes(piece.numel), dtype=torch.uint8, device=piece.device)
        passes = piece.passes
        for lo, keys in piece.chunks():
            if self.end:
                first = piece.box.indices(lo, lo + keys.numel(), keys.device) < self.end
                packed = bitmask.pack((keys > self.threshold) | ((keys == self.threshold) & first))
            else:
                packed = passes.pack_above(keys, self.threshold - (self.end is None))
            bits[lo // 8 : lo // 8 + len(packed)] = packed
        return bits


def decide(pieces: Sequence[Piece], keep: Sequence[int], reduce: Reduce) -> list[Decision]:
    """Return the decisions of `select_largest` for the E entries; the arguments are the same."""
    # Weights with a higher prefix are kept; `need` of those with this prefix are still to be chosen.
    prefix = torch.zeros(len(keep), dtype=torch.int64, device="cpu")
    need = torch.tensor(list(keep), dtype=torch.int64, device="cpu")
    ties = torch.zeros(len(keep), dtype=torch.int64, device="cpu")
    candidates: list[_Candidates] = [partial(_all_keys, piece) for piece in pieces]
    bits = 63 if pieces and pieces[0].dtype == torch.int64 else 31
    for number, (shift, bins) in enumerate(PASSES[bits]):
        counts = reduce.sum(_histogram(pieces, candidates, len(keep), prefix, shift, bins, first=number == 0))
        if number == 0:
            _check(pieces, counts, need)
        counts = counts[: len(keep), :bins]
        # at_least[g, b]: candidates in bin b or above. The threshold's bin is the highest b with at_least >= need.
        at_least = counts.flip(1).cumsum(1).flip(1)
        chosen = (at_least >= need[:, None]).sum(1) - 1
        ties = counts.gather(1, chosen[:, None])[:, 0]
        need = need - (at_least.gather(1, chosen[:, None])[:, 0] - ties)
        prefix = prefix * bins + chosen
    ends = _tie_ends(pieces, prefix, need, reduce) if bool((ties > need).any()) else [None] * len(pieces)
    return [Decision(int(prefix[piece.budget]), end) for piece, end in zip(pieces, ends, strict=True)]


#: Yields the keys of a piece that may still be the threshold, by chunk.
_Candidates = Callable[[], Iterator[Tensor]]


def _all_keys(piece: Piece) -> Iterator[Tensor]:
    return (keys for _, keys in piece.chunks())


def _histogram(
    pieces: Sequence[Piece],
    candidates: list[_Candidates],
    budgets: int,
    prefix: Tensor,
    shift: int,
    bins: int,
    first: bool,
) -> Tensor:
    """Local counts (G, bins) of the keys with the given prefix, by their next bits. Narrows `candidates` to these keys.

    The first pass appends the invalid keys of each entry as further rows, so that one reduction informs all ranks.
    """
    rows = torch.zeros(budgets + (-(-len(pieces) // bins) if first else 0), bins, dtype=torch.int64, device="cpu")
    flat, invalid = rows.view(-1), budgets * bins
    tallies: dict[torch.device, Tally] = {}
    at_once: dict[torch.device, list[Part]] = {}
    for e, piece in enumerate(pieces):
        if not piece.counted:
            continue
        before = int(prefix[piece.budget])
        if _is_host(piece.device):
            counts = _counted(piece, candidates, e, before, shift, bins, first)
            rows[piece.budget] += counts[1:]
            if first:
                flat[invalid + e] = counts[0]
            continue
        # Nothing is narrowed here: to find candidates the host would have to wait for the device.
        part = partial(Part, base=piece.budget * bins, prefix=before, invalid=invalid + e if first else None)
        counted = tallies.setdefault(piece.device, Tally(flat.numel(), piece.device))
        if isinstance(piece.keys, Magnitudes):
            at_once.setdefault(piece.device, []).append(part(piece.keys.weights.contiguous()))
        else:
            for _, keys in piece.chunks():
                counted.count([part(keys)], shift, bins)
    for device, counted in tallies.items():
        counted.count(at_once.get(device, []), shift, bins)
        flat += counted.read()
    return rows


def _counted(
    piece: Piece, candidates: list[_Candidates], e: int, before: int, shift: int, bins: int, first: bool
) -> Tensor:
    """Counts (1 + bins,) of the candidates of a piece on the host; the first is that of invalid keys."""
    passes = piece.passes
    counts = torch.zeros(1 + bins, dtype=torch.int64, device=piece.device)
    # One block for all: small tensors kept between the large ones of each chunk would fragment the heap.
    found = torch.empty(0 if first else piece.numel // _FEW, dtype=piece.dtype, device=piece.device)
    seen = 0
    for keys in candidates[e]():
        if not first:
            keys = passes.keys_with(keys, shift + bins.bit_length() - 1, before)
        if (seen := seen + keys.numel()) <= found.numel():
            found[seen - keys.numel() : seen] = keys
        # Invalid keys, which only the first pass meets, are counted in the bin below bin 0.
        passes.count_keys_(counts, keys, shift, before * bins - 1)
    if seen <= found.numel():
        candidates[e] = partial(iter, torch.split(found[:seen].clone(), _CHUNK))
    return counts


def _check(pieces: Sequence[Piece], counts: Tensor, keep: Tensor) -> None:
    """Raise on invalid keys and budgets above their weights; on all ranks, because `counts` is reduced."""
    invalid = counts[len(keep) :].reshape(-1)[: len(pieces)]
    if bool((invalid != 0).any()):
        e = int(invalid.nonzero()[0, 0])
        raise no_order(pieces[e].name, int(invalid[e]))
    available = counts[: len(keep)].sum(1)
    if bool((keep > available).any()):
        g = int((keep > available).nonzero()[0, 0])
        raise ValueError(f"budget {g}: keep={int(keep[g])} exceeds its {int(available[g])} weights")


def _tie_ends(pieces: Sequence[Piece], threshold: Tensor, need: Tensor, reduce: Reduce) -> list[int | None]:
    """Where the kept ties of each entry end, if each budget keeps its first `need` by (entry, flat index).

    A budget keeps all ties of its first entries, none of its last ones, and some of at most one entry, the cut one.
    The sum of the ties over the ranks tells which entry is cut, and where is found like a threshold, by the bits of
    the ties' flat indices, most significant first.

    Returns:
        For each entry the flat index before which ties are kept: 0 keeps none, None keeps all.
    """
    own = bitmask.on_host([_tied(piece, int(threshold[piece.budget])) for piece in pieces])
    total, left, wanted = reduce.sum(own), need.tolist(), torch.zeros_like(own)
    for e, (piece, n) in enumerate(zip(pieces, total.tolist(), strict=True)):
        wanted[e] = min(n, left[piece.budget])
        left[piece.budget] -= int(wanted[e])
    ends: list[int | None] = [None if n == m else 0 for n, m in zip(wanted.tolist(), total.tolist(), strict=True)]
    cut = [e for e, end in enumerate(ends) if end == 0 and wanted[e]]
    if not cut:
        return ends
    # Of the ties of a cut entry whose index has this prefix, `rest` are still to be kept.
    rest, prefix, bins = wanted[cut], torch.zeros(len(cut), dtype=torch.int64, device="cpu"), 1 << _INDEX_BITS
    bits = max((pieces[e].box.total - 1).bit_length() for e in cut)
    for shift in range((bits - 1) // _INDEX_BITS * _INDEX_BITS, -1, -_INDEX_BITS):
        rows = torch.zeros(len(cut), bins, dtype=torch.int64, device="cpu")
        tallies: dict[torch.device, Tally] = {}
        for row, (e, before) in enumerate(zip(cut, prefix.tolist(), strict=True)):
            for at, tied in _ties(pieces[e], int(threshold[pieces[e].budget])):
                inside = tied & (at >> (shift + _INDEX_BITS) == before)
                places = (at >> shift & (bins - 1)) + row * bins
                tallies.setdefault(at.device, Tally(rows.numel(), at.device)).add(places, inside)
        for counted in tallies.values():
            rows.view(-1).add_(counted.read())
        counts = reduce.sum(rows)
        before_bin = counts.cumsum(1) - counts
        chosen = (before_bin < rest[:, None]).sum(1, keepdim=True) - 1
        rest = rest - before_bin.gather(1, chosen)[:, 0]
        prefix = prefix * bins + chosen[:, 0]
    for e, last in zip(cut, prefix.tolist(), strict=True):
        ends[e] = last + 1
    return ends


def _tied(piece: Piece, threshold: int) -> Tensor:
    """Number of counted weights at the threshold, on the device of the keys."""
    found = torch.zeros((), dtype=torch.int64, device=piece.device)
    for _, keys in piece.chunks() if piece.counted else ():
        found += (keys == threshold).count_nonzero()
    return found


def _ties(piece: Piece, threshold: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, by chunk, the flat indices of the counted weights, and which of them are at the threshold.

    On the host those at the threshold alone: they are few, and to find them costs no waiting.
    """
    for lo, keys in piece.chunks() if piece.counted else ():
        tied = keys == threshold
        if _is_host(tied.device) and not bool(tied.any()):
            continue
        at = piece.box.indices(lo, lo + keys.numel(), keys.device)
        yield (at[tied], tied[tied]) if _is_host(keys.device) else (at, tied)
