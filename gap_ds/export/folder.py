"""The folder of an exported model: whole weights from any backend, written aside and shown at once."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gap_ds.export.card import CARD, write_card
from gap_ds.export.info import INFO, ExportInfo, is_export, renew_digests
from gap_ds.export.weights import Counted, counts_in, is_weights, read_back
from gap_ds.export.writing import Stream, Written, complete, complete_config, write_stream
from gap_ds.masks import bitmask
from gap_ds.method.names import by_parameter
from gap_ds.method.plan import clean_name
from gap_ds.sharding.comm import Comm, boxes_of, raise_on_all_ranks
from gap_ds.sharding.rank_zero import on_rank_zero
from gap_ds.sharding.shard import Shard
from gap_ds.storage.atomic import replacing_folder
from gap_ds.storage.errors import printable, summarize_error
from gap_ds.storage.json import write_json
from gap_ds.storage.safetensors import name_of

T = TypeVar("T")
U = TypeVar("U")
#: Files in a Trainer's checkpoint that describe the training and not the model.
_OF_TRAINING = ("trainer_state.json", "latest", "zero_to_fp32.py")
#: Where transformers puts a tokenizer's chat templates but for the first: its only files in a folder below.
_TEMPLATES = "additional_chat_templates/*.jinja"


# -- weights -----------------------------------------------------------------------------------------------------------


def full_weights(
    module: nn.Module, shards: Sequence[Shard], bits: Mapping[str, Tensor], comm: Comm, dtype: torch.dtype
) -> Stream:
    """All weights and buffers of the model with masks applied, on the CPU of rank 0, one at a time.

    The run's own weights are not touched. All ranks of `comm` must call this, and go through the stream.

    Args:
        bits: packed mask of this rank's piece of each entry that is to be sparse.
        dtype: of the parameters that are floating-point numbers; buffers keep their own.
    """
    boxes, entries = boxes_of(shards, comm), by_parameter(bits)

    def tensors() -> Iterator[tuple[str, Tensor | None]]:
        for shard, places in zip(shards, boxes, strict=True):
            piece = shard.weight()
            if shard.name in entries and shard.numel:
                piece = piece.clone()
                for name in entries[shard.name]:
                    bitmask.zero_pruned_(shard.part(name, piece), bits[name])
            piece = piece.to(dtype) if piece.is_floating_point() else piece
            whole = comm.assemble(piece, places, shard.full_numel)
            del piece
            yield shard.name, None if whole is None else whole.view(shard.shape)
            del whole  # before the next one comes
        for name, buffer in buffers(module):
            yield name, buffer.detach().cpu() if comm.rank == 0 else None

    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for shard in shards:
        own = shard.weight().dtype
        layout[shard.name] = dtype if own.is_floating_point else own, shard.shape
    layout |= {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers(module)}
    return Stream(layout, tensors())


def buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Persistent buffers by name; they are whole on every rank."""
    return [
        (clean_name(f"{prefix}.{name}" if prefix else name), buffer)
        for prefix, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    ]


# -- writing a folder --------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    module: nn.Module,
    gather: Callable[[], Stream],
    about: Callable[[Mapping[str, Counted]], ExportInfo],
    world: Comm,
    *,
    tokenizer: Any,
    dtype: torch.dtype,
    overwrite: bool,
) -> None:
    """Writes a model folder, whole or not at all, on rank 0. All ranks must call this.

    A Hugging Face model becomes a folder for `from_pretrained`, its weights under the names that the module gives them,
    as in gap.json and the masks; any other model becomes `model.safetensors`, which a strict `load_state_dict` takes.
    The files are read back before they are shown. Rank 0 holds one weight at a time.

    Args:
        gather: returns the weights, with floating-point parameters in `dtype`. All ranks call it, after the folder, the
            tokenizer and the dtypes were checked.
        about: called with the figures of the weights on rank 0; returns the contents of gap.json.
    Raises:
        ValueError: it cannot be written, on all ranks alike; earlier contents of the folder are as they were.
    """
    with ExitStack() as stack:

        def begin() -> Path:
            check_out(folder, overwrite)
            if not dtype.is_floating_point:
                raise ValueError(f"dtype={dtype}: must be one of floating-point numbers, such as torch.bfloat16.")
            for name, tensor in [("dtype", torch.empty(0, dtype=dtype, device="cpu")), *buffers(module)]:
                name_of(tensor.dtype, name)
            aside = stack.enter_context(replacing_folder(folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            return aside

        def alone(work: Callable[[], T]) -> T:
            return on_rank_zero(world, partial(_writing, folder, work))

        aside = alone(begin)
        stream = gather()
        stream = replace(stream, tensors=_together(stream.tensors, world))

        def write() -> Written | None:
            try:
                if world.rank == 0:
                    return _writing(folder, lambda: write_stream(aside, module, stream, dtype))
                return None
            finally:  # the other ranks send all of their pieces, whatever happened here
                deque(stream.tensors, maxlen=0)

        written = raise_on_all_ranks(world, write)

        def end() -> None:
            assert written is not None
            complete(aside, module, written.files, dtype)
            describe(aside, about(written.counts))
            read_back(aside, folder, written.files)
            stack.close()

        alone(end)


def _together(tensors: Iterator[U], world: Comm) -> Iterator[U]:
    """The tensors, with a meeting of the ranks after each: none waits in one collective until all are written."""
    for each in tensors:
        yield each
        del each  # before the next one comes
        world.barrier()


def _writing(folder: Path, work: Callable[[], T]) -> T:
    """Does the work; errors of all kinds become a ValueError that names the folder."""
    try:
        return work()
    except ValueError:
        raise
    except Exception as error:  # of the disk, of transformers, of a tokenizer
        raise ValueError(f"{folder}: cannot be written ({summarize_error(error)}).") from error


def describe(folder: Path, info: ExportInfo) -> None:
    """Writes gap.json, with the digests of the weights in the folder, and the model card."""
    write_json(folder / INFO, info)
    renew_digests(folder)
    write_card(folder)


def describe_saved(folder: Path, entries: Sequence[str], about: Callable[[Mapping[str, Counted]], ExportInfo]) -> None:
    """Writes gap.json for weights that something else saved, once they were counted. The model card is not written.

    Args:
        entries: names of all entries.
        about: called with the figures of the files' tensors; returns the contents of gap.json.
    Raises:
        ValueError: the folder has no weights in files of safetensors, or lacks an entry, or one is denser than its
            budget; nothing was written.
    """
    counts = counts_in(folder, entries)
    if lost := [name for name in entries if name not in counts]:
        raise ValueError(
            f"{folder}: has no {printable(lost[0])} ({len(lost)} of {len(entries)} entries are missing): its weights "
            "were saved under other names. Call engine.export."
        )
    info = about(counts)
    if dense := [name for name, entry in info.entries.items() if entry.nonzero > entry.keep]:
        entry = info.entries[dense[0]]
        raise ValueError(
            f"{folder}: {printable(dense[0])} has {entry.nonzero:,} weights that are not zero, its mask keeps "
            f"{entry.keep:,}. Save the model that was trained, or call engine.export."
        )
    write_json(folder / INFO, info)
    renew_digests(folder)


def copy_others(source: Path, folder: Path, but: Container[str] = ()) -> None:
    """Copies the files of a model's folder but for weights; of the folders in it, chat templates alone."""
    for path in sorted((*source.iterdir(), *source.glob(_TEMPLATES))):
        if path.is_file() and not is_weights(path) and path.name not in but:
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def copy_config(source: Path, folder: Path, dtype: torch.dtype, architecture: str) -> None:
    """Copies the files of a Hugging Face folder (configs, tokenizer and others) but for weights and a training's files.

    Args:
        architecture: class of the model, for a config that names none.
    """
    copy_others(source, folder, (INFO, CARD, *_OF_TRAINING))
    complete_config(folder / "config.json", dtype, architecture)


# -- where a folder may be written -------------------------------------------------------------------------------------


def place(folder: str | Path) -> Path:
    """A folder by a path that ends in its name, also if it is given as `.` or `..`."""
    path = Path(folder)
    return path.resolve() if path.name in ("", "..") else path


def check_out(folder: Path, overwrite: bool) -> None:
    """Refuses to write an exported model where something else is.

    Raises:
        ValueError: `folder` is a file, a link or the current folder; or it holds something, and `overwrite` is not set
            or it is no exported model.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder}: is a symbolic link. Choose another folder, or the one that it leads to.")
    for above in (folder, *folder.parents):
        if above.exists() and not above.is_dir():
            raise ValueError(f"{above}: is a file, and no folder. Choose another folder.")
    if not folder.exists():
        return
    if folder.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise ValueError(f"{folder}: is the current folder, or holds it. Choose another folder.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: is not empty. Choose another folder, or overwrite it on purpose (overwrite=True).")
    if not is_export(folder):
        raise ValueError(
            f"{folder}: holds no exported model ({INFO}), so it is not overwritten. Choose another folder, or delete "
            "it yourself."
        )
