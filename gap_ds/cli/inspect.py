"""`gap-ds inspect`: counts of a checkpoint or an export, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_ds import checkpoint, export
from gap_ds.checkpoint import inspect as inspect_checkpoint
from gap_ds.export import compact_file
from gap_ds.export import inspect as inspect_export
from gap_ds.storage.safetensors import Progress


def inspect(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of a checkpoint or an export, for JSON; `problems` is empty if nothing is wrong.

    Args:
        folder: FOLDER/TAG of a checkpoint, FOLDER for the newest in it, or an export.
    Raises:
        ValueError: it is none of these, or so damaged that it cannot be looked at.
    """
    if (folder / "gap" / "state.json").is_file():
        return inspect_checkpoint.inspect(folder, progress)
    if checkpoint.candidates(folder):
        return inspect_checkpoint.inspect(checkpoint.find(folder), progress)
    weights = ("model.safetensors", "model.safetensors.index.json", compact_file.FILE)
    if (folder / export.INFO).is_file() and any((folder / name).is_file() for name in weights):
        return inspect_export.inspect(folder, progress)
    raise ValueError(f"{folder}: {_reason(folder)}")


def _reason(folder: Path) -> str:
    """A sentence on why a folder cannot be inspected, with folders that can."""
    if not folder.exists():
        return "there is no such folder."
    if not folder.is_dir():
        return "is a file; inspect the folder that it is in."
    if inside := [name for name in ("model", "checkpoints") if (folder / name).is_dir()]:
        return f"is the folder of a run; inspect {' or '.join(f'{folder}/{name}' for name in inside)}."
    if any(folder.glob("*.safetensors")):
        return f"holds weights and no {export.INFO}: it was not exported by gap_ds."
    return f"holds neither a checkpoint (gap/state.json) nor an export ({export.INFO} and model.safetensors)."
