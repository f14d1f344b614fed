"""Distributions: how one target sparsity becomes an integer budget `keep` for every entry.

A distribution is a function (shapes of E entries, sparsity, numbers) -> E budgets. `numbers` are how many matrices of
its shape an entry holds, such as experts in one tensor; none: one each. The first line of its docstring is its
documentation. Ratios end here: everything after this module handles integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

Distribution = Callable[[Sequence[Sequence[int]], float, Sequence[int]], list[int]]


def round_half_up(amount: Fraction) -> int:
    """Return the nearest whole number, the upper of two, at least 1. Every budget is rounded by this function.

    >>> round_half_up(Fraction(5, 2)), round_half_up(Fraction(1, 9))
    (3, 1)
    """
    return max(1, math.floor(amount + Fraction(1, 2)))


def keep_count(numel: int, sparsity: float) -> int:
    """Return the weights kept out of `numel` at `sparsity`, rounded half up, at least 1.

    The sparsity is taken as its decimal representation, so that 0.9 of 1000 leaves exactly 100.

    >>> keep_count(1000, 0.9), keep_count(10, 0.75), keep_count(7, 0.0), keep_count(5, 0.99)
    (100, 3, 7, 1)
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f'sparsity={sparsity}: must lie in [0, 1). Set "sparsity".')
    return round_half_up((1 - Fraction(repr(sparsity))) * numel)


def uniform(shapes: Sequence[Sequence[int]], sparsity: float, numbers: Sequence[int] = ()) -> list[int]:
    """Every entry gets the same sparsity.

    >>> uniform([(10, 10), (4, 5)], 0.8)
    [20, 4]
    """
    return [keep_count(size, sparsity) for size in _sizes(shapes, numbers)]


def erk(shapes: Sequence[Sequence[int]], sparsity: float, numbers: Sequence[int] = ()) -> list[int]:
    """Erdos-Renyi-Kernel: density proportional to sum(shape) / prod(shape), saturated at 1; the total is exact.

    Entries whose density would exceed 1 stay dense, and the rest share what is left of the budget. The sum of the
    budgets equals `keep_count` of all weights together; the remainders go to the largest fractions, ties to the first.
    Each entry keeps at least 1, at the expense of the largest (or of the total, if that is less than E). The number of
    experts in a tensor is no dimension of their matrices: it has the density that each has as an entry of its own.

    Source: Evci et al., "Rigging the Lottery", arXiv 1911.11134, section 3.

    >>> erk([(10, 10), (100, 100)], 0.8)  # 2020 of 10100; densities c * 0.2 (saturates at 1) and c * 0.02
    [100, 1920]
    >>> erk([(8, 8), (8, 8)], 0.75)
    [16, 16]
    >>> erk([(8, 8), (8, 16)], 0.75, numbers=[1, 4])  # densities c * 1/4 and c * 3/16, of 64 and 512 weights
    [21, 123]
    """
    sizes = _sizes(shapes, numbers)
    extents = [sum(shape) * number for shape, number in zip(shapes, numbers or [1] * len(shapes), strict=True)]
    if not sizes:
        return []
    total = max(keep_count(sum(sizes), sparsity), len(sizes))
    dense: set[int] = set()
    while True:
        free = [e for e in range(len(sizes)) if e not in dense]
        weight = sum(extents[e] for e in free)
        budget = total - sum(sizes[e] for e in dense)
        # Expected keep of entry e is budget * extent_e / weight; exact fractions keep the total exact.
        shares = {e: Fraction(budget * extents[e], weight) for e in free}
        saturated = {e for e in free if shares[e] >= sizes[e]}
        if not saturated or saturated == set(free):
            break
        dense |= saturated
    keep = [sizes[e] if e in dense else max(1, min(sizes[e], math.floor(shares[e]))) for e in range(len(sizes))]
    by_fraction = sorted(shares, key=lambda e: (-(shares[e] % 1), e))
    while (missing := total - sum(keep)) > 0:
        for e in [e for e in by_fraction if keep[e] < sizes[e]][:missing]:
            keep[e] += 1
    for _ in range(sum(keep) - total):
        keep[keep.index(max(keep))] -= 1
    return keep


def shared(shapes: Sequence[Sequence[int]], sparsity: float, numbers: Sequence[int] = ()) -> list[int]:
    """One budget and one threshold for each partition: the sum of its uniform budgets, shared by magnitude."""
    return uniform(shapes, sparsity, numbers)


def _sizes(shapes: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[int]:
    """Return the weights of each entry."""
    return [math.prod(shape) * number for shape, number in zip(shapes, numbers or [1] * len(shapes), strict=True)]


#: To add a distribution, append it here: the config's names and the documentation are derived from this table.
DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "erk": erk, "global": shared}
