"""Means over seeds, and differences between methods paired by seed.

A seed fixes first weights and batches, so two methods with one seed share both, and their difference scatters less
than either of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mpmath  # type: ignore[import-untyped]  # comes with torch, through sympy


@dataclass(frozen=True)
class Mean:
    """Mean over seeds with its standard error; None with one seed."""

    value: float
    error: float | None
    count: int

    def text(self, digits: int, sign: str = "") -> str:
        """Return the mean and its error. sign: "+" to show the sign of a mean above 0.

        >>> Mean(2.13, 0.005, 2).text(3), Mean(0.25, None, 1).text(2, "+")
        ('2.130 ± 0.005', '+0.25')
        """
        mean = f"{self.value:{sign}.{digits}f}"
        return mean if self.error is None else f"{mean} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Difference(Mean):
    """Mean of the differences by seed, with the p-value of a two-sided paired t-test; None with one seed."""

    p: float | None

    def text(self, digits: int, sign: str = "+") -> str:
        """Return the difference, its error and p."""
        text = super().text(digits, sign)
        return text if self.p is None else f"{text}, p {'< 0.001' if self.p < 0.001 else f'{self.p:.2g}'}"


def mean(values: Iterable[float]) -> Mean:
    """Return the mean of one value or more.

    >>> mean([1.0, 3.0])
    Mean(value=2.0, error=1.0, count=2)
    """
    given = list(values)
    error = statistics.stdev(given) / math.sqrt(len(given)) if len(given) > 1 else None
    return Mean(statistics.mean(given), error, len(given))


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Return `values` minus `others`, both by seed, over the seeds that they share; None without any.

    >>> paired({0: 3.0, 1: 4.0, 2: 6.0, 3: 9.0}, {0: 1.0, 1: 1.0, 2: 2.0}).text(2)
    '+3.00 ± 0.58, p 0.035'
    """
    shared = sorted(values.keys() & others.keys())
    if not shared:
        return None
    found = mean(values[seed] - others[seed] for seed in shared)
    if found.error is None:
        return Difference(found.value, None, 1, None)
    t = math.copysign(math.inf, found.value) if found.error == 0 else found.value / found.error
    p = 1.0 if found.value == 0 else two_sided_p(t, found.count - 1)
    return Difference(found.value, found.error, found.count, p)


def two_sided_p(t: float, freedom: int) -> float:
    """Return the probability of a value of Student's t at least as far from 0.

    >>> two_sided_p(0.0, 3), round(two_sided_p(12.706, 1), 4), round(two_sided_p(-3.182, 3), 4)
    (1.0, 0.05, 0.05)
    """
    if math.isinf(t):
        return 0.0
    part = freedom / (freedom + t * t)
    return float(mpmath.betainc(freedom / 2, 0.5, 0, part, regularized=True))


def interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Return the confidence interval of the mean by Student's t; without bounds for one value.

    >>> [round(bound, 3) for bound in interval([1.0, 2.0, 3.0], 0.95)]
    [-0.484, 4.484]
    """
    found = mean(values)
    if found.error is None:
        return -math.inf, math.inf
    low, high = 0.0, 1e3
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if two_sided_p(middle, found.count - 1) < 1 - level else (middle, high)
    return found.value - high * found.error, found.value + high * found.error


def pooled_deviation(groups: Iterable[Iterable[float]]) -> float | None:
    """Return the standard deviation within groups, pooled over them; None if no group has two values.

    >>> pooled_deviation([[1.0, 3.0], [5.0], [2.0, 2.0]])
    1.0
    """
    squares = freedom = 0.0
    for group in map(list, groups):
        if len(group) > 1:
            squares += statistics.variance(group) * (len(group) - 1)
            freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else None
