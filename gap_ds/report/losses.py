"""The losses of a run over its steps: metrics.jsonl of the examples, or what a Trainer has logged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from gap_ds.storage.json import Count, Record, parse_json, read_json

METRICS, TRAINER = "metrics.jsonl", "trainer_state.json"
#: A line longer than this is damage.
_LONGEST_LINE = 64 * 2**20

#: A number that may be NaN, infinite or too large for an axis in a log, which then counts as missing.
_Logged = Annotated[float | None, AfterValidator(lambda value: value if value is None or abs(value) < 1e300 else None)]


class Point(Record):
    """The log of one step. kind: train or validation; epoch: that has ended, in a validation."""

    model_config = ConfigDict(allow_inf_nan=True)

    kind: str
    step: Count
    epoch: Count | None = None
    loss: _Logged = None
    density: _Logged = None
    bleu: _Logged = None


@dataclass(frozen=True)
class Log:
    """The points of a run, and sentences on what could not be read."""

    points: list[Point]
    missing: list[str] = field(default_factory=list)


def exists(folder: Path) -> bool:
    """True if a folder has a log of losses."""
    return (folder / METRICS).is_file() or _trainer_file(folder) is not None


def read(folder: Path) -> Log:
    """The log of a run's folder; damaged parts are left out."""
    path = _trainer_file(folder)
    if (folder / METRICS).is_file() or path is None:
        return _of_metrics(folder / METRICS)
    try:
        rows = read_json(path, _TrainerState).log_history
    except ValueError as error:
        return Log([], [f"losses: {error}"])
    return Log([point for row in rows for point in row.points()])


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not empty; none if there is no such file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        while line := file.readline(_LONGEST_LINE):
            if line.strip():
                yield line


def _of_metrics(path: Path) -> Log:
    points, damaged = [], 0
    for line in lines(path):
        try:
            points.append(parse_json(line, Point))
        except ValueError:
            damaged += 1
    missing = [f"{damaged:,} damaged line{'s' * (damaged > 1)} of {path.name}"] if damaged else []
    if not any(point.kind in ("train", "validation") for point in points):
        missing.append(f"losses: {path.name} is missing or empty")
    return Log(points, missing)


class _TrainerRow(Record):
    """A row of a Trainer's log: of a training step or of an evaluation."""

    model_config = ConfigDict(allow_inf_nan=True)

    step: Count
    loss: _Logged = None
    eval_loss: _Logged = None
    eval_bleu: _Logged = None
    density: _Logged = Field(None, alias="gap/density")

    def points(self) -> Iterator[Point]:
        # By the keys that are there: a loss of NaN is a gap in the curve, and not the step before it.
        if not self.model_fields_set.isdisjoint(("loss", "density")):
            yield Point(kind="train", step=self.step, loss=self.loss, density=self.density)
        if not self.model_fields_set.isdisjoint(("eval_loss", "eval_bleu")):
            yield Point(kind="validation", step=self.step, loss=self.eval_loss, bleu=self.eval_bleu)


class _TrainerState(Record):
    model_config = ConfigDict(allow_inf_nan=True)

    global_step: Count = 0
    log_history: list[_TrainerRow] = Field(default_factory=list)


def _trainer_file(folder: Path) -> Path | None:
    """The newest state of a Trainer in its output folder: its own, or that of its last checkpoint."""
    found = [path for path in (folder / TRAINER, *folder.glob(f"checkpoint-*/{TRAINER}")) if path.is_file()]

    def step(path: Path) -> int:
        try:
            return read_json(path, _TrainerState).global_step
        except ValueError:
            return -1

    return max(found, key=step, default=None)
