"""What an export holds, dense or compact: every tensor is read and counted, and compared with what gap.json says."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gap_ds.checkpoint.run_state import Count
from gap_ds.export import compact
from gap_ds.export import folder as export
from gap_ds.masks.legality import Legality, multiple, possible_dims
from gap_ds.method import pattern
from gap_ds.method.pattern import Pattern, Unstructured
from gap_ds.method.signature import config_of
from gap_ds.storage import files
from gap_ds.storage import json as records
from gap_ds.storage import safetensors as tensorfile

#: Called with a file's or tensor's name and the bytes done and in all.
Progress = Callable[[str, int, int], None]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class EntryInfo(records.Record):
    """A line of `entries` in gap.json."""

    keep: Count
    nonzero: Count
    numel: Count
    partition: Annotated[int, Field(ge=0, lt=2**31)]
    dims: list[Count] | None = None

    def known_dims(self, n: int) -> tuple[int, int] | None:
        """Output and input dimension of a tensor of n dimensions, if they are said and can be."""
        pair = tuple(self.dims or ())
        return (pair[0], pair[1]) if pair in possible_dims(n) else None


class ExportInfo(records.Record):
    """gap.json as `GaPEngine.export` writes it."""

    signature: str
    applied_steps: Count
    entry_sparsity: float
    model_sparsity: float
    kept: Count
    numel: Count
    model_numel: Count | None = None
    entries: dict[str, EntryInfo]
    sha256: dict[str, str] = Field(default_factory=dict)


def inspect(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of an export, for JSON; what is wrong with it is in `problems`, a sentence each.

    Raises:
        ValueError: gap.json or a file of weights cannot be read.
    """
    info = records.read_json(folder / export.INFO, ExportInfo)
    config = config_of(info.signature)
    the_pattern = pattern.parse(config.pattern) if config is not None else Unstructured()
    entries: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    whole: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    paths = _weight_files(folder)
    is_compact = folder / compact.FILE in paths
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    hashed = [path for path in sizes if path.name in info.sha256]  # earlier exports have no digests
    dense = compact.figures(folder)["dense_bytes"] if is_compact else sum(sizes.values())
    done, total = 0, sum(sizes[path] for path in hashed) + dense
    for path in hashed:
        if export.sha256(path) != info.sha256[path.name]:
            problems.append(f"{path.name}: was changed: {export.INFO} has another SHA-256 of it")
        done += sizes[path]
        progress(path.name, done, total)
    for path, expected in paths.items():
        with _open(path) as file:
            names = list(file.keys())
            if expected is not None and (lost := sorted(set(expected) - set(names))):
                problems.append(f"{path.name}: lacks {records.printable(lost[0])}, which the index says it has")
            for name in names:
                figures, problem = _count(file, name, info.entries.get(name), the_pattern)
                if problem:
                    problems.append(f"{records.printable(name)}: {problem}")
                dtypes[figures["dtype"]] += figures["weights"]
                whole.update(weights=figures["weights"], nonzero=figures["nonzero"], bytes=figures["bytes"], tensors=1)
                if name in info.entries:
                    entries[name] = figures
                done += figures["bytes"]
                progress(records.printable(name), done, total)
    shared_budget = config is not None and config.distribution == "global"
    problems += [f"{records.printable(name)}: is in no file" for name in info.entries if name not in entries]
    rows = _partitions(info, entries)
    problems += _budgets(info, entries, rows, shared_budget) + _totals(info) + _config_dtype(folder, dtypes)
    notes = _notes(info, entries, config is None)
    if is_compact:
        problems += _signature(folder, info)
        notes += _saved(folder)
    elif (folder / compact.FILE).is_file():
        notes.append(f"{', '.join(path.name for path in paths)}: checked; {compact.FILE}, which is there too, is not")
    return {
        "kind": "export",
        "path": str(folder),
        "signature": info.signature,
        "method": config.method if config is not None else None,
        "pattern": str(the_pattern) if config is not None else None,
        "applied_steps": info.applied_steps,
        "files": len(paths),
        "tensors": whole["tensors"],
        "bytes": whole["bytes"],
        "dtypes": dict(dtypes),
        "model": {"weights": whole["weights"], "nonzero": whole["nonzero"]},
        "partitions": rows,
        "entries": {
            name: {"partition": said.partition, "keep": said.keep, **_without(entries[name], "bytes")}
            for name, said in info.entries.items()
            if name in entries
        },
        "notes": notes,
        "problems": problems,
    }


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """As `export.weight_files`; where there is only the compact form, its file."""
    path = folder / compact.FILE
    if path.is_file() and not any(folder.glob("model.safetensors*")):
        return {path: None}
    return export.weight_files(folder)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A file of weights, as safetensors opens it."""
    if path.name != compact.FILE:
        with files.open_tensors(path) as file:
            yield file
        return
    with compact.opened(path.parent) as tensors:
        yield _Compact(tensors)


class _Compact:
    """A compact file in the words of safetensors: dense tensors, one at a time."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, _Slice] | None = None

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> _Slice:
        if self._last is None or self._last[0] != name:
            self._last = name, _Slice(self._tensors[name])
        return self._last[1]


@dataclass(frozen=True)
class _Slice:
    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return tensorfile.NAMES[self.tensor.dtype]

    def __getitem__(self, index: slice) -> Tensor:
        return self.tensor[index]


def _saved(folder: Path) -> list[str]:
    found = compact.figures(folder)
    return [f"compact form: {found['file_bytes']:,} bytes; the dense tensors have {found['dense_bytes']:,}"]


def _count(file: Any, name: str, said: EntryInfo | None, the_pattern: Pattern) -> tuple[dict[str, Any], str | None]:
    """The counts of one tensor and what is wrong with it."""
    piece = file.get_slice(name)
    shape = piece.get_shape()
    dims = said.known_dims(len(shape)) if said is not None else None
    legality = None
    if said is not None and not isinstance(the_pattern, Unstructured):
        legality = Legality(the_pattern, shape, dims, exact=False, keep=said.keep)
    nonzero, size, is_finite = 0, 0, True
    for part in files.chunks(file, name, multiple(the_pattern)):
        values = files.plain(part)
        size += part.numel() * part.element_size()
        is_finite &= files.is_finite(values)
        kept = values != 0
        nonzero += int(torch.count_nonzero(kept))
        if legality is not None:
            legality.add(kept)
    figures = {"weights": math.prod(shape), "nonzero": nonzero, "shape": shape, "dtype": piece.get_dtype()}
    figures["bytes"] = size
    problem = None
    if not is_finite:
        problem = "holds values that are NaN or infinite"
    elif said is not None and said.numel != figures["weights"]:
        problem = f"has {figures['weights']:,} weights, {export.INFO} says {said.numel:,}"
    elif said is not None and said.nonzero != nonzero:
        problem = f"has {nonzero:,} weights that are not zero, {export.INFO} says {said.nonzero:,}"
    elif legality is not None:
        problem = legality.problem()
    return figures, problem


def _partitions(info: ExportInfo, entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[int, Counter[str]] = {}
    for name, said in info.entries.items():
        if name in entries:
            found = entries[name]
            row = rows.setdefault(said.partition, Counter())
            row.update(entries=1, weights=found["weights"], keep=said.keep, nonzero=found["nonzero"])
    return [{"partition": k, **{key: rows[k][key] for key in _COLUMNS}} for k in sorted(rows)]


_COLUMNS = ("entries", "weights", "keep", "nonzero")


def _budgets(
    info: ExportInfo, entries: dict[str, dict[str, Any]], rows: list[dict[str, Any]], shared_budget: bool
) -> list[str]:
    """Entries with more weights than they may keep; with a budget for each partition, partitions."""
    if shared_budget:
        return [
            f"partition {row['partition']}: has {row['nonzero']:,} weights that are not zero, its budget is "
            f"{row['keep']:,}"
            for row in rows
            if row["nonzero"] > row["keep"]
        ]
    return [
        f"{records.printable(name)}: has {entries[name]['nonzero']:,} weights that are not zero, its budget is "
        f"{said.keep:,}"
        for name, said in info.entries.items()
        if name in entries and entries[name]["nonzero"] > said.keep
    ]


def _signature(folder: Path, info: ExportInfo) -> list[str]:
    """Whether the compact file is of the run that gap.json is of."""
    if compact.header(folder).signature == info.signature:
        return []
    return [f"{compact.FILE}: has another signature than {export.INFO}: one of them is of another run"]


def _totals(info: ExportInfo) -> list[str]:
    """Whether gap.json agrees with itself."""
    problems = []
    for key, total in (("kept", "keep"), ("numel", "numel")):
        found = sum(getattr(entry, total) for entry in info.entries.values())
        if getattr(info, key) != found:
            problems.append(f'{export.INFO}: "{key}" is {getattr(info, key):,}, its entries have {found:,}')
    if info.numel and abs(info.entry_sparsity - (info.numel - info.kept) / info.numel) > 1e-9:
        problems.append(f'{export.INFO}: "entry_sparsity" is {info.entry_sparsity}, which its counts do not give')
    # Exports without "model_numel" do not say of how many weights it is the share; the model has its entries at least.
    if info.model_numel:
        wrong = abs(info.model_sparsity - (info.numel - info.kept) / info.model_numel) > 1e-9
    else:
        wrong = not -1e-9 < info.model_sparsity < info.entry_sparsity + 1e-9
    if wrong:
        problems.append(f'{export.INFO}: "model_sparsity" is {info.model_sparsity}, which its counts do not give')
    return problems


def _config_dtype(folder: Path, dtypes: Counter[str]) -> list[str]:
    """Whether config.json, where there is one, has the dtype of the weights: `from_pretrained` believes it."""

    class HfConfig(records.Record):
        dtype: Any = None
        torch_dtype: Any = None

    if not (folder / "config.json").is_file() or not dtypes:
        return []
    config = records.read_json(folder / "config.json", HfConfig)
    said = config.dtype or config.torch_dtype
    held = {_DTYPES.get(dtype, dtype) for dtype in dtypes}
    if isinstance(said, str) and said not in held:
        names = ", ".join(sorted(held))
        return [f"config.json: says that the weights are {records.printable(json.dumps(said))}, they are {names}"]
    return []


def _notes(info: ExportInfo, entries: dict[str, dict[str, Any]], unread: bool) -> list[str]:
    notes = []
    zeros = sum(said.keep - entries[name]["nonzero"] for name, said in info.entries.items() if name in entries)
    if zeros > 0:
        notes.append(f"{zeros:,} weights inside the budgets are exactly zero")
    if unread:
        notes.append("the signature is one that this version cannot read: the pattern is not checked")
    return notes


def _without(figures: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != key}
