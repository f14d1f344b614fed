"""Operations of a selection on a chunk of weights or keys: loops in C on a CPU, else PyTorch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gap_ds.masks import bitmask, cpu

#: Bits of infinity in fp32.
INFINITY = 0x7F800000


class Passes(Protocol):
    """Operations on a chunk of weights or keys, as documented in `gap_ds.masks.cpu.Library`."""

    def magnitude_keys(self, weights: Tensor) -> Tensor: ...
    def count_keys_(self, counts: Tensor, keys: Tensor, shift: int, base: int) -> None: ...
    def keys_with(self, keys: Tensor, shift: int, prefix: int) -> Tensor: ...
    def pack_above(self, keys: Tensor, limit: int) -> Tensor: ...


class ByPyTorch:
    """The operations by PyTorch's own, on any device."""

    def magnitude_keys(self, weights: Tensor) -> Tensor:
        magnitude = weights.abs().view(torch.int32)
        # Only NaN lies above the bits of infinity; all ones is the key of a NaN. masked_fill would take three times as
        # long.
        is_nan = (INFINITY - magnitude).bitwise_right_shift_(31)
        return magnitude.bitwise_or_(is_nan)

    def count_keys_(self, counts: Tensor, keys: Tensor, shift: int, base: int) -> None:
        counts += torch.bincount((keys >> shift).sub_(base), minlength=counts.numel())

    def keys_with(self, keys: Tensor, shift: int, prefix: int) -> Tensor:
        return keys.index_select(0, (keys >> shift == prefix).nonzero()[:, 0])

    def pack_above(self, keys: Tensor, limit: int) -> Tensor:
        return bitmask.pack(keys > limit)


def passes_for(device: torch.device, numel: int) -> Passes:
    """The loops in C if they are available and the piece is large enough to load them; otherwise PyTorch."""
    if device.type == "cpu" and numel >= bitmask.COMPILED and (loops := cpu.library()) is not None:
        return loops
    return ByPyTorch()
