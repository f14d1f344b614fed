"""Work that rank 0 does alone, however long it takes: the ranks meet while it runs, and its error is raised on all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from gap_ds.sharding.comm import Comm
from gap_ds.storage.errors import summarize_error

#: Seconds between two meetings of the ranks while rank 0 works.
_MEET = 5.0

T = TypeVar("T")


def on_rank_zero(world: Comm, work: Callable[[], T]) -> T:
    """Run `work` on rank 0. Its result is returned, or its error raised, on all ranks.

    Rank 0 works in a thread, and all ranks meet every few seconds: a collective that waits longer than the timeout of
    the process group (10 minutes with NCCL) would end the job. So `work` must not call collectives.

    Raises:
        TimeoutError, ValueError: from `work`. An OSError becomes a ValueError.
        RuntimeError: any other error of `work`.
    """
    running = _start(work, in_thread=world.size > 1) if world.rank == 0 else None
    while True:
        if running is not None:
            wait([running], timeout=_MEET)
        kind, value = world.broadcast_object(_outcome(running) if running is not None else None)
        if kind == "done":
            result: T = value
            return result
        if kind != "busy":
            cause = running.exception() if running is not None else None
            raise {"TimeoutError": TimeoutError, "ValueError": ValueError}.get(kind, RuntimeError)(value) from cause


def _start(work: Callable[[], T], in_thread: bool) -> Future[T]:
    """Run `work`, in a thread that does not outlive the process if `in_thread`."""
    future: Future[T] = Future()

    def fulfil() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):  # such as an interrupt from the keyboard
                raise

    if in_thread:
        threading.Thread(target=fulfil, daemon=True).start()
    else:
        fulfil()
    return future


def _outcome(running: Future[Any]) -> tuple[str, Any]:
    """Return the state of the work for the other ranks: "busy", its result, or the kind and text of its error."""
    if not running.done():
        return "busy", None
    match running.exception():
        case None:
            return "done", running.result()
        case TimeoutError() as error:
            return "TimeoutError", str(error)
        case ValueError() as error:
            return "ValueError", str(error)
        case OSError() as error:
            return "ValueError", summarize_error(error)
        case error:
            return "error", summarize_error(error)
