"""One process in the background for each folder of runs: start, look, stop.

The process holds a lock on OUT/background.pid as long as it lives, so a number in that file that now belongs to another
process is never signalled.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def start(script: Path, arguments: Sequence[str], out: Path) -> int:
    """Start a script with the lowest priority in a new session, its output in OUT/background.log; return its id.

    Raises:
        ValueError: one runs already.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "background.pid").open("a+") as lock, (out / "background.log").open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--background: {out} has a process already, {alive(out)}. Use --stop first.") from None
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-u", str(script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # the lock outlives this process
        )
        lock.truncate(0)
        lock.write(str(process.pid))
    return process.pid


def alive(out: Path) -> int | None:
    """Return the id of the process of a folder; None if there is none."""
    path = out / "background.pid"
    if not path.exists():
        return None
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read() or 0) or None
    return None


def stop(out: Path, seconds: float) -> bool:
    """Let the process of a folder save and end, in at most `seconds`. Return True if there is none now."""
    if (number := alive(out)) is None:
        return True
    os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while alive(out) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive(out) is None
