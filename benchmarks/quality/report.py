"""Write the tables and plots of the results of `run.py`.

    python benchmarks/quality/report.py [--preset cpu ...]

Turns benchmarks/results/quality_<preset>.jsonl into quality_<preset>.md and quality_<preset>.png. The plot needs
matplotlib (`pip install 'gap_ds[plots]'`). Without --preset: all results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import records
from presets import EXAMPLES, PRESETS, Example
from rows import BY_NAME, ROWS

#: Okabe and Ito's colours, also distinct for colour-blind readers (without yellow, too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX<>ph8*d"


@dataclass(frozen=True)
class Cell:
    """All seeds of one method at one sparsity."""

    row: str
    sparsity: float
    scores: tuple[float, ...]  # by seed
    second: float  # second score; this and the others are means over the seeds
    epochs: float
    flops: float  # relative to one dense run of the same epochs
    density: float  # of the prunable weights, averaged over the steps
    seconds: float  # of training
    paused: bool  # during the training: the seconds are meaningless

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return statistics.mean(self.scores)

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
        table = latest(records.read(args.results / f"quality_{name}.jsonl"))
        path.write_text(markdown(name, table), encoding="utf-8")
        print(path.name)
        if not args.no_plot:
            print(plot(table, path.with_suffix(".png")).name)
    return 0


# --- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Results of one set-up, and the number of results of other set-ups left out."""

    task: str
    kept: list[records.Record]
    left_out: int

    @property
    def example(self) -> Example:
        """The example of these results, by their figures."""
        return next(example for example in EXAMPLES if example.score in self.kept[0])

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the score that ranks and of the last score."""
        return self.example.score, list(self.example.scores)[-1]

    @property
    def cells(self) -> list[Cell]:
        """Cells by sparsity, dense first, and by score, best first."""
        score, second = self.columns
        groups: dict[tuple[str, float], list[records.Record]] = {}
        for record in sorted(self.kept, key=lambda record: int(record["seed"])):
            groups.setdefault((record["row"], record["sparsity"]), []).append(record)
        cells = [
            Cell(
                row,
                sparsity,
                tuple(record[score] for record in group),
                *(
                    statistics.mean(record[figure] for record in group)
                    for figure in (second, "epochs", "training_flops", "mean_density", "train_seconds")
                ),
                any(record.get("paused") for record in group),
            )
            for (row, sparsity), group in groups.items()
        ]
        return sorted(cells, key=lambda cell: (cell.sparsity, -cell.mean, cell.row))

    def spread(self, sparsity: float) -> float:
        """Return the largest difference of two seeds of one method; 0 with one seed each."""
        of_it = [cell.scores for cell in self.cells if cell.sparsity == sparsity]
        return max((max(scores) - min(scores) for scores in of_it), default=0.0)

    def leads(self, cell: Cell) -> bool:
        """Return True if no method of the same sparsity is better by more than seeds differ; False for dense."""
        best = max(other.mean for other in self.cells if other.sparsity == cell.sparsity)
        return cell.sparsity > 0 and cell.mean >= best - self.spread(cell.sparsity)

    @property
    def sparsities(self) -> list[float]:
        """All sparsities except 0, in order."""
        return sorted({cell.sparsity for cell in self.cells} - {0.0})


def latest(found: Sequence[records.Record]) -> Results:
    """Return the results of the newest set-up, and of the newest config of each row. ValueError if there are none."""
    if not found:
        raise ValueError("there are no results yet: run.py makes them.")
    task = _split(found[-1])[0]
    config = {record["row"]: _split(record)[1] for record in found if _split(record)[0] == task}  # the last one counts
    kept = [record for record in found if _split(record) == (task, config.get(record["row"]))]
    return Results(task, kept, len(found) - len(kept))


def _split(record: records.Record) -> tuple[str, str]:
    """Split a set-up into the task's part and the hash of the row's config."""
    task, _, config = record["setup"].rpartition("|gap:")
    return task, config


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(name: str, results: Results) -> str:
    """Return the page of a table."""
    preset = PRESETS.get(name.removesuffix("_extra"))
    title, beside = (results.example.scores[column] for column in results.columns)
    lines = [f"# Quality: `{name}`", ""]
    if preset:
        lines += [f"{preset.about[0].upper()}{preset.about[1:]}.", ""]
    lines += [
        f"| method | sparsity | {title} | by seed | {beside} | epochs | training FLOPs | mean density | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in results.cells:
        score = f"**{cell.mean:.1f}**" if results.leads(cell) else f"{cell.mean:.1f}"
        minutes = "paused" if cell.paused else f"{cell.seconds / 60:.1f}"
        by_seed = ", ".join(f"{one:.1f}" for one in cell.scores)
        lines.append(
            f"| {cell.title} | {cell.sparsity:.0%} | {score} | {by_seed} | {cell.second:.1f} | "
            f"{cell.epochs:g} | {cell.flops:.2f} | {cell.density:.2f} | {minutes} |"
        )
    return "\n".join([*lines, "", *notes(name, results), ""])


def notes(name: str, results: Results) -> list[str]:
    """Return the notes on how to read the figures."""
    kept = results.kept
    seeds = sorted({len(cell.scores) for cell in results.cells})
    counts = " or ".join(str(count) for count in seeds)
    certainty = "Bold is the best score of a sparsity. Each figure is of one seed; the spread over seeds is unknown."
    spreads = {s: results.spread(s) for s in results.sparsities if results.spread(s)}
    if spreads:
        score = results.example.scores[results.example.score]
        largest = ", ".join(f"{spread:.1f} {score} at {s:.0%}" for s, spread in spreads.items())
        certainty = (
            f"Scores are means of {counts} seeds, listed beside them. Seeds of one method differ by up to {largest}; "
            "smaller differences between methods are noise. Bold are all scores within this distance of the best."
        )
    call = f"--preset {name.removesuffix('_extra')} --data DATA --out OUT"
    call += " --extra benchmarks/quality/extra.json" if name.endswith("_extra") else ""
    lines = [
        certainty,
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
    """Plot scores over training FLOPs, one panel per sparsity. Returns the path of the PNG.

    A line connects the worst and the best seed. The dense run, far to the right, is a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = results.cells
    others = {cell.row for cell in cells} - set(BY_NAME)
    sparsities = results.sparsities
    dense = [cell for cell in cells if cell.sparsity == 0]
    count = max(1, len(sparsities))
    names = len({cell.row for cell in cells})
    figure, panels = pyplot.subplots(
        1,
        count,
        figsize=(4.2 * count + 0.8, 3.8 + 0.22 * -(-names // 2)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles = {}
    for panel, sparsity in zip(panels[0], sparsities or [0.0], strict=True):
        for cell in dense:
            handles[f"dense ({cell.mean:.1f})"] = panel.axhline(cell.mean, color="0.35", linestyle="--", linewidth=1)
        for cell in (cell for cell in cells if cell.sparsity == sparsity and cell not in dense):
            colour, marker = style(cell.row, sorted(others))
            span = [[cell.mean - min(cell.scores)], [max(cell.scores) - cell.mean]]
            handles[cell.title] = panel.errorbar(
                cell.flops,
                cell.mean,
                yerr=span,
                color=colour,
                marker=marker,
                markersize=7,
                capsize=3,
                linestyle="none",
                markeredgecolor="white",
                markeredgewidth=0.5,
            )
        panel.set_title(f"{sparsity:.0%} of the prunable weights pruned", fontsize=10)
        panel.set_xlabel("training FLOPs (1 = dense training)")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(results.example.axis)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=2 if count > 1 else 1, fontsize=8
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
