"""Pictures of runs, from plain numbers: the ones on the page of `gap-ds report`. Needs matplotlib: gap_ds[plots].

Every function returns a figure without a window or global state; `drawing.png` makes a file of it. K partitions, E
entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gap_ds.report.drawing import (
    COLOURS,
    DENSITY_MAP,
    GREY,
    MOST_LINES,
    WIDTH,
    Curve,
    Points,
    clip_start,
    column,
    entry_names,
    legend_above,
    legend_below,
    line_look,
    marker_of,
    short,
    smooth,
    styled,
    thinned,
    thousands,
    xy,
)

#: Bins at the ends of a histogram that have less of every partition are left out.
_LEAST_SHARE = 0.0005


# -- one run -----------------------------------------------------------------------------------------------------------


@styled
def schedule(
    marks: Sequence[int],
    density: Sequence[Sequence[float]],
    boundaries: Sequence[int],
    rounds: Sequence[tuple[int, str]],
    train: Points,
    validation: Points,
    bleu: Points,
) -> Figure:
    """When each partition is dense, and the losses over it.

    Args:
        marks: the S + 1 steps between which densities do not change; the last is the end of the run.
        density: of each of K partitions in each of the S spans.
        boundaries: first steps of the phases, at which lines are drawn.
        rounds: first step and name of each round.
        train, validation, bleu: losses in nats (of a token, of a picture), and scores; each may be empty.
    """
    k = len(density)
    row = max(0.16, min(0.36, 4.0 / k))
    panels = [row * k + 0.3, *([3.1] if train or validation else []), *([1.5] if bleu else [])]
    figure = Figure(figsize=(WIDTH, sum(panels) + 1.1), layout="constrained")
    axes = column(figure, panels)
    timeline, *rest = axes
    edges = np.arange(k + 1) - 0.5
    image = timeline.pcolormesh(marks, edges, np.asarray(density), cmap=DENSITY_MAP, vmin=0, vmax=1)
    timeline.hlines(edges[1:-1], marks[0], marks[-1], color="white", linewidth=1.5)
    timeline.invert_yaxis()
    timeline.grid(False)
    timeline.yaxis.set_major_locator(MaxNLocator(nbins=min(k, 12), integer=True, min_n_ticks=1))
    timeline.set_ylabel("partition")
    timeline.set_title("Schedule", pad=18 if rounds else 6)
    # Names of rounds stand above their beginnings, as far as there is room for them.
    room, at = (marks[-1] - marks[0]) / 16, -math.inf
    for step, name in rounds:
        if step - at >= room:
            timeline.annotate(name, (step, 1), (1, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                              fontsize=9, color=GREY)  # fmt: skip
            at = step
    bar = figure.colorbar(image, ax=timeline, ticks=[0, 0.5, 1], pad=0.01, aspect=8 + 2 * k)
    bar.set_label("density")
    bar.outline.set_visible(False)
    for axis in rest:
        if len(boundaries) <= 60:
            for step in boundaries[1:]:
                axis.axvline(step, color="#b8bcc0", linewidth=0.8, zorder=0.5)
    if train or validation:
        _losses(rest[0], train, validation, bool(boundaries[1:]))
    if bleu:
        rest[-1].plot(*xy(bleu), color=COLOURS[2], marker="D", markersize=4)
        rest[-1].set_ylabel("BLEU")
    axes[-1].set_xlabel("applied optimizer steps")
    axes[-1].set_xlim(marks[0], marks[-1] + 0.006 * (marks[-1] - marks[0]))
    thousands(axes[-1])
    return figure


@styled
def losses(train: Points, validation: Points, bleu: Points) -> Figure:
    """The losses alone, of a run whose schedule is not known."""
    panels = [3.1, *([1.5] if bleu else [])]
    figure = Figure(figsize=(WIDTH, sum(panels) + 0.8), layout="constrained")
    axes = column(figure, panels)
    _losses(axes[0], train, validation, False)
    if bleu:
        axes[-1].plot(*xy(bleu), color=COLOURS[2], marker="D", markersize=4)
        axes[-1].set_ylabel("BLEU")
    axes[-1].set_xlabel("applied optimizer steps")
    thousands(axes[-1])
    return figure


def _losses(axis: Axes, train: Points, validation: Points, has_boundaries: bool) -> None:
    if train:
        x, y = xy(thinned(train))
        few = len(train) < 12
        axis.plot(x, y, color=COLOURS[0], alpha=1 if few else 0.35, linewidth=1, marker="." if few else None,
                  label="training, one batch")  # fmt: skip
        if not few:
            window = max(5, len(y) // 10)
            axis.plot(x, smooth(y, window), color=COLOURS[0], linewidth=2, label="training, moving average")
    if validation:
        axis.plot(*xy(validation), color=COLOURS[1], marker="o", markersize=4.5, linewidth=1.5, label="validation")
    if has_boundaries:
        axis.plot([], [], color="#b8bcc0", linewidth=0.8, label="boundary")
    axis.set_ylabel("loss in nats")
    axis.set_title("Losses")
    clip_start(axis, [*train, *validation])
    legend_above(axis)


@styled
def losses_around(boundaries: Sequence[Curve]) -> Figure:
    """Training losses around boundaries: (steps since the boundary, loss), thin, and their mean."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    at: dict[float, list[float]] = {}
    for i, curve in enumerate(boundaries):
        axis.plot(*xy(curve.points), color=COLOURS[0], alpha=max(0.08, 0.5 / len(boundaries) ** 0.5), linewidth=0.8,
                  label=None if i else "each boundary")  # fmt: skip
        for x, y in curve.points:
            at.setdefault(x, []).append(y)
    full = sorted(x for x, values in at.items() if len(values) == len(boundaries))
    axis.plot(full, [sum(at[x]) / len(at[x]) for x in full], color=COLOURS[1], linewidth=2, label="mean")
    axis.axvline(-0.5, color="#b8bcc0", linewidth=0.8, zorder=0.5)
    axis.set_xlabel("steps since the boundary")
    axis.set_ylabel("loss in nats")
    axis.set_title(f"Training losses around {len(boundaries)} boundar{'ies' if len(boundaries) > 1 else 'y'}")
    legend_above(axis)
    return figure


@styled
def density(curves: Sequence[Curve]) -> Figure:
    """Density of all entries together over the run, as steps; of one run or of several."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axis = figure.subplots()
    for curve in curves[:MOST_LINES]:
        x, y = xy(curve.points)
        axis.plot(x, y, drawstyle="steps-post", linewidth=2, label=curve.name, **line_look(curve.look))
    axis.set_ylim(0, 1.04)
    axis.set_ylabel("density of the entries")
    axis.set_xlabel("applied optimizer steps")
    axis.set_title("Density over the run")
    axis.margins(x=0.01)
    thousands(axis)
    if len(curves) > 1:
        legend_below(figure, axis)
    return figure


@styled
def layers(names: Sequence[str], partition: Sequence[int], kept: Sequence[float]) -> Figure:
    """Density of each of E entries in the final model, as points, in the order of the model."""
    e = len(names)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.19 * min(e, 60)), layout="constrained")
    axis = figure.subplots()
    for k in sorted(set(partition)):
        rows = [i for i in range(e) if partition[i] == k]
        look: Any = {"color": COLOURS[k % len(COLOURS)], "marker": marker_of(k)}
        axis.plot([kept[i] for i in rows], rows, linestyle="none", markersize=5, label=f"partition {k}", **look)
    entry_names(axis, names)
    axis.set_ylim(e - 0.4, -0.6)
    axis.set_xlim(0, max(1e-9, min(1.02, 1.15 * max(kept, default=1.0))))
    axis.set_xlabel("density: non-zero weights / weights of the entry")
    axis.set_title("Density of each entry in the final model")
    if len(set(partition)) <= 12:
        legend_below(figure, axis)
    return figure


@styled
def layers_over_time(names: Sequence[str], marks: Sequence[int], kept: Sequence[Sequence[float]]) -> Figure:
    """Density of each of E entries (rows) between the S + 1 marks, as colour."""
    e = len(names)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.19 * min(e, 60)), layout="constrained")
    axis = figure.subplots()
    image = axis.pcolormesh(marks, np.arange(e + 1) - 0.5, np.asarray(kept), cmap=DENSITY_MAP, vmin=0, vmax=1)
    axis.grid(False)
    entry_names(axis, names)
    axis.invert_yaxis()
    axis.set_xlabel("applied optimizer steps")
    axis.set_title("Density of each entry over the run")
    thousands(axis)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.01, aspect=40)
    bar.set_label("density")
    bar.outline.set_visible(False)
    return figure


@styled
def exploration(fresh: Sequence[Curve], active: Sequence[Curve], end: int) -> Figure:
    """The new part of each partition's mask at each boundary, and the part of its weights that was ever active.

    Args:
        fresh: for each partition: (step, part of the kept weights that the last mask had pruned). Not drawn if no
            entry ever got a second mask.
        active: for each partition: (step, part of its weights that were active in some step so far).
        end: last step of the run.
    """
    panels = [2.6] * (1 + any(curve.points for curve in fresh))
    figure = Figure(figsize=(WIDTH, sum(panels) + 1.2), layout="constrained")
    *above, bottom = axes = column(figure, panels)
    for top in above:
        for curve in fresh[:MOST_LINES]:
            look = line_look(curve.look) | {"marker": marker_of(curve.look)}
            top.plot(*xy(curve.points), markersize=5, linewidth=1.2, label=curve.name, **look)
        top.set_ylabel("part of the kept weights")
        top.set_title("New weights in a mask, against the entry's mask before")
    for curve in active[:MOST_LINES]:
        x, y = xy([*curve.points, (end, curve.points[-1][1])] if curve.points else [])
        bottom.plot(x, y, drawstyle="steps-post", linewidth=2, label=curve.name, **line_look(curve.look))
    bottom.set_ylabel("part of all weights")
    bottom.set_title("Weights that were active in any step so far")
    bottom.set_xlabel("applied optimizer steps")
    for axis in axes:
        axis.set_ylim(-0.03, 1.05)
    bottom.set_xlim(0, max(1, end))
    thousands(bottom)
    legend_below(figure, *axes)
    return figure


@styled
def magnitudes(exponents: Sequence[float], counts: Sequence[Sequence[int]], zeros: Sequence[int]) -> Figure:
    """Histograms of |w| of the weights that are not zero, for each of K partitions.

    Args:
        exponents: the B + 1 edges of the bins, as powers of two.
        counts: of each partition in each of B bins. zeros: of each partition, which have no place on the axis.
    """
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axis = figure.subplots()
    edges = np.exp2(np.asarray(exponents, dtype=float))
    for i, (row, pruned) in enumerate(itertools.islice(zip(counts, zeros, strict=True), MOST_LINES)):
        total = sum(row)
        share = np.asarray(row, dtype=float) / max(1, total)
        name = f"partition {i}: {total:,} not zero, {pruned:,} zero"
        axis.stairs(share, edges, linewidth=1.8, label=name, **{**line_look(i), "color": COLOURS[i % len(COLOURS)]})
    axis.set_xscale("log", base=10)
    shares = np.asarray(counts, dtype=float) / np.maximum(1, np.asarray(counts).sum(axis=1, keepdims=True))
    used = np.flatnonzero((shares >= _LEAST_SHARE).any(axis=0))
    if used.size:
        axis.set_xlim(edges[used[0]], edges[used[-1] + 1])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("|weight|, bins of a quarter octave")
    axis.set_ylabel("part of the non-zero weights")
    axis.set_title("Magnitudes of the final weights")
    legend_below(figure, axis, columns=2)
    return figure


# -- several runs ------------------------------------------------------------------------------------------------------


@styled
def compare_losses(train: Sequence[Curve], validation: Sequence[Curve]) -> Figure:
    """Loss curves of several runs: validation, and moving averages of training."""
    shown = [(title, curves) for title, curves in (("Validation loss", validation), ("Training loss", train)) if curves]
    figure = Figure(figsize=(WIDTH, 0.9 + 2.9 * len(shown)), layout="constrained")
    axes = column(figure, [1.0] * len(shown))
    for axis, (title, curves) in zip(axes, shown, strict=True):
        for curve in curves[:MOST_LINES]:
            x, y = xy(thinned(curve.points))
            look = line_look(curve.look)
            if title == "Training loss":
                axis.plot(x, smooth(y, max(5, len(y) // 10)), linewidth=1.8, label=curve.name, **look)
                axis.set_title("Training loss, moving average")
            else:
                marker = marker_of(curve.look)
                axis.plot(x, y, linewidth=1.8, marker=marker, markersize=4.5, label=curve.name, **look)
                axis.set_title(title)
        axis.set_ylabel("loss in nats")
        clip_start(axis, [point for curve in curves for point in curve.points])
    axes[-1].set_xlabel("applied optimizer steps")
    thousands(axes[-1])
    legend_below(figure, *axes, columns=2)
    return figure


@styled
def compare_bars(names: Sequence[str], columns: Sequence[tuple[str, str, Sequence[float | None]]]) -> Figure:
    """A bar for each run in each column of (heading, unit, a value for each run or none)."""
    figure = Figure(figsize=(WIDTH, 1.3 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for i, (axis, (heading, unit, values)) in enumerate(zip(axes, columns, strict=True)):
        known = [value for value in values if value is not None]
        rows = [row for row, value in enumerate(values) if value is not None]
        axis.barh(rows, known, height=0.62, color=COLOURS[0])
        top = max([*known, 1e-12])
        for row, value in zip(rows, known, strict=True):
            text = f"{value:.1f}" if top > 5 else f"{value:.2f}"
            axis.annotate(text, (value, row), (3, 0), textcoords="offset points", va="center", fontsize=9.5)
        axis.set_xlim(0, 1.28 * top)
        axis.set_title(heading)
        axis.set_xlabel(unit, fontsize=9.5)
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        if i == 0:
            axis.set_yticks(range(len(names)), [short(name, 34) for name in names])
            axis.set_ylim(len(names) - 0.5, -0.5)
    return figure


@styled
def cost_against_score(runs: Sequence[Curve], heading: str) -> Figure:
    """Each run as a point: what its training cost, relative to dense training, and what it scored."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        look: Any = {"color": COLOURS[run.look % len(COLOURS)], "marker": marker_of(run.look)}
        # Hollow, so that a point is seen below another.
        x, y = xy(run.points)
        axis.plot(x, y, linestyle="none", markersize=9, mew=2, fillstyle="none", label=run.name, **look)
    axis.margins(0.12)
    axis.set_xlabel("training FLOPs, relative to dense training of the same length")
    axis.set_ylabel(heading)
    axis.set_title(f"{heading} against cost")
    legend_below(figure, axis, columns=2)
    return figure
