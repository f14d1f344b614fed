"""Weights and optimizer state for another number of ranks or another backend, in coordinates of the full parameters.

    FOLDER/TAG/gap/portable_R.safetensors    the pieces of rank R, as vectors:
        weight:NAME     its piece of a parameter, as the optimizer updates it, in the order of its flat indices
        exp_avg:NAME    its piece of each moment, by the optimizer's own name for it
        buffer:NAME     rank 0: a buffer, whole
    metadata
        pieces          {NAME: [[24], [8], [16]]}: the view, offset and size of its box (`gap_ds.masks.box`)
        numbers         {NAME: {"step": 5}}: optimizer state that is not per weight
        groups          settings of the parameter groups that are numbers, such as the learning rate of the next step

A piece that several ranks hold is written once. Each rank of the resumed run reads what overlaps its own pieces, from
any of the files. Nothing is gathered, neither in writing nor in reading.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.masks.box import Box, covers
from gap_ds.masks.local import local
from gap_ds.sharding.backends import Backend
from gap_ds.sharding.comm import Comm, boxes_of, raise_on_all_ranks
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard
from gap_ds.storage.json import Count, parse_json
from gap_ds.storage.safetensors import LazyTensors, Writer, open_tensors

#: One number for each dimension of a view.
Dims = list[Count]
FORMAT = "gap_ds.portable"
VERSION = 2


def exists(folder: Path) -> bool:
    """True if a checkpoint was saved with `portable=True`."""
    return any(folder.glob("portable_*.safetensors"))


# -- writing -----------------------------------------------------------------------------------------------------------


def write(folder: Path, backend: Backend, buffers: Mapping[str, Tensor], world: Comm) -> None:
    """Writes this rank's pieces. All ranks must call this.

    Raises:
        ValueError: the optimizer's state is not one value per weight, or the disk refused a file; on all ranks.
    """
    comm, shards = backend.comm, backend.shards()
    own = [s for s, held in zip(shards, boxes_of(shards, comm), strict=True) if s.numel and _writes(s, held, comm.rank)]
    path = folder / f"portable_{comm.rank}.safetensors"
    kept = buffers if world.rank == 0 else {}
    raise_on_all_ranks(world, lambda: _write(path, own, backend.optimizers, kept, comm.size) if comm.writes else None)


def _writes(shard: Shard, held: Sequence[Box], rank: int) -> bool:
    """True if no rank before this one holds the same piece."""
    return shard.counted and held.index(shard.box) == rank


def _write(path: Path, shards: list[Shard], optimizers: Optimizers, buffers: Mapping[str, Tensor], files: int) -> None:
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    vectors: dict[str, Callable[[], Tensor]] = {}  # one at a time is made of packed state
    numbers: dict[str, dict[str, float]] = {}
    for shard in shards:
        state, moments = optimizers.state(shard.owner()), optimizers.per_weight(shard)
        layout[f"weight:{shard.name}"] = shard.weight().dtype, (shard.numel,)
        vectors[f"weight:{shard.name}"] = shard.weight
        for kind, moment in moments.items():
            layout[f"{kind}:{shard.name}"] = moment.dtype, (shard.numel,)
            vectors[f"{kind}:{shard.name}"] = partial(_moment, optimizers, shard, kind)
        rest = {kind: value for kind, value in state.items() if kind not in moments and value is not None}
        numbers[shard.name] = {kind: _number(kind, value, optimizers.names) for kind, value in rest.items()}
    layout |= {f"buffer:{name}": (buffer.dtype, (buffer.numel(),)) for name, buffer in buffers.items()}
    vectors |= {f"buffer:{name}": partial(buffer.detach().reshape, -1) for name, buffer in buffers.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "files": str(files),
        "pieces": json.dumps({s.name: [s.box.view, s.box.offset, s.box.size] for s in shards}),
        "numbers": json.dumps(numbers),
        "groups": json.dumps(
            [_settings(group, optimizer) for optimizer in optimizers for group in optimizer.param_groups]
        ),
    }
    with Writer(path, layout, metadata) as file:
        for key, vector in vectors.items():
            file.write(key, vector())


def _moment(optimizers: Optimizers, shard: Shard, kind: str) -> Tensor:
    return optimizers.per_weight(shard)[kind]


def _number(kind: str, value: Any, optimizer: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.dim():
        return float(value)
    if isinstance(value, int | float):
        return value
    raise ValueError(
        f"portable=True: {optimizer} keeps {kind}, which is neither one value per weight nor one "
        "number, so it cannot be cut in another way. Save without portable, or use another optimizer."
    )


#: Settings of a parameter group that decide what its optimizer keeps, and what the weights are.
_KINDS, _FLAGS = ("amsgrad", "centered"), ("amsgrad", "centered", "train_mode")


def _settings(group: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings of a parameter group that are numbers, or lists of numbers, and some flags.

    `step` is one of them where the optimizer counts nowhere else.
    """
    counted = any("step" in optimizer.state.get(parameter, {}) for parameter in group["params"])
    plain = {
        key: float(value) if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"
    }
    return {
        key: value
        for key, value in plain.items()
        if not (key == "step" and counted)
        and all(
            isinstance(v, int | float) and (not isinstance(v, bool) or key in _FLAGS)
            for v in (value if isinstance(value, list | tuple) else [value])
        )
    }


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """One rank's file, with its header checked."""

    path: Path
    tensors: Any
    lengths: Mapping[str, int]
    files: int
    pieces: Mapping[str, Box]
    numbers: Mapping[str, Mapping[str, float]]
    groups: Sequence[Mapping[str, Any]]

    @staticmethod
    def of(path: Path, tensors: Any) -> _File:
        """ValueError: it is no such file, or its header is damaged."""
        metadata = tensors.metadata()
        try:
            boxes = parse_json(metadata["pieces"], dict[str, tuple[Dims, Dims, Dims]])
            pieces = {name: Box.of(*box) for name, box in boxes.items()}
            numbers = parse_json(metadata["numbers"], dict[str, dict[str, float]])
            groups = parse_json(metadata["groups"], list[dict[str, Any]])
            files = int(metadata["files"])
        except (KeyError, ValueError):
            raise ValueError(f"{path}: its header is damaged") from None
        lengths = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        flat = {key: int(shape[0]) for key, shape in lengths.items() if len(shape) == 1}
        for key in flat:
            kind, _, name = key.partition(":")
            if kind != "buffer" and (name not in pieces or flat[key] != pieces[name].numel):
                raise ValueError(f"{path}: {key} does not have the size of its piece: it is damaged")
        return _File(path, tensors, flat, files, pieces, numbers, groups)

    def kinds(self, name: str) -> set[str]:
        """The moments of a parameter in this file."""
        kinds = {key.removesuffix(f":{name}") for key in self.lengths if key.endswith(f":{name}")}
        return {kind for kind in kinds if ":" not in kind} - {"weight", "buffer"}


def read(folder: Path, backend: Backend, buffers: Mapping[str, Tensor], world: Comm) -> None:
    """Sets weights, optimizer state and buffers of this rank; the caller publishes them. All ranks must call this.

    Raises:
        ValueError: the files do not hold what this model and optimizer need; nothing was changed. On all ranks alike.
    """
    with contextlib.ExitStack() as stack:
        files = raise_on_all_ranks(world, lambda: list(_open(folder, stack)))
        shards, optimizers = backend.shards(), backend.optimizers
        raise_on_all_ranks(world, lambda: _check(folder, files, shards, buffers, optimizers))
        raise_on_all_ranks(world, lambda: _restore(files, shards, buffers, optimizers))


def _open(folder: Path, stack: contextlib.ExitStack) -> Iterator[_File]:
    for path in sorted(folder.glob("portable_*.safetensors")):
        yield _File.of(path, stack.enter_context(open_tensors(path, (FORMAT, VERSION))))


def _check(
    folder: Path,
    files: list[_File],
    shards: list[Shard],
    buffers: Mapping[str, Tensor],
    optimizers: Optimizers,
) -> None:
    """Checks the files before anything is changed."""
    _check_complete(folder, files)
    for shard in shards:
        found = [file.pieces[shard.name] for file in files if f"weight:{shard.name}" in file.lengths]
        if any(box.total != shard.full_numel for box in found) or not covers(found, shard.box):
            raise ValueError(
                f"{folder}: its portable files do not hold {shard.name}: it is damaged, or another model's"
            )
    for name, buffer in buffers.items():
        if files[0].lengths.get(f"buffer:{name}") != buffer.numel():
            raise ValueError(f"{folder}: its portable files do not hold the buffer {name}")
    if len(files[0].groups) != len(optimizers.groups()):
        raise ValueError(
            f"{folder}: was saved with {len(files[0].groups)} parameter groups, and the optimizer now has "
            f"{len(optimizers.groups())}. Build it with the same groups in the same order."
        )
    for i, (saved, group) in enumerate(zip(files[0].groups, optimizers.groups(), strict=True)):
        if other := [key for key in _KINDS if key in saved and saved[key] != group.get(key)]:
            raise ValueError(
                f"{folder}: was saved with {other[0]}={saved[other[0]]} in parameter group {i}, and the optimizer now "
                f"has {group.get(other[0])}. Resume with the optimizer it was saved with."
            )
    held = optimizers.held()
    for shard in shards:
        if shard.numel and id(shard.owner()) not in held and any(file.kinds(shard.name) for file in files):
            raise ValueError(
                f"{folder}: holds the optimizer's state of {shard.name}, which {optimizers.names} does not update. "
                "Build the optimizer over the same parameters."
            )


def weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], stack: contextlib.ExitStack) -> Mapping[str, Tensor]:
    """Parameters and buffers in a checkpoint's portable files, each put together when it is looked up, on the CPU.

    Args:
        shapes: of the tensors that the caller looks up; the files hold vectors.
        stack: closes the files.
    Raises:
        ValueError: a file is truncated, damaged or missing, or `shapes` lacks a tensor that is looked up, or is wrong.
    """
    files = list(_open(folder, stack))
    _check_complete(folder, files)
    prefix = "buffer:"
    homes = {key.removeprefix(prefix): file for file in files for key in file.lengths if key.startswith(prefix)}

    def look_up(name: str) -> Tensor:
        if (shape := shapes.get(name)) is None:
            raise ValueError(f"{folder}: its portable files do not record the shape of {name}. Set --model.")
        if name in homes:
            vector: Tensor = homes[name].tensors.get_tensor(f"{prefix}{name}")
        else:
            vector = _put_together(files, name)
        if vector.numel() != math.prod(shape):
            raise ValueError(f"{folder}: its portable files do not hold {name} in the shape {shape}")
        return vector.view(shape)

    return LazyTensors([*(name for file in files for name in file.pieces), *homes], look_up)


def _check_complete(folder: Path, files: Sequence[_File]) -> None:
    if any(file.files != len(files) for file in files):
        raise ValueError(f"{folder}: holds {len(files)} of {files[0].files} portable files")


def _put_together(files: Sequence[_File], name: str) -> Tensor:
    """A whole parameter, flattened; empty if the files do not hold every weight of it once."""
    found = [(file, file.pieces[name]) for file in files if f"weight:{name}" in file.lengths]
    total = next((box.total for _, box in found), 0)
    if not covers([box for _, box in found], Box.span(0, total, total)):
        return torch.empty(0, device="cpu")
    whole = torch.empty(0, device="cpu")
    for file, box in found:
        piece: Tensor = file.tensors.get_tensor(f"weight:{name}")
        if len(found) == 1:
            return piece
        whole = whole if whole.numel() else piece.new_empty(total)
        box.put(whole, piece)
    return whole


@torch.no_grad()
def _restore(files: list[_File], shards: list[Shard], buffers: Mapping[str, Tensor], optimizers: Optimizers) -> None:
    for shard in shards:
        _fill(shard.weight(), files, "weight", shard)
    for name, buffer in buffers.items():
        buffer.copy_(files[0].tensors.get_tensor(f"buffer:{name}").view(buffer.shape))
    for group, saved in zip(optimizers.groups(), files[0].groups, strict=True):
        for key, value in saved.items():
            _set(group, key, value)
    held = optimizers.held()
    owners: dict[int, tuple[Tensor, list[Shard]]] = {}
    for shard in shards:
        # An owner of which this rank has nothing still counts steps, where the optimizer holds it.
        if shard.trainable and id(shard.owner()) in held:
            owners.setdefault(id(shard.owner()), (shard.owner(), []))[1].append(shard)
    for owner, own in owners.values():
        _restore_state(files, owner, own, optimizers.holder(owner))


def _restore_state(files: list[_File], owner: Tensor, shards: list[Shard], optimizer: torch.optim.Optimizer) -> None:
    """Sets the optimizer's state of one tensor that it updates; without saved state it has none."""
    kinds = {kind for shard in shards for file in files for kind in file.kinds(shard.name)}
    numbers: dict[str, float] = {}
    for name, file in ((shard.name, file) for shard in shards for file in files):
        for kind, value in file.numbers.get(name, {}).items():
            # A flat buffer has one count for all of its parameters.
            numbers[kind] = max(value, numbers.get(kind, value))
    optimizer.state.pop(owner, None)
    if not kinds and not numbers:
        return
    state = optimizer.state[owner]
    for kind, value in numbers.items():
        state[kind] = _as_state(value, owner, optimizer)
    for kind in sorted(kinds):
        state[kind] = torch.zeros_like(owner, requires_grad=False)
        for shard in shards:
            _fill(shard.of(state[kind]), files, kind, shard)


def _fill(vector: Tensor, files: list[_File], kind: str, shard: Shard) -> None:
    """Sets this rank's values of one kind (shard.numel,) to what the files hold of them."""
    for file in files:
        if (key := f"{kind}:{shard.name}") in file.lengths:
            for ours, theirs in shard.box.shared(file.pieces[shard.name]):
                saved = file.tensors.get_slice(key)
                vector[ours] = (saved[theirs] if isinstance(theirs, slice) else saved[:][theirs]).to(vector)


def _as_state(value: float, owner: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """A number as the optimizer keeps it: PyTorch's own, and what derives from them, have tensors, others numbers."""
    classes = [cls for cls in type(optimizer).__mro__ if cls is not torch.optim.Optimizer]
    if not any(cls.__module__.startswith("torch.optim.") for cls in classes):
        return int(value) if value == int(value) else value
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(value), dtype=torch.float32, device=local(owner).device if on_device else "cpu")


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    elif key in group or key == "step":
        group[key] = tuple(value) if isinstance(value, list) else value
