"""Triton kernels that step over kept weights in fp32 on a GPU: one launch for all pieces with the same step count.

A program has PROGRAM weights. Where their packed moments begin is counted once for each mask, and the places in between
follow from the bits in registers. Gradients and weights are read, and weights written, at kept places alone. Importing
this module requires triton. Results equal PyTorch's up to rounding: compilers join multiplications and additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gap_ds.masks.triton import row_of, sent
from gap_ds.optim.kept import PROGRAM, AdamWSettings, Kept, SGDSettings

#: Columns of a table: addresses of weight and gradient, weights, first program, addresses of bits, starts and moments.
_COLUMNS = tl.constexpr(9)


# Triton evaluates the annotations, so they must be names that it knows. Numbers are not specialised: one compilation
# serves all pieces and settings. Floats never are.
@triton.jit  # type: ignore[untyped-decorator]
def _places(row: tl.tensor, block: tl.constexpr) -> tl.tensor:
    # First weight of this program, offsets of its weights, which of them are kept, and the places of their moments.
    program = tl.program_id(0) - tl.load(row + 3)
    start = program * block
    at = tl.arange(0, block)
    bits = tl.load(row + 4).to(tl.pointer_type(tl.uint8)) + start // 8
    byte = tl.load(bits + at // 8, mask=at < tl.load(row + 2) - start, other=0)
    kept = (byte >> (at % 8).to(tl.uint8)) & 1
    first = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.int64)) + program)
    return start, at, kept == 1, first + tl.cumsum(kept.to(tl.int32), 0) - 1


@triton.jit(do_not_specialize=["pieces", "halvings"])  # type: ignore[untyped-decorator]
def _adamw(
    table: tl.tensor,
    pieces: tl.tensor,
    halvings: tl.tensor,
    sign: tl.tensor,
    decay: tl.tensor,
    one: tl.tensor,
    beta2: tl.tensor,
    value: tl.tensor,
    size: tl.tensor,
    correction: tl.tensor,
    eps: tl.tensor,
    largest: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = row_of(table, pieces, halvings, _COLUMNS)
    start, at, kept, place = _places(row, block)
    weights = tl.load(row).to(tl.pointer_type(tl.float32)) + start + at
    gradients = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + start + at
    firsts = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + place
    seconds = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + place

    g = sign * tl.load(gradients, mask=kept, other=0.0)
    m = tl.load(firsts, mask=kept, other=0.0)
    v = tl.load(seconds, mask=kept, other=0.0)
    w = tl.load(weights, mask=kept, other=0.0)
    m += one * (g - m)
    v = v * beta2 + value * g * g
    tl.store(firsts, m, mask=kept)
    tl.store(seconds, v, mask=kept)
    if largest:
        most = tl.load(row + 8).to(tl.pointer_type(tl.float32)) + place
        v = tl.maximum(v, tl.load(most, mask=kept, other=0.0))
        tl.store(most, v, mask=kept)
    tl.store(weights, w * decay + size * m / (tl.sqrt(v) / correction + eps), mask=kept)


@triton.jit(do_not_specialize=["pieces", "halvings"])  # type: ignore[untyped-decorator]
def _sgd(
    table: tl.tensor,
    pieces: tl.tensor,
    halvings: tl.tensor,
    sign: tl.tensor,
    decay: tl.tensor,
    momentum: tl.tensor,
    rest: tl.tensor,
    rate: tl.tensor,
    buffered: tl.constexpr,
    made: tl.constexpr,
    nesterov: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = row_of(table, pieces, halvings, _COLUMNS)
    start, at, kept, place = _places(row, block)
    weights = tl.load(row).to(tl.pointer_type(tl.float32)) + start + at
    gradients = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + start + at

    w = tl.load(weights, mask=kept, other=0.0)
    g = sign * tl.load(gradients, mask=kept, other=0.0) + decay * w
    if buffered:
        buffers = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + place
        b = g
        if made:
            b = momentum * tl.load(buffers, mask=kept, other=0.0) + rest * g
        tl.store(buffers, b, mask=kept)
        if nesterov:
            g += momentum * b
        else:
            g = b
    tl.store(weights, w + rate * g, mask=kept)


class Kernels:
    """The kernels as `Steps`, on one device. The host waits for nothing."""

    def __init__(self) -> None:
        #: The last table sent for each kernel and first weight, with what it was made of: addresses seldom change
        #: between steps, and a step has a launch for each parameter group and number of steps.
        self._tables: dict[Any, tuple[list[tuple[int, ...]], Tensor]] = {}

    def adamw(self, pieces: Sequence[tuple[Kept, float]], settings: AdamWSettings) -> None:
        """See `Steps`."""
        lr, (beta1, beta2) = settings.lr, settings.betas
        sign, decay = -1.0 if settings.maximize else 1.0, 1 - lr * settings.weight_decay
        for step in dict.fromkeys(step for _, step in pieces):
            alike = [piece for piece, own in pieces if own == step]
            size, correction = -(lr / (1 - beta1**step)), (1 - beta2**step) ** 0.5
            numbers = sign, decay, 1 - beta1, beta2, 1 - beta2, size, correction, settings.eps
            self._launch(_adamw, alike, *numbers, largest=len(alike[0].moments) > 2)

    def sgd(self, pieces: Sequence[tuple[Kept, bool]], settings: SGDSettings) -> None:
        """See `Steps`."""
        sign, rest = -1.0 if settings.maximize else 1.0, 1 - settings.dampening
        numbers = sign, settings.weight_decay, settings.momentum, rest, -settings.lr
        for made in dict.fromkeys(made for _, made in pieces):
            alike = [piece for piece, own in pieces if own == made]
            self._launch(_sgd, alike, *numbers, buffered=bool(settings.momentum), made=made, nesterov=settings.nesterov)

    def _launch(self, kernel: Any, pieces: Sequence[Kept], *numbers: float, **kinds: bool) -> None:
        """Launches a kernel over pieces of which all have the same moments."""
        rows, programs = list[tuple[int, ...]](), 0
        for piece in pieces:
            mask = piece.mask
            if mask.kept:
                moments = [moment.data_ptr() for moment in piece.moments]
                whole = piece.weight.data_ptr(), piece.gradient.data_ptr(), mask.numel, programs
                rows.append((*whole, mask.bits.data_ptr(), mask.starts.data_ptr(), *moments, *[0] * (3 - len(moments))))
                programs += triton.cdiv(mask.numel, PROGRAM)
        if not rows:
            return
        key = kernel, rows[0][0], *kinds.items()
        if key not in self._tables or self._tables[key][0] != rows:
            self._tables[key] = rows, sent(rows, pieces[0].weight.device)
        table = self._tables[key][1]
        # Triton launches on the current device, not on that of its arguments.
        with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
            kernel[(programs,)](table, len(rows), (len(rows) - 1).bit_length(), *numbers, **kinds, block=PROGRAM)
