"""The command line `gap-ds`: what a run will be, before it is one, and what it has been.

    app        the commands and their options (typer)
    models     a model without weights, from a preset, a config or a hub id
    forecast   all figures of a model, a config and a number of ranks, as plain data
    launch     the workers of parallel GaP, started on one machine
    inspect    what a checkpoint or an export holds, and what is wrong with it (inspect_*: its parts)
    report     pictures of runs on one HTML page (report_*: its parts; gap_ds.report.plots draws)
    doctor     what this machine has, and what will and will not work here
    show       tables and the timeline (rich)

Every command prints text for people, or with `--json` the same figures for programs. typer and rich are optional
dependencies, so they are imported by `main` and not with this package; matplotlib is imported by `report` alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 on success, 2 after a mistake of the user's, told on stderr in a sentence.

    Args:
        argv: arguments, without the program's name; those of the process if not given.
    """
    try:
        from gap_ds.cli import app
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("typer", "rich"):
            raise
        _fail(f'{library} is not installed: the command line needs it. Run pip install "gap_ds[cli]".')
    try:
        code = app.app(argv, prog_name="gap-ds", standalone_mode=False)
    except ValueError as error:  # by convention the library's way to tell the user of a mistake
        _fail(str(error))
    except Exception as error:
        # Wrong options: errors of click, which typer keeps in different places in different versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message().rstrip('.')}. See {_help(error)}.")
    raise SystemExit(code if isinstance(code, int) else 0)


def _help(error: object) -> str:
    """The command line that explains the command in which the error occurred."""
    context = getattr(error, "ctx", None)
    return f"{getattr(context, 'command_path', 'gap-ds')} --help"


def _fail(message: str) -> None:
    print(f"gap-ds: {message}", file=sys.stderr)
    raise SystemExit(2)
