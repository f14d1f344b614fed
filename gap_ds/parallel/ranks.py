"""Work of the first rank that others wait for: they meet while it goes on, and its error is raised on all."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, TypeVar

from gap_ds.sharding.comm import Comm
from gap_ds.storage.errors import summarize_error

#: Seconds after which the ranks meet while one of them works alone.
_MEET = 5.0

T = TypeVar("T")


def on_rank_zero(world: Comm, work: Generator[None, None, T]) -> T:
    """What `work` returns on rank 0, or its error, on all ranks.

    While it takes its time the ranks meet every few seconds: a collective that is waited for longer than the process
    group's timeout (10 minutes with NCCL) would end the job.
    """
    while True:
        state, cause = _advance(work) if world.rank == 0 else (None, None)
        kind, value = world.broadcast_object(state)
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
        return ("ValueError", f"the exchange folder cannot be used ({summarize_error(error)})"), error
    except Exception as error:
        return ("error", summarize_error(error)), error
    return ("busy", None), None
