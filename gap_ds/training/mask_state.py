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
from gap_ds.masks import bitmask
from gap_ds.masks.local import gradient_of
from gap_ds.method import rules
from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding import moments
from gap_ds.sharding.backends import Backend
from gap_ds.sharding.comm import Comm, sum_of
from gap_ds.sharding.shard import Shard, of_entries
from gap_ds.training.last_values import LastValues
from gap_ds.training.piece_lists import PieceLists
from gap_ds.training.regrowth import SECOND_MOMENTS, Young, mean_second_moments
from gap_ds.training.selector import Selector
from gap_ds.training.step_sizes import StepSizes


@dataclass(frozen=True)
class Pieces:
    """This rank's masks, last values, and grown weights with the step before which they were grown."""

    bits: dict[str, Tensor]
    last: dict[str, Tensor]
    grown: dict[str, tuple[Tensor, int]]


class MaskState:
    """The masks of this rank's pieces.

    All ranks call `apply`, `select`, `kept`, `stats`, `write`, `read` and `restore` together.
    """

    def __init__(self, plan: Plan, config: GaPConfig, backend: Backend, warmup: int = 0) -> None:
        #: This rank's piece of each entry.
        self.shards: dict[str, Shard] = of_entries([entry.name for entry in plan.entries], backend.shards())
        #: Packed mask of this rank's piece of each sparse entry; a new tensor for every new mask. A dense entry is not
        #: in it: None means not masked.
        self.bits: dict[str, Tensor] = {}
        #: With `regrow: last_value`, the values that this rank's pruned weights had.
        self.last = LastValues(config)
        #: This rank's gradients of the step before an update that looks at them.
        self._gradients: dict[str, Tensor] = {}
        #: Grown weights whose first steps are scaled.
        self.young = Young(warmup, backend.optimizers)
        self._sizes = StepSizes(config.lr_density_power)
        self._plan, self._config, self._backend = plan, config, backend
        self._lists = PieceLists(self.shards.values(), backend.optimizers)
        #: Sparse entries whose pruned weights the optimizer's steps leave alone.
        self._spared: set[str] = set()

    # -- in every optimizer step -----------------------------------------------------------------------------------

    def before_update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Remembers what `after_update` needs of the weights, before an optimizer steps."""
        if self._scales:
            with torch.no_grad():
                self.young.before_update(self.held_by(optimizer, self.young.grown), step)
                self._sizes.before_update(self.held_by(optimizer, self._sizes.factors))

    def after_update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Scales the step that an optimizer has just taken, where the config says so."""
        if self._scales:
            with torch.no_grad():
                self.young.after_update(self.held_by(optimizer, self.young.grown), step)
                self._sizes.after_update(self.held_by(optimizer, self._sizes.factors))

    @property
    def _scales(self) -> bool:
        """True if any steps are scaled; most runs have none, and need not look for the entries."""
        return bool(self.young.grown or self._sizes.factors)

    def zero_pruned(self, optimizer: torch.optim.Optimizer) -> Sequence[str]:
        """Zeroes the pruned weights that an optimizer step has just changed; returns the names of their entries.

        A sharding library may step its optimizer several times per update, with some of the weights each time; only
        those are masked.
        """
        return self._lists.zero_pruned(optimizer, self.bits, self._spared)

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
        left = self.bits.keys() - masked
        return [name for name, shard in self._masked() if name in left and shard.trainable] if left else []

    def unheld(self) -> list[str]:
        """The trainable entries of which this rank has a piece that no optimizer updates."""
        held = self._backend.optimizers.held()
        own = {name: shard for name, shard in self.shards.items() if shard.trainable and shard.numel}
        return [name for name, shard in own.items() if id(shard.owner()) not in held]

    def copy_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Copies the gradients of an optimizer's step, because it or a library frees or overwrites them."""
        # Of all, also of those that this rank has nothing of: ranks may have to sum them together.
        gradients = {id(p): gradient_of(p) for group in optimizer.param_groups for p in group["params"]}
        for name, shard in self.shards.items():
            if shard.numel and (key := id(shard.owner())) in gradients:
                self._gradients.pop(name, None)  # of a step that was skipped
                if (gradient := gradients[key]) is not None:
                    self._gradients[name] = shard.of(gradient).clone()

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

    def masked_weights(self) -> dict[str, list[Tensor]]:
        """This rank's piece (numel,) of every masked entry, and all that its weights could come back from."""
        return {name: self._weights(shard) for name, shard in self._masked()}

    def _weights(self, shard: Shard) -> list[Tensor]:
        """The weights of a piece (numel,), the library's copies of them, and other sequences of the optimizer."""
        return [shard.weight(), *shard.copies(), *self._backend.optimizers.sequences(shard)]

    def forget_lists(self) -> None:
        """Forgets what steps have listed, and the masks that it holds. Call it after masks changed."""
        self._lists.clear()

    def any_revived(self, names: Sequence[str]) -> bool:
        """True if pruned weights of some masked entries may not be 0; made for looks at the same entries again."""
        return self._lists.any_revived(tuple(names), self.bits)

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
            for piece in self._weights(shard):
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
        self._follow_densities()
        if selected or self._config.regrow == "last_value":
            self._backend.publish()

    def _follow_densities(self) -> None:
        """Learns how sparse each masked entry is now. All ranks call this."""
        if self._config.lr_density_power:
            rows = zip(self._plan.entries, self.kept(), strict=True)
            self._sizes.follow({entry.name: n / entry.numel for entry, n in rows if entry.name in self.bits})

    def select(self, updates: Mapping[Entry, rules.Update], step: int) -> dict[str, Tensor]:
        """Exact masks of this rank's pieces for all entries whose mask changes before a step; changes nothing."""
        if loaded := [entry.name for entry, update in updates.items() if isinstance(update, rules.LoadMask)]:
            path = Path(self._config.mask_file or "")
            found = checkpoint.read_inherited(path, self._plan, self.shards, self._backend.comm)
            return self.on_device({name: found[name] for name in loaded})
        now = Selector(self._plan, self._config.seed, self._backend.comm, self.shards, self.bits, self._gradients, step)
        return now.select(updates)

    def forget_gradients(self) -> None:
        """Frees the gradients that were copied for a boundary or update."""
        self._gradients.clear()

    def replace(self, shard: Shard, bits: Tensor) -> None:
        """Takes an entry's mask from elsewhere; its weights come with it, and are the caller's."""
        self.young.grown.pop(shard.name, None)
        self._change_mask(shard, bits.to(shard.weight().device), {})

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
        """Puts on a mask. It may keep weights that the mask before it pruned: these begin at 0."""
        if self._config.regrow == "last_value":
            self.last.remember(shard, self.bits.get(shard.name), bits)
        self._change_mask(shard, bits, means)
        if shard.numel:
            bitmask.zero_pruned_(shard.weight(), bits)
            self._zero_sequences(shard, bits)

    def _zero_sequences(self, shard: Shard, bits: Tensor) -> None:
        bitmask.zero_pruned_all_((piece, bits) for piece in self._backend.optimizers.sequences(shard))

    def _grow(self, shard: Shard, means: Mapping[tuple[str, str], float]) -> None:
        """Takes the mask off. The weights it had pruned are zero already, or get their last value."""
        bits = self.bits.get(shard.name)
        if bits is not None:
            self._change_mask(shard, None, means)
            if self._config.regrow == "last_value":
                self.last.put_back(shard, bits, (shard.weight(), *self._backend.optimizers.sequences(shard)))

    def _change_mask(self, shard: Shard, bits: Tensor | None, means: Mapping[tuple[str, str], float]) -> None:
        """Sets the mask of an entry, or none. Moments of the weights that the mask before prunes get first values.

        With `regrow_moments` the second ones stay as they are, or become the mean over the kept weights. (They stay
        meaningful while a weight is pruned, because its gradient is not masked.)
        """
        name, optimizers = shard.name, self._backend.optimizers
        first = {kind: value for (entry, kind), value in means.items() if entry == name}
        keep = SECOND_MOMENTS if self._config.regrow_moments == "keep_second" else ()
        moments.change_mask(optimizers, shard, self.bits.pop(name, None), bits, first, keep)
        if bits is not None:
            self.bits[name] = bits
        self._note_spared(name)

    def _note_spared(self, name: str) -> None:
        shard, bits = self.shards[name], self.bits.get(name)
        spared = bits is not None and shard.numel and moments.spares(self._backend.optimizers, shard, bits)
        (self._spared.add if spared else self._spared.discard)(name)

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
            "optimizer_bytes": moments.nbytes(self._backend.optimizers),
            "last_value_bytes": self.last.nbytes,
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
            path, names = folder / "pruned.safetensors", self.last.packed.keys()
            wide = {name for name, values in self.last.packed.items() if values.dtype == torch.float64}
            checkpoint.write_values(path, self._plan, self.shards, names, self._last_values, comm, wide)
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
            rows = checkpoint.read_values(folder / "pruned.safetensors", self._plan, sparse, self.shards)
            last = {name: self.last.pack(self.shards[name], values, bits[name]) for name, values in rows}
        if self.young.length:
            grown = checkpoint.read_masks(folder / "young.safetensors", self._plan, None, *args)
        return Pieces(bits, last, {name: (young, grown_before(name)) for name, young in grown.items()})

    def _last_values(self, name: str) -> Tensor:
        return self.last.whole(self.shards[name], self.bits[name])

    def pieces(self) -> Pieces:
        """The masks as they are now."""
        return Pieces(dict(self.bits), dict(self.last.packed), dict(self.young.grown))

    def restore(self, found: Pieces) -> None:
        """Goes on with what was read."""
        self.bits = self.on_device(found.bits)
        self.last.packed = dict(found.last)
        grown = self.on_device({name: bits for name, (bits, _) in found.grown.items()})
        self.young.grown = {name: (bits, found.grown[name][1]) for name, bits in grown.items()}
        self._follow_densities()

    def take_masks(self) -> None:
        """Gives these masks, to which all state belongs, to optimizers that hold it for kept weights alone."""
        moments.take_masks(self._backend.optimizers, self.shards, self.bits)
        for name in self.shards:
            self._note_spared(name)

    def on_device(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pieces that were read from a file, where their weights are."""
        return {name: piece.to(self.shards[name].weight().device) for name, piece in pieces.items()}


def nonzero(shards: Sequence[Shard], comm: Comm) -> dict[str, int]:
    """Weights of each parameter that are not 0. All ranks of `comm` must call this."""
    local = [int(shard.weight().count_nonzero()) for shard in shards]
    return {shard.name: n for shard, n in zip(shards, sum_of(shards, local, comm), strict=True)}
