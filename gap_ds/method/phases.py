"""Phases of a run as plain values: which partitions are dense in which steps, and the densities that follow.

K partitions, numbered from 0. Steps are applied optimizer steps, numbered from 0: a phase covers the steps
[first_step, first_step + steps), and its boundary lies before its first step. Some methods also change masks inside a
phase, before the steps of its `updates`.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from gap_ds.method.distribution import round_half_up

Kind = Literal["dense", "explore", "finetune"]


class Budget(Protocol):
    """The numbers of an entry that a schedule and a rule may read."""

    @property
    def partition(self) -> int: ...
    @property
    def keep(self) -> int: ...
    @property
    def numel(self) -> int: ...


@dataclass(frozen=True)
class Phase:
    """An interval of applied steps with one set of dense partitions.

    leaving: partitions that are pruned when the phase ends. updates: steps inside the phase before which masks change;
    those after `update_from`, the step from which progress is counted, also prune what leaves. rise: with a rising
    target, the steps between which the level of the sparse partitions rises; None: they are at their target. growth:
    part of their pruned weights that the dense partitions have grown; 1: they are dense indeed. grades: with N:M, the
    steps in which N falls from M: what is pruned is a multiple of 1 / grades.
    """

    index: int
    round: int
    first_step: int
    steps: int
    dense: frozenset[int]
    kind: Kind
    leaving: frozenset[int] = frozenset()
    update_from: int = 0
    updates: tuple[int, ...] = ()
    rise: tuple[int, int] | None = None
    growth: Fraction = Fraction(1)
    grades: int | None = None

    @property
    def end_step(self) -> int:
        """First step after this phase."""
        return self.first_step + self.steps

    def is_update(self, step: int) -> bool:
        """True if masks change before a step inside this phase."""
        i = bisect.bisect_left(self.updates, step)  # there may be very many, and each step asks
        return i < len(self.updates) and self.updates[i] == step

    def changed(self, step: int) -> int:
        """The step of this phase, up to `step`, before which masks were changed last: its first one, or an update's."""
        i = bisect.bisect_right(self.updates, step)
        return self.updates[i - 1] if i else self.first_step

    def progress(self, step: int) -> Fraction:
        """Progress of the updates before a step: 0 at `update_from`, 1 at the end of the phase."""
        return Fraction(step - self.update_from, self.end_step - self.update_from)

    def level(self, step: int) -> Fraction:
        """Pruned part of the weights to prune that a sparse partition has after a boundary or update before `step`.

        It is 1, or with a rising target the cubic of gradual pruning.

        >>> phase = Phase(1, 0, 10, 20, frozenset({0}), "explore", rise=(10, 50))
        >>> [str(phase.level(step)) for step in (10, 20, 30, 50)]
        ['0', '37/64', '7/8', '1']
        """
        if self.rise is None:
            return Fraction(1)
        first, last = self.rise
        return ramp(Fraction(min(max(step, first), last) - first, last - first))

    def is_masked(self, partition: int, step: int) -> bool:
        """True if a partition has masks in a step of this phase: it is not dense, or its gradual pruning has begun."""
        return partition not in self.dense or self.growth < 1 or self._ramps(partition, step)

    def prunes(self, partition: int, step: int) -> bool:
        """True if the update before a step inside this phase prunes a partition."""
        return self._ramps(partition, step) if partition in self.dense else self.rise is not None

    def at_target(self, partition: int) -> bool:
        """True if a partition has its final budget in all steps of this phase."""
        return partition not in self.dense and self.rise is None

    def _ramps(self, partition: int, step: int) -> bool:
        i = bisect.bisect_right(self.updates, self.update_from)
        return partition in self.leaving and i < len(self.updates) and step >= self.updates[i]

    def pruned(self, partition: int, step: int) -> Fraction:
        """Pruned part of the weights to prune that a partition has after the boundary or update before `step`."""
        part = level = self.level(step)
        if partition in self.dense:
            part = (1 - self.growth) * self.level(self.first_step)
            part += ramp(self.progress(step)) * (level - part) if self._ramps(partition, step) else 0
        return (
            part
            if self.grades is None
            else 1 - Fraction(math.floor(self.grades * (1 - part) + Fraction(1, 2)), self.grades)
        )

    def budget(self, entry: Budget, step: int) -> int:
        """Kept weights of an entry in the steps that follow the boundary or update before `step`."""
        return round_half_up(entry.numel - self.pruned(entry.partition, step) * (entry.numel - entry.keep))

    def density(self, step: int, keep: Sequence[int], numel: Sequence[int]) -> float:
        """Density in the steps that follow the boundary or update before `step`."""
        active = Fraction(0)
        for k, (s, n) in enumerate(zip(keep, numel, strict=True)):
            active += s if self.at_target(k) else n - self.pruned(k, step) * (n - s)
        return float(active / sum(numel))

    def mean_density(self, keep: Sequence[int], numel: Sequence[int], end: int | None = None) -> float:
        """Density averaged over the steps of this phase, or over those before the step `end`."""
        end = self.end_step if end is None else end
        if end <= self.first_step:
            return self.density(self.first_step, keep, numel)
        spans = itertools.pairwise((self.first_step, *(step for step in self.updates if step < end), end))
        return sum(self.density(lo, keep, numel) * (hi - lo) for lo, hi in spans) / (end - self.first_step)

    def __str__(self) -> str:
        names = ",".join(str(k) for k in sorted(self.dense)) or "none"
        return f"phase {self.index} ({self.kind}, round {self.round}, dense {names})"


@dataclass(frozen=True)
class Schedule:
    """All phases of a run, without gaps. The last phase is open: further steps belong to it.

    `keep` and `numel` below are the kept weights and the weights of each partition (K values each). `regrow_warmup` is
    the number of steps over which the steps of grown weights rise to their full size.
    """

    phases: tuple[Phase, ...]
    regrow_warmup: int = 0

    @property
    def total_steps(self) -> int:
        """Applied steps of the whole run."""
        return self.phases[-1].end_step

    def phase_at(self, step: int) -> Phase:
        """Return the phase of the `step`-th applied step.

        >>> first, last = Phase(0, 0, 0, 10, frozenset({0}), "explore"), Phase(1, 1, 10, 5, frozenset(), "finetune")
        >>> [Schedule((first, last)).phase_at(step).index for step in (0, 9, 10, 14, 999)]
        [0, 0, 1, 1, 1]
        """
        assert step >= 0
        return self.phases[bisect.bisect_right(self._first_steps, step) - 1]

    @functools.cached_property
    def _first_steps(self) -> list[int]:
        return [phase.first_step for phase in self.phases]

    def density_at(self, step: int, keep: Sequence[int], numel: Sequence[int]) -> float:
        """Density of all entries together in a step."""
        phase = self.phase_at(step)
        return phase.density(phase.changed(step), keep, numel)

    def density(self, keep: Sequence[int], numel: Sequence[int]) -> list[float]:
        """Density of all entries together in each phase, averaged over its steps."""
        return [phase.mean_density(keep, numel) for phase in self.phases]

    def mean_density(self, keep: Sequence[int], numel: Sequence[int], steps: int | None = None) -> float:
        """Density averaged over the applied steps of the run, or over its first `steps`."""
        steps = self.total_steps if steps is None else steps
        if not steps:
            return self.density_at(0, keep, numel)
        begun = [phase for phase in self.phases if phase.first_step < steps]
        ends = [*(phase.end_step for phase in begun[:-1]), steps]  # further steps are of the last phase
        weighted = (p.mean_density(keep, numel, end) * (end - p.first_step) for p, end in zip(begun, ends, strict=True))
        return sum(weighted) / steps


def ramp(progress: Fraction) -> Fraction:
    """Return the pruned part of the weights to prune, by the cubic schedule of gradual pruning: fast at first.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1.

    >>> [str(ramp(Fraction(i, 4))) for i in range(5)]
    ['0', '37/64', '7/8', '63/64', '1']
    """
    return 1 - (1 - progress) ** 3


def cosine(first: float, progress: Fraction) -> Fraction:
    """Return a fraction that falls from `first` to 0 by a cosine.

    >>> [str(cosine(0.3, Fraction(i, 2))) for i in range(3)]
    ['3/10', '3/20', '0']
    """
    value = first / 2 * (1 + math.cos(math.pi * float(progress)))
    # Nine decimals: the last bit of a machine's cosine must not decide about one weight more or less.
    return Fraction(f"{value:.9f}")
