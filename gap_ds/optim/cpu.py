"""Steps over kept weights in C, for fp32 on CPUs: a gradient and a weight are read, and a weight written, once.

`loops()` returns None if there is no compiler, or if the loops do not give PyTorch's bits on this machine. They are
checked at each load; `SparseState` has the same by PyTorch. The square root is PyTorch's own: it comes from MKL where
there is MKL, and does not round as a processor does.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.masks import cpu
from gap_ds.optim.kept import AdamWSettings, Kept, SGDSettings, check

SOURCE = Path(__file__).with_name("kept.c")


@functools.cache
def loops() -> Loops | None:
    """The compiled loops; None if they cannot be used."""
    return cpu.compiled(SOURCE, _checked, ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"])


def parts(piece: Kept) -> Iterator[tuple[list[int], int, int, int]]:
    """For each chunk with kept weights: where it is in (N,) and in packed tensors, weights, first kept, kept.

    Places are addresses in weight, gradient, bits, moments, in this order.
    """
    whole = piece.weight.data_ptr(), piece.gradient.data_ptr()
    packed = [moment.data_ptr() for moment in piece.moments]
    for low, numel, first, kept in piece.mask.chunks:
        if kept:
            places = [address + 4 * low for address in whole] + [piece.mask.bits.data_ptr() + low // 8]
            yield [*places, *(address + 4 * first for address in packed)], numel, first, kept


class Loops:
    """The loops as `Steps`."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

        def loop(name: str, *arguments: Any) -> Callable[..., None]:
            found: Any = getattr(loaded, name)
            found.argtypes, found.restype = arguments, None
            return found  # type: ignore[no-any-return]

        self._moments = loop("adamw_moments", pointer, pointer, number, *[real] * 4, *[pointer] * 3)
        self._weights = loop("adamw_weights", pointer, pointer, number, pointer, pointer, *[real] * 4)
        self._scratch = threading.local()
        self._sgd = loop("sgd", *[pointer] * 3, number, pointer, number, *[real] * 4, number, real)

    def adamw(self, pieces: Sequence[tuple[Kept, float]], settings: AdamWSettings) -> None:
        """See `Steps`."""
        lr, (beta1, beta2) = settings.lr, settings.betas
        numbers = -1.0 if settings.maximize else 1.0, 1 - beta1, beta2, 1 - beta2
        decay, eps = 1 - lr * settings.weight_decay, settings.eps

        def work(item: tuple[Kept, float, tuple[list[int], int, int, int]]) -> None:
            piece, step, ((weight, gradient, bits, *packed), numel, first, kept) = item
            at, room = self._room(kept)
            self._moments(gradient, bits, numel, *numbers, *packed[:2], at.data_ptr())
            second = piece.moments[-1][first : first + kept]
            if len(packed) > 2:
                torch.maximum(second, piece.moments[1][first : first + kept], out=second)
            root = torch.sqrt(second, out=room[:kept])
            size, correction = -(lr / (1 - beta1**step)), (1 - beta2**step) ** 0.5
            self._weights(weight, at.data_ptr(), kept, packed[0], root.data_ptr(), decay, size, correction, eps)

        items = [(piece, step, part) for piece, step in pieces for part in parts(piece)]
        cpu.in_threads(work, items, sum(piece.weight.numel() for piece, _ in pieces))

    def _room(self, kept: int) -> tuple[Tensor, Tensor]:
        """Memory of this thread for positions and roots, left from call to call: fresh memory is slow to write."""
        found: tuple[Tensor, Tensor] | None = getattr(self._scratch, "room", None)
        if found is None or found[1].numel() < kept:
            at = torch.empty(kept + 7, dtype=torch.int32, device="cpu")
            found = self._scratch.room = at, torch.empty(kept, dtype=torch.float32, device="cpu")
        return found

    def sgd(self, pieces: Sequence[tuple[Kept, bool]], settings: SGDSettings) -> None:
        """See `Steps`."""
        sign, rest = -1.0 if settings.maximize else 1.0, 1 - settings.dampening
        factors = sign, settings.weight_decay, settings.momentum, rest, settings.nesterov, -settings.lr

        def work(item: tuple[bool, tuple[list[int], int, int, int]]) -> None:
            made, ((weight, gradient, bits, *packed), numel, _, _) = item
            self._sgd(weight, gradient, bits, numel, packed[0] if packed else None, made, *factors)

        items = [(made, part) for piece, made in pieces for part in parts(piece)]
        cpu.in_threads(work, items, sum(piece.weight.numel() for piece, _ in pieces))


def _checked(path: Path) -> Loops:
    found = Loops(ctypes.CDLL(str(path)))
    check(found, torch.device("cpu"), torch.equal)
    return found
