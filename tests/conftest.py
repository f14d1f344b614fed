"""What several test files need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `gap-ds` with some arguments in an empty folder, at 80 columns; (exit status, stdout, stderr)."""
    from gap_ds.cli import main

    monkeypatch.chdir(tmp_path)
    for variable in ("FORCE_COLOR", "GITHUB_ACTIONS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compares an output with a file of tests/golden; UPDATE_GOLDEN=1 writes it instead: read the difference then."""

    def check(name: str, out: str) -> None:
        path = Path(__file__).resolve().parent / "golden" / name
        text = "".join(f"{line.rstrip()}\n" for line in out.rstrip().splitlines())
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(text, encoding="utf-8")
        assert text.splitlines() == path.read_text(encoding="utf-8").splitlines()

    return check
