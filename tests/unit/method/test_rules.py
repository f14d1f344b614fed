"""Rules: the update of an entry at every kind of boundary, and at every update inside a phase."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from decimal import ROUND_FLOOR, Decimal, localcontext
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Entry
from gap_ds.method.rules import (
    DropAndGrow,
    Grow,
    Keep,
    PruneByMagnitude,
    PruneRandomly,
    Update,
    needs_gradient,
    rule,
    stages,
)
from gap_ds.method.schedule import Phase, build

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
ALONE: dict[str, Any] = {"partitions": None, "rounds": None}


def config(**changes: Any) -> GaPConfig:
    base = {"sparsity": 0.75, "partitions": 3, "phase_steps": 10, "rounds": 2, "finetune_steps": 5}
    return GaPConfig.load({key: value for key, value in (base | changes).items() if value is not None})


def phase(*dense: int) -> Phase:
    return Phase(0, 0, 0, 10, frozenset(dense), "explore")


ENTRY = Entry("fc.weight", (4, 4), partition=1, keep=4)


@pytest.mark.parametrize(
    ("before", "after", "update"),
    [
        ((0,), (1,), Grow()),
        ((), (1,), Grow()),
        ((1,), (1,), Keep()),
        ((0, 1), (1, 2), Keep()),
        ((1,), (2,), PruneByMagnitude(4)),
        ((0, 1, 2), (), PruneByMagnitude(4)),
        ((0,), (2,), Keep()),
        ((), (), Keep()),
    ],
)
def test_boundary(before: tuple[int, ...], after: tuple[int, ...], update: Update) -> None:
    other = replace(phase(*after), first_step=10)  # at a boundary the phases differ, even with the same partitions
    assert rule(config())(ENTRY, phase(*before), other, 10) == update


@pytest.mark.parametrize(("init", "update"), [("random", PruneRandomly(4)), ("magnitude", PruneByMagnitude(4))])
def test_first_masks(init: str, update: Update) -> None:
    assert rule(config(mask_init=init))(ENTRY, None, phase(0), 0) == update
    assert rule(config(mask_init=init))(ENTRY, None, phase(1), 0) == Grow()


def updates(settings: GaPConfig, partition: int = 0) -> list[Update]:
    """The updates of an entry over a whole run."""
    entry = Entry("fc.weight", (4, 4), partition, keep=4)
    phases: list[Phase | None] = [None, *build(settings).phases]
    return [
        rule(settings)(entry, before, after, after.first_step)
        for before, after in itertools.pairwise(phases)
        if after is not None
    ]


def test_whole_runs() -> None:
    grow, prune, keep, first = Grow(), PruneByMagnitude(4), Keep(), PruneRandomly(4)
    assert updates(config(), 0) == [grow, prune, keep, grow, prune, keep, keep]
    assert updates(config(), 1) == [first, grow, prune, keep, grow, prune, keep]
    assert updates(config(), 2) == [first, keep, grow, prune, keep, grow, prune]
    assert updates(config(method="dsd", partitions=None)) == [grow, prune, grow, prune, keep]
    assert updates(config(method="acdc", partitions=None)) == [grow, prune, grow, prune, keep]
    assert updates(config(method="acdc", partitions=None, dense_steps=3)) == [grow, keep, prune, grow, prune, keep]
    assert updates(config(method="one_shot", **ALONE)) == [grow, prune]
    assert updates(config(method="gradual", **ALONE, update_steps=3)) == [grow, prune]
    assert updates(config(method="gradual", **ALONE, update_steps=3, dense_steps=2)) == [grow, keep, prune]
    for method in ("rigl", "set"):
        assert updates(config(method=method, **ALONE, update_steps=3)) == [first, keep]
        assert updates(config(method=method, **ALONE, update_steps=3, mask_init="magnitude")) == [prune, keep]
    assert updates(config(dense_steps=3), 0) == [grow, keep, prune, keep, grow, prune, keep, keep]
    assert updates(config(dense_steps=3), 1) == [grow, prune, grow, prune, keep, grow, prune, keep]
    assert updates(config(method="static")) == [first] + [keep] * 6
    assert updates(config(method="dense", sparsity=0)) == [grow] + [keep] * 6
    assert updates(config(rounds=0)) == [first]
    assert updates(config(finetune_steps=0), 2)[-1] == prune


@pytest.mark.parametrize("order", ["cyclic", "random"])
def test_one_partition_is_pruned_and_one_grown_at_each_boundary(order: str) -> None:
    settings = config(partition_order=order, rounds=5, partitions=4)
    columns = zip(*(updates(settings, partition) for partition in range(4)), strict=True)
    counts = [Counter(type(update) for update in column) for column in columns]
    assert counts[0] == {Grow: 1, PruneRandomly: 3}
    assert all(count == {PruneByMagnitude: 1, Grow: 1, Keep: 2} for count in counts[1:-1])
    assert counts[-1] == {PruneByMagnitude: 1, Keep: 3}


# -- parallel ------------------------------------------------------------------------------------------------------


def crossed(settings: GaPConfig, partition: int, worker: int) -> list[list[Update]]:
    """The updates of an entry at each boundary of a worker, one stage after the other."""
    entry = Entry("fc.weight", (4, 4), partition, keep=4)
    phases: list[Phase | None] = [None, *build(settings, worker=worker).phases]
    return [
        [rule(settings)(entry, left, entered, after.first_step) for left, entered in stages(settings, before, after)]
        for before, after in itertools.pairwise(phases)
        if after is not None
    ]


def test_workers_prune_all_before_they_grow_their_own_again() -> None:
    grow, prune, keep, first = Grow(), PruneByMagnitude(4), Keep(), PruneRandomly(4)
    settings = config(method="parallel")
    for worker in range(3):
        for partition in range(3):
            own = [[grow], [prune, grow], [prune, keep]]
            others = [[first], [keep, keep], [keep, keep]]
            assert crossed(settings, partition, worker) == (own if partition == worker else others)
    # A first dense phase is no round: what is not the worker's own is pruned, and nothing is exchanged.
    settings = config(method="parallel", dense_steps=3)
    assert crossed(settings, 1, 1) == [[grow], [keep], [prune, grow], [prune, keep]]
    assert crossed(settings, 0, 1) == [[grow], [prune], [keep, keep], [keep, keep]]


@pytest.mark.parametrize("method", ["parallel", "cyclic"])
def test_only_a_round_of_parallel_has_two_stages(method: str) -> None:
    settings = config(method=method, dense_steps=3, prune_ramp=0.5, update_steps=1)
    dense, first, second = build(settings).phases[:3]
    assert stages(settings, None, dense) == [(None, dense)]
    assert stages(settings, dense, first) == [(dense, first)]
    assert stages(settings, first, first) == [(first, first)]  # an update inside the phase
    sparse = replace(second, dense=frozenset())
    two, one = [(first, sparse), (sparse, second)], [(first, second)]
    assert stages(settings, first, second) == (two if method == "parallel" else one)


# -- gradual pruning -----------------------------------------------------------------------------------------------


def ramp_budget(numel: int, keep: int, done: int, steps: int) -> int:
    """Zhu and Gupta's s_f + (s_0 - s_f) (1 - t / T)^3 with s_0 = 0, in whole numbers: weights left, rounded half up."""
    above, below = keep * steps**3 + (numel - keep) * (steps - done) ** 3, steps**3
    return max(1, (2 * above + below) // (2 * below))


@st.composite
def ramps(draw: st.DrawFn) -> tuple[GaPConfig, Entry, int]:
    """A config with a ramp, an entry that its first phase leaves, and where in the phase the ramp begins."""
    steps = draw(st.integers(2, 60))
    numel = draw(st.one_of(st.integers(1, 50), st.integers(10**6, 10**12)))
    entry = Entry("w", (numel, 1), 0, draw(st.integers(1, numel)))
    every = draw(st.integers(1, steps))
    if draw(st.booleans()):
        return config(method="gradual", **ALONE, phase_steps=steps, update_steps=every), entry, 0
    method = draw(st.sampled_from(["cyclic", "parallel", "dsd", "acdc"]))
    percent = draw(st.integers(1, 100))
    changes: dict[str, Any] = {"partitions": None} if method in ("dsd", "acdc") else {}
    loaded = config(method=method, phase_steps=steps, update_steps=every, prune_ramp=percent / 100, **changes)
    begin = (200 * steps - 2 * percent * steps + 100) // 200  # rounded half up
    return loaded, entry, begin


@PROPERTY
@given(ramps())
def test_ramp_budgets(problem: tuple[GaPConfig, Entry, int]) -> None:
    loaded, entry, begin = problem
    length = loaded.phase_steps or 0
    assume(begin + (loaded.update_steps or 0) < length)  # a ramp without an update is refused
    phase, after = build(loaded).phases[:2]
    previous = entry.numel
    for step in phase.updates:
        update = rule(loaded)(entry, phase, phase, step)
        expected = ramp_budget(entry.numel, entry.keep, step - begin, phase.end_step - begin)
        assert update == PruneByMagnitude(expected)
        assert entry.keep <= expected <= previous
        previous = expected
        # An entry that does not leave the phase keeps its mask, or has none, until the boundary.
        assert rule(loaded)(replace(entry, partition=1), phase, phase, step) == Keep()
    boundary = [rule(loaded)(entry, a, b, after.first_step) for a, b in stages(loaded, phase, after)]
    assert boundary[0] == PruneByMagnitude(entry.keep)


def test_a_ramp_by_hand() -> None:
    """1000 weights at 75 %, from step 10 of 20 on, at every second step: 250 + 750 (1 - i / 5)^3."""
    settings = config(phase_steps=20, prune_ramp=0.5, update_steps=2)
    phase = build(settings).phases[0]
    entry = Entry("w", (10, 100), 0, keep=250)
    found = [rule(settings)(entry, phase, phase, step) for step in (12, 14, 16, 18)]
    assert phase.updates == (12, 14, 16, 18)
    assert found == [PruneByMagnitude(634), PruneByMagnitude(412), PruneByMagnitude(298), PruneByMagnitude(256)]


# -- RigL and SET --------------------------------------------------------------------------------------------------


def cosine(x: Decimal) -> Decimal:
    """Its Taylor series, in decimals."""
    total, term = Decimal(1), Decimal(1)
    for n in range(1, 60):
        term *= -x * x / ((2 * n - 1) * (2 * n))
        total += term
    return total


PI = Decimal("3.14159265358979323846264338327950288419716939937510")


def alpha(drop_fraction: float, step: int, steps: int) -> Decimal:
    """RigL's fraction alpha / 2 * (1 + cos(pi t / T)), to nine decimals as the rule's comment promises."""
    with localcontext() as context:
        context.prec = 50
        exact = Decimal(repr(drop_fraction)) / 2 * (1 + cosine(PI * step / steps))
        return exact.quantize(Decimal("1e-9"))


@PROPERTY
@given(
    st.sampled_from(["rigl", "set"]),
    st.one_of(st.integers(1, 60), st.integers(10**5, 10**10)),
    st.integers(1, 99).map(lambda n: n / 100),
    st.sampled_from([0.3, 0.5, 0.1, 0.99, 0.01]),
    st.integers(2, 80),
    st.integers(1, 20),
)
def test_drop_counts(method: str, numel: int, density: float, drop_fraction: float, steps: int, every: int) -> None:
    assume(every < steps)  # without an update inside the phase it is refused
    loaded = config(method=method, **ALONE, phase_steps=steps, update_steps=every, drop_fraction=drop_fraction)
    explore, finetune = build(loaded).phases
    entry = Entry("w", (numel, 1), 0, max(1, math.floor(density * numel)))
    drops = []
    for step in explore.updates:
        with localcontext() as context:
            context.prec = 50
            replaced = int((alpha(drop_fraction, step, steps) * entry.keep).to_integral_value(ROUND_FLOOR))
        expected = min(replaced, numel - entry.keep)
        update = rule(loaded)(entry, explore, explore, step)
        assert update == (DropAndGrow(entry.keep, expected, by_gradient=method == "rigl") if expected else Keep())
        # Never more than there are others to come, nor more than alpha allows; the mask keeps its size.
        assert 0 <= expected <= min(numel - entry.keep, drop_fraction * entry.keep)
        drops.append(expected)
    assert drops == sorted(drops, reverse=True)
    assert rule(loaded)(entry, None, explore, 0) == PruneRandomly(entry.keep)
    assert rule(loaded)(entry, explore, finetune, steps) == Keep()


def test_alpha_falls_to_zero() -> None:
    """10^6 kept weights of 10^7, replaced at every step of 1000 by a cosine from 300,000 to almost none."""
    loaded = config(method="rigl", **ALONE, phase_steps=1000, update_steps=1)
    explore = build(loaded).phases[0]
    entry = Entry("w", (10**4, 10**3), 0, 10**6)
    found = [rule(loaded)(entry, explore, explore, step) for step in explore.updates]
    drops = [update.drop if isinstance(update, DropAndGrow) else 0 for update in found]
    assert len(drops) == 999
    assert drops[0] == 299_999 and drops[499] == 150_000 and drops[-1] == 0
    assert drops[99] == int(150_000 * (1 + math.cos(math.pi / 10)))
    assert all(a >= b for a, b in itertools.pairwise(drops)) and drops[-20] < 300


def test_what_is_dense_by_its_budget_exchanges_nothing() -> None:
    """ERK may leave an entry all of its weights, and a small entry may have too few to replace one."""
    loaded = config(method="rigl", **ALONE, update_steps=1)
    explore = build(loaded).phases[0]
    for entry in (Entry("w", (4, 4), 0, 16), Entry("w", (4, 4), 0, 2)):
        assert {rule(loaded)(entry, explore, explore, step) for step in explore.updates} == {Keep()}
    # One weight is left out: more than one cannot come.
    assert rule(loaded)(Entry("w", (10, 10), 0, 99), explore, explore, 1) == DropAndGrow(99, 1, by_gradient=True)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("rigl", {**ALONE, "update_steps": 3}),
        ("set", {**ALONE, "update_steps": 3}),
        ("gradual", {**ALONE, "update_steps": 3}),
        ("one_shot", ALONE),
        ("cyclic", {"prune_ramp": 0.9, "update_steps": 3}),
        ("parallel", {"prune_ramp": 0.9, "update_steps": 3}),
        ("acdc", {"partitions": None}),
        ("static", {}),
    ],
)
def test_only_rigl_looks_at_gradients(method: str, changes: dict[str, Any]) -> None:
    """Before the steps of its updates; not at boundaries, and not in fine-tuning."""
    settings = config(method=method, **changes)
    schedule = build(settings)
    steps = range(schedule.total_steps + 2)
    steps_with = [step for step in steps if needs_gradient(settings, schedule.phase_at(step), step)]
    assert steps_with == ([3, 6, 9] if method == "rigl" else [])
    entry = Entry("w", (1000, 100), 0, 50_000)  # large enough that every update replaces some
    for phase in schedule.phases:
        for step in phase.updates:
            update = rule(settings)(entry, phase, phase, step)
            assert needs_gradient(settings, phase, step) == (isinstance(update, DropAndGrow) and update.by_gradient)


# -- rising targets and partial growth -----------------------------------------------------------------------------


def test_a_rising_target_by_hand() -> None:
    """750 weights to prune, between steps 0 and 20: at step s (s / 20) by the cubic; partition 0 leaves at step 10."""
    settings = config(partitions=2, rounds=1, target="rising", update_steps=5, dense_steps=None)
    first, second, finetune = build(settings).phases
    zero, one = (Entry("w", (10, 100), k, keep=250) for k in (0, 1))
    update = rule(settings)
    assert [phase.updates for phase in (first, second, finetune)] == [(5,), (15,), ()]
    assert (update(zero, None, first, 0), update(one, None, first, 0)) == (Grow(), PruneRandomly(1000))
    assert (update(zero, first, first, 5), update(one, first, first, 5)) == (Keep(), PruneByMagnitude(566))
    assert (update(zero, first, second, 10), update(one, first, second, 10)) == (PruneByMagnitude(344), Grow())
    assert (update(zero, second, second, 15), update(one, second, second, 15)) == (PruneByMagnitude(262), Keep())
    assert [update(entry, second, finetune, 20) for entry in (zero, one)] == [PruneByMagnitude(250)] * 2
    assert not any(needs_gradient(settings, first, step) for step in range(21))


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_partial_growth_by_hand(grow: str) -> None:
    """The first phase grows 0.4 of 750 pruned weights, the second one 0.4 / 2 (1 + cos(pi / 2))."""
    settings = config(partitions=2, rounds=1, grow=grow, grow_share=0.4)
    first, second, finetune = build(settings).phases
    zero, one = (Entry("w", (10, 100), k, keep=250) for k in (0, 1))
    update = rule(settings)
    assert (update(zero, None, first, 0), update(one, None, first, 0)) == (PruneRandomly(550), PruneRandomly(250))
    grown = DropAndGrow(400, 150, by_gradient=grow == "gradient")
    assert (update(zero, first, second, 10), update(one, first, second, 10)) == (PruneByMagnitude(250), grown)
    assert (update(zero, second, finetune, 20), update(one, second, finetune, 20)) == (Keep(), PruneByMagnitude(250))
    looked = [step for step in range(25) if needs_gradient(settings, build(settings).phase_at(max(step - 1, 0)), step)]
    assert looked == ([10, 20] if grow == "gradient" else [])


def test_granet_by_hand() -> None:
    """Gradual pruning's budgets; at progress 1/2 alpha is 0.3 / 2, of 344 weights."""
    settings = config(method="granet", **ALONE, update_steps=5)
    explore, finetune = build(settings).phases
    entry = Entry("w", (10, 100), 0, keep=250)
    assert rule(settings)(entry, None, explore, 0) == Grow()
    assert rule(settings)(entry, explore, explore, 5) == DropAndGrow(344, 51, by_gradient=True)
    assert rule(settings)(entry, explore, finetune, 10) == PruneByMagnitude(250)


def test_entries_that_share_a_threshold_take_part_where_they_grow_none() -> None:
    """By itself such an entry would be pruned to its uniform budget, which it does not have."""
    small = Entry("w", (2, 5), 0, keep=2)
    for distribution, update in (("global", DropAndGrow(3, 0, by_gradient=True)), ("uniform", PruneByMagnitude(3))):
        settings = config(method="granet", **ALONE, update_steps=5, distribution=distribution)
        explore, _ = build(settings).phases
        assert rule(settings)(small, explore, explore, 5) == update
        settings = config(partitions=2, rounds=1, grow="gradient", grow_share=0.001, distribution=distribution)
        first, second, _ = build(settings).phases
        entry = Entry("w", (2, 5), 1, keep=3)
        assert rule(settings)(entry, first, second, 10) == replace(update, keep=3)
