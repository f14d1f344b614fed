"""Patterns over shards: N:M and blocks, decided where their groups lie; no entry is ever assembled.

    Linear (4, 8), 2:4, cut as a flat range in the middle of a group:

    rank 0   | a a a a  b b b b |        the bands of rank 0 are a to e, whole on it but for f
             | c c c c  d d d d |        band f is cut: both ranks get its scores, by one all-reduce of all cut bands
    rank 0/1 | e e e e  f f|f f |
    rank 1   | g g g g  h h h h |

A band is the shortest contiguous stretch of the flattened entry that holds whole groups from every multiple of its
length on: a group of an N:M pattern along the last dimension, M rows of one along the first, a row of blocks. Of a rank
with a range only its first and last band can be cut. A box whose sides do not cut a group is decided alone as well, as
a whole weight is; any other box has its whole entry as its one band.

N:M decides each group alone. Blocks have a budget over all ranks: their scores, sums in 64 bits in a fixed order, are
selected as weights are (`selection`), each block on the rank where its band begins. Sums of large blocks are kept, half
a byte a weight at most; those of small ones are added anew by every pass, which takes the time of reading them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box
from gap_ds.method.pattern import Block, NofM

#: Weights decided at a time, rounded to whole bands: the scratch memory is some ten bytes for each of them.
_CHUNK = 1 << 15
#: Weights of a block from which on its sum, of 8 bytes, is kept for all passes.
_KEPT = 16
#: On an accelerator larger chunks amortise the launches.
_DEVICE_CHUNK = 1 << 18


@dataclass(frozen=True)
class Grouped:
    """This rank's piece of an entry with a pattern.

    piece: its weights with their keys; `piece.budget` is not used. shape, dims, keep (legal): of the whole entry.
    boxes: what each rank counts of the entry. by_magnitude: whether keys are those of magnitudes.
    """

    piece: selection.Piece
    shape: tuple[int, ...]
    dims: tuple[int, int]
    keep: int
    boxes: Sequence[Box]
    by_magnitude: bool


def select_groups(pattern: NofM | Block, entries: Sequence[Grouped], reduce: selection.Reduce) -> list[Tensor]:
    """Return the bits of the kept weights of each piece, as the pattern's `mask` has them for the whole entry.

    All ranks must call this with the same entries, in the same order.

    Raises:
        ValueError: on all ranks, if a weight is NaN.
    """
    invalid = reduce.sum(bitmask.on_host([_invalid(entry.piece) for entry in entries]))
    if bool(invalid.any()):
        first = int(invalid.nonzero()[0, 0])
        raise selection.no_order(entries[first].piece.name, int(invalid[first]))
    stretches = [_stretches(pattern, entry, reduce) for entry in entries]
    if isinstance(pattern, NofM):
        # On the way to its budget an entry keeps more in a group.
        rows = [(pattern.keeping(entry.shape, entry.keep), entry) for entry in entries]
        return [_every_group(*row, own) for row, own in zip(rows, stretches, strict=True)]
    blocks = [_blocks(pattern, entry, own) for entry, own in zip(entries, stretches, strict=True)]
    sizes = [math.prod(pattern.cell(entry.shape, entry.dims)) for entry in entries]
    counted = [_counted(entry, e, math.prod(entry.shape) // sizes[e], blocks[e]) for e, entry in enumerate(entries)]
    keep = [entry.keep // size for entry, size in zip(entries, sizes, strict=True)]
    decisions = selection.decide(counted, keep, reduce)
    return [_every_block(pattern, *one) for one in zip(entries, stretches, blocks, decisions, strict=True)]


@dataclass(frozen=True)
class _Stretch:
    """Whole bands in a row, some of whose weights are this rank's.

    shape: of the tensor whose bands they are: of the entry, or of this rank's box of it. scores: keys of the stretch's
    weights. own: this rank's part of the stretch, flattened; at: where this part begins in the rank's piece.
    blocks: the stretch's blocks, among all blocks of the entry. counted: whether this rank counts them.
    """

    shape: tuple[int, ...]
    scores: selection.Keys
    numel: int
    own: Box
    at: int
    blocks: Box
    counted: bool


def _invalid(piece: selection.Piece) -> Tensor:
    """How many of the counted weights of a piece are NaN: a number () on its device."""
    found = torch.zeros((), dtype=torch.int64, device=piece.device)
    for lo, hi in _steps(piece.numel, 8, piece.device) if piece.counted else ():
        found += (piece.keys(lo, hi) < 0).count_nonzero()
    return found


def _stretches(pattern: NofM | Block, entry: Grouped, reduce: selection.Reduce) -> list[_Stretch]:
    """The stretches that hold this rank's weights, in their order; a collective for the bands that are cut."""
    if all(box.is_range for box in entry.boxes):
        return _of_range(pattern, entry, reduce)
    cell = pattern.cell(entry.shape, entry.dims)
    sides = [box.sides(entry.shape) for box in entry.boxes if box.numel]
    if all(one is not None and _aligned(cell, *one) for one in sides):
        return _of_box(pattern, entry)
    return _of_whole(pattern, entry, reduce)


def _aligned(cell: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> bool:
    return all(at % c == 0 and n % c == 0 for c, at, n in zip(cell, offset, size, strict=True))


def _of_box(pattern: NofM | Block, entry: Grouped) -> list[_Stretch]:
    """A box that cuts no group is decided as a weight by itself."""
    piece, cell = entry.piece, pattern.cell(entry.shape, entry.dims)
    if not piece.numel:
        return []
    sides = piece.box.sides(entry.shape)
    assert sides is not None
    offset, size = sides
    grid = [tuple(n // c for n, c in zip(numbers, cell, strict=True)) for numbers in (entry.shape, offset, size)]
    everything = Box.span(0, piece.numel, piece.numel)
    return [_Stretch(size, piece.keys, piece.numel, everything, 0, Box.of(*grid), piece.counted)]


def _of_range(pattern: NofM | Block, entry: Grouped, reduce: selection.Reduce) -> list[_Stretch]:
    """A range has whole bands in the middle; its first and its last one may go on, on other ranks."""
    piece, band = entry.piece, pattern.band(entry.shape, entry.dims)
    start, end = piece.box.start, piece.box.end
    per_band = band // math.prod(pattern.cell(entry.shape, entry.dims))
    blocks = piece.box.total // band * per_band
    cut = sorted({box.start // band for box in entry.boxes if box.numel and box.start % band})
    rows = torch.zeros(len(cut), band, dtype=torch.int64, device="cpu")

    def parts() -> list[tuple[int, int, int]]:
        """(band, first, last) of this rank's part of each cut band that it has weights of, as flat indices."""
        bounds = [(number, max(start, number * band), min(end, (number + 1) * band)) for number in cut]
        return [(number, lo, hi) for number, lo, hi in bounds if lo < hi]

    for number, lo, hi in parts() if piece.counted else []:
        rows[cut.index(number), lo - number * band : hi - number * band] = piece.keys(lo - start, hi - start).cpu()
    shared = reduce.sum(rows) if cut else rows
    found = []
    for number, lo, hi in parts():
        scores = shared[cut.index(number)].to(piece.device, torch.int32)
        found.append(
            _Stretch(
                entry.shape,
                lambda a, b, scores=scores: scores[a:b],  # type: ignore[misc]
                band,
                Box.span(lo - number * band, hi - lo, band),
                lo - start,
                Box.span(number * per_band, per_band, blocks),
                piece.counted and lo == number * band,
            )
        )
    first, last = -(-start // band), end // band
    while first < last and first in cut:
        first += 1
    while first < last and last - 1 in cut:
        last -= 1
    if first < last:
        skipped, numel = first * band - start, (last - first) * band
        found.append(
            _Stretch(
                entry.shape,
                lambda a, b: piece.keys(skipped + a, skipped + b),
                numel,
                Box.span(0, numel, numel),
                skipped,
                Box.span(first * per_band, (last - first) * per_band, blocks),
                piece.counted,
            )
        )
    return sorted(found, key=lambda one: one.at)


def _of_whole(pattern: NofM | Block, entry: Grouped, reduce: selection.Reduce) -> list[_Stretch]:
    """All ranks assemble the entry and decide alike. The rank with its first weight counts the blocks."""
    piece, total = entry.piece, entry.piece.box.total
    whole = torch.zeros(total, dtype=torch.int64, device="cpu")
    if piece.counted:
        for lo, keys in piece.chunks():
            whole[piece.box.places(lo, lo + keys.numel())] = keys.cpu().to(torch.int64)
    scores = reduce.sum(whole).to(piece.device, torch.int32)
    if not piece.numel:
        return []
    counted = piece.counted and piece.box.start == 0
    blocks = total // math.prod(pattern.cell(entry.shape, entry.dims))
    every = Box.span(0, blocks, blocks)
    return [_Stretch(entry.shape, lambda a, b: scores[a:b], total, piece.box, 0, every, counted)]


def _steps(numel: int, band: int, device: torch.device) -> list[tuple[int, int]]:
    """Parts (lo, hi) of `numel` weights, each of whole bands."""
    step = max((_CHUNK if device.type == "cpu" else _DEVICE_CHUNK) // band, 1) * band
    return [(lo, min(lo + step, numel)) for lo in range(0, numel, step)]


def _every_group(pattern: NofM, entry: Grouped, stretches: Sequence[_Stretch]) -> Tensor:
    """The bits of a piece by an N:M pattern, which decides each group alone."""

    def flags(one: _Stretch, lo: int, hi: int) -> Tensor:
        return pattern.flags(one.scores(lo, hi), one.shape, entry.dims)

    return _bits(pattern, entry, [(one, partial(flags, one)) for one in stretches])


def _bits(
    pattern: NofM | Block, entry: Grouped, stretches: Sequence[tuple[_Stretch, Callable[[int, int], Tensor]]]
) -> Tensor:
    """The bits of a piece from the flags (hi - lo,) of weights [lo, hi) of its stretches."""

    def parts() -> Iterator[Tensor]:
        for one, flags in stretches:
            chunks = _steps(one.numel, pattern.band(one.shape, entry.dims), entry.piece.device)
            if one.own.numel == one.numel:
                yield from (flags(lo, hi) for lo, hi in chunks)
            else:
                yield one.own.cut(torch.cat([flags(lo, hi) for lo, hi in chunks]))

    return bitmask.pack_parts(parts(), entry.piece.numel, entry.piece.device)


@dataclass(frozen=True)
class _Sums:
    """Keys of the blocks of a stretch: the bit patterns of their sums, which are not negative; added at each call."""

    pattern: Block
    entry: Grouped
    stretch: _Stretch

    def __call__(self, lo: int, hi: int) -> Tensor:
        one, entry = self.stretch, self.entry
        band = self.pattern.band(one.shape, entry.dims)
        per_band = band * one.blocks.numel // one.numel
        first, last = lo // per_band, -(-hi // per_band) if hi > lo else lo // per_band
        keys = torch.empty((last - first) * per_band, dtype=torch.int64, device=entry.piece.device)
        for a, b in _steps((last - first) * band, band, entry.piece.device):
            scores = one.scores(first * band + a, first * band + b)
            scores = scores.view(torch.float32) if entry.by_magnitude else scores
            sums = self.pattern.sums(scores, one.shape, entry.dims)
            keys[a // band * per_band : b // band * per_band] = sums.view(torch.int64)
        return keys[lo - first * per_band : hi - first * per_band]


def _blocks(pattern: Block, entry: Grouped, stretches: Sequence[_Stretch]) -> list[selection.Piece]:
    """The blocks of each stretch."""
    found = []
    for one in stretches:
        keys: selection.Keys = _Sums(pattern, entry, one)
        if one.numel >= _KEPT * one.blocks.numel:
            keys = partial(_part, keys(0, one.blocks.numel))
        found.append(selection.Piece(entry.piece.name, one.blocks, keys, 0, one.counted))
    return found


def _part(keys: Tensor, lo: int, hi: int) -> Tensor:
    return keys[lo:hi]


def _joined(pieces: Sequence[selection.Piece], device: torch.device, lo: int, hi: int) -> Tensor:
    """Keys [lo, hi) of pieces in a row."""
    found, first = [], 0
    for piece in pieces:
        a, b = max(lo, first), min(hi, first + piece.numel)
        if a < b:
            found.append(piece.keys(a - first, b - first))
        first += piece.numel
    return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=torch.int64, device=device), *found])


def _counted(entry: Grouped, budget: int, total: int, blocks: Sequence[selection.Piece]) -> selection.Piece:
    """The blocks of an entry that this rank counts: those of all its stretches, of none, or of all but the first."""
    own = [piece for piece in blocks if piece.counted]
    numel = sum(piece.numel for piece in own)
    box = own[0].box if len(own) == 1 else Box.span(min((p.box.start for p in own), default=0), numel, total)
    return selection.Piece(entry.piece.name, box, partial(_joined, own, entry.piece.device), budget)


def _every_block(
    pattern: Block,
    entry: Grouped,
    stretches: Sequence[_Stretch],
    blocks: Sequence[selection.Piece],
    decision: selection.Decision,
) -> Tensor:
    """The bits of a piece from those of the blocks of each stretch."""

    def flags(one: _Stretch, bits: Tensor, lo: int, hi: int) -> Tensor:
        size = one.numel // one.blocks.numel
        return pattern.spread(bitmask.unpack(bits, (hi - lo) // size, start=lo // size), one.shape, entry.dims)

    chosen = [partial(flags, one, decision.mask(piece)) for one, piece in zip(stretches, blocks, strict=True)]
    return _bits(pattern, entry, list(zip(stretches, chosen, strict=True)))
