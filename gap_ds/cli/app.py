"""The commands of `gap-ds`. Each one gets plain data from another module and prints it as text or as JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gap_ds._version import __version__
from gap_ds.cli import doctor as doctor_
from gap_ds.cli import inspect as inspect_
from gap_ds.cli import models, tables
from gap_ds.cli.plan import forecast
from gap_ds.cli.presets import PRESETS, VOCAB_SIZE
from gap_ds.method.config import GaPConfig
from gap_ds.parallel import launch

app = typer.Typer(
    help="Scheduled grow-and-prune (GaP): inspect sparse training before, during and after a run.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain text: boxes leave too little of 80 columns
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gap-ds {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def gap_ds(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help=f"A preset of the paper's Transformer ({', '.join(PRESETS)}), a Hugging Face config.json or its "
            "folder, a model of timm, package.module:function that returns a model, or a hub id.",
        ),
    ],
    gap_config: Annotated[
        str,
        typer.Option(
            "--gap-config",
            "-g",
            metavar="CONFIG",
            help="GaP config: a JSON or YAML file, or the name of a shipped one.",
        ),
    ],
    steps_per_epoch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Optimizer steps in an epoch; times are then shown in steps."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help=f"Vocabulary size of a preset (default {VOCAB_SIZE:,}).")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of ranks; adds the bytes that each one stores and sends."),
    ] = None,
    entries: Annotated[bool, typer.Option("--entries", help="List every entry with its budget.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the partitions, phases, density and cost of a run.

    No weights are allocated, and of the hub only a config is read.
    """
    config = GaPConfig.load(gap_config)
    figures = forecast(
        models.meta_model(model, vocab_size),
        config,
        steps_per_epoch=steps_per_epoch,
        world_size=world_size,
        with_entries=entries,
    )
    if as_json:
        _print_json(figures)
    else:
        tables.plan(_console(), model, figures)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def parallel(
    script: Annotated[
        list[str], typer.Argument(metavar="-- SCRIPT [ARGUMENT]...", help="Script that each worker runs.")
    ],
    workers: Annotated[int, typer.Option(min=2, metavar="N", help="Number of workers, one for each partition.")],
    ranks_per_worker: Annotated[int, typer.Option(min=1, metavar="N", help="Processes of each worker.")] = 1,
    exchange: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Exchange folder (any fsspec URL), passed to the script as --exchange."),
    ] = None,
    launcher: Annotated[
        Literal["torchrun", "deepspeed"] | None,
        typer.Option(
            help="Default: deepspeed if the arguments have a DeepSpeed config, else torchrun; none for one rank."
        ),
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, metavar="N", help="Restart failed workers, at most N times.")] = 0,
) -> None:
    """Start the workers of parallel GaP on this machine.

    Worker I runs the script with --gap-worker I appended, on separate devices and a separate port. If one fails, all
    end. On several machines, start the script yourself with --gap-worker I and an --exchange that all can reach.
    """
    extra = [] if exchange is None else ["--exchange", exchange]
    code = launch.run(
        script, workers=workers, ranks=ranks_per_worker, launcher=launcher, extra=extra, restarts=restarts
    )
    raise typer.Exit(code)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An exported model, a checkpoint, or a folder of checkpoints.")
    ],
    entries: Annotated[bool, typer.Option("--entries", help="List every entry with its counts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count and check the kept weights of a checkpoint or export.

    The counts are compared with those in the file, with the budgets and with the pattern. Tensors are read piece by
    piece. Exit status: 0 if nothing is wrong, 1 if something is, 2 if a file cannot be read.
    """
    with _progress("counting") as progress:
        figures = inspect_.inspect(folder, progress)
    if as_json:
        _print_json(figures)
    else:
        tables.inspection(_console(), figures, entries)
    raise typer.Exit(1 if figures["problems"] else 0)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Folders of runs, finished or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Draw and compare runs: one HTML page, and PNG files.

    The page needs no network and no script. Pictures: schedule and losses, losses around boundaries, density, layers,
    changes of masks, magnitudes; for several runs also curves, scores and cost side by side.
    """
    from gap_ds.report import build  # needs matplotlib, which no other command does

    with _progress("drawing") as progress:
        figures = build.report(runs, output, progress)
    if as_json:
        _print_json(figures)
    else:
        tables.report(_console(), figures)


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A checkpoint (also of a Trainer or Accelerate), a folder of checkpoints, or an exported model, dense "
            "or compact.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    form: Annotated[Literal["compact", "dense"], typer.Option("--format", help="Format to write.")] = "compact",
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="For a checkpoint: folder of the model's config.json and tokenizer; default: its own."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="For a checkpoint: dtype of the parameters; needs --model."),
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the exported model that OUT holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's final model, or convert an exported model.

    Entries that are dense at the checkpoint's step are pruned in the copy. The checkpoint may be of any number of
    ranks. Conversion keeps the weights of an exported model bit for bit.
    """
    from gap_ds.cli import export as export_

    with _progress("writing") as progress:
        figures = export_.export(source, out, form, model, dtype, overwrite, progress)
    _print_json(figures) if as_json else typer.echo(export_.summary(figures))


@app.command()
def schema() -> None:
    """Print the JSON schema of the GaP config, for editors."""
    _print_json(GaPConfig.model_json_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what works on this machine, and the reasons."""
    report = doctor_.report()
    if as_json:
        _print_json(report)
    else:
        tables.doctor(_console(), report)


def _console() -> Console:
    return Console(highlight=False, emoji=False, markup=False)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr if that is a terminal; yield a function (name, done, total) that moves it."""
    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda name, done, total: bar.update(task, description=f"{what} {name}", completed=done, total=total)
