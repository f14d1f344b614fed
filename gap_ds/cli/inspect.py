"""`gap-ds inspect`: counts of a checkpoint or an export, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_ds import checkpoint, export
from gap_ds.checkpoint import inspect as inspect_checkpoint
from gap_ds.export import compact_file
from gap_ds.export import inspect as inspect_export
from gap_ds.export.weights import counts_in
from gap_ds.storage.errors import printable
from gap_ds.storage.safetensors import Progress


def inspect(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of a checkpoint or an export, for JSON; `problems` is empty if nothing is wrong.

    Args:
        folder: FOLDER/TAG of a checkpoint, FOLDER for the newest in it, a checkpoint of a Trainer, what `save_masks`
            wrote, or an export.
    Raises:
        ValueError: it is none of these, or so damaged that it cannot be looked at.
    """
    is_masks = (folder / "state.json").is_file() and (folder / "masks.safetensors").is_file()
    if is_masks and not checkpoint.is_masks_alone(folder) and (whole := folder.resolve()).name == "gap":
        folder = whole.parent  # a checkpoint, whose other files are around this folder
    if is_masks or (folder / "gap" / "state.json").is_file():
        return _checkpoint(folder, progress)
    if found := checkpoint.newest(folder):
        return _checkpoint(found, progress)
    weights = ("model.safetensors", "model.safetensors.index.json", compact_file.FILE)
    if (folder / export.INFO).is_file() and any((folder / name).is_file() for name in weights):
        return inspect_export.inspect(folder, progress)
    raise ValueError(f"{folder}: {_reason(folder)}")


def _checkpoint(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of a checkpoint; weights in files of transformers beside its masks are compared with them."""
    figures = inspect_checkpoint.inspect(folder, progress)
    if not checkpoint.is_masks_alone(folder / "gap") or not any(folder.glob("model.safetensors*")):
        return figures
    nonzero = {name: found.nonzero for name, found in counts_in(folder, figures["entries"]).items()}
    masked = {name: row["kept"] for name, row in figures["entries"].items() if not row["dense"]}
    figures["problems"] += [
        f"{printable(name)}: has {nonzero[name]:,} weights that are not zero, its mask keeps {kept:,}"
        for name, kept in masked.items()
        if nonzero.get(name, 0) > kept
    ]
    figures["notes"].append(f"the weights of {len(masked.keys() & nonzero)} masked entries were counted beside them")
    if lost := [name for name in masked if name not in nonzero]:
        figures["notes"].append(f"{printable(lost[0])} has another name in the files of weights, so it is not counted")
    return figures


def _reason(folder: Path) -> str:
    """A sentence on why a folder cannot be inspected, with folders that can."""
    if not folder.exists():
        return "there is no such folder."
    if not folder.is_dir():
        return "is a file; inspect the folder that it is in."
    if inside := [name for name in ("model", "checkpoints") if (folder / name).is_dir()]:
        return f"is the folder of a run; inspect {' or '.join(f'{folder}/{name}' for name in inside)}."
    if (folder / "trainer_state.json").is_file():
        return "is a checkpoint of a Trainer without masks: it was trained without GaPCallback."
    if any(folder.glob("*.safetensors")):
        return f"holds weights and no {export.INFO}: it was not exported by gap_ds. Write the model by engine.export."
    if any(folder.glob("checkpoint-*/trainer_state.json")):
        return "holds checkpoints of a Trainer, and none has masks: it was trained without GaPCallback."
    return f"holds neither a checkpoint (gap/state.json) nor an export ({export.INFO} and model.safetensors)."
