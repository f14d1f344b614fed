"""Loops in C for a CPU, compiled at their first use: masks, the passes of a selection, and sparse products.

`library()` has them, or is None where there is no compiler (`CC`, or cc, gcc, clang), where what it made does not
compute what PyTorch computes, or where the environment says `GAP_DS_NATIVE=0`. Whoever calls it has a way without:
NumPy for masks, PyTorch for selections, MKL for products. Compiling takes half a second and leaves nothing behind:
what is loaded is made for this very processor, so another machine must not find it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
#: Rows of activations that are multiplied at once: each weight is read for all of them, and meets a row of x^T, which
#: has to come from a near cache. As many as fit these bytes, but no fewer nor more than these.
_CACHED, _ROWS = 2**18, (32, 64)
#: Multiplications, or words of a mask, from which on work is worth other threads.
_SHARED = 2**20
_FLAGS = ["-O3", "-fopenmp-simd", "-shared", "-fPIC", "-std=gnu11"]
_WIDTHS = (1, 4, 8, 16, 32, 48, 64)

_log = logging.getLogger(__name__)


@functools.cache
def library() -> Library | None:
    """The compiled loops; None, once and for all in this process, where they cannot be had."""
    if os.environ.get("GAP_DS_NATIVE") == "0":
        return None
    command = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not command:
        _log.info("no C compiler (CC): masks, selections and sparse products take NumPy, PyTorch and MKL.")
        return None
    try:
        made = Library(_compile(command))
        _check(made)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _log.info(
            "%s: cannot be used (%s): masks, selections and sparse products take NumPy, PyTorch and MKL.",
            SOURCE.name,
            reason.strip(),
        )
        return None
    return made


def _compile(command: Sequence[str]) -> ctypes.CDLL:
    """The source compiled for this processor, or in general where the compiler does not know how to ask for that."""
    own = ["-march=native", *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else [])]
    with tempfile.TemporaryDirectory(prefix="gap_ds_") as folder:
        target = Path(folder) / "native.so"
        for flags in (own, []):
            words = [*command, *_FLAGS, *flags, str(SOURCE), "-o", str(target)]
            try:
                subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
                break
            except subprocess.CalledProcessError:
                if not flags:
                    raise
        return ctypes.CDLL(str(target))


class Library:
    """The loops. Tensors are contiguous and on the CPU, and indices lie within bounds: nothing is checked here."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64

        def loop(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
            found = getattr(loaded, name)
            found.argtypes, found.restype = arguments, result
            return cast("Callable[..., Any]", found)

        self._zero_pruned = {n: loop(f"zero_pruned_{8 * n}", pointer, pointer, number) for n in (2, 4, 8)}
        self._magnitude_keys = loop("magnitude_keys", pointer, number, pointer)
        self._count_keys = loop("count_keys", pointer, number, number, number, pointer)
        self._keys_with = loop("keys_with", pointer, number, number, number, pointer, result=number)
        self._pack_above = loop("pack_above", pointer, number, number, pointer)
        self._transpose = loop("transpose", pointer, number, number, number, pointer)
        self._multiply = loop("multiply", *[pointer] * 5, *[number] * 4, pointer, number)
        self._scratch = threading.local()

    def zero_pruned_(self, words: Tensor, bits: Tensor) -> None:
        """Sets the words (N,) of 2, 4 or 8 bytes to 0 whose bit is 0; bits as `bitmask.pack` makes them."""
        size, first, mask = words.element_size(), words.data_ptr(), bits.data_ptr()
        threads = _threads(words.numel())
        shares = _shares(words.numel(), threads)
        work = [(first + size * low, mask + low // 8, high - low) for low, high in shares]
        _call(self._zero_pruned[size], work, threads)

    def magnitude_keys(self, weights: Tensor) -> Tensor:
        """Keys (N,) in int32 that have the order of the magnitudes of weights in fp32; -1 for a NaN."""
        keys = torch.empty_like(weights, dtype=torch.int32)
        self._magnitude_keys(weights.data_ptr(), weights.numel(), keys.data_ptr())
        return keys

    def count_keys_(self, counts: Tensor, keys: Tensor, shift: int, base: int) -> None:
        """Adds to counts (int64) at (key >> shift) - base the number of keys (N,) in int32 for which it is that."""
        self._count_keys(keys.data_ptr(), keys.numel(), shift, base, counts.data_ptr())

    def keys_with(self, keys: Tensor, shift: int, prefix: int) -> Tensor:
        """The keys (N,) in int32 for which key >> shift is the prefix, in their order."""
        found = torch.empty_like(keys)
        return found[: self._keys_with(keys.data_ptr(), keys.numel(), shift, prefix, found.data_ptr())]

    def pack_above(self, keys: Tensor, limit: int) -> Tensor:
        """Bits, as `bitmask.pack` makes them, of the keys (N,) in int32 that are larger than the limit."""
        bits = torch.empty(-(-keys.numel() // 8), dtype=torch.uint8, device="cpu")
        self._pack_above(keys.data_ptr(), keys.numel(), limit, bits.data_ptr())
        return bits

    def multiply(
        self, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, outputs: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """x (R, I) @ W^T + bias in fp32, of W (O, I) by compressed rows with int32 indices, in parts (R, o).

        outputs: how many rows of W, one after the other, belong to each part.
        """
        weights = [t.data_ptr() for t in (crow, col, values)] + [0 if bias is None else bias.data_ptr()]
        rows, inputs = x.shape
        parts = tuple(x.new_empty(rows, size) for size in outputs)
        blocks = row_blocks(rows, inputs)
        scratch = self._room(inputs * max((_width(end - start) for start, end in blocks), default=0))
        threads = _threads(values.numel() * rows)
        for start, end in blocks:
            width = _width(end - start)
            self._transpose(x.data_ptr() + 4 * start * inputs, end - start, inputs, width, scratch.data_ptr())
            work, first = [], 0
            for part, size in zip(parts, outputs, strict=True):
                y = part.data_ptr() + 4 * start * size
                for low, high in _shares(size, threads):
                    where = (width, end - start, first + low, first + high, y + 4 * low, size)
                    work.append((*weights, scratch.data_ptr(), *where))
                first += size
            _call(self._multiply, work, threads)
        return parts

    def _room(self, floats: int) -> Tensor:
        """Memory of this thread for x^T, kept: what is new at every call is slow to write."""
        kept = getattr(self._scratch, "kept", None)
        if kept is None or kept.numel() < floats:
            kept = self._scratch.kept = torch.empty(floats, dtype=torch.float32, device="cpu")
        return kept


def row_blocks(rows: int, inputs: int, element_size: int = 4) -> list[tuple[int, int]]:
    """Rows (from, to) that are multiplied at once: blocks as even as can be."""
    most = min(max(_CACHED // max(1, inputs * element_size), _ROWS[0]), _ROWS[1])
    count = -(-rows // most)
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _width(rows: int) -> int:
    return next(width for width in _WIDTHS if width >= rows)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _SHARED else 1


def _shares(count: int, threads: int) -> list[tuple[int, int]]:
    """What each thread does of `count` (from, to), in whole sixteens."""
    step = max(16, -(-count // (16 * threads)) * 16)
    return [(low, min(low + step, count)) for low in range(0, count, step)]


def _call(function: Callable[..., None], work: Sequence[tuple[int, ...]], threads: int) -> None:
    """Calls the function with each of the arguments, in several threads at once: ctypes frees the GIL."""
    if threads == 1:
        for arguments in work:
            function(*arguments)
    else:
        list(_pool(threads).map(lambda arguments: function(*arguments), work))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gap_ds")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked


def _check(made: Library) -> None:
    """RuntimeError if a loop computes something else than PyTorch, on this machine, for small numbers."""
    # Made by NumPy: whoever calls may have set a default dtype or device of torch.
    random = np.random.default_rng(0)
    kept = torch.from_numpy(random.random(29) < 0.5)
    bits = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    for dtype in (torch.int16, torch.int32, torch.int64):
        words = torch.arange(1, 30, dtype=dtype, device="cpu")
        expected = words * kept
        made.zero_pruned_(words, bits)
        if not torch.equal(words, expected):
            raise RuntimeError(f"it zeroes other words of {words.element_size()} bytes than it should")
    numbers = np.array(
        [0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, np.nan, -np.nan, *random.standard_normal(30)], np.float32
    )
    expected_keys = np.where(np.isnan(numbers), -1, np.abs(numbers).view(np.int32))
    if not np.array_equal(made.magnitude_keys(torch.from_numpy(numbers)).numpy(), expected_keys):
        raise RuntimeError("its keys of magnitudes are wrong")
    keys = torch.from_numpy(random.integers(-1, 40, 203, dtype=np.int32))
    counts = torch.zeros(11, dtype=torch.int64, device="cpu")
    made.count_keys_(counts, keys, 2, -1)
    if not torch.equal(counts, torch.bincount((keys >> 2) + 1, minlength=11)):
        raise RuntimeError("its counts of keys are wrong")
    for prefix in (-1, 3, 10):
        if not torch.equal(made.keys_with(keys, 2, prefix), keys[keys >> 2 == prefix]):
            raise RuntimeError("it finds other keys of a prefix")
    if not np.array_equal(made.pack_above(keys, 25).numpy(), np.packbits(keys.numpy() > 25, bitorder="little")):
        raise RuntimeError("its bits of the keys above a limit are wrong")
    dense = torch.from_numpy(random.standard_normal((21, 40), dtype=np.float32)).relu()
    crow = torch.nn.functional.pad((dense != 0).sum(dim=1).cumsum(dim=0), (1, 0)).int()
    matrix = crow, dense.nonzero()[:, 1].int(), dense[dense != 0], dense[:, 0].contiguous()
    for rows in (*_WIDTHS, 97):
        x = torch.from_numpy(random.standard_normal((rows, 40), dtype=np.float32))
        y = torch.cat(made.multiply(*matrix, x, [20, 1]), dim=1)
        if not torch.allclose(y, x @ dense.t() + dense[:, 0], rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"its product with {rows} rows is wrong")
