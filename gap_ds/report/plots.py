"""Pictures of runs, from plain numbers: what `gap-ds report` puts on its page. Needs matplotlib: gap_ds[plots].

Every function returns a figure that knows no window and no global state; `png` makes a file of it. Colours are those
of Okabe and Ito, which most colour-blind people tell apart, and no line is told from another by its colour alone. Where
one magnitude is shown by colour it is one hue from light to dark. K partitions, E entries.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

#: (step, value) pairs.
Points = Sequence[tuple[float, float]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "osD^vPX"
_GREY = "#5f6368"
#: Density: sparse is light, dense is dark.
_DENSITY = LinearSegmentedColormap.from_list("density", ["#e3edf6", "#7fb0d8", "#0b4f8a"])
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "grid.color": "#e4e6e8",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
}
_WIDTH = 10.0  # inches
_DPI = 130
#: Points of a curve that are drawn at most; more are averaged.
_MOST_POINTS = 2000
#: Entries with a name of their own on an axis.
_MOST_NAMES = 40
#: Bins at the ends of a histogram that have less of every partition are left out.
_LEAST_SHARE = 0.0005
#: Runs and partitions that get a line each.
_MOST_LINES = len(COLOURS) * len(_DASHES)

P = ParamSpec("P")


@dataclass(frozen=True)
class Curve:
    """A line of a comparison, with its name and its place among those that are compared: equal looks, equal curve."""

    name: str
    points: Points
    look: int = 0


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapped


# -- one run -----------------------------------------------------------------------------------------------------------


@_styled
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
    figure = Figure(figsize=(_WIDTH, sum(panels) + 1.1), layout="constrained")
    axes = _column(figure, panels)
    timeline, *rest = axes
    edges = np.arange(k + 1) - 0.5
    image = timeline.pcolormesh(marks, edges, np.asarray(density), cmap=_DENSITY, vmin=0, vmax=1)
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
                              fontsize=9, color=_GREY)  # fmt: skip
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
        rest[-1].plot(*_xy(bleu), color=COLOURS[2], marker="D", markersize=4)
        rest[-1].set_ylabel("BLEU")
    axes[-1].set_xlabel("applied optimizer steps")
    axes[-1].set_xlim(marks[0], marks[-1] + 0.006 * (marks[-1] - marks[0]))
    _thousands(axes[-1])
    return figure


@_styled
def losses(train: Points, validation: Points, bleu: Points) -> Figure:
    """The losses alone, of a run whose schedule is not known."""
    panels = [3.1, *([1.5] if bleu else [])]
    figure = Figure(figsize=(_WIDTH, sum(panels) + 0.8), layout="constrained")
    axes = _column(figure, panels)
    _losses(axes[0], train, validation, False)
    if bleu:
        axes[-1].plot(*_xy(bleu), color=COLOURS[2], marker="D", markersize=4)
        axes[-1].set_ylabel("BLEU")
    axes[-1].set_xlabel("applied optimizer steps")
    _thousands(axes[-1])
    return figure


def _losses(axis: Axes, train: Points, validation: Points, has_boundaries: bool) -> None:
    if train:
        x, y = _xy(_thinned(train))
        few = len(train) < 12
        axis.plot(x, y, color=COLOURS[0], alpha=1 if few else 0.35, linewidth=1, marker="." if few else None,
                  label="training, one batch")  # fmt: skip
        if not few:
            window = max(5, len(y) // 10)
            axis.plot(x, _smooth(y, window), color=COLOURS[0], linewidth=2, label="training, moving average")
    if validation:
        axis.plot(*_xy(validation), color=COLOURS[1], marker="o", markersize=4.5, linewidth=1.5, label="validation")
    if has_boundaries:
        axis.plot([], [], color="#b8bcc0", linewidth=0.8, label="boundary")
    axis.set_ylabel("loss in nats")
    axis.set_title("Losses")
    _clip_start(axis, [*train, *validation])
    _legend_above(axis)


@_styled
def density(curves: Sequence[Curve], whole_run: bool) -> Figure:
    """Density of all entries together over the run, as steps; of one run or of several."""
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axis = figure.subplots()
    for curve in curves[:_MOST_LINES]:
        x, y = _xy(curve.points)
        axis.plot(x, y, drawstyle="steps-post", linewidth=2, label=curve.name, **_look(curve.look))
    axis.set_ylim(0, 1.04)
    axis.set_ylabel("density of the entries")
    axis.set_xlabel("applied optimizer steps")
    axis.set_title("Density over the run" if whole_run else "Density")
    axis.margins(x=0.01)
    _thousands(axis)
    if len(curves) > 1:
        _legend_below(figure, axis)
    return figure


@_styled
def layers(names: Sequence[str], partition: Sequence[int], kept: Sequence[float]) -> Figure:
    """Density of each of E entries in the final model, as points, in the order of the model."""
    e = len(names)
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.19 * min(e, 60)), layout="constrained")
    axis = figure.subplots()
    for k in sorted(set(partition)):
        rows = [i for i in range(e) if partition[i] == k]
        look: Any = {"color": COLOURS[k % len(COLOURS)], "marker": _marker(k)}
        axis.plot([kept[i] for i in rows], rows, linestyle="none", markersize=5, label=f"partition {k}", **look)
    _entry_names(axis, names)
    axis.set_ylim(e - 0.4, -0.6)
    axis.set_xlim(0, max(1e-9, min(1.02, 1.15 * max(kept, default=1.0))))
    axis.set_xlabel("density: non-zero weights / weights of the entry")
    axis.set_title("Density of each entry in the final model")
    if len(set(partition)) <= 12:
        _legend_below(figure, axis)
    return figure


@_styled
def layers_over_time(names: Sequence[str], marks: Sequence[int], kept: Sequence[Sequence[float]]) -> Figure:
    """Density of each of E entries (rows) between the S + 1 marks, as colour."""
    e = len(names)
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.19 * min(e, 60)), layout="constrained")
    axis = figure.subplots()
    image = axis.pcolormesh(marks, np.arange(e + 1) - 0.5, np.asarray(kept), cmap=_DENSITY, vmin=0, vmax=1)
    axis.grid(False)
    _entry_names(axis, names)
    axis.invert_yaxis()
    axis.set_xlabel("applied optimizer steps")
    axis.set_title("Density of each entry over the run")
    _thousands(axis)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.01, aspect=40)
    bar.set_label("density")
    bar.outline.set_visible(False)
    return figure


@_styled
def exploration(fresh: Sequence[Curve], active: Sequence[Curve], end: int) -> Figure:
    """How much of each partition's mask is new at each boundary, and how many of its weights were ever active.

    Args:
        fresh: for each partition: (step, part of the kept weights that the last mask had pruned). Not drawn if no
            entry ever got a second mask.
        active: for each partition: (step, part of its weights that were active in some step so far).
        end: last step of the run.
    """
    panels = [2.6] * (1 + any(curve.points for curve in fresh))
    figure = Figure(figsize=(_WIDTH, sum(panels) + 1.2), layout="constrained")
    *above, bottom = axes = _column(figure, panels)
    for top in above:
        for curve in fresh[:_MOST_LINES]:
            look = _look(curve.look) | {"marker": _marker(curve.look)}
            top.plot(*_xy(curve.points), markersize=5, linewidth=1.2, label=curve.name, **look)
        top.set_ylabel("part of the kept weights")
        top.set_title("New weights in a mask, against the entry's mask before")
    for curve in active[:_MOST_LINES]:
        x, y = _xy([*curve.points, (end, curve.points[-1][1])] if curve.points else [])
        bottom.plot(x, y, drawstyle="steps-post", linewidth=2, label=curve.name, **_look(curve.look))
    bottom.set_ylabel("part of all weights")
    bottom.set_title("Weights that were active in any step so far")
    bottom.set_xlabel("applied optimizer steps")
    for axis in axes:
        axis.set_ylim(-0.03, 1.05)
    bottom.set_xlim(0, max(1, end))
    _thousands(bottom)
    _legend_below(figure, *axes)
    return figure


@_styled
def magnitudes(exponents: Sequence[float], counts: Sequence[Sequence[int]], zeros: Sequence[int]) -> Figure:
    """Histograms of |w| of the weights that are not zero, for each of K partitions.

    Args:
        exponents: the B + 1 edges of the bins, as powers of two.
        counts: of each partition in each of B bins. zeros: of each partition, which have no place on the axis.
    """
    figure = Figure(figsize=(_WIDTH, 3.8), layout="constrained")
    axis = figure.subplots()
    edges = np.exp2(np.asarray(exponents, dtype=float))
    for i, (row, pruned) in enumerate(itertools.islice(zip(counts, zeros, strict=True), _MOST_LINES)):
        total = sum(row)
        share = np.asarray(row, dtype=float) / max(1, total)
        name = f"partition {i}: {total:,} not zero, {pruned:,} zero"
        axis.stairs(share, edges, linewidth=1.8, label=name, **{**_look(i), "color": COLOURS[i % len(COLOURS)]})
    axis.set_xscale("log", base=10)
    shares = np.asarray(counts, dtype=float) / np.maximum(1, np.asarray(counts).sum(axis=1, keepdims=True))
    used = np.flatnonzero((shares >= _LEAST_SHARE).any(axis=0))
    if used.size:
        axis.set_xlim(edges[used[0]], edges[used[-1] + 1])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("|weight|, bins of a quarter octave")
    axis.set_ylabel("part of the non-zero weights")
    axis.set_title("Magnitudes of the final weights")
    _legend_below(figure, axis, columns=2)
    return figure


# -- several runs ------------------------------------------------------------------------------------------------------


@_styled
def compare_losses(train: Sequence[Curve], validation: Sequence[Curve]) -> Figure:
    """Loss curves of several runs: validation, and moving averages of training."""
    shown = [(title, curves) for title, curves in (("Validation loss", validation), ("Training loss", train)) if curves]
    figure = Figure(figsize=(_WIDTH, 0.9 + 2.9 * len(shown)), layout="constrained")
    axes = _column(figure, [1.0] * len(shown))
    for axis, (title, curves) in zip(axes, shown, strict=True):
        for curve in curves[:_MOST_LINES]:
            x, y = _xy(_thinned(curve.points))
            look = _look(curve.look)
            if title == "Training loss":
                axis.plot(x, _smooth(y, max(5, len(y) // 10)), linewidth=1.8, label=curve.name, **look)
                axis.set_title("Training loss, moving average")
            else:
                marker = _marker(curve.look)
                axis.plot(x, y, linewidth=1.8, marker=marker, markersize=4.5, label=curve.name, **look)
                axis.set_title(title)
        axis.set_ylabel("loss in nats")
        _clip_start(axis, [point for curve in curves for point in curve.points])
    axes[-1].set_xlabel("applied optimizer steps")
    _thousands(axes[-1])
    _legend_below(figure, *axes, columns=2)
    return figure


@_styled
def compare_bars(names: Sequence[str], columns: Sequence[tuple[str, str, Sequence[float | None]]]) -> Figure:
    """A bar for each run in each column of (heading, unit, a value for each run or none)."""
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.36 * len(names)), layout="constrained")
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
            axis.set_yticks(range(len(names)), [_short(name, 34) for name in names])
            axis.set_ylim(len(names) - 0.5, -0.5)
    return figure


@_styled
def cost_against_score(runs: Sequence[Curve], heading: str) -> Figure:
    """Each run as a point: what its training cost, relative to dense training, and what it scored."""
    figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        look: Any = {"color": COLOURS[run.look % len(COLOURS)], "marker": _marker(run.look)}
        # Hollow, so that a point is seen below another.
        x, y = _xy(run.points)
        axis.plot(x, y, linestyle="none", markersize=9, mew=2, fillstyle="none", label=run.name, **look)
    axis.margins(0.12)
    axis.set_xlabel("training FLOPs, relative to dense training of the same length")
    axis.set_ylabel(heading)
    axis.set_title(f"{heading} against cost")
    _legend_below(figure, axis, columns=2)
    return figure


# -- the rest ----------------------------------------------------------------------------------------------------------


def _column(figure: Figure, heights: Sequence[float]) -> list[Axes]:
    """Panels above each other with one step axis."""
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return list(axes[:, 0])


def _xy(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _thinned(points: Points) -> Points:
    """At most so many points as can be seen; each is the mean of its neighbours."""
    every = -(-len(points) // _MOST_POINTS)
    if every <= 1:
        return points
    groups = (points[lo : lo + every] for lo in range(0, len(points), every))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the values at most window // 2 places away, fewer at the ends; a value that is missing counts not.

    >>> _smooth(np.array([0.0, 3.0, 6.0, math.nan]), 3).tolist()
    [1.5, 3.0, 4.5, 6.0]
    """
    reach = window // 2
    ones = np.isfinite(values)
    ends = np.arange(len(values))
    lo, hi = np.maximum(0, ends - reach), np.minimum(len(values), ends + reach + 1)
    total = np.concatenate([[0.0], np.cumsum(np.where(ones, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(ones)])
    with np.errstate(invalid="ignore"):
        return (total[hi] - total[lo]) / (count[hi] - count[lo])  # type: ignore[no-any-return]


def _look(i: int) -> dict[str, Any]:
    """The i-th line's colour and, so that it can be told without colour, its dashes."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": _DASHES[(i % len(COLOURS) + i // len(COLOURS)) % len(_DASHES)],
    }


def _marker(i: int) -> str:
    """The i-th marker: no two of the first forty-nine have the same one in the same colour."""
    return _MARKERS[(i + i // len(COLOURS)) % len(_MARKERS)]


def _clip_start(axis: Axes, points: Points) -> None:
    """Lets the first few losses of fresh weights run out of the picture: they would flatten all the others."""
    finite = sorted(y for _, y in points if math.isfinite(y))
    if len(finite) < 2:
        return
    top = finite[min(len(finite) - 1, math.ceil(0.97 * (len(finite) - 1)))]
    if finite[-1] - top < 0.3 * (top - finite[0]):
        top = finite[-1]
    room = max(0.05 * (top - finite[0]), 0.02)
    axis.set_ylim(finite[0] - room, top + room)


def _entry_names(axis: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // _MOST_NAMES)
    rows = range(0, len(names), every)
    axis.set_yticks(rows, [_short(names[i], 42) for i in rows], fontsize=8.5)


def shorten(names: Sequence[str]) -> list[str]:
    """Entry names without the components that all of them begin or end with.

    >>> shorten(["model.encoder.fc1.weight", "model.decoder.fc1.weight"]), shorten(["fc.weight"])
    (['encoder.fc1', 'decoder.fc1'], ['fc.weight'])
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    lead = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    is_weight = all(len(row) > lead + 1 and row[-1] == "weight" for row in parts)
    return [".".join(row[lead : -1 if is_weight else None]) or ".".join(row) for row in parts]


def _short(name: str, most: int) -> str:
    """A name with its middle left out, if it is long; matplotlib reads a dollar sign as mathematics."""
    name = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return name.replace("$", r"\$")


def _thousands(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _legend_above(axis: Axes) -> None:
    """A legend in the line of the title, right of it: never over the data."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.995), ncols=4, borderaxespad=0.2, handlelength=1.8)


def _legend_below(figure: Figure, *axes: Axes, columns: int = 4) -> None:
    """A legend under the figure, never over the data, of all that any of the panels shows."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    labels = [_short(label, 60 if columns <= 2 else 26) for label in named]
    figure.legend(
        list(named.values()), labels, loc="outside lower center", ncols=min(columns, len(labels)), handlelength=2.6
    )
