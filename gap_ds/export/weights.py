"""The files of an exported model's weights, dense or compact: written, found, opened, and read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from gap_ds.export import compact_file
from gap_ds.export.info import INFO
from gap_ds.masks import codec
from gap_ds.method.names import by_parameter, rows_of
from gap_ds.storage.errors import printable
from gap_ds.storage.json import Count, Record, read_json, write_json
from gap_ds.storage.safetensors import (
    CHUNK,
    NAMES,
    Layout,
    Progress,
    Writer,
    chunk_rows,
    chunks,
    offsets,
    open_tensors,
)

#: The file that lists the numbered files of a model's weights.
INDEX = "model.safetensors.index.json"
#: Weights beyond this many bytes are cut into several files; transformers' default, too.
MOST_BYTES = 50 * 10**9


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


def counts_of(name: str, tensor: Tensor, entries: Iterable[str]) -> dict[str, Counted]:
    """The figures of a tensor, and of each of its entries, which may be some of its rows."""
    of_rows = {entry: rows for entry in entries if (rows := rows_of(entry)[1]) is not None}
    return {name: Counted.of(tensor)} | {entry: Counted.of(tensor[lo:hi]) for entry, (lo, hi) in of_rows.items()}


def count_nonzero(tensor: Tensor) -> int:
    """Weights of a tensor that are not zero."""
    # 8-bit floats have few operations.
    return int(torch.count_nonzero(tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor))


def check_range(name: str, cast: Tensor) -> None:
    """ValueError: float16 weights became infinite. Other dtypes have the range of fp32, or keep what they had."""
    if cast.dtype != torch.float16:
        return
    flat = cast.reshape(-1)
    if lost := sum(int(flat[lo : lo + CHUNK].isinf().sum()) for lo in range(0, flat.numel(), CHUNK)):
        most = torch.finfo(cast.dtype).max
        raise ValueError(
            f"{name}: {lost:,} of its weights are beyond {most:,.0f}, the largest number of {cast.dtype}. Export it as "
            "bfloat16 or float32."
        )


# -- writing -----------------------------------------------------------------------------------------------------------


class ModelFiles:
    """Writes the weights of a dense model to a folder, a tensor at a time and in any order, inside a `with` block.

    They become model.safetensors; beyond `MOST_BYTES` numbered files and their index, as transformers writes them.
    An error of the disk is raised at the end of the block.

    Args:
        layout: the tensors to come.
    Raises:
        ValueError: safetensors does not have a dtype.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout, self._open = folder, layout, ExitStack()
        files = _split(layout)
        names = {file: f"model-{i:05}-of-{len(files):05}.safetensors" for i, file in enumerate(files, 1)}
        self._names = names if len(files) > 1 else dict.fromkeys(files, "model.safetensors")
        self._writers: dict[str, Writer] = {}

    def __enter__(self) -> ModelFiles:
        for names, path in self._names.items():
            # transformers requires this format; wide dtypes come first, so that all are aligned.
            layout = codec.wide_first({name: self._layout[name] for name in names})
            writer = self._open.enter_context(Writer(self._folder / path, layout, {"format": "pt"}))
            self._writers |= dict.fromkeys(names, writer)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor of the layout."""
        self._writers[name].write(name, tensor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and len(self._names) > 1:
            homes = {name: path for names, path in self._names.items() for name in names}
            size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._layout.values())
            write_json(self._folder / INDEX, {"metadata": {"total_size": size}, "weight_map": homes})
        self._open.__exit__(kind, error, trace)


def _split(layout: Layout) -> list[tuple[str, ...]]:
    """The names of the tensors of each file: in their order, no more than `MOST_BYTES` unless it is a single tensor."""
    files: list[list[str]] = [[]]
    held = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and held + size > MOST_BYTES:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return [tuple(file) for file in files]


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], progress: Progress | None = None, entries: Iterable[str] = ()
) -> dict[str, Counted]:
    """Writes the weights of a model, a tensor at a time; each is looked up twice. Returns their figures.

    Args:
        progress: called after each tensor, in bytes.
        entries: names of entries whose figures are returned, too.
    """
    of_parameter = by_parameter(entries)
    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    counts: dict[str, Counted] = {}
    for name in tensors:
        tensor = tensors[name]
        layout[name] = tensor.dtype, tuple(tensor.shape)
        counts |= counts_of(name, tensor, of_parameter.get(name, ()))
    ends = {name: end for name, (_, end) in offsets(layout).items()}
    with ModelFiles(folder, layout) as files:
        for name, end in ends.items():
            files.write(name, tensors[name])
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
    single, index = folder / "model.safetensors", folder / INDEX
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

    def runs(self, rows: Sequence[tuple[int, int]], multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The pieces of several runs of its rows, each with the number of its run; all is read once."""
        at = 0
        for chunk in self.chunks(multiple):
            for i, (lo, hi) in enumerate(rows):
                if (part := chunk[max(lo - at, 0) : max(hi - at, 0)]).shape[0]:
                    yield i, part
            at += chunk.shape[0]

    def counted_entries(self, entries: Iterable[str]) -> dict[str, Counted]:
        """The figures of those of its entries that are some of its rows."""
        of_rows = {entry: rows for entry in entries if (rows := rows_of(entry)[1]) is not None}
        if not of_rows or not self.shape:
            return {}
        nonzero, height = [0] * len(of_rows), [0] * len(of_rows)
        for i, part in self.runs(list(of_rows.values())):
            nonzero[i] += count_nonzero(part)
            height[i] += part.shape[0]
        return {entry: Counted((n, *self.shape[1:]), k) for entry, n, k in zip(of_rows, height, nonzero, strict=True)}


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


def counts_in(folder: Path, entries: Iterable[str]) -> dict[str, Counted]:
    """The figures of all tensors in a folder's files, and of those entries that are some rows of one."""
    cut, counts = by_parameter(entries), dict[str, Counted]()
    for path in weight_files(folder):
        with opened(path) as tensors:
            for name, tensor in tensors.items():
                counts[name] = tensor.counted
                counts |= tensor.counted_entries(cut.get(name, ()))
    return counts


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
        written: the names that the files must have, and no others, and those of entries in their rows; None: its
            figures are not compared.
    """
    found: dict[str, Counted] = {}
    entries = by_parameter(written)
    try:
        for path in files_of_any_form(folder):
            with opened(path) as tensors:
                for name, tensor in tensors.items():
                    found |= {name: tensor.counted, **tensor.counted_entries(entries.get(name, ()))}
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
