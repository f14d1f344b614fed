"""Counts of a selection on an accelerator: the histograms of all pieces, summed there, and read by the host at once.

The host never waits while it counts: a pass launches its work for all pieces, and `Tally.read` is its one transfer. On
a GPU with triton a fused kernel reads the weights, forms their keys and counts them (`triton`), with one launch for all
pieces of a dtype; elsewhere PyTorch does it by chunks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from gap_ds.masks.passes import ByPyTorch

#: Weights that PyTorch counts at a time; each needs about 40 bytes of scratch memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Part:
    """Values (N,) on the device that a pass counts: weights, whose keys are magnitudes, or keys of int32 or int64.

    base: where the first of the bins lies in the tally. prefix: what the bits of a key before the counted ones must be.
    invalid: where keys below 0 and NaN are counted; None: they are not.
    """

    values: Tensor
    base: int
    prefix: int = 0
    invalid: int | None = None


#: Adds the keys of some parts to counts, by their bits from `shift` on, (counts, parts, shift, bins).
Count: TypeAlias = Callable[[Tensor, Sequence[Part], int, int], None]


class Tally:
    """Counts (size,) int64 on one device."""

    def __init__(self, size: int, device: torch.device) -> None:
        # The last one takes what is not counted, which no operation leaves out without waiting for the device.
        self._counts = torch.zeros(size + 1, dtype=torch.int64, device=device)

    def add(self, at: Tensor, counted: Tensor) -> None:
        """Adds 1 to the counts at some places (N,), of those that are counted (N,)."""
        _add(self._counts, at, counted)

    def count(self, parts: Sequence[Part], shift: int, bins: int) -> None:
        """Counts every key with the prefix of its part by its next bits, which have `bins` values."""
        device = self._counts.device
        fused = [part for part in parts if part.values.dtype in _FUSED and part.values.numel()]
        others = [part for part in parts if part.values.dtype not in _FUSED and part.values.numel()]
        if fused:
            _way(device)(self._counts, fused, shift, bins)
        if others:
            count_by_pytorch(self._counts, others, shift, bins)

    def read(self) -> Tensor:
        """The counts on the host."""
        return self._counts[:-1].cpu()


#: Dtypes that the kernel counts.
_FUSED = (torch.float32, torch.bfloat16, torch.float16, torch.int32)


def count_by_pytorch(counts: Tensor, parts: Sequence[Part], shift: int, bins: int) -> None:
    """`Tally.count` by PyTorch's operations; `counts` ends with one that takes what is not counted."""
    for part in parts:
        for values in torch.split(part.values, _CHUNK):
            keys = ByPyTorch().magnitude_keys(values.float()) if values.is_floating_point() else values
            valid = keys >= 0
            at = (keys >> shift).to(torch.int64) - part.prefix * bins
            _add(counts, at + part.base, valid & (at >= 0) & (at < bins))
            if part.invalid is not None:
                counts[part.invalid] += (~valid).sum()


def _add(counts: Tensor, at: Tensor, counted: Tensor) -> None:
    places = torch.where(counted, at, counts.numel() - 1)
    counts.scatter_add_(0, places, torch.ones_like(places))


@functools.cache
def _way(device: torch.device) -> Count:
    """The implementation on this device. All count the same."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return kernel(device) or count_by_pytorch
    return count_by_pytorch


def kernel(device: torch.device) -> Count | None:
    """Triton's kernel if it compiles and agrees with PyTorch on this device; otherwise None, with a warning."""
    try:
        kernels = importlib.import_module("gap_ds.masks.triton")
        count: Count = kernels.count_keys
        weights = torch.arange(-5_000, 5_000, device=device).float().sinh_()
        weights[::97] = float("nan")
        for shift, bins, prefix in ((20, 2048, 0), (10, 1024, 1000)):
            parts = [
                Part(weights, 0, prefix, 4096),
                Part(weights[3:].bfloat16(), bins, prefix, 4097),
                Part(ByPyTorch().magnitude_keys(weights[:999]), 0, prefix, 4098),
            ]
            found, expected = (torch.zeros(4100, dtype=torch.int64, device=device) for _ in range(2))
            count(found, parts, shift, bins)
            count_by_pytorch(expected, parts, shift, bins)
            if not torch.equal(found[:-1], expected[:-1]):
                raise RuntimeError("its counts differ from PyTorch's")
    except Exception as error:  # compilers fail in many ways, and PyTorch can take over
        warnings.warn(f"triton's counting is not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return count
