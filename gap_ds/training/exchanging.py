"""A worker of parallel GaP as an observer: it exchanges partitions with the other workers at the end of each round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from gap_ds import export
from gap_ds.method.plan import Plan
from gap_ds.method.schedule import Phase
from gap_ds.parallel import Exchange, ParallelWorker, Received, identity, items_of
from gap_ds.sharding.backends import Backend
from gap_ds.sharding.comm import Comm
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer


class Exchanging(Observer):
    """Meets the other workers before the first update and in the boundary that ends a round.

    Args:
        signature, unpartitioned: of the config; all workers of a run have the same.
    """

    def __init__(
        self,
        worker: ParallelWorker,
        plan: Plan,
        signature: str,
        unpartitioned: Literal["average", "first"],
        mask_state: MaskState,
        backend: Backend,
        world: Comm,
    ) -> None:
        self._plan, self._mask_state, self._backend = plan, mask_state, backend
        shards = backend.shards()
        tensors = identity.of_tensors(items_of(plan, shards, dict(export.buffers(backend.module))))
        of_run = (plan.kappa, signature, plan.fingerprint, tensors)
        self.exchange = Exchange(worker, *of_run, world, backend.comm, unpartitioned)
        #: A fingerprint of the first weights, until it is known whether this worker begins or goes on.
        self._start: str | None = identity.of_weights(shards, backend.comm)

    def before_first_update(self) -> None:
        """Checks that the folder is this run's and that all workers begin with the same weights."""
        if self._start is not None:
            self.exchange.begin(self._start)
            self._start = None

    def round_pruned(self, round_: int, phase: Phase, step: int) -> None:
        """Takes every partition from its worker, and all other tensors as the config sets it."""
        shards = self._backend.shards()
        buffers = dict(export.buffers(self._backend.module))
        # With a rising target partitions are exchanged as they are: at the level of this step.
        keep = {e: self._plan.pattern.nearest(e.shape, phase.budget(e, step), e.dims) for e in self._plan.entries}
        entries = tuple(replace(entry, keep=n) for entry, n in keep.items())
        items = items_of(replace(self._plan, entries=entries), shards, buffers)
        pieces = {item.name: item.shard for item in items if item.name not in buffers}

        def receive(received: Received) -> None:
            if (shard := pieces.get(received.name)) is None:
                buffers[received.name].copy_(received.value.view(buffers[received.name].shape))
                return
            if received.bits is not None:
                self._mask_state.replace(shard, received.bits)
            if shard.numel:
                shard.weight().copy_(received.value)

        self.exchange.combine(round_, items, self._mask_state.bits, receive)
        self._backend.publish()

    def restore(self, found: Any, step: int, phase: Phase) -> None:
        """From now on this worker goes on and does not begin."""
        self._start = None
        self.exchange.rejoin()
