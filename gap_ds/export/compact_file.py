"""The compact form of a sparse model: mask bits and kept weights of each entry, all other tensors whole.

    FOLDER/compact.safetensors   all weights; a safetensors file, described in docs/inference.md
    FOLDER/...                   config, tokenizer, gap.json and the other files beside the weights

A weight is kept if any of its bits is set: NaN, infinities and -0.0 come back as they were, and the model that
`load_compact` returns equals the dense export bit for bit. An entry of N weights, k of them kept, takes N / 8 + k * b
bytes at b bytes a weight: 0.16 of a bf16 entry at 90 % sparsity. Files are written and read one tensor at a time.

Nothing is unpickled, no name in a file becomes a path, and sizes are checked against the file's before memory is taken
for a tensor. SHA-256 of every tensor and of the header reveal truncation and changes in transit. They are no signature:
anyone who can write the file can write them, too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gap_ds.masks import bitmask, codec
from gap_ds.storage.atomic import replacing
from gap_ds.storage.errors import printable
from gap_ds.storage.json import parse_table
from gap_ds.storage.safetensors import (
    DTYPES,
    NAMES,
    Layout,
    LazyTensors,
    Progress,
    Writer,
    encode,
    header_table,
    header_text,
    name_of,
    open_tensors,
    read_header,
)

FILE = "compact.safetensors"
FORMAT = "gap_ds.compact"
VERSION = 1

_ZEROS = "0" * 64  # stands for a digest where there is none yet


@dataclass(frozen=True)
class CompactTensor:
    """A tensor of the model as the header describes it.

    kept: weights that have a bit set; None for a tensor that is stored whole.
    sha256: of the tensor's bytes in the file; of an entry those of its mask and then those of its values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: int | None
    sha256: str = _ZEROS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def parts(self) -> Layout:
        """Tensors that the file holds of it."""
        return codec.parts(self.name, self.dtype, self.shape, self.kept)

    @property
    def stored_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.parts.values())


@dataclass(frozen=True)
class Header:
    """Contents of a compact file. `signature` is that of the run, as in gap.json."""

    signature: str
    tensors: tuple[CompactTensor, ...]

    def layout(self) -> Layout:
        """Tensors of the file: wide dtypes first, so that all are aligned.

        Raises:
            ValueError: two tensors would have one name.

        >>> w, b = CompactTensor("w", (3, 4), torch.float32, 5), CompactTensor("b", (3,), torch.float32, None)
        >>> list(Header("", (w, b)).layout())
        ['w.values', 'b', 'w.mask']
        """
        found: dict[str, Any] = {"__metadata__": None}
        for tensor in self.tensors:
            for name, part in tensor.parts.items():
                if name in found:
                    raise ValueError(f"{printable(name)}: two tensors of a compact file would have this name.")
                found[name] = part
        del found["__metadata__"]
        return codec.wide_first(found)

    def metadata(self) -> dict[str, str]:
        """Metadata of the file. The header's SHA-256 is that of its text with zeros in the place of the SHA-256."""
        rows = {
            t.name: {"shape": list(t.shape), "dtype": NAMES[t.dtype], "kept": t.kept, "sha256": t.sha256}
            for t in self.tensors
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "sha256": _ZEROS, "signature": self.signature}
        metadata["tensors"] = json.dumps(rows)
        text = header_text(header_table(self.layout(), metadata))
        return {**metadata, "sha256": hashlib.sha256(text).hexdigest()}


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    entries: Container[str],
    signature: str = "",
    progress: Progress | None = None,
) -> Path:
    """Writes FOLDER/compact.safetensors, whole or not at all, and returns its path.

    Every tensor is looked up twice, and dropped before the next one: `tensors` may read them from files.

    Args:
        entries: names of the tensors to store as mask and values. An entry that would not get smaller is stored whole.
        progress: called after each tensor, in dense bytes.
    Raises:
        ValueError: safetensors does not have a dtype, or two tensors of the file would have one name.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {name: _describe(name, tensors[name], name in entries) for name in tensors}
    total, done = sum(tensor.dense_bytes for tensor in found.values()), 0
    header = Header(signature, tuple(found.values()))
    with replacing(path) as aside, Writer(aside, header.layout(), header.metadata()) as file:
        for name in tensors:
            digest = hashlib.sha256()
            for part, values in zip(found[name].parts, _stored(found[name], tensors[name]), strict=True):
                digest.update(encode(values).data)
                file.write(part, values)
            found[name] = replace(found[name], sha256=digest.hexdigest())
            done += found[name].dense_bytes
            if progress:
                progress(name, done, total)
        file.set_metadata(Header(signature, tuple(found.values())).metadata())
    return path


def _describe(name: str, tensor: Tensor, is_entry: bool) -> CompactTensor:
    name_of(tensor.dtype, name)
    whole = CompactTensor(name, tuple(tensor.shape), tensor.dtype, None)
    if not is_entry:
        return whole
    packed = replace(whole, kept=int(torch.count_nonzero(codec.words(tensor))))
    return packed if packed.stored_bytes < whole.stored_bytes else whole


def _stored(described: CompactTensor, tensor: Tensor) -> Sequence[Tensor]:
    """The tensors of the file, in the order of `parts`."""
    return [tensor] if described.kept is None else codec.pack(tensor)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_contents(folder: str | Path) -> Header:
    """The contents of FOLDER/compact.safetensors; no weight is read.

    Raises:
        ValueError: there is no such file, or it is truncated, damaged or of another format; one sentence.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    with _named(path):
        return _accept(*read_header(path))


def read(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of FOLDER/compact.safetensors, dense, on the CPU, in the order of the model.

    Raises:
        ValueError: as `read_contents`, or at the tensor that is damaged.
    """
    with opened(folder) as tensors:
        yield from tensors.items()


@contextmanager
def opened(folder: str | Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of FOLDER/compact.safetensors, each read when it is looked up; errors as `read`."""
    path = Path(folder) / FILE
    tensors = {tensor.name: tensor for tensor in read_contents(folder).tensors}
    with open_tensors(path) as file:

        def look_up(name: str) -> Tensor:
            with _named(path):
                return _read_tensor(file, tensors[name])

        yield LazyTensors(tensors, look_up)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file in an error about it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Get the file again, or write it anew.") from None


_Size = Annotated[int, Field(ge=0, lt=2**48)]


class _Row(BaseModel):
    """A tensor in the header's metadata."""

    model_config = ConfigDict(strict=True, extra="forbid")
    shape: Annotated[list[_Size], Field(max_length=64)]
    dtype: str
    kept: _Size | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _accept(text: bytes, area: int) -> Header:
    """The contents described by the header of a file with `area` bytes after it.

    All sizes follow from the model's own shapes and counts, and the header must agree with them in each tensor.

    Raises:
        ValueError: it is damaged, or the file has another size.
    """
    table = parse_table(text)
    metadata = table.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f'has not the format "{FORMAT}"')
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"has version {printable(str(metadata.get('version')))}, this gap_ds reads {VERSION}")
    digest, signature, rows = (metadata.get(key) for key in ("sha256", "signature", "tensors"))
    if not (isinstance(digest, str) and isinstance(signature, str) and isinstance(rows, str)):
        raise ValueError("its header lacks a digest, a signature or the list of tensors")
    if hashlib.sha256(text.replace(digest.encode(), _ZEROS.encode(), 1)).hexdigest() != digest:
        raise ValueError("its header was changed: it has another SHA-256")
    header = Header(signature, tuple(_tensor(name, row) for name, row in parse_table(rows.encode()).items()))
    expected = header_table(header.layout(), {})
    for name in expected.keys() | table.keys():
        if name != "__metadata__" and expected.get(name) != table.get(name):
            raise ValueError(f"its header contradicts itself about {printable(name)}")
    if area != (end := sum(tensor.stored_bytes for tensor in header.tensors)):
        raise ValueError(f"its tensors have {end} bytes, and {area} follow the header")
    return header


def _tensor(name: str, row: Any) -> CompactTensor:
    try:
        found = _Row.model_validate(row)
        tensor = CompactTensor(name, tuple(found.shape), DTYPES[found.dtype], found.kept, found.sha256)
    except (ValidationError, KeyError):
        raise ValueError(f"its header has a wrong, missing or unknown field for {printable(name)}") from None
    # An empty tensor's other dimensions are in no size that could be compared.
    if math.prod(max(dim, 1) for dim in tensor.shape) >= 2**48 or (tensor.kept or 0) > tensor.numel:
        raise ValueError(f"the shape of {printable(name)} is that of no weight")
    return tensor


def _read_tensor(file: Any, described: CompactTensor) -> Tensor:
    digest, parts = hashlib.sha256(), []
    for name in described.parts:
        parts.append(file.get_tensor(name))
        digest.update(encode(parts[-1]).data)
    if digest.hexdigest() != described.sha256:
        raise ValueError(f"{printable(described.name)} was changed: it has another SHA-256")
    if described.kept is None:
        whole: Tensor = parts[0]
        return whole
    bits, values = parts
    used = described.numel % 8 or 8  # bits of the last byte
    if bitmask.count(bits) != described.kept or (bits.numel() and int(bits[-1]) >> used):
        raise ValueError(f"the mask of {printable(described.name)} does not keep {described.kept} weights")
    return codec.spread(values, bits, described.numel).view(described.shape)


def figures(folder: str | Path) -> dict[str, Any]:
    """Sizes of a compact folder, for JSON: of the tensors in bytes, and of the file itself."""
    found = read_contents(folder)
    packed = [tensor for tensor in found.tensors if tensor.kept is not None]
    return {
        "path": str(folder),
        "signature": found.signature,
        "tensors": len(found.tensors),
        "packed": len(packed),
        "weights": sum(tensor.numel for tensor in packed),
        "kept": sum(tensor.kept or 0 for tensor in packed),
        "packed_dense_bytes": sum(tensor.dense_bytes for tensor in packed),
        "packed_bytes": sum(tensor.stored_bytes for tensor in packed),
        "dense_bytes": sum(tensor.dense_bytes for tensor in found.tensors),
        "file_bytes": (Path(folder) / FILE).stat().st_size,
    }
