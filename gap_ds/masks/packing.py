"""Kept values of a piece, packed in the order of the mask's bits: N weights, n of them kept.

The host never waits for the device: the number of kept weights is an argument, or the length of the packed values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gap_ds.masks import bitmask


def places(bits: Tensor, numel: int, kept: int) -> Tensor:
    """The positions (n,) of the kept weights, ascending.

    >>> places(torch.tensor([0b1010], dtype=torch.uint8), 4, 2).tolist()
    [1, 3]
    """
    return torch.nonzero_static(bitmask.unpack(bits, numel), size=kept).view(-1)


def gather(values: Tensor, bits: Tensor, kept: int) -> Tensor:
    """The kept ones (n,) of values (N,).

    >>> gather(torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([0b1010], dtype=torch.uint8), 2).tolist()
    [6.0, 8.0]
    """
    return values[places(bits, values.numel(), kept)]


def scatter_(values: Tensor, bits: Tensor, packed: Tensor) -> None:
    """Sets the kept ones of values (N,) to packed values (n,), in place."""
    values[places(bits, values.numel(), packed.numel())] = packed


def spread(packed: Tensor, bits: Tensor, numel: int, fill: float = 0.0) -> Tensor:
    """Values (N,) whose kept ones are packed values (n,), and whose others have one value.

    >>> spread(torch.tensor([6.0, 8.0]), torch.tensor([0b1010], dtype=torch.uint8), 4, fill=1.0).tolist()
    [1.0, 6.0, 1.0, 8.0]
    """
    values = torch.full((numel,), fill, dtype=packed.dtype, device=packed.device)
    scatter_(values, bits, packed)
    return values
