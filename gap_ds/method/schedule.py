"""Schedules: the phases of a run, from its config. Pure, so equal on every rank and after every restart.

The method gives segments: the dense partitions of each phase, and its exact length. One pass rounds their ends to
steps, another one adds the updates inside phases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import NofM, parse
from gap_ds.method.phases import Kind, Phase, Schedule, cosine

__all__ = ["Phase", "Schedule", "build"]

#: The most phases of a run, updates of a phase, and partitions. A config that exceeds them is a typing error.
MOST = 1_000_000


@dataclass(frozen=True)
class Segment:
    """A phase before rounding: its dense partitions and its exact length in the config's unit."""

    kind: Kind
    round: int
    dense: frozenset[int]
    length: Fraction


def build(config: GaPConfig, steps_per_epoch: int | None = None, worker: int = 0) -> Schedule:
    """Return the schedule of a run, or of one worker of parallel GaP.

    Every run has a first phase with all partitions dense, if the config has dense_epochs or dense_steps; then the
    exploring phases of length T of its method (methods.py); then a last phase, fine-tuning, with no partition dense.
    With `prune_ramp` the partitions that leave a phase are pruned gradually in its last part, whatever the method.
    With a rising target the level of the sparse partitions rises from the first exploring phase to the last boundary.
    Boundaries are rounded from their exact position (p * T epochs), so that fractions of an epoch do not drift.

    Raises:
        ValueError: times are in epochs and `steps_per_epoch` is not given, a phase would have no step, the method needs
            updates and none falls inside a phase, or there is no such worker.

    >>> config = GaPConfig(method="rigl", sparsity=0.8, phase_steps=8, update_steps=3, finetune_steps=4)
    >>> [(phase.updates, phase.steps) for phase in build(config).phases]
    [((3, 6), 8), ((), 4)]
    >>> config = GaPConfig(method="gradual", sparsity=0.8, phase_steps=4, update_steps=1, finetune_steps=4)
    >>> [(phase.updates, phase.steps) for phase in build(config).phases]
    [((1, 2, 3), 4), ((), 4)]
    >>> [round(build(config).density_at(step, [20], [100]), 2) for step in range(5)]
    [1.0, 0.54, 0.3, 0.21, 0.2]
    >>> times = {"phase_steps": 4, "rounds": 2, "finetune_steps": 4, "update_steps": 2}
    >>> config = GaPConfig(sparsity=0.8, partitions=2, target="rising", **times)
    >>> [round(build(config).density_at(step, [10, 10], [50, 50]), 2) for step in range(0, 18, 2)]
    [1.0, 0.87, 0.77, 0.7, 0.65, 0.62, 0.61, 0.6, 0.2]
    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_epochs=0.5, rounds=1, finetune_epochs=1.0)
    >>> [(phase.first_step, phase.steps) for phase in build(config, steps_per_epoch=7).phases]
    [(0, 4), (4, 3), (7, 7)]
    """
    if not 0 <= worker < (config.kappa if config.record.has_workers else 1):
        raise ValueError(f"worker {worker}: must lie in 0 to {config.kappa - 1}, one for each partition.")
    unit = _unit(config, steps_per_epoch)
    _check_size(config)
    segments = _segments(config, worker)
    starts = list(itertools.accumulate((segment.length for segment in segments), initial=Fraction(0)))
    phases = _rounded(config, segments, [_round(unit * start) for start in starts])
    phases = [
        _with_updates(config, unit, phase, start, end)
        for phase, (start, end) in zip(phases, itertools.pairwise(starts), strict=True)
    ]
    # The last one may be empty if it is said to be, and not because it was rounded to nothing.
    _check_steps(config, unit, phases if segments[-1].length else phases[:-1])
    _check(config, phases[:-1])
    return Schedule(tuple(phases), _warmup(config, unit))


def _segments(config: GaPConfig, worker: int) -> list[Segment]:
    """Return the segments of a run. The last one may be empty: its boundary prunes what was dense before."""
    method, every = config.record, frozenset(range(config.kappa))
    warmup, length, finetune = (_exact(config, name) for name in ("dense", "phase", "finetune"))
    found = [Segment("dense", 0, every, warmup)] if warmup else []
    for p, dense in enumerate(itertools.islice(method.dense(config, worker), config.exploring)):
        found.append(Segment("explore", p // config.phases_per_round, dense, length))
    # Of the workers of parallel GaP, worker 0 alone fine-tunes.
    last = frozenset[int]() if method.prunes else every
    return [*found, Segment("finetune", config.rounds, last, Fraction(0) if worker else finetune)]


def _rounded(config: GaPConfig, segments: Sequence[Segment], edges: Sequence[int]) -> list[Phase]:
    """Return the phases without updates; `edges` are the steps between which the segments lie."""
    phases, pattern = [], parse(config.pattern)
    grades = pattern.grades if isinstance(pattern, NofM) else None
    for p, (segment, first, end) in enumerate(zip(segments, edges[:-1], edges[1:], strict=True)):
        # A worker leaves its partition at every exchange, only to have it back.
        comes_back = config.record.has_workers and segment.kind == "explore"
        after = frozenset[int]() if comes_back else segments[min(p + 1, len(segments) - 1)].dense
        leaving = segment.dense - after
        phase = Phase(p, segment.round, first, end - first, segment.dense, segment.kind, leaving, grades=grades)
        phases.append(_of_target(config, phase, edges) if segment.kind == "explore" else phase)
    return phases


def _of_target(config: GaPConfig, phase: Phase, edges: Sequence[int]) -> Phase:
    """Return an exploring phase with its rising target, and with the share that its dense partitions grow."""
    first, last = edges[-2 - config.exploring], edges[-2]
    if config.target == "rising":
        phase = replace(phase, rise=(first, last))
    if config.grow != "dense":
        phase = replace(phase, growth=cosine(config.grow_share, Fraction(phase.first_step - first, last - first)))
    return phase


def _with_updates(config: GaPConfig, unit: int, phase: Phase, start: Fraction, end: Fraction) -> Phase:
    """Return the phase with its updates; `start` and `end` are its exact ends in the config's unit."""
    if phase.kind == "finetune" or (phase.kind == "dense" and config.target == "rising"):
        return phase
    if config.record.updates:
        part = Fraction(phase.kind == "explore")
    else:
        part = Fraction(repr(config.prune_ramp)) if phase.leaving else Fraction(0)
    if not part and phase.rise is None:
        return phase
    begin, gap = end - part * (end - start), _exact(config, "update")
    first = max(phase.first_step, _round(unit * begin))
    # A rising target is met from the beginning of the phase.
    begin = begin if phase.rise is None else start
    steps = {_round(unit * (begin + gap * i)) for i in range(1, int((end - begin) / gap) + 1)}
    after = first if phase.rise is None else phase.first_step
    inside = tuple(sorted(step for step in steps if after < step < phase.end_step))
    return replace(phase, update_from=first, updates=inside)


def _check_steps(config: GaPConfig, unit: int, phases: Sequence[Phase]) -> None:
    if empty := next((phase for phase in phases if phase.steps < 1), None):
        name = {"dense": "dense_epochs", "explore": "phase_epochs", "finetune": "finetune_epochs"}[empty.kind]
        raise ValueError(
            f'{name}={getattr(config, name)}: with {unit} steps in an epoch a phase has no step. Raise "{name}".'
        )


def _check(config: GaPConfig, phases: Sequence[Phase]) -> None:
    """Refuse a run whose updates fall inside no phase."""
    name = f"update_{'epochs' if config.in_epochs else 'steps'}"
    if config.updates and phases and not any(phase.updates for phase in phases):
        raise ValueError(
            f"{name}={getattr(config, name)}: no update falls inside a phase, so masks would change at boundaries "
            f'alone. Lower "{name}", or lengthen what is updated.'
        )
    if config.prune_ramp and phases and not any(phase.updates[-1:] > (phase.update_from,) for phase in phases):
        raise ValueError(
            f"prune_ramp={config.prune_ramp}: no update falls inside it, so that it has no effect. Raise it, or lower "
            f'"{name}".'
        )
    if config.grow != "dense" and not any(_grows(phase) for phase in phases):
        raise ValueError(
            f'grow="{config.grow}" with grow_share={config.grow_share}, rounds={config.rounds} and '
            f'pattern="{config.pattern}": no phase grows a weight (with N:M it is a whole one of each group, or none). '
            'Raise "grow_share" or "rounds", or set "grow" to "dense".'
        )


def _grows(phase: Phase) -> bool:
    """True if a dense partition has more weights in the first step of a phase than a sparse one."""
    sparse, step = replace(phase, dense=frozenset()), phase.first_step
    return phase.growth < 1 and any(phase.pruned(k, step) < sparse.pruned(k, step) for k in phase.dense)


def _warmup(config: GaPConfig, unit: int) -> int:
    """Return the steps over which the steps of grown weights rise; 0: they do not."""
    steps = _round(unit * (length := _exact(config, "regrow_warmup")))
    if length and steps < 2:
        name = f"regrow_warmup_{'epochs' if config.in_epochs else 'steps'}"
        raise ValueError(
            f"{name}={getattr(config, name)}: is less than 2 steps, and the last of them has its full size, so that it "
            "has no effect. Raise or remove it."
        )
    return steps


def _check_size(config: GaPConfig) -> None:
    """Refuse a schedule that would fill the memory."""
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
    """Return the steps in one unit of the config's lengths."""
    if not config.in_epochs:
        return 1
    if steps_per_epoch is None or steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch}: must be the number of applied steps in an epoch, because the config "
            'counts in epochs. Pass steps_per_epoch, or set "phase_steps" and "finetune_steps".'
        )
    return steps_per_epoch


def _exact(config: GaPConfig, name: str) -> Fraction:
    """Return a length in the config's unit, exactly as the decimal number in the config."""
    value = getattr(config, f"{name}_{'epochs' if config.in_epochs else 'steps'}")
    return Fraction(repr(value)) if value else Fraction(0)


def _round(x: Fraction) -> int:
    return int(x + Fraction(1, 2))
