"""Folders of checkpoints: written aside, listed in a manifest, shown at once, found again, checked for damage.

    FOLDER/latest                 tag of the newest checkpoint, for people and other tools
    FOLDER/TAG/...                the library's own checkpoint of weights, optimizer and learning-rate schedule
    FOLDER/TAG/gap/manifest.json       size and SHA-256 of every other file
    FOLDER/TAG/gap/masks.safetensors   one uint8 tensor of bits per sparse entry (masks_file.py)
    FOLDER/TAG/gap/pruned.safetensors  with `regrow: last_value`, the values that pruned weights had
    FOLDER/TAG/gap/portable_R.safetensors  with `portable=True`, the pieces of rank R (portable.py)
    FOLDER/TAG/gap/state.json     config, applied steps, schedule, and the caller's state (run_state.py)
    FOLDER/TAG/gap/rng_R.json     random state of rank R

A checkpoint is whole or absent. The manifest reveals later damage before anything is changed. Nothing of ours is
pickled.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from gap_ds.sharding.comm import Comm, raise_on_all_ranks
from gap_ds.storage.atomic import PARTIAL, aside_of, delete_folder, old_of, replacing, replacing_folder, sha256, sync
from gap_ds.storage.errors import summarize_error
from gap_ds.storage.json import Count, Record, read_json, write_json

MANIFEST = Path("gap") / "manifest.json"
STATE = Path("gap") / "state.json"


class Manifest(Record):
    """gap/manifest.json.

    number: of the checkpoint among those of its folder, from 1. files: size in bytes and SHA-256 by path.
    """

    format: Literal["gap_ds.manifest"]
    version: Literal[1]
    number: Annotated[int, Field(ge=1, lt=2**63)]
    files: dict[str, tuple[Count, str]]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("names a file outside of the checkpoint")
        if str(STATE) not in files:
            raise ValueError(f"does not list {STATE}")
        return files


# -- saving ------------------------------------------------------------------------------------------------------------


def save(folder: Path, tag: str, world: Comm, write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Writes FOLDER/TAG by `write(folder aside)` on all ranks, then shows it at once and names it the latest.

    Args:
        write: raises on all ranks alike, or on none.
        keep: number of checkpoints to leave in the folder, this one included; older ones go once it is visible.
    Raises:
        ValueError: it could not be written, on all ranks; nothing of it is left, and older checkpoints are untouched.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1, for the checkpoint that is saved. None keeps all.")
    if tag in ("", "..") or Path(tag).name != tag or tag.endswith(PARTIAL):
        raise ValueError(f"tag={tag!r}: must be the name of a folder, and not end in {PARTIAL}.")
    final = folder / tag
    try:
        with ExitStack() as stack:

            def begin() -> None:
                (stack.enter_context(replacing_folder(final)) / "gap").mkdir()

            raise_on_all_ranks(world, lambda: begin() if world.rank == 0 else None)
            write(aside_of(final))
            _write_manifest(folder, aside_of(final), world)
            raise_on_all_ranks(world, lambda: stack.close() if world.rank == 0 else None)
    except Exception as error:
        if not isinstance(error, ValueError):  # another rank has ended
            raise
        raise ValueError(
            f"{final}: was not saved, and older checkpoints are as they were ({_free(folder)}): {error}"
        ) from error
    if world.rank == 0:
        with contextlib.suppress(OSError), replacing(folder / "latest") as latest:
            latest.write_text(tag, encoding="utf-8")
        if keep is not None:
            _prune(folder, keep)
    world.barrier()
    return final


def _free(folder: Path) -> str:
    """Free space on the disk of a folder, which an error of the disk often does not name."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"
    except OSError as error:
        return summarize_error(error)


def _write_manifest(folder: Path, aside: Path, world: Comm) -> None:
    """Flushes all files to disk and lists them with their checksums, each computed by one rank."""
    sizes: dict[str, int] = world.broadcast_object(
        raise_on_all_ranks(world, lambda: _sizes(aside) if world.rank == 0 else {})
    )
    own = raise_on_all_ranks(world, lambda: {name: _flushed(aside / name) for name in _share(sizes, world)})
    table = torch.zeros(len(sizes), 32, dtype=torch.int64, device="cpu")
    for row, name in enumerate(sizes):
        if name in own:
            table[row] = torch.tensor(list(bytes.fromhex(own[name])), device="cpu")
    digests = [bytes(row).hex() for row in world.sum(table).tolist()]

    def write() -> None:
        number = 1 + max((n for path in candidates(folder) if (n := _number(path)) < math.inf), default=0)
        files = {name: [size, digest] for (name, size), digest in zip(sizes.items(), digests, strict=True)}
        manifest = {"format": "gap_ds.manifest", "version": 1, "number": int(number), "files": files}
        write_json(aside / MANIFEST, manifest)

    raise_on_all_ranks(world, lambda: write() if world.rank == 0 else None)


def _flushed(path: Path) -> str:
    """SHA-256 of a file, after it was flushed to disk."""
    sync(path)
    return sha256(path)


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


def _prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest checkpoints that have all their files, and leftovers of killed saves."""
    found = candidates(folder)
    whole = [path for path in found if listed(path)[1] is None]
    leftovers = [path for path in folder.glob(f"*{PARTIAL}") if (path / "new").is_dir() or (path / "gap").is_dir()]
    for path in [*whole[keep:], *(path for path in leftovers if path / "old" not in found)]:
        with contextlib.suppress(OSError):
            delete_folder(path if path.parent == folder else path.parent)


# -- finding -----------------------------------------------------------------------------------------------------------


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first; they may be damaged."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        tag = path.name.removesuffix(PARTIAL)
        if tag != path.name:
            if (folder / tag).exists():
                continue
            path = old_of(folder / tag)
        if (path / STATE).is_file() or (path / MANIFEST).is_file():
            found.append(path)
    return sorted(found, key=lambda path: (_number(path), path), reverse=True)


def _number(path: Path) -> float:
    """The place of a checkpoint among those of its folder; a damaged one, whose place is not known, comes first."""
    try:
        return read_json(path / MANIFEST, Manifest).number
    except ValueError:
        return math.inf


def is_masks_alone(gap: Path) -> bool:
    """True if a folder holds what `GaPEngine.save_masks` writes, as beside the weights that a Trainer saves."""
    return (gap / "state.json").is_file() and not (gap / "manifest.json").is_file() and not any(gap.glob("rng_*.json"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, which may be damaged; of masks alone, that of the last step."""
    found = candidates(folder)
    if found and is_masks_alone(found[0] / "gap"):
        return max(found, key=lambda path: (_step(path), _number_of_name(path), path))
    return found[0] if found else None


class _Step(Record):
    """The part of gap/state.json that orders checkpoints without a manifest. Their names have any form."""

    applied_steps: Count


def _step(path: Path) -> float:
    """The applied step of a checkpoint; a damaged one, whose step is not known, comes last."""
    try:
        return read_json(path / STATE, _Step).applied_steps
    except ValueError:
        return math.inf


def _number_of_name(path: Path) -> int:
    """The number at the end of a name, such as checkpoint-500; -1 if there is none."""
    number = re.search(r"\d+$", path.name, re.ASCII)
    return int(number[0]) if number else -1


def find(folder: Path, tag: str | None = None) -> Path:
    """The checkpoint FOLDER/TAG; without a tag the newest one. It may be damaged: see `damage`.

    Raises:
        ValueError: there is none.
    """
    found = candidates(folder)
    if tag is None:
        if found:
            return found[0]
        raise ValueError(f"{folder}: holds no checkpoint")
    # A kill while a tag is saved again can leave its earlier contents aside; they are as good.
    for path in (folder / tag, old_of(folder / tag)) if tag and Path(tag).name == tag else ():
        if path in found:
            return path
    raise ValueError(f"{folder}: holds no complete checkpoint {tag!r}")


def find_whole(folder: Path, tag: str | None, world: Comm) -> Path:
    """The checkpoint FOLDER/TAG, or without a tag the newest whole one, verified; the same on all ranks.

    A warning names damaged ones that are passed over. All ranks must call this.

    Raises:
        ValueError: there is none, or FOLDER/TAG is damaged: which file, and how.
    """
    found = raise_on_all_ranks(world, lambda: candidates(folder) if tag is None else [find(folder, tag)])
    reasons = []
    for path in world.broadcast_object([str(path) for path in found]):
        reason = damage(Path(path), world)
        if reason is None:
            return Path(path)
        reasons.append(reason)
        if tag is None and world.rank == 0:
            warnings.warn(f"{reason}: this checkpoint is damaged and passed over", stacklevel=3)
    if not reasons:
        raise ValueError(f"{folder}: holds no checkpoint")
    raise ValueError(f"{reasons[0]}: the checkpoint is damaged. Use another one.")


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(path: Path, world: Comm) -> str | None:
    """A sentence on the first file of a checkpoint that is missing or changed; None if it is whole.

    Each rank reads some of the files; all return the same. All ranks must call this.
    """
    files, reason = world.broadcast_object(listed(path) if world.rank == 0 else None)
    if reason is not None:
        return str(reason)
    names = sorted(files)
    wrong = torch.zeros(len(names), dtype=torch.int64, device="cpu")
    for name in _share({name: size for name, (size, _) in files.items()}, world):
        try:
            wrong[names.index(name)] = sha256(path / name) != files[name][1]
        except OSError:  # a file that cannot be read now is as bad
            wrong[names.index(name)] = 1
    first = world.sum(wrong).nonzero()
    return f"{path / names[int(first[0, 0])]}: does not have the checksum it was saved with" if len(first) else None


def listed(path: Path) -> tuple[dict[str, tuple[int, str]], str | None]:
    """Size and SHA-256 of each file in the manifest; a sentence if it is damaged, or a file has another size."""
    try:
        files = read_json(path / MANIFEST, Manifest).files
    except ValueError as error:
        return {}, str(error).rstrip(".")
    for name, (size, _) in files.items():
        try:
            found = (path / name).stat().st_size
        except (OSError, ValueError) as error:
            return {}, f"{path / name}: cannot be read ({summarize_error(error)})"
        if found != size:
            return {}, f"{path / name}: has {found} bytes, and was saved with {size}"
    return files, None
