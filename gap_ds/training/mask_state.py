"""`MaskState`: this rank's masks, and what changes with them: weights, moments, the values that pruned weights had.

The engine decides when, a rule (rules.py) what is to happen to each entry; here it is done, exactly and over all
shards. E entries; a piece is this rank's part of an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds import checkpoint
from gap_ds.masks import bitmask, selection
from gap_ds.masks.groups import Grouped, select_groups
from gap_ds.method import rules
from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import NofM, Unstructured
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.backends import Backend
from gap_ds.sharding.comm import Comm, boxes_of, sum_of
from gap_ds.sharding.shard import Shard
from gap_ds.training.regrowth import SECOND_MOMENTS, Young, mean_second_moments


@dataclass(frozen=True)
class Pieces:
    """This rank's masks, last values, and grown weights with the step before which they were grown."""

    bits: dict[str, Tensor]
    last: dict[str, Tensor]
    grown: dict[str, tuple[Tensor, int]]


class MaskState:
    """The masks of this rank's pieces. All ranks call `apply`, `select`, `kept`, `write` and `read` together."""

    def __init__(self, plan: Plan, config: GaPConfig, backend: Backend, warmup: int = 0) -> None:
        by_name = {shard.name: shard for shard in backend.shards()}
        self.shards: dict[str, Shard] = {entry.name: by_name[entry.name] for entry in plan.entries}
        #: Packed mask of this rank's piece of each sparse entry; a new tensor for every new mask. A dense entry is not
        #: in it: None means not masked.
        self.bits: dict[str, Tensor] = {}
        #: With `regrow: last_value`, the values that this rank's pruned weights had, and zeros elsewhere.
        self.last: dict[str, Tensor] = {}
        #: This rank's gradients of the step before an update that looks at them.
        self._gradients: dict[str, Tensor] = {}
        #: Grown weights whose first steps are scaled.
        self.young = Young(warmup, backend.optimizers)
        self._plan, self._config, self._backend = plan, config, backend

    # -- after every optimizer step --------------------------------------------------------------------------------

    @torch.no_grad()  # else each look at a DTensor takes four times as long
    def zero_pruned(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """Zeroes the pruned weights that an optimizer step has just changed; returns the names of their entries.

        A sharding library may step its optimizer several times per update, with some of the weights each time; only
        those are masked.
        """
        held = [shard.name for shard in self.held_by(optimizer, self.bits)]
        bitmask.zero_pruned_all_((self.shards[name].weight(), self.bits[name]) for name in held)
        if self._backend.optimizers.has_sequences:
            for name in held:
                self._zero_sequences(self.shards[name], self.bits[name])
        return set(held)

    def held_by(self, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> list[Shard]:
        """Those of the named entries of which this rank has a piece in the optimizer's groups at this moment."""
        shards = [shard for name in names if (shard := self.shards[name]).numel]
        if not shards:
            return []
        owners = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [shard for shard in shards if id(shard.owner()) in owners]

    def _masked(self) -> Iterator[tuple[str, Shard]]:
        """The sparse entries of which this rank has a piece."""
        return ((name, self.shards[name]) for name in self.bits if self.shards[name].numel)

    def unmasked(self, masked: set[str]) -> list[str]:
        """The trainable entries that an update should have masked on this rank, without those that it has."""
        return [name for name, shard in self._masked() if shard.trainable and name not in masked]

    def unheld(self) -> list[str]:
        """The trainable entries of which this rank has a piece that no optimizer updates."""
        held = self._backend.optimizers.held()
        own = {name: shard for name, shard in self.shards.items() if shard.trainable and shard.numel}
        return [name for name, shard in own.items() if id(shard.owner()) not in held]

    def copy_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Copies the gradients of that step, because libraries free or overwrite them before the boundary."""
        owners = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, shard in self.shards.items():
            if shard.numel and id(owner := shard.owner()) in owners and owner.grad is not None:
                self._gradients[name] = shard.of(owner.grad).clone()

    def tensors(self) -> list[Tensor]:
        """All tensors on this rank that hold weights of an entry, or that weights can come back from; each once."""
        found: dict[int, Tensor] = {}
        for shard in self.shards.values():
            if shard.numel:
                owner = shard.owner()
                found[id(owner)] = owner
                copies = (*shard.copies(), *self._backend.optimizers.sequences(shard))
                found |= {id(piece): piece for piece in copies}
        return list(found.values())

    def masked_weights(self) -> dict[str, Tensor]:
        """This rank's piece (numel,) of every masked entry."""
        return {name: shard.weight() for name, shard in self._masked()}

    @torch.no_grad()
    def revived(self, among: Collection[str] | None = None) -> tuple[str, int] | None:
        """The first entry with pruned weights on this rank that are not 0, and their number; None if all are 0.

        One pass over the weights, and over all that they could come back from: the library's copies of them, and other
        sequences of the optimizer.

        Args:
            among: names of masked entries of which this rank has a piece; None: all.
        """
        names: list[str] = []
        pieces: list[tuple[Tensor, Tensor]] = []
        for name, shard in self._masked() if among is None else ((name, self.shards[name]) for name in among):
            for piece in (shard.weight(), *shard.copies(), *self._backend.optimizers.sequences(shard)):
                names.append(name)
                pieces.append((piece, self.bits[name].to(piece.device)))
        found = bitmask.count_revived_all(pieces)
        return next(((name, n) for name, n in zip(names, found, strict=True) if n), None)

    # -- changing masks --------------------------------------------------------------------------------------------

    def apply(self, updates: Mapping[Entry, rules.Update], step: int) -> None:
        """Does to every entry what comes before a step: selects all new masks, then changes masks, weights, moments."""
        selected = self.select(updates, step)
        means = self._mean_second_moments(updates)
        for entry, update in updates.items():
            shard, before = self.shards[entry.name], self.bits.get(entry.name)
            if isinstance(update, rules.Grow):
                self._grow(shard, means)
            elif entry.name in selected:
                self._mask(shard, selected[entry.name], means)
            if before is not None and isinstance(update, rules.Grow | rules.DropAndGrow):
                self.young.grow(shard.name, self._in_masks(shard, ~before), step)
        if selected or self._config.regrow == "last_value":
            self._backend.publish()

    def forget_gradients(self) -> None:
        """Frees the gradients that were copied for a boundary or update."""
        self._gradients.clear()

    def replace(self, shard: Shard, bits: Tensor) -> None:
        """Takes an entry's mask from elsewhere; its weights come with it, and are the caller's."""
        self._forget_moments(shard, self.bits[shard.name], {})
        self.young.grown.pop(shard.name, None)
        self.bits[shard.name] = bits.to(shard.weight().device)

    def _in_masks(self, shard: Shard, bits: Tensor) -> Tensor:
        """Bits of the weights of this rank's piece that are among `bits` and kept now."""
        kept = self.bits.get(shard.name)
        return bits if kept is None else bits & kept

    def _mean_second_moments(self, updates: Mapping[Entry, rules.Update]) -> dict[tuple[str, str], float]:
        if self._config.regrow_moments != "mean_second":
            return {}
        changed = [e.name for e, u in updates.items() if not isinstance(u, rules.Keep) and e.name in self.bits]
        shards = [self.shards[name] for name in changed]
        return mean_second_moments(shards, self.bits, self._backend.optimizers, self._backend.comm) if shards else {}

    def _mask(self, shard: Shard, bits: Tensor, means: Mapping[tuple[str, str], float]) -> None:
        """Puts on a mask. It may keep weights that the mask before it pruned: those start with moments at zero."""
        before = self.bits.get(shard.name)
        if before is not None:
            self._forget_moments(shard, before, means)
        if self._config.regrow == "last_value":
            self._remember(shard, before, bits)
        if shard.numel:
            bitmask.zero_pruned_(shard.weight(), bits)
            self._zero_sequences(shard, bits)
        self.bits[shard.name] = bits

    def _zero_sequences(self, shard: Shard, bits: Tensor) -> None:
        bitmask.zero_pruned_all_((piece, bits) for piece in self._backend.optimizers.sequences(shard))

    def _grow(self, shard: Shard, means: Mapping[tuple[str, str], float]) -> None:
        """Takes the mask off. The weights it had pruned are zero already, or get their last value."""
        bits = self.bits.pop(shard.name, None)
        if bits is not None:
            self._forget_moments(shard, bits, means)
            if self._config.regrow == "last_value":
                kept, last = bitmask.unpack(bits, shard.numel), self.last.pop(shard.name)
                for piece in (shard.weight(), *self._backend.optimizers.sequences(shard)):
                    torch.where(kept, piece, last, out=piece)

    def _forget_moments(self, shard: Shard, bits: Tensor, means: Mapping[tuple[str, str], float]) -> None:
        """Gives the moments of the weights that a mask prunes their first values.

        With `regrow_moments` the second ones stay as they are, or become the mean over the kept weights. (They stay
        meaningful while a weight is pruned, because its gradient is not masked.)
        """
        for name, moment, first in self._backend.optimizers.moments(shard):
            if name in SECOND_MOMENTS and self._config.regrow_moments == "keep_second":
                continue
            first = means.get((shard.name, name), first)
            bitmask.zero_pruned_(moment, bits)
            if first != 0.0:
                moment[~bitmask.unpack(bits, shard.numel)] = first

    def _remember(self, shard: Shard, before: Tensor | None, bits: Tensor) -> None:
        """Keeps the values of the weights that a new mask prunes, besides those that the mask before it had pruned."""
        values = shard.weight().clone()
        if before is not None:
            values += self.last[shard.name]  # where the one is not zero, the other is
        bitmask.zero_pruned_(values, ~bits)
        self.last[shard.name] = values

    # -- selecting -------------------------------------------------------------------------------------------------

    def select(self, updates: Mapping[Entry, rules.Update], step: int) -> dict[str, Tensor]:
        """Exact masks of this rank's pieces for all entries whose mask changes before a step; changes nothing."""
        largest = {e: u for e, u in updates.items() if isinstance(u, rules.PruneByMagnitude)}
        random = {e: u for e, u in updates.items() if isinstance(u, rules.PruneRandomly)}
        exchanged = {e: u for e, u in updates.items() if isinstance(u, rules.DropAndGrow)}
        stored = {e.name for e, u in updates.items() if isinstance(u, rules.LoadMask)}
        if stored:
            return self._stored(stored)
        if isinstance(self._plan.pattern, Unstructured):
            bits = self._exactly(
                {e: (u.keep, self._magnitudes(e)) for e, u in largest.items()}, self._plan.shared_budget
            )
            bits |= self._exactly({e: (u.keep, self._random(e, e.name)) for e, u in random.items()})
            return bits | self._exchanged(exchanged, step)
        bits = self._by_groups({e: (u.keep, self._magnitudes(e)) for e, u in largest.items()}, by_magnitude=True)
        bits |= self._by_groups({e: (u.keep, self._random(e, e.name)) for e, u in random.items()})
        return bits | self._exchanged_groups(exchanged, step)

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
        bits = selection.select_largest(pieces, keep, self._backend.comm)
        return {piece.name: b for piece, b in zip(pieces, bits, strict=True)}

    def _exchanged(self, updates: Mapping[Entry, rules.DropAndGrow], step: int) -> dict[str, Tensor]:
        """Drop and grow: the kept weights without the smallest, and as many of all others by gradient or at random."""
        shared = self._plan.shared_budget
        kept = self._exactly({e: (u.keep - u.drop, self._of_kept(e)) for e, u in updates.items()}, shared)
        grown = self._exactly(
            {
                e: (u.drop, selection.only(self._growth(e, u.by_gradient, step), ~kept[e.name]))
                for e, u in updates.items()
            },
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
        return selection.random_keys(self._config.seed, name, shard.box, shard.weight().device)

    def _growth(self, entry: Entry, by_gradient: bool, step: int) -> selection.Keys:
        """Keys by which grown weights are chosen. A parameter without a gradient has zeros as its gradient."""
        if not by_gradient:
            return self._random(entry, f"{entry.name} {step}")
        weight = self.shards[entry.name].weight()
        gradient = self._gradients.get(entry.name)
        return selection.magnitude_keys(torch.zeros_like(weight) if gradient is None else gradient)

    def _by_groups(
        self, wanted: Mapping[Entry, tuple[int, selection.Keys]], by_magnitude: bool = False
    ) -> dict[str, Tensor]:
        """For each entry the mask of its pattern with the largest keys."""
        pattern = self._plan.pattern
        if not wanted or isinstance(pattern, Unstructured):
            return {}
        shards = [self.shards[entry.name] for entry in wanted]
        boxes = boxes_of(shards, self._backend.comm)
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
        bits = select_groups(pattern, entries, self._backend.comm)
        return {entry.name: b for entry, b in zip(wanted, bits, strict=True)}

    def _exchanged_groups(self, updates: Mapping[Entry, rules.DropAndGrow], step: int) -> dict[str, Tensor]:
        """Drop and grow with a pattern: select what stays, then the mask that has it and the best of all others.

        Groups of N:M drop equally many weights each; if the number is no multiple of the groups, some drop one more:
        those that lose the least. Blocks are dropped and grown as wholes.
        """
        pattern, bits = self._plan.pattern, dict[str, Tensor]()
        if isinstance(pattern, NofM):
            stays = self._staying_of_groups(pattern, updates)
        else:
            stays = self._by_groups({e: (u.keep - u.drop, self._magnitudes(e)) for e, u in updates.items()}, True)
        for by_gradient in (True, False):
            wanted = {
                e: (u.keep, selection.first(self._growth(e, by_gradient, step), stays[e.name], by_gradient))
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

    def _stored(self, names: set[str]) -> dict[str, Tensor]:
        """Masks that were written by another run, of the same entries."""
        path = Path(self._config.mask_file or "")
        bits = checkpoint.read_masks(path, self._plan, names, self.shards, self._backend.comm, foreign=True)
        return self.on_device(bits)

    # -- figures and files -----------------------------------------------------------------------------------------

    def kept(self) -> list[int]:
        """Weights that each entry's mask keeps, over all ranks; all of a dense entry."""
        local = [
            bitmask.count(self.bits[name]) if name in self.bits else shard.numel for name, shard in self.shards.items()
        ]
        return sum_of(self.shards.values(), local, self._backend.comm)

    def stats(self) -> dict[str, Any]:
        """Exact figures of the masks over all ranks, as `GaPEngine.stats` returns them."""
        kept = self.kept()
        total, numel = sum(kept), self._plan.numel
        return {
            "kept": total,
            "numel": numel,
            "density": total / numel,
            "model_sparsity": (numel - total) / self._plan.total,
            "mask_bytes": sum(bits.numel() for bits in self.bits.values()),
            "entries": {
                e.name: {"kept": n, "numel": e.numel, "partition": e.partition, "dense": e.name not in self.bits}
                for e, n in zip(self._plan.entries, kept, strict=True)
            },
        }

    def write(self, folder: Path, about: Mapping[str, str]) -> None:
        """Writes masks, with `regrow: last_value` what pruned weights were, and which weights are young."""
        comm = self._backend.comm
        checkpoint.write_masks(folder / "masks.safetensors", self._plan, self.shards, self.bits, comm, about)
        if self._config.regrow == "last_value":
            checkpoint.write_values(folder / "pruned.safetensors", self._plan, self.shards, self.last, comm)
        if self.young.length:
            grown = {name: bits for name, (bits, _) in self.young.grown.items()}
            checkpoint.write_masks(folder / "young.safetensors", self._plan, self.shards, grown, comm)

    def read(self, folder: Path, sparse: set[str], grown_before: Callable[[str], int]) -> Pieces:
        """Reads the files of `write` for `restore`; ValueError if one is damaged or its entries are not `sparse`.

        Args:
            grown_before: the step before which an entry was grown last.
        """
        args = self.shards, self._backend.comm
        bits = checkpoint.read_masks(folder / "masks.safetensors", self._plan, sparse, *args)
        last, grown = dict[str, Tensor](), dict[str, Tensor]()
        if self._config.regrow == "last_value":
            last = checkpoint.read_values(folder / "pruned.safetensors", self._plan, sparse, *args)
        if self.young.length:
            grown = checkpoint.read_masks(folder / "young.safetensors", self._plan, None, *args)
        return Pieces(bits, last, {name: (young, grown_before(name)) for name, young in grown.items()})

    def pieces(self) -> Pieces:
        """The masks as they are now."""
        return Pieces(dict(self.bits), dict(self.last), dict(self.young.grown))

    def restore(self, found: Pieces) -> None:
        """Goes on with what was read."""
        self.bits = self.on_device(found.bits)
        self.last = {name: piece.to(self.shards[name].weight()) for name, piece in found.last.items()}
        grown = self.on_device({name: bits for name, (bits, _) in found.grown.items()})
        self.young.grown = {name: (bits, found.grown[name][1]) for name, bits in grown.items()}

    def on_device(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pieces that were read from a file, where their weights are."""
        return {name: piece.to(self.shards[name].weight().device) for name, piece in pieces.items()}


def nonzero(shards: Sequence[Shard], comm: Comm) -> dict[str, int]:
    """Weights of each parameter that are not 0. All ranks of `comm` must call this."""
    local = [int(shard.weight().count_nonzero()) for shard in shards]
    return {shard.name: n for shard, n in zip(shards, sum_of(shards, local, comm), strict=True)}


def inherited(config: GaPConfig, shards: Sequence[Shard]) -> dict[str, int]:
    """Weights that each parameter keeps by the masks in a file.

    Raises:
        ValueError: the file of masks cannot be read, is damaged, or has a mask of a name that is no parameter.
    """
    kept = checkpoint.kept_weights(Path(config.mask_file or ""))
    if unknown := sorted(kept.keys() - {shard.name for shard in shards if shard.trainable}):
        raise ValueError(f"{config.mask_file}: holds the mask of {unknown[0]}, which the model does not have to train.")
    return kept
