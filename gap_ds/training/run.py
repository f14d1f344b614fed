"""`Run`: the parts of a run, the same objects while it trains. The engine drives them, saving.py stores them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gap_ds import export
from gap_ds._version import __version__
from gap_ds.checkpoint.run_state import State
from gap_ds.method import rules
from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Phase, Schedule
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding.backends import Backend
from gap_ds.sharding.comm import Comm, raise_on_all_ranks
from gap_ds.training import consistency
from gap_ds.training.learning_rate import LearningRate
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer
from gap_ds.training.structure import Structure

log = logging.getLogger("gap_ds")


@dataclass(frozen=True)
class Place:
    """Where a run is: before an applied step; ended: the step before which `finish` has ended the schedule early."""

    step: int = 0
    ended: int | None = None

    @property
    def over(self) -> bool:
        """True if the schedule was ended before its last step."""
        return self.ended is not None

    def phase(self, schedule: Schedule) -> Phase:
        """The phase that the next step belongs to."""
        return schedule.phases[-1] if self.over else schedule.phase_at(self.step)

    def after_update(self) -> Place:
        """The place after the next update."""
        return Place(self.step + 1, self.ended)

    def changes_masks(self, schedule: Schedule) -> bool:
        """True if a boundary, or an update of moving masks, follows the next update."""
        phase = self.phase(schedule)
        return self.after_update().phase(schedule) is not phase or phase.is_update(self.step + 1)

    def schedule_step(self, schedule: Schedule) -> int:
        """The step of the schedule whose masks hold in the next step."""
        return max(self.step, schedule.total_steps) if self.over else self.step


@dataclass(frozen=True)
class Run:
    """The parts of a run: config, rule, schedule and plan; the backend; and the state that training changes.

    steps_per_epoch: updates in an epoch, of a config in epochs. world: all ranks that train the model. guard: this
    rank's losses. observers: optional parts, in the order they are called. structure: the modules at build.
    doubts: what this rank has seen to be wrong and all ranks will raise at the next place where they meet.
    warned: what the user was warned of: parameters that became frozen or trainable, and copies that drifted apart.
    """

    config: GaPConfig
    steps_per_epoch: int | None
    rule: rules.Rule
    schedule: Schedule
    plan: Plan
    structure: Structure
    worker: ParallelWorker | None
    backend: Backend
    world: Comm
    mask_state: MaskState
    learning_rate: LearningRate
    grad_scaler: Any
    guard: consistency.LossGuard
    observers: list[Observer]
    doubts: list[str] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    @property
    def signature(self) -> str:
        """One line with every setting of the method that changes a result."""
        return self.config.signature(__version__)

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers by name."""
        return dict(export.buffers(self.backend.module))

    def agree(self, step: int, place: str) -> None:
        """Checks that all ranks are at the same step of the same run, with finite losses and weights that obey masks.

        Call it before anything that cannot be undone.

        Args:
            place: what comes now, for the message.
        Raises:
            ValueError: on all ranks, with the ranks that disagree and what they disagree on, or the first entry with a
                pruned weight that is not 0.
        """
        consistency.check_position(self.world, step, self.signature, self.plan.fingerprint, self.guard.take(), place)
        self.agree_on_weights(place)
        self.agree_on_masks()
        for name, warning in consistency.changed_flags(self.plan, self.backend.module):
            self.warn_once(name, warning)
        if added := self.structure.added(self.backend.module):
            self.warn_once(*added)
        shards, comm = self.mask_state.shards, self.backend.comm
        if drifted := consistency.drifted_weights(self.plan, shards, comm, self.world):
            self.warn_once("drifted", drifted)

    def warn_once(self, about: str, warning: str) -> None:
        """Says a warning, unless there was one about the same thing."""
        if about not in self.warned:
            self.warned.add(about)
            self.say(warning, logging.WARNING)

    def agree_on_weights(self, place: str) -> None:
        """Checks on all ranks together that every pruned weight is exactly 0, and that nothing was in doubt before."""

        def look() -> None:
            if lost := self.structure.lost(self.backend.module):
                self.doubt(lost, wait=True)
            self.doubt_weights(place, wait=True)
            if unheld := self.mask_state.unheld():
                self.doubt(
                    f"{unheld[0]}: is updated by no optimizer any more ({len(unheld)} entries are not; {place}). The "
                    "model's parameters were replaced, as by load_state_dict(assign=True), or the optimizer's "
                    "parameter groups were changed.",
                    wait=True,
                )
            self.raise_doubts()

        raise_on_all_ranks(self.world, look)

    def doubt_weights(self, place: str, names: Sequence[str] | None = None, wait: bool = False) -> None:
        """Looks for pruned weights on this rank that are not 0, in all entries or in some."""
        if names is not None and not self.mask_state.any_revived(names):
            return
        if found := self.mask_state.revived(names):
            self.doubt(consistency.revived_message(*found, place), wait)

    def doubt(self, message: str, wait: bool = False) -> None:
        """Raises ValueError where this rank is alone, unless it shall wait; else at the next place where ranks meet."""
        self.doubts.append(message)
        if self.world.size == 1 and not wait:
            self.raise_doubts()

    def forget(self) -> None:
        """Forgets losses, doubts, gradients and micro-batches that other weights have left. Call it before a load."""
        self.guard.take()
        self.doubts.clear()
        self.backend.discard()

    def raise_doubts(self) -> None:
        """Raises ValueError with the first doubt of this rank, if there is any."""
        if self.doubts:
            message, *_ = self.doubts
            self.doubts.clear()
            raise ValueError(message)

    def agree_on_masks(self) -> None:
        """Checks that all copies of every mask are equal, else raises ValueError on all ranks with the first entry."""
        state = self.mask_state
        backend = self.backend
        consistency.check_masks(self.plan, state.bits, state.shards, backend.comm, self.world, backend.replicated)

    def to_prune(self, phase: Phase) -> Mapping[Entry, rules.PruneByMagnitude]:
        """Updates that give the masks of the final model to what is above its target in this phase."""
        final = self.schedule.phases[-1]
        return {
            entry: rules.PruneByMagnitude(entry.keep)
            for entry in self.plan.entries
            if final.at_target(entry.partition) and not phase.at_target(entry.partition)
        }

    def state(self, place: Place, client_state: Any = None) -> State:
        """The record of this run in a checkpoint."""
        return State(
            applied_steps=place.step,
            ended_at=place.ended,
            optimizers=[type(optimizer).__name__ for optimizer in self.backend.optimizers],
            signature=self.signature,
            config=self.config,
            steps_per_epoch=self.steps_per_epoch,
            plan=self.plan.fingerprint,
            entries=[(e.name, list(e.shape), e.partition, e.keep, list(e.dims)) for e in self.plan.entries],
            worker=None if self.worker is None else self.worker.index,
            first_steps=[phase.first_step for phase in self.schedule.phases],
            ranks=self.world.size,
            backend=self.backend.name,
            lr_scheduler=self.learning_rate.state(),
            grad_scaler=None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            counters=self.backend.counters(),
            client_state=client_state,
        )

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Logs on rank 0."""
        if self.world.rank == 0:
            log.log(level, message)
