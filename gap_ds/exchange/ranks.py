"""Work of some ranks that others wait for: they meet while it goes on, and an error on one is raised on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch

from gap_ds.comm import Comm
from gap_ds.exchange.folder import said, why

#: Seconds after which the ranks meet while one of them works alone.
_MEET = 5.0

T = TypeVar("T")


def by_first(world: Comm, work: Generator[None, None, T]) -> T:
    """What `work` returns on rank 0, or its error, on all ranks.

    While it takes its time the ranks meet every few seconds: a collective that is waited for longer than the process
    group's timeout (10 minutes with NCCL) would end the job.
    """
    while True:
        state, cause = _advance(work) if world.rank == 0 else (None, None)
        kind, value = world.from_first(state)
        if kind == "done":
            result: T = value
            return result
        if kind != "busy":
            raise {"TimeoutError": TimeoutError, "ValueError": ValueError}.get(kind, RuntimeError)(value) from cause


def _advance(work: Generator[None, None, T]) -> tuple[tuple[str, Any], Exception | None]:
    """Lets a generator work for some seconds: what to tell the other ranks, and the error that it ended with."""
    end = time.monotonic() + _MEET
    try:
        while time.monotonic() < end:
            next(work)
    except StopIteration as stop:
        return ("done", stop.value), None
    except (TimeoutError, ValueError) as error:
        return ("TimeoutError" if isinstance(error, TimeoutError) else "ValueError", str(error)), error
    except OSError as error:
        return ("ValueError", f"the exchange folder cannot be used ({why(error)})"), error
    except Exception as error:
        return ("error", why(error)), error
    return ("busy", None), None


def together(world: Comm, work: Callable[[], T]) -> T:
    """What `work` returns on this rank; an error on any rank becomes the same ValueError on all.

    `work` must not wait for other ranks.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the others must hear of it before they wait for this rank
        error = caught
    failed = world.all_gather(torch.tensor([error is not None], dtype=torch.int64)).view(-1)
    if not bool(failed.any()):
        return result
    row = torch.zeros(2048, dtype=torch.uint8)
    text = b"" if error is None else said(error).encode(errors="replace")[: row.numel()]
    row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    rows = world.all_gather(row)
    first = bytes(rows[int(failed.nonzero()[0, 0])].tolist()).rstrip(b"\0").decode(errors="replace")
    raise ValueError(first) from error
