"""Weights of one tensor as mask bits and kept values; the compact form and the exchange between workers share it.

An entry of N weights becomes two tensors of a safetensors file: NAME.mask, one bit a weight, and NAME.values, the kept
weights in order. In a file wide dtypes come first, so that all tensors are aligned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.storage.safetensors import Layout

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parts(
    name: str, dtype: torch.dtype, shape: Sequence[int], kept: int | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Tensors that a file holds of a weight, with dtype and shape: mask and values, or with `kept=None` the weight.

    >>> list(parts("w", torch.float32, (3, 4), 5).items())
    [('w.mask', (torch.uint8, (2,))), ('w.values', (torch.float32, (5,)))]
    """
    if kept is None:
        return {name: (dtype, tuple(shape))}
    return {f"{name}.mask": (torch.uint8, (bitmask.nbytes(math.prod(shape)),)), f"{name}.values": (dtype, (kept,))}


def wide_first(layout: Layout) -> Layout:
    """Tensors in the order of their bytes in a file: wide dtypes first, otherwise in the order of `layout`.

    >>> list(wide_first(parts("w", torch.float32, (3, 4), 5)))
    ['w.values', 'w.mask']
    """
    return dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))


def words(weights: Tensor) -> Tensor:
    """The bits of the weights as integers (N,), on the CPU: 0 is +0.0 and nothing else."""
    return weights.detach().cpu().contiguous().view(-1).view(_WORDS[weights.dtype.itemsize])


def pack(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mask bits (ceil(N / 8),) and kept values (n,) of a tensor: all weights but +0.0 are kept, -0.0 and NaN too.

    >>> bits, values = pack(torch.tensor([0.0, 7.0, -0.0, 8.0]))
    >>> bits.tolist(), values.tolist()
    ([14], [7.0, -0.0, 8.0])
    """
    found = words(weights)
    kept = found != 0
    return bitmask.pack(kept), found[kept].view(weights.dtype)


def spread(values: Tensor, bits: Tensor, numel: int) -> Tensor:
    """The weights (N,) from their kept values and mask bits, on the CPU; pruned weights are +0.0.

    >>> spread(torch.tensor([7.0, 8.0]), torch.tensor([0b1010], dtype=torch.uint8), 5).tolist()
    [0.0, 7.0, 0.0, 8.0, 0.0]
    """
    found = torch.zeros(numel, dtype=_WORDS[values.dtype.itemsize], device="cpu")
    found.masked_scatter_(bitmask.unpack(bits, numel), words(values))
    return found.view(values.dtype)
