"""`gap-ds report`: reads runs, draws them, and writes one page with its pictures in it and beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gap_ds.export.weights import weight_files
from gap_ds.method.schedule import Schedule
from gap_ds.report import page as report_page
from gap_ds.report import runs as report_runs
from gap_ds.report.page import Picture
from gap_ds.report.runs import SCORES, History, Run
from gap_ds.storage.atomic import replacing
from gap_ds.storage.errors import printable
from gap_ds.storage.safetensors import Progress, chunks, open_tensors

try:
    from gap_ds.report import drawing, plots
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise ValueError('matplotlib is not installed: the report needs it. Run pip install "gap_ds[plots]".') from None

#: Densities of entries that differ by less become a sentence: a picture of them is a straight line.
_EVEN = 0.005
#: Steps at which densities are drawn: a picture has about as many columns.
_MOST_MARKS = 1500
#: Bins of magnitudes: quarter octaves from 2^-60 to 2^20; what is smaller or larger falls into the outer ones.
_LOWEST, _HIGHEST, _PER_OCTAVE = -60, 20, 4


def report(folders: Sequence[Path], page: Path, progress: Progress) -> dict[str, Any]:
    """Writes the page and the pictures beside it; returns the figures of all runs, for JSON.

    Raises:
        ValueError: a folder holds no run, a file in it is damaged, or the page cannot be written.
    """
    if page.name in ("", "..") or page.is_dir():
        raise ValueError(f"--output {page}: is a folder. Give the page a name, such as {page / 'report.html'}.")
    folders = report_runs.find(folders)
    names = [printable(name) for name in report_runs.names_of(folders)]
    runs = [report_runs.load(folder, name) for folder, name in zip(folders, names, strict=True)]
    jobs = [*_comparisons(runs), *(job for run in runs for job in _pictures(run))]
    pictures: list[Picture] = []
    for i, job in enumerate(jobs):
        progress(job.title, i, len(jobs))
        if (drawn := job.draw()) is not None:
            slug = f"{page.stem}-{_slug(job)}"
            same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?\.png", other.file) is not None for other in pictures)
            file = f"{slug}-{same + 1}.png" if same else f"{slug}.png"
            pictures.append(Picture(job.run, job.title, job.caption, file, drawn))
    used = {key: name for key, name in SCORES.items() if any(key in run.scores for run in runs)}
    figures = [run.figures() for run in runs]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (page.parent / picture.file).write_bytes(picture.png)
        with replacing(page) as aside:
            aside.write_text(report_page.html(figures, used, pictures), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output {page}: cannot be written ({error.strerror}).") from None
    return {
        "page": str(page),
        "pictures": [str(page.parent / picture.file) for picture in pictures],
        "scores": used,
        "runs": figures,
    }


@dataclass(frozen=True)
class _Job:
    """A picture to draw: `draw` gives the PNG, or None where there turns out to be nothing to show."""

    run: str | None
    title: str
    caption: str
    draw: Callable[[], bytes | None]


def _slug(job: _Job) -> str:
    """Part of a file's name: no separators, no spaces."""
    text = f"{job.run or 'all'}-{job.title}".lower()
    return re.sub(r"[^a-z0-9._-]+", "_", text).strip("_")


# -- one run -----------------------------------------------------------------------------------------------------------


def _pictures(run: Run) -> list[_Job]:
    """The pictures of a run, in the order of the page."""
    jobs: list[_Job] = []

    def add(title: str, caption: str, draw: Callable[[], bytes | None]) -> None:
        jobs.append(_Job(run.name, title, caption, draw))

    if run.schedule is not None:
        add(
            "schedule",
            "Each row is a partition; dark is dense. The losses below share its axis. The first losses of fresh "
            "weights may lie above the picture.",
            lambda: _schedule(run),
        )
    elif run.train or run.validation:
        add("losses", "The schedule is not known.", lambda: _losses(run))
    if len(_density_points(run)) > 1:
        add("density", "Of all prunable weights together.", lambda: _density(run))
    if run.history is not None and run.history.ever_sparse:
        add("layers over time", "Rows are in the order of the model.", lambda: _layers_over_time(run))
        add(
            "exploration",
            "Above: how many of the weights that a new mask keeps its partition's mask before had pruned. Below: how "
            "many weights have taken part in training at some time.",
            lambda: _exploration(run),
        )
    if around := _losses_around(run):
        add(
            "losses around boundaries",
            "Training losses of rank 0, one for each step. A boundary lies before step 0 of the axis.",
            lambda: drawing.png(plots.losses_around(around)),
        )
    if run.layers and max(run.layers.values()) - min(run.layers.values()) > _EVEN:
        add("layers", "Counted in the final model. Rows are in the order of the model.", lambda: _layers(run))
    if run.export is not None:
        add(
            "magnitudes",
            "Read from the exported model. Pruned weights are exactly zero; the few smallest others are left out.",
            lambda: _magnitudes(run),
        )
    return jobs


def _schedule(run: Run) -> bytes:
    assert run.schedule is not None
    schedule, (keep, numel) = run.schedule, run.per_partition()
    marks = _marks(schedule)
    rows = [[_of_partition(schedule, step, keep, numel, k) for step in marks[:-1]] for k in range(len(keep))]
    rounds: dict[str, int] = {}
    for phase in schedule.phases:
        if phase.steps:
            name = {"dense": "dense", "finetune": "fine-tuning"}.get(phase.kind, f"round {phase.round}")
            rounds.setdefault(name, phase.first_step)
    first_steps = [phase.first_step for phase in schedule.phases if phase.steps]
    named = [(step, name) for name, step in rounds.items()]
    return drawing.png(plots.schedule(marks, rows, first_steps, named, run.train, run.validation, run.bleu))


def _marks(schedule: Schedule) -> list[int]:
    """The steps at which the density of a partition can change, thinned to those a picture can show, and the end."""
    steps = sorted({step for phase in schedule.phases for step in (phase.first_step, *phase.updates)})
    steps = steps[:: -(-len(steps) // _MOST_MARKS)]
    return sorted({*steps, schedule.total_steps})


def _of_partition(schedule: Schedule, step: int, keep: Sequence[int], numel: Sequence[int], k: int) -> float:
    """Density of one partition in a step."""

    def only(values: Sequence[int]) -> list[int]:
        return [value if i == k else 0 for i, value in enumerate(values)]

    return schedule.density_at(step, only(keep), only(numel)) if numel[k] else 0.0


def _density_points(run: Run) -> list[tuple[float, float]]:
    if run.schedule is None or not run.entries:
        return [(float(step), value) for step, value in run.density]
    keep, numel = run.per_partition()
    return [(step, run.schedule.density_at(step, keep, numel)) for step in _marks(run.schedule)]


def _density(run: Run) -> bytes:
    return drawing.png(plots.density([drawing.Curve(run.name, _density_points(run))]))


def _losses(run: Run) -> bytes:
    return drawing.png(plots.losses(run.train, run.validation, run.bleu))


def _losses_around(run: Run) -> list[drawing.Curve]:
    """A curve for each boundary that has losses on both sides: (steps since the boundary, loss)."""
    curves = []
    for line in run.around:
        losses = [(i - len(line.before), loss) for i, loss in enumerate([*line.before, *line.after])]
        points = [(float(at), loss) for at, loss in losses if loss is not None]
        if points and points[0][0] < 0 <= points[-1][0]:
            curves.append(drawing.Curve(f"step {line.step:,}", points))
    return curves


def _layers_over_time(run: Run) -> bytes:
    assert run.history is not None
    history = run.history
    marks = [boundary.step for boundary in history.boundaries]
    end = max(run.steps or 0, marks[-1] + 1)
    kept = [[boundary.kept[i] / numel for boundary in history.boundaries] for i, numel in enumerate(history.numel)]
    return drawing.png(plots.layers_over_time(drawing.shorten(history.names), [*marks, end], kept))


def _exploration(run: Run) -> bytes:
    assert run.history is not None
    history = run.history
    partitions = sorted(set(history.partition))
    fresh = [drawing.Curve(f"partition {k}", _fresh(history, k), k) for k in partitions]
    active = [drawing.Curve(f"partition {k}", _active(history, k), k) for k in partitions]
    return drawing.png(plots.exploration(fresh, active, run.steps or history.boundaries[-1].step))


def _fresh(history: History, k: int) -> list[tuple[float, float]]:
    """(step, part of the kept weights that is new) where entries of a partition got another mask."""
    points = []
    for boundary in history.boundaries:
        rows = [(boundary.came[i], boundary.kept[i]) for i, p in enumerate(history.partition) if p == k]
        known = [(came, kept) for came, kept in rows if came is not None]
        if kept := sum(kept for _, kept in known):
            points.append((float(boundary.step), sum(came for came, _ in known) / kept))
    return points


def _active(history: History, k: int) -> list[tuple[float, float]]:
    rows = [i for i, p in enumerate(history.partition) if p == k]
    total = sum(history.numel[i] for i in rows)
    return [(float(b.step), sum(b.active[i] for i in rows) / total) for b in history.boundaries]


def _layers(run: Run) -> bytes:
    names = list(run.layers)
    partitions = [run.results.entries[name].partition for name in names]
    return drawing.png(plots.layers(drawing.shorten(names), partitions, list(run.layers.values())))


def _magnitudes(run: Run) -> bytes | None:
    """Reads the export a chunk at a time."""
    assert run.export is not None
    info = run.export
    kappa = 1 + max((entry.partition for entry in info.entries.values()), default=0)
    if not info.entries or kappa > len(info.entries):
        return None
    bins = (_HIGHEST - _LOWEST) * _PER_OCTAVE
    counts, zeros = torch.zeros(kappa, bins, dtype=torch.int64, device="cpu"), [0] * kappa
    for path in weight_files(run.model):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in info.entries:
                    k = info.entries[name].partition
                    for part in chunks(file, name):
                        row, none = histogram(part)
                        counts[k] += row
                        zeros[k] += none
    exponents = [_LOWEST + i / _PER_OCTAVE for i in range(bins + 1)]
    return drawing.png(plots.magnitudes(exponents, counts.tolist(), zeros)) if int(counts.sum()) else None


def histogram(weights: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Counts of |w| in quarter octaves, and of zeros; NaN and infinite values are in neither.

    >>> counts, zeros = histogram(torch.tensor([1.0, -1.0, 0.5, 0.0, math.nan]))
    >>> [(int(i), int(counts[i])) for i in counts.nonzero()], zeros
    ([(236, 1), (240, 2)], 1)
    """
    values = weights.flatten().float().abs()
    zeros = int((values == 0).sum())
    values = values[(values > 0) & torch.isfinite(values)]
    # In fp64, so that powers of two fall on their edge.
    index = torch.floor((values.double().log2() - _LOWEST) * _PER_OCTAVE).long()
    bins = (_HIGHEST - _LOWEST) * _PER_OCTAVE
    return torch.bincount(index.clamp_(0, bins - 1), minlength=bins), zeros


# -- several runs ------------------------------------------------------------------------------------------------------


def _comparisons(runs: Sequence[Run]) -> list[_Job]:
    if len(runs) < 2:
        return []
    jobs: list[_Job] = []
    train = [drawing.Curve(run.name, run.train, i) for i, run in enumerate(runs) if run.train]
    validation = [drawing.Curve(run.name, run.validation, i) for i, run in enumerate(runs) if run.validation]
    if train or validation:
        caption = "The first losses of fresh weights may lie above the picture."
        jobs.append(_Job(None, "losses", caption, lambda: drawing.png(plots.compare_losses(train, validation))))
    bars = _bars(runs)
    if bars:
        caption = "FLOPs are of products with weights, relative to dense training of the same length."
        names = [run.name for run in runs]
        jobs.append(_Job(None, "scores and cost", caption, lambda: drawing.png(plots.compare_bars(names, bars))))
    key = next((key for key in SCORES if sum(key in run.scores for run in runs) > 1), None)
    points = [
        drawing.Curve(run.name, [(run.results.training_flops, run.scores[key])], i)
        for i, run in enumerate(runs)
        if key in run.scores and run.results.training_flops is not None
    ]
    if key is not None and len(points) > 1:
        heading, caption = SCORES[key], "Up and to the left is better."
        jobs.append(
            _Job(None, "score against cost", caption, lambda: drawing.png(plots.cost_against_score(points, heading)))
        )
    curves = [drawing.Curve(run.name, density, i) for i, run in enumerate(runs) if (density := _density_points(run))]
    if curves:
        caption = "Of all prunable weights together."
        jobs.append(_Job(None, "density", caption, lambda: drawing.png(plots.density(curves))))
    return jobs


def _bars(runs: Sequence[Run]) -> list[tuple[str, str, list[float | None]]]:
    """Columns in which a run has a value: the first two scores, the last validation loss, density, cost."""
    scores = ("bleu", "chrf", "accuracy", "top1", "perplexity")
    known = [key for key in scores if any(run.scores.get(key) is not None for run in runs)]
    columns: list[tuple[str, str, list[float | None]]] = [
        (SCORES[key], "", [run.scores.get(key) for run in runs]) for key in known[:2]
    ]
    losses = [run.validation[-1][1] if run.validation else None for run in runs]
    columns.append(("validation loss", "nats", losses))
    columns.append(("final density", "of the entries", [run.results.density_at_end for run in runs]))
    columns.append(("training FLOPs", "dense = 1", [run.results.training_flops for run in runs]))
    return [row for row in columns if any(value is not None and math.isfinite(value) for value in row[2])]
