"""Masks as bits: one bit per weight of a sparse entry's local piece, none for a dense entry.

Bit i of a mask (bit i % 8 of byte i // 8, least significant first) says whether weight i of the piece is kept. N is the
number of weights of a piece; its mask is a uint8 tensor of (N + 7) // 8 bytes on the device of the weights, with the
unused bits of the last byte at zero.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

#: Mask bytes handled at a time. The expanded mask of 8 * 32768 weights (1 MiB) stays in a core's cache; smaller blocks
#: are slower, because memory is read fastest in long stretches.
_CPU_BLOCK = 32768
#: On an accelerator larger blocks amortise the launches; the scratch is 8 * 4 bytes per mask byte.
_DEVICE_BLOCK = 1 << 22


def nbytes(numel: int) -> int:
    """Bytes of the mask of `numel` weights."""
    return (numel + 7) // 8


def pack(kept: Tensor) -> Tensor:
    """Bits of a bool tensor (N,).

    >>> pack(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist()
    [129, 1]
    """
    if kept.device.type == "cpu":
        return torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    padded = torch.zeros(nbytes(kept.numel()) * 8, dtype=torch.uint8, device=kept.device)
    padded[: kept.numel()] = kept
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, numel: int, start: int = 0) -> Tensor:
    """Bool tensor (numel,) of the bits start, start + 1, ...

    >>> unpack(torch.tensor([129, 1], dtype=torch.uint8), 3, start=6).tolist()
    [False, True, True]
    """
    first, last = start // 8, nbytes(start + numel)
    rows = bits[first:last]
    if bits.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(rows.numpy(), bitorder="little")).view(torch.bool)
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        flat = ((rows[:, None] >> shifts) & 1).bool().view(-1)
    return flat[start - 8 * first : start - 8 * first + numel]


def count(bits: Tensor) -> int:
    """Number of kept weights."""
    if bits.device.type == "cpu":
        return int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64))
    return int(unpack(bits, bits.numel() * 8).sum())


def zero_pruned_(piece: Tensor, bits: Tensor) -> None:
    """Sets the pruned weights of a piece (N,) to +0.0, in place and without a full-size copy of the mask.

    The mask is expanded block by block into words of all ones or all zeros and combined by a bitwise and: kept weights
    do not change in any bit, and a pruned weight is exactly +0.0 even if it was infinite, NaN or negative. On a GPU
    with triton a kernel writes the zeros and leaves all else alone (`gap_ds.kernels`).
    """
    assert piece.dim() == 1 and piece.is_contiguous() and bits.numel() == nbytes(piece.numel())
    words = piece.view(_WORD[piece.element_size()])
    whole = piece.numel() // 8
    if piece.device.type == "cpu":
        # One item of the table is the eight words of a mask byte: NumPy copies it whole.
        table = _table(piece.element_size(), "cpu").numpy().view(f"V{8 * piece.element_size()}")[:, 0]
        rows, mask = words[: 8 * whole].view(-1, 8).numpy(), bits.numpy()
        index = np.empty(min(whole, _CPU_BLOCK), dtype=np.intp)
        expanded = np.empty(len(index), dtype=table.dtype)
        for lo in range(0, whole, _CPU_BLOCK):
            block = rows[lo : lo + _CPU_BLOCK]
            index[: len(block)] = mask[lo : lo + len(block)]
            # Every index is in the table. Only with a mode other than "raise" does NumPy write straight into `out`.
            table.take(index[: len(block)], out=expanded[: len(block)], mode="clip")
            np.bitwise_and(block, expanded[: len(block)].view(block.dtype).reshape(block.shape), out=block)
    elif (kernels := _kernels(piece.device)) is not None:
        kernels.zero_pruned_(words, bits)
        return
    else:
        on_device = _table(piece.element_size(), str(piece.device))
        view = words[: 8 * whole].view(-1, 8)
        for lo in range(0, whole, _DEVICE_BLOCK):
            view[lo : lo + _DEVICE_BLOCK] &= on_device[bits[lo : min(lo + _DEVICE_BLOCK, whole)].int()]
    if tail := piece.numel() - 8 * whole:
        piece[8 * whole :].masked_fill_(~unpack(bits[whole:], tail), 0.0)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """`gap_ds.kernels`, where triton is installed and its kernel does on this GPU what PyTorch does."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("gap_ds.kernels")
        words = torch.arange(1, 10_008, dtype=torch.int32, device=device)
        kept = words % 3 == 0
        expected = words * kept
        kernels.zero_pruned_(words, pack(kept))
        if not torch.equal(words, expected):
            raise RuntimeError("it writes other words than PyTorch")
    except Exception as error:  # compilers fail in many ways, and PyTorch does the same
        warnings.warn(f"triton's kernel is not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return kernels


_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def _table(element_size: int, device: str) -> Tensor:
    """(256, 8): for each mask byte, a word per weight: -1 (all ones) where the weight is kept, 0 elsewhere."""
    kept = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (-kept).to(_WORD[element_size]).contiguous().to(device)
