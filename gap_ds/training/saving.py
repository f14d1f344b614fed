"""Saving, resuming and exporting a run. Everything is read and checked before anything is changed.

All ranks call each function together, between two updates.
"""

from __future__ import annotations

import logging
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gap_ds import checkpoint
from gap_ds import export as exports
from gap_ds._version import __version__
from gap_ds.checkpoint import portable as portable_files
from gap_ds.checkpoint.run_state import RandomState, State
from gap_ds.method import rules
from gap_ds.method.names import by_parameter
from gap_ds.sharding.backends import OtherOptimizerError
from gap_ds.sharding.comm import raise_on_all_ranks
from gap_ds.storage.errors import summarize_error
from gap_ds.storage.json import read_json, write_json
from gap_ds.training.mask_state import Pieces
from gap_ds.training.run import Place, Run


def save_masks(run: Run, folder: Path, place: Place) -> None:
    """Saves masks and the place in the schedule. The folder is complete when it holds `state.json`."""
    run.agree(place.step, f"the masks saved at step {place.step}")
    if run.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").unlink(missing_ok=True)
    run.world.barrier()
    raise_on_all_ranks(run.world, lambda: _write_masks(run, folder, place))
    if run.world.rank == 0:
        write_json(folder / "state.json", run.state(place))
    run.world.barrier()
    raise_on_all_ranks(run.world, lambda: _check_shared(folder / "state.json"))


def budgets(folder: Path) -> dict[str, int] | None:
    """The kept weights of each entry of the run that `save_masks` saved; None if the folder holds none."""
    path = folder / "state.json"
    return {row[0]: row[3] for row in read_json(path, State).entries} if path.is_file() else None


def load_masks(run: Run, folder: Path) -> Place:
    """Restores what `save_masks` saved; returns the place that it was saved at.

    Raises:
        ValueError: the folder is not complete, is damaged, belongs to another plan or schedule, or the weights do not
            belong to its masks. On all ranks alike; nothing was changed.
    """

    def read() -> State:
        if not (folder / "state.json").is_file():
            raise ValueError(
                f"{folder}: holds no masks: its checkpoint was written without gap_ds, the run was killed before it "
                f"was complete, or rank {run.world.rank} does not share the disk. Use an earlier checkpoint."
            )
        state = read_json(folder / "state.json", State)
        state.check(folder, run.state(Place()))
        return state

    state = raise_on_all_ranks(run.world, read)
    place = Place(state.applied_steps, state.ended_at)
    before = run.mask_state.pieces()
    masks = _read_masks(run, folder, place)
    run.mask_state.restore(masks.pieces)

    def look() -> None:
        if found := run.mask_state.revived():
            raise ValueError(
                f"{folder}: {found[1]} weights of {found[0]} that its masks prune are not 0: the weights are not those "
                "that they were saved with. Restore both from the same checkpoint, the weights first. transformers "
                "saves some models (mixtures of experts, ViT) under other names than their parameters have, and a "
                "Trainer resumes without them: load such a checkpoint by from_pretrained, and pass that model."
            )

    try:
        raise_on_all_ranks(run.world, look)
    except ValueError:
        run.mask_state.restore(before)
        raise
    masks.restore(run)
    return place


def save_checkpoint(
    run: Run, folder: Path, tag: str, place: Place, client_state: Any, portable: bool, keep: int | None
) -> Path:
    """Saves everything that decides the next step to FOLDER/TAG, and returns that path."""
    run.agree(place.step, f"the checkpoint at step {place.step}")

    def write(aside: Path) -> None:
        gap = aside / "gap"
        raise_on_all_ranks(run.world, lambda: run.backend.save(aside))
        raise_on_all_ranks(run.world, lambda: _write_masks(run, gap, place))
        if portable:
            portable_files.write(gap, run.backend, run.buffers(), run.world)
        raise_on_all_ranks(run.world, lambda: _write_state(run, gap, place, client_state))

    return checkpoint.save(folder, tag, run.world, write, keep)


def load_checkpoint(run: Run, folder: Path, tag: str | None) -> tuple[Place, Any, Path]:
    """Restores FOLDER/TAG, or the newest whole one; returns its place, the caller's client state, and its path."""
    path = checkpoint.find_whole(folder, tag, run.world)

    def read() -> tuple[State, RandomState | None]:
        state = read_json(path / "gap" / "state.json", State)
        state.check(path, run.state(Place()))
        same_ranks = state.ranks == run.world.size
        return state, read_json(path / "gap" / f"rng_{run.world.rank}.json", RandomState) if same_ranks else None

    state, random = raise_on_all_ranks(run.world, read)
    place = Place(state.applied_steps, state.ended_at)
    masks = _read_masks(run, path / "gap", place)
    run.forget()
    _restore_weights(run, path, state)
    masks.restore(run)
    run.agree_on_weights(f"loading {path}")
    run.learning_rate.load(state.lr_scheduler)
    if bool(state.lr_scheduler) != bool(run.learning_rate.schedulers):
        had, has = ("a", "none") if state.lr_scheduler else ("no", "one")
        warnings.warn(
            f"saved with {had} learning-rate scheduler, and this run has {has}: learning rates do not go on as they "
            "would have. Build what the saving run had.",
            stacklevel=4,
        )
    # A scaler that is switched off has no state, and one that is on refuses to load none.
    scales = run.grad_scaler is not None and bool(run.grad_scaler.state_dict())
    if state.grad_scaler and scales:
        run.grad_scaler.load_state_dict(state.grad_scaler)
    elif scales:
        warnings.warn("saved without a gradient scaler that is on: the loss scale begins anew", stacklevel=4)
    if random is not None:
        random.restore()
    else:
        warnings.warn(f"saved by {state.ranks} ranks: the random state is not restored", stacklevel=4)
    run.world.barrier()  # a rank that could not restore its part has left: nobody goes on without it
    return place, state.client_state, path


def export(run: Run, folder: Path, place: Place, tokenizer: Any, dtype: torch.dtype, overwrite: bool) -> Path:
    """Writes the final sparse model; a partition that is dense now is pruned in the copy alone."""
    run.agree(place.step, f"the export at step {place.step}")
    step, phase = place.step, place.phase(run.schedule)
    target = exports.place(folder)

    def gather() -> exports.Stream:
        bits = {**run.mask_state.bits, **run.mask_state.select(run.to_prune(phase), step)}
        stream = exports.full_weights(run.backend.module, run.backend.shards(), bits, run.backend.comm, dtype)
        if not run.backend.comm.writes:  # another group has the same weights
            return replace(stream, tensors=((name, None) for name in stream.layout))
        return replace(stream, entries=by_parameter(entry.name for entry in run.plan.entries))

    def about(counts: Mapping[str, exports.Counted]) -> exports.ExportInfo:
        return _info(run, target, place, counts)

    exports.save(
        target, run.backend.module, gather, about, run.world, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite
    )
    return target


def describe(run: Run, folder: Path, place: Place) -> None:
    """Writes gap.json into a folder of weights that something else saved, on rank 0; no rank waits."""
    if run.world.rank:
        return
    phase = place.phase(run.schedule)
    if run.to_prune(phase):
        raise ValueError(
            f"{folder}: was saved in {phase}, so it is not the sparse model. Call engine.export, which prunes the "
            "dense partition in the copy, or save after the last boundary."
        )
    exports.describe_saved(folder, [e.name for e in run.plan.entries], lambda counts: _info(run, folder, place, counts))


def _info(run: Run, target: Path, place: Place, counts: Mapping[str, exports.Counted]) -> exports.ExportInfo:
    """The record of a model that is written to `target`, with a warning if the schedule is not finished."""
    nonzero = {entry.name: counts[entry.name].nonzero for entry in run.plan.entries}
    of_run = (run.plan, run.schedule, run.config, run.signature)
    info = exports.ExportInfo.of(*of_run, place.step, place.ended, run.steps_per_epoch, nonzero)
    if not info.finished:
        run.say(f"{target}: {info.progress} Train to the end of the schedule for the final model.", logging.WARNING)
    planned = run.schedule.mean_density(*run.plan.per_partition())
    flops = {"training_flops": info.mean_density, "planned_training_flops": planned}
    return info.model_copy(update={key: run.plan.training_flops(density) for key, density in flops.items()})


def _write_masks(run: Run, folder: Path, place: Place) -> None:
    if run.backend.comm.writes:
        about = {
            "signature": run.signature,
            "applied_steps": str(place.step),
            "phase": str(place.phase(run.schedule).index),
            "gap_ds": __version__,
        }
        run.mask_state.write(folder, about)
        for observer in run.observers:
            observer.write(folder)


def require_shared(run: Run, folder: Path) -> None:
    """Checks that all ranks see what rank 0 writes to a folder; ValueError on all ranks if not."""
    probe = folder / f".gap_shared_{run.world.broadcast_object(secrets.token_hex(4))}"
    if run.world.size == 1:
        return

    def write() -> None:
        if run.world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()

    raise_on_all_ranks(run.world, write)
    try:
        raise_on_all_ranks(run.world, lambda: _check_shared(probe))
    finally:
        if run.world.rank == 0:
            probe.unlink(missing_ok=True)


def _check_shared(file: Path) -> None:
    """Raises ValueError if this rank does not see a file that rank 0 has written."""
    if not file.is_file():
        raise ValueError(
            f"{file.parent}: is not on a disk that all ranks share: this rank does not see what rank 0 wrote. Save to "
            "a shared folder."
        )


def _write_state(run: Run, folder: Path, place: Place, client_state: Any) -> None:
    write_json(folder / f"rng_{run.world.rank}.json", RandomState.now())
    if run.world.rank == 0:
        write_json(folder / "state.json", run.state(place, client_state))


@dataclass(frozen=True)
class _Masks:
    """Masks as a folder holds them, with what each observer read there."""

    place: Place
    pieces: Pieces
    observed: tuple[Any, ...]

    def restore(self, run: Run) -> None:
        """Goes on with them."""
        run.mask_state.restore(self.pieces)
        run.mask_state.take_masks()
        for observer, found in zip(run.observers, self.observed, strict=True):
            observer.restore(found, self.place.step, self.place.phase(run.schedule))


def _read_masks(run: Run, folder: Path, place: Place) -> _Masks:
    phase, step = place.phase(run.schedule), place.schedule_step(run.schedule)
    sparse = {entry.name for entry in run.plan.entries if phase.is_masked(entry.partition, step)}
    entries = {entry.name: entry for entry in run.plan.entries}
    until = place.step if place.ended is None else place.ended
    pieces = run.mask_state.read(
        folder, sparse, lambda name: rules.grown_before(run.config, run.schedule, entries[name], until)
    )
    return _Masks(place, pieces, tuple(observer.read(folder) for observer in run.observers))


def _restore_weights(run: Run, path: Path, state: State) -> None:
    """Weights and optimizer state: from the library's own files if it can read them, else from portable ones."""
    backend, optimizers = run.backend, run.backend.optimizers
    if (saved := state.optimizers) is not None and not optimizers.alike(saved, state.backend == backend.name):
        raise ValueError(
            f"{path}: was saved with the optimizer {', '.join(saved)}, and this is {optimizers.names}. Resume with the "
            "optimizer it was saved with."
        )
    was, now = (f"{n} on {r} ranks" for n, r in [(state.backend, state.ranks), (backend.name, run.world.size)])
    if was != now and portable_files.exists(path / "gap"):
        portable_files.read(path / "gap", backend, run.buffers(), run.world)
        backend.publish()
        backend.recount(state.applied_steps, state.counters)
        optimizers.used = optimizers.used or state.applied_steps > 0
        return
    if was != now and state.backend not in backend.reshards:
        raise ValueError(
            f"{path}: was saved by {was}, and this is {now}: that takes a checkpoint saved with portable=True. "
            f"Go on with {was}, and save such a one there."
        )
    try:
        backend.load(path)
    except OtherOptimizerError:
        raise
    except Exception as error:  # each library has errors of its own for a damaged, missing or foreign file
        raise ValueError(
            f"{path}: {now} cannot restore what {was} saved ({summarize_error(error)}). Use an earlier "
            "checkpoint, or the backend and the number of ranks that saved this one."
        ) from error
