"""Phases, their boundaries and densities, against figures worked out by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_ds.config import GaPConfig
from gap_ds.schedule import Phase, Schedule, build

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def config(**changes: Any) -> GaPConfig:
    base = {"sparsity": 0.8, "partitions": 3, "phase_steps": 10, "rounds": 2, "finetune_steps": 15}
    return GaPConfig.load({key: value for key, value in (base | changes).items() if value is not None})


def dense(schedule: Schedule) -> list[list[int]]:
    return [sorted(phase.dense) for phase in schedule.phases]


def starts(schedule: Schedule) -> list[int]:
    return [phase.first_step for phase in schedule.phases]


def test_cyclic() -> None:
    schedule = build(config())
    assert schedule.phases == (
        Phase(0, 0, 0, 10, frozenset({0}), "explore"),
        Phase(1, 0, 10, 10, frozenset({1}), "explore"),
        Phase(2, 0, 20, 10, frozenset({2}), "explore"),
        Phase(3, 1, 30, 10, frozenset({0}), "explore"),
        Phase(4, 1, 40, 10, frozenset({1}), "explore"),
        Phase(5, 1, 50, 10, frozenset({2}), "explore"),
        Phase(6, 2, 60, 15, frozenset(), "finetune"),
    )
    assert schedule.total_steps == 75
    assert str(schedule.phases[4]) == "phase 4 (explore, round 1, dense 1)"
    assert str(schedule.phases[6]) == "phase 6 (finetune, round 2, dense none)"


def test_written_partitions_count() -> None:
    assert dense(build(config(partitions=[["a"], ["b", "c"]], rounds=1))) == [[0], [1], []]


def test_dsd() -> None:
    schedule = build(config(method="dsd", partitions=None))
    assert dense(schedule) == [[0], [], [0], [], []]
    assert starts(schedule) == [0, 10, 20, 30, 40]
    assert [phase.round for phase in schedule.phases] == [0, 0, 1, 1, 2]
    assert schedule.total_steps == 55


def test_static_and_dense_have_the_same_boundaries_as_cyclic() -> None:
    cyclic = build(config())
    static = build(config(method="static"))
    without = build(config(method="dense", sparsity=0))
    assert starts(cyclic) == starts(static) == starts(without)
    assert dense(static) == [[]] * 7
    assert dense(without) == [[0, 1, 2]] * 7
    for other in (config(), config(method="dsd", partitions=None), config(method="static"), config(rounds=0)):
        assert starts(build(other.as_dense())) == starts(build(other))
        assert build(other.as_dense()).total_steps == build(other).total_steps


@pytest.mark.parametrize("kappa", [2, 3, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_order(kappa: int, seed: int) -> None:
    settings = config(partitions=kappa, order="random", rounds=40, seed=seed)
    phases = dense(build(settings))
    assert phases == dense(build(settings))
    explored = [partition for (partition,) in phases[:-1]]
    assert len(explored) == 40 * kappa and phases[-1] == [] and explored[0] == 0
    assert set(explored) == set(range(kappa))
    assert all(a != b for a, b in itertools.pairwise(explored))
    if kappa > 2:  # with two, taking turns is all that is left
        assert phases != dense(build(config(partitions=kappa, rounds=40)))
        assert phases != dense(build(config(partitions=kappa, order="random", rounds=40, seed=seed + 1)))


def test_without_finetuning_there_is_a_last_boundary() -> None:
    schedule = build(config(finetune_steps=0))
    assert schedule.phases[-1] == Phase(6, 2, 60, 0, frozenset(), "finetune")
    assert schedule.total_steps == 60
    assert schedule.phase_at(59).dense == {2}
    assert schedule.phase_at(60).dense == frozenset()


def test_without_rounds_there_is_only_finetuning() -> None:
    schedule = build(config(rounds=0))
    assert schedule.phases == (Phase(0, 0, 0, 15, frozenset(), "finetune"),)


def epochs(**changes: Any) -> GaPConfig:
    return config(phase_steps=None, finetune_steps=None, **({"phase_epochs": 1, "finetune_epochs": 2} | changes))


def test_epochs() -> None:
    schedule = build(epochs(), steps_per_epoch=7)
    assert starts(schedule) == [0, 7, 14, 21, 28, 35, 42]
    assert schedule.total_steps == 7 * 8


def test_fractions_of_an_epoch_do_not_drift() -> None:
    """0.1 epochs of 7 steps are 0.7 steps: every phase begins at the rounded multiple, half a step at most away."""
    schedule = build(epochs(phase_epochs=0.3, rounds=400, finetune_epochs=0.5), steps_per_epoch=7)
    for p, phase in enumerate(schedule.phases):
        exact = Fraction(3, 10) * 7 * p
        assert phase.first_step == (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
        assert abs(phase.first_step - exact) <= Fraction(1, 2)
    assert schedule.total_steps == 2524  # 360.5 epochs are 2523.5 steps


@PROPERTY
@given(
    st.sampled_from(["cyclic", "dsd", "static", "dense"]),
    st.integers(2, 5),
    st.integers(0, 6),
    st.integers(1, 400).map(lambda n: n / 100),
    st.integers(1, 300).map(lambda n: n / 100),
    st.integers(100, 1000),
    st.sampled_from(["cyclic", "random"]),
)
def test_phases_have_no_gaps(
    method: str, kappa: int, rounds: int, length: float, finetune: float, unit: int, order: str
) -> None:
    changes: dict[str, Any] = {"method": method, "rounds": rounds}
    changes |= {"sparsity": 0} if method == "dense" else {}
    changes |= {"order": order} if method == "cyclic" else {}
    changes |= {"partitions": None if method == "dsd" else kappa}
    settings = epochs(phase_epochs=length, finetune_epochs=finetune, **changes)
    schedule = build(settings, steps_per_epoch=unit)
    assert schedule == build(settings, steps_per_epoch=unit)
    step = 0
    for index, phase in enumerate(schedule.phases):
        assert (phase.index, phase.first_step, phase.end_step) == (index, step, step + phase.steps)
        last = index == len(schedule.phases) - 1
        assert phase.kind == ("finetune" if last else "explore")
        assert phase.steps >= 1 or last
        if phase.steps:
            assert schedule.phase_at(step) is schedule.phase_at(phase.end_step - 1) is phase
        if method == "cyclic":
            assert len(phase.dense) == (0 if last else 1)
        step = phase.end_step
    assert schedule.total_steps == step
    assert schedule.phase_at(step + 1000) is schedule.phases[-1]
    exact = unit * (Fraction(repr(length)) * (len(schedule.phases) - 1) + Fraction(repr(finetune)))
    assert abs(schedule.total_steps - exact) <= Fraction(1, 2)
    per_round = 2 if method == "dsd" else kappa
    assert [phase.round for phase in schedule.phases] == [p // per_round for p in range(rounds * per_round)] + [rounds]


def test_a_phase_without_a_step() -> None:
    with pytest.raises(ValueError, match=r'phase_epochs=0\.1: with 4 steps in an epoch a phase has no step.*"phase_ep'):
        build(epochs(phase_epochs=0.1), steps_per_epoch=4)


@pytest.mark.parametrize("steps", [None, 0, -3])
def test_epochs_need_their_length(steps: int | None) -> None:
    with pytest.raises(ValueError, match=rf"steps_per_epoch={steps}: must be the number of applied steps in an epoch"):
        build(epochs(), steps_per_epoch=steps)


def test_steps_do_not() -> None:
    assert build(config(), steps_per_epoch=7) == build(config())


def test_density() -> None:
    """Partitions of 100, 200 and 300 weights at 80 %: 120 kept; a dense one adds 80, 160 or 240."""
    keep, numel = [20, 40, 60], [100, 200, 300]
    schedule = build(config())
    by_phase = [200 / 600, 280 / 600, 360 / 600] * 2 + [120 / 600]
    assert schedule.density(keep, numel) == pytest.approx(by_phase, abs=1e-15)
    # 10 steps each, 15 of fine-tuning: (2 * (200 + 280 + 360) * 10 + 120 * 15) / (600 * 75) = 18600 / 45000
    assert schedule.mean_density(keep, numel) == pytest.approx(18_600 / 45_000, abs=1e-15)
    assert build(config(method="static")).mean_density(keep, numel) == pytest.approx(0.2, abs=1e-15)
    assert build(config(method="dense", sparsity=0)).mean_density(numel, numel) == pytest.approx(1.0, abs=1e-15)
    # dsd: 20 steps dense, 20 + 15 sparse
    dsd = build(config(method="dsd", partitions=None))
    assert dsd.mean_density([120], [600]) == pytest.approx((20 + 35 * 0.2) / 55, abs=1e-15)
