"""Masks as bits: one bit per weight of a sparse entry's local piece, none for a dense entry.

Bit i of a mask (bit i % 8 of byte i // 8, least significant first) says whether weight i of the piece is kept. N is the
number of weights of a piece; its mask is a uint8 tensor of (N + 7) // 8 bytes on the device of the weights, with the
unused bits of the last byte at zero.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gap_ds.masks import cpu

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of weights handled at a time on a CPU. The 1 MiB of words to which their mask is expanded stays in the caches;
#: smaller blocks are slower, because memory is read fastest in long stretches.
_CPU_BLOCK = 1 << 20
#: Words of a piece on a CPU from which on it is worth compiling a loop, once in a process.
COMPILED = 1 << 16
#: Mask bytes handled at a time by PyTorch on an accelerator: larger blocks amortise the launches; the scratch is eight
#: words per mask byte, and its index.
_DEVICE_BLOCK = 1 << 22

#: Zeroes the pruned words of pieces (N,) on one device, all of one size, each with its mask.
Way: TypeAlias = Callable[[Sequence[tuple[Tensor, Tensor]]], None]


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


def count_revived(piece: Tensor, bits: Tensor) -> int:
    """Number of pruned weights of a piece (N,) that are not 0; a NaN is not 0.

    >>> count_revived(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1], dtype=torch.uint8))
    1
    """
    found = 0
    for lo in range(0, piece.numel(), 8 * _CPU_BLOCK):
        part = piece[lo : lo + 8 * _CPU_BLOCK]
        found += count(pack(part != 0) & ~bits[lo // 8 : lo // 8 + nbytes(part.numel())])
    return found


def zero_pruned_(piece: Tensor, bits: Tensor) -> None:
    """Sets the pruned weights of a piece (N,) to +0.0, in place and without a full-size copy of the mask.

    Kept weights do not change in any bit, and a pruned weight is exactly +0.0 even if it was infinite, NaN or negative.
    """
    zero_pruned_all_([(piece, bits)])


def zero_pruned_all_(pieces: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Does `zero_pruned_` to many pieces, each with its mask.

    A mask is expanded block by block into words of all ones or all zeros and combined by a bitwise and: on a CPU in
    registers, where there is a compiler (cpu.py), else in the cache. On a GPU with triton one kernel for all
    pieces writes the zeros and leaves all else alone (triton.py). Nothing waits for the device, but that the
    kernel is tried out at the first call.
    """
    alike: dict[tuple[torch.device, int], list[tuple[Tensor, Tensor]]] = {}
    for piece, bits in pieces:
        assert piece.dim() == 1 and piece.is_contiguous() and piece.device == bits.device
        assert bits.numel() == nbytes(piece.numel())
        words = piece.view(_WORD[piece.element_size()])
        alike.setdefault((piece.device, piece.element_size()), []).append((words, bits))
    for (device, element_size), group in alike.items():
        _way(device, element_size)(group)


@functools.cache
def _way(device: torch.device, element_size: int) -> Way:
    """How words of this size are zeroed on this device: by NumPy, by triton's kernel or by PyTorch, all alike."""
    if device.type == "cpu":
        return _one_by_one(_on_cpu)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return _kernel(device, element_size) or _one_by_one(_by_pytorch)
    return _one_by_one(_by_pytorch)


def _one_by_one(zero: Callable[[Tensor, Tensor], None]) -> Way:
    def zero_all(pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
        for words, bits in pieces:
            zero(words, bits)

    return zero_all


def _on_cpu(words: Tensor, bits: Tensor) -> None:
    # Small pieces are not worth a compiler's half second.
    if words.numel() >= COMPILED and (loops := cpu.library()) is not None:
        loops.zero_pruned_(words, bits)
    else:
        _by_numpy(words, bits)


def _by_numpy(words: Tensor, bits: Tensor) -> None:
    element_size = words.element_size()
    table, items = _host_table(element_size)
    flat, mask = words.numpy(), bits.numpy()
    whole, length = len(flat) // 8, _CPU_BLOCK // (8 * element_size)
    rows = flat[: 8 * whole].reshape(-1, 8)
    index, expanded, copied = _scratch.room(element_size, min(whole, length))
    for lo in range(0, whole, length):
        block = rows[lo : lo + length]
        if len(block) < len(index):
            index, expanded, copied = index[: len(block)], expanded[: len(block)], copied[: len(block)]
        index[:] = mask[lo : lo + len(block)]
        # Every index is in the table. Only with a mode other than "raise" does NumPy write straight into `out`.
        items.take(index, out=copied, mode="clip")
        np.bitwise_and(block, expanded, out=block)
    if len(rest := flat[8 * whole :]):
        np.bitwise_and(rest, table[mask[whole], : len(rest)], out=rest)


def _by_pytorch(words: Tensor, bits: Tensor) -> None:
    table = _table(words.element_size(), words.device)
    whole = words.numel() // 8
    rows = words[: 8 * whole].view(-1, 8)
    for lo in range(0, whole, _DEVICE_BLOCK):
        rows[lo : lo + _DEVICE_BLOCK].bitwise_and_(table[bits[lo : min(lo + _DEVICE_BLOCK, whole)].int()])
    if tail := words.numel() - 8 * whole:
        words[8 * whole :].bitwise_and_(table[bits[whole:].int(), :tail].view(-1))


def _kernel(device: torch.device, element_size: int) -> Way | None:
    """Triton's kernel, if it compiles and does on this device what PyTorch does; else None, with a warning."""
    try:
        kernels = importlib.import_module("gap_ds.masks.triton")
        words = torch.arange(1, 20_001, dtype=_WORD[element_size], device=device)
        parts = [slice(1, 10_000), slice(10_000, 10_000), slice(10_001, 10_006), slice(10_008, 20_000)]
        bits = [pack(words[part] % 3 == 0) for part in parts]
        expected = words.clone()
        for part, mask in zip(parts, bits, strict=True):
            _by_pytorch(expected[part], mask)
        way: Way = kernels.zero_pruned_
        way([(words[part], mask) for part, mask in zip(parts, bits, strict=True)])
        if not torch.equal(words, expected):
            raise RuntimeError("it writes other words than PyTorch")
    except Exception as error:  # compilers fail in many ways, and PyTorch does the same
        warnings.warn(f"triton's kernel is not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return way


class _Scratch(threading.local):
    """What `_by_numpy` expands masks into, kept by each thread: memory that is new at every call is slow to write."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}

    def room(self, element_size: int, block: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """For at least `block` mask bytes: an index, words (block, 8), and these again with each row as one item."""
        kept = self._of.get(element_size)
        if kept is None or len(kept[0]) < block:
            words = np.empty((block, 8), dtype=f"i{element_size}")
            kept = np.empty(block, dtype=np.intp), words, words.view(f"V{8 * element_size}")[:, 0]
            self._of[element_size] = kept
        return kept


_scratch = _Scratch()

_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def _host_table(element_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The table for NumPy, and again with the eight words of a mask byte as one item, which NumPy copies whole."""
    table = _table(element_size, torch.device("cpu")).numpy()
    return table, table.view(f"V{8 * element_size}")[:, 0]


@functools.cache
def _table(element_size: int, device: torch.device) -> Tensor:
    """(256, 8): for each mask byte, a word per weight: -1 (all ones) where the weight is kept, 0 elsewhere."""
    kept = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (-kept).to(_WORD[element_size]).contiguous().to(device)
