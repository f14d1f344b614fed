"""Read committed results, and format them for tables."""

from __future__ import annotations

import json
from typing import Any

import measure

RESULTS = measure.RESULTS

Row = dict[str, Any]

#: Weights of the rows that the tables show. The results have rows of other sizes as well.
SHOWN = 20_000_000
NO_GPU = "GPU figures: not measured yet (`make bench-gpu`).\n"


def read(name: str, key: str = "rows") -> list[Row]:
    """Return the rows of a result; none if there is no such result."""
    path = RESULTS / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))[key] if path.exists() else []
    return rows


def read_rows(name: str, gpu: bool = False) -> list[Row]:
    """Return the rows of a result, of the CPU or of the GPU."""
    return gpu_results().get(name, {}).get("rows", []) if gpu else read(name)


def gpu() -> dict[str, Any]:
    """Return the contents of gpu.json; empty if there is none."""
    path = RESULTS / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def gpu_results() -> dict[str, Any]:
    """Return the results in gpu.json by benchmark."""
    found: dict[str, Any] = gpu().get("results", {})
    return found


def device() -> str:
    """Return the GPU of gpu.json; empty if it has no result."""
    machine = gpu().get("machine", {})
    return f"{machine['gpu']} (CUDA {machine.get('cuda')}, torch {machine['torch']})" if gpu_results() else ""


def as_table(rows: list[Row]) -> str:
    """Return rows as Markdown; empty without rows."""
    return measure.table(rows) if rows else ""


def span(values: Any, form: str = "{:.3f}") -> str:
    """Join formatted values by "to"."""
    return " to ".join(form.format(value) for value in values) if values else ""


def is_fp32(row: Row) -> bool:
    """Return True for a row of fp32 weights."""
    return bool(row["dtype"] == "float32")
