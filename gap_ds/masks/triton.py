"""Triton kernels that apply masks and count keys on a GPU, each with one launch for all pieces.

`bitmask` and `tally` have the same in PyTorch. Importing this module requires triton, which comes with the CUDA builds
of torch. P pieces of N weights each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gap_ds.masks.tally import Part

#: Weights per program, a multiple of 8.
_BLOCK = 4096

_WORD = {2: tl.int16, 4: tl.int32, 8: tl.int64}

#: Values per round of a counting program, and its rounds: each program adds its whole histogram to the counts.
_COUNTED, _ROUNDS = 4096, 16
#: Warps of a counting program. A thread holds a 32nd of the histogram of its warp, whatever their number is.
_WARPS = 16

_VALUE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int32: tl.int32}


@triton.jit  # type: ignore[untyped-decorator]
def row_of(table: tl.tensor, pieces: tl.tensor, halvings: tl.tensor, columns: tl.constexpr) -> tl.tensor:
    # Binary search for the piece of this program: the last one whose first program, in column 3, is not after this one.
    program = tl.program_id(0)
    lowest = 0
    highest = pieces - 1
    for _ in range(halvings):
        middle = (lowest + highest + 1) // 2
        reached = tl.load(table + columns * middle + 3) <= program
        lowest = tl.where(reached, middle, lowest)
        highest = tl.where(reached, highest, middle - 1)
    return table + columns * lowest


# Not specialised, so that one compilation serves every number of pieces. Triton evaluates the annotations, so they must
# be names that it knows.
@triton.jit(do_not_specialize=["pieces", "halvings"])  # type: ignore[untyped-decorator]
def _store_zeros(
    table: tl.tensor, pieces: tl.tensor, halvings: tl.tensor, word: tl.constexpr, block: tl.constexpr
) -> None:
    row = row_of(table, pieces, halvings, 4)
    start = (tl.program_id(0) - tl.load(row + 3)) * block
    words = tl.load(row).to(tl.pointer_type(word)) + start
    bits = tl.load(row + 1).to(tl.pointer_type(tl.uint8)) + start // 8
    left = tl.load(row + 2) - start

    at = tl.arange(0, block)
    byte = tl.load(bits + at // 8, mask=at < left, other=255)
    pruned = ((byte >> (at % 8).to(tl.uint8)) & 1) == 0
    # Kept weights are neither read nor written.
    tl.store(words + at, tl.zeros([block], word), mask=pruned)


@triton.jit(do_not_specialize=["pieces", "halvings", "shift"])  # type: ignore[untyped-decorator]
def _count_keys(
    table: tl.tensor,
    counts: tl.tensor,
    pieces: tl.tensor,
    halvings: tl.tensor,
    shift: tl.tensor,
    value: tl.constexpr,
    bins: tl.constexpr,
    block: tl.constexpr,
    rounds: tl.constexpr,
) -> None:
    row = row_of(table, pieces, halvings, 7)
    start = (tl.program_id(0) - tl.load(row + 3)) * block * rounds
    values = tl.load(row).to(tl.pointer_type(value)) + start
    left = tl.load(row + 1) - start
    base = tl.load(row + 4)
    first = tl.load(row + 5)
    invalid = tl.load(row + 6)

    bin_of = tl.arange(0, bins)
    total = tl.zeros([bins], tl.int32)
    wrong = tl.zeros([block], tl.int32)
    for i in range(rounds):
        at = i * block + tl.arange(0, block)
        inside = at < left
        loaded = tl.load(values + at, mask=inside, other=0)
        if value == tl.int32:
            key = loaded
            valid = key >= 0
        else:
            key = loaded.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            valid = key <= 0x7F800000
        place = (key >> shift).to(tl.int64) - first
        counted = inside & valid & (place >= 0) & (place < bins)
        # What is not counted falls into bin 0 and is taken off it: the histogram has no mask in older versions.
        total += tl.histogram(tl.where(counted, place, 0).to(tl.int32), bins)
        total -= tl.where(bin_of == 0, tl.sum((~counted).to(tl.int32), axis=0), 0)
        wrong += (inside & ~valid).to(tl.int32)
    tl.atomic_add(counts + base + bin_of, total.to(tl.int64), mask=total != 0)
    found = tl.sum(wrong, axis=0)
    tl.atomic_add(counts + invalid, found.to(tl.int64), mask=(invalid >= 0) & (found != 0))


def zero_pruned_all(pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Return a call that sets the words (N,) of these pieces to 0 where their bit is 0. It holds no tensors of them.

    It is valid for as long as words and bits stay where they are: the table of their places is sent to the device here,
    and each call is one launch on the current stream, which copies nothing and does not wait for the device. `bitmask`
    defines the layout of the bits.

    Args:
        pieces: words with their masks, on one device and of one word size.
    """
    rows, programs = [], 0
    for words, bits in pieces:
        if words.numel():
            rows.append((words.data_ptr(), bits.data_ptr(), words.numel(), programs))
            programs += triton.cdiv(words.numel(), _BLOCK)
    if not rows:
        return lambda: None
    device, word = pieces[0][0].device, _WORD[pieces[0][0].element_size()]
    table = sent(rows, device)  # address of the words, address of the bits, number of weights, first program
    halvings = (len(rows) - 1).bit_length()

    def run() -> None:
        # Triton launches on the current device, not on that of its arguments.
        with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
            _store_zeros[(programs,)](table, len(rows), halvings, word=word, block=_BLOCK)

    return run


def count_keys(counts: Tensor, parts: Sequence[Part], shift: int, bins: int) -> None:
    """`Tally.count` of weights and int32 keys: one launch for the parts of each dtype. The host waits for nothing."""
    for dtype in dict.fromkeys(part.values.dtype for part in parts):
        rows, programs = [], 0
        for part in parts:
            if part.values.dtype == dtype and part.values.numel():
                assert part.values.is_contiguous()
                place = part.values.data_ptr(), part.values.numel(), 0, programs
                rows.append((*place, part.base, part.prefix * bins, -1 if part.invalid is None else part.invalid))
                programs += triton.cdiv(part.values.numel(), _COUNTED * _ROUNDS)
        if rows:
            table = sent(rows, counts.device)
            with torch.cuda.device_of(counts):  # type: ignore[no-untyped-call]
                _count_keys[(programs,)](
                    table,
                    counts,
                    len(rows),
                    (len(rows) - 1).bit_length(),
                    shift,
                    value=_VALUE[dtype],
                    bins=bins,
                    block=_COUNTED,
                    rounds=_ROUNDS,
                    num_warps=_WARPS,
                )


def sent(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """A table int64 on the device. A copy from pinned memory does not wait for work queued there."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu").to(
        device, non_blocking=True
    )
