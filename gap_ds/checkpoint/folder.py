"""Checkpoints: masks in the coordinates of the full parameters, next to the sharding library's own files.

    FOLDER/latest                 tag of the newest checkpoint, for people and other tools
    FOLDER/TAG/...                the library's own checkpoint of weights, optimizer and learning-rate schedule
    FOLDER/TAG/gap/manifest.json       size and SHA-256 of every other file
    FOLDER/TAG/gap/masks.safetensors   one uint8 tensor of bits per sparse entry, and the plan's fingerprint
    FOLDER/TAG/gap/pruned.safetensors  with `regrow: last_value`, the values that pruned weights had
    FOLDER/TAG/gap/portable_R.safetensors  with `portable=True`, the pieces of rank R (portable.py)
    FOLDER/TAG/gap/state.json     applied steps, schedule, signature, what the caller added
    FOLDER/TAG/gap/rng_R.json     random state of rank R

A checkpoint is written aside, flushed to disk and renamed: it is whole or absent. What the disk does to it later is
noticed by the manifest, before anything is changed. Nothing of ours is pickled. Masks do not depend on the backend or
on the number of ranks; no rank ever holds the mask of more than one entry whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.comm import Comm, by_rank, raise_on_all_ranks, summarize_error
from gap_ds.sharding.shard import Shard
from gap_ds.storage import safetensors as tensorfile

FORMAT = "gap_ds.masks"
FORMAT_VALUES = "gap_ds.pruned"
VERSION = 2
FORMAT_MANIFEST = "gap_ds.manifest"
VERSION_MANIFEST = 1
MANIFEST = Path("gap") / "manifest.json"


def write_masks(
    path: Path,
    plan: Plan,
    shards: Mapping[str, Shard],
    bits: Mapping[str, Tensor],
    comm: Comm,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes the masks of the sparse entries, from every rank's pieces. All ranks of `comm` must call this.

    Args:
        shards: this rank's piece of every entry.
        bits: packed mask of this rank's piece of every sparse entry; empty where the rank owns nothing.
        about: what else the header says of the run, for people.
    """
    kept = _kept(plan, bits, comm)
    metadata = {**(about or {}), "format": FORMAT, "version": str(VERSION), "plan": plan.fingerprint}
    metadata["kept"] = json.dumps(kept)
    layout = {name: (torch.uint8, bitmask.nbytes(shards[name].full_numel)) for name in kept}
    pieces = {name: bitmask.unpack(bits[name], shards[name].numel).to(torch.uint8) for name in kept}
    _write_pieces(path, metadata, layout, pieces, shards, comm, lambda whole: bitmask.pack(whole.bool()))


def read_masks(
    path: Path, plan: Plan, sparse: set[str] | None, shards: Mapping[str, Shard], comm: Comm, foreign: bool = False
) -> dict[str, Tensor]:
    """This rank's piece of each sparse entry's mask, on the CPU; reads only the bytes that cover the piece.

    Args:
        sparse: the entries that must have a mask in the file; None: it may be any.
        foreign: whether the file may be of another run, whose entries have the same names and sizes.
    Raises:
        ValueError: the file is truncated, of another format, version or plan, its sparse entries are not `sparse`, or
            a mask does not keep as many weights as the file says. On all ranks alike.
    """
    found: dict[str, Tensor] = {}
    with _open(path, FORMAT, None if foreign else plan) as file:
        if sparse is not None:
            _check_names(path, file.keys(), sparse)
        for entry in _entries(plan, set(file.keys())):
            shard, piece = shards[entry.name], file.get_slice(entry.name)
            if piece.get_shape() != [bitmask.nbytes(entry.numel)] or piece.get_dtype() != "U8":
                raise ValueError(f"{path}: the mask of {entry.name} does not have the size of its entry")
            lo, hi = shard.start // 8, bitmask.nbytes(shard.start + shard.numel)
            found[entry.name] = bitmask.pack(bitmask.unpack(piece[lo:hi], shard.numel, start=shard.start - 8 * lo))
        wanted = _counts(path, file.metadata())
    for name, n in _kept(plan, found, comm).items():
        if n != wanted.get(name):
            raise ValueError(
                f"{path}: the mask of {name} keeps {n} weights instead of {wanted.get(name)}: it is damaged"
            )
    return found


def kept_weights(path: Path) -> dict[str, int]:
    """Weights that each mask of a file keeps, as its header says.

    Raises:
        ValueError: the file cannot be read, or is damaged or of another format or version.
    """
    with _open(path, FORMAT, None) as file:
        return _counts(path, file.metadata())


def write_values(path: Path, plan: Plan, shards: Mapping[str, Shard], values: Mapping[str, Tensor], comm: Comm) -> None:
    """Writes a value for every weight of the sparse entries, as `write_masks` writes its bits."""
    names = [entry.name for entry in plan.entries if entry.name in values]
    metadata = {"format": FORMAT_VALUES, "version": str(VERSION), "plan": plan.fingerprint}
    pieces = {name: values[name].float() for name in names}
    layout = {name: (torch.float32, shards[name].full_numel) for name in names}
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
    counts = comm.sum(torch.tensor([bitmask.count(bits[name]) for name in names], dtype=torch.int64))
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
def _open(path: Path, kind: str, plan: Plan | None) -> Iterator[Any]:
    """A safetensors file of ours, of this plan if one is given; damage anywhere in it becomes a ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(path, kind, file.metadata() or {}, plan)
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: the file is truncated or damaged ({error}). Use an earlier checkpoint.") from None


def _check_header(path: Path, kind: str, metadata: Mapping[str, str], plan: Plan | None) -> None:
    if metadata.get("format") != kind:
        raise ValueError(f"{path}: is no file of the kind {kind}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: {kind} of version {metadata.get('version')}; this version of gap_ds reads version {VERSION}"
        )
    if plan is not None and metadata.get("plan") != plan.fingerprint:
        raise ValueError(
            f"{path}: was written for another plan ({metadata.get('plan')}, now {plan.fingerprint}): the model, the "
            "sparsity, the distribution, the pattern or the partitions differ. Restore them, or start in a new folder."
        )


def _write_pieces(
    path: Path,
    metadata: dict[str, str],
    layout: Mapping[str, tuple[torch.dtype, int]],
    pieces: Mapping[str, Tensor],
    shards: Mapping[str, Shard],
    comm: Comm,
    encode: Callable[[Tensor], Tensor],
) -> None:
    """Writes a vector for each name, put together from every rank's piece, as a safetensors file.

    No rank holds more than one of them whole. All ranks of `comm` must call this; its first one writes, and says at the
    end what went wrong with the disk.

    Args:
        layout: dtype and length of each encoded vector.
        pieces: this rank's values of each.
        encode: from the whole vector to what is written.
    """
    ranges = by_rank([(shards[name].start, shards[name].numel) for name in layout], comm)
    writer = VectorFile(path, metadata, layout) if comm.rank == 0 else None
    for name, (starts, numels) in zip(layout, ranges, strict=True):
        whole = comm.assemble(pieces[name], starts, numels, shards[name].full_numel)
        if writer is not None and whole is not None:
            writer.append(encode(whole))
    if writer is not None:
        writer.close()


class VectorFile:
    """A safetensors file of vectors, written one after the other; what the disk refuses is raised by `close` alone.

    So a rank whose disk is full still takes part in what the other ranks send.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], layout: Mapping[str, tuple[torch.dtype, int]]) -> None:
        ends = list(accumulate(length * dtype.itemsize for dtype, length in layout.values()))
        header = tensorfile.table(
            (
                (name, tensorfile.name_of(dtype, name), (length,), where)
                for (name, (dtype, length)), where in zip(layout.items(), pairwise([0, *ends]), strict=True)
            ),
            metadata,
        )
        self._path = path
        self._error: OSError | None = None
        self._try(lambda: path.write_bytes(tensorfile.header_bytes(header)))

    def append(self, values: Tensor) -> None:
        """Writes the next vector of the layout."""

        def write() -> None:
            with self._path.open("ab") as file:
                file.write(values.cpu().contiguous().view(torch.uint8).numpy().data)

        self._try(write)

    def close(self) -> None:
        """Flushes to disk. OSError: the disk has refused something."""

        def flush() -> None:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

        self._try(flush)
        if self._error is not None:
            raise self._error

    def _try(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except OSError as error:
                self._error = error


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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Use an earlier checkpoint.") from None


# -- folders: written aside, listed in a manifest, shown at once -------------------------------------------------------


def save(folder: Path, tag: str, world: Comm, write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Writes FOLDER/TAG by `write(folder aside)` on all ranks, then shows it at once and names it the latest.

    Args:
        write: raises on all ranks alike, or on none.
        keep: how many checkpoints to leave in the folder, this one included; older ones go once it is visible.
    Raises:
        ValueError: it could not be written, on all ranks; nothing of it is left, and older checkpoints are untouched.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1, for the checkpoint that is saved. None keeps all.")
    if tag in ("", "..") or Path(tag).name != tag or tag.endswith((".partial", ".old")):
        raise ValueError(f"tag={tag!r}: must be the name of a folder, and not end in .partial or .old.")
    final, aside = folder / tag, folder / f"{tag}.partial"
    try:
        raise_on_all_ranks(world, lambda: _begin(aside) if world.rank == 0 else None)
        write(aside)
        _write_manifest(folder, aside, world)
        raise_on_all_ranks(world, lambda: _show(folder, aside, final) if world.rank == 0 else None)
    except Exception as error:
        free = _free(folder)
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, ValueError):  # another rank has ended
            raise
        raise ValueError(f"{final}: was not saved, and older checkpoints are as they were ({free}): {error}") from error
    if keep is not None and world.rank == 0:
        _prune(folder, keep)
    world.barrier()
    return final


def _free(folder: Path) -> str:
    """What an error of the disk often does not say."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"
    except OSError as error:
        return summarize_error(error)


def _begin(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "gap").mkdir(parents=True)


def _show(folder: Path, aside: Path, final: Path) -> None:
    latest, old = folder / "latest.partial", final.with_name(f"{final.name}.old")
    latest.write_text(final.name, encoding="utf-8")
    for path in (aside, *(path for path in aside.rglob("*") if path.is_dir())):
        _sync_folder(path)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # the same step saved again; the old one is as good until the rename
        final.rename(old)
    aside.rename(final)
    with contextlib.suppress(OSError):  # from here on it is saved
        shutil.rmtree(old, ignore_errors=True)
        latest.replace(folder / "latest")
        _sync_folder(folder)


def _prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest checkpoints that have all their files, and what killed saves have left."""
    complete = [path for path in candidates(folder) if not _listed(path)[1]]
    for path in complete[keep:]:
        gone = path.with_name(f"{path.name}.partial")  # so that a kill in the middle leaves no half checkpoint
        with contextlib.suppress(OSError):
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
    for path in folder.glob("*.partial"):
        if (path / "gap").is_dir():
            shutil.rmtree(path, ignore_errors=True)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first; whether they are whole is not known yet."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        state = path / "gap" / "state.json"
        if not path.name.endswith(".partial") and (state.is_file() or (path / MANIFEST).is_file()):
            found.append((_number(path), state.stat().st_mtime_ns if state.is_file() else 0, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _number(path: Path) -> float:
    """The place of a checkpoint among those of its folder; a damaged one, whose place is not known, comes first."""
    if _has_no_manifest(path):
        return 0
    try:
        number: int = _read_manifest(path)["number"]
        return number
    except ValueError:
        return float("inf")


def find(folder: Path, tag: str | None = None) -> Path:
    """The checkpoint FOLDER/TAG; without a tag the newest one. It may be damaged: see `damage`.

    Raises:
        ValueError: there is none.
    """
    if tag is None:
        if found := candidates(folder):
            return found[0]
        raise ValueError(f"{folder}: holds no checkpoint")
    # A kill while a tag is saved again can leave the old folder under its second name; it is as good.
    for name in (tag, f"{tag}.old"):
        if Path(tag).name == tag and folder / name in candidates(folder):
            return folder / name
    raise ValueError(f"{folder}: holds no complete checkpoint {tag!r}")


def find_whole(folder: Path, tag: str | None, world: Comm) -> Path:
    """The checkpoint FOLDER/TAG, or without a tag the newest whole one, verified; the same on all ranks.

    Damaged ones that are passed over are named in a warning. All ranks must call this.

    Raises:
        ValueError: there is none, or FOLDER/TAG is damaged: which file, and how.
    """
    looked = raise_on_all_ranks(world, lambda: candidates(folder) if tag is None else [find(folder, tag)])
    reasons = []
    for path in world.broadcast_object([str(path) for path in looked]):
        reason = damage(Path(path), world)
        if reason is None:
            if world.rank == 0 and _has_no_manifest(Path(path)):
                warnings.warn(f"{path}: was saved before checkpoints had checksums: not verified", stacklevel=3)
            return Path(path)
        reasons.append(reason)
        if tag is None and world.rank == 0:
            warnings.warn(f"{reason}: this checkpoint is damaged and passed over", stacklevel=3)
    if not reasons:
        raise ValueError(f"{folder}: holds no checkpoint")
    raise ValueError(f"{reasons[0]}: the checkpoint is damaged. Use another one.")


# -- manifest: what a checkpoint was made of ---------------------------------------------------------------------------


def damage(path: Path, world: Comm) -> str | None:
    """What is wrong with the files of a checkpoint: the first that is missing or changed. All ranks must call this.

    Each rank reads some of the files; all return the same.
    """
    files, reason = world.broadcast_object(_listed(path) if world.rank == 0 else None)
    if reason is not None:
        return str(reason)
    names = sorted(files)
    wrong = torch.zeros(len(names), dtype=torch.int64)
    for name in _share({name: size for name, (size, _) in files.items()}, world):
        try:
            wrong[names.index(name)] = _sha256(path / name) != files[name][1]
        except OSError:  # that it cannot be read now is as bad
            wrong[names.index(name)] = 1
    first = world.sum(wrong).nonzero()
    return f"{path / names[int(first[0, 0])]}: does not have the checksum it was saved with" if len(first) else None


def _write_manifest(folder: Path, aside: Path, world: Comm) -> None:
    """Flushes all files to disk and lists them with their checksums, each computed by one rank."""
    listed = raise_on_all_ranks(world, lambda: _sizes(aside) if world.rank == 0 else {})
    sizes: dict[str, int] = world.broadcast_object(listed)
    own = raise_on_all_ranks(world, lambda: {name: _sha256(aside / name, flush=True) for name in _share(sizes, world)})
    table = torch.zeros(len(sizes), 32, dtype=torch.int64)
    for row, name in enumerate(sizes):
        if name in own:
            table[row] = torch.tensor(list(bytes.fromhex(own[name])))
    digests = [bytes(row).hex() for row in world.sum(table).tolist()]

    def write() -> None:
        number = 1 + max((n for path in candidates(folder) if (n := _number(path)) < float("inf")), default=0)
        files = {name: [sizes[name], digest] for name, digest in zip(sizes, digests, strict=True)}
        manifest = {"format": FORMAT_MANIFEST, "version": VERSION_MANIFEST, "number": int(number), "files": files}
        write_json(aside / MANIFEST, manifest)

    raise_on_all_ranks(world, lambda: write() if world.rank == 0 else None)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _share(sizes: Mapping[str, int], world: Comm) -> list[str]:
    """The files that this rank reads: together all of them, and about as many bytes on each rank."""
    own, loads = [], [0] * world.size
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name] + 1
        if rank == world.rank:
            own.append(name)
    return own


def _sha256(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        total = hashlib.sha256()
        while chunk := file.read(1 << 22):
            total.update(chunk)
    return total.hexdigest()


def _listed(path: Path) -> tuple[dict[str, list[Any]], str | None]:
    """The files of a checkpoint with size and checksum, and what is wrong with the list or the sizes."""
    if _has_no_manifest(path):
        return {}, None
    try:
        files: dict[str, list[Any]] = _read_manifest(path)["files"]
    except ValueError as error:
        return {}, str(error)
    for name, (size, _) in files.items():
        try:
            found = (path / name).stat().st_size
        except (OSError, ValueError) as error:
            return {}, f"{path / name}: cannot be read ({summarize_error(error)})"
        if found != size:
            return {}, f"{path / name}: has {found} bytes, and was saved with {size}"
    return files, None


def _has_no_manifest(path: Path) -> bool:
    """Whether a checkpoint was written before there were manifests; where one is missing, it is damaged."""
    try:
        return not (path / MANIFEST).exists() and "manifest" not in read_json(path / "gap" / "state.json")
    except (TypeError, ValueError):
        return False


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as far as it can be relied on: `number`, and size and checksum of `files` in it."""
    manifest = read_json(path / MANIFEST)
    try:
        kind, version, files = manifest["format"], manifest["version"], manifest["files"]
        known = kind == FORMAT_MANIFEST and version == VERSION_MANIFEST
        rows = [(str(name), int(size), str(digest)) for name, (size, digest) in files.items()]
        inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name, *_ in rows)
        if known and inside and int(manifest["number"]) > 0 and "gap/state.json" in files:
            return {"number": int(manifest["number"]), "files": {name: [size, digest] for name, size, digest in rows}}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        pass
    raise ValueError(f"{path / MANIFEST}: is no manifest of version {VERSION_MANIFEST}, or it is damaged")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
