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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gap_ds.masks import bitmask, cpu

SOURCE = Path(__file__).with_name("kept.c")
#: Kept weights in a chunk, whose packed values stay in a near cache; torch starts threads for more.
_CHUNK = 1 << 15


@functools.cache
def loops() -> Loops | None:
    """The compiled loops; None if they cannot be used."""
    return cpu.compiled(SOURCE, _checked, ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"])


@dataclass(frozen=True)
class Kept:
    """Kept weights of a piece: weight and gradient (N,), bits, and packed moments (n,).

    chunks: (first weight, weights, first kept one, kept ones) of its parts, as `chunks` returns them.
    """

    weight: Tensor
    gradient: Tensor
    bits: Tensor
    chunks: Sequence[tuple[int, int, int, int]]
    moments: tuple[Tensor, ...]

    def parts(self) -> Iterator[tuple[list[int], int, int, int]]:
        """For each chunk with kept weights: where it is in (N,) and in packed tensors, weights, first kept, kept.

        Places are addresses in weight, gradient, bits, moments, in this order.
        """
        whole = self.weight.data_ptr(), self.gradient.data_ptr()
        packed = [moment.data_ptr() for moment in self.moments]
        for low, numel, first, kept in self.chunks:
            if kept:
                places = [address + 4 * low for address in whole] + [self.bits.data_ptr() + low // 8]
                yield [*places, *(address + 4 * first for address in packed)], numel, first, kept


def chunks(bits: Tensor, numel: int, kept: int) -> list[tuple[int, int, int, int]]:
    """Parts of a piece with about equally many weights: (first weight, weights, first kept one, kept ones).

    >>> chunks(torch.tensor([0b101, 0b1], dtype=torch.uint8), 9, 3)
    [(0, 9, 0, 3)]
    """
    size = max(64, -(-numel // (64 * max(1, -(-kept // _CHUNK)))) * 64)
    starts = np.arange(0, max(numel, 1), size)
    counts = (
        np.add.reduceat(np.bitwise_count(bits.numpy()).astype(np.int64), starts // 8) if numel else np.zeros(1, int)
    )
    firsts = np.cumsum(counts) - counts
    return [
        (int(low), min(size, numel - int(low)), int(first), int(count))
        for low, first, count in zip(starts, firsts, counts, strict=True)
    ]


class Loops:
    """The loops. Nothing is checked: tensors must be contiguous, fp32 and on the CPU."""

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

    def adamw(
        self,
        pieces: Sequence[tuple[Kept, float]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """One step of AdamW. Moments of a piece are both moments, and with amsgrad the largest second one.

        Args:
            pieces: with the step that this one is, from 1 on.
        """
        beta1, beta2 = betas
        numbers = -1.0 if maximize else 1.0, 1 - beta1, beta2, 1 - beta2

        def work(item: tuple[Kept, float, tuple[list[int], int, int, int]]) -> None:
            piece, step, ((weight, gradient, bits, *packed), numel, first, kept) = item
            at, room = self._room(kept)
            self._moments(gradient, bits, numel, *numbers, *packed[:2], at.data_ptr())
            second = piece.moments[-1][first : first + kept]
            if len(packed) > 2:
                torch.maximum(second, piece.moments[1][first : first + kept], out=second)
            root = torch.sqrt(second, out=room[:kept])
            size, correction = -(lr / (1 - beta1**step)), (1 - beta2**step) ** 0.5
            self._weights(
                weight, at.data_ptr(), kept, packed[0], root.data_ptr(), 1 - lr * weight_decay, size, correction, eps
            )

        items = [(piece, step, part) for piece, step in pieces for part in piece.parts()]
        cpu.in_threads(work, items, sum(piece.weight.numel() for piece, _ in pieces))

    def _room(self, kept: int) -> tuple[Tensor, Tensor]:
        """Memory of this thread for positions and roots, left from call to call: fresh memory is slow to write."""
        found: tuple[Tensor, Tensor] | None = getattr(self._scratch, "room", None)
        if found is None or found[1].numel() < kept:
            at = torch.empty(kept + 7, dtype=torch.int32, device="cpu")
            found = self._scratch.room = at, torch.empty(kept, dtype=torch.float32, device="cpu")
        return found

    def sgd(
        self,
        pieces: Sequence[tuple[Kept, bool]],
        *,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
    ) -> None:
        """One step of SGD. A piece's one moment is its momentum buffer; without momentum there is none.

        Args:
            pieces: each with True if its buffer has values.
        """
        factors = -1.0 if maximize else 1.0, weight_decay, momentum, 1 - dampening, nesterov, -lr

        def work(item: tuple[bool, tuple[list[int], int, int, int]]) -> None:
            made, ((weight, gradient, bits, *packed), numel, _, _) = item
            self._sgd(weight, gradient, bits, numel, packed[0] if packed else None, made, *factors)

        items = [(made, part) for piece, made in pieces for part in piece.parts()]
        cpu.in_threads(work, items, sum(piece.weight.numel() for piece, _ in pieces))


def _checked(path: Path) -> Loops:
    found = Loops(ctypes.CDLL(str(path)))
    _check(found)
    return found


def _check(found: Loops) -> None:
    """Compares the loops with torch.optim on a small input; RuntimeError if a bit differs."""
    random = np.random.default_rng(0)  # the caller may have set a default dtype or device of torch

    def normal() -> Tensor:
        return torch.from_numpy(random.standard_normal(3001, dtype=np.float32))

    kept = torch.from_numpy(random.random(3001) < 0.4)
    bits, number = bitmask.pack(kept), int(kept.sum())
    weight, gradient, first, second = normal(), normal(), normal(), normal().square()
    piece = Kept(weight.clone(), gradient, bits, chunks(bits, 3001, number), (first[kept], second[kept]))
    rest: dict[str, Any] = {"lr": 0.0123, "weight_decay": 0.1, "maximize": True}
    for betas in ((0.9, 0.999), (0.4, 0.95)):
        wanted = torch.nn.Parameter(weight[kept])
        wanted.grad = gradient[kept]
        optimizer = torch.optim.AdamW([wanted], betas=betas, eps=1e-6, foreach=False, **rest)
        moments = first[kept], second[kept]
        optimizer.state[wanted] = {"step": torch.tensor(4.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        optimizer.step()
        made = replace(piece, weight=weight.clone(), moments=(first[kept], second[kept]))
        found.adamw([(made, 5.0)], betas=betas, eps=1e-6, **rest)
        _compare("adamw", made, weight, kept, wanted, moments)
    for nesterov in (False, True):
        wanted = torch.nn.Parameter(weight[kept])
        wanted.grad = gradient[kept]
        settings: dict[str, Any] = {
            "momentum": 0.9,
            "dampening": 0.0 if nesterov else 0.3,
            "nesterov": nesterov,
            **rest,
        }
        descent = torch.optim.SGD([wanted], foreach=False, **settings)
        descent.state[wanted] = {"momentum_buffer": (buffer := first[kept])}
        descent.step()
        made = replace(piece, weight=weight.clone(), moments=(first[kept],))
        found.sgd([(made, True)], **settings)
        _compare("sgd", made, weight, kept, wanted, (buffer,))


def _compare(name: str, made: Kept, before: Tensor, kept: Tensor, wanted: Tensor, moments: Sequence[Tensor]) -> None:
    equal = torch.equal(made.weight[kept], wanted.detach()) and torch.equal(made.weight[~kept], before[~kept])
    if not equal or not all(torch.equal(a, b) for a, b in zip(made.moments, moments, strict=True)):
        raise RuntimeError(f"{name} is not that of PyTorch")
