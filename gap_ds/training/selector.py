"""`Selector`: the new masks of this rank's pieces, as updates ask for them. Weights and masks stay as they are.

It says which keys order the weights of an entry (magnitudes, gradients, a hash), and in which steps a drop-and-grow
update selects; `gap_ds.masks` selects by them, exactly and over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gap_ds.masks import selection
from gap_ds.masks.groups import Grouped, select_groups
from gap_ds.method import rules
from gap_ds.method.pattern import NofM, Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.comm import Comm, boxes_of
from gap_ds.sharding.shard import Shard


@dataclass(frozen=True)
class Selector:
    """The values that new masks are selected from, before a step. All ranks of `comm` call `select` together.

    Args:
        seed: of random keys.
        shards: this rank's piece of each entry, by name.
        bits: packed masks of the pieces of sparse entries, as they are now.
        gradients: gradients (numel,) of the pieces, where an update grows by them.
        step: the applied step before which masks change.
    """

    plan: Plan
    seed: int
    comm: Comm
    shards: Mapping[str, Shard]
    bits: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    step: int

    def select(self, updates: Mapping[Entry, rules.Update]) -> dict[str, Tensor]:
        """Return packed masks of this rank's pieces of all entries whose update selects one."""
        largest = {
            e: (u.keep, self._magnitudes(e)) for e, u in updates.items() if isinstance(u, rules.PruneByMagnitude)
        }
        random = {
            e: (u.keep, self._random(e, e.name)) for e, u in updates.items() if isinstance(u, rules.PruneRandomly)
        }
        moved = {e: u for e, u in updates.items() if isinstance(u, rules.DropAndGrow)}
        if isinstance(self.plan.pattern, Unstructured):
            bits = self._exactly(largest, self.plan.shared_budget) | self._exactly(random)
            return bits | self._drop_and_grow(moved)
        bits = self._by_groups(largest, by_magnitude=True) | self._by_groups(random)
        return bits | self._drop_and_grow_groups(moved)

    def _exactly(
        self, wanted: Mapping[Entry, tuple[int, selection.Keys]], shared_budget: bool = False
    ) -> dict[str, Tensor]:
        """For each entry its `keep` largest keys; shared_budget: for each partition the sum of its budgets."""
        if not wanted:
            return {}
        pieces: list[selection.Piece] = []
        budgets: dict[int | str, int] = {}
        keep: list[int] = []
        for entry, (n, keys) in wanted.items():
            shard = self.shards[entry.name]
            budget = budgets.setdefault(entry.partition if shared_budget else entry.name, len(budgets))
            keep += [0] * (len(budgets) - len(keep))
            keep[budget] += n
            pieces.append(selection.Piece(entry.name, shard.box, keys, budget, shard.counted))
        bits = selection.select_largest(pieces, keep, self.comm)
        return {piece.name: b for piece, b in zip(pieces, bits, strict=True)}

    def _drop_and_grow(self, updates: Mapping[Entry, rules.DropAndGrow]) -> dict[str, Tensor]:
        """Drop and grow: the kept weights without the smallest, and as many of all others by gradient or at random."""
        shared = self.plan.shared_budget
        kept = self._exactly({e: (u.keep - u.drop, self._of_kept(e)) for e, u in updates.items()}, shared)
        grown = self._exactly(
            {e: (u.drop, selection.only(self._growth(e, u.by_gradient), ~kept[e.name])) for e, u in updates.items()},
            shared,
        )
        return {name: bits | grown[name] for name, bits in kept.items()}

    def _magnitudes(self, entry: Entry) -> selection.Keys:
        return selection.magnitude_keys(self.shards[entry.name].weight())

    def _of_kept(self, entry: Entry) -> selection.Keys:
        """Magnitudes of the kept weights; those of a dense entry are all kept."""
        bits = self.bits.get(entry.name)
        return self._magnitudes(entry) if bits is None else selection.only(self._magnitudes(entry), bits)

    def _random(self, entry: Entry, name: str) -> selection.Keys:
        shard = self.shards[entry.name]
        return selection.random_keys(self.seed, name, shard.box, shard.weight().device)

    def _growth(self, entry: Entry, by_gradient: bool) -> selection.Keys:
        """Keys by which grown weights are chosen. A parameter without a gradient has zeros as its gradient."""
        if not by_gradient:
            return self._random(entry, f"{entry.name} {self.step}")
        weight = self.shards[entry.name].weight()
        gradient = self.gradients.get(entry.name)
        return selection.magnitude_keys(torch.zeros_like(weight) if gradient is None else gradient)

    def _by_groups(
        self, wanted: Mapping[Entry, tuple[int, selection.Keys]], by_magnitude: bool = False
    ) -> dict[str, Tensor]:
        """For each entry the mask of its pattern with the largest keys."""
        pattern = self.plan.pattern
        if not wanted or isinstance(pattern, Unstructured):
            return {}
        shards = [self.shards[entry.name] for entry in wanted]
        boxes = boxes_of(shards, self.comm)
        entries = [
            Grouped(
                selection.Piece(entry.name, shard.box, keys, 0, shard.counted),
                entry.shape,
                entry.dims,
                pattern.nearest(entry.shape, keep, entry.dims) if keep else 0,
                cuts,
                by_magnitude,
            )
            for (entry, (keep, keys)), shard, cuts in zip(wanted.items(), shards, boxes, strict=True)
        ]
        bits = select_groups(pattern, entries, self.comm)
        return {entry.name: b for entry, b in zip(wanted, bits, strict=True)}

    def _drop_and_grow_groups(self, updates: Mapping[Entry, rules.DropAndGrow]) -> dict[str, Tensor]:
        """Drop and grow with a pattern: select what stays, then the mask that has it and the best of all others.

        Groups of N:M drop equally many weights each; if the number is no multiple of the groups, some drop one more:
        those that lose the least. Blocks are dropped and grown as wholes.
        """
        pattern, bits = self.plan.pattern, dict[str, Tensor]()
        if isinstance(pattern, NofM):
            stays = self._staying_of_groups(pattern, updates)
        else:
            stays = self._by_groups({e: (u.keep - u.drop, self._magnitudes(e)) for e, u in updates.items()}, True)
        for by_gradient in (True, False):
            wanted = {
                e: (u.keep, selection.first(self._growth(e, by_gradient), stays[e.name], by_gradient))
                for e, u in updates.items()
                if u.by_gradient == by_gradient
            }
            bits |= self._by_groups(wanted, by_magnitude=by_gradient)
        return bits

    def _staying_of_groups(self, pattern: NofM, updates: Mapping[Entry, rules.DropAndGrow]) -> dict[str, Tensor]:
        """Bits of the weights that an update of an N:M pattern does not drop."""
        keys = {entry: self._of_kept(entry) for entry in updates}
        groups = {entry: entry.numel // pattern.m for entry in updates}
        parts = {entry: divmod(update.drop, groups[entry]) for entry, update in updates.items()}
        count = {e: pattern.nearest(e.shape, u.keep, e.dims) - parts[e][0] * groups[e] for e, u in updates.items()}
        stays = self._by_groups({e: (n, keys[e]) for e, n in count.items()})
        some = [entry for entry, (_, more) in parts.items() if more]
        safe = self._by_groups({e: (count[e] - groups[e], keys[e]) for e in some})
        # One weight of each group is left to choose from.
        last = {e: selection.only(self._magnitudes(e), stays[e.name] & ~safe[e.name]) for e in some}
        chosen = self._exactly({e: (groups[e] - parts[e][1], last[e]) for e in some})
        return stays | {name: safe[name] | chosen[name] for name in chosen}
