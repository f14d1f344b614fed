"""Methods: what happens to each entry's mask, and when. Pure rules over plan and schedule; no tensor is touched.

A method is a pair: its phases (`schedule.build`) and a rule (entry, phase before, phase after, step) -> Update. Every
method runs on the same masks, hook and selection, so that comparisons run on the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from gap_ds.method.config import GaPConfig
from gap_ds.method.distribution import round_half_up
from gap_ds.method.plan import Entry
from gap_ds.method.schedule import Phase, ramp


@dataclass(frozen=True)
class Keep:
    """The mask stays as it is."""


@dataclass(frozen=True)
class Grow:
    """Grow: no mask; the weights that were pruned start at zero (or their last value), with moments at zero."""


@dataclass(frozen=True)
class PruneByMagnitude:
    """Prune: the `keep` weights of largest magnitude stay."""

    keep: int


@dataclass(frozen=True)
class PruneRandomly:
    """Prune: `keep` random weights stay, the same for any sharding."""

    keep: int


@dataclass(frozen=True)
class DropAndGrow:
    """Drop and grow: of the kept weights the `drop` of smallest magnitude go, and as many others come.

    Those others are the ones of largest gradient, or random ones; a weight just dropped may be among them, and then it
    has never left. Weights that come start at zero, with moments at zero.
    """

    keep: int
    drop: int
    by_gradient: bool


@dataclass(frozen=True)
class LoadMask:
    """Take over: the mask is the one that the config's file of masks has."""


Update = Keep | Grow | PruneByMagnitude | PruneRandomly | LoadMask | DropAndGrow
Rule = Callable[[Entry, Phase | None, Phase, int], Update]


def rule(config: GaPConfig) -> Rule:
    """The rule of a config's method: (entry, phase before, phase after, step) -> what happens before that step.

    Before the first step there is no phase before; at an update inside a phase both phases are the same.
    """
    if config.method in ("rigl", "set"):
        return _drop_and_grow(config)
    return _grow_and_prune(config)


def stages(config: GaPConfig, before: Phase | None, after: Phase) -> list[tuple[Phase | None, Phase]]:
    """The (before, after) that a boundary crosses one after the other.

    It is one, but for the end of a round of parallel GaP: there all partitions are sparse for a moment, in which the
    workers exchange them, and then each worker's own is grown again (Ma et al., ICLR 2022, section 3.2).
    """
    if config.method != "parallel" or before is None or before is after or before.kind != "explore":
        return [(before, after)]
    sparse = replace(after, dense=frozenset())
    return [(before, sparse), (sparse, after)]


def needs_gradient(config: GaPConfig, phase: Phase, step: int) -> bool:
    """Whether what happens before a step looks at the gradients of the step before it."""
    return config.method == "rigl" and step in phase.updates


def _grow_and_prune(config: GaPConfig) -> Rule:
    """Grow-and-prune, and all methods that are phases with dense partitions and phases without.

    An entry whose partition becomes dense is grown, one whose partition was dense is pruned by magnitude, all others
    stay: cyclic (Ma et al., ICLR 2022, arXiv 2106.09857, algorithm 1), parallel (the same, section 3.2), dsd (Han et
    al., ICLR 2017, arXiv 1607.04381), acdc (Peste et al., NeurIPS 2021, arXiv 2106.12379), one_shot (Han et al., NIPS
    2015, arXiv 1506.02626), and, without anything to grow or prune, static and dense. Before the first step the sparse
    entries get their first masks: random, or by magnitude where the weights are pretrained. Inside a phase with
    updates, the partitions that leave it are pruned to a budget that falls by the cubic schedule: gradual (Zhu and
    Gupta, arXiv 1710.01878), and `prune_ramp`.

    >>> from gap_ds.method.schedule import build
    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_steps=10, rounds=1, finetune_steps=5)
    >>> first, second, finetune = build(config).phases
    >>> entry = Entry("fc.weight", (4, 4), partition=0, keep=8)
    >>> update = rule(config)
    >>> update(entry, None, first, 0), update(entry, first, second, 10), update(entry, second, finetune, 20)
    (Grow(), PruneByMagnitude(keep=8), Keep())
    >>> config = GaPConfig(method="dsd", sparsity=0.5, phase_steps=10, rounds=2, finetune_steps=5)
    >>> phases = build(config).phases
    >>> [rule(config)(entry, before, after, after.first_step) for before, after in zip((None, *phases), phases)]
    [Grow(), PruneByMagnitude(keep=8), Grow(), PruneByMagnitude(keep=8), Keep()]
    >>> config = GaPConfig(method="gradual", sparsity=0.5, phase_steps=4, update_steps=1, finetune_steps=4)
    >>> first, finetune = build(config).phases
    >>> [rule(config)(entry, first, first, step) for step in first.updates]
    [PruneByMagnitude(keep=11), PruneByMagnitude(keep=9), PruneByMagnitude(keep=8)]
    """

    def update(entry: Entry, before: Phase | None, after: Phase, step: int) -> Update:
        if before is after:
            if entry.partition not in after.leaving:
                return Keep()
            return PruneByMagnitude(
                round_half_up(entry.numel - ramp(after.progress(step)) * (entry.numel - entry.keep))
            )
        is_dense = entry.partition in after.dense
        was_dense = before is not None and entry.partition in before.dense
        if is_dense:
            return Keep() if was_dense else Grow()
        if before is None:
            return _first(config, entry)
        return PruneByMagnitude(entry.keep) if was_dense else Keep()

    return update


def _first(config: GaPConfig, entry: Entry) -> Update:
    """The first mask of a sparse entry. The largest are all that are not zero where the weights are sparse already."""
    if config.mask_init == "from_file":
        return LoadMask()
    return PruneRandomly(entry.keep) if config.mask_init == "random" else PruneByMagnitude(entry.keep)


def _drop_and_grow(config: GaPConfig) -> Rule:
    """RigL and SET: masks of a fixed size that move.

    At each update a fraction alpha of an entry's kept weights is replaced; alpha falls from `drop_fraction` to 0 by a
    cosine over the exploring phase. RigL grows by the magnitude of the gradient that the step before the update had,
    over all micro-batches and ranks, clipped if the run clips (Evci et al., "Rigging the Lottery: Making All Tickets
    Winners", ICML 2020, arXiv 1911.11134, algorithm 1; there an update takes the place of an optimizer step, here it
    follows one).

    SET grows at random (Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Nature Communications 9, 2383, 2018). It drops the same fraction of the
    positive weights (the smallest) and of the negative ones (the largest), the fraction is constant, and an update
    follows each epoch. Here, as in RigL's comparison with it, the magnitude decides whatever the sign, and the fraction
    falls by the cosine; `update_epochs: 1` updates after each epoch.

    >>> from gap_ds.method.schedule import build
    >>> config = GaPConfig(method="rigl", sparsity=0.5, phase_steps=4, update_steps=1, finetune_steps=4)
    >>> explore, finetune = build(config).phases
    >>> entry = Entry("fc.weight", (10, 10), partition=0, keep=50)
    >>> [rule(config)(entry, explore, explore, step).drop for step in explore.updates]
    [12, 7, 2]
    >>> rule(config)(entry, None, explore, 0), rule(config)(entry, explore, finetune, 4)
    (PruneRandomly(keep=50), Keep())
    """

    def update(entry: Entry, before: Phase | None, after: Phase, step: int) -> Update:
        if before is None:
            return _first(config, entry)
        if before is not after:
            return Keep()
        alpha = config.drop_fraction / 2 * (1 + math.cos(math.pi * float(after.progress(step))))
        # Rounded to nine decimals, so that no machine's cosine decides about one weight more or less.
        drop = min(int(Fraction(f"{alpha:.9f}") * entry.keep), entry.numel - entry.keep)
        return DropAndGrow(entry.keep, drop, config.method == "rigl") if drop else Keep()

    return update
