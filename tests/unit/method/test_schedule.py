"""Phases, their boundaries and densities, against figures computed by hand."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from gap_ds.method import methods
from gap_ds.method.config import GaPConfig
from gap_ds.method.methods import METHODS
from gap_ds.method.schedule import Phase, Schedule, build

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
        Phase(0, 0, 0, 10, frozenset({0}), "explore", frozenset({0})),
        Phase(1, 0, 10, 10, frozenset({1}), "explore", frozenset({1})),
        Phase(2, 0, 20, 10, frozenset({2}), "explore", frozenset({2})),
        Phase(3, 1, 30, 10, frozenset({0}), "explore", frozenset({0})),
        Phase(4, 1, 40, 10, frozenset({1}), "explore", frozenset({1})),
        Phase(5, 1, 50, 10, frozenset({2}), "explore", frozenset({2})),
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
    settings = config(partitions=kappa, partition_order="random", rounds=40, seed=seed)
    phases = dense(build(settings))
    assert phases == dense(build(settings))
    explored = [partition for (partition,) in phases[:-1]]
    assert len(explored) == 40 * kappa and phases[-1] == [] and explored[0] == 0
    assert set(explored) == set(range(kappa))
    assert all(a != b for a, b in itertools.pairwise(explored))
    if kappa > 2:  # with two, taking turns is all that is left
        assert phases != dense(build(config(partitions=kappa, rounds=40)))
        assert phases != dense(build(config(partitions=kappa, partition_order="random", rounds=40, seed=seed + 1)))


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
    changes |= {"partition_order": order} if method == "cyclic" else {}
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


def test_finetuning_that_is_rounded_to_nothing() -> None:
    """0.1 epochs of 4 steps. A worker of parallel GaP that does not fine-tune is not asked for it."""
    with pytest.raises(ValueError, match=r'finetune_epochs=0\.1: with 4 steps in an epoch a phase .*"finetune_epochs"'):
        build(epochs(finetune_epochs=0.1), steps_per_epoch=4)
    assert build(epochs(finetune_epochs=0), steps_per_epoch=4).phases[-1].steps == 0
    assert build(epochs(method="parallel", finetune_epochs=0.1), steps_per_epoch=4, worker=1).phases[-1].steps == 0


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


# -- the other methods, by hand ------------------------------------------------------------------------------------

ALONE: dict[str, Any] = {"partitions": None, "rounds": None}


@pytest.mark.parametrize("method", METHODS)
def test_every_record_has_a_source_and_an_example_of_its_phases(method: str) -> None:
    assert METHODS[method].name == method and METHODS[method].summary
    assert re.search(r"(19|20)\d\d", METHODS[method].source) or method in ("static", "dense")
    assert re.search(rf"\n{method} +\(\d, \[", methods.__doc__ or "")


def test_acdc_is_dsd_in_short_phases() -> None:
    acdc = build(config(method="acdc", partitions=None, dense_steps=7))
    assert [(phase.kind, phase.round, phase.steps, sorted(phase.dense)) for phase in acdc.phases] == [
        ("dense", 0, 7, [0]),
        ("explore", 0, 10, [0]),
        ("explore", 0, 10, []),
        ("explore", 1, 10, [0]),
        ("explore", 1, 10, []),
        ("finetune", 2, 15, []),
    ]
    assert [sorted(phase.leaving) for phase in acdc.phases] == [[], [0], [], [0], [], []]
    assert build(config(method="acdc", partitions=None)) == build(config(method="dsd", partitions=None))


def test_one_shot() -> None:
    assert build(config(method="one_shot", **ALONE)).phases == (
        Phase(0, 0, 0, 10, frozenset({0}), "explore", frozenset({0})),
        Phase(1, 1, 10, 15, frozenset(), "finetune"),
    )


def test_gradual() -> None:
    settings = config(method="gradual", **ALONE, dense_steps=6, update_steps=3)
    assert build(settings).phases == (
        Phase(0, 0, 0, 6, frozenset({0}), "dense"),
        Phase(1, 0, 6, 10, frozenset({0}), "explore", frozenset({0}), 6, (9, 12, 15)),
        Phase(2, 1, 16, 15, frozenset(), "finetune"),
    )
    # 400 weights at 80 %: after 3, 6 and 9 of 10 steps (7/10)^3, (4/10)^3 and (1/10)^3 of the 320 are left.
    schedule = build(settings)
    densities = [1.0] * 9 + [(80 + 320 * f**3) / 400 for f in (0.7, 0.4, 0.1) for _ in range(3)][:7] + [0.2] * 15
    assert [schedule.density_at(s, [80], [400]) for s in range(31)] == pytest.approx(densities, abs=1e-15)
    assert schedule.mean_density([80], [400]) == pytest.approx(sum(densities) / 31, abs=1e-15)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_drop_and_grow(method: str) -> None:
    schedule = build(config(method=method, **ALONE, phase_steps=20, update_steps=6))
    assert schedule.phases == (
        Phase(0, 0, 0, 20, frozenset(), "explore", frozenset(), 0, (6, 12, 18)),
        Phase(1, 1, 20, 15, frozenset(), "finetune"),
    )
    assert schedule.mean_density([80], [400]) == pytest.approx(0.2, abs=1e-15)
    assert all(schedule.phases[0].is_masked(0, step) for step in range(20))


def test_parallel() -> None:
    """Worker i has partition i dense in every round, and worker 0 alone fine-tunes."""
    for worker in range(3):
        schedule = build(config(method="parallel"), worker=worker)
        own = frozenset({worker})
        assert schedule.phases == (
            Phase(0, 0, 0, 10, own, "explore", own),
            Phase(1, 1, 10, 10, own, "explore", own),
            Phase(2, 2, 20, 15 if worker == 0 else 0, frozenset(), "finetune"),
        )
    keep, numel = [20, 40, 60], [100, 200, 300]
    # Worker 0: 20 steps at 200 of 600, 15 at 120; worker 2: 20 steps at 360 of 600.
    assert build(config(method="parallel")).mean_density(keep, numel) == pytest.approx((4000 + 1800) / (600 * 35))
    assert build(config(method="parallel"), worker=2).mean_density(keep, numel) == pytest.approx(0.6, abs=1e-15)


def test_workers_of_parallel_change_places_at_the_same_steps() -> None:
    settings = config(method="parallel", dense_steps=8, prune_ramp=0.5, update_steps=2)
    schedules = [build(settings, worker=worker) for worker in range(3)]
    assert len({str(starts(schedule)) for schedule in schedules}) == 1
    assert [sorted(phase.leaving) for phase in schedules[1].phases] == [[0, 2], [1], [1], []]
    assert [phase.updates for phase in schedules[1].phases] == [(6,), (15, 17), (25, 27), ()]
    # The first phase is the same for all, but for what each of them prunes in it.
    assert all(schedule.phases[0].dense == {0, 1, 2} for schedule in schedules)


def test_a_ramp_prunes_what_leaves_in_the_last_part_of_its_phase() -> None:
    schedule = build(config(prune_ramp=0.4, update_steps=1, rounds=1))
    assert [(phase.update_from, phase.updates) for phase in schedule.phases] == [
        (6, (7, 8, 9)),
        (16, (17, 18, 19)),
        (26, (27, 28, 29)),
        (0, ()),
    ]
    first = schedule.phases[0]
    assert [first.progress(step) for step in (6, 7, 9, 10)] == [0, Fraction(1, 4), Fraction(3, 4), 1]
    assert [first.is_masked(0, step) for step in (0, 6, 7, 9)] == [False, False, True, True]
    assert all(first.is_masked(k, step) for k in (1, 2) for step in range(10))
    # dsd: only its dense phases are left by something; dense partitions that stay dense are not pruned.
    dsd = build(config(method="dsd", partitions=None, dense_steps=5, prune_ramp=0.2, update_steps=1))
    assert [phase.updates for phase in dsd.phases] == [(), (14,), (), (34,), (), ()]


# -- any method, against a simulation step by step -----------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A phase of the simulation: [first, end) in steps."""

    kind: str
    first: int
    end: int
    dense: frozenset[int]
    leaving: frozenset[int]
    updates: tuple[int, ...]
    origin: int


def half_up(x: Decimal) -> int:
    return int((x + Decimal("0.5")).to_integral_value(ROUND_FLOOR))


def simulated(settings: dict[str, Any], unit: int, worker: int) -> list[Span]:
    """The phases of a run, from its description in words (docstring of `schedule.build`) and in exact decimals."""
    method, kappa = settings["method"], settings.get("partitions", 1)
    length, gap = Decimal(repr(settings["phase_epochs"])), Decimal(repr(settings.get("update_epochs", 0)))
    ramp = Decimal(1) if method in ("gradual", "granet") else Decimal(repr(settings.get("prune_ramp", 0.0)))
    every, none = set(range(kappa)), set[int]()
    rounds = settings.get("rounds", 1)
    explored: list[set[int]] = {
        "cyclic": [{k} for _ in range(rounds) for k in range(kappa)],
        "parallel": [{worker} for _ in range(rounds)],
        "dsd": [every, none] * rounds,
        "acdc": [every, none] * rounds,
        "one_shot": [every],
        "gradual": [every],
        "granet": [every],
        "rigl": [none],
        "set": [none],
        "static": [none] * (kappa * rounds),
        "dense": [every] * (kappa * rounds),
    }[method]
    rows = [("explore", length, dense) for dense in explored]
    if settings.get("dense_epochs"):
        rows.insert(0, ("dense", Decimal(repr(settings["dense_epochs"])), every))
    finetune = Decimal(repr(settings["finetune_epochs"])) if method != "parallel" or worker == 0 else Decimal(0)
    rows.append(("finetune", finetune, every if method == "dense" else none))
    spans, start = [], Decimal(0)
    for p, (kind, part, dense) in enumerate(rows):
        end = start + part
        after = rows[p + 1][2] if p + 1 < len(rows) else dense
        leaving = dense - after
        if method == "parallel" and kind == "explore":
            leaving = dense  # pruned for the exchange, even if it is grown again at once
        moving = (method in ("rigl", "set") and kind == "explore") or bool(leaving and ramp)
        if method in ("gradual", "granet") and kind != "explore":
            moving = False
        begin = start if method in ("rigl", "set") else end - ramp * (part if leaving else 0)
        first, last, origin, times = half_up(unit * start), half_up(unit * end), half_up(unit * begin), list[int]()
        if settings.get("target") == "rising":  # the level moves in all phases between the dense one and the last
            moving, begin, gradual = kind == "explore", start, origin
            origin = first
        while moving and (begin := begin + gap) <= end:
            times.append(half_up(unit * begin))
        inside = tuple(sorted({t for t in times if origin < t < last}))
        if settings.get("target") == "rising":
            origin = gradual
        spans.append(Span(kind, first, last, frozenset(dense), frozenset(leaving), inside, origin))
        start = end
    return spans


def simulated_densities(spans: list[Span], keep: list[int], numel: list[int], settings: dict[str, Any]) -> list[float]:
    """The density in every step: partitions grow and are pruned one event after the other."""
    found, active = [], [Fraction(0)] * len(keep)
    fixed, rising = settings["method"] in ("rigl", "set"), settings.get("target") == "rising"
    explored = [span for span in spans if span.kind == "explore"]
    begin, end = explored[0].first, explored[-1].end

    def pruned(step: int) -> Fraction:
        """What sparse partitions lack."""
        return 1 - Fraction(max(end - step, 0), end - begin) ** 3 if rising else Fraction(1)

    for span in spans:
        # By hand: share / 2 (1 + cos(pi t / T)).
        share = Fraction(1)
        if "grow" in settings and span.kind == "explore":
            share = Fraction(
                settings["grow_share"] / 2 * (1 + math.cos(math.pi * (span.first - begin) / (end - begin)))
            )
        entered = [(1 - share) * (numel[k] - keep[k]) * pruned(span.first) for k in range(len(keep))]
        for k in range(len(keep)):
            lacks = entered[k] if k in span.dense else (numel[k] - keep[k]) * pruned(span.first)
            active[k] = numel[k] - lacks
        for step in range(span.first, span.end):
            if step in span.updates and not fixed:
                for k in range(len(keep)):
                    if k in span.leaving and step > span.origin:
                        left = Fraction(span.end - step, span.end - span.origin) ** 3
                        lacks = entered[k] * left + (numel[k] - keep[k]) * pruned(step) * (1 - left)
                        active[k] = numel[k] - lacks
                    elif k not in span.dense:
                        active[k] = numel[k] - (numel[k] - keep[k]) * pruned(step)
            found.append(float(sum(active) / sum(numel)))
    return found


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A run of any method in epochs of two decimals, and steps in an epoch: a multiple of 100, or a crooked number."""
    method = draw(
        st.sampled_from("cyclic parallel dsd acdc one_shot gradual granet rigl set static dense".split()),
        label="method",
    )

    def hundredths(low: int, high: int) -> st.SearchStrategy[float]:
        return st.integers(low, high).map(lambda n: n / 100)

    settings: dict[str, Any] = {"method": method, "sparsity": 0.0 if method == "dense" else 0.8}
    settings |= {"phase_epochs": draw(hundredths(1, 60)), "finetune_epochs": draw(hundredths(1, 40))}
    if method in ("cyclic", "parallel", "static", "dense"):
        settings["partitions"] = draw(st.integers(2, 4))
    if method not in ("one_shot", "gradual", "granet", "rigl", "set"):
        settings["rounds"] = draw(st.integers(1, 3))
    if method not in ("one_shot", "rigl", "set", "static") and draw(st.booleans()):
        settings["dense_epochs"] = draw(hundredths(0, 50))
    if method in ("cyclic", "parallel", "dsd", "acdc") and draw(st.booleans()):
        settings["prune_ramp"] = draw(st.sampled_from([0.01, 0.25, 0.3, 0.5, 0.75, 1.0]))
    if method in ("cyclic", "parallel") and draw(st.booleans()):
        settings["target"] = "rising"
    if method in ("cyclic", "parallel") and draw(st.booleans()):
        settings |= {"grow": draw(st.sampled_from(["gradient", "random"])), "grow_share": draw(hundredths(1, 99))}
    if method in ("gradual", "granet", "rigl", "set") or {"prune_ramp", "target"} & settings.keys():
        settings["update_epochs"] = draw(hundredths(1, 30))
    return settings, draw(st.sampled_from([100, 100, 200, 137, 101]))


EVERY_RUN = settings(PROPERTY, max_examples=250)


def sizes(kappa: int) -> tuple[list[int], list[int]]:
    """Budgets and weights of each partition: 80 % to be pruned, no two alike."""
    return [20 * (k + 1) for k in range(kappa)], [100 * (k + 1) for k in range(kappa)]


def built(settings: dict[str, Any], unit: int, worker: int = 0) -> Schedule:
    """The schedule. A run that requires updates and has none must be refused."""
    loaded = GaPConfig.load(settings)
    spans = simulated(settings, unit, worker)
    if loaded.updates and len(spans) > 1 and not any(span.updates for span in spans):
        with pytest.raises(ValueError, match=r"update_epochs=.*: no update falls inside a phase, so masks would"):
            build(loaded, unit, worker)
        reject()
    try:
        return build(loaded, unit, worker)
    except ValueError as error:
        if re.search(r"^prune_ramp=.* has no effect|no phase grows a weight", str(error)):
            reject()
        raise


@EVERY_RUN
@given(runs(), st.integers(0, 3))
def test_every_method_is_its_simulation(run: tuple[dict[str, Any], int], worker: int) -> None:
    settings, unit = run
    loaded = GaPConfig.load(settings)
    worker = worker % loaded.kappa if loaded.method == "parallel" else 0
    schedule, expected = built(settings, unit, worker), simulated(settings, unit, worker)
    assert len(schedule.phases) == len(expected)
    for index, (phase, span) in enumerate(zip(schedule.phases, expected, strict=True)):
        assert (phase.index, phase.kind, phase.first_step, phase.end_step) == (index, span.kind, span.first, span.end)
        assert (phase.dense, phase.leaving, phase.updates) == (span.dense, span.leaving, span.updates)
        assert phase.update_from == (span.origin if span.updates else phase.update_from)
    assert schedule.total_steps == expected[-1].end

    keep, numel = sizes(loaded.kappa)
    if loaded.method == "dense":
        keep = numel
    densities = simulated_densities(expected, keep, numel, settings)
    found = [schedule.density_at(step, keep, numel) for step in range(schedule.total_steps)]
    off = 1e-9 if "grow" in settings else 1e-12  # a share has nine decimals
    assert found == pytest.approx(densities, abs=off)
    assert schedule.mean_density(keep, numel) == pytest.approx(sum(densities) / len(densities), abs=off)
    for phase, average in zip(schedule.phases, schedule.density(keep, numel), strict=True):
        if phase.steps:
            of_phase = densities[phase.first_step : phase.end_step]
            assert average == pytest.approx(sum(of_phase) / len(of_phase), abs=off)


@EVERY_RUN
@given(runs(), st.integers(0, 3))
def test_every_schedule_is_whole(run: tuple[dict[str, Any], int], worker: int) -> None:
    settings, unit = run
    loaded = GaPConfig.load(settings)
    worker = worker % loaded.kappa if loaded.method == "parallel" else 0
    schedule, step = built(settings, unit, worker), 0
    for index, phase in enumerate(schedule.phases):
        assert (phase.index, phase.first_step) == (index, step)
        assert phase.steps >= 1 or phase is schedule.phases[-1]
        assert all(phase.first_step < update < phase.end_step for update in phase.updates)
        assert all(a < b for a, b in itertools.pairwise(phase.updates))
        assert phase.first_step <= phase.update_from <= phase.end_step or not phase.updates
        assert phase.leaving <= phase.dense <= set(range(loaded.kappa))
        ramped = [update for update in phase.updates if update > phase.update_from]
        assert ramped == list(phase.updates) or loaded.target == "rising"
        progress = [phase.progress(update) for update in ramped]
        assert progress == sorted(set(progress)) and all(0 < x < 1 for x in progress)
        assert bool(phase.updates) <= loaded.updates
        if ramped:
            assert phase.progress(phase.end_step) == 1 and phase.progress(phase.update_from) == 0
        for at in {phase.first_step, *phase.updates, phase.end_step - 1} if phase.steps else ():
            assert schedule.phase_at(at) is phase
            for k in range(loaded.kappa):
                pruned = k in phase.leaving and any(update <= at for update in ramped)
                grown = loaded.grow != "dense" and phase.kind == "explore"
                assert phase.is_masked(k, at) == (k not in phase.dense or pruned or grown)
        step = phase.end_step
    assert schedule.phases[-1].kind == "finetune" and not schedule.phases[-1].updates
    assert schedule.total_steps == step and schedule.phase_at(step + 1000) is schedule.phases[-1]


@EVERY_RUN
@given(runs(), st.integers(0, 3))
def test_densities_lie_between_the_target_and_one(run: tuple[dict[str, Any], int], worker: int) -> None:
    settings, unit = run
    loaded = GaPConfig.load(settings)
    worker = worker % loaded.kappa if loaded.method == "parallel" else 0
    schedule = built(settings, unit, worker)
    keep, numel = sizes(loaded.kappa)
    keep = numel if loaded.method == "dense" else keep
    target = sum(keep) / sum(numel)
    for phase in schedule.phases:
        values = [schedule.density_at(s, keep, numel) for s in range(phase.first_step, phase.end_step)]
        assert all(target - 1e-12 <= value <= 1 for value in values)
        assert values == sorted(values, reverse=True)  # inside a phase nothing grows
        if phase.kind == "finetune":
            assert values == pytest.approx([target] * len(values), abs=1e-15)
            assert schedule.density_at(schedule.total_steps + 7, keep, numel) == pytest.approx(target, abs=1e-15)
        if phase.kind == "dense":
            before = [v for s, v in enumerate(values, phase.first_step) if not phase.updates or s < phase.updates[0]]
            assert before == [1.0] * len(before)
    average = schedule.mean_density(keep, numel)
    assert target - 1e-12 <= average <= 1
    if loaded.method in ("rigl", "set", "static"):
        assert average == pytest.approx(target, abs=1e-12)


@EVERY_RUN
@given(runs())
def test_the_dense_twin_of_every_method_has_its_boundaries(run: tuple[dict[str, Any], int]) -> None:
    settings, unit = run
    loaded = GaPConfig.load(settings)
    sparse, dense = built(settings, unit), build(loaded.as_dense(), unit)
    assert starts(dense) == starts(sparse)
    assert [phase.kind for phase in dense.phases] == [phase.kind for phase in sparse.phases]
    assert dense.total_steps == sparse.total_steps
    assert all(phase.dense == {0} and not phase.updates for phase in dense.phases)
    assert dense.mean_density([100], [100]) == 1.0


@EVERY_RUN
@given(runs(), st.integers(0, 3))
def test_steps_and_epochs_give_the_same_schedule(run: tuple[dict[str, Any], int], worker: int) -> None:
    """With a hundred steps, or a multiple of it, to an epoch, two decimals of an epoch are whole steps."""
    settings, unit = run
    unit = 100 * -(-unit // 100)
    in_steps = {key: value for key, value in settings.items() if not key.endswith("_epochs")}
    for name in ("dense", "phase", "update", "finetune"):
        if f"{name}_epochs" in settings:
            in_steps[f"{name}_steps"] = round(100 * settings[f"{name}_epochs"]) * (unit // 100)
    one, other = GaPConfig.load(settings), GaPConfig.load(in_steps)
    worker = worker % one.kappa if one.method == "parallel" else 0
    assert built(settings, unit, worker) == build(other, None, worker) == build(other, 7, worker)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rigl", **ALONE, "update_steps": 10},
        {"method": "gradual", **ALONE, "update_steps": 20},
        {"method": "dsd", "partitions": None, "prune_ramp": 0.01, "update_steps": 1},
    ],
)
def test_updates_that_would_never_come_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'no update falls inside a phase.* Lower "update_steps", or lengthen'):
        build(config(**changes))


def test_no_such_worker() -> None:
    with pytest.raises(ValueError, match="worker 3: must lie in 0 to 2"):
        build(config(method="parallel"), worker=3)


def test_a_first_dense_phase_without_a_step() -> None:
    settings = config(phase_steps=None, finetune_steps=None, phase_epochs=1, finetune_epochs=1, dense_epochs=0.1)
    with pytest.raises(ValueError, match=r'dense_epochs=0\.1: with 4 steps in an epoch a phase has no step.*"dense_ep'):
        build(settings, steps_per_epoch=4)


def test_updates_closer_than_a_step_are_one() -> None:
    settings = config(
        method="rigl",
        **ALONE,
        **{"phase_steps": None, "finetune_steps": None, "phase_epochs": 1, "finetune_epochs": 1, "update_epochs": 0.01},
    )
    assert build(settings, steps_per_epoch=10).phases[0].updates == tuple(range(1, 10))


def test_a_worker_without_a_step_has_a_mean_density() -> None:
    schedule = build(config(method="parallel", rounds=0), worker=1)
    assert schedule.total_steps == 0
    assert schedule.density([20, 40, 60], [100, 200, 300]) == [0.2]
    assert schedule.mean_density([20, 40, 60], [100, 200, 300]) == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 10**9}, "rounds=1000000000: makes 3000000000 phases, must make at most 1000000"),
        ({"rounds": 0, "partitions": 10**9}, "partitions=1000000000: must be at most 1000000"),
        (
            {"method": "rigl", **ALONE, "phase_steps": 10**12, "update_steps": 1},
            "update_steps=1: makes more than 1000000 updates in a phase. Raise it",
        ),
    ],
)
def test_a_slip_of_the_keyboard_does_not_fill_the_memory(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "1:2", "sparsity": 0.5, "grow": "gradient"}, "no phase grows a weight"),
        ({"rounds": 0, "dense_steps": 5, "grow": "random"}, "no phase grows a weight"),
        ({"target": "rising", "prune_ramp": 0.1, "update_steps": 5}, "no update falls inside it"),
        ({"regrow_warmup_steps": 1}, "is less than 2 steps"),
    ],
)
def test_what_would_have_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    data = {"sparsity": 0.8, "partitions": 2, "rounds": 2, "phase_steps": 10, "finetune_steps": 2, **changes}
    with pytest.raises(ValueError, match=message):
        build(GaPConfig.load(data))
