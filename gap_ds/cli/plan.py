"""The figures of a run before it begins, as plain data: the output of `gap-ds plan --json`, and of its tables.

E entries, K partitions, R ranks. Everything follows from the plan, the schedule and the rule; no weights are needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

from gap_ds._version import __version__
from gap_ds.masks import bitmask, selection
from gap_ds.method import rules
from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import Block, NofM, Pattern, Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.plan import build as build_plan
from gap_ds.method.schedule import Phase, Schedule
from gap_ds.method.schedule import build as build_schedule

COUNTED = (
    "products with weights, each weight alike, forward and backward; not the positions of convolutions, the share of "
    "tokens of experts, attention scores, norms and the optimizer"
)


def forecast(
    model: nn.Module,
    config: GaPConfig,
    *,
    steps_per_epoch: int | None = None,
    world_size: int | None = None,
    with_entries: bool = False,
) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        steps_per_epoch: applied optimizer steps in an epoch. Without it, times of a config in epochs stay in epochs.
        world_size: ranks among which the weights are sharded; adds the bytes that each one stores and sends.
        with_entries: adds a row for every entry.
    Returns:
        A dict for JSON. Weights and kept are counts, share and density are ratios, sizes are in bytes.
    Raises:
        ValueError: the config does not fit the model, or an argument would have no effect.
    """
    if steps_per_epoch is not None and not config.in_epochs:
        raise ValueError(
            f"--steps-per-epoch {steps_per_epoch}: has no effect, because the config counts in steps. Remove it."
        )
    plan = build_plan(model, config)
    # One tick is one step, or a fraction of an epoch of which every phase is a whole multiple.
    ticks = (steps_per_epoch or _ticks_per_epoch(config)) if config.in_epochs else 1
    schedule = build_schedule(config, ticks)
    unit, per_unit = ("epoch", ticks) if config.in_epochs and steps_per_epoch is None else ("step", 1)
    mean_density = schedule.mean_density(*plan.per_partition())
    changes = _changes(plan, config, schedule, world_size or 1)
    result: dict[str, Any] = {
        "signature": config.signature(__version__),
        "model": {"class": type(model).__name__, "weights": plan.total},
        "weights": plan.numel,
        "kept": plan.keep,
        "entry_sparsity": (plan.numel - plan.keep) / plan.numel,
        "model_sparsity": (plan.numel - plan.keep) / plan.total,
        "mean_density": mean_density,
        "training_flops": plan.training_flops(mean_density),
        "training_flops_counted": COUNTED,
        "optimizer_state": _optimizer_state(plan, schedule, _trained(model)),
        **({} if config.regrow == "zero" else {"last_values": _last_values(plan, config, schedule)}),
        **({"longest_steps": _longest_steps(plan, config)} if config.lr_density_power else {}),
        "partitions": _partitions(plan),
        "unit": unit,
        "length": _number(Fraction(schedule.total_steps, per_unit)),
        "steps_per_epoch": steps_per_epoch,
        "phases": _phases(plan, schedule, changes, unit, per_unit),
    }
    if config.record.has_workers:
        result["workers"] = _workers(plan, config, ticks)
    if world_size is not None:
        result["ranks"] = _ranks(plan, schedule, changes, world_size)
    if with_entries:
        result["entries"] = [_entry(entry) for entry in plan.entries]
    return result


#: Of both moments of AdamW in fp32.
_ADAMW_BYTES = 8


def _trained(model: nn.Module) -> int:
    """Return the number of weights that an optimizer has, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _optimizer_state(plan: Plan, schedule: Schedule, trained: int) -> dict[str, int]:
    """Return the bytes of AdamW's moments in fp32, over all ranks: whole, and held for kept weights alone.

    The latter at its most, on average over the run, and in the last phase. It is at its most when a phase begins:
    pruning inside the phase frees what its first steps have made.
    """
    first = max(phase.density(phase.first_step, *plan.per_partition()) for phase in schedule.phases)
    last = schedule.density(*plan.per_partition())[-1]

    def held(of_entries: float) -> int:
        return round(_ADAMW_BYTES * (trained - plan.numel + of_entries * plan.numel))

    return {
        "whole": _ADAMW_BYTES * trained,
        "most": held(first),
        "mean": held(schedule.mean_density(*plan.per_partition())),
        "last": held(last),
    }


def _last_values(plan: Plan, config: GaPConfig, schedule: Schedule) -> dict[str, int]:
    """Return the bytes of the values that pruned weights had, over all ranks: at their most, on average, and last.

    "exact" values have 4 bytes each, those of fp32 weights. Densities are averages over a phase.
    """
    density = schedule.density(*plan.per_partition())
    each = {"exact": 4, "bf16_cpu": 2}[config.regrow_storage] * plan.numel
    means = {"most": min(density), "mean": schedule.mean_density(*plan.per_partition()), "last": density[-1]}
    return {key: round(each * (1 - held)) for key, held in means.items()}


def _longest_steps(plan: Plan, config: GaPConfig) -> float:
    """Return by how much the steps of the sparsest entry are multiplied in the end (`lr_density_power`)."""
    sparsest = max(entry.numel / entry.keep for entry in plan.entries if entry.keep)
    return float(sparsest**config.lr_density_power)


def _of_partitions(plan: Plan, phase: Phase) -> dict[str, Any]:
    """Density of each partition at the beginning of a phase in which some are neither dense nor at their target."""
    if phase.rise is None and phase.growth == 1:
        return {}
    keep, numel = plan.per_partition()

    def alone(values: list[int], k: int) -> list[int]:
        return [n if i == k else 0 for i, n in enumerate(values)]

    first = phase.first_step
    return {"first_density": [phase.density(first, alone(keep, k), alone(numel, k)) for k in range(plan.kappa)]}


def _entry(entry: Entry) -> dict[str, Any]:
    """Return the row of an entry; of an expert's, with the module that holds the experts and their number in it."""
    row = {
        "name": entry.name,
        "shape": list(entry.shape),
        "partition": entry.partition,
        "weights": entry.numel,
        "kept": entry.keep,
    }
    return row if entry.experts is None else row | {"experts": entry.experts._asdict()}


def _phases(
    plan: Plan, schedule: Schedule, changes: Sequence[Changes], unit: str, per_unit: int
) -> list[dict[str, Any]]:
    """Return a row for each phase; `per_unit` is the number of schedule steps in a unit."""
    return [
        {
            "phase": phase.index,
            "round": phase.round,
            "kind": phase.kind,
            f"first_{unit}": _number(Fraction(phase.first_step, per_unit)),
            f"{unit}s": _number(Fraction(phase.steps, per_unit)),
            "dense": sorted(phase.dense),
            "density": density,
            "pruned_entries": of_phase.selected,
            "updates": len(phase.updates),
            **_of_partitions(plan, phase),
        }
        for phase, density, of_phase in zip(
            schedule.phases, schedule.density(*plan.per_partition()), changes, strict=True
        )
    ]


#: Lengths are rounded to this part of an epoch.
_MOST_TICKS = 10**6


def _ticks_per_epoch(config: GaPConfig) -> int:
    """Return the least number of equal parts of an epoch that makes every length a whole number of them."""
    dense, phase, finetune, update, part = (
        Fraction(repr(length or 0.0))
        for length in (
            *(config.dense_epochs, config.phase_epochs, config.finetune_epochs, config.update_epochs),
            config.prune_ramp,
        )
    )
    ticks = math.lcm(*(x.denominator for x in (dense, phase, finetune, update, part * phase, part * dense)))
    if config.regrow_warmup_epochs:  # which is refused below two ticks, for what it is with so many steps in an epoch
        ticks *= math.ceil(2 / (ticks * Fraction(repr(config.regrow_warmup_epochs))))
    return ticks if ticks <= _MOST_TICKS else _MOST_TICKS


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


#: Updates for which weights are compared.
_SELECTED = rules.PruneByMagnitude | rules.PruneRandomly | rules.DropAndGrow


class Changes(NamedTuple):
    """The changes of masks of a phase: entries selected before its first step, and what a rank sends then; and the most
    that it sends for an update inside the phase."""

    selected: int
    boundary_bytes: int
    update_bytes: int


def _changes(plan: Plan, config: GaPConfig, schedule: Schedule, ranks: int) -> list[Changes]:
    rule, before = rules.rule(config), (None, *schedule.phases)

    def at(a: Phase | None, b: Phase, step: int) -> tuple[int, int]:
        """(entries selected, bytes sent)."""
        updates = ((entry, rule(entry, a, b, step)) for entry in plan.entries)
        chosen = [(entry, update) for entry, update in updates if isinstance(update, _SELECTED)]
        return len(chosen), _sent(plan.pattern, chosen, ranks, inside=a is b)

    found = []
    for old, new in zip(before, schedule.phases, strict=False):
        boundary = [at(a, b, b.first_step) for a, b in rules.stages(config, old, new)]
        # The first update replaces the most weights, and the last one prunes all that leave the phase.
        updates = [at(new, new, step) for step in {*new.updates[:1], *new.updates[-1:]}]
        number, sent = (sum(column) for column in zip(*boundary, strict=True))
        found.append(Changes(number, sent, max((n for _, n in updates), default=0)))
    return found


# -- partitions --------------------------------------------------------------------------------------------------------


def _partitions(plan: Plan) -> list[dict[str, Any]]:
    block_of = {entry.name: _block(plan, entry.name) for entry in plan.entries}
    partitions_of: dict[str, set[int]] = {}
    for entry in plan.entries:
        partitions_of.setdefault(block_of[entry.name], set()).add(entry.partition)
    keep, numel = plan.per_partition()
    rows = []
    for k in range(plan.kappa):
        blocks = dict.fromkeys(block_of[e.name] for e in plan.entries if e.partition == k)
        rows.append(
            {
                "partition": k,
                "blocks": list(blocks),
                "split_blocks": [block for block in blocks if len(partitions_of[block]) > 1],
                "entries": sum(e.partition == k for e in plan.entries),
                "weights": numel[k],
                "kept": keep[k],
                "share": numel[k] / plan.numel,
            }
        )
    return rows


def _block(plan: Plan, name: str) -> str:
    """Return the block of an entry; of an entry outside every block, its module."""
    module = name.rpartition(".")[0]
    prefixes = itertools.accumulate(module.split("."), "{}.{}".format)
    return next((prefix for prefix in prefixes if prefix in plan.blocks), module)


def _workers(plan: Plan, config: GaPConfig, ticks: int) -> dict[str, Any]:
    """Cost of all workers of parallel GaP; the other figures of the run are those of worker 0."""
    keep, numel = plan.per_partition()
    runs = [build_schedule(config, ticks, worker) for worker in range(config.kappa)]
    flops = [plan.training_flops(run.mean_density(keep, numel)) * run.total_steps for run in runs]
    return {
        "workers": config.kappa,
        "training_flops": sum(flops) / runs[0].total_steps,
        "exchanges": config.rounds,
        "exchange_bytes": [
            sum(bitmask.nbytes(e.numel) + 4 * e.keep for e in plan.entries if e.partition == k)
            for k in range(config.kappa)
        ],
    }


# -- ranks -------------------------------------------------------------------------------------------------------------


def _ranks(plan: Plan, schedule: Schedule, changes: Sequence[Changes], ranks: int) -> dict[str, Any]:
    """Return the bytes that each of R ranks stores and sends for the method."""

    def most(mask_bytes: dict[Entry, int]) -> int:
        """Return the sum over the sparse entries in the phase with the largest sum."""
        by_partition = [0] * plan.kappa
        for entry, size in mask_bytes.items():
            by_partition[entry.partition] += size
        return max(
            sum(size for k, size in enumerate(by_partition) if phase.is_masked(k, phase.end_step - 1))
            for phase in schedule.phases
        )

    whole = most({entry: bitmask.nbytes(entry.numel) for entry in plan.entries})
    even = most({entry: bitmask.nbytes(-(-entry.numel // ranks)) for entry in plan.entries})
    # A rank that owns a stretch of one flat buffer may own nothing but entries, each with a partly used last byte.
    flat = min(whole, bitmask.nbytes(-(-plan.total // ranks)) + len(plan.entries))
    counts, of_updates = isinstance(plan.pattern, Unstructured), any(phase.updates for phase in schedule.phases)
    return {
        "world_size": ranks,
        "mask_bytes": even,
        "mask_bytes_flat_buffer": flat,
        "mask_bytes_unsharded": whole,
        "sent": "counts" if counts else "counts, and scores of groups that are cut",
        "start_bytes": changes[0].boundary_bytes,
        "boundary_bytes": max((row.boundary_bytes for row in changes[1:]), default=0),
        **({"update_bytes": max(row.update_bytes for row in changes)} if of_updates else {}),
    }


def _sent(pattern: Pattern, updates: Sequence[tuple[Entry, rules.Update]], ranks: int, inside: bool) -> int:
    """Return the most bytes that a rank contributes when masks are selected: `training.selector` has the selections.

    inside: for any update of the phase that selects these, not only for these numbers.
    """
    if ranks == 1:
        return 0
    kinds: dict[type[rules.Update], list[Entry]] = {}
    for entry, update in updates:
        kinds.setdefault(type(update), []).append(entry)
    # Entries that drop and grow are selected twice: what stays, and what is grown.
    selections = [*kinds.values(), kinds.get(rules.DropAndGrow, [])]
    sent = sum(_sent_by_selection(pattern, entries, ranks) for entries in selections)
    if isinstance(pattern, NofM):
        # Where groups do not drop equally many, those that drop one more are found by two selections more.
        moved = [(e, u.drop) for e, u in updates if isinstance(u, rules.DropAndGrow)]
        some = [e for e, drop in moved if inside or drop % (e.numel // pattern.m)]
        sent += _sent_by_selection(pattern, some, ranks) + selection_bytes(len(some))
    return sent


def _sent_by_selection(pattern: Pattern, entries: Sequence[Entry], ranks: int) -> int:
    """Return the most bytes that a rank contributes to one selection of masks of some entries."""
    if isinstance(pattern, Unstructured):
        return selection_bytes(len(entries))
    # Every rank's first group may be cut by the end of another rank's piece.
    cut = sum(8 * min((ranks - 1) * pattern.band(e.shape, e.dims), e.numel) for e in entries)
    return 8 * len(entries) + cut + (selection_bytes(len(entries), bits=63) if isinstance(pattern, Block) else 0)


def selection_bytes(budgets: int, bits: int = 31) -> int:
    """Return the bytes that a rank contributes to the all-reduces of one selection with so many budgets.

    Keys have 31 bits, or 63 where blocks are selected.

    They are histograms (budgets × bins) of int64, one for each pass; the first pass has further rows that count the
    invalid keys of each entry. Weights that tie at a threshold take further passes, which are not counted.

    >>> selection_bytes(1) == 8 * (2 * 2048 + 1024 + 1024)
    True
    """
    if budgets == 0:
        return 0
    passes = [bins for _, bins in selection.PASSES[bits]]
    return 8 * sum(budgets * bins for bins in passes) + 8 * passes[0] * -(-budgets // passes[0])
