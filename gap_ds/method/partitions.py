"""Partitions: which entries are dense together. Written out in the config, or a model's blocks in even groups."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from gap_ds.method.config import GaPConfig
from gap_ds.method.matrices import Experts
from gap_ds.method.names import inside, matching, no_match


def assign(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Sequence[str],
    experts: Mapping[str, Experts | None],
    config: GaPConfig,
) -> dict[str, int]:
    """Partition of each entry."""
    if not isinstance(config.partitions, int):
        return _assign_written(names, config.partitions)
    kappa = config.partitions
    units = _by_block(names, blocks)
    counted = "1 block" if len(units) == 1 else f"{len(units)} blocks"
    if kappa > len(units) and any(experts.values()):
        units = [group for unit in units for group in _by_expert(unit, experts)]
        counted += f" of {len(units)} parts"
    if kappa > len(units):
        lower = f'Lower "partitions" to {len(units)} or less.'
        raise ValueError(
            f"partitions={kappa}: the model has {counted} with entries, and a partition needs at least one. "
            + (lower if len(units) > 1 else 'Write "partitions" as lists of name patterns.')
        )
    if config.partition_assignment == "random":
        random.Random(f"assign {config.seed}").shuffle(units)
    sizes = [sum(math.prod(shapes[name]) for name in unit) for unit in units]
    groups = (
        [u % kappa for u in range(len(units))]
        if config.partition_assignment == "interleaved"
        else balanced_cut(sizes, kappa)
    )
    return {name: k for unit, k in zip(units, groups, strict=True) for name in unit}


def _by_block(names: Sequence[str], blocks: Sequence[str]) -> list[list[str]]:
    """The entries of each block; one outside all blocks goes with the block before it (a ResNet's stem with the first).

    Without blocks every entry is by itself.
    """
    units: list[list[str]] = [[]]
    current = None
    for name in names:
        block = next((b for b in blocks if inside(name, b)), None if blocks else name)
        if block is not None and current is not None and block != current:
            units.append([])
        current = block or current
        units[-1].append(name)
    return units


def _by_expert(unit: Sequence[str], experts: Mapping[str, Experts | None]) -> list[list[str]]:
    """The parts of a block of experts: the rest of it, and each expert; a tensor that holds all experts is one part."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name in unit:
        mixture = experts[name]
        part = ("", "") if mixture is None else (mixture.module, mixture.expert or name)
        parts.setdefault(part, []).append(name)
    return list(parts.values())


def _assign_written(names: Sequence[str], partitions: Sequence[Sequence[str]]) -> dict[str, int]:
    partition: dict[str, int] = {}
    for k, patterns in enumerate(partitions):
        for pattern in patterns:
            if not (found := matching(pattern, names)):
                raise ValueError(no_match(f"partitions[{k}]", pattern, names))
            for name in found:
                if partition.setdefault(name, k) != k:
                    raise ValueError(
                        f'partitions: {name} matches partitions {partition[name]} and {k} (by "{pattern}"). '
                        "Each entry must belong to exactly one."
                    )
    if left := [name for name in names if name not in partition]:
        raise ValueError(
            f"partitions: {len(left)} entries belong to none, for example {left[0]}. Add a pattern for them, or list "
            'them in "exclude" to keep them dense.'
        )
    return partition


def balanced_cut(sizes: Sequence[int], parts: int) -> list[int]:
    """Cuts a row of sizes into contiguous non-empty parts with the least sum of squared totals; part of each item.

    >>> balanced_cut([1, 1, 1, 3], 2), balanced_cut([5, 1, 1], 3)
    ([0, 0, 0, 1], [0, 1, 2])
    """
    assert 1 <= parts <= len(sizes)
    ends = [0, *itertools.accumulate(sizes)]
    # best[i] = (cost, first item of the last part) for the first i items; of equal costs the earliest cut wins.
    best: list[tuple[float, int]] = [(0, 0)] + [(math.inf, 0)] * len(sizes)
    cuts: list[list[int]] = []
    for part in range(1, parts + 1):
        best = _with_one_more(best, ends, part)
        cuts.append([first for _, first in best])
    group, end = [0] * len(sizes), len(sizes)
    for part in range(parts - 1, -1, -1):
        first = cuts[part][end]
        group[first:end] = [part] * (end - first)
        end = first
    return group


def _with_one_more(best: Sequence[tuple[float, int]], ends: Sequence[int], part: int) -> list[tuple[float, int]]:
    """The best cuts into `part` parts, given those into one less.

    The more items, the later the last cut (squares are convex): so the cut of the middle bounds those of both halves,
    and hundreds of experts cost n log n instead of n * n.
    """
    found = [(math.inf, 0)] * len(ends)
    todo = [(part, len(ends) - 1, part - 1, len(ends) - 2)]
    while todo:
        lo, hi, earliest, latest = todo.pop()
        if lo > hi:
            continue
        i = (lo + hi) // 2
        found[i] = min((best[j][0] + (ends[i] - ends[j]) ** 2, j) for j in range(earliest, min(i - 1, latest) + 1))
        todo += [(lo, i - 1, earliest, found[i][1]), (i + 1, hi, found[i][1], latest)]
    return found
