"""The command line `gap-ds`: a run before it begins (plan), while it runs (inspect) and after it (report, export).

Here live the commands with their options, the figures of `gap-ds plan` and `gap-ds doctor`, and the tables that print
figures. A command is thin: it gets plain data from one function and prints it as text, or as JSON with `--json`. Code
that another part of gap_ds could use does not belong here; no other folder imports this one. typer and rich are
optional, so `main` imports them, not this package. Only `gap-ds report` imports matplotlib, only `gap-ds plan`
transformers.

Read app.py first, then plan.py (its models are in models.py, with presets.py) and tables.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gap_ds.storage.errors import printable, summarize_error


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: status 0 after success; 2 after a mistake of the user, with one sentence on stderr.

    Args:
        argv: arguments without the program's name; None: those of the process.
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
    except ValueError as error:  # gap_ds raises it for mistakes of the user
        _fail(str(error))
    except OSError as error:  # a path that is too long or may not be looked at, output to a disk that is full
        where = "" if error.filename is None else f"{printable(str(error.filename))}: "
        _fail(f"{where}{error.strerror or summarize_error(error)}.")
    except Exception as error:
        # Wrong options raise errors of click, which versions of typer keep in different places.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message().rstrip('.')}. See {_help(error)}.")
    raise SystemExit(code if isinstance(code, int) else 0)


def _help(error: object) -> str:
    """Return the command line that prints the help of the command in which the error occurred."""
    context = getattr(error, "ctx", None)
    return f"{getattr(context, 'command_path', 'gap-ds')} --help"


def _fail(message: str) -> None:
    print(f"gap-ds: {message}", file=sys.stderr)
    raise SystemExit(2)
