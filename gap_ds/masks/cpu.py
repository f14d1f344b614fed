"""Loops in C for CPUs: masking, the passes of a selection, sparse products. Compiled once, kept in the user's cache.

`library()` returns them. It returns None if there is no compiler (`CC`, else cc, gcc or clang), if the compiled loops
do not compute what PyTorch computes, or if the environment sets `GAP_DS_NATIVE=0`. Every caller has another way: NumPy
for masks, PyTorch for selections, MKL for products.

The cache is `$XDG_CACHE_HOME/gap_ds` or `~/.cache/gap_ds`. It is used if it belongs to this user and nobody else can
write there: what lies in it is run. Files are named after the source, the compiler and the processor, so that machines
that share a home folder never load each other's code. Of the processes that start together one compiles, and the others
wait for it. The loops are checked at each load.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from gap_ds.storage import atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCE = Path(__file__).with_name("cpu.c")
#: Rows of activations are multiplied in blocks, so that each weight is read once for a block and x^T stays in a near
#: cache: as many rows as fit these bytes, within these limits.
_CACHED, _ROWS = 2**18, (32, 64)
#: Multiplications, or words of a mask, from which on several threads are worth starting.
_SHARED = 2**20
_FLAGS = ["-O3", "-fopenmp-simd", "-shared", "-fPIC", "-std=gnu11"]
#: For this processor. Compilers that refuse these flags compile for processors in general.
_NATIVE = ["-march=native", *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else [])]
#: Seconds that a compiler may take, and that other processes wait for it.
_PATIENCE = 120
#: Row counts for which cpu.c has a product; blocks of other sizes are padded to the next one.
_WIDTHS = (1, 4, 8, 16, 32, 48, 64)

T = TypeVar("T")

#: Files of the cache, by source file.
_FILES: dict[Path, Path] = {}

_log = logging.getLogger(__name__)


@functools.cache
def library() -> Library | None:
    """The compiled loops; None if they cannot be used. The answer holds for the life of the process."""
    return compiled(SOURCE, lambda path: _checked(path))


def compiled(source: Path, checked: Callable[[Path], T], flags: Sequence[str] = ()) -> T | None:
    """Loops compiled from a source file, from the cache if it has them; None if they cannot be used.

    Args:
        checked: loads the compiled file; RuntimeError if it does not compute what it should.
        flags: of the compiler, besides the usual ones.
    """
    _FILES.pop(source, None)
    if os.environ.get("GAP_DS_NATIVE") == "0":
        return None
    command = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not command:
        _log.info("no C compiler (CC): masks, selections and sparse products use NumPy, PyTorch and MKL.")
        return None
    try:
        try:
            return _load([*command, *_FLAGS, *flags, *_NATIVE], source, checked)
        except subprocess.CalledProcessError:
            return _load([*command, *_FLAGS, *flags], source, checked)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        _log.info(
            "%s.so cannot be used (%s): masks, selections and sparse products use NumPy, PyTorch and MKL.",
            source.stem,
            reason,
        )
        return None


def _load(words: Sequence[str], source: Path, checked: Callable[[Path], T]) -> T:
    """Loads the loops from the cache. If they are absent or damaged there, compiles them and stores them.

    Args:
        words: the compiler with its flags.
    """
    # The predefined macros name the compiler's version and the features of the processor.
    macros = _run([*words, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256("\0".join([*words, macros, source.read_text("utf-8")]).encode()).hexdigest()
    kept = _cache() / f"{source.stem}-{key[:32]}.so"
    private = _private(kept.parent)
    if private and (loops := _kept(kept, source, checked)) is not None:
        return loops
    with _turn(kept.parent) if private else contextlib.nullcontext():
        # The process that had its turn before may have compiled them.
        if private and (loops := _kept(kept, source, checked)) is not None:
            return loops
        with tempfile.TemporaryDirectory(prefix="gap_ds_") as folder:
            made = Path(folder) / "loops.so"
            _run([*words, str(source), "-o", str(made)])
            loops = checked(made)
            if private:
                with contextlib.suppress(OSError):  # full or read-only
                    with atomic.replacing(kept) as aside:
                        shutil.copyfile(made, aside)
                    _FILES[source] = kept
    return loops


def file_of(source: Path) -> Path | None:
    """The file of the cache that has the compiled loops of a source file; None if this process alone has them."""
    return _FILES.get(source)


def _kept(path: Path, source: Path, checked: Callable[[Path], T]) -> T | None:
    """The loops in a file of the cache; None if it is absent or damaged."""
    if path.is_file():
        with contextlib.suppress(OSError, RuntimeError):
            loops = checked(path)
            _FILES[source] = path
            return loops
    return None


def _private(folder: Path) -> bool:
    """True for a folder, made if there is none, that is this user's and that nobody else can write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return False
    return about.st_uid == os.getuid() and not about.st_mode & 0o022


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the folder. The turn ends with its process.

    Raises:
        TimeoutError: others take longer than a compiler may.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"{folder}: another process compiles there for {_PATIENCE} s") from None
                time.sleep(0.05)
            except OSError:  # a file system without locks: processes may compile side by side
                break
        yield
    finally:
        os.close(descriptor)


def _run(words: Sequence[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=_PATIENCE).stdout


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gap_ds"


def _checked(path: Path) -> Library:
    loops = Library(ctypes.CDLL(str(path)))
    _check(loops)
    return loops


class Library:
    """The loops. Nothing is checked: tensors must be contiguous and on the CPU, and indices within bounds."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64

        def loop(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
            found = getattr(loaded, name)
            found.argtypes, found.restype = arguments, result
            return cast("Callable[..., Any]", found)

        self._zero_pruned = loop("zero_pruned", pointer, number)
        self._count_revived = loop("count_revived", pointer, number, pointer)
        self._magnitude_keys = loop("magnitude_keys", pointer, number, pointer)
        self._count_keys = loop("count_keys", pointer, number, number, number, pointer)
        self._keys_with = loop("keys_with", pointer, number, number, number, pointer, result=number)
        self._pack_above = loop("pack_above", pointer, number, number, pointer)
        self._transpose = loop("transpose", pointer, number, number, number, pointer)
        self._multiply = loop("multiply", *[pointer] * 5, *[number] * 4, pointer, number)
        self._scratch = threading.local()

    def zero_pruned_all(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Returns a call that sets the words of these pieces to 0 where their bit is 0. It holds no tensors.

        It is for as long as words and bits stay where they are.

        Args:
            pieces: words (N,) of 2, 4 or 8 bytes, and bits as `bitmask.pack` returns them.
        """
        table = _Table(pieces)
        return lambda: table.over(self._zero_pruned)

    def zero_pruned_(self, words: Tensor, bits: Tensor) -> None:
        """Sets words (N,) of 2, 4 or 8 bytes to 0 where the bit is 0. bits: as `bitmask.pack` returns them."""
        self.zero_pruned_all([(words, bits)])()

    def count_revived_all(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], list[int]]:
        """Returns a call that counts, for each piece, the words that are no zero of either sign and whose bit is 0.

        Pieces are as `zero_pruned_all` takes them, and the call is valid for as long as that one's.
        """
        table = _Table(pieces)
        found, count = np.zeros(len(table.rows), np.int64), len(pieces)
        one_each = np.array_equal(table.of, np.arange(count))  # an empty piece has no row, one in two shares has two

        def counts() -> list[int]:
            table.over(self._count_revived, found)
            return found.tolist() if one_each else [int(n) for n in np.bincount(table.of, found, count)]

        return counts

    def magnitude_keys(self, weights: Tensor) -> Tensor:
        """Keys (N,) int32 in the order of the magnitudes of fp32 weights (N,); -1 for a NaN."""
        keys = torch.empty_like(weights, dtype=torch.int32)
        self._magnitude_keys(weights.data_ptr(), weights.numel(), keys.data_ptr())
        return keys

    def count_keys_(self, counts: Tensor, keys: Tensor, shift: int, base: int) -> None:
        """Adds 1 to counts[(key >> shift) - base] for each key. counts: int64; keys: (N,) int32."""
        self._count_keys(keys.data_ptr(), keys.numel(), shift, base, counts.data_ptr())

    def keys_with(self, keys: Tensor, shift: int, prefix: int) -> Tensor:
        """The keys, of (N,) int32, for which key >> shift equals the prefix, in their order."""
        found = torch.empty_like(keys)
        return found[: self._keys_with(keys.data_ptr(), keys.numel(), shift, prefix, found.data_ptr())]

    def pack_above(self, keys: Tensor, limit: int) -> Tensor:
        """Bits, as `bitmask.pack` returns them, of `keys > limit`. keys: (N,) int32."""
        bits = torch.empty(-(-keys.numel() // 8), dtype=torch.uint8, device="cpu")
        self._pack_above(keys.data_ptr(), keys.numel(), limit, bits.data_ptr())
        return bits

    def multiply(
        self, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, outputs: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """x (R, I) @ W^T + bias in fp32, for W (O, I) in compressed rows with int32 indices, in parts (R, o).

        Args:
            outputs: rows of W in each part, in order; they sum to O.
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
        """Memory of this thread for x^T, kept between calls: fresh memory is slow to write."""
        kept = getattr(self._scratch, "kept", None)
        if kept is None or kept.numel() < floats:
            kept = self._scratch.kept = torch.empty(floats, dtype=torch.float32, device="cpu")
        return kept


def row_blocks(rows: int, inputs: int, element_size: int = 4) -> list[tuple[int, int]]:
    """Blocks (from, to) of rows that are multiplied at once, as even as possible."""
    most = min(max(_CACHED // max(1, inputs * element_size), _ROWS[0]), _ROWS[1])
    count = -(-rows // most)
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _width(rows: int) -> int:
    return next(width for width in _WIDTHS if width >= rows)


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _SHARED else 1


def _shares(count: int, threads: int) -> list[tuple[int, int]]:
    """Ranges (from, to) of `count` items, one for each thread; all but the last are multiples of 16."""
    step = max(16, -(-count // (16 * threads)) * 16)
    return [(low, min(low + step, count)) for low in range(0, count, step)]


class _Table:
    """Pieces as the loops read them, int64 (P, 4), cut into shares of equally many words, one for each thread.

    Columns: address of the words, address of the bits, number of words, bytes of a word. `of` has the number of the
    piece that a row belongs to.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
        total = sum(words.numel() for words, _ in pieces)
        threads = _threads(total)
        share = max(16, -(-total // (16 * threads)) * 16)
        rows: list[tuple[int, int, int, int]] = []
        of: list[int] = []
        ends: list[int] = []
        left = share
        for number, (words, bits) in enumerate(pieces):
            place, mask, size, count = words.data_ptr(), bits.data_ptr(), words.element_size(), words.numel()
            low = 0
            while low < count:
                # A cut is a whole number of bytes of the mask.
                high = min(count, low + max(16, left // 16 * 16)) if threads > 1 else count
                rows.append((place + size * low, mask + low // 8, high - low, size))
                of.append(number)
                left, low = left - (high - low), high
                if left < 16 and threads > 1:
                    ends.append(len(rows))
                    left = share
        if not ends or ends[-1] < len(rows):
            ends.append(len(rows))
        self.rows, self.of = np.array(rows, np.int64).reshape(-1, 4), np.array(of, np.int64)
        first = self.rows.ctypes.data
        starts = [0, *ends[:-1]]
        self._shares = [(start, first + 32 * start, end - start) for start, end in zip(starts, ends, strict=True)]

    def over(self, function: Callable[..., Any], results: NDArray[np.int64] | None = None) -> None:
        """Calls a loop on each share; results (P,): has a number for each row."""
        if results is None:
            work: list[tuple[int, ...]] = [(place, count) for _, place, count in self._shares]
        else:
            work = [(place, count, results.ctypes.data + 8 * start) for start, place, count in self._shares]
        _call(function, work, len(work))


def _call(function: Callable[..., Any], work: Sequence[tuple[int, ...]], threads: int) -> list[Any]:
    """Calls the function with each tuple of arguments, in parallel threads: ctypes releases the GIL."""
    if threads == 1:
        return [function(*arguments) for arguments in work]
    return list(_pool(threads).map(lambda arguments: function(*arguments), work))


def in_threads(work: Callable[[T], Any], items: Sequence[T], size: int) -> None:
    """Does work on each item, in parallel threads if its size, as a number of operations, is worth starting them."""
    if (threads := _threads(size)) == 1:
        for item in items:
            work(item)
    else:
        list(_pool(threads).map(work, items))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gap_ds")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork copies the pool but not its threads


def _check(made: Library) -> None:
    """Compares every loop with PyTorch or NumPy on small inputs; RuntimeError if one differs."""
    # Inputs come from NumPy, because the caller may have set a default dtype or device of torch.
    random = np.random.default_rng(0)
    kept = torch.from_numpy(random.random(157) < 0.5)  # two rounds of 64 words of 2 bytes, and a rest
    bits = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    for dtype in (torch.int16, torch.int32, torch.int64):
        words = torch.arange(1, 158, dtype=dtype, device="cpu")
        words[0] = torch.iinfo(dtype).min  # the bits of -0
        expected = words * kept
        pruned = words - expected
        if made.count_revived_all([(pruned, bits), (expected, bits)])() != [int((~kept[1:]).sum()), 0]:
            raise RuntimeError(f"count_revived is wrong for words of {words.element_size()} bytes")
        made.zero_pruned_(words, bits)
        if not torch.equal(words, expected):
            raise RuntimeError(f"zero_pruned is wrong for words of {words.element_size()} bytes")
    numbers = np.array(
        [0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, np.nan, -np.nan, *random.standard_normal(30)], np.float32
    )
    expected_keys = np.where(np.isnan(numbers), -1, np.abs(numbers).view(np.int32))
    if not np.array_equal(made.magnitude_keys(torch.from_numpy(numbers)).numpy(), expected_keys):
        raise RuntimeError("magnitude_keys is wrong")
    keys = torch.from_numpy(random.integers(-1, 40, 203, dtype=np.int32))
    counts = torch.zeros(11, dtype=torch.int64, device="cpu")
    made.count_keys_(counts, keys, 2, -1)
    if not torch.equal(counts, torch.bincount((keys >> 2) + 1, minlength=11)):
        raise RuntimeError("count_keys is wrong")
    for prefix in (-1, 3, 10):
        if not torch.equal(made.keys_with(keys, 2, prefix), keys[keys >> 2 == prefix]):
            raise RuntimeError("keys_with is wrong")
    if not np.array_equal(made.pack_above(keys, 25).numpy(), np.packbits(keys.numpy() > 25, bitorder="little")):
        raise RuntimeError("pack_above is wrong")
    dense = torch.from_numpy(random.standard_normal((21, 40), dtype=np.float32)).relu()
    crow = torch.nn.functional.pad((dense != 0).sum(dim=1).cumsum(dim=0), (1, 0)).int()
    matrix = crow, dense.nonzero()[:, 1].int(), dense[dense != 0], dense[:, 0].contiguous()
    for rows in (*_WIDTHS, 97):
        x = torch.from_numpy(random.standard_normal((rows, 40), dtype=np.float32))
        y = torch.cat(made.multiply(*matrix, x, [20, 1]), dim=1)
        # Not by torch: in a fork of a process whose OpenMP has started threads, its product never ends.
        wanted = x.numpy() @ dense.numpy().T + dense[:, 0].numpy()
        if not np.allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"multiply is wrong for {rows} rows")
