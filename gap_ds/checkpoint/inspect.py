"""Counts of a checkpoint: its masks are counted and compared with their header, the budgets and the schedule.

The weights of a checkpoint are in the sharding library's own files, often pickled, so they are not looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gap_ds.checkpoint.folder import is_masks_alone, listed
from gap_ds.checkpoint.masks_file import FORMAT, FORMAT_VALUES, VERSION, counts_of
from gap_ds.checkpoint.run_state import State
from gap_ds.masks import bitmask
from gap_ds.masks.legality import Legality, multiple, possible_dims
from gap_ds.method.pattern import NofM, Pattern, Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Phase, Schedule
from gap_ds.storage.errors import printable
from gap_ds.storage.json import read_json
from gap_ds.storage.safetensors import CHUNK, Progress, chunk_rows, chunks, open_tensors

_COLUMNS = ("weights", "keep", "kept")


def inspect(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of a checkpoint FOLDER/TAG, for JSON; `problems` has a sentence for each thing that is wrong.

    Args:
        folder: or what `save_masks` wrote, or a folder that holds it as `gap`.
    Raises:
        ValueError: state.json or a file of masks cannot be read.
    """
    gap = folder / "gap" if (folder / "gap" / "state.json").is_file() else folder
    state = read_json(gap / "state.json", State)
    plan, problems = state.restore_plan(), list[str]()
    if plan.fingerprint != state.plan:
        problems.append(f"state.json: the fingerprint of its entries is {plan.fingerprint}, its plan is {state.plan}")
    try:
        schedule = state.schedule()
    except ValueError as error:
        schedule = None
        problems.append(f"state.json: {error}")
    found, wrong = _masks(gap, state, plan, progress)
    problems += wrong
    phase = state.phase(schedule) if schedule is not None else None
    if phase is not None:
        problems += _against_schedule(state, phase, plan, found)
    values = gap / "pruned.safetensors"
    if state.config.regrow == "last_value" or values.is_file():
        problems += _last_values(values, state, found)
    notes = [f"the weights are in {printable(state.backend)}'s own files and are not looked at"]
    if is_masks_alone(gap):
        by = "something else, as a Trainer"
        notes = [f"these are masks alone: weights, optimizer and random state were saved by {by}"]
    else:
        problems += [
            f"gap/rng_{rank}.json: is missing, so the run does not resume bit for bit"
            for rank in range(min(state.ranks, 100_000))
            if not (gap / f"rng_{rank}.json").is_file()
        ]
        if not problems and (damaged := listed(folder)[1]):
            problems.append(damaged)
    if state.ended_at is not None:
        notes.append(f"the schedule was ended early, at step {state.ended_at:,}")
    rows = _rows(plan, found)
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "signature": state.signature,
        "method": state.config.method,
        "pattern": state.config.pattern,
        "applied_steps": state.applied_steps,
        "phase": _phase(phase, schedule, state),
        "backend": state.backend,
        "ranks": state.ranks,
        "worker": state.worker,
        "plan": state.plan,
        "partitions": _partitions(rows),
        "entries": rows,
        "notes": notes,
        "problems": problems,
    }


# -- masks -------------------------------------------------------------------------------------------------------------


def _masks(gap: Path, state: State, plan: Plan, progress: Progress) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Kept weights and bits of each mask, by entry; and sentences on what is wrong with the masks."""
    path = gap / "masks.safetensors"
    entries = {entry.name: entry for entry in plan.entries}
    found: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    with open_tensors(path, (FORMAT, VERSION)) as file:
        problems += _plan(path, file.metadata(), state)
        try:
            counts: Mapping[str, int] | None = counts_of(path, file.metadata())
        except ValueError as error:
            counts = None
            problems.append(str(error))
        names = list(file.keys())
        problems += [f"{printable(name)}: has no mask" for name in counts or {} if name not in names]
        total, done = path.stat().st_size, 0
        for name in names:
            figures, problem = _count(file, name, entries.get(name), plan.pattern)
            kept = figures["kept"]
            if problem is None and counts is not None and counts.get(name) != kept:
                problem = f"its mask keeps {kept:,} weights, the header has {counts.get(name)}"
            if problem is None and name not in entries:
                problem = "has a mask and is no entry of the plan"
            if problem:
                problems.append(f"{printable(name)}: {problem}")
            found[name] = figures
            done += figures["bits"] // 8
            progress(printable(name), done, total)
    return found, problems


def _plan(path: Path, metadata: Mapping[str, str], state: State) -> list[str]:
    if metadata.get("plan") == state.plan:
        return []
    return [f"{path.name}: is of plan {printable(str(metadata.get('plan')))}, state.json of plan {state.plan}"]


def _count(file: Any, name: str, entry: Entry | None, pattern: Pattern) -> tuple[dict[str, int], str | None]:
    piece = file.get_slice(name)
    shape, dtype = piece.get_shape(), piece.get_dtype()
    if dtype != "U8" or len(shape) != 1:
        return {"kept": 0, "bits": 0}, f"its mask is {dtype} of shape {shape} and not a vector of bytes"
    figures = {"kept": sum(bitmask.count(part) for part in chunks(file, name)), "bits": 8 * shape[0]}
    if entry is None:
        return figures, None
    if shape[0] != bitmask.nbytes(entry.numel):
        return figures, f"its mask has {shape[0]:,} bytes, {entry.numel:,} weights need {bitmask.nbytes(entry.numel):,}"
    if tail := 8 * shape[0] - entry.numel:
        last = bitmask.unpack(piece[shape[0] - 1 :], 8)
        if bool(last[8 - tail :].any()):
            return figures, "its mask keeps weights beyond the entry's end"
    return figures, None if isinstance(pattern, Unstructured) else _broken_pattern(
        piece, entry, pattern, figures["kept"]
    )


def _broken_pattern(bits: Any, entry: Entry, pattern: Any, kept: int) -> str | None:
    """A sentence if the mask of an entry, a slice of a file, does not follow its pattern."""
    dims = entry.dims if entry.dims in possible_dims(len(entry.shape)) else None
    if isinstance(pattern, NofM) and kept * pattern.m % entry.numel == 0:  # on its way N is larger
        pattern = NofM(kept * pattern.m // entry.numel, pattern.m)
    legality = Legality(pattern, entry.shape, dims, exact=True, keep=kept)
    row, step = math.prod(entry.shape[1:]), chunk_rows(entry.shape, multiple(pattern))
    for lo in range(0, entry.shape[0] if row else 0, step):
        hi = min(lo + step, entry.shape[0])
        first, end = lo * row // 8, bitmask.nbytes(hi * row)
        part = bitmask.unpack(bits[first:end], (hi - lo) * row, start=lo * row - 8 * first)
        legality.add(part.view(hi - lo, *entry.shape[1:]))
    return legality.problem()


def _against_schedule(state: State, phase: Phase, plan: Plan, found: Mapping[str, dict[str, int]]) -> list[str]:
    """Entries with a mask too many or too few, and masks that do not meet their budget."""
    config, problems = state.config, list[str]()
    step = state.applied_steps if state.ended_at is None else max(state.applied_steps, phase.end_step)
    wanted: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    for entry in plan.entries:
        has, should = entry.name in found, phase.is_masked(entry.partition, step) and config.record.prunes
        if has != should:
            problems.append(f"{printable(entry.name)}: {'has a' if has else 'lacks its'} mask in {phase}")
        if not (has and should):
            continue
        budget = phase.budget(entry, phase.changed(step))
        budget = plan.pattern.nearest(entry.shape, budget, entry.dims)
        n = found[entry.name]["kept"]
        wanted[entry.partition] += budget
        kept[entry.partition] += n
        if not plan.shared_budget and n != budget:
            problems.append(f"{printable(entry.name)}: its mask keeps {n:,} weights, its budget is {budget:,}")
    if plan.shared_budget:
        problems += [
            f"partition {k}: its masks keep {kept[k]:,} weights, its budget is {wanted[k]:,}"
            for k in sorted(wanted)
            if kept[k] != wanted[k]
        ]
    return problems


def _last_values(path: Path, state: State, found: Mapping[str, dict[str, int]]) -> list[str]:
    """Sentences on values of pruned weights (`regrow: last_value`) that are not finite, or of kept weights."""
    problems = []
    with (
        open_tensors(path, (FORMAT_VALUES, VERSION)) as file,
        open_tensors(path.with_name("masks.safetensors")) as bits,
    ):
        problems += _plan(path, file.metadata(), state)
        names = set(file.keys())
        problems += [f"{printable(name)}: is in one of masks and pruned alone" for name in names ^ set(found)]
        for name in sorted(names & set(found)):
            piece, mask = file.get_slice(name), bits.get_slice(name)
            shape = piece.get_shape()
            if len(shape) != 1 or bitmask.nbytes(shape[0]) * 8 != found[name]["bits"]:
                problems.append(f"{printable(name)}: its pruned values are of shape {shape}")
                continue
            for lo in range(0, shape[0], CHUNK):
                values = piece[lo : lo + CHUNK]
                kept = bitmask.unpack(mask[lo // 8 : bitmask.nbytes(lo + values.numel())], values.numel())
                if not bool(torch.isfinite(values).all()) or bool(torch.count_nonzero(values[kept])):
                    problems.append(f"{printable(name)}: has pruned values that are not finite, or of kept weights")
                    break
    return problems


# -- figures -----------------------------------------------------------------------------------------------------------


def _rows(plan: Plan, found: Mapping[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    return {
        entry.name: {
            "partition": entry.partition,
            "shape": list(entry.shape),
            "weights": entry.numel,
            "keep": entry.keep,
            "kept": found[entry.name]["kept"] if entry.name in found else entry.numel,
            "dense": entry.name not in found,
        }
        for entry in plan.entries
    }


def _partitions(rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the entries of each partition."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault(row["partition"], []).append(row)
    return [
        {
            "partition": k,
            "entries": len(groups[k]),
            "dense": sum(row["dense"] for row in groups[k]),
            **{key: sum(row[key] for row in groups[k]) for key in _COLUMNS},
        }
        for k in sorted(groups)
    ]


def _phase(phase: Phase | None, schedule: Schedule | None, state: State) -> dict[str, Any]:
    if phase is None or schedule is None:
        index = sum(first <= state.applied_steps for first in state.first_steps) - 1
        return {"phase": max(0, index), "phases": len(state.first_steps)}
    return {
        "phase": phase.index,
        "phases": len(schedule.phases),
        "kind": phase.kind,
        "round": phase.round,
        "dense": sorted(phase.dense),
        "total_steps": schedule.total_steps,
    }
