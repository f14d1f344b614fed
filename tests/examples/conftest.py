"""Make the modules of the examples importable, as in their scripts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

sys.path[:0] = [str(EXAMPLES), *(str(EXAMPLES / name) for name in ("translation", "vision", "language"))]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for a module: on a busy machine, threads make small models many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Environment of plain `python train.py`, without a launcher. Restores signals and threads afterwards."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**variables, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
