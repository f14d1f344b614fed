"""Files of unknown origin, read a piece at a time: JSON against a model, tensors from safetensors.

Damage of any kind is a ValueError with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Bytes of JSON that are read at most; the gap.json of a model of a thousand entries has some hundred kilobytes.
_MOST_JSON = 256 * 2**20
#: Weights that are looked at together: 64 MiB in fp32.
CHUNK = 2**24

_Model = TypeVar("_Model", bound=BaseModel)


class Record(BaseModel):
    """A JSON object of ours: types are strict, what is not asked for is ignored, NaN is refused."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


def read_json(path: Path, model: type[_Model]) -> _Model:
    """A JSON file as a value of a pydantic model.

    Raises:
        ValueError: the file is missing, too large, damaged, or does not hold such a value.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError(f"{path}: there is no such file.")
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, which is more than such a file can have.")
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{printable('.'.join(map(str, first['loc'])))}: " if first["loc"] else ""
        raise ValueError(f"{path}: is damaged or of another kind ({where}{printable(first['msg'])}).") from None


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


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or colour its letters.

    >>> printable("fc1.weight"), printable("a\\x1b[2Jb"), printable("ä\\n")
    ('fc1.weight', 'a\\\\x1b[2Jb', 'ä\\\\n')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(tensor: Tensor) -> Tensor:
    """Values that torch can count: 8-bit floats have few operations."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 2 else tensor


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
