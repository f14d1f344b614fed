"""The files of an exported model's weights, dense or compact: written, found, opened, and read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gap_ds.export import compact_file
from gap_ds.export.info import INFO
from gap_ds.storage.errors import printable
from gap_ds.storage.json import Count, Record, read_json
from gap_ds.storage.safetensors import NAMES, Progress, Writer, chunk_rows, chunks, offsets, open_tensors


class Counted(NamedTuple):
    """Shape of a tensor, and its weights that are not zero."""

    shape: tuple[int, ...]
    nonzero: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Counted:
        """The figures of a tensor."""
        return cls(tuple(tensor.shape), count_nonzero(tensor))


def count_nonzero(tensor: Tensor) -> int:
    """Weights of a tensor that are not zero."""
    # 8-bit floats have few operations.
    return int(torch.count_nonzero(tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor))


# -- writing -----------------------------------------------------------------------------------------------------------


def write_weights(path: Path, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> dict[str, Counted]:
    """Writes a safetensors file that transformers reads, a tensor at a time; each is looked up twice.

    Args:
        progress: called after each tensor, in bytes.
    """
    layout, counts = {}, {}
    for name in tensors:
        tensor = tensors[name]
        layout[name] = tensor.dtype, tuple(tensor.shape)
        counts[name] = Counted.of(tensor)
    ends = {name: end for name, (_, end) in offsets(layout).items()}
    with Writer(path, layout, {"format": "pt"}) as file:  # transformers requires this format
        for name, end in ends.items():
            file.write(name, tensors[name])
            if progress:
                progress(name, end, max(ends.values()))
    return counts


# -- finding and opening -----------------------------------------------------------------------------------------------


def is_weights(path: Path) -> bool:
    """True if a file holds weights, or is the index of such files."""
    return path.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"))


class _Index(Record):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of a dense model's weights, and the names that each should hold; None: no index lists them.

    Raises:
        ValueError: there are none, the index is damaged, or names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ValueError(f"{folder}: has neither {single.name} nor {index.name}.")
    homes = read_json(index, _Index).weight_map
    for home in homes.values():
        if Path(home).name != home or home in ("", ".", ".."):
            raise ValueError(f"{index}: names a file that is not in its folder ({home[:200]!a}).")
    return {folder / home: [name for name in homes if homes[name] == home] for home in sorted(set(homes.values()))}


def files_of_any_form(folder: Path) -> dict[Path, list[str] | None]:
    """As `weight_files`; where there is only the compact form, its file."""
    path = folder / compact_file.FILE
    if path.is_file() and not any(folder.glob("model.safetensors*")):
        return {path: None}
    return weight_files(folder)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file. chunks: called with a number of rows; its pieces, multiples of that many rows."""

    shape: list[int]
    dtype: str
    chunks: Callable[[int], Iterator[Tensor]]

    @property
    def counted(self) -> Counted:
        """Its figures; all of it is read."""
        return Counted(tuple(self.shape), sum(map(count_nonzero, self.chunks(1))))


@contextmanager
def opened(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a file of weights. A dense file is read in chunks, of a compact one each tensor becomes dense."""
    if path.name == compact_file.FILE:
        with compact_file.opened(path.parent) as dense:

            def split(name: str, rows: int) -> Iterator[Tensor]:
                whole = dense[name]
                yield from torch.split(whole, chunk_rows(whole.shape, rows)) if whole.dim() else [whole]

            found = compact_file.read_contents(path.parent).tensors
            yield {t.name: StoredTensor(list(t.shape), NAMES[t.dtype], partial(split, t.name)) for t in found}
        return
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        yield {
            name: StoredTensor(piece.get_shape(), piece.get_dtype(), partial(chunks, file, name))
            for name, piece in slices.items()
        }


# -- reading back ------------------------------------------------------------------------------------------------------


class _Row(Record):
    """An entry of a gap.json, as far as it can be compared with a file."""

    nonzero: Count | None = None
    shape: list[Count] | None = None


class _Info(Record):
    entries: dict[str, _Row]


def first_difference(folder: Path, written: Mapping[str, Counted | None]) -> str | None:
    """Reads the weights of a folder; a sentence on the first tensor that is not there as it was meant, None if all are.

    Args:
        written: the names that the files must have, and no others; None: its figures are not compared.
    """
    found: dict[str, Counted] = {}
    try:
        for path in files_of_any_form(folder):
            with opened(path) as tensors:
                found |= {name: tensor.counted for name, tensor in tensors.items()}
    except ValueError as error:
        return str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").rstrip(".")
    for name, wanted in written.items():
        if name not in found:
            return f"{printable(name)} is in no file"
        if wanted is not None and found[name].shape != wanted.shape:
            return f"{printable(name)} has the shape {found[name].shape} and not {wanted.shape}"
        if wanted is not None and found[name].nonzero != wanted.nonzero:
            return (
                f"{printable(name)} has {found[name].nonzero:,} weights that are not zero, and not {wanted.nonzero:,}"
            )
    return next((f"{printable(name)} is no tensor of the model" for name in found if name not in written), None)


def read_back(folder: Path, target: Path, written: Mapping[str, Counted | None]) -> None:
    """Compares the files of a folder, to be shown as `target`, with what was written and with its gap.json.

    Raises:
        ValueError: a name, a shape or a number of weights that are not zero differs.
    """
    rows = read_json(folder / INFO, _Info).entries
    recorded = {
        name: written.get(name) if row.shape is None or row.nonzero is None else Counted(tuple(row.shape), row.nonzero)
        for name, row in rows.items()
    }
    if problem := first_difference(folder, {**written, **recorded}):
        raise ValueError(
            f"{target}: was not written: read back, the files differ from {INFO}: {problem}. Export the model anew; if "
            "that fails too, look at the disk."
        )
