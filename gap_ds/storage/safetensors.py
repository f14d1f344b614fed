"""The frame of safetensors files, which we write a tensor at a time and read without trust.

    8 bytes   length of the header, little-endian
    header    JSON: tensors by name, each with dtype, shape and data_offsets after the header; spaces up to 8 bytes
    area      the tensors' bytes

Which tensors a file holds, and in what order, is the matter of those who write it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What safetensors can hold, by its names there.
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


def name_of(dtype: torch.dtype, what: str) -> str:
    """A dtype's name in safetensors; ValueError, with `what` it is the dtype of, if there is none."""
    if dtype not in NAMES:
        raise ValueError(f"{what}: safetensors has no {dtype}. Convert it first.")
    return NAMES[dtype]


def table(
    tensors: Iterable[tuple[str, str, Sequence[int], tuple[int, int]]], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """A header, as JSON has it. Of each tensor: name, dtype, shape, and [begin, end) after the header.

    >>> table([("w", "F32", (3,), (0, 12))], {})["w"]
    {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 12]}
    """
    return {"__metadata__": dict(metadata)} | {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(where)}
        for name, dtype, shape, where in tensors
    }


def header_text(table: Mapping[str, Any]) -> bytes:
    """A header as it stands in the file, filled up to 8 bytes."""
    text = json.dumps(table).encode()
    return text + b" " * (-len(text) % 8)


def header_bytes(table: Mapping[str, Any]) -> bytes:
    """The first bytes of a file: the length of the header, and the header."""
    text = header_text(table)
    return struct.pack("<Q", len(text)) + text


def header_length(first: bytes, size: int, limit: int) -> int:
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


def load_json(text: bytes) -> dict[str, Any]:
    """The table that a JSON text describes.

    Raises:
        ValueError: it is no JSON, no table, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("is no JSON table")
    return found


def encode(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor on the CPU, flat."""
    return values.contiguous().view(-1).view(torch.uint8).numpy()


def decode(data: bytes, dtype: torch.dtype) -> Tensor:
    """The flat tensor that has these bytes; a copy."""
    flat = torch.empty(len(data), dtype=torch.uint8)
    flat.numpy()[:] = np.frombuffer(data, np.uint8)
    return flat.bool() if dtype == torch.bool else flat.view(dtype)
