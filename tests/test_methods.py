"""What a boundary does to an entry: every transition of the grow-and-prune rule."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from gap_ds.config import GaPConfig
from gap_ds.methods import Dense, Keep, Largest, Random, Update, rule
from gap_ds.plan import Entry
from gap_ds.schedule import Phase, build


def config(**changes: Any) -> GaPConfig:
    base = {"sparsity": 0.75, "partitions": 3, "phase_steps": 10, "rounds": 2, "finetune_steps": 5}
    return GaPConfig.load({key: value for key, value in (base | changes).items() if value is not None})


def phase(*dense: int) -> Phase:
    return Phase(0, 0, 0, 10, frozenset(dense), "explore")


ENTRY = Entry("fc.weight", (4, 4), partition=1, keep=4)


@pytest.mark.parametrize(
    ("before", "after", "update"),
    [
        ((0,), (1,), Dense()),
        ((), (1,), Dense()),
        ((1,), (1,), Keep()),
        ((0, 1), (1, 2), Keep()),
        ((1,), (2,), Largest(4)),
        ((0, 1, 2), (), Largest(4)),
        ((0,), (2,), Keep()),
        ((), (), Keep()),
    ],
)
def test_boundary(before: tuple[int, ...], after: tuple[int, ...], update: Update) -> None:
    assert rule(config())(ENTRY, phase(*before), phase(*after)) == update


@pytest.mark.parametrize(("init", "update"), [("random", Random(4)), ("magnitude", Largest(4))])
def test_first_masks(init: str, update: Update) -> None:
    assert rule(config(init=init))(ENTRY, None, phase(0)) == update
    assert rule(config(init=init))(ENTRY, None, phase(1)) == Dense()


def updates(settings: GaPConfig, partition: int = 0) -> list[Update]:
    """What happens to an entry over a whole run."""
    entry = Entry("fc.weight", (4, 4), partition, keep=4)
    phases: list[Phase | None] = [None, *build(settings).phases]
    return [rule(settings)(entry, before, after) for before, after in itertools.pairwise(phases) if after]


def test_whole_runs() -> None:
    grow, prune, keep, first = Dense(), Largest(4), Keep(), Random(4)
    assert updates(config(), 0) == [grow, prune, keep, grow, prune, keep, keep]
    assert updates(config(), 1) == [first, grow, prune, keep, grow, prune, keep]
    assert updates(config(), 2) == [first, keep, grow, prune, keep, grow, prune]
    assert updates(config(method="dsd", partitions=None)) == [grow, prune, grow, prune, keep]
    assert updates(config(method="static")) == [first] + [keep] * 6
    assert updates(config(method="dense", sparsity=0)) == [grow] + [keep] * 6
    assert updates(config(rounds=0)) == [first]
    assert updates(config(finetune_steps=0), 2)[-1] == prune


@pytest.mark.parametrize("order", ["cyclic", "random"])
def test_one_partition_is_pruned_and_one_grown_at_each_boundary(order: str) -> None:
    settings = config(order=order, rounds=5, partitions=4)
    columns = zip(*(updates(settings, partition) for partition in range(4)), strict=True)
    counts = [Counter(type(update) for update in column) for column in columns]
    assert counts[0] == {Dense: 1, Random: 3}
    assert all(count == {Largest: 1, Dense: 1, Keep: 2} for count in counts[1:-1])
    assert counts[-1] == {Largest: 1, Keep: 3}
