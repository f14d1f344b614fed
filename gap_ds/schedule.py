"""Schedules: which partitions are dense at which step. Pure, so equal on every rank and after every restart.

K partitions, numbered from 0. Steps are applied optimizer steps, numbered from 0: phase p covers the steps
[first_step, first_step + steps), and its boundary lies before its first step.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from gap_ds.config import GaPConfig

Kind = Literal["explore", "finetune"]


@dataclass(frozen=True)
class Phase:
    """An interval of applied steps with one set of dense partitions."""

    index: int
    round: int
    first_step: int
    steps: int
    dense: frozenset[int]
    kind: Kind

    @property
    def end_step(self) -> int:
        """First step after this phase."""
        return self.first_step + self.steps

    def __str__(self) -> str:
        names = ",".join(str(k) for k in sorted(self.dense)) or "none"
        return f"phase {self.index} ({self.kind}, round {self.round}, dense {names})"


@dataclass(frozen=True)
class Schedule:
    """All phases of a run, without gaps. The last one is open: training longer stays in it."""

    phases: tuple[Phase, ...]

    @property
    def total_steps(self) -> int:
        """Applied steps of the whole run."""
        return self.phases[-1].end_step

    def phase_at(self, step: int) -> Phase:
        """The phase that the `step`-th applied step belongs to.

        >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_steps=10, rounds=1, finetune_steps=5)
        >>> schedule = build(config)
        >>> [schedule.phase_at(step).index for step in (0, 9, 10, 19, 20, 24, 999)]
        [0, 0, 1, 1, 2, 2, 2]
        >>> [sorted(phase.dense) for phase in schedule.phases]
        [[0], [1], []]
        """
        assert step >= 0
        return self.phases[bisect.bisect_right([phase.first_step for phase in self.phases], step) - 1]

    def density(self, keep: Sequence[int], numel: Sequence[int]) -> list[float]:
        """Density of all entries together in each phase; `keep` and `numel` are sums per partition (K values each)."""
        total = sum(numel)
        return [
            sum(n if k in phase.dense else s for k, (s, n) in enumerate(zip(keep, numel, strict=True))) / total
            for phase in self.phases
        ]

    def mean_density(self, keep: Sequence[int], numel: Sequence[int]) -> float:
        """Density averaged over the applied steps of the run."""
        by_phase = zip(self.density(keep, numel), self.phases, strict=True)
        return sum(d * phase.steps for d, phase in by_phase) / self.total_steps


def build(config: GaPConfig, steps_per_epoch: int | None = None) -> Schedule:
    """The schedule of a run.

    cyclic (Ma et al., ICLR 2022, section 3.1): `rounds` times K phases of T, one partition dense in each, then
    fine-tuning with none. dsd (Han et al., "DSD: Dense-Sparse-Dense Training", ICLR 2017): a round is a dense phase
    and a sparse phase. static, dense: the same phases with none or all dense, so that learning-rate restarts fall on
    the same steps.

    Boundaries are rounded from the exact position (p * T epochs), so that fractions of an epoch do not drift.

    Raises:
        ValueError: times are in epochs and `steps_per_epoch` is not given, or a phase would have no step.

    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_epochs=0.5, rounds=1, finetune_epochs=1.0)
    >>> [(phase.first_step, phase.steps) for phase in build(config, steps_per_epoch=7).phases]
    [(0, 4), (4, 3), (7, 7)]
    """
    unit = _unit(config, steps_per_epoch)
    length = Fraction(repr(config.phase_epochs)) if config.in_epochs else Fraction(config.phase_steps or 0)
    finetune = Fraction(repr(config.finetune_epochs)) if config.in_epochs else Fraction(config.finetune_steps or 0)
    dense = _dense_partitions(config)
    edges = [_round(unit * length * p) for p in range(len(dense) + 1)]
    per_round = len(dense) // config.rounds if config.rounds else 1
    phases = [
        Phase(p, p // per_round, edges[p], edges[p + 1] - edges[p], frozenset(dense[p]), "explore")
        for p in range(len(dense))
    ]
    if any(phase.steps < 1 for phase in phases):
        raise ValueError(
            f"phase_epochs={config.phase_epochs}: with {unit} steps in an epoch a phase has no step. "
            'Raise "phase_epochs".'
        )
    end = _round(unit * (length * len(dense) + finetune))
    # Without fine-tuning there is still a last boundary: the partition that was dense is pruned, and the run is over.
    last = frozenset(range(config.kappa)) if config.method == "dense" else frozenset[int]()
    phases.append(Phase(len(dense), config.rounds, edges[-1], end - edges[-1], last, "finetune"))
    return Schedule(tuple(phases))


def _unit(config: GaPConfig, steps_per_epoch: int | None) -> int:
    if not config.in_epochs:
        return 1
    if steps_per_epoch is None or steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch}: must be the number of applied steps in an epoch, because the config "
            'counts in epochs. Pass steps_per_epoch, or set "phase_steps" and "finetune_steps".'
        )
    return steps_per_epoch


def _dense_partitions(config: GaPConfig) -> list[tuple[int, ...]]:
    """The dense partitions of each exploring phase, in order."""
    if config.method == "static":
        return [()] * (config.rounds * config.kappa)
    if config.method == "dense":
        return [tuple(range(config.kappa))] * (config.rounds * config.kappa)
    if config.method == "dsd":
        return [(0,), ()] * config.rounds
    if config.order == "cyclic":
        return [(k,) for _ in range(config.rounds) for k in range(config.kappa)]
    order: list[tuple[int, ...]] = [(0,)]
    rng = random.Random(f"order {config.seed}")
    while len(order) < config.rounds * config.kappa:
        # Any partition but the dense one: growing what is dense already would be no phase of its own.
        order.append((rng.choice([k for k in range(config.kappa) if (k,) != order[-1]]),))
    return order[: config.rounds * config.kappa]


def _round(x: Fraction) -> int:
    return int(x + Fraction(1, 2))
