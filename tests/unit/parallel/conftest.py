"""Exchange folders, local and behind a URL; waits are short."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage does not get time to pass."""
    monkeypatch.setattr("gap_ds.parallel.records._SETTLE", 0.0)
    monkeypatch.setattr("gap_ds.parallel.reading._AGAIN", 0.0)
    monkeypatch.setattr("gap_ds.parallel.records._POLL", 0.001)


class Clock:
    """The time of the exchange: only `sleep` moves it, and calls `while_asleep`."""

    strftime, gmtime = time.strftime, time.gmtime

    def __init__(self) -> None:
        self.now = 0.0
        self.while_asleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.while_asleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("records", "reading"):
        monkeypatch.setattr(f"gap_ds.parallel.{module}.time", clock)
    return clock


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "exchange")
        return
    url = f"memory://{tmp_path.name}/exchange"
    yield url
    system = fsspec.filesystem("memory")
    with contextlib.suppress(FileNotFoundError):
        system.rm(f"/{tmp_path.name}", recursive=True)
