"""`gap-ds export` of a checkpoint: the final sparse model from the files of a run, by one process, whatever wrote them.

Weights are read one at a time: from the portable files where there are any, else from the sharding library's own. An
entry that is dense at that step is pruned in the copy, exactly as `GaPEngine.export` would have done it then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gap_ds.checkpoint import folder as checkpoint
from gap_ds.checkpoint import foreign as library_files
from gap_ds.checkpoint import portable
from gap_ds.checkpoint.run_state import State
from gap_ds.cli import models
from gap_ds.export import folder as export
from gap_ds.export.folder import Progress
from gap_ds.masks import bitmask, selection
from gap_ds.method import pattern
from gap_ds.method.pattern import Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Schedule
from gap_ds.method.signature import config_of, schedule_of
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard
from gap_ds.storage import json as records


def find(folder: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest whole one in it; None where there is none.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    if (folder / "gap" / "state.json").is_file():
        folder = folder if folder.name not in ("", "..") else folder.resolve()
        return checkpoint.find_whole(folder.parent, folder.name, Comm(single=True))
    if checkpoint.candidates(folder):
        return checkpoint.find_whole(folder, None, Comm(single=True))
    return None


def write(
    path: Path, out: Path, *, model: Path | None = None, dtype: torch.dtype = torch.float32, progress: Progress
) -> None:
    """Writes the final sparse model of a checkpoint FOLDER/TAG as a dense folder OUT, replacing what is there.

    Args:
        model: folder with the model's config.json, and its tokenizer if it has one; both are copied. Without it, OUT
            holds the weights and gap.json alone; a tied weight is there under each of its names, and the sparsity of
            the whole model counts all of these, and buffers, too.
        dtype: of the parameters; buffers keep their own.
    Raises:
        ValueError: the files cannot be read like this, are damaged, or do not go with `model`; one sentence.
    """
    state = records.read_json(path / "gap" / "state.json", State)
    config = config_of(state.signature)
    schedule = schedule_of(config, state.first_steps, state.worker or 0) if config is not None else None
    if config is None or schedule is None or state.entries is None:
        raise ValueError(f"{path}: was written by a gap_ds whose plan this one cannot read. Export it with that one.")
    entries = tuple(
        Entry(name, tuple(shape), partition, keep, (dims[0], dims[1]))
        for name, shape, partition, keep, dims in state.entries
    )
    plan = Plan(entries, config.kappa, 0, 0, pattern.parse(config.pattern), config.distribution == "global")
    if model is None and dtype != torch.float32:
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')}: is that of the parameters alone, and without the model "
            "nobody knows which of the tensors are buffers. Set --model, or leave --dtype."
        )
    module = _module(model) if model is not None else None
    with contextlib.ExitStack() as stack:
        weights = _of_model(path, _read(path, module, plan, stack), module, plan)
        bits = _bits(path, plan, weights, schedule, state.applied_steps)
        folder = stack.enter_context(export.aside(out))
        if model is not None:
            export.copy_config(model, folder, dtype, type(module).__name__)
        kept = {} if module is None else {name: buffer.dtype for name, buffer in export.buffers(module)}
        tensors = _Pruned(weights, bits, dtype, kept)
        counts = export.write_weights(folder / "model.safetensors", tensors, progress)
        parameters = list(counts) if module is None else [name for name, _ in module.named_parameters()]
        plan = replace(plan, total=sum(counts[name].numel for name in parameters))
        nonzero = {name: count.nonzero for name, count in counts.items()}
        info = export.info(plan, schedule, state.signature, state.applied_steps, nonzero)
        checkpoint.write_json(folder / export.INFO, info)
        export.renew_digests(folder)
        export.write_card(folder)


def _module(model: Path) -> nn.Module:
    """The model of a folder, on the meta device."""
    if not (model / "config.json").is_file():
        raise ValueError(f"--model {model}: must be a folder with the config.json of the model.")
    return models.meta_model(str(model.resolve()))


# -- weights by name ---------------------------------------------------------------------------------------------------


def _read(path: Path, module: nn.Module | None, plan: Plan, stack: contextlib.ExitStack) -> Mapping[str, Tensor]:
    if not portable.exists(path / "gap"):
        return library_files.weights(path)
    shapes = {entry.name: entry.shape for entry in plan.entries}
    if module is not None:
        shapes |= {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}
    return portable.Weights(path / "gap", shapes, stack)


def _of_model(path: Path, weights: Mapping[str, Tensor], module: nn.Module | None, plan: Plan) -> Mapping[str, Tensor]:
    """What the model has, each tensor once, if it is known; else all that there is."""
    wanted = list(weights if module is None else _tensors(module))
    if lost := [name for name in (*wanted, *(entry.name for entry in plan.entries)) if name not in weights]:
        raise ValueError(f"{path}: does not hold {records.printable(lost[0])}. Set --model to the folder of its model.")
    return _Some(weights, wanted)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one under its first name, and buffers that a checkpoint holds."""
    return dict(module.named_parameters()) | dict(export.buffers(module))


class _Some(Mapping[str, Tensor]):
    """Some of the weights, in this order."""

    def __init__(self, weights: Mapping[str, Tensor], names: list[str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Pruned(_Some):
    """The weights with masks applied, in the dtype to write.

    Args:
        buffers: those of the model, which have their own dtype; DeepSpeed's consolidation makes all of them fp32.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        bits: Mapping[str, Tensor],
        dtype: torch.dtype,
        buffers: Mapping[str, torch.dtype],
    ) -> None:
        super().__init__(weights, list(weights))
        self._bits, self._dtype, self._buffers = bits, dtype, buffers

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name).clone(memory_format=torch.contiguous_format)
        if name in self._buffers:
            return weight if self._buffers[name].is_floating_point else weight.to(self._buffers[name])
        if name in self._bits and weight.numel():
            bitmask.zero_pruned_(weight.view(-1), self._bits[name])
        if not weight.is_floating_point():
            return weight
        cast = weight.to(self._dtype)
        if self._dtype == torch.float16:
            export.check_range(name, int(torch.count_nonzero(cast.isinf())), self._dtype)
        return cast


# -- masks -------------------------------------------------------------------------------------------------------------


def _bits(path: Path, plan: Plan, weights: Mapping[str, Tensor], schedule: Schedule, step: int) -> dict[str, Tensor]:
    """The mask of every entry: the checkpoint's own, and new ones for the entries that are dense before this step."""
    file = path / "gap" / "masks.safetensors"
    shards = {e.name: Shard(e.name, e.shape, 0, e.numel, 0, partial(weights.__getitem__, e.name)) for e in plan.entries}
    bits = checkpoint.read_masks(file, plan, set(checkpoint.kept_weights(file)), shards, Comm(single=True))
    dense = [e for e in plan.entries if e.partition in schedule.phase_at(step).dense and e.keep < e.numel]
    groups: dict[int | str, list[Entry]] = {}
    for entry in dense:
        groups.setdefault(entry.partition if plan.shared_budget else entry.name, []).append(entry)
    for group in groups.values():
        bits |= _select(plan, group, shards)
    return bits


def _select(plan: Plan, group: list[Entry], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Masks of entries that share a budget: their weights of largest magnitude."""
    keys = {entry.name: selection.magnitude_keys(shards[entry.name].weight()) for entry in group}
    if isinstance(plan.pattern, Unstructured):
        pieces = [selection.Piece(e.name, 0, e.numel, keys[e.name], 0) for e in group]
        found = selection.select_largest(pieces, [sum(e.keep for e in group)], selection.Single())
        return {e.name: bits for e, bits in zip(group, found, strict=True)}
    scores = {e.name: selection.magnitudes(e.name, keys[e.name](0, e.numel)).view(e.shape) for e in group}
    return {e.name: bitmask.pack(plan.pattern.mask(scores[e.name], e.keep, e.dims).flatten()) for e in group}
