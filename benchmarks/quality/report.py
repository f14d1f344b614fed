"""Write the tables and plots of the results of `run.py`.

    python benchmarks/quality/report.py [--preset cpu ...]

Turns benchmarks/results/quality_<preset>.jsonl into quality_<preset>.md and quality_<preset>.png. The plot needs
matplotlib (`pip install 'gap_ds[plots]'`). Without --preset: all results.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
from compare import Mean, mean, paired, pooled_deviation
from presets import EXAMPLES, PRESETS, Example
from rows import BY_NAME, ROWS

#: Okabe and Ito's colours, also distinct for colour-blind readers (without yellow, too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX<>ph8*d"

BASELINE = "gradual"  # the row that others are compared with


@dataclass(frozen=True)
class Cell:
    """All seeds of one method at one sparsity."""

    row: str
    sparsity: float
    losses: Mapping[int, float]  # seed -> validation loss of the last epoch, in nats
    scores: Mapping[int, float]  # seed -> score
    also: Mapping[str, Mean]  # split -> score on it
    second: float  # second score; this and the others are means over the seeds
    epochs: float
    flops: float  # relative to one dense run of the same epochs
    density: float  # of the prunable weights, averaged over the steps
    seconds: float  # of training
    paused: bool  # during the training: the seconds are meaningless

    @property
    def loss(self) -> Mean:
        """Mean validation loss: the figure that methods are compared by."""
        return mean(self.losses.values())

    @property
    def score(self) -> Mean:
        """Mean score over the seeds."""
        return mean(self.scores.values())

    @property
    def title(self) -> str:
        """Name in a table."""
        return BY_NAME[self.row].title if self.row in BY_NAME else self.row


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", nargs="+", help="such as cpu or cpu_extra; default: all with results")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the JSONL files")
    parser.add_argument("--no-plot", action="store_true", help="Markdown only")
    args = parser.parse_args(argv)
    found = sorted(path.stem.removeprefix("quality_") for path in args.results.glob("quality_*.jsonl"))
    names = args.preset or found
    if absent := [name for name in names if name not in found]:
        print(f"error: no results of {absent[0]!r}, only of {', '.join(found) or 'none'}.", file=sys.stderr)
        return 2
    for name in names:
        path = args.results / f"quality_{name}.md"
        of_table = args.results / f"quality_{name.removesuffix('_extra')}.jsonl"
        results = latest(records.read(args.results / f"quality_{name}.jsonl"), beside=records.read(of_table))
        path.write_text(markdown(name, results), encoding="utf-8")
        print(path.name)
        if not args.no_plot:
            print(plot(results, path.with_suffix(".png")).name)
    return 0


# --- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Results of one set-up, and the number of results of other set-ups left out."""

    task: str
    kept: list[records.Record]
    left_out: int
    #: The method that others are compared with, by sparsity; of another table if this one does not have it.
    baseline: Mapping[float, Cell]

    @property
    def example(self) -> Example:
        """The example of these results, by their figures."""
        return _example(self.kept)

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the first and the last score."""
        return self.example.score, list(self.example.scores)[-1]

    @property
    def also(self) -> list[str]:
        """Other splits with a score."""
        return list(self.kept[0].get("also_scored", ()))

    @property
    def cells(self) -> list[Cell]:
        """Cells by sparsity, dense first, and by validation loss, lowest first."""
        return sorted(_cells(self.kept), key=lambda cell: (cell.sparsity, cell.loss.value, cell.row))

    def deviation(self, sparsity: float) -> float | None:
        """Return the standard deviation of the loss over the seeds of a method, pooled over all methods of a sparsity.

        None if no method has two seeds.
        """
        return pooled_deviation(cell.losses.values() for cell in self.cells if cell.sparsity == sparsity)

    def leads(self, cell: Cell) -> bool:
        """Return True if no method of the same sparsity has a lower loss by more than two standard errors.

        The error is that of the difference of two means, from `deviation`. False for dense.
        """
        best = next(other for other in self.cells if other.sparsity == cell.sparsity).loss
        deviation = self.deviation(cell.sparsity) or 0.0
        error = deviation * math.sqrt(1 / cell.loss.count + 1 / best.count)
        return cell.sparsity > 0 and cell.loss.value - best.value <= 2 * error

    @property
    def sparsities(self) -> list[float]:
        """All sparsities except 0, in order."""
        return sorted({cell.sparsity for cell in self.cells} - {0.0})


def latest(found: Sequence[records.Record], beside: Sequence[records.Record] = ()) -> Results:
    """Return the results of the newest set-up, and of the newest config of each row. ValueError if there are none.

    beside: results of the same task, whose baseline is used if `found` has none.
    """
    if not found:
        raise ValueError("there are no results yet: run.py makes them.")
    task = _split(found[-1])[0]
    kept = _newest(found, task)
    of_both = [record for record in (*_newest(beside, task), *kept) if record["row"] == BASELINE]
    baseline = {cell.sparsity: cell for cell in _cells(of_both)}
    return Results(task, kept, len(found) - len(kept), baseline)


def _newest(found: Sequence[records.Record], task: str) -> list[records.Record]:
    """Return the results of one task that have the newest config of their row."""
    config = {record["row"]: _split(record)[1] for record in found if _split(record)[0] == task}  # the last one counts
    return [record for record in found if _split(record) == (task, config.get(record["row"]))]


def _example(found: Sequence[records.Record]) -> Example:
    return next(example for example in EXAMPLES if example.score in found[0])


def _cells(found: Sequence[records.Record]) -> list[Cell]:
    groups: dict[tuple[str, float], dict[int, records.Record]] = {}
    for record in sorted(found, key=lambda record: int(record["seed"])):
        groups.setdefault((record["row"], record["sparsity"]), {})[record["seed"]] = record
    return [
        Cell(
            row,
            sparsity,
            {seed: record["validation_loss"][-1] for seed, record in group.items()},
            {seed: record[_example(found).score] for seed, record in group.items()},
            {
                split: mean(record["also_scored"][split][_example(found).score] for record in group.values())
                for split in found[0].get("also_scored", ())
            },
            *(
                statistics.mean(record[figure] for record in group.values())
                for figure in (
                    list(_example(found).scores)[-1],
                    *("epochs", "training_flops", "mean_density", "train_seconds"),
                )
            ),
            any(record.get("paused") for record in group.values()),
        )
        for (row, sparsity), group in groups.items()
    ]


def _split(record: records.Record) -> tuple[str, str]:
    """Split a set-up into the task's part and the hash of the row's config."""
    task, _, config = record["setup"].rpartition("|gap:")
    return task, config


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(name: str, results: Results) -> str:
    """Return the page of a table."""
    preset = PRESETS.get(name.removesuffix("_extra"))
    digits = results.example.digits
    title, beside = (results.example.scores[column] for column in results.columns)
    lines = [f"# Quality: `{name}`", ""]
    if preset:
        lines += [f"{preset.about[0].upper()}{preset.about[1:]}.", ""]
    compared = bool(results.baseline)
    against = ["to gradual"] if compared else []
    columns = [
        *("method", "sparsity", "seeds", "validation loss", *against, title, *against, beside),
        *(f"{title} on {split}" for split in results.also),
        "epochs",
        *("training FLOPs", *(["of gradual's"] if compared else []), "mean density", "minutes"),
    ]
    lines += [_line(columns), "|---" * len(columns) + "|"]
    for cell in results.cells:
        loss = f"**{cell.loss.text(3)}**" if results.leads(cell) else cell.loss.text(3)
        base = results.baseline.get(cell.sparsity)
        ratio = f"{cell.flops / base.flops:.2f}" if base else ""
        figures = [cell.title, f"{cell.sparsity:.0%}", str(cell.loss.count), loss]
        figures += [_difference(cell.losses, base and base.losses, 3)] if compared else []
        figures += [cell.score.text(digits)]
        figures += [_difference(cell.scores, base and base.scores, digits)] if compared else []
        figures += [
            f"{cell.second:.{digits}f}",
            *(score.text(digits) for score in cell.also.values()),
            f"{cell.epochs:g}",
            f"{cell.flops:.2f}",
            *([ratio] if compared else []),
        ]
        figures += [f"{cell.density:.2f}", "paused" if cell.paused else f"{cell.seconds / 60:.1f}"]
        lines.append(_line(figures))
    return "\n".join([*lines, "", *notes(name, results), ""])


def _line(figures: Sequence[str]) -> str:
    return f"| {' | '.join(figures)} |"


def _difference(values: Mapping[int, float], others: Mapping[int, float] | None, digits: int) -> str:
    """Return the paired difference, with the number of seeds if it is not that of `values`; empty for the baseline."""
    found = None if others is None or others == values else paired(values, others)
    if found is None:
        return ""
    return found.text(digits) + (f" ({found.count} seeds)" if 1 < found.count < len(values) else "")


def notes(name: str, results: Results) -> list[str]:
    """Return the notes on how to read the figures."""
    kept = results.kept
    certainty = "Validation loss is the cross entropy of the last epoch, in nats. Bold is the lowest of a sparsity."
    deviations = {s: deviation for s in results.sparsities if (deviation := results.deviation(s)) is not None}
    if deviations:
        each = ", ".join(f"{deviation:.3f} at {s:.0%}" for s, deviation in deviations.items())
        certainty = (
            "Methods are compared by the validation loss: the cross entropy of the last epoch, in nats, without label "
            f"smoothing. Its standard deviation over the seeds of a method is {each} (pooled over the methods). Bold "
            "are the lowest loss of a sparsity and all within two standard errors of it."
        )
    call = f"--preset {name.removesuffix('_extra')} --data DATA --out OUT"
    call += " --extra benchmarks/quality/extra.json" if name.endswith("_extra") else ""
    lines = [certainty, "± is the standard error of a mean over seeds. A figure without it is of one seed."]
    if results.baseline:
        lines.append(
            "`to gradual` is the difference to gradual pruning at the same sparsity, paired by seed (equal first "
            "weights and batches), with the p-value of a two-sided paired t-test. `of gradual's` is the quotient of "
            "the training FLOPs."
        )
    lines += [
        "All methods have the same epochs, batches, peak learning rate and warm-up. None was tuned for a method. "
        "A short budget favours methods that need little training.",
        results.example.entries,
        "FLOPs are those of products with weights, forward and backward, relative to one dense run of the same epochs, "
        "summed over workers. Pruned weights count nothing, although the products are dense and no run was faster. "
        "RigL's dense gradients at its updates are not counted.",
        "Density is that of the prunable weights, averaged over the steps of training.",
        "Minutes are those of training, summed over workers, on a machine with other load. They do not compare "
        "methods.",
    ]
    if any(BY_NAME[record["row"]].pretrained for record in kept if record["row"] in BY_NAME):
        lines.append("Rows from the dense model have had its epochs before. Compare them with that of a dense model.")
    if any(record["workers"] > 1 for record in kept):
        lines.append("Epochs and density of a method on several workers are those of worker 0.")
    if results.left_out:
        lines.append(f"Left out: {results.left_out} results of other set-ups in the same file.")
    machines = sorted({f"{r['machine']}, {r['cores']} cores, torch {r['torch']}, gap_ds {r['gap_ds']}" for r in kept})
    return [
        *(f"- {line}" for line in lines),
        "",
        f"Set-up: `{results.task}`; {'; '.join(machines)}.",
        f"Made by `python benchmarks/quality/run.py {call}` and `report.py`; the command, config and signature of each "
        f"run are in `quality_{name}.jsonl`.",
    ]


# --- plot -------------------------------------------------------------------------------------------------------------


def style(name: str, others: Sequence[str] = ()) -> tuple[str, str]:
    """Return colour and marker of a method, the same in every plot. others: all names outside the table.

    >>> len({style(row.name) for row in ROWS}) == len(ROWS)
    True
    """
    names = [*(row.name for row in ROWS), *sorted(others)]
    index = names.index(name)
    # The lengths have a common factor: one more marker step per turn keeps the pairs distinct.
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]


def plot(results: Results, path: Path) -> Path:
    """Plot validation loss and score over training FLOPs, one column per sparsity. Returns the path of the PNG.

    A line is one standard error to each side. The dense run, far to the right, is a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = results.cells
    others = sorted({cell.row for cell in cells} - set(BY_NAME))
    sparsities = results.sparsities or [0.0]
    names = len({cell.row for cell in cells})
    figure, panels = pyplot.subplots(
        2,
        len(sparsities),
        figsize=(4.2 * len(sparsities) + 0.8, 6.2 + 0.22 * -(-names // 2)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for sparsity, column in zip(sparsities, panels.T, strict=True):
        for cell in (cell for cell in cells if cell.sparsity in (0.0, sparsity)):
            colour, marker = style(cell.row, others)
            for panel, figure_of_cell in zip(column, (cell.loss, cell.score), strict=True):
                if cell.sparsity == 0.0:
                    line = "--" if cell.row == "dense" else ":"
                    handles[cell.title] = panel.axhline(figure_of_cell.value, color="0.35", linestyle=line, linewidth=1)
                    continue
                handles[cell.title] = panel.errorbar(
                    cell.flops,
                    figure_of_cell.value,
                    yerr=figure_of_cell.error or 0.0,
                    color=colour,
                    marker=marker,
                    markersize=7,
                    capsize=3,
                    linestyle="none",
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                )
        column[0].set_title(f"{sparsity:.0%} of the prunable weights pruned", fontsize=10)
        column[1].set_xlabel("training FLOPs (1 = dense training)")
        for panel in column:
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation loss (nats)")
    panels[1][0].set_ylabel(results.example.axis)
    ncols = 2 if len(sparsities) > 1 else 1
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=ncols, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
