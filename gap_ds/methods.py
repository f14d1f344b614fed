"""Methods: what a boundary does to each entry. Pure rules over the plan and the schedule; no tensor is touched here.

A method is a pair: its phases (`schedule.build`) and a rule (entry, phase before, phase after) -> Update. Every method
runs on the same masks, hook and selection, so that comparisons run on the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gap_ds.config import GaPConfig
from gap_ds.plan import Entry
from gap_ds.schedule import Phase


@dataclass(frozen=True)
class Keep:
    """The mask stays as it is."""


@dataclass(frozen=True)
class Dense:
    """Grow: no mask; the weights that were pruned start at zero, with moments at zero."""


@dataclass(frozen=True)
class Largest:
    """Prune: the `keep` weights of largest magnitude stay."""

    keep: int


@dataclass(frozen=True)
class Random:
    """Prune: `keep` random weights stay, the same for any sharding."""

    keep: int


Update = Keep | Dense | Largest | Random
Rule = Callable[[Entry, Phase | None, Phase], Update]


def rule(config: GaPConfig) -> Rule:
    """The rule of a config's method.

    Grow-and-prune (Ma et al., ICLR 2022, algorithm 1): an entry whose partition becomes dense is grown, one whose
    partition was dense is pruned by magnitude, all others stay. Before the first step the sparse entries get their
    first masks: random, or by magnitude where the weights are pretrained. dsd and static differ in their phases only.

    >>> from gap_ds.schedule import build
    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_steps=10, rounds=1, finetune_steps=5)
    >>> first, second, finetune = build(config).phases
    >>> entry = Entry("fc.weight", (4, 4), partition=0, keep=8)
    >>> update = rule(config)
    >>> update(entry, None, first), update(entry, first, second), update(entry, second, finetune)
    (Dense(), Largest(keep=8), Keep())
    """

    def update(entry: Entry, before: Phase | None, after: Phase) -> Update:
        is_dense = entry.partition in after.dense
        was_dense = before is not None and entry.partition in before.dense
        if is_dense:
            return Keep() if was_dense else Dense()
        if before is None:
            return Random(entry.keep) if config.init == "random" else Largest(entry.keep)
        return Largest(entry.keep) if was_dense else Keep()

    return update
