"""The work of every step on many pieces (masking, looking at a part of them), listed once and checked at each use.

Libraries and users replace tensors between steps: parameters, their `data`, flat buffers, an optimizer's groups. So
nothing is taken on trust. A list holds while asking afresh would make the same one: the same owners of the entries, the
same masks, and the same addresses and dtypes of all tensors. To check that is two calls into PyTorch for each tensor
(`gap_ds.masks.same`); to make a list takes many times as long, and on a GPU a copy to the device.

E entries. A step of a sharding library may update a few of them: there is one list for each such part.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.masks.local import local, locals_of
from gap_ds.masks.same import Places, same_items, same_slots, same_values
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Fixed, Item, Shard, Slot

T = TypeVar("T")
Pieces = list[tuple[Tensor, Tensor]]

#: Most lists that are kept of a kind. ZeRO-3 has one for each sub-group.
_MOST = 4096


class Owners:
    """The tensors that some lookups of owners found, held to be compared with those that they find later.

    Args:
        asks: `find` or `owner` of shards, each once.
    """

    def __init__(self, asks: Iterable[Callable[[], Tensor | None]]) -> None:
        slots = [ask for ask in asks if isinstance(ask, Slot)]
        self._holders, self._names = [slot.holder for slot in slots], [slot.name for slot in slots]
        self._held = [slot() for slot in slots]
        self._lists = [(of, [*of()]) for of in {id(ask.of): ask.of for ask in asks if isinstance(ask, Item)}.values()]
        self._others = [(ask, ask()) for ask in asks if not isinstance(ask, Slot | Item | Fixed)]

    def same(self) -> bool:
        """True if all lookups find the same tensors now."""
        return (
            same_slots(self._holders, self._names, self._held)
            and all(same_items([*of()], before) for of, before in self._lists)
            and all(ask() is before for ask, before in self._others)
        )


class PieceList(Generic[T]):
    """The pieces of some entries with their masks, and a call that works on them for as long as the list holds.

    It keeps addresses, not memory: weights that are replaced are freed.

    Args:
        shards: those of the entries, each with a piece on this rank; dense ones make the list depend on their being so.
        bits: masks of the sparse ones.
        asks: owners that must stay the same, those of `shards` among them.
        prepare: the work on the pieces as a call that holds no memory; None if there is no such.
        copies: also work on the library's copies of the weights.
        spared: masked entries to leave out of the work.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        bits: Mapping[str, Tensor],
        asks: Sequence[Callable[[], Tensor | None]],
        optimizers: Optimizers,
        prepare: Callable[[Pieces], Callable[[], T] | None],
        copies: bool = False,
        spared: Container[str] = (),
    ) -> None:
        self.masked = tuple(shard.name for shard in shards if shard.name in bits)
        self._dense = frozenset(shard.name for shard in shards if shard.name not in bits)
        self._names = list(self.masked)
        self._bits = [bits[name] for name in self.masked]
        self._owners = Owners(asks)
        updated = list({id(owner): owner for owner in (shard.owner() for shard in shards)}.values())
        self._of_owners, self._updated = locals_of(updated), updated
        self._optimizers = optimizers
        self._copies = [shard for shard in shards if copies and shard.copies()]
        self._places = Places(self._tensors())
        masked = [shard for shard in shards if shard.name in bits and shard.name not in spared]
        self.run = prepare(self._pieces(masked, bits, copies))

    def holds(self, bits: dict[str, Tensor]) -> bool:
        """True if making the list now would make the same list."""
        return (
            self._owners.same()
            and same_values(bits, self._names, self._bits)
            and (not self._dense or self._dense.isdisjoint(bits))
            and self._places.same(self._tensors())
        )

    def _tensors(self) -> list[Tensor]:
        """All tensors on this rank that the pieces are parts of, as they are now."""
        found = self._of_owners()
        if self._optimizers.has_sequences:
            sequences = (each for owner in self._updated for each in self._optimizers.sequence_tensors(owner))
            found = [*found, *map(local, sequences)]
        return [*found, *(copy for shard in self._copies for copy in shard.copies())] if self._copies else found

    def _pieces(self, shards: Iterable[Shard], bits: Mapping[str, Tensor], copies: bool) -> Pieces:
        return [
            (piece, bits[shard.name])
            for shard in shards
            for piece in (shard.weight(), *self._optimizers.sequences(shard), *(shard.copies() if copies else ()))
        ]


class PieceLists:
    """The lists of a run.

    Args:
        shards: this rank's pieces of all entries.
    """

    def __init__(self, shards: Iterable[Shard], optimizers: Optimizers) -> None:
        self._shards = {shard.name: shard for shard in shards if shard.numel}
        #: Many shards may have one flat buffer as their owner, and then share the callable.
        self._asks = _asks(self._shards.values())
        self._optimizers = optimizers
        self._steps: dict[tuple[int, int], tuple[list[list[Tensor]], PieceList[None]]] = {}
        self._looks: dict[tuple[str, ...], PieceList[int]] = {}

    def clear(self) -> None:
        """Forgets all lists, and the masks that they hold."""
        self._steps.clear()
        self._looks.clear()

    def zero_pruned(
        self, optimizer: torch.optim.Optimizer, bits: dict[str, Tensor], spared: Container[str] = ()
    ) -> Sequence[str]:
        """Zeroes the pruned weights in the optimizer's groups at this moment; returns the names of their entries.

        Args:
            bits: masks of this rank's pieces by entry; a dense entry has none.
            spared: entries whose pruned weights the optimizer leaves alone.
        """
        groups = [group["params"] for group in optimizer.param_groups if group["params"]]
        if not groups:
            return ()
        key = id(optimizer), id(groups[0][0])
        if key in self._steps:
            params, kept = self._steps[key]
            same = len(groups) == len(params) and all(map(same_items, groups, params))
            if same and kept.run is not None and kept.holds(bits):
                kept.run()
                return kept.masked
            self._steps.clear()  # what has changed may be in others, too
        params = [list(group) for group in groups]
        ids = {id(param) for group in params for param in group}
        held = [shard for shard in self._shards.values() if id(shard.owner()) in ids]
        made = PieceList(held, bits, self._asks, self._optimizers, _zero_pruned, spared=spared)
        _keep(self._steps, key, (params, made))
        if made.run is not None:
            made.run()
        return made.masked

    def any_revived(self, names: tuple[str, ...], bits: dict[str, Tensor]) -> bool:
        """True if pruned weights of some masked entries are not 0, or if that cannot be told quickly."""
        kept = self._looks.get(names)
        if kept is None or not kept.holds(bits):
            shards = [self._shards[name] for name in names]
            kept = PieceList(shards, bits, _asks(shards), self._optimizers, bitmask.count_revived_later, copies=True)
            _keep(self._looks, names, kept)
        return kept.run is None or kept.run() > 0


def _asks(shards: Iterable[Shard]) -> list[Callable[[], Tensor | None]]:
    """Return the calls that find the owners of some shards, each once. An owner may be gone: `owner` tells why."""
    return list({id(ask): ask for ask in (shard.find or shard.owner for shard in shards)}.values())


def _zero_pruned(pieces: Pieces) -> Callable[[], None] | None:
    """Masks the pieces, and returns the same for later."""
    later = bitmask.zero_pruned_later(pieces)
    if later is None:
        bitmask.zero_pruned_all_(pieces)
    return later


def _keep(lists: dict[Any, Any], key: Any, made: Any) -> None:
    if len(lists) >= _MOST:
        lists.clear()
    lists[key] = made
