"""Partitions: which entries are dense together. Written out in the config, or a model's blocks in even groups.

With more partitions than blocks, blocks of experts are cut: into the experts, and the rest.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence

from gap_ds.method.config import GaPConfig
from gap_ds.method.matrices import Experts
from gap_ds.method.names import by_parameter, inside, matching, no_match, rows_of, with_rows

#: A pattern of names with rows: those of a slice of the experts that it matches.
_OF_EXPERTS = re.compile(r"(.+)\[(\d*):(\d*)\]", re.DOTALL)

Mixtures = Mapping[str, Experts | None]


def assign(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Sequence[str],
    experts: Mixtures,
    config: GaPConfig,
) -> dict[str, int]:
    """Partition of each entry, in the order of the names.

    A tensor that holds all experts of a block becomes several entries where its experts are in several partitions: one
    for each run of rows that are together (`names.with_rows`). That is so if there are more partitions than blocks, and
    where patterns say so.

    Args:
        names: of the parameters that are entries or are cut into entries, in module order.
        experts: the experts that each of them belongs to, if any.
    """
    if not isinstance(config.partitions, int):
        return _assign_written(names, shapes, experts, config.partitions)
    kappa = config.partitions
    units = _by_block(names, blocks)
    counted = "1 block" if len(units) == 1 else f"{len(units)} blocks"
    if kappa > len(units) and any(experts.values()):
        units = [group for unit in units for group in _by_expert(unit, shapes, experts)]
        counted += f" of {len(units)} parts"
    if kappa > len(units):
        lower = f'Lower "partitions" to {len(units)} or less.'
        raise ValueError(
            f"partitions={kappa}: the model has {counted} with entries, and a partition needs at least one. "
            + (lower if len(units) > 1 else 'Write "partitions" as lists of name patterns.')
        )
    if config.partition_assignment == "random":
        random.Random(f"assign {config.seed}").shuffle(units)
    sizes = _sizes(units, shapes)
    if max(sizes) * kappa > 2 * sum(sizes):  # a partition would be over twice the mean
        units = [part for unit, n in zip(units, sizes, strict=True) for part in _finer(unit, n * kappa > sum(sizes))]
        sizes = _sizes(units, shapes)
    groups = (
        [u % kappa for u in range(len(units))]
        if config.partition_assignment == "interleaved"
        else balanced_cut(sizes, kappa)
    )
    return _joined(names, shapes, {name: k for unit, k in zip(units, groups, strict=True) for name in unit})


def _sizes(units: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    return [sum(math.prod(shape_of(name, shapes)) for name in unit) for unit in units]


def _finer(unit: Sequence[str], large: bool) -> list[list[str]]:
    """The numbered members of a large block, if it is a stage: each has several matrices, else they are one block.

    What lies outside of the members goes with the one before.

    >>> _finer(["s.3.down.weight", "s.3.blocks.0.a", "s.3.blocks.0.b", "s.3.blocks.1.a"], True)
    [['s.3.down.weight', 's.3.blocks.0.a', 's.3.blocks.0.b'], ['s.3.blocks.1.a']]
    >>> _finer(["s.3.conv.0.weight", "s.3.conv.1.weight"], True)
    [['s.3.conv.0.weight', 's.3.conv.1.weight']]
    """
    if not large:
        return [list(unit)]
    paths = zip(*(name.split(".") for name in unit), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, paths))
    parts: list[list[str]] = [[]]
    current = None
    for name in unit:
        path = name.split(".")
        end = next((i for i in range(shared, len(path)) if path[i][-1:].isdigit()), None)
        member = None if end is None else path[: end + 1]
        if current is not None and member is not None and member != current:
            parts.append([])
        current = member or current
        parts[-1].append(name)
    return parts if len(unit) >= 2 * len(parts) else [list(unit)]


def shape_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an entry, from the shapes of the parameters."""
    parameter, rows = rows_of(name)
    return shapes[parameter] if rows is None else (rows[1] - rows[0], *shapes[parameter][1:])


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


def _by_expert(unit: Sequence[str], shapes: Mapping[str, tuple[int, ...]], experts: Mixtures) -> list[list[str]]:
    """The parts of a block of experts: the rest of it, and each expert, whose rows of a tensor of all are its own."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name in unit:
        mixture = experts[name]
        if mixture is None:
            parts.setdefault(("", ""), []).append(name)
            continue
        for expert, part in _experts(name, shapes, mixture).items():
            parts.setdefault((mixture.module, expert), []).append(part)
    return list(parts.values())


def _experts(name: str, shapes: Mapping[str, tuple[int, ...]], mixture: Experts) -> dict[str, str]:
    """The part of a parameter that each of its experts has, by the expert's name: the whole, or a run of rows."""
    if mixture.expert:
        return {mixture.expert: name}
    height = shapes[name][0] // mixture.number
    return {str(e): with_rows(name, e * height, (e + 1) * height) for e in range(mixture.number)}


def _joined(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], partition: Mapping[str, int]
) -> dict[str, int]:
    """Joins the rows of a parameter that follow each other in one partition; all of its rows are the parameter."""
    parts = by_parameter(partition)
    found: dict[str, int] = {}
    for name in names:
        ordered = sorted(parts[name], key=lambda part: rows_of(part)[1] or (0, 0))
        for k, group in itertools.groupby(ordered, partition.__getitem__):
            run = [rows_of(part)[1] or (0, shapes[name][0]) for part in group]
            lo, hi = run[0][0], run[-1][1]
            found[name if hi - lo == shapes[name][0] else with_rows(name, lo, hi)] = k
    return found


def _assign_written(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    experts: Mixtures,
    partitions: Sequence[Sequence[str]],
) -> dict[str, int]:
    partition: dict[str, int] = {}
    by_row = any(_OF_EXPERTS.fullmatch(pattern) for group in partitions for pattern in group)

    def parts(name: str) -> list[str]:
        mixture = experts[name] if by_row else None
        return [name] if mixture is None else list(_experts(name, shapes, mixture).values())

    for k, patterns in enumerate(partitions):
        for pattern in patterns:
            if (found := _of_experts(f"partitions[{k}]", pattern, names, shapes, experts)) is None:
                found = [part for name in matching(pattern, names) for part in parts(name)]
            if not found:
                raise ValueError(no_match(f"partitions[{k}]", pattern, names))
            for name in found:
                if partition.setdefault(name, k) != k:
                    raise ValueError(
                        f'partitions: {name} matches partitions {partition[name]} and {k} (by "{pattern}"). '
                        "Each entry must belong to exactly one."
                    )
    if left := [part for name in names for part in parts(name) if part not in partition]:
        raise ValueError(
            f"partitions: {len(left)} entries belong to none, for example {left[0]}. Add a pattern for them, or list "
            'them in "exclude" to keep them dense.'
        )
    return _joined(names, shapes, partition)


def without_experts(pattern: str) -> str:
    r"""A pattern of names without the slice of experts at its end.

    >>> without_experts(r"mlp\.experts[0:4]"), without_experts(r"layers\.[01]")
    ('mlp\\.experts', 'layers\\.[01]')
    """
    return match[1] if (match := _OF_EXPERTS.fullmatch(pattern)) else pattern


def _of_experts(
    setting: str, pattern: str, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], experts: Mixtures
) -> list[str] | None:
    """The parts of the experts that a pattern with a slice names. None: it has no slice."""
    if (match := _OF_EXPERTS.fullmatch(pattern)) is None:
        return None
    found: list[str] = []
    for name in matching(match[1], names):
        if (mixture := experts[name]) is None:
            continue
        lo, hi = int(match[2] or 0), int(match[3] or mixture.number)
        if not lo < hi <= mixture.number:
            raise ValueError(f'{setting}: "{pattern}" is no slice of the {mixture.number} experts of {mixture.module}.')
        beside = (other for other in names if (of := experts[other]) and of.module == mixture.module)
        own = [_experts(other, shapes, experts[other] or mixture) for other in beside]
        chosen = list(dict.fromkeys(expert for parts in own for expert in parts))[lo:hi]
        found += [part for expert, part in _experts(name, shapes, mixture).items() if expert in chosen]
    return found


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
