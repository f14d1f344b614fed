"""What a checkpoint says of its run: its place in the schedule, what it belongs to, and the random state of a rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gap_ds.sharding.comm import summarize_error
from gap_ds.storage.json import Record

Count = Annotated[int, Field(ge=0, lt=2**63)]
Small = Annotated[int, Field(ge=0, lt=2**31)]
#: name, shape, partition, keep, dims: as the plan's fingerprint has them.
EntryRow = tuple[str, list[Count], Small, Count, list[Count]]


class State(Record):
    """gap/state.json. Older versions wrote no `entries`, `counters` and `manifest`."""

    applied_steps: Count
    signature: str
    plan: str
    first_steps: Annotated[list[Count], Field(min_length=1)]
    ranks: Annotated[int, Field(ge=1, lt=2**31)]
    backend: str
    finished_early: bool = False
    optimizers: list[str] | None = None
    worker: Small | None = None
    entries: list[EntryRow] | None = None
    lr_scheduler: list[dict[str, Any]] | None = None
    grad_scaler: dict[str, Any] | None = None
    counters: dict[str, float] = Field(default_factory=dict)
    manifest: bool = False
    client_state: Any = None

    def check(self, path: Path, now: State) -> None:
        """That this is a place in the run that `now` is a place of, too.

        Raises:
            ValueError: it is of another plan, config, worker or schedule, or its learning rate was scheduled in another
                way; the message says what to do.
        """
        if self.plan != now.plan:
            raise ValueError(
                f"{path}: was written for another plan ({self.plan}, now {now.plan}): the model, the sparsity, the "
                "distribution, the pattern or the partitions differ. Restore them, or start in a new folder."
            )
        was, is_ = (s.signature.rpartition("|v:")[0].split("|") for s in (self, now))
        if was != is_:
            changed = [f"{a} (now {b})" for a, b in zip(was, is_, strict=False) if a != b] or ["other settings"]
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
        for what, then, current in (
            ("learning-rate scheduler", self.lr_scheduler, now.lr_scheduler),
            ("gradient scaler", self.grad_scaler and [self.grad_scaler], now.grad_scaler and [now.grad_scaler]),
        ):
            if then and current and [state.keys() for state in then] != [state.keys() for state in current]:
                raise ValueError(f"{path}: was written with another {what}. Build the same one, or start anew.")


class RandomState(Record):
    """gap/rng_R.json: a process's random generators: torch (CPU and current GPU), NumPy, Python."""

    torch: str
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[int, list[int], float | None]
    cuda: str | None = None

    @classmethod
    def now(cls) -> RandomState:
        """That of this process."""
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
            ValueError: a state is none; some generators may have been set.
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
