"""The final sparse model from the files of a checkpoint, by one process, from any backend.

Weights are read one at a time: from the portable files if there are any, else from the sharding library's own. An
entry that is dense at that step is pruned in the copy, exactly as `GaPEngine.export` would have done it then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gap_ds import checkpoint
from gap_ds.checkpoint import foreign, portable
from gap_ds.checkpoint.run_state import State
from gap_ds.export.folder import buffers, copy_config, describe
from gap_ds.export.info import ExportInfo
from gap_ds.export.weights import check_range, read_back, weight_files, write_weights
from gap_ds.masks import bitmask, selection
from gap_ds.method.names import by_parameter
from gap_ds.method.pattern import Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Phase
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard, of_entries
from gap_ds.storage.atomic import replacing_folder
from gap_ds.storage.errors import printable
from gap_ds.storage.json import read_json
from gap_ds.storage.safetensors import LazyTensors, Progress, open_tensors


def find_whole(folder: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest whole one in it; None if there is none.

    Raises:
        ValueError: there are checkpoints, and none is whole; or it holds masks without weights.
    """
    if checkpoint.is_masks_alone(folder):
        raise ValueError(
            f"{folder}: holds masks alone. The weights are in the folder around it: export {folder.parent}."
        )
    for path in (folder, checkpoint.newest(folder)):
        if path is not None and checkpoint.is_masks_alone(path / "gap"):  # of a Trainer or Accelerate: no manifest
            return path
    if (folder / "gap" / "state.json").is_file():
        folder = folder if folder.name not in ("", "..") else folder.resolve()
        return checkpoint.find_whole(folder.parent, folder.name, Comm(single=True))
    if checkpoint.candidates(folder):
        return checkpoint.find_whole(folder, None, Comm(single=True))
    return None


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    model: Path | None = None,
    module: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress,
) -> None:
    """Writes the final sparse model of a checkpoint FOLDER/TAG as a dense folder OUT, replacing what is there.

    A checkpoint of a Trainer, or of Accelerate, is one, too: masks in FOLDER/TAG/gap beside the weights.

    Args:
        model: folder with the model's config.json, and its tokenizer if it has one; both are copied. Without it, OUT
            holds the weights and gap.json alone; a tied weight is there under each of its names, and the sparsity of
            the whole model counts all of these, and buffers, too.
        module: the model of that folder; on the meta device is enough.
        dtype: of the parameters; buffers keep their own.
    Raises:
        ValueError: the files cannot be read like this, are damaged, or do not go with `model`; one sentence.
    """
    state = read_json(path / "gap" / "state.json", State)
    try:
        schedule = state.schedule()
    except ValueError as error:
        raise ValueError(f"{path / 'gap' / 'state.json'}: is damaged ({error}). Use another checkpoint.") from None
    phase = state.phase(schedule)
    plan = state.restore_plan()
    if model is None and dtype != torch.float32:
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')}: is that of the parameters alone, and without the "
            "model buffers are not known. Set --model, or leave --dtype."
        )
    with contextlib.ExitStack() as stack:
        weights = _of_model(path, _read(path, module, plan, stack), module, plan)
        bits, saved = _bits(path, plan, weights, phase)
        folder = stack.enter_context(replacing_folder(out))
        if model is not None:
            copy_config(model, folder, dtype, type(module).__name__)
        kept = {} if module is None else {name: buffer.dtype for name, buffer in buffers(module)}
        tensors = LazyTensors(weights, lambda name: _pruned(name, weights[name], bits, saved, dtype, kept.get(name)))
        counts = write_weights(folder, tensors, progress, [entry.name for entry in plan.entries])
        parameters = list(tensors) if module is None else [name for name, _ in module.named_parameters()]
        plan = replace(plan, total=sum(counts[name].numel for name in parameters))
        nonzero = {name: count.nonzero for name, count in counts.items()}
        of_run = (plan, schedule, state.config, state.signature)
        place = (state.applied_steps, state.ended_at, state.steps_per_epoch)
        describe(folder, ExportInfo.of(*of_run, *place, nonzero))
        read_back(folder, out, counts)


# -- weights by name ---------------------------------------------------------------------------------------------------


def _read(path: Path, module: nn.Module | None, plan: Plan, stack: contextlib.ExitStack) -> Mapping[str, Tensor]:
    if checkpoint.is_masks_alone(path / "gap") and any(path.glob("model.safetensors*")) and not foreign.exists(path):
        return _of_files(path, stack)
    if not portable.exists(path / "gap"):
        return foreign.weights(path)
    shapes = plan.parameters()
    if module is not None:
        shapes |= {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}
    return portable.weights(path / "gap", shapes, stack)


def _of_files(folder: Path, stack: contextlib.ExitStack) -> Mapping[str, Tensor]:
    """The tensors in files of transformers, each read when it is looked up."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path in weight_files(folder):
        file = stack.enter_context(open_tensors(path))
        found |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return LazyTensors(found, lambda name: found[name]())


def _of_model(path: Path, weights: Mapping[str, Tensor], module: nn.Module | None, plan: Plan) -> Mapping[str, Tensor]:
    """The model's tensors, each once, if it is known; else all that there are."""
    wanted = list(weights if module is None else _tensors(module))
    stored = {name: name for name in weights}
    if module is not None:  # a tied weight may be stored under any of its names
        ids = {id(p): name for name, p in module.named_parameters(remove_duplicate=False) if name in stored}
        stored |= {name: ids[id(p)] for name, p in module.named_parameters() if name not in stored and id(p) in ids}
    if lost := [name for name in (*wanted, *plan.parameters()) if name not in stored]:
        raise ValueError(
            f"{path}: does not hold {printable(lost[0])}. Set --model to the folder of its model. If that is set: "
            "transformers saves some models under other names; resume the training and call engine.export."
        )
    return LazyTensors(wanted, lambda name: weights[stored[name]])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one under its first name, and persistent buffers."""
    return dict(module.named_parameters()) | dict(buffers(module))


def _pruned(
    name: str,
    weight: Tensor,
    bits: Mapping[str, Mapping[str, Tensor]],
    saved: Container[str],
    dtype: torch.dtype,
    buffer: torch.dtype | None,
) -> Tensor:
    """A weight with its mask applied, in the dtype to write.

    Args:
        bits: packed masks of the entries of each parameter.
        saved: entries whose masks are those of the checkpoint: what they prune must be 0 already.
        buffer: dtype of a buffer of the model, which it keeps; DeepSpeed's consolidation makes all of them fp32.
    """
    weight = weight.clone(memory_format=torch.contiguous_format)
    if buffer is not None:
        return weight if buffer.is_floating_point else weight.to(buffer)
    if weight.numel():
        whole = _whole(name, weight.shape, lambda: weight)
        for entry, of_entry in bits.get(name, {}).items():
            part = whole.part(entry, weight.view(-1))
            if entry in saved and (revived := bitmask.count_revived(part, of_entry)):
                raise ValueError(
                    f"{printable(entry)}: {revived:,} of its weights are not 0 and its mask prunes them: the weights "
                    "are not those that the masks were saved with. Use another checkpoint."
                )
            bitmask.zero_pruned_(part, of_entry)
    if not weight.is_floating_point():
        return weight
    cast = weight.to(dtype)
    check_range(name, cast)
    return cast


# -- masks -------------------------------------------------------------------------------------------------------------


def _whole(name: str, shape: Sequence[int], owner: Callable[[], Tensor]) -> Shard:
    """The one piece of a parameter that is not cut."""
    return Shard.of_range(name, tuple(shape), 0, math.prod(shape), 0, owner)


def _bits(
    path: Path, plan: Plan, weights: Mapping[str, Tensor], phase: Phase
) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """The masks of the entries of each parameter, and the entries whose masks are those of the checkpoint.

    The others are dense before this step, or on their way, and get new masks.
    """
    file = path / "gap" / "masks.safetensors"
    whole = [_whole(n, shape, partial(weights.__getitem__, n)) for n, shape in plan.parameters().items()]
    shards = of_entries([entry.name for entry in plan.entries], whole)
    bits = checkpoint.read_masks(file, plan, set(checkpoint.kept_weights(file)), shards, Comm(single=True))
    saved = set(bits)
    dense = [e for e in plan.entries if not phase.at_target(e.partition) and e.keep < e.numel]
    groups: dict[int | str, list[Entry]] = {}
    for entry in dense:
        groups.setdefault(entry.partition if plan.shared_budget else entry.name, []).append(entry)
    for group in groups.values():
        bits |= _select(plan, group, shards)
    saved -= {entry.name for entry in dense}
    return {parameter: {n: bits[n] for n in names} for parameter, names in by_parameter(bits).items()}, saved


def _select(plan: Plan, group: list[Entry], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Masks of entries that share a budget: their weights of largest magnitude."""
    keys = {entry.name: selection.magnitude_keys(shards[entry.name].weight()) for entry in group}
    if isinstance(plan.pattern, Unstructured):
        pieces = [selection.Piece(e.name, shards[e.name].box, keys[e.name], 0) for e in group]
        found = selection.select_largest(pieces, [sum(e.keep for e in group)], selection.Single())
        return {e.name: bits for e, bits in zip(group, found, strict=True)}
    scores = {e.name: selection.magnitudes(e.name, keys[e.name](0, e.numel)).view(e.shape) for e in group}
    return {e.name: bitmask.pack(plan.pattern.mask(scores[e.name], e.keep, e.dims).flatten()) for e in group}
