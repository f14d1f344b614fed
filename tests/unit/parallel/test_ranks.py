"""Work of rank 0 alone: all ranks meet while it runs, and raise its error."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanging import SIGNATURE, combine
from fake_ranks import Rank, Ranks, item_of

from gap_ds.masks import bitmask
from gap_ds.parallel import Exchange, ParallelWorker
from gap_ds.parallel.transport import open_folder
from gap_ds.sharding.rank_zero import on_rank_zero


class Slow:
    """Work of rank 0 that ends when rank 0 has met the others three times in the meantime."""

    def __init__(self) -> None:
        self.runs, self.met, self.enough = False, 0, threading.Event()

    def work(self) -> bool:
        self.runs = True
        return self.enough.wait(20)


class Meeting(Rank):
    def __init__(self, rank: Rank, slow: Slow) -> None:
        super().__init__(rank.ranks, rank.rank)
        self.slow = slow

    def broadcast_object(self, value: Any) -> Any:
        found = super().broadcast_object(value)
        if self.rank == 0 and self.slow.runs and found == ("busy", None):
            self.slow.met += 1
            if self.slow.met >= 3:
                self.slow.enough.set()
        return found


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gap_ds.sharding.rank_zero._MEET", 0.001)


def test_all_ranks_get_the_result_and_meet_while_rank_zero_works() -> None:
    slow = Slow()

    def run(rank: Rank) -> Any:
        return on_rank_zero(Meeting(rank, slow), lambda: (rank.rank, slow.work()))

    assert Ranks(3).run(run) == [(0, True)] * 3


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("a"), ValueError, "a"),
        (TimeoutError("b"), TimeoutError, "b"),
        (OSError(28, "full"), ValueError, "OSError: [Errno 28] full"),
        (ZeroDivisionError("c"), RuntimeError, "ZeroDivisionError: c"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_raise_the_error_of_rank_zero(error: Exception, kind: type, text: str, size: int) -> None:
    def fail() -> None:
        raise error

    found = Ranks(size).run(lambda rank: on_rank_zero(rank, fail))
    assert [(type(e), str(e)) for e in found] == [(kind, text)] * size
    assert found[0].__cause__ is error


@pytest.mark.parametrize(
    "slow",
    # The N-th call: reads are of run.json, twice of the manifest, and then of the file.
    [
        *(("create", 1), ("read", 1), ("stream", 1), ("write", 1), ("write", 2)),
        *(("close", 1), ("put", 1), ("read", 3), ("size", 1), ("read", 4)),
    ],
)
def test_the_ranks_meet_during_every_access_of_rank_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: tuple[str, int]
) -> None:
    """A rank that waits in one collective until a large file is written would be ended by the process group."""
    work, calls = Slow(), Counter[str]()

    def slowly(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def access(*arguments: Any) -> Any:
            calls[name] += 1
            if (name, calls[name]) == slow:
                assert work.work()
            result = original(*arguments)
            if name == "stream":
                slowly(result, "write")
                slowly(result, "close")
            return result

        setattr(owner, name, access)

    def open_slowly(url: str) -> Any:
        folder = open_folder(url)
        for name in ("create", "stream", "put", "read", "size"):
            slowly(folder, name)
        return folder

    def run(rank: Rank) -> list[Any]:
        meeting, weight = Meeting(rank, work), torch.randn(4)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", meeting, meeting)
        item = item_of("w", (8, 1), 0, 4 * rank.rank, 4, lambda: weight, keep=8)
        return combine(job, 0, [item], {"w": bitmask.pack(torch.ones(4, dtype=torch.bool))})

    monkeypatch.setattr("gap_ds.parallel.exchange.open_folder", open_slowly)
    results = Ranks(2).run(run)
    assert [type(result) for result in results] == [list, list], results
    assert calls[slow[0]] >= slow[1]
