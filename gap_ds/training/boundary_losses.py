"""Losses around the boundaries of phases, as a file of JSON lines beside the history of the masks.

Each line is a boundary: `step`, the first step of the new phase; `before` and `after`, the losses of rank 0 in up to 50
steps before and after it, in the order of the steps, averaged over the micro-batches of a step. `gap-ds report` draws
it. Losses stay on their device until a line is written.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.method.schedule import Phase
from gap_ds.sharding.comm import Comm
from gap_ds.storage.errors import summarize_error
from gap_ds.storage.json import Record, read_json, write_json
from gap_ds.training.observer import Observer

NAME = "gap_losses.jsonl"
#: Steps before and after a boundary.
STEPS = 50
_STATE = "losses.json"


class Line(Record):
    """Losses before and after a boundary; null where a loss was not finite."""

    step: int
    before: list[float | None]
    after: list[float | None]


class _State(Record):
    recent: list[float | None]
    windows: list[Line]


@dataclass
class _Window:
    """A boundary whose losses are still coming."""

    step: int
    before: list[Tensor]
    after: list[Tensor] = field(default_factory=list)

    def line(self) -> Line:
        return Line(step=self.step, before=_numbers(self.before), after=_numbers(self.after))


class BoundaryLosses(Observer):
    """Records losses around boundaries into a file that rank 0 writes. A disk that refuses it is a warning."""

    def __init__(self, path: Path, world: Comm) -> None:
        self._path, self._world = path, world
        self._micro: list[Tensor] = []
        self._recent: deque[Tensor] = deque(maxlen=STEPS)
        self._windows: list[_Window] = []
        self._began = False

    def loss_seen(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch."""
        if self._world.rank == 0:
            self._micro.append(loss.detach().float().mean())

    def update_applied(self) -> None:
        """Adds the loss of a step; writes the boundaries that have all theirs."""
        if not self._micro:
            return
        mean = torch.stack(self._micro).mean()
        self._micro.clear()
        self._recent.append(mean)
        for window in self._windows:
            window.after.append(mean)
        while self._windows and len(self._windows[0].after) == STEPS:
            self._write(self._windows.pop(0))

    def masks_changed(self, step: int, phase: Phase) -> None:
        """Begins a window at the boundary of a phase."""
        if step == phase.first_step and step and self._world.rank == 0:
            self._windows.append(_Window(step, list(self._recent)))

    def close(self) -> None:
        """Writes the boundaries that have some losses."""
        for window in self._windows:
            self._write(window)
        self._windows = []

    def write(self, folder: Path) -> None:
        """Saves the losses that a line may still need."""
        if self._world.rank == 0:
            windows = [window.line() for window in self._windows]
            write_json(folder / _STATE, _State(recent=_numbers(self._recent), windows=windows))

    def read(self, folder: Path) -> _State | None:
        """Reads the file of `write`; None if there is none."""
        path = folder / _STATE
        return read_json(path, _State) if self._world.rank == 0 and path.is_file() else None

    def restore(self, found: Any, step: int, phase: Phase) -> None:
        """Goes on before a step: lines of later boundaries, and of those that the run records again, are dropped."""
        self._micro, self._began = [], True
        self._recent = deque(_tensors(found.recent if found else []), STEPS)
        windows = found.windows if found else []
        self._windows = [_Window(w.step, _tensors(w.before), _tensors(w.after)) for w in windows]
        if self._world.rank == 0 and self._path.is_file():
            open_steps = {window.step for window in self._windows}
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if (at := _step(line)) is not None and at <= step and at not in open_steps]
            self._put("w", "".join(f"{line}\n" for line in kept))

    def _write(self, window: _Window) -> None:
        self._put("a" if self._began else "w", json.dumps(window.line().model_dump()) + "\n")
        self._began = True

    def _put(self, mode: str, text: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            warnings.warn(
                f"{self._path}: {summarize_error(error)}: the losses around boundaries are not complete", stacklevel=2
            )


def _numbers(losses: Iterable[Tensor]) -> list[float | None]:
    values = (float(loss) for loss in losses)  # one by one: those of a checkpoint are on the CPU
    return [value if math.isfinite(value) else None for value in values]


def _tensors(losses: list[float | None]) -> list[Tensor]:
    numbers = (float("nan") if loss is None else loss for loss in losses)
    return [torch.tensor(number, dtype=torch.float32, device="cpu") for number in numbers]


def _step(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
