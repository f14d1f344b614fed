"""Every figure of a run before it begins, as plain data: what `gap-ds plan --json` prints and the tables show.

E entries, K partitions, R ranks. Nothing here needs a weight: the plan, the schedule and the method's rule say it all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import nn

from gap_ds._version import __version__
from gap_ds.masks import bitmask, selection
from gap_ds.method import plan, rules, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Schedule

COUNTED = "products with weights, forward and backward alike; not attention scores, norms and the optimizer"


def forecast(
    model: nn.Module,
    config: GaPConfig,
    *,
    steps_per_epoch: int | None = None,
    world_size: int | None = None,
    with_entries: bool = False,
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        steps_per_epoch: applied optimizer steps in an epoch. Without it, times of a config in epochs are in epochs.
        world_size: ranks among which the weights are sharded; adds what each of them holds and sends.
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
    the_plan = plan.build(model, config)
    # One tick is one step, or a fraction of an epoch of which every phase is a whole multiple.
    ticks = steps_per_epoch or (_ticks_per_epoch(config) if config.in_epochs else 1)
    the_schedule = schedule.build(config, ticks if config.in_epochs else None)
    unit, per_unit = ("epoch", ticks) if config.in_epochs and steps_per_epoch is None else ("step", 1)
    keep, numel = the_plan.per_partition()
    mean_density = the_schedule.mean_density(keep, numel)
    selected = _selected(the_plan, config, the_schedule)
    result: dict[str, Any] = {
        "signature": config.signature(__version__),
        "model": {"class": type(model).__name__, "weights": the_plan.total},
        "weights": the_plan.numel,
        "kept": the_plan.keep,
        "entry_sparsity": (the_plan.numel - the_plan.keep) / the_plan.numel,
        "model_sparsity": (the_plan.numel - the_plan.keep) / the_plan.total,
        "mean_density": mean_density,
        "training_flops": the_plan.training_flops(mean_density),
        "training_flops_counted": COUNTED,
        "partitions": _partitions(the_plan),
        "unit": unit,
        "length": _number(Fraction(the_schedule.total_steps, per_unit)),
        "steps_per_epoch": steps_per_epoch,
        "phases": [
            {
                "phase": phase.index,
                "round": phase.round,
                "kind": phase.kind,
                f"first_{unit}": _number(Fraction(phase.first_step, per_unit)),
                f"{unit}s": _number(Fraction(phase.steps, per_unit)),
                "dense": sorted(phase.dense),
                "density": density,
                "pruned_entries": len(pruned),
                "updates": len(phase.updates),
            }
            for phase, density, pruned in zip(
                the_schedule.phases, the_schedule.density(keep, numel), selected, strict=True
            )
        ],
    }
    if config.method == "parallel":
        result["workers"] = _workers(the_plan, config, ticks if config.in_epochs else None)
    if world_size is not None:
        result["ranks"] = _ranks(the_plan, the_schedule, selected, world_size)
    if with_entries:
        result["entries"] = [
            {"name": e.name, "shape": list(e.shape), "partition": e.partition, "weights": e.numel, "kept": e.keep}
            for e in the_plan.entries
        ]
    return result


#: Finer parts of an epoch than these are rounded: nobody reads them.
_MOST_TICKS = 10**6


def _ticks_per_epoch(config: GaPConfig) -> int:
    """The least number of equal parts of an epoch that makes every length a whole number of them."""
    dense, phase, finetune, update, part = (
        Fraction(repr(length or 0.0))
        for length in (
            *(config.dense_epochs, config.phase_epochs, config.finetune_epochs, config.update_epochs),
            config.prune_ramp,
        )
    )
    ticks = math.lcm(*(x.denominator for x in (dense, phase, finetune, update, part * phase, part * dense)))
    return ticks if ticks <= _MOST_TICKS else _MOST_TICKS


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def _selected(the_plan: Plan, config: GaPConfig, the_schedule: Schedule) -> list[list[Entry]]:
    """The entries that are selected (pruned to a budget of their own) before each phase."""
    rule, before = rules.rule(config), (None, *the_schedule.phases)
    return [
        [
            entry
            for a, b in rules.stages(config, old, new)
            for entry in the_plan.entries
            if isinstance(rule(entry, a, b, b.first_step), rules.PruneByMagnitude | rules.PruneRandomly)
        ]
        for old, new in zip(before, the_schedule.phases, strict=False)
    ]


# -- partitions --------------------------------------------------------------------------------------------------------


def _partitions(the_plan: Plan) -> list[dict[str, Any]]:
    block_of = _blocks(the_plan)
    partitions_of: dict[str, set[int]] = {}
    for entry in the_plan.entries:
        partitions_of.setdefault(block_of[entry.name], set()).add(entry.partition)
    keep, numel = the_plan.per_partition()
    rows = []
    for k in range(the_plan.kappa):
        blocks = dict.fromkeys(block_of[e.name] for e in the_plan.entries if e.partition == k)
        rows.append(
            {
                "partition": k,
                "blocks": list(blocks),
                "split_blocks": [block for block in blocks if len(partitions_of[block]) > 1],
                "entries": sum(e.partition == k for e in the_plan.entries),
                "weights": numel[k],
                "kept": keep[k],
                "share": numel[k] / the_plan.numel,
            }
        )
    return rows


def _blocks(the_plan: Plan) -> dict[str, str]:
    """The block of each entry; of an entry outside every block, its module."""
    blocks = set(the_plan.blocks)

    def block(name: str) -> str:
        module = name.rpartition(".")[0]
        prefixes = itertools.accumulate(module.split("."), "{}.{}".format)
        return next((prefix for prefix in prefixes if prefix in blocks), module)

    return {entry.name: block(entry.name) for entry in the_plan.entries}


def abbreviate(blocks: Sequence[str]) -> list[str]:
    """Block names with runs of numbers drawn together, for people.

    >>> abbreviate(["h.0", "h.1", "h.2", "h.5", "decoder.0", "fc"])
    ['h.0-2,5', 'decoder.0', 'fc']
    """
    stacks: dict[str, list[int]] = {}
    for block in blocks:
        match = re.fullmatch(r"(.*?)\.?(\d+)", block)
        stacks.setdefault(match[1] if match else block, []).extend([int(match[2])] if match else [])
    return [f"{stack}.{_runs(numbers)}".lstrip(".") if numbers else stack for stack, numbers in stacks.items()]


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _workers(the_plan: Plan, config: GaPConfig, ticks: int | None) -> dict[str, Any]:
    """What the workers of parallel GaP cost together: worker 0's figures are those of the run."""
    keep, numel = the_plan.per_partition()
    runs = [schedule.build(config, ticks, worker) for worker in range(config.kappa)]
    flops = [the_plan.training_flops(run.mean_density(keep, numel)) * run.total_steps for run in runs]
    return {
        "workers": config.kappa,
        "training_flops": sum(flops) / runs[0].total_steps,
        "exchanges": config.rounds,
        "exchange_bytes": [
            sum(bitmask.nbytes(e.numel) + 4 * e.keep for e in the_plan.entries if e.partition == k)
            for k in range(config.kappa)
        ],
    }


# -- ranks -------------------------------------------------------------------------------------------------------------


def _ranks(the_plan: Plan, the_schedule: Schedule, selected: Sequence[Sequence[Entry]], ranks: int) -> dict[str, Any]:
    """What each of R ranks holds and sends for the method."""

    def most(mask_bytes: dict[Entry, int]) -> int:
        """The sum over the sparse entries, in the phase where it is largest."""
        by_partition = [0] * the_plan.kappa
        for entry, size in mask_bytes.items():
            by_partition[entry.partition] += size
        return max(
            sum(size for k, size in enumerate(by_partition) if phase.is_masked(k, phase.end_step - 1))
            for phase in the_schedule.phases
        )

    whole = most({entry: bitmask.nbytes(entry.numel) for entry in the_plan.entries})
    even = most({entry: bitmask.nbytes(-(-entry.numel // ranks)) for entry in the_plan.entries})
    # A rank that owns a stretch of one flat buffer may own nothing but entries, each with a last byte of its own.
    flat = min(whole, bitmask.nbytes(-(-the_plan.total // ranks)) + len(the_plan.entries))
    counts = isinstance(the_plan.pattern, Unstructured)
    sent = [selection_bytes(len(row)) if counts else 4 * sum(e.numel for e in row) for row in selected]
    sent = sent if ranks > 1 else [0] * len(sent)
    return {
        "world_size": ranks,
        "mask_bytes": even,
        "mask_bytes_flat_buffer": flat,
        "mask_bytes_unsharded": whole,
        "sent": "counts" if counts else "scores, an entry at a time",
        "start_bytes": sent[0],
        "boundary_bytes": max(sent[1:], default=0),
    }


def selection_bytes(budgets: int) -> int:
    """Bytes that a rank hands to the all-reduces of one selection with a budget for each of so many entries.

    They are histograms (budgets × bins) of int64, one for each pass; the first pass has further rows that count the
    invalid keys of each entry.

    >>> selection_bytes(1) == 8 * (2 * 2048 + 1024 + 1024)
    True
    """
    if budgets == 0:
        return 0
    passes = [bins for _, bins in selection._PASSES]
    return 8 * sum(budgets * bins for bins in passes) + 8 * passes[0] * -(-budgets // passes[0])
