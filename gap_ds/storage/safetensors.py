"""Safetensors files: one writer, tensor by tensor, and one reader, which trusts nothing.

    8 bytes   length of the header, little-endian
    header    JSON: tensors by name, each with dtype, shape and data_offsets after the header; spaces up to 8 bytes
    area      the tensors' bytes

The callers decide which tensors a file holds, and in what order.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gap_ds.storage.errors import printable

#: The dtypes of safetensors, by their names there.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Called with (name of a tensor, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]

#: dtype and shape of the tensors of a file by name, in the order of their bytes.
Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]

#: Longest header that is read; safetensors has the same limit.
MOST_HEADER = 100_000_000
#: Weights to look at together: 64 MiB in fp32.
CHUNK = 2**24


def name_of(dtype: torch.dtype, tensor: str) -> str:
    """Name of a tensor's dtype in safetensors; ValueError if it has none."""
    if dtype not in NAMES:
        raise ValueError(f"{tensor}: safetensors has no {dtype}. Convert it first.")
    return NAMES[dtype]


# -- header ------------------------------------------------------------------------------------------------------------


def offsets(layout: Layout) -> dict[str, tuple[int, int]]:
    """The bytes [begin, end) after the header of each tensor.

    >>> offsets({"w": (torch.float32, (2, 3)), "b": (torch.uint8, (5,))})
    {'w': (0, 24), 'b': (24, 29)}
    """
    ends = accumulate(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    return dict(zip(layout, pairwise([0, *ends]), strict=True))


def header_table(layout: Layout, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A header as JSON has it. ValueError: safetensors does not have a dtype.

    >>> header_table({"w": (torch.float32, (3,))}, {})["w"]
    {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 12]}
    """
    where = offsets(layout)
    return {"__metadata__": dict(metadata)} | {
        name: {"dtype": name_of(dtype, name), "shape": list(shape), "data_offsets": list(where[name])}
        for name, (dtype, shape) in layout.items()
    }


def header_text(table: Mapping[str, Any]) -> bytes:
    """A header as it stands in the file, filled up to 8 bytes."""
    text = json.dumps(table).encode()
    return text + b" " * (-len(text) % 8)


def header_bytes(table: Mapping[str, Any]) -> bytes:
    """The first bytes of a file: the length of the header, and the header."""
    text = header_text(table)
    return struct.pack("<Q", len(text)) + text


def header_length(first: bytes, size: int, limit: int = MOST_HEADER) -> int:
    """Length of the header of a file of `size` bytes, from its first 8.

    Raises:
        ValueError: the file is shorter than its header, or the header longer than `limit`.
    """
    if len(first) != 8:
        raise ValueError(f"has {len(first)} bytes, too few for a safetensors file")
    length = int(struct.unpack("<Q", first)[0])
    if length > size - 8:
        raise ValueError(f"its header of {length} bytes does not fit into the {size} bytes of the file")
    if length > limit:
        raise ValueError(f"its header of {length} bytes is longer than {limit}")
    return length


def encode(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor, flat; on the CPU they share its memory."""
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def decode(data: bytes, dtype: torch.dtype) -> Tensor:
    """The flat tensor that has these bytes; a copy."""
    flat = torch.empty(len(data), dtype=torch.uint8, device="cpu")
    flat.numpy()[:] = np.frombuffer(data, np.uint8)
    return flat.bool() if dtype == torch.bool else flat.view(dtype)


# -- writing -----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a safetensors file tensor by tensor, in any order, inside a `with` block.

    An error of the disk is raised at the end of the block alone: a rank whose disk is full still takes part in the
    collectives that bring the tensors. An error of the block itself comes first.

    Args:
        layout: the tensors to come, in the order of their bytes.
    Raises:
        ValueError: safetensors does not have a dtype.
        OSError: at the end of the block: the disk refused something.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
        self._path, self._layout, self._where = path, layout, offsets(layout)
        self._first = header_bytes(header_table(layout, metadata))
        self._error: OSError | None = None

    def __enter__(self) -> Writer:
        try:
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            self._error = error
        self._put(0, self._first)
        return self

    def write(self, name: str, values: Tensor) -> None:
        """Writes one tensor of the layout, of its dtype and size; the values may be on any device."""
        begin, end = self._where[name]
        data = encode(values)
        assert (data.size, values.dtype) == (end - begin, self._layout[name][0]), name
        self._put(len(self._first) + begin, data)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata by one of the same length, such as digests that were not known before."""
        first = header_bytes(header_table(self._layout, metadata))
        assert len(first) == len(self._first)
        self._put(0, first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._error is None:
            try:
                with self._file:
                    os.fsync(self._file.fileno())
            except OSError as caught:
                self._error = caught
        if error is None and self._error is not None:
            raise self._error

    def _put(self, at: int, data: Any) -> None:
        if self._error is not None:
            return
        try:
            self._file.seek(at)
            view = memoryview(data)
            while view:  # a system call writes at most 2 GiB
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error
            self._file.close()


# -- reading -----------------------------------------------------------------------------------------------------------


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is looked up, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Slice:
    """Rows of a stored tensor, on the host: those of `safe_open` go to torch's default device."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.get_shape: Callable[[], list[int]] = stored.get_shape
        self.get_dtype: Callable[[], str] = stored.get_dtype

    def __getitem__(self, rows: slice) -> Tensor:
        with torch.device("cpu"):
            piece: Tensor = self._stored[rows]
        return piece


class _File:
    """A file as `safe_open` has it, of which all is read to the host."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.keys: Callable[[], list[str]] = opened.keys
        self.metadata: Callable[[], dict[str, str] | None] = opened.metadata
        self.get_tensor: Callable[[str], Tensor] = opened.get_tensor

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._opened.get_slice(name))


@contextmanager
def open_tensors(path: Path, kind: tuple[str, int] | None = None) -> Iterator[Any]:
    """Opens an untrusted safetensors file with `safetensors.safe_open`.

    Args:
        kind: format and version that its metadata must name.
    Raises:
        ValueError: it is missing, truncated, damaged or of another kind, here or where it is read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    with ExitStack() as stack:
        try:
            file = _File(stack.enter_context(safe_open(path, framework="pt")))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        if kind is not None:
            _check_kind(path, file.metadata() or {}, *kind)
        try:
            yield file
        except SafetensorError as error:
            raise _damaged(path, error) from None


def chunks(file: Any, name: str, multiple: int = 1) -> Iterator[Tensor]:
    """A tensor of an open file in pieces along its first dimension, multiples of `multiple` rows but for the last."""
    piece = file.get_slice(name)
    shape = piece.get_shape()
    if not shape:
        yield file.get_tensor(name)
        return
    rows = chunk_rows(shape, multiple)
    for lo in range(0, shape[0], rows):
        yield piece[lo : min(lo + rows, shape[0])]


def chunk_rows(shape: Sequence[int], multiple: int = 1) -> int:
    """Rows of a tensor to look at together, a multiple of `multiple`: about `CHUNK` weights."""
    return max(1, CHUNK // max(1, math.prod(shape[1:])) // multiple) * multiple


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = printable(str(error))
    return ValueError(f"{path}: the file is truncated or damaged ({reason}). Get it again, or use an earlier one.")


def _check_kind(path: Path, metadata: Mapping[str, str], kind: str, version: int) -> None:
    if metadata.get("format") != kind:
        raise ValueError(f"{path}: is no file of the kind {kind}")
    if metadata.get("version") != str(version):
        raise ValueError(
            f"{path}: {kind} of version {printable(str(metadata.get('version')))}; this version of gap_ds reads "
            f"version {version}"
        )


def read_header(path: Path) -> tuple[bytes, int]:
    """The text of a file's header, and the number of bytes after it.

    Raises:
        ValueError: the file is shorter than its header, or the header too long.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_length(file.read(8), size)
        return file.read(length), size - 8 - length
