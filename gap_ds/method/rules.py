"""Rules: what happens to each entry's mask, and when. Pure; no tensor is touched.

A `Method` is one record: the dense partitions of its phases, its rule, the settings it reads and its source. Every
method runs on the same masks, hook and selection, so that a comparison of methods compares nothing else. The shipped
records are in methods.py. A record of yours is passed as the config's `method`; nothing is registered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from gap_ds.method.phases import Budget, Phase, Schedule, cosine

# -- updates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keep:
    """The mask stays as it is."""


@dataclass(frozen=True)
class Grow:
    """The entry becomes dense. Pruned weights start at zero (or at their last value), with moments at zero."""


@dataclass(frozen=True)
class PruneByMagnitude:
    """The `keep` weights of largest magnitude stay."""

    keep: int


@dataclass(frozen=True)
class PruneRandomly:
    """`keep` random weights stay, the same for any sharding."""

    keep: int


@dataclass(frozen=True)
class DropAndGrow:
    """The `drop` kept weights of smallest magnitude are pruned, and as many others are grown.

    The others are those of largest gradient, or random ones. A weight that was just dropped may be among them; it then
    keeps its value. Grown weights start at zero, with moments at zero.
    """

    keep: int
    drop: int
    by_gradient: bool


@dataclass(frozen=True)
class LoadMask:
    """The mask comes from the config's `mask_file`."""


Update = Keep | Grow | PruneByMagnitude | PruneRandomly | LoadMask | DropAndGrow

# -- methods -----------------------------------------------------------------------------------------------------------


class Settings(Protocol):
    """The settings that a method may read; a `GaPConfig` has them. Lengths are the schedule's business."""

    @property
    def record(self) -> Method: ...
    @property
    def kappa(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def partition_order(self) -> str: ...
    @property
    def distribution(self) -> str | dict[str, float]: ...
    @property
    def mask_init(self) -> str: ...
    @property
    def drop_fraction(self) -> float: ...
    @property
    def grow(self) -> str: ...
    @property
    def seed(self) -> int: ...


#: (entry, phase before, phase after, step) -> what happens to the entry before that step. There is no phase before the
#: first step; at an update inside a phase both phases are the same object.
Rule = Callable[[Budget, Phase | None, Phase, int], Update]

#: Settings that every method reads. The setting "phase" means phase_epochs and phase_steps, and so on.
_ALWAYS = frozenset("method sparsity phase finetune include exclude seed mask_file".split())


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method. A setting that its record does not read is an error, because it would have no effect.

    Args:
        name: value of the setting `method`; part of the run's signature.
        summary: one line for the documentation.
        source: the publication; empty for a baseline.
        reads: names of the settings that have an effect, besides those that every method reads. "dense" and "update"
            stand for dense_epochs, dense_steps and update_epochs, update_steps.
        dense: (settings, worker) -> the dense partitions of one exploring phase after the other, without end.
        rule: the rule, with the settings as a further first argument.
        phases_per_round: exploring phases of a round; None: one for each partition. The run has this times `rounds`.
        updates: True if masks change inside exploring phases, at every `update_epochs` or `update_steps`.
        needs_gradient: True if an update uses the gradients of the step before it.
        least_partitions: the least number of partitions.
        global_budget: True if distribution="global" is possible: the entries of a dense partition are pruned together.
        inherits_masks: True if mask_init may be "from_weights" or "from_file".
        prunes: False for dense training.
        has_workers: True if every partition has a worker, which explores it alone; the workers exchange their
            partitions at the end of each round.
    """

    name: str
    summary: str
    source: str
    reads: frozenset[str]
    dense: Callable[[Settings, int], Iterator[frozenset[int]]]
    rule: Callable[[Settings, Budget, Phase | None, Phase, int], Update]
    phases_per_round: int | None = 1
    updates: bool = False
    needs_gradient: bool = False
    least_partitions: int = 1
    global_budget: bool = False
    inherits_masks: bool = False
    prunes: bool = True
    has_workers: bool = False

    def reads_setting(self, setting: str) -> bool:
        """True if a setting of the config has an effect.

        >>> from gap_ds.method.methods import METHODS
        >>> [METHODS["rigl"].reads_setting(name) for name in ("update_steps", "phase_steps", "dense_steps", "rounds")]
        [True, True, False, False]
        """
        return setting.removesuffix("_epochs").removesuffix("_steps") in self.reads | _ALWAYS


def rule(config: Settings) -> Rule:
    """Return the rule of a config's method.

    >>> from gap_ds.method.config import GaPConfig
    >>> from gap_ds.method.plan import Entry
    >>> from gap_ds.method.schedule import build
    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_steps=10, rounds=1, finetune_steps=5)
    >>> first, second, finetune = build(config).phases
    >>> entry = Entry("fc.weight", (4, 4), partition=0, keep=8)
    >>> update = rule(config)
    >>> update(entry, None, first, 0), update(entry, first, second, 10), update(entry, second, finetune, 20)
    (Grow(), PruneByMagnitude(keep=8), Keep())
    """
    return partial(config.record.rule, config)


def stages(config: Settings, before: Phase | None, after: Phase) -> list[tuple[Phase | None, Phase]]:
    """Return the pairs (before, after) that a boundary consists of, in order.

    There is one pair, except at the end of a round of parallel GaP. There all partitions are sparse for a moment, in
    which the workers exchange them; then each worker grows its partition again (Ma et al., ICLR 2022, section 3.2).
    """
    if not config.record.has_workers or before is None or before is after or before.kind != "explore":
        return [(before, after)]
    sparse = replace(after, dense=frozenset())
    return [(before, sparse), (sparse, after)]


def grown_before(config: Settings, schedule: Schedule, entry: Budget, step: int) -> int:
    """Return the last step, up to `step`, before which an entry was grown; 0 if that never happened."""
    changes: list[tuple[Phase | None, Phase, int]] = []
    for before, after in itertools.pairwise((None, *schedule.phases)):
        assert after is not None
        changes += [(before, after, after.first_step), *((after, after, update) for update in after.updates)]
    for before, after, at in reversed([change for change in changes if change[2] <= step]):
        done = [rule(config)(entry, a, b, at) for a, b in stages(config, before, after)]
        if any(isinstance(update, Grow | DropAndGrow) for update in done):
            return at
    return 0


def needs_gradient(config: Settings, phase: Phase, step: int) -> bool:
    """True if the update or boundary before a step uses the gradients of the step before it."""
    # Asked in every step: the step first, and the config where it may matter.
    if step == phase.end_step and phase.kind == "explore" and config.grow == "gradient":
        return True
    return phase.is_update(step) and config.record.needs_gradient


# -- rules that methods share ------------------------------------------------------------------------------------------


def first_mask(config: Settings, entry: Budget, keep: int | None = None) -> Update:
    """Return the update that gives a sparse entry its first mask, of `keep` weights (None: those of its budget).

    With mask_init="from_weights", whose zeros are the mask, the `keep` largest weights are all those that are not zero.
    """
    if config.mask_init == "from_file":
        return LoadMask()
    keep = entry.keep if keep is None else keep
    return PruneRandomly(keep) if config.mask_init in ("random", "auto") else PruneByMagnitude(keep)


def grow_and_prune(config: Settings, entry: Budget, before: Phase | None, after: Phase, step: int) -> Update:
    """Grow the partitions that become dense and prune by magnitude those that were dense; keep all others.

    Before the first step the sparse entries get their first masks. At an update inside a phase, the partitions that
    leave it are pruned to a budget that falls by the cubic schedule. With a rising target the sparse partitions are
    pruned to its level at every boundary and update. With partial growth a partition that becomes dense is pruned to
    the level, too, and then grows a share of its pruned weights.
    """
    k, keep = entry.partition, after.budget(entry, step)
    if before is after:
        return PruneByMagnitude(keep) if after.prunes(k, step) else Keep()
    was_dense = before is not None and k in before.dense
    if k in after.dense and after.growth == 1:
        return Keep() if was_dense else Grow()
    if before is None:
        return first_mask(config, entry, keep)
    if was_dense:
        return PruneByMagnitude(keep)
    if k in after.dense:
        rest = replace(after, dense=after.dense - {k}).budget(entry, step)
        return prune_and_grow(config, keep, keep - rest, config.grow == "gradient")
    # The second stage of a boundary of parallel GaP: the first one has pruned it.
    if before.index == after.index or (before.rise is None and after.rise is None):
        return Keep()
    return PruneByMagnitude(keep)


def prune_and_grow(config: Settings, keep: int, grown: int, by_gradient: bool) -> Update:
    """Return the update that prunes an entry to `keep` weights, of which `grown` are grown; at times that is none.

    With distribution="global" an entry that grows none still shares the threshold of those of its partition that do.
    """
    shared = config.distribution == "global"
    return DropAndGrow(keep, grown, by_gradient) if grown or shared else PruneByMagnitude(keep)


def drop_count(config: Settings, entry: Budget, phase: Phase, step: int, keep: int | None = None) -> int:
    """Return the number of kept weights that an update replaces.

    It is a fraction of `keep` (None: the entry's budget) and at most the number of pruned weights. The fraction falls
    from `drop_fraction` to 0 by a cosine over the phase.

    Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", arXiv 1911.11134, section 3.
    """
    keep = entry.keep if keep is None else keep
    return min(int(cosine(config.drop_fraction, phase.progress(step)) * keep), entry.numel - keep)
