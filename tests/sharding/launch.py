"""Runs a worker script in real processes that form a group over gloo, and always ends them.

The processes are forked from one server per test session, which has imported torch, DeepSpeed and the rest once
(`preload.py`): a group starts in a fraction of a second, and each process is as new as one that was started by hand.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])

#: Processes that come from a fork cannot use CUDA, if the server has looked for it: with a GPU each starts afresh.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_context.set_forkserver_preload(["preload"])


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections."""
    for port in range(20000 + os.getpid() * 37 % 10000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def environment() -> dict[str, str]:
    """The variables of every worker process."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return found if torch.cuda.is_available() else {**found, "DS_ACCELERATOR": "cpu"}


def start(script: str, arguments: tuple[str, ...], variables: dict[str, str], log: Path) -> BaseProcess:
    """One process that runs `python SCRIPT ...` with these environment variables; its output goes to a file."""
    with mock.patch.dict(os.environ, environment()):  # for the server, if this is the first process
        process = _context.Process(target=_work, args=(script, arguments, variables, log))
        process.start()
    return process


def _work(script: str, arguments: tuple[str, ...], variables: dict[str, str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(descriptor, output)
    os.environ.clear()
    os.environ.update(variables)
    path = HERE / script
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    status = 0
    try:
        import preload  # the server has it already

        assert preload.threads == 1 or torch.cuda.is_available(), "an import of preload.py has started threads"
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a library's clean-up at exit cannot spoil what was handed over


def run_workers(script: str, ranks: int, out: Path, *arguments: str, timeout: float = 900.0) -> None:
    """Runs `python SCRIPT OUT ...` on `ranks` processes; they leave their results in `out`.

    Raises:
        AssertionError: a process failed (with the end of its output) or the time was over; none is left running.
    """
    port = free_port()
    logs = [out / f"{Path(script).name}.{rank}.log" for rank in range(ranks)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            log.unlink(missing_ok=True)
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            ranked |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            workers.append(start(script, (str(out), *arguments), environment() | ranked, log))
        end = time.monotonic() + timeout
        running = list(workers)
        while running and (left := end - time.monotonic()) > 0:
            connection.wait([worker.sentinel for worker in running], left)
            running = [worker for worker in workers if worker.exitcode is None]
            if any(worker.exitcode for worker in workers if worker not in running):
                break
    finally:
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
            worker.join()
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):  # DeepSpeed leaves 66 MiB for each rank
            buffer.unlink(missing_ok=True)
    if codes != [0] * ranks:
        first = next(rank for rank, code in enumerate(codes) if code != 0 and (code or not any(codes)))
        output = logs[first].read_text(errors="replace") if logs[first].exists() else ""
        raise AssertionError(f"{script}: exit codes {codes}; rank {first} said:\n{output[-6000:]}")
