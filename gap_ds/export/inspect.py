"""Counts of an export, dense or compact: every tensor is read, counted and compared with gap.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.export import compact_file
from gap_ds.export.info import INFO, EntryInfo, ExportInfo, is_as_recorded
from gap_ds.export.weights import StoredTensor, files_of_any_form, opened
from gap_ds.masks.legality import Legality, multiple
from gap_ds.method import pattern
from gap_ds.method.names import by_parameter, rows_of
from gap_ds.method.pattern import Pattern, Unstructured
from gap_ds.storage.errors import printable
from gap_ds.storage.json import Record, read_json
from gap_ds.storage.safetensors import Progress

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COLUMNS = ("entries", "weights", "keep", "nonzero")


def inspect(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of an export, for JSON; `problems` has a sentence for each thing that is wrong.

    Raises:
        ValueError: gap.json or a file of weights cannot be read.
    """
    info = read_json(folder / INFO, ExportInfo)
    the_pattern = pattern.parse(info.config.pattern)
    paths = files_of_any_form(folder)
    is_compact = folder / compact_file.FILE in paths
    total = compact_file.figures(folder)["dense_bytes"] if is_compact else _size(paths)
    hashed = [path for path in paths if path.name in info.sha256 and path.is_file()]
    count, of_tensor = _Count(progress, total + _size(hashed)), by_parameter(info.entries)
    for path in hashed:
        if not is_as_recorded(path, info.sha256):
            count.problems.append(f"{path.name}: was changed: {INFO} has another SHA-256 of it")
        count.advance(path.name, path.stat().st_size)
    for path, expected in paths.items():
        with opened(path) as tensors:
            if expected is not None and (lost := sorted(set(expected) - set(tensors))):
                count.problems.append(f"{path.name}: lacks {printable(lost[0])}, which the index lists")
            for name, tensor in tensors.items():
                count.add(name, tensor, {n: info.entries[n] for n in of_tensor.get(name, ())}, the_pattern)
    entries, problems = count.entries, count.problems
    problems += [f"{printable(name)}: is in no file" for name in info.entries if name not in entries]
    rows = _partitions(info, entries)
    problems += _budgets(info, entries, rows) + _totals(info) + _config_dtype(folder, count.dtypes)
    notes = _notes(info, entries)
    if is_compact:
        problems += _signature(folder, info)
        notes += _saved(folder)
    elif (folder / compact_file.FILE).is_file():
        names = ", ".join(path.name for path in paths)
        notes.append(f"{names}: checked; {compact_file.FILE}, which is there too, is not")
    return {
        "kind": "export",
        "path": str(folder),
        "signature": info.signature,
        "method": info.config.method,
        "pattern": str(the_pattern),
        "applied_steps": info.applied_steps,
        "files": len(paths),
        "tensors": count.whole["tensors"],
        "bytes": count.whole["bytes"],
        "dtypes": dict(count.dtypes),
        "model": {"weights": count.whole["weights"], "nonzero": count.whole["nonzero"]},
        "partitions": rows,
        "entries": {
            name: {"partition": row.partition, "keep": row.keep, **entries[name]}
            for name, row in info.entries.items()
            if name in entries
        },
        "notes": notes,
        "problems": problems,
    }


# -- files -------------------------------------------------------------------------------------------------------------


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


# -- counts ------------------------------------------------------------------------------------------------------------


class _Count:
    """Counts of the tensors so far: of each entry, and of all together."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total
        self.entries: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.whole: Counter[str] = Counter()
        self.dtypes: Counter[str] = Counter()

    def advance(self, name: str, size: int) -> None:
        self._done += size
        self._progress(printable(name), self._done, self._total)

    def add(self, name: str, tensor: StoredTensor, entries: Mapping[str, EntryInfo], the_pattern: Pattern) -> None:
        """Counts a tensor and its entries: it is one itself, or some of its rows are."""
        whole = _Figures(tensor.shape, tensor.dtype, entries.get(name), the_pattern)
        parts = {
            entry: (rows, _Figures([rows[1] - rows[0], *tensor.shape[1:]], tensor.dtype, info, the_pattern))
            for entry, info in entries.items()
            if (rows := rows_of(entry)[1]) is not None and tensor.shape
        }
        for part in tensor.chunks(multiple(the_pattern)):
            whole.add(part)
        figures = [figures for _, figures in parts.values()]
        for i, part in tensor.runs([rows for rows, _ in parts.values()], multiple(the_pattern)) if parts else ():
            figures[i].add(part)
        for entry, found in {name: whole, **dict(zip(parts, figures, strict=True))}.items():
            if problem := found.problem():
                self.problems.append(f"{printable(entry)}: {problem}")
            if entry in entries:
                self.entries[entry] = found.row()
        self.dtypes[tensor.dtype] += whole.weights
        self.whole.update(weights=whole.weights, nonzero=whole.nonzero, bytes=whole.bytes, tensors=1)
        self.advance(name, whole.bytes)


class _Figures:
    """Counts of one tensor or of an entry in its rows, and what is wrong with it; its pieces come in their order."""

    def __init__(self, shape: Sequence[int], dtype: str, entry: EntryInfo | None, the_pattern: Pattern) -> None:
        self._shape, self._dtype, self._entry = list(shape), dtype, entry
        self.weights, self.nonzero, self.bytes, self._is_finite, self._hidden = 0, 0, 0, True, 0
        self._legality: Legality | None = None
        if entry is not None and not isinstance(the_pattern, Unstructured):
            dims = entry.known_dims(len(shape))
            self._legality = Legality(the_pattern, self._shape, dims, exact=False, keep=entry.keep)

    def add(self, part: Tensor) -> None:
        # 8-bit floats have few operations.
        values = part.float() if part.is_floating_point() and part.element_size() < 2 else part
        self.weights += part.numel()
        self.bytes += part.numel() * part.element_size()
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            self._is_finite = False
            self._hidden += int(torch.count_nonzero(values == -math.inf))
        kept = values != 0
        self.nonzero += int(torch.count_nonzero(kept))
        if self._legality is not None:
            self._legality.add(kept)

    def row(self) -> dict[str, Any]:
        return {"weights": self.weights, "nonzero": self.nonzero, "shape": self._shape, "dtype": self._dtype}

    def problem(self) -> str | None:
        entry = self._entry
        # Masks of attention, which some models save, are 0 or -inf.
        if not self._is_finite and (entry is not None or self._hidden < self.nonzero):
            return "holds values that are NaN or infinite"
        if entry is not None and entry.numel != self.weights:
            return f"has {self.weights:,} weights, {INFO} has {entry.numel:,}"
        if entry is not None and entry.shape not in (None, self._shape):
            return f"has the shape {self._shape}, {INFO} has {entry.shape}"
        if entry is not None and entry.nonzero != self.nonzero:
            return f"has {self.nonzero:,} weights that are not zero, {INFO} has {entry.nonzero:,}"
        return None if self._legality is None else self._legality.problem()


def _partitions(info: ExportInfo, entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[int, Counter[str]] = {}
    for name, entry in info.entries.items():
        if name in entries:
            row = rows.setdefault(entry.partition, Counter())
            row.update(entries=1, keep=entry.keep, **{key: entries[name][key] for key in ("weights", "nonzero")})
    return [{"partition": k, **{key: rows[k][key] for key in _COLUMNS}} for k in sorted(rows)]


# -- problems and notes ------------------------------------------------------------------------------------------------


def _budgets(
    info: ExportInfo, entries: Mapping[str, dict[str, Any]], partitions: Sequence[Mapping[str, int]]
) -> list[str]:
    """Entries with more weights than they may keep; where entries share a budget, partitions."""
    if info.config.distribution == "global":
        rows = [(f"partition {row['partition']}", row["nonzero"], row["keep"]) for row in partitions]
    else:
        rows = [(printable(n), entries[n]["nonzero"], e.keep) for n, e in info.entries.items() if n in entries]
    return [
        f"{name}: has {nonzero:,} weights that are not zero, its budget is {keep:,}"
        for name, nonzero, keep in rows
        if nonzero > keep
    ]


def _signature(folder: Path, info: ExportInfo) -> list[str]:
    if compact_file.read_contents(folder).signature == info.signature:
        return []
    return [f"{compact_file.FILE}: has another signature than {INFO}: one of them is of another run"]


def _saved(folder: Path) -> list[str]:
    found = compact_file.figures(folder)
    return [f"compact form: {found['file_bytes']:,} bytes; the dense tensors have {found['dense_bytes']:,}"]


def _totals(info: ExportInfo) -> list[str]:
    """Totals in gap.json that its entries do not add up to."""
    problems = []
    for key, total in (("kept", "keep"), ("numel", "numel")):
        found = sum(getattr(entry, total) for entry in info.entries.values())
        if getattr(info, key) != found:
            problems.append(f'{INFO}: "{key}" is {getattr(info, key):,}, its entries have {found:,}')
    for key, numel in (("entry_sparsity", info.numel), ("model_sparsity", info.model_numel)):
        if numel and abs(getattr(info, key) - (info.numel - info.kept) / numel) > 1e-9:
            problems.append(f'{INFO}: "{key}" is {getattr(info, key)}, which its counts do not give')
    return problems


class _HfConfig(Record):
    dtype: Any = None
    torch_dtype: Any = None


def _config_dtype(folder: Path, dtypes: Counter[str]) -> list[str]:
    """A sentence if config.json has another dtype than the weights: `from_pretrained` follows it."""
    if not (folder / "config.json").is_file() or not dtypes:
        return []
    config = read_json(folder / "config.json", _HfConfig)
    named = config.dtype or config.torch_dtype
    held = {_DTYPES.get(dtype, dtype) for dtype in dtypes}
    if isinstance(named, str) and named not in held:
        names = ", ".join(sorted(held))
        return [f'config.json: "dtype" is {printable(json.dumps(named))}, the weights are {names}']
    return []


def _notes(info: ExportInfo, entries: Mapping[str, dict[str, Any]]) -> list[str]:
    zeros = sum(entry.keep - entries[name]["nonzero"] for name, entry in info.entries.items() if name in entries)
    notes = [f"{zeros:,} weights inside the budgets are exactly zero"] if zeros > 0 else []
    return notes if info.finished is not False and info.ended_at is None else [info.progress.rstrip("."), *notes]
