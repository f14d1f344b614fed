"""Saving, resuming and exporting a run. Everything is read and checked before anything is changed.

All ranks call each function together, between two updates.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds._version import __version__
from gap_ds.checkpoint import folder as checkpoint
from gap_ds.checkpoint import portable as portable_files
from gap_ds.checkpoint.run_state import RandomState, State
from gap_ds.export import folder as export_folder
from gap_ds.method.schedule import Phase
from gap_ds.sharding.comm import raise_on_all_ranks, summarize_error
from gap_ds.storage.json import read_json
from gap_ds.training.run import Run


def save_masks(run: Run, folder: Path, step: int, phase: Phase) -> None:
    """Saves masks and the place in the schedule. The folder is complete when it holds `state.json`."""
    run.agree(step, f"the masks saved at step {step}")
    if run.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").unlink(missing_ok=True)
    run.world.barrier()
    raise_on_all_ranks(run.world, lambda: _write_masks(run, folder, step, phase))
    if run.world.rank == 0:
        checkpoint.write_json(folder / "state.json", run.state(step).model_dump())
    run.world.barrier()


def load_masks(run: Run, folder: Path) -> int:
    """Restores what `save_masks` saved; returns the step that it was saved before.

    Raises:
        ValueError: the folder is not complete, is damaged, or belongs to another plan or schedule.
    """
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"{folder}: holds no masks: its checkpoint was written without gap_ds, or the run was killed before it "
            "was complete. Use an earlier checkpoint."
        )
    state = read_json(folder / "state.json", State)
    state.check(folder, run.state(0))
    _read_masks(run, folder, state.applied_steps).restore(run)
    return state.applied_steps


def save_checkpoint(
    run: Run, folder: Path, tag: str, step: int, phase: Phase, client_state: Any, portable: bool, keep: int | None
) -> Path:
    """Saves everything that decides the next step to FOLDER/TAG, and returns that path."""
    run.agree(step, f"the checkpoint at step {step}")

    def write(aside: Path) -> None:
        gap = aside / "gap"
        raise_on_all_ranks(run.world, lambda: run.backend.save(aside))
        raise_on_all_ranks(run.world, lambda: _write_masks(run, gap, step, phase))
        if portable:
            portable_files.write(gap, run.backend, run.buffers(), run.world)
        raise_on_all_ranks(run.world, lambda: _write_state(run, gap, step, client_state))

    return checkpoint.save(folder, tag, run.world, write, keep)


def load_checkpoint(run: Run, folder: Path, tag: str | None) -> tuple[int, Any, Path]:
    """Restores FOLDER/TAG, or the newest whole one; returns its step, the caller's client state, and its path."""
    path = checkpoint.find_whole(folder, tag, run.world)
    state = read_json(path / "gap" / "state.json", State)
    state.check(path, run.state(0))
    masks = _read_masks(run, path / "gap", state.applied_steps)
    same_ranks = state.ranks == run.world.size
    random = read_json(path / "gap" / f"rng_{run.world.rank}.json", RandomState) if same_ranks else None
    _restore_weights(run, path, state)
    masks.restore(run)
    run.learning_rate.load(state.lr_scheduler)
    if state.grad_scaler is not None and run.grad_scaler is not None:
        run.grad_scaler.load_state_dict(state.grad_scaler)
    if random is not None:
        random.restore()
    else:
        warnings.warn(f"saved by {state.ranks} ranks: the random state is not restored", stacklevel=4)
    run.world.barrier()  # a rank that could not restore its part has left: nobody goes on without it
    return state.applied_steps, state.client_state, path


def export(
    run: Run, folder: Path, step: int, phase: Phase, tokenizer: Any, dtype: torch.dtype, overwrite: bool
) -> Path:
    """Writes the final sparse model; a partition that is dense now is pruned in the copy alone."""
    target = export_folder.place(folder)

    def gather() -> dict[str, Tensor]:
        bits = {**run.mask_state.bits, **run.mask_state.select(run.to_prune(phase), step)}
        if not run.backend.comm.writes:
            return {}
        return export_folder.full_weights(run.backend.module, run.backend.shards(), bits, run.backend.comm, dtype)

    def about(weights: Mapping[str, Tensor]) -> dict[str, Any]:
        nonzero = {entry.name: int(weights[entry.name].count_nonzero()) for entry in run.plan.entries}
        info = export_folder.info(run.plan, run.schedule, run.signature, step, nonzero)
        return {**info, "training_flops": run.plan.training_flops(info["mean_density"])}

    export_folder.save(
        target, run.backend.module, gather, about, run.world, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite
    )
    return target


def _write_masks(run: Run, folder: Path, step: int, phase: Phase) -> None:
    if run.backend.comm.writes:
        about = {
            "signature": run.signature,
            "applied_steps": str(step),
            "phase": str(phase.index),
            "gap_ds": __version__,
        }
        run.mask_state.write(folder, about)
        for observer in run.observers:
            observer.write(folder)


def _write_state(run: Run, folder: Path, step: int, client_state: Any) -> None:
    checkpoint.write_json(folder / f"rng_{run.world.rank}.json", RandomState.now().model_dump())
    if run.world.rank == 0:
        checkpoint.write_json(folder / "state.json", run.state(step, client_state).model_dump())


@dataclass(frozen=True)
class _Masks:
    """Masks before a step as a folder holds them, with what each observer read there."""

    step: int
    phase: Phase
    pieces: tuple[dict[str, Tensor], dict[str, Tensor]]
    observed: tuple[Any, ...]

    def restore(self, run: Run) -> None:
        """Goes on with them."""
        run.mask_state.restore(*self.pieces)
        for observer, found in zip(run.observers, self.observed, strict=True):
            observer.restore(found, self.step, self.phase)


def _read_masks(run: Run, folder: Path, step: int) -> _Masks:
    phase = run.schedule.phase_at(step)
    sparse = {entry.name for entry in run.plan.entries if phase.is_masked(entry.partition, step)}
    pieces = run.mask_state.read(folder, sparse)
    return _Masks(step, phase, pieces, tuple(observer.read(folder) for observer in run.observers))


def _restore_weights(run: Run, path: Path, state: State) -> None:
    """Weights and optimizer state: from the library's own files if it can read them, else from portable ones."""
    backend = run.backend
    was, now = (f"{n} on {r} ranks" for n, r in [(state.backend, state.ranks), (backend.name, run.world.size)])
    if was != now and portable_files.exists(path / "gap"):
        portable_files.read(path / "gap", backend, run.buffers(), run.world)
        backend.publish()
        backend.recount(state.applied_steps, state.counters)
        return
    if was != now and not (backend.reshards and state.backend == backend.name):
        raise ValueError(
            f"{path}: was saved by {was}, and this is {now}: that takes a checkpoint saved with portable=True. "
            f"Go on with {was}, and save such a one there."
        )
    try:
        backend.load(path)
    except Exception as error:  # each library has errors of its own for a damaged, missing or foreign file
        raise ValueError(
            f"{path}: {now} cannot restore what {was} saved ({summarize_error(error)}). Use an earlier "
            "checkpoint, or the backend and the number of ranks that saved this one."
        ) from error
