"""What a checkpoint holds: the masks are counted and compared with their header, the budgets and the schedule.

The weights of a checkpoint are in the sharding library's own files, often pickled, so they are not looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gap_ds.checkpoint import folder as checkpoint
from gap_ds.checkpoint.run_state import State
from gap_ds.export.inspect import Progress
from gap_ds.masks import bitmask
from gap_ds.masks.legality import Legality, multiple, possible_dims
from gap_ds.method import pattern, rules
from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Phase, Schedule
from gap_ds.method.signature import config_of, schedule_of
from gap_ds.storage import files
from gap_ds.storage import json as records


def inspect(folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of a checkpoint FOLDER/TAG, for JSON; what is wrong with it is in `problems`, a sentence each.

    Raises:
        ValueError: state.json or a file of masks cannot be read.
    """
    state = records.read_json(folder / "gap" / "state.json", State)
    config = config_of(state.signature)
    entries, notes = _entries(state)
    schedule = schedule_of(config, state.first_steps, state.worker or 0) if config is not None else None
    phase = schedule.phase_at(state.applied_steps) if schedule is not None else None
    problems = _fingerprint(state, config, entries)
    if config is None:
        notes.append("the signature is one that this version cannot read: budgets, phase and pattern are not checked")
    elif schedule is None:
        notes.append("the phases in state.json are not those of its signature: the schedule is not checked")
    found, wrong = _masks(folder, state, config, entries, progress)
    problems += wrong
    if phase is not None and config is not None and entries is not None:
        problems += _against_schedule(config, phase, state.applied_steps, entries, found)
    values = folder / "gap" / "pruned.safetensors"
    if config is not None and (config.regrow == "last_value" or values.is_file()):
        problems += _last_values(folder, values, state, found)
    problems += [
        f"gap/rng_{rank}.json: is missing, so the run does not resume bit for bit"
        for rank in range(min(state.ranks, 100_000))
        if not (folder / "gap" / f"rng_{rank}.json").is_file()
    ]
    rows = _rows(entries, found)
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "signature": state.signature,
        "method": config.method if config is not None else None,
        "pattern": config.pattern if config is not None else None,
        "applied_steps": state.applied_steps,
        "phase": _phase(phase, schedule, state),
        "backend": state.backend,
        "ranks": state.ranks,
        "worker": state.worker,
        "plan": state.plan,
        "partitions": _partitions(rows),
        "entries": rows,
        "notes": [*notes, f"the weights are in {records.printable(state.backend)}'s own files and are not looked at"],
        "problems": problems,
    }


def _entries(state: State) -> tuple[dict[str, Entry] | None, list[str]]:
    """The entries by name, if state.json has them."""
    if state.entries is None:
        return None, ["state.json does not say the entries' shapes and budgets, which are therefore not checked"]
    entries = {}
    for name, shape, partition, keep, dims in state.entries:
        pair = (dims[0], dims[1]) if len(dims) == 2 else (0, 1)
        entries[name] = Entry(name, tuple(shape), partition, keep, pair)
    return entries, []


def _fingerprint(state: State, config: GaPConfig | None, entries: dict[str, Entry] | None) -> list[str]:
    if entries is None or config is None:
        return []
    shared_budget = config.distribution == "global"
    plan = Plan(tuple(entries.values()), config.kappa, 0, 0, pattern.parse(config.pattern), shared_budget)
    if plan.fingerprint != state.plan:
        return [f"state.json: the fingerprint of its entries is {plan.fingerprint}, it says {state.plan}"]
    return []


def _masks(
    folder: Path, state: State, config: GaPConfig | None, entries: dict[str, Entry] | None, progress: Progress
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """By entry with a mask: kept weights and bits; and what is wrong with the masks."""
    path = folder / "gap" / "masks.safetensors"
    found: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    with files.open_tensors(path) as file:
        metadata = file.metadata() or {}
        _check_kind(path, metadata, checkpoint.FORMAT)
        if metadata.get("plan") != state.plan:
            problems.append(f"masks.safetensors: is of plan {metadata.get('plan')}, state.json of plan {state.plan}")
        counts = files.header_counts(metadata)
        if counts is None:
            problems.append("masks.safetensors: its header does not say how many weights each mask keeps")
        names = list(file.keys())
        problems += [f"{records.printable(name)}: has no mask" for name in counts or {} if name not in names]
        total, done = path.stat().st_size, 0
        for name in names:
            entry = entries.get(name) if entries is not None else None
            figures, problem = _count(file, name, entry, config)
            kept = figures["kept"]
            if problem is None and counts is not None and counts.get(name) != kept:
                problem = f"its mask keeps {kept:,} weights, the header says {counts.get(name)}"
            if problem is None and entries is not None and entry is None:
                problem = "has a mask and is no entry of the plan"
            if problem:
                problems.append(f"{records.printable(name)}: {problem}")
            found[name] = figures
            done += figures["bits"] // 8
            progress(records.printable(name), done, total)
    return found, problems


def _check_kind(path: Path, metadata: dict[str, str], kind: str) -> None:
    if metadata.get("format") != kind or metadata.get("version") != str(checkpoint.VERSION):
        raise ValueError(f"{path}: is no file of the kind {kind}, version {checkpoint.VERSION}.")


def _count(file: Any, name: str, entry: Entry | None, config: GaPConfig | None) -> tuple[dict[str, int], str | None]:
    piece = file.get_slice(name)
    shape, dtype = piece.get_shape(), piece.get_dtype()
    if dtype != "U8" or len(shape) != 1:
        return {"kept": 0, "bits": 0}, f"its mask is {dtype} of shape {shape} and not a vector of bytes"
    figures = {"kept": sum(bitmask.count(part) for part in files.chunks(file, name)), "bits": 8 * shape[0]}
    if entry is None:
        return figures, None
    if shape[0] != bitmask.nbytes(entry.numel):
        return figures, f"its mask has {shape[0]:,} bytes, {entry.numel:,} weights need {bitmask.nbytes(entry.numel):,}"
    if tail := 8 * shape[0] - entry.numel:
        last = bitmask.unpack(piece[shape[0] - 1 :], 8)
        if bool(last[8 - tail :].any()):
            return figures, "its mask keeps weights beyond the entry's end"
    the_pattern = pattern.parse(config.pattern) if config is not None else Unstructured()
    if isinstance(the_pattern, Unstructured):
        return figures, None
    dims = entry.dims if entry.dims in possible_dims(len(entry.shape)) else None
    legality = Legality(the_pattern, entry.shape, dims, exact=True, keep=entry.keep)
    row = math.prod(entry.shape[1:])
    step = max(1, files.CHUNK // max(1, row) // multiple(the_pattern)) * multiple(the_pattern)
    for lo in range(0, entry.shape[0] if row else 0, step):
        hi = min(lo + step, entry.shape[0])
        first, end = lo * row // 8, bitmask.nbytes(hi * row)
        part = bitmask.unpack(piece[first:end], (hi - lo) * row, start=lo * row - 8 * first)
        legality.add(part.view(hi - lo, *entry.shape[1:]))
    return figures, legality.problem()


def _against_schedule(
    config: GaPConfig, phase: Phase, step: int, entries: dict[str, Entry], found: dict[str, dict[str, int]]
) -> list[str]:
    """Entries that have a mask and should not, or the other way round, and masks that do not meet their budget."""
    problems, rule = [], rules.rule(config)
    done = [update for update in phase.updates if update <= step]
    wanted: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    for name, entry in entries.items():
        has, should = name in found, phase.is_masked(entry.partition, step) and config.method != "dense"
        if has != should:
            problems.append(f"{records.printable(name)}: {'has a' if has else 'lacks its'} mask in {phase}")
        if not (has and should):
            continue
        budget = entry.keep
        if entry.partition in phase.dense and done:  # on its way out: pruned in part
            update = rule(entry, phase, phase, done[-1])
            budget = update.keep if isinstance(update, rules.PruneByMagnitude) else entry.keep
        wanted[entry.partition] += budget
        kept[entry.partition] += found[name]["kept"]
        if config.distribution != "global" and found[name]["kept"] != budget:
            problems.append(
                f"{records.printable(name)}: its mask keeps {found[name]['kept']:,} weights, its budget is {budget:,}"
            )
    if config.distribution == "global":
        problems += [
            f"partition {k}: its masks keep {kept[k]:,} weights, its budget is {wanted[k]:,}"
            for k in sorted(wanted)
            if kept[k] != wanted[k]
        ]
    return problems


def _last_values(folder: Path, path: Path, state: State, found: dict[str, dict[str, int]]) -> list[str]:
    """Whether the values of pruned weights (`regrow: last_value`) are of pruned weights, and finite."""
    problems = []
    with files.open_tensors(path) as file, files.open_tensors(folder / "gap" / "masks.safetensors") as bits:
        metadata = file.metadata() or {}
        _check_kind(path, metadata, checkpoint.FORMAT_VALUES)
        if metadata.get("plan") != state.plan:
            problems.append(f"pruned.safetensors: is of plan {metadata.get('plan')}, state.json of plan {state.plan}")
        names = set(file.keys())
        problems += [f"{records.printable(name)}: is in one of masks and pruned alone" for name in names ^ set(found)]
        for name in sorted(names & set(found)):
            piece, mask = file.get_slice(name), bits.get_slice(name)
            shape = piece.get_shape()
            if len(shape) != 1 or bitmask.nbytes(shape[0]) * 8 != found[name]["bits"]:
                problems.append(f"{records.printable(name)}: its pruned values are of shape {shape}")
                continue
            for lo in range(0, shape[0], files.CHUNK):
                values = piece[lo : lo + files.CHUNK]
                kept = bitmask.unpack(mask[lo // 8 : bitmask.nbytes(lo + values.numel())], values.numel())
                if not files.is_finite(values) or bool(torch.count_nonzero(values[kept])):
                    problems.append(
                        f"{records.printable(name)}: has pruned values that are not finite, or of kept weights"
                    )
                    break
    return problems


def _rows(entries: dict[str, Entry] | None, found: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    if entries is None:
        return {
            name: {"partition": None, "weights": None, "bits": row["bits"], "keep": None, "kept": row["kept"]}
            for name, row in found.items()
        }
    return {
        name: {
            "partition": entry.partition,
            "shape": list(entry.shape),
            "weights": entry.numel,
            "keep": entry.keep,
            "kept": found[name]["kept"] if name in found else entry.numel,
            "dense": name not in found,
        }
        for name, entry in entries.items()
    }


def _partitions(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the entries of each partition; one row without a number where partitions are not known."""
    groups: dict[int | None, list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault(row["partition"], []).append(row)

    def total(group: list[dict[str, Any]], key: str) -> int | None:
        return None if any(row.get(key) is None for row in group) else sum(row[key] for row in group)

    return [
        {
            "partition": k,
            "entries": len(groups[k]),
            "dense": sum(bool(row.get("dense")) for row in groups[k]),
            "weights": total(groups[k], "weights"),
            "keep": total(groups[k], "keep"),
            "kept": total(groups[k], "kept"),
        }
        for k in sorted(groups, key=lambda k: -1 if k is None else k)
    ]


def _phase(phase: Phase | None, schedule: Schedule | None, state: State) -> dict[str, Any]:
    index = sum(first <= state.applied_steps for first in state.first_steps) - 1
    if phase is None or schedule is None:
        return {"phase": max(0, index), "phases": len(state.first_steps)}
    return {
        "phase": phase.index,
        "phases": len(schedule.phases),
        "kind": phase.kind,
        "round": phase.round,
        "dense": sorted(phase.dense),
        "total_steps": schedule.total_steps,
    }
