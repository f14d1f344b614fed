"""`gap-ds export`: from a checkpoint or an exported model to an exported model, dense or compact."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from gap_ds.cli import models
from gap_ds.export import compact, compact_file, expand
from gap_ds.export.convert import check_out
from gap_ds.export.folder import place
from gap_ds.export.from_checkpoint import export_checkpoint, find_whole
from gap_ds.export.info import has_model_config
from gap_ds.storage.atomic import scratch_folder
from gap_ds.storage.safetensors import Progress


def export(
    source: Path, out: Path, form: str, model: Path | None, dtype: str, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Writes OUT; returns figures for JSON.

    Args:
        form: dense or compact.
        model, dtype: of a checkpoint alone.
    Raises:
        ValueError: `source` is neither, or is damaged; `out` holds something and `overwrite` is not set, or it is no
            exported model.
    """
    out = place(out)
    path = find_whole(source)
    if path is None:
        if model is not None or dtype != "float32":
            raise ValueError(f"{source}: is no checkpoint, so --model and --dtype have no effect. Remove them.")
        return _convert(source, out, form, overwrite, progress)
    check_out(path, out, overwrite)
    if model is None and has_model_config(path):  # as a Trainer's checkpoints have it
        model = path
    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"--model {model}: must be a folder with the config.json of the model.")
    module = None if model is None else models.meta_model(str(model.resolve()))
    write = partial(export_checkpoint, path, model=model, module=module, dtype=getattr(torch, dtype), progress=progress)
    if form == "dense":
        write(out)
        return {"path": str(out), "checkpoint": str(path)}
    try:
        with scratch_folder(out) as scratch:
            write(scratch / "dense")
            return _convert(scratch / "dense", out, form, overwrite, progress) | {"checkpoint": str(path)}
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}).") from error


def _convert(source: Path, out: Path, form: str, overwrite: bool, progress: Progress) -> dict[str, Any]:
    is_compact, is_dense = (source / compact_file.FILE).is_file(), any(source.glob("model.safetensors*"))
    if is_compact != is_dense and form == ("dense" if is_dense else "compact"):
        raise ValueError(f"{source}: is {form} already. Copy it, or choose another --format.")
    if form == "dense":
        return {"path": str(expand(source, out, overwrite=overwrite, progress=progress))}
    return compact(source, out, overwrite=overwrite, progress=progress)


def summary(figures: dict[str, Any]) -> str:
    """The line that the command prints."""
    origin = f" of {figures['checkpoint']}" if "checkpoint" in figures else ""
    if "file_bytes" not in figures:
        return f"{figures['path']}: the dense model{origin}"
    return (
        f"{figures['path']}: {figures['file_bytes']:,} bytes of weights instead of {figures['dense_bytes']:,} "
        f"({figures['packed']} of {figures['tensors']} tensors packed, {figures['kept']:,} of "
        f"{figures['weights']:,} weights kept){origin}"
    )
