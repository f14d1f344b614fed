"""Schedules: which partitions are dense at which step. Pure, so equal on every rank and after every restart.

K partitions, numbered from 0. Steps are applied optimizer steps, numbered from 0: phase p covers the steps
[first_step, first_step + steps), and its boundary lies before its first step. Some methods change masks inside a phase
too: before the steps of its `updates`.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from gap_ds.method.config import GaPConfig

Kind = Literal["dense", "explore", "finetune"]

#: Phases of a run, updates of a phase, and partitions that a config can mean.
MOST = 1_000_000


@dataclass(frozen=True)
class Phase:
    """An interval of applied steps with one set of dense partitions.

    leaving: partitions that are pruned when it ends. updates: steps inside it before which masks change, all after
    `update_from`, where the changing begins.
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

    @property
    def end_step(self) -> int:
        """First step after this phase."""
        return self.first_step + self.steps

    def progress(self, step: int) -> Fraction:
        """How far the changing of masks has come before a step: from 0 at `update_from` to 1 at the phase's end."""
        return Fraction(step - self.update_from, self.end_step - self.update_from)

    def is_masked(self, partition: int, step: int) -> bool:
        """Whether a partition has masks in a step of this phase: it is sparse, or on its way out already."""
        leaves = partition in self.leaving and bool(self.updates) and step >= self.updates[0]
        return partition not in self.dense or leaves

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

    def density_at(self, step: int, keep: Sequence[int], numel: Sequence[int]) -> float:
        """Density of all entries together in a step; `keep` and `numel` are sums per partition (K values each)."""
        phase = self.phase_at(step)
        done = [update for update in phase.updates if update <= step]
        return _density(phase, done[-1] if done else phase.first_step, keep, numel)

    def density(self, keep: Sequence[int], numel: Sequence[int]) -> list[float]:
        """Density of all entries together in each phase, averaged over its steps."""
        return [_mean_density(phase, keep, numel) for phase in self.phases]

    def mean_density(self, keep: Sequence[int], numel: Sequence[int]) -> float:
        """Density averaged over the applied steps of the run."""
        densities = self.density(keep, numel)
        if not self.total_steps:
            return densities[-1]
        return sum(d * phase.steps for d, phase in zip(densities, self.phases, strict=True)) / self.total_steps


def ramp(progress: Fraction) -> Fraction:
    """Part of the weights to prune that gradual pruning has pruned: the cubic schedule, fast at first.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1.

    >>> [str(ramp(Fraction(i, 4))) for i in range(5)]
    ['0', '37/64', '7/8', '63/64', '1']
    """
    return 1 - (1 - progress) ** 3


def build(config: GaPConfig, steps_per_epoch: int | None = None, worker: int = 0) -> Schedule:
    """The schedule of a run; of parallel GaP, that of one worker.

    Every run has: a first phase with all dense, if the config asks for one; exploring phases of length T; a last phase,
    fine-tuning, with none dense.

    - cyclic (Ma et al., "Effective Model Sparsification by Scheduled Grow-and-Prune Methods", ICLR 2022, arXiv
      2106.09857, section 3.1): `rounds` times K phases, one partition dense in each, in turn or in random order.
    - parallel (the same, section 3.2): `rounds` phases, the worker's own partition dense; worker 0 alone fine-tunes.
    - dsd (Han et al., "DSD: Dense-Sparse-Dense Training for Deep Neural Networks", ICLR 2017, arXiv 1607.04381; its
      last phase is dense, and here sparse): a round is a dense phase and a sparse phase.
    - acdc (Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", NeurIPS 2021,
      arXiv 2106.12379): the same, meant for short phases.
    - one_shot (Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015, arXiv
      1506.02626): one dense phase.
    - gradual (Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878): one phase, from dense at its beginning to
      sparse at its end.
    - rigl (Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134), set (Mocanu
      et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
      science", Nature Communications 9, 2383, 2018): one sparse phase in which masks move.
    - static, dense: the phases of cyclic with none or all dense, so that learning-rate restarts fall on the same steps.

    With `prune_ramp` the partitions that leave a phase are pruned gradually in its last part, whatever the method.
    Boundaries are rounded from the exact position (p * T epochs), so that fractions of an epoch do not drift.

    Raises:
        ValueError: times are in epochs and `steps_per_epoch` is not given, a phase would have no step, there is no
            update where there must be some, or no such worker.

    >>> def show(method, worker=0, **settings):  # (steps, dense partitions) of each phase
    ...     times = {"phase_steps": 4, "finetune_steps": 2}
    ...     config = GaPConfig.load({"method": method, "sparsity": 0.8, **times, **settings})
    ...     print(f"{method:8}", *((phase.steps, sorted(phase.dense)) for phase in build(config, worker=worker).phases))
    >>> show("cyclic", partitions=3, rounds=1)
    cyclic   (4, [0]) (4, [1]) (4, [2]) (2, [])
    >>> show("cyclic", partitions=3, rounds=2, partition_order="random")
    cyclic   (4, [0]) (4, [2]) (4, [0]) (4, [1]) (4, [2]) (4, [1]) (2, [])
    >>> show("parallel", partitions=3, rounds=2)
    parallel (4, [0]) (4, [0]) (2, [])
    >>> show("parallel", partitions=3, rounds=2, worker=1)
    parallel (4, [1]) (4, [1]) (0, [])
    >>> show("dsd", rounds=2)
    dsd      (4, [0]) (4, []) (4, [0]) (4, []) (2, [])
    >>> show("acdc", rounds=2, phase_steps=1, dense_steps=3)
    acdc     (3, [0]) (1, [0]) (1, []) (1, [0]) (1, []) (2, [])
    >>> show("one_shot")
    one_shot (4, [0]) (2, [])
    >>> show("gradual", update_steps=1)
    gradual  (4, [0]) (2, [])
    >>> show("rigl", update_steps=1)
    rigl     (4, []) (2, [])
    >>> show("set", update_steps=1)
    set      (4, []) (2, [])
    >>> show("static", partitions=3, rounds=1)
    static   (4, []) (4, []) (4, []) (2, [])
    >>> show("dense", partitions=3, rounds=1, sparsity=0.0)
    dense    (4, [0, 1, 2]) (4, [0, 1, 2]) (4, [0, 1, 2]) (2, [0, 1, 2])

    Updates inside a phase, and the densities of gradual pruning; fractions of an epoch:

    >>> config = GaPConfig(method="rigl", sparsity=0.8, phase_steps=8, update_steps=3, finetune_steps=4)
    >>> [(phase.updates, phase.steps) for phase in build(config).phases]
    [((3, 6), 8), ((), 4)]
    >>> config = GaPConfig(method="gradual", sparsity=0.8, phase_steps=4, update_steps=1, finetune_steps=4)
    >>> [(phase.updates, phase.steps) for phase in build(config).phases]
    [((1, 2, 3), 4), ((), 4)]
    >>> [round(build(config).density_at(step, [20], [100]), 2) for step in range(5)]
    [1.0, 0.54, 0.3, 0.21, 0.2]
    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_epochs=0.5, rounds=1, finetune_epochs=1.0)
    >>> [(phase.first_step, phase.steps) for phase in build(config, steps_per_epoch=7).phases]
    [(0, 4), (4, 3), (7, 7)]
    """
    if not 0 <= worker < (config.kappa if config.method == "parallel" else 1):
        raise ValueError(f"worker {worker}: must lie in 0 to {config.kappa - 1}, one for each partition.")
    unit = _unit(config, steps_per_epoch)
    _check_size(config)
    warmup, length, finetune = (_exact(config, name) for name in ("dense", "phase", "finetune"))
    sets = _dense_partitions(config, worker)
    every = frozenset(range(config.kappa))
    starts = [warmup + length * p for p in range(len(sets) + 1)]
    kinds: list[Kind] = ["explore"] * len(sets)
    rounds = [p // max(1, len(sets) // config.rounds) if config.rounds else 0 for p in range(len(sets))]
    if warmup:
        sets, starts, kinds, rounds = [every, *sets], [Fraction(0), *starts], ["dense", *kinds], [0, *rounds]
    # Without fine-tuning there is still a last boundary: the partition that was dense is pruned, and the run is over.
    sets = [*sets, every if config.method == "dense" else frozenset[int]()]
    alone = config.method == "parallel" and worker > 0
    starts = [*starts, starts[-1] + (0 if alone else finetune)]
    edges = [_round(unit * start) for start in starts]
    phases = [
        _phase(config, unit, p, rounds[p], edges[p], edges[p + 1], kinds[p], sets[p], sets[p + 1], starts[p : p + 2])
        for p in range(len(kinds))
    ]
    if empty := next((phase for phase in phases if phase.steps < 1), None):
        name = "dense_epochs" if empty.kind == "dense" else "phase_epochs"
        raise ValueError(
            f'{name}={getattr(config, name)}: with {unit} steps in an epoch a phase has no step. Raise "{name}".'
        )
    if config.updates and phases and not any(phase.updates for phase in phases):
        name = f"update_{'epochs' if config.in_epochs else 'steps'}"
        raise ValueError(
            f"{name}={getattr(config, name)}: no update falls inside a phase, so masks would change at boundaries "
            f'alone. Lower "{name}", or lengthen what is updated.'
        )
    last = Phase(len(phases), config.rounds, edges[-2], edges[-1] - edges[-2], sets[-1], "finetune")
    return Schedule((*phases, last))


def _phase(
    config: GaPConfig,
    unit: int,
    index: int,
    round_: int,
    first: int,
    end: int,
    kind: Kind,
    dense: frozenset[int],
    after: frozenset[int],
    span: Sequence[Fraction],
) -> Phase:
    # A worker of parallel GaP leaves its partition only to have it back.
    leaving = dense if config.method == "parallel" and kind == "explore" else dense - after
    part = Fraction(repr(config.prune_ramp))
    if config.method == "gradual":
        part = Fraction(kind == "explore")
    moves = config.method in ("rigl", "set")
    if not moves and not (part and leaving):
        return Phase(index, round_, first, end - first, dense, kind, leaving)
    begin = span[0] if moves else span[1] - part * (span[1] - span[0])
    gap = _exact(config, "update")
    times = [begin + gap * i for i in range(1, int((span[1] - begin) / gap) + 1)]
    inside = sorted({_round(unit * t) for t in times})
    start = max(first, _round(unit * begin))
    updates = tuple(step for step in inside if start < step < end)
    return Phase(index, round_, first, end - first, dense, kind, leaving, start, updates)


def _density(phase: Phase, step: int, keep: Sequence[int], numel: Sequence[int]) -> float:
    """Density in the steps of a phase that follow the boundary or update before a step."""
    active = Fraction(0)
    for k, (s, n) in enumerate(zip(keep, numel, strict=True)):
        if k not in phase.dense:
            active += s
        else:
            active += n - (ramp(phase.progress(step)) * (n - s) if phase.is_masked(k, step) else 0)
    return float(active / sum(numel))


def _mean_density(phase: Phase, keep: Sequence[int], numel: Sequence[int]) -> float:
    marks = (phase.first_step, *phase.updates, phase.end_step)
    if not phase.steps:
        return _density(phase, phase.first_step, keep, numel)
    spans = itertools.pairwise(marks)
    return sum(_density(phase, lo, keep, numel) * (hi - lo) for lo, hi in spans) / phase.steps


def _check_size(config: GaPConfig) -> None:
    """Refuses what can only be a slip of the keyboard, before it fills the memory."""
    if config.kappa > MOST:
        raise ValueError(f"partitions={config.partitions}: must be at most {MOST}.")
    if config.exploring > MOST:
        raise ValueError(f"rounds={config.rounds}: makes {config.exploring} phases, must make at most {MOST}.")
    if config.updates:
        length, gap = max(_exact(config, "phase"), _exact(config, "dense")), _exact(config, "update")
        if length / gap > MOST:
            name = f"update_{'epochs' if config.in_epochs else 'steps'}"
            raise ValueError(f"{name}={getattr(config, name)}: makes more than {MOST} updates in a phase. Raise it.")


def _unit(config: GaPConfig, steps_per_epoch: int | None) -> int:
    if not config.in_epochs:
        return 1
    if steps_per_epoch is None or steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch}: must be the number of applied steps in an epoch, because the config "
            'counts in epochs. Pass steps_per_epoch, or set "phase_steps" and "finetune_steps".'
        )
    return steps_per_epoch


def _exact(config: GaPConfig, name: str) -> Fraction:
    """A length in the config's unit, as the decimal number that was written down."""
    value = getattr(config, f"{name}_{'epochs' if config.in_epochs else 'steps'}")
    return Fraction(repr(value)) if value else Fraction(0)


def _dense_partitions(config: GaPConfig, worker: int) -> list[frozenset[int]]:
    """The dense partitions of each exploring phase, in order."""
    none, every = frozenset[int](), frozenset(range(config.kappa))
    if config.method in ("static", "rigl", "set"):
        return [none] * config.exploring
    if config.method in ("dense", "one_shot", "gradual"):
        return [every] * config.exploring
    if config.method in ("dsd", "acdc"):
        return [every, none] * config.rounds
    if config.method == "parallel":
        return [frozenset((worker,))] * config.exploring
    if config.partition_order == "cyclic":
        return [frozenset((p % config.kappa,)) for p in range(config.exploring)]
    order = [0]
    rng = random.Random(f"order {config.seed}")
    while len(order) < config.exploring:
        # Any partition but the dense one: growing what is dense already would be no phase of its own.
        order.append(rng.choice([k for k in range(config.kappa) if k != order[-1]]))
    return [frozenset((k,)) for k in order[: config.exploring]]


def _round(x: Fraction) -> int:
    return int(x + Fraction(1, 2))
