"""Checkpoints: masks in the coordinates of the full parameters, next to the sharding library's own files.

    FOLDER/latest                 tag of the newest complete checkpoint
    FOLDER/TAG/...                the library's own checkpoint of weights, optimizer and learning-rate schedule
    FOLDER/TAG/gap/masks.safetensors   one uint8 tensor of bits per sparse entry, and the plan's fingerprint
    FOLDER/TAG/gap/pruned.safetensors  with `regrow: last_value`, the values that pruned weights had
    FOLDER/TAG/gap/state.json     applied steps, schedule, signature, what the caller added
    FOLDER/TAG/gap/rng_R.json     random state of rank R

A checkpoint is written aside, flushed to disk and renamed: it is whole or absent. Nothing of ours is pickled. Masks do
not depend on the backend or on the number of ranks; no rank ever holds the mask of more than one entry whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gap_ds import masks
from gap_ds.comm import Comm, by_rank
from gap_ds.plan import Entry, Plan
from gap_ds.shard import Shard

FORMAT = "gap_ds.masks"
FORMAT_VALUES = "gap_ds.pruned"
VERSION = 2


def write_masks(path: Path, plan: Plan, shards: Mapping[str, Shard], bits: Mapping[str, Tensor], comm: Comm) -> None:
    """Writes the masks of the sparse entries, from every rank's pieces. All ranks of `comm` must call this.

    Args:
        shards: this rank's piece of every entry.
        bits: packed mask of this rank's piece of every sparse entry; empty where the rank owns nothing.
    """
    kept = _kept(plan, bits, comm)
    metadata = {"format": FORMAT, "version": str(VERSION), "plan": plan.fingerprint, "kept": json.dumps(kept)}
    layout = {name: ("U8", masks.nbytes(shards[name].full_numel)) for name in kept}
    pieces = {name: masks.unpack(bits[name], shards[name].numel).to(torch.uint8) for name in kept}
    _write_pieces(path, metadata, layout, pieces, shards, comm, lambda whole: masks.pack(whole.bool()))


def read_masks(path: Path, plan: Plan, sparse: set[str], shards: Mapping[str, Shard], comm: Comm) -> dict[str, Tensor]:
    """This rank's piece of each sparse entry's mask, on the CPU; reads only the bytes that cover the piece.

    Raises:
        ValueError: the file is truncated, of another format, version or plan, its sparse entries are not `sparse`, or
            a mask does not keep as many weights as the file says. On all ranks alike.
    """
    found: dict[str, Tensor] = {}
    with _open(path, FORMAT, plan) as file:
        _check_names(path, file.keys(), sparse)
        for entry in _entries(plan, sparse):
            shard, piece = shards[entry.name], file.get_slice(entry.name)
            if piece.get_shape() != [masks.nbytes(entry.numel)] or piece.get_dtype() != "U8":
                raise ValueError(f"{path}: the mask of {entry.name} does not have the size of its entry")
            lo, hi = shard.start // 8, masks.nbytes(shard.start + shard.numel)
            found[entry.name] = masks.pack(masks.unpack(piece[lo:hi], shard.numel, start=shard.start - 8 * lo))
        wanted = _counts(path, file.metadata())
    for name, n in _kept(plan, found, comm).items():
        if n != wanted.get(name):
            raise ValueError(
                f"{path}: the mask of {name} keeps {n} weights instead of {wanted.get(name)}: it is damaged"
            )
    return found


def write_values(path: Path, plan: Plan, shards: Mapping[str, Shard], values: Mapping[str, Tensor], comm: Comm) -> None:
    """Writes a value for every weight of the sparse entries, as `write_masks` writes its bits."""
    names = [entry.name for entry in plan.entries if entry.name in values]
    metadata = {"format": FORMAT_VALUES, "version": str(VERSION), "plan": plan.fingerprint}
    pieces = {name: values[name].float() for name in names}
    layout = {name: ("F32", shards[name].full_numel) for name in names}
    _write_pieces(path, metadata, layout, pieces, shards, comm, lambda whole: whole)


def read_values(path: Path, plan: Plan, sparse: set[str], shards: Mapping[str, Shard], comm: Comm) -> dict[str, Tensor]:
    """This rank's piece of what `write_values` wrote, on the CPU.

    Raises:
        ValueError: the file is truncated, of another format, version or plan, or its entries are not `sparse`.
    """
    with _open(path, FORMAT_VALUES, plan) as file:
        _check_names(path, file.keys(), sparse)
        found = {}
        for entry in _entries(plan, sparse):
            shard, piece = shards[entry.name], file.get_slice(entry.name)
            if piece.get_shape() != [entry.numel] or piece.get_dtype() != "F32":
                raise ValueError(f"{path}: the values of {entry.name} do not have the size of their entry")
            found[entry.name] = piece[shard.start : shard.start + shard.numel]
    return found


def _entries(plan: Plan, names: Container[str]) -> list[Entry]:
    return [entry for entry in plan.entries if entry.name in names]


def _kept(plan: Plan, bits: Mapping[str, Tensor], comm: Comm) -> dict[str, int]:
    """Weights that each sparse entry keeps, over all ranks."""
    names = [entry.name for entry in _entries(plan, bits)]
    counts = comm.sum(torch.tensor([masks.count(bits[name]) for name in names], dtype=torch.int64))
    return dict(zip(names, counts.tolist(), strict=True))


def _check_names(path: Path, found: Iterable[str], sparse: set[str]) -> None:
    if names := sparse.symmetric_difference(found):
        raise ValueError(f"{path}: holds an entry that is dense by the schedule, or lacks one: {min(names)}")


def _counts(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    try:
        counts = json.loads(metadata["kept"])
        return {str(name): int(n) for name, n in counts.items()}
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{path}: its header does not say how many weights each mask keeps: it is damaged") from None


@contextmanager
def _open(path: Path, kind: str, plan: Plan) -> Iterator[Any]:
    """A safetensors file of ours, with its header checked; damage anywhere in it becomes a ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(path, kind, file.metadata() or {}, plan)
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: the file is truncated or damaged ({error}). Use an earlier checkpoint.") from None


def _check_header(path: Path, kind: str, metadata: Mapping[str, str], plan: Plan) -> None:
    if metadata.get("format") != kind:
        raise ValueError(f"{path}: is no file of the kind {kind}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: {kind} of version {metadata.get('version')}; this version of gap_ds reads version {VERSION}"
        )
    if metadata.get("plan") != plan.fingerprint:
        raise ValueError(
            f"{path}: was written for another plan ({metadata.get('plan')}, now {plan.fingerprint}): the model, the "
            "sparsity, the distribution, the pattern or the partitions differ. Restore them, or start in a new folder."
        )


def _write_pieces(
    path: Path,
    metadata: dict[str, str],
    layout: Mapping[str, tuple[str, int]],
    pieces: Mapping[str, Tensor],
    shards: Mapping[str, Shard],
    comm: Comm,
    encode: Callable[[Tensor], Tensor],
) -> None:
    """Writes a vector for each name, put together from every rank's piece, as a safetensors file.

    No rank holds more than one of them whole. All ranks of `comm` must call this; its first one writes.

    Args:
        layout: dtype (as safetensors calls it) and length of each encoded vector.
        pieces: this rank's values of each.
        encode: from the whole vector to what is written.
    """
    ranges = by_rank([(shards[name].start, shards[name].numel) for name in layout], comm)
    writer = _Writer(path, metadata, layout) if comm.rank == 0 else None
    try:
        for name, (starts, numels) in zip(layout, ranges, strict=True):
            whole = comm.assemble(pieces[name], starts, numels, shards[name].full_numel)
            if writer is not None and whole is not None:
                writer.append(encode(whole))
    finally:
        if writer is not None:
            writer.close()


class _Writer:
    """A safetensors file of vectors, written one after the other."""

    def __init__(self, path: Path, metadata: dict[str, str], layout: Mapping[str, tuple[str, int]]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, length) in layout.items():
            size = length * {"U8": 1, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def append(self, values: Tensor) -> None:
        self._file.write(values.contiguous().numpy().tobytes())

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either whole or as before."""
    try:
        text = json.dumps(value, indent=1)
    except TypeError as error:
        raise ValueError(f"{path.name}: a checkpoint holds only what JSON can say: {error}") from None
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        ValueError: the file is missing, truncated or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Use an earlier checkpoint.") from None


def save(folder: Path, tag: str, world: Comm, write: Callable[[Path], None]) -> Path:
    """Writes FOLDER/TAG by `write(folder aside)` on all ranks, then shows it at once and names it the latest."""
    final, aside = folder / tag, folder / f"{tag}.partial"
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "gap").mkdir(parents=True)
    world.barrier()
    write(aside)
    world.barrier()
    if world.rank == 0:
        if final.exists():  # the same step saved again; the old one is as good until the rename
            shutil.rmtree(folder / f"{tag}.old", ignore_errors=True)
            final.rename(folder / f"{tag}.old")
        aside.rename(final)
        shutil.rmtree(folder / f"{tag}.old", ignore_errors=True)
        latest = folder / "latest.partial"
        latest.write_text(tag, encoding="utf-8")
        latest.replace(folder / "latest")
        _sync_folder(folder)
    world.barrier()
    return final


def find(folder: Path, tag: str | None = None) -> Path:
    """The checkpoint FOLDER/TAG; without a tag the latest one.

    Raises:
        ValueError: there is none.
    """
    if tag is None:
        try:
            tag = (folder / "latest").read_text(encoding="utf-8").strip()
        except OSError:
            raise ValueError(f'{folder}: holds no checkpoint (it has no file "latest")') from None
    # A kill while a tag is saved again can leave the old folder under its second name; it is as good.
    for name in (tag, f"{tag}.old"):
        if Path(tag).name == tag and (folder / name / "gap" / "state.json").is_file():
            return folder / name
    raise ValueError(f"{folder}: holds no complete checkpoint {tag!r}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_state() -> dict[str, Any]:
    """State of this process's random generators: torch (CPU and current GPU), NumPy, Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().numpy()).hex()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what `random_state` returned."""

    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
