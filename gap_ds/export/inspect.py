"""Counts of an export, dense or compact: every tensor is read, counted and compared with gap.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gap_ds.export import compact_file
from gap_ds.export.info import INFO, EntryInfo, ExportInfo
from gap_ds.export.weights import StoredTensor, files_of_any_form, opened
from gap_ds.masks.legality import Legality, multiple
from gap_ds.method import pattern
from gap_ds.method.pattern import Pattern, Unstructured
from gap_ds.storage.atomic import sha256
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
    count = _Count(progress, total + _size(hashed))
    for path in hashed:
        if sha256(path) != info.sha256[path.name]:
            count.problems.append(f"{path.name}: was changed: {INFO} has another SHA-256 of it")
        count.advance(path.name, path.stat().st_size)
    for path, expected in paths.items():
        with opened(path) as tensors:
            if expected is not None and (lost := sorted(set(expected) - set(tensors))):
                count.problems.append(f"{path.name}: lacks {printable(lost[0])}, which the index lists")
            for name, tensor in tensors.items():
                count.add(name, tensor, info.entries.get(name), the_pattern)
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
            name: {"partition": row.partition, "keep": row.keep, **_without(entries[name], "bytes")}
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

    def add(self, name: str, tensor: StoredTensor, entry: EntryInfo | None, the_pattern: Pattern) -> None:
        figures, problem = _count(tensor, entry, the_pattern)
        if problem:
            self.problems.append(f"{printable(name)}: {problem}")
        self.dtypes[figures["dtype"]] += figures["weights"]
        self.whole.update(weights=figures["weights"], nonzero=figures["nonzero"], bytes=figures["bytes"], tensors=1)
        if entry is not None:
            self.entries[name] = figures
        self.advance(name, figures["bytes"])


def _count(tensor: StoredTensor, entry: EntryInfo | None, the_pattern: Pattern) -> tuple[dict[str, Any], str | None]:
    """The counts of one tensor and a sentence on what is wrong with it."""
    legality = None
    if entry is not None and not isinstance(the_pattern, Unstructured):
        dims = entry.known_dims(len(tensor.shape))
        legality = Legality(the_pattern, tensor.shape, dims, exact=False, keep=entry.keep)
    nonzero, size, is_finite = 0, 0, True
    for part in tensor.chunks(multiple(the_pattern)):
        # 8-bit floats have few operations.
        values = part.float() if part.is_floating_point() and part.element_size() < 2 else part
        size += part.numel() * part.element_size()
        is_finite &= not values.is_floating_point() or bool(torch.isfinite(values).all())
        kept = values != 0
        nonzero += int(torch.count_nonzero(kept))
        if legality is not None:
            legality.add(kept)
    numel = math.prod(tensor.shape)
    figures = {"weights": numel, "nonzero": nonzero, "shape": tensor.shape, "dtype": tensor.dtype, "bytes": size}
    problem = None
    if not is_finite:
        problem = "holds values that are NaN or infinite"
    elif entry is not None and entry.numel != numel:
        problem = f"has {numel:,} weights, {INFO} has {entry.numel:,}"
    elif entry is not None and entry.shape not in (None, list(tensor.shape)):
        problem = f"has the shape {list(tensor.shape)}, {INFO} has {entry.shape}"
    elif entry is not None and entry.nonzero != nonzero:
        problem = f"has {nonzero:,} weights that are not zero, {INFO} has {entry.nonzero:,}"
    elif legality is not None:
        problem = legality.problem()
    return figures, problem


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


def _without(figures: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != key}
