"""The record of a run in a checkpoint: its config, its place in the schedule, and the random state of each rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PlainSerializer
from torch import Tensor

from gap_ds.method import pattern, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Entry, Plan
from gap_ds.method.schedule import Phase, Schedule
from gap_ds.storage.errors import summarize_error
from gap_ds.storage.json import Count, Record

Small = Annotated[int, Field(ge=0, lt=2**31)]
#: name, shape, partition, keep, dims: as in the plan's fingerprint.
EntryRow = tuple[str, list[Count], Small, Count, Annotated[list[Count], Field(min_length=2, max_length=2)]]
#: A config in a file, with the settings that were given: a default may be a setting that the method refuses.
StoredConfig = Annotated[GaPConfig, PlainSerializer(lambda config: config.model_dump(exclude_unset=True))]


class State(Record):
    """gap/state.json.

    signature: for people. plan: its fingerprint. first_steps: of each phase. steps_per_epoch: of a config in epochs.
    ended_at: the step before which `finish` ended the schedule early.
    """

    applied_steps: Count
    signature: str
    config: StoredConfig
    steps_per_epoch: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    plan: str
    entries: list[EntryRow]
    first_steps: Annotated[list[Count], Field(min_length=1)]
    ranks: Annotated[int, Field(ge=1, lt=2**31)]
    backend: str
    ended_at: Count | None = None
    optimizers: list[str] | None = None
    worker: Small | None = None
    lr_scheduler: list[dict[str, Any]] | None = None
    grad_scaler: dict[str, Any] | None = None
    counters: dict[str, float] = Field(default_factory=dict)
    client_state: Any = None

    def schedule(self) -> Schedule:
        """The schedule of the run; ValueError: the config gives none with these steps per epoch, or another one."""
        found = schedule.build(self.config, self.steps_per_epoch, self.worker or 0)
        if [phase.first_step for phase in found.phases] != self.first_steps:
            raise ValueError("the phases are not those of the config")
        return found

    def phase(self, schedule: Schedule) -> Phase:
        """The phase that the next step belongs to; once the schedule was ended early, its last one."""
        return schedule.phases[-1] if self.ended_at is not None else schedule.phase_at(self.applied_steps)

    def restore_plan(self) -> Plan:
        """The plan of the run, but for the figures of the whole model: `total` and `dense_matmul` are 0."""
        entries = tuple(
            Entry(name, tuple(shape), k, keep, (dims[0], dims[1])) for name, shape, k, keep, dims in self.entries
        )
        shared_budget = self.config.distribution == "global"
        return Plan(entries, self.config.kappa, 0, 0, pattern.parse(self.config.pattern), shared_budget)

    def check(self, path: Path, now: State) -> None:
        """Checks that this record and `now` are of one run.

        Raises:
            ValueError: the plan, config, worker or schedule differ, or the kind of learning-rate scheduler or gradient
                scaler; the message says what to do.
        """
        if self.plan != now.plan:
            raise ValueError(
                f"{path}: was written for another plan ({self.plan}, now {now.plan}){self._first_difference(now)}: the "
                "model, what of it is frozen, the sparsity, the distribution, the pattern or the partitions differ. "
                "Restore them, or start in a new folder."
            )
        if _signature(self.config) != _signature(now.config):
            was, is_ = (s.config.model_dump(exclude={"mask_file"}) for s in (self, now))
            changed = [f"{key}={was[key]!r} (now {is_[key]!r})" for key in was if was[key] != is_[key]]
            raise ValueError(
                f"{path}: was written with {', '.join(changed)}. Restore the config, or start in a new folder."
            )
        if self.worker != now.worker:
            raise ValueError(f"{path}: was written by worker {self.worker}, and this is worker {now.worker}.")
        if self.first_steps != now.first_steps:
            raise ValueError(
                f"{path}: its phases start at steps {self.first_steps[:4]}..., now at {now.first_steps[:4]}...: "
                "an epoch had another number of steps. Restore the data and the batch size, or start in a new folder."
            )
        for name, then, current in (
            ("learning-rate scheduler", self.lr_scheduler, now.lr_scheduler),
            ("gradient scaler", self.grad_scaler and [self.grad_scaler], now.grad_scaler and [now.grad_scaler]),
        ):
            if then and current and [state.keys() for state in then] != [state.keys() for state in current]:
                raise ValueError(f"{path}: was written with another {name}. Build the same one, or start anew.")

    def _first_difference(self, now: State) -> str:
        """The first entry that is another one now, for a message."""
        then, rows = ({row[0]: row[1:] for row in state.entries} for state in (self, now))
        for name in [*then, *rows]:
            if name not in rows:
                return f"; {name} was an entry, and is none now"
            if name not in then:
                return f"; {name} is an entry, and was none"
            if (was := list(then[name])) != (is_ := list(rows[name])):
                names = ("shape", "partition", "kept weights", "dimensions")
                changed = [f"{what} {a}, now {b}" for what, a, b in zip(names, was, is_, strict=True) if a != b]
                return f"; {name}: {', '.join(changed)}"
        return ""


def _signature(config: GaPConfig) -> str:
    """The settings that decide how a run goes on: not how its first masks were chosen."""
    if not config.reuses_masks:
        config = config.model_copy(update={"mask_init": "random"})
    return config.signature("")


class RandomState(Record):
    """gap/rng_R.json: state of a process's random generators: torch (CPU and current GPU), NumPy, Python."""

    torch: str
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[int, list[int], float | None]
    cuda: str | None = None

    @classmethod
    def now(cls) -> RandomState:
        """The state of this process."""
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        version, internal, next_gauss = random.getstate()
        return cls(
            torch=bytes(torch.get_rng_state().numpy()).hex(),
            numpy=(str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
            python=(version, list(internal), next_gauss),
            cuda=bytes(torch.cuda.get_rng_state().numpy()).hex() if torch.cuda.is_available() else None,
        )

    def restore(self) -> None:
        """Sets the generators of this process.

        Raises:
            ValueError: a state is damaged; some generators may have been set.
        """

        def tensor(text: str) -> Tensor:
            return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

        try:
            torch.set_rng_state(tensor(self.torch))
            kind, keys, position, has_gauss, gauss = self.numpy
            np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
            version, internal, next_gauss = self.python
            random.setstate((version, tuple(internal), next_gauss))
            if self.cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensor(self.cuda))
        except (ValueError, TypeError, RuntimeError, OverflowError, IndexError) as error:
            raise ValueError(f"the random state of a checkpoint is damaged ({summarize_error(error)})") from None
