"""Masks as bits: one bit per weight of a sparse entry's local piece, none for a dense entry.

Bit i of a mask (bit i % 8 of byte i // 8, least significant first) is 1 if weight i of the piece is kept. The mask of a
piece of N weights is a uint8 tensor of (N + 7) // 8 bytes on the device of the weights. Unused bits of the last byte
are 0.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gap_ds.masks import cpu
from gap_ds.masks.box import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of weights that NumPy masks at a time, and of a mask that is counted at a time. The expanded mask of 1 MiB
#: stays in the caches; smaller blocks are slower, because memory is read fastest in long stretches.
_CPU_BLOCK = 1 << 20
#: Words, or pieces, on a CPU from which on the loops in C are used: fewer are not worth loading them.
COMPILED, _COMPILED_PIECES = 1 << 16, 64
#: Mask bytes that PyTorch handles at a time on an accelerator: larger blocks amortise the launches; the scratch memory
#: is eight words and an index per mask byte.
_DEVICE_BLOCK = 1 << 22

#: (words (N,) or weights (N,), their mask) pairs.
Pieces: TypeAlias = Sequence[tuple[Tensor, Tensor]]


class Masking(NamedTuple):
    """A call that sets the pruned words of some pieces to 0.

    lasting: True if it can be called again and again for as long as words and bits stay where they are, and may be
    kept: it has addresses and holds no tensors, or those of so few words that it does not matter.
    """

    run: Callable[[], None]
    lasting: bool


#: Prepares the masking of pieces on one device.
Way: TypeAlias = Callable[[Pieces], Masking]


def nbytes(numel: int) -> int:
    """Return the bytes of a mask of `numel` weights."""
    return (numel + 7) // 8


def pack(kept: Tensor) -> Tensor:
    """Return the bits of a bool tensor (N,).

    >>> pack(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist()
    [129, 1]
    """
    if kept.device.type == "cpu":
        return torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    padded = torch.zeros(nbytes(kept.numel()) * 8, dtype=torch.uint8, device=kept.device)
    padded[: kept.numel()] = kept
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def pack_parts(parts: Iterable[Tensor], numel: int, device: torch.device) -> Tensor:
    """Return the bits of bool tensors in a row, of `numel` elements together; only one of them is held at a time.

    >>> pack_parts(iter([torch.tensor([True, False, False]), torch.ones(7).bool()]), 10, torch.device("cpu")).tolist()
    [249, 3]
    """
    bits = torch.empty(nbytes(numel), dtype=torch.uint8, device=device)
    rest, done = torch.empty(0, dtype=torch.bool, device=device), 0
    for part in parts:
        joined = torch.cat([rest, part]) if rest.numel() else part
        whole = joined.numel() // 8
        bits[done : done + whole] = pack(joined[: 8 * whole])
        rest, done = joined[8 * whole :].clone(), done + whole
    if rest.numel():
        bits[done:] = pack(rest)
    return bits


def unpack(bits: Tensor, numel: int, start: int = 0) -> Tensor:
    """Return the bits start, start + 1, ... as a bool tensor (numel,).

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


def cut(bits: Tensor, box: Box, first_byte: int = 0) -> Tensor:
    """Return the mask of a box from the bits of the whole entry, of which `bits` are the bytes from `first_byte` on.

    >>> cut(torch.tensor([0b1101_0110], dtype=torch.uint8), Box.of((2, 4), (0, 1), (2, 2))).tolist()
    [11]
    """
    first = 8 * first_byte
    if box.is_range:
        return pack(unpack(bits, box.numel, start=box.start - first))
    found = torch.empty(nbytes(box.numel), dtype=torch.uint8, device=bits.device)
    for lo in range(0, box.numel, 8 * _CPU_BLOCK):
        at = box.indices(lo, min(lo + 8 * _CPU_BLOCK, box.numel), bits.device) - first
        found[lo // 8 : lo // 8 + _CPU_BLOCK] = pack(((bits[at >> 3] >> (at & 7).to(torch.uint8)) & 1).bool())
    return found


def count_before(bits: Tensor, indices: Tensor) -> Tensor:
    """Return for each index (N,) how many of the bits before it are set; `bits` are those of the whole entry.

    >>> count_before(torch.tensor([0b1101_0110, 1], dtype=torch.uint8), torch.tensor([0, 2, 8, 9])).tolist()
    [0, 1, 5, 6]
    """
    ones = torch.from_numpy(np.bitwise_count(bits.cpu().numpy())).to(torch.int64)
    before = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), ones.cumsum(0)])
    byte, rest = indices >> 3, (indices & 7).to(torch.uint8)
    part = torch.cat([bits.cpu(), torch.zeros(1, dtype=torch.uint8, device="cpu")])[byte] & ((1 << rest) - 1)
    return before[byte] + torch.from_numpy(np.bitwise_count(part.numpy())).to(torch.int64)


def count(bits: Tensor) -> int:
    """Return the number of kept weights."""
    if bits.device.type == "cpu":
        return int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64))
    return int(ones(bits).sum())


def ones(bytes_: Tensor) -> Tensor:
    """Return how many bits of each byte (N,) are set, in PyTorch alone: for a device, with a byte of memory for each.

    >>> ones(torch.tensor([0, 1, 0b1101_0110, 255], dtype=torch.uint8)).tolist()
    [0, 1, 5, 8]
    """
    found = bytes_ - ((bytes_ >> 1) & 0x55)
    found = (found & 0x33) + ((found >> 2) & 0x33)
    return (found + (found >> 4)) & 0x0F


def count_revived(piece: Tensor, bits: Tensor) -> int:
    """Return the number of pruned weights of a piece (N,) that are not 0; a NaN is not 0.

    >>> count_revived(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1], dtype=torch.uint8))
    1
    """
    return count_revived_all([(piece, bits)])[0]


def count_revived_all(pieces: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    """Return `count_revived` of many pieces, each with its mask. The host waits once for each device."""
    listed = list(pieces)
    host = [e for e, (piece, _) in enumerate(listed) if _is_host(piece)]
    found: dict[int, int | Tensor] = {}
    if (count_all := _counting([listed[e] for e in host])) is not None:
        found.update(zip(host, count_all(), strict=True))
    counts = [found[e] if e in found else _count_revived(*piece) for e, piece in enumerate(listed)]
    if waiting := [count for count in counts if isinstance(count, Tensor)]:
        read = iter(on_host(waiting).tolist())
        return [next(read) if isinstance(count, Tensor) else count for count in counts]
    return [int(count) for count in counts]


def on_host(numbers: Sequence[Tensor]) -> Tensor:
    """Return integers (), which may be on several devices, as one tensor. The host waits once for each device."""
    found = torch.zeros(len(numbers), dtype=torch.int64, device="cpu")
    for device in dict.fromkeys(number.device for number in numbers):
        there = [i for i, number in enumerate(numbers) if number.device == device]
        found[there] = torch.stack([numbers[i] for i in there]).cpu()
    return found


def count_revived_later(pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], int] | None:
    """Return the sum of `count_revived_all` of these pieces as a call; None if that would hold their memory or wait.

    The call is valid for as long as all weights and bits stay where they are.
    """
    if not all(_is_host(piece) and bits.device == piece.device for piece, bits in pieces):
        return None
    if (count_all := _counting(pieces)) is not None:
        return lambda: sum(count_all())
    return (lambda: sum(count_revived_all(pieces))) if _few(pieces) else None


def _counting(pieces: Pieces) -> Callable[[], Sequence[int]] | None:
    """Counts of the revived weights of pieces on the host as a call, if the loops in C are used for them."""
    words = [(piece.view(_WORD[piece.element_size()]), bits) for piece, bits in pieces]
    loops = _loops(words)
    return None if loops is None else loops.count_revived_all(words)


def _count_revived(piece: Tensor, bits: Tensor) -> int | Tensor:
    on_cpu = piece.device.type == "cpu"
    found: int | Tensor = 0 if on_cpu else torch.zeros((), dtype=torch.int64, device=piece.device)
    for lo in range(0, piece.numel(), 8 * _CPU_BLOCK):
        part = piece[lo : lo + 8 * _CPU_BLOCK]
        if on_cpu:
            found += count(pack(part != 0) & ~bits[lo // 8 : lo // 8 + nbytes(part.numel())])
        else:
            found += ((part != 0) & ~unpack(bits, part.numel(), lo)).sum()
    return found


def zero_pruned_(piece: Tensor, bits: Tensor) -> None:
    """Set the pruned weights of a piece (N,) to +0.0, in place and without a full-size copy of the mask.

    Kept weights keep every bit. A pruned weight becomes exactly +0.0 even if it was infinite, NaN or negative.
    """
    zero_pruned_all_([(piece, bits)])


def zero_pruned_all_(pieces: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Apply `zero_pruned_` to many pieces, each with its mask.

    On a CPU a mask is expanded into words of all ones or all zeros, which are combined with the weights by a bitwise
    and: in registers, by one call for all pieces, if there is a compiler (`cpu`), otherwise block by block in the
    cache. On a GPU with triton one kernel for all pieces writes the zeros and touches nothing else (`triton`). The host
    never waits for the device, except at the first call, which tests the kernel.
    """
    for masking in _maskings(pieces):
        masking.run()


def zero_pruned_later(pieces: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], None] | None:
    """Return `zero_pruned_all_` of these pieces as a call without arguments, or None if it would hold their memory.

    The call is valid for as long as all weights and bits stay where they are.
    """
    maskings = _maskings(pieces)
    if not all(masking.lasting for masking in maskings):
        return None
    runs = [masking.run for masking in maskings]

    def run() -> None:
        for each in runs:
            each()

    return runs[0] if len(runs) == 1 else run


def _maskings(pieces: Iterable[tuple[Tensor, Tensor]]) -> list[Masking]:
    """The masking of all pieces: one for each way, of which a GPU has one for each size of words."""
    alike: dict[Way, list[tuple[Tensor, Tensor]]] = {}
    for piece, bits in pieces:
        assert piece.dim() == 1 and piece.is_contiguous() and piece.device == bits.device
        assert bits.numel() == nbytes(piece.numel())
        words = piece.view(_WORD[piece.element_size()])
        alike.setdefault(_way(piece.device, piece.element_size()), []).append((words, bits))
    return [way(group) for way, group in alike.items()]


@functools.cache
def _way(device: torch.device, element_size: int) -> Way:
    """The implementation for words of this size on this device. All give the same bits."""
    if device.type == "cpu":
        return _on_cpu
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return _kernel(device, element_size) or _by_pytorch_all
    return _by_pytorch_all


def _is_host(piece: Tensor) -> bool:
    """True for a piece whose words the loops in C can read."""
    return piece.device.type == "cpu" and piece.element_size() in _WORD


def _loops(pieces: Pieces) -> cpu.Library | None:
    """The loops in C if they are loaded, or worth it for these pieces, and can be."""
    if len(pieces) < _COMPILED_PIECES and _few(pieces) and not cpu.library.cache_info().currsize:
        return None
    return cpu.library()


def _few(pieces: Pieces) -> bool:
    return sum(words.numel() for words, _ in pieces) < COMPILED


def _on_cpu(pieces: Pieces) -> Masking:
    if (loops := _loops(pieces)) is not None:
        return Masking(loops.zero_pruned_all(pieces), lasting=True)
    return Masking(lambda: _one_by_one(_by_numpy, pieces), lasting=_few(pieces))


def _by_pytorch_all(pieces: Pieces) -> Masking:
    return Masking(lambda: _one_by_one(_by_pytorch, pieces), lasting=_few(pieces))


def _one_by_one(zero: Callable[[Tensor, Tensor], None], pieces: Pieces) -> None:
    for words, bits in pieces:
        zero(words, bits)


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
        # No index is outside the table. With the mode "raise" NumPy would not write straight to `out`.
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
    """Triton's kernel if it compiles and agrees with PyTorch on this device; otherwise None, with a warning."""
    try:
        kernels = importlib.import_module("gap_ds.masks.triton")
        words = torch.arange(1, 20_001, dtype=_WORD[element_size], device=device)
        parts = [slice(1, 10_000), slice(10_000, 10_000), slice(10_001, 10_006), slice(10_008, 20_000)]
        bits = [pack(words[part] % 3 == 0) for part in parts]
        expected = words.clone()
        for part, mask in zip(parts, bits, strict=True):
            _by_pytorch(expected[part], mask)
        way: Callable[[Pieces], Callable[[], None]] = kernels.zero_pruned_all
        way([(words[part], mask) for part, mask in zip(parts, bits, strict=True)])()
        if not torch.equal(words, expected):
            raise RuntimeError("its results differ from PyTorch's")
    except Exception as error:  # compilers fail in many ways, and PyTorch can take over
        warnings.warn(f"triton's kernel is not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return lambda pieces: Masking(way(pieces), lasting=True)


class _Scratch(threading.local):
    """Scratch memory of `_by_numpy`, one per thread, kept between calls because fresh memory is slow to write."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}

    def room(self, element_size: int, block: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """For at least `block` mask bytes: an index, words (block, 8), and their view with each row as one item."""
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
    """The table for NumPy, and a view of it with each row as one item, which NumPy copies at once."""
    table = _table(element_size, torch.device("cpu")).numpy()
    return table, table.view(f"V{8 * element_size}")[:, 0]


@functools.cache
def _table(element_size: int, device: torch.device) -> Tensor:
    """(256, 8): for each mask byte a word per weight, -1 (all ones) if the weight is kept, else 0."""
    kept = (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1
    return (-kept).to(_WORD[element_size]).contiguous().to(device)
