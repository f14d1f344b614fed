"""A run as plain data, read from its folder; it may be unfinished. E entries.

results.json      scores, counts by entry, cost: written when the run is over
metrics.jsonl     a line every so many steps (kind "train") and at the end of an epoch (kind "validation"); of a Trainer
                  trainer_state.json instead (losses.py)
gap_history.jsonl a line for each boundary and update: see `History`
gap_losses.jsonl  a line for each boundary: losses before and after it
model/            the export, with its own gap.json; or the folder itself
checkpoints/      the latest one's state.json has the config of a run that is not over; or checkpoint-N of a Trainer
gap.json          the config, if the run was given one in its folder
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from gap_ds import checkpoint
from gap_ds.checkpoint.run_state import State, StoredConfig
from gap_ds.export.info import INFO, EntryInfo, ExportInfo, is_export
from gap_ds.method import schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.schedule import Schedule
from gap_ds.report import losses
from gap_ds.storage.json import Count, Record, parse_json, read_json
from gap_ds.training import boundary_losses, history

#: Scores that results.json may have, in the order of the columns, and how to write them.
SCORES = {
    "bleu": "BLEU",
    "bleu_uncased": "BLEU uncased",
    "chrf": "chrF",
    "accuracy": "accuracy",
    "top1": "top-1",
    "top5": "top-5",
    "perplexity": "perplexity",
}


class Results(Record):
    """results.json, as far as the report reads it. Every part may be missing."""

    signature: str | None = None
    config: StoredConfig | None = None
    applied_steps: Count | None = None
    entry_sparsity: float | None = None
    model_sparsity: float | None = None
    mean_density: float | None = None
    training_flops: float | None = None
    density_at_end: float | None = None
    train_seconds: float | None = None
    steps_per_epoch: Annotated[int, Field(ge=1)] | None = None
    worker: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    entries: dict[str, EntryInfo] = Field(default_factory=dict)
    bleu: float | None = None
    bleu_uncased: float | None = None
    chrf: float | None = None
    accuracy: float | None = None
    top1: float | None = None
    top5: float | None = None
    perplexity: float | None = None


class _Header(Record):
    format: str
    version: int
    entries: list[tuple[str, Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0, lt=2**31)]]]


class Boundary(Record):
    """Changes of the masks before one step: a line of the history after its first, with a value for each entry.

    kept: weights active in the steps that follow; all of a dense entry. came, went: weights that the entry's new mask
    keeps and its last one did not, and the reverse; null for an entry that gets no mask here, or never had one before.
    active: weights that were active in any step so far, the next one included.
    """

    step: Count
    phase: Count
    kept: list[Count]
    came: list[Count | None]
    went: list[Count | None]
    active: list[Count]

    @model_validator(mode="after")
    def _even(self) -> Boundary:
        if len({len(self.kept), len(self.came), len(self.went), len(self.active)}) != 1:
            raise ValueError("lists of different lengths")
        return self


@dataclass(frozen=True)
class History:
    """gap_history.jsonl: names, sizes and partitions of E entries, and the changes at every boundary."""

    names: list[str]
    numel: list[int]
    partition: list[int]
    boundaries: list[Boundary]

    @property
    def ever_sparse(self) -> bool:
        """True if any entry ever had a mask; of a dense run there is nothing to draw."""
        return any(boundary.kept != self.numel for boundary in self.boundaries)


@dataclass
class Run:
    """A run. `missing`: parts that the report cannot show, with the reason; curves are (step, value) pairs.

    model: the folder of the export, if there is one. density: as it was logged. epochs: (step, number of epochs that
    have ended by then). around: losses around boundaries.
    """

    name: str
    folder: Path
    results: Results
    signature: str | None
    config: GaPConfig | None
    schedule: Schedule | None
    entries: dict[str, EntryInfo]
    history: History | None
    export: ExportInfo | None
    model: Path
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    bleu: list[tuple[int, float]] = field(default_factory=list)
    density: list[tuple[int, float]] = field(default_factory=list)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    around: list[boundary_losses.Line] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float]:
        """Final scores by their key in SCORES."""
        return {key: value for key in SCORES if (value := getattr(self.results, key)) is not None}

    @property
    def layers(self) -> dict[str, float]:
        """Density of each entry in the final model, as it was counted."""
        return {name: entry.nonzero / entry.numel for name, entry in self.results.entries.items() if entry.numel}

    @property
    def steps(self) -> int | None:
        """Applied steps so far."""
        if self.results.applied_steps is not None:
            return self.results.applied_steps
        points = [*self.train, *self.validation]
        return max(step for step, _ in points) if points else None

    def per_partition(self) -> tuple[list[int], list[int]]:
        """(kept weights, weights) of each partition, by the budgets; nominal ones where the entries are not known."""
        if not self.entries:
            assert self.config is not None
            return [round(1000 * (1 - self.config.sparsity))] * self.config.kappa, [1000] * self.config.kappa
        kappa = 1 + max(entry.partition for entry in self.entries.values())
        keep, numel = [0] * kappa, [0] * kappa
        for entry in self.entries.values():
            keep[entry.partition] += entry.keep
            numel[entry.partition] += entry.numel
        return keep, numel

    def figures(self) -> dict[str, Any]:
        """The figures for the table and `--json`."""
        results = self.results
        return {
            "name": self.name,
            "folder": str(self.folder),
            "signature": self.signature,
            "method": self.config.method if self.config is not None else None,
            "steps": self.steps,
            "finished": results.applied_steps is not None,
            "entry_sparsity": results.entry_sparsity,
            "model_sparsity": results.model_sparsity,
            "density_at_end": results.density_at_end,
            "mean_density": results.mean_density,
            "training_flops": results.training_flops,
            "density_of_entries": [min(self.layers.values()), max(self.layers.values())] if self.layers else None,
            "train_seconds": results.train_seconds,
            "training_loss": _last(self.train),
            "validation_loss": _last(self.validation),
            "scores": self.scores,
            "missing": self.missing,
        }


def _last(curve: Sequence[tuple[int, float]]) -> float | None:
    """The last value, if it is a number."""
    return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None


def find(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs; a folder of parallel GaP stands for those of its workers.

    Raises:
        ValueError: a folder holds no run.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder.")
        workers = sorted(path for path in folder.glob("worker_*") if _is_run(path))
        if not _is_run(folder) and not workers:
            raise ValueError(
                f"{folder}: is no folder of a run, it has neither {losses.METRICS} nor results.json, nor a Trainer's "
                f"{losses.TRAINER}."
            )
        found += [folder] if _is_run(folder) else workers
    return list(dict.fromkeys(found))


def load(folder: Path, name: str) -> Run:
    """A run from its folder.

    Raises:
        ValueError: results.json or the export's gap.json is damaged. Damaged lines of metrics are counted in `missing`.
    """
    model = folder / "model" if (folder / "model" / INFO).is_file() else folder
    export = read_json(model / INFO, ExportInfo) if is_export(model) or model != folder else None
    # The examples copy the export's figures into theirs; of a Trainer's run there is nothing else.
    written = (
        [folder / "results.json"] if (folder / "results.json").is_file() else [model / INFO] * (export is not None)
    )
    results = read_json(written[0], Results) if written else Results()
    state = _state(folder)
    signature = results.signature or (state.signature if state is not None else None)
    config = next((found.config for found in (results, state, export) if found is not None and found.config), None)
    config = config or _config(folder / "gap.json")
    if any(entry.partition >= len(results.entries) for entry in results.entries.values()):
        raise ValueError(f"{folder / 'results.json'}: is damaged: it has more partitions than entries.")
    run = Run(name, folder, results, signature, config, None, dict(results.entries), None, export, model)
    if not written:
        run.missing.append("scores, cost and layers: the run is not over (it has no results.json)")
        if state is not None:
            run.entries = {
                name: EntryInfo(keep=keep, nonzero=keep, numel=math.prod(shape), partition=k)
                for name, shape, k, keep, _ in state.entries
                if k < len(state.entries)
            }
    _read_metrics(run)
    run.schedule = _schedule(run, state)
    if run.schedule is None:
        run.missing.append("the schedule: neither results.json nor a checkpoint has it")
    run.history = _history(run)
    run.around = _around(run)
    return run


def names_of(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: their own, with their parents' where that is needed.

    >>> names_of([Path("a/x"), Path("a/y")]), names_of([Path("a/x"), Path("b/x")]), names_of([Path("p/worker_0")])
    (['x', 'y'], ['a/x', 'b/x'], ['p/worker_0'])
    """
    paths = [folder.resolve().parts[1:] if folder.is_absolute() else folder.parts for folder in folders]
    depth = 2 if any(parts and parts[-1].startswith("worker_") for parts in paths) else 1
    while len({parts[-depth:] for parts in paths}) < len(paths) and depth < max(map(len, paths)):
        depth += 1
    return ["/".join(parts[-depth:]) or str(folder) for parts, folder in zip(paths, folders, strict=True)]


def _is_run(folder: Path) -> bool:
    return losses.exists(folder) or (folder / "results.json").is_file()


def _state(folder: Path) -> State | None:
    """state.json of the latest checkpoint, where there is a readable one."""
    path = checkpoint.newest(folder / "checkpoints") or checkpoint.newest(folder)
    try:
        return None if path is None else read_json(path / "gap" / "state.json", State)
    except ValueError:
        return None


def _config(path: Path) -> GaPConfig | None:
    try:
        return GaPConfig.load(path) if path.is_file() else None
    except ValueError:
        return None


def _schedule(run: Run, state: State | None) -> Schedule | None:
    config = run.config
    if config is None:
        return None
    worker = run.results.worker or (state.worker if state is not None else None) or 0
    steps_per_epoch = run.results.steps_per_epoch or (state.steps_per_epoch if state is not None else None)
    if steps_per_epoch is None and run.epochs:
        # As the losses at the ends of epochs have it, if all agree.
        step, epochs = run.epochs[0]
        if all(s * epochs == step * e for s, e in run.epochs) and step % epochs == 0:
            steps_per_epoch = step // epochs
    try:
        return schedule.build(config, steps_per_epoch if config.in_epochs else None, worker)
    except ValueError:
        return None


def _read_metrics(run: Run) -> None:
    log = losses.read(run.folder)
    for point in log.points:
        curve = {"train": run.train, "validation": run.validation}.get(point.kind)
        if curve is not None:
            curve.append((point.step, math.nan if point.loss is None else point.loss))
        if point.density is not None:
            run.density.append((point.step, point.density))
        if point.kind == "validation" and point.epoch is not None:
            run.epochs.append((point.step, point.epoch + 1))
        if point.kind != "train" and point.bleu is not None:
            run.bleu.append((point.step, point.bleu))
    for curve in (run.train, run.validation, run.bleu, run.density):
        curve.sort(key=lambda point: point[0])
    run.missing += log.missing


def _history(run: Run) -> History | None:
    path = run.folder / history.NAME
    if not path.is_file():
        run.missing.append(f"changes of masks and exploration: this run recorded none (it has no {history.NAME})")
        return None
    try:
        lines = losses.lines(path)
        header = parse_json(next(lines, ""), _Header)
        if (header.format, header.version) != (history.FORMAT, history.VERSION):
            raise ValueError("another format")
        names = [row[0] for row in header.entries]
        numel, partition = [row[1] for row in header.entries], [row[2] for row in header.entries]
        boundaries = []
        for line in lines:
            try:
                boundaries.append(parse_json(line, Boundary))
            except ValueError:  # a kill can cut the last line short
                run.missing.append(f"what follows line {len(boundaries) + 1} of {history.NAME}, which is damaged")
                break
        if not boundaries or any(len(boundary.kept) != len(names) for boundary in boundaries):
            raise ValueError("no boundary, or another number of entries")
    except ValueError:
        run.missing.append(f"changes of masks and exploration: {history.NAME} is damaged or of another version")
        return None
    return History(names, numel, partition, sorted(boundaries, key=lambda b: b.step))


def _around(run: Run) -> list[boundary_losses.Line]:
    """The losses around boundaries; damaged lines are left out."""
    found, damaged = [], 0
    for line in losses.lines(run.folder / boundary_losses.NAME):
        try:
            found.append(parse_json(line, boundary_losses.Line))
        except ValueError:
            damaged += 1
    if damaged:
        run.missing.append(f"{damaged:,} damaged line{'s' * (damaged > 1)} of {boundary_losses.NAME}")
    return sorted(found, key=lambda line: line.step)
