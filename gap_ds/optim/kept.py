"""Kept weights of masked pieces, as loops in C (`cpu`) and Triton kernels (`triton`) are given them to step over.

Both are `Steps`, and `check` compares either with torch.optim before its first use. N weights, n of them kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gap_ds.masks import bitmask

#: Kept weights in a chunk, whose packed values stay in a near cache; torch starts threads for more.
CHUNK = 1 << 15
#: Weights of a Triton program, a multiple of 8.
PROGRAM = 1024


@dataclass(frozen=True)
class Mask:
    """Bits of a piece of `numel` weights, of which `kept` are set, and where packed values begin in its parts."""

    bits: Tensor
    numel: int
    kept: int

    @functools.cached_property
    def chunks(self) -> list[tuple[int, int, int, int]]:
        """Parts with about equally many weights: (first weight, weights, first kept one, kept ones). On a CPU.

        >>> Mask(torch.tensor([0b101, 0b1], dtype=torch.uint8), 9, 3).chunks
        [(0, 9, 0, 3)]
        """
        size = max(64, -(-self.numel // (64 * max(1, -(-self.kept // CHUNK)))) * 64)
        starts = np.arange(0, max(self.numel, 1), size)
        counts = np.zeros(1, np.int64)
        if self.numel:
            counts = np.add.reduceat(np.bitwise_count(self.bits.numpy()).astype(np.int64), starts // 8)
        firsts = np.cumsum(counts) - counts
        return [
            (int(low), min(size, self.numel - int(low)), int(first), int(count))
            for low, first, count in zip(starts, firsts, counts, strict=True)
        ]

    @functools.cached_property
    def starts(self) -> Tensor:
        """Kept weights (programs,) before each program's part of PROGRAM weights, int64, on the device of the bits.

        >>> Mask(torch.full((PROGRAM // 4,), 0b11, dtype=torch.uint8), 2 * PROGRAM, PROGRAM // 2).starts.tolist()
        [0, 256]
        """
        row = PROGRAM // 8
        counts = _ones(self.bits.device)[self.bits.int()]
        counts = torch.nn.functional.pad(counts, (0, -len(counts) % row)).view(-1, row).sum(1)
        return counts.cumsum(0) - counts


@functools.cache
def _ones(device: torch.device) -> Tensor:
    """Number of ones (256,) in each byte."""
    return ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).sum(1).to(device)


@dataclass(frozen=True)
class Kept:
    """Kept weights of a piece: weight and gradient (N,), its mask, and packed moments (n,)."""

    weight: Tensor
    gradient: Tensor
    mask: Mask
    moments: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """The settings of torch.optim.AdamW that a step reads."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool


@dataclass(frozen=True, kw_only=True)
class SGDSettings:
    """The settings of torch.optim.SGD that a step reads."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


Settings = TypeVar("Settings", AdamWSettings, SGDSettings)


def of_group(settings: type[Settings], group: Mapping[str, Any]) -> Settings:
    """The settings that a step reads, from a parameter group."""
    return settings(**{field.name: group[field.name] for field in fields(settings)})


class Steps(Protocol):
    """Optimizer steps over pieces in fp32, contiguous and on one device. Nothing is checked."""

    def adamw(self, pieces: Sequence[tuple[Kept, float]], settings: AdamWSettings) -> None:
        """One step of AdamW. Moments of a piece are both moments, and with amsgrad the largest second one.

        Args:
            pieces: with the step that this one is, from 1 on.
        """

    def sgd(self, pieces: Sequence[tuple[Kept, bool]], settings: SGDSettings) -> None:
        """One step of SGD. A piece's one moment is its momentum buffer; without momentum there is none.

        Args:
            pieces: each with True if its buffer has values.
        """


def check(steps: Steps, device: torch.device, same: Callable[[Tensor, Tensor], bool]) -> None:
    """Compares steps with torch.optim on a small input.

    Args:
        same: whether what was computed is what torch computes.
    Raises:
        RuntimeError: it is not, or a pruned weight has changed.
    """
    random = np.random.default_rng(0)  # the caller may have set a default dtype or device of torch

    def normal() -> Tensor:
        return torch.from_numpy(random.standard_normal(3001, dtype=np.float32)).to(device)

    kept = torch.from_numpy(random.random(3001) < 0.4).to(device)
    mask = Mask(bitmask.pack(kept), 3001, int(kept.sum()))
    weight, gradient, first, second = normal(), normal(), normal(), normal().square()
    piece = Kept(weight.clone(), gradient, mask, (first[kept], second[kept]))
    rest: dict[str, Any] = {"lr": 0.0123, "weight_decay": 0.1, "maximize": True}

    def compare(name: str, made: Kept, wanted: Tensor, moments: Sequence[Tensor]) -> None:
        equal = same(made.weight[kept], wanted.detach()) and torch.equal(made.weight[~kept], weight[~kept])
        if not equal or not all(same(a, b) for a, b in zip(made.moments, moments, strict=True)):
            raise RuntimeError(f"{name} is not that of PyTorch")

    for betas, amsgrad in (((0.9, 0.999), False), ((0.4, 0.95), True)):
        wanted = torch.nn.Parameter(weight[kept])
        wanted.grad = gradient[kept]
        optimizer = torch.optim.AdamW([wanted], betas=betas, eps=1e-6, amsgrad=amsgrad, foreach=False, **rest)
        moments = first[kept], second[kept], *([second[kept].flip(0)] if amsgrad else [])
        names = "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])
        made = replace(piece, weight=weight.clone(), moments=tuple(moment.clone() for moment in moments))
        optimizer.state[wanted] = {"step": torch.tensor(4.0, device="cpu"), **dict(zip(names, moments, strict=True))}
        optimizer.step()
        steps.adamw([(made, 5.0)], AdamWSettings(betas=betas, eps=1e-6, **rest))
        compare("adamw", made, wanted, moments)
    for nesterov in (False, True):
        wanted = torch.nn.Parameter(weight[kept])
        wanted.grad = gradient[kept]
        dampening = 0.0 if nesterov else 0.3
        settings: dict[str, Any] = {"momentum": 0.9, "dampening": dampening, "nesterov": nesterov, **rest}
        descent = torch.optim.SGD([wanted], foreach=False, **settings)
        descent.state[wanted] = {"momentum_buffer": (buffer := first[kept])}
        descent.step()
        made = replace(piece, weight=weight.clone(), moments=(first[kept],))
        steps.sgd([(made, True)], of_group(SGDSettings, settings))
        compare("sgd", made, wanted, (buffer,))
