"""The commands of `gap-ds`. Each gets plain data from another module and prints it as text or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from gap_ds._version import __version__
from gap_ds.cli import doctor as doctor_
from gap_ds.cli import forecast, launch, models, show
from gap_ds.config import GaPConfig
from gap_ds.presets import PRESETS, VOCAB_SIZE

app = typer.Typer(
    help="Scheduled grow-and-prune (GaP): look at a sparse training run before it begins.",
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
            "folder, or a hub id.",
        ),
    ],
    gap_config: Annotated[Path, typer.Option("--gap-config", "-g", metavar="FILE", help="GaP config, JSON or YAML.")],
    steps_per_epoch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Optimizer steps in an epoch: shows steps instead of epochs."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help=f"Vocabulary of a preset; {VOCAB_SIZE:,} if not given.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of ranks: adds what each holds and sends."),
    ] = None,
    entries: Annotated[bool, typer.Option("--entries", help="List every entry with its budget.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run's partitions, phases, density and cost.

    Works on shapes alone: no weight is allocated, and nothing of the hub but a config is read.
    """
    config = GaPConfig.load(gap_config)
    figures = forecast.forecast(
        models.meta_model(model, vocab_size),
        config,
        steps_per_epoch=steps_per_epoch,
        world_size=world_size,
        with_entries=entries,
    )
    if as_json:
        _print_json(figures)
    else:
        show.plan(_console(), model, figures)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def parallel(
    script: Annotated[list[str], typer.Argument(metavar="-- SCRIPT [ARGUMENT]...", help="What each worker runs.")],
    workers: Annotated[int, typer.Option(min=2, metavar="N", help="Number of workers, one for each partition.")],
    ranks_per_worker: Annotated[int, typer.Option(min=1, metavar="N", help="Processes of each worker.")] = 1,
    exchange: Annotated[
        str | None, typer.Option(metavar="URL", help="Exchange folder (any fsspec URL), passed on as --exchange.")
    ] = None,
    launcher: Annotated[
        Literal["torchrun", "deepspeed"] | None,
        typer.Option(
            help="Default: deepspeed where the arguments have a DeepSpeed config, else torchrun; for one rank none."
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start a failed worker again, N times at most.")
    ] = 0,
) -> None:
    """Start the workers of parallel GaP on this machine.

    Each runs the script with --gap-worker I appended, on devices and a port of its own. One that fails ends all. On
    several machines, start the same script yourself with --gap-worker I and one --exchange that all can reach.
    """
    extra = [] if exchange is None else ["--exchange", exchange]
    code = launch.run(
        script, workers=workers, ranks=ranks_per_worker, launcher=launcher, extra=extra, restarts=restarts
    )
    raise typer.Exit(code)


@app.command()
def schema() -> None:
    """Print the JSON schema of the GaP config, for editors."""
    _print_json(GaPConfig.model_json_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what works on this machine, and why not."""
    report = doctor_.report()
    if as_json:
        _print_json(report)
    else:
        show.doctor(_console(), report)


def _console() -> Console:
    return Console(highlight=False, emoji=False, markup=False)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))
