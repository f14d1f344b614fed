"""The looks of the report's pictures: colours, lines, axes and legends.

Colours are those of Okabe and Ito, which most colour-blind people can tell apart, and no two lines differ in colour
alone. A magnitude shown by colour is one hue from light to dark.
"""

from __future__ import annotations

import functools
import io
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
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

#: (step, value) pairs.
Points = Sequence[tuple[float, float]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "osD^vPX"
GREY = "#5f6368"
#: Density: sparse is light, dense is dark.
DENSITY_MAP = LinearSegmentedColormap.from_list("density", ["#e3edf6", "#7fb0d8", "#0b4f8a"])
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
    "axes.edgecolor": GREY,
    "grid.color": "#e4e6e8",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
}
WIDTH = 10.0  # inches
_DPI = 130
#: Points of a curve that are drawn at most; more are averaged.
_MOST_POINTS = 2000
#: Entries whose names fit on an axis.
_MOST_NAMES = 40
#: Runs and partitions that get a line each.
MOST_LINES = len(COLOURS) * len(_DASHES)

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


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapped


def column(figure: Figure, heights: Sequence[float]) -> list[Axes]:
    """Panels above each other with one step axis."""
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return list(axes[:, 0])


def xy(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def thinned(points: Points) -> Points:
    """At most so many points as can be seen; each is the mean of its neighbours."""
    every = -(-len(points) // _MOST_POINTS)
    if every <= 1:
        return points
    groups = (points[lo : lo + every] for lo in range(0, len(points), every))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the values at most window // 2 places away, fewer at the ends; a value that is missing counts not.

    >>> smooth(np.array([0.0, 3.0, 6.0, math.nan]), 3).tolist()
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


def line_look(i: int) -> dict[str, Any]:
    """Colour of the i-th line, and its dashes for those who do not see the colour."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": _DASHES[(i % len(COLOURS) + i // len(COLOURS)) % len(_DASHES)],
    }


def marker_of(i: int) -> str:
    """The i-th marker: no two of the first forty-nine have the same one in the same colour."""
    return _MARKERS[(i + i // len(COLOURS)) % len(_MARKERS)]


def clip_start(axis: Axes, points: Points) -> None:
    """Lets the first few losses of fresh weights run out of the picture: they would flatten all the others."""
    finite = sorted(y for _, y in points if math.isfinite(y))
    if len(finite) < 2:
        return
    top = finite[min(len(finite) - 1, math.ceil(0.97 * (len(finite) - 1)))]
    if finite[-1] - top < 0.3 * (top - finite[0]):
        top = finite[-1]
    room = max(0.05 * (top - finite[0]), 0.02)
    axis.set_ylim(finite[0] - room, top + room)


def entry_names(axis: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // _MOST_NAMES)
    rows = range(0, len(names), every)
    axis.set_yticks(rows, [short(names[i], 42) for i in rows], fontsize=8.5)


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


def short(name: str, most: int) -> str:
    """A name with its middle left out, if it is long; matplotlib reads a dollar sign as mathematics."""
    name = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return name.replace("$", r"\$")


def thousands(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def legend_above(axis: Axes) -> None:
    """A legend in the line of the title, right of it: never over the data."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.995), ncols=4, borderaxespad=0.2, handlelength=1.8)


def legend_below(figure: Figure, *axes: Axes, columns: int = 4) -> None:
    """A legend under the figure, never over the data, of all that any of the panels shows."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    labels = [short(label, 60 if columns <= 2 else 26) for label in named]
    figure.legend(
        list(named.values()), labels, loc="outside lower center", ncols=min(columns, len(labels)), handlelength=2.6
    )
