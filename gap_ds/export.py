"""Export: the final sparse model as a complete Hugging Face folder, from any backend, at any time of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gap_ds import masks
from gap_ds.checkpoint import write_json
from gap_ds.comm import Comm, by_rank
from gap_ds.plan import clean_name
from gap_ds.shard import Shard

INFO = "gap.json"


def full_weights(
    module: nn.Module, shards: Sequence[Shard], bits: Mapping[str, Tensor], comm: Comm, dtype: torch.dtype
) -> dict[str, Tensor]:
    """On rank 0 all weights and buffers of the model with masks applied, on the CPU; on other ranks an empty dict.

    The run's own weights are not touched. Parameters travel one at a time. All ranks of `comm` must call this.

    Args:
        bits: packed mask of this rank's piece of each entry that is to be sparse.
    """
    weights: dict[str, Tensor] = {}
    ranges = by_rank([(shard.start, shard.numel) for shard in shards], comm)
    for shard, (starts, numels) in zip(shards, ranges, strict=True):
        piece = shard.weight().clone()
        if shard.name in bits and shard.numel:
            masks.zero_pruned_(piece, bits[shard.name])
        piece = piece.to(dtype) if piece.is_floating_point() else piece
        whole = comm.assemble(piece, starts, numels, shard.full_numel)
        if whole is not None:
            weights[shard.name] = whole.view(shard.shape)
    if comm.rank == 0:
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in buffers(module)}
    return weights


def buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds; they are whole on every rank."""
    return [
        (clean_name(f"{prefix}.{name}" if prefix else name), buffer)
        for prefix, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    ]


def write_model(
    folder: Path,
    module: nn.Module,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    info: dict[str, Any],
    tokenizer: Any,
) -> None:
    """Writes a model folder so that it is whole or absent. For rank 0.

    A Hugging Face model becomes what `from_pretrained` reads; any other model becomes `model.safetensors` alone.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_pretrained = getattr(module, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(aside, state_dict=weights)
        _say_dtype(aside / "config.json", dtype)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    write_json(aside / INFO, info)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """The working copies may be bf16 where the exported weights are fp32: the config must say what the file holds."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of an exported model's weights, and the names that each should hold; None: whatever it holds.

    Raises:
        ValueError: there are none, the index is damaged, or names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ValueError(f"{folder}: has neither {single.name} nor {index.name}.")
    try:
        homes = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = next((home for home in homes.values() if Path(home).name != home or home in ("", ".", "..")), None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{index}: is damaged.") from None
    if outside is not None:
        raise ValueError(f"{index}: names a file that is not in its folder ({outside[:200]!a}).")
    return {folder / home: [name for name in homes if homes[name] == home] for home in sorted(set(homes.values()))}
