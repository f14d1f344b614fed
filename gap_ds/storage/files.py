"""Files of unknown origin, read a piece at a time: JSON against a model, tensors from safetensors.

Damage of any kind is a ValueError with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gap_ds.storage.json import Record, printable

#: Weights that are looked at together: 64 MiB in fp32.
CHUNK = 2**24


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it is missing, truncated or damaged, here or where it is read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is truncated or damaged ({printable(str(error))}).") from None


def chunks(file: Any, name: str, multiple: int = 1) -> Iterator[Tensor]:
    """A tensor in pieces along its first dimension, whole multiples of `multiple` but for the last."""
    piece = file.get_slice(name)
    shape = piece.get_shape()
    if not shape:
        yield file.get_tensor(name)
        return
    row = max(1, math.prod(shape[1:]))
    rows = max(1, CHUNK // row // multiple) * multiple
    for lo in range(0, shape[0], rows):
        yield piece[lo : min(lo + rows, shape[0])]


def header_counts(metadata: Mapping[str, str] | None) -> dict[str, int] | None:
    """The number of kept weights by entry that the header of a masks file has; None if it has none."""

    class Counts(Record):
        kept: dict[str, int]

    try:
        text = (metadata or {})["kept"]
        return Counts.model_validate_json(f'{{"kept": {text}}}').kept
    except (KeyError, ValidationError):
        return None


def plain(tensor: Tensor) -> Tensor:
    """Values that torch can count: 8-bit floats have few operations."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 2 else tensor


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
