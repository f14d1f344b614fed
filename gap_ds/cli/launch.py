"""Starts the workers of parallel GaP on one machine: each an ordinary job of some ranks, by torchrun or deepspeed.

Every worker has its own port and its own devices. Their output is interleaved line by line, each with its worker's
number. A worker that fails ends all others, unless it may be restarted; none is left running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

Launcher = Literal["torchrun", "deepspeed"]

#: Seconds that workers have to save and leave after a signal, before they are killed.
PATIENCE = 60.0
#: Lines of a failed worker that are shown again at the end, when the others' lines have scrolled them away.
_LAST_LINES = 40


@dataclass
class _Job:
    """A worker's process, and the last lines it printed."""

    worker: int
    process: subprocess.Popen[str]
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    reader: threading.Thread | None = None


def run(
    command: Sequence[str],
    *,
    workers: int,
    ranks: int,
    launcher: Launcher | None,
    extra: Sequence[str] = (),
    restarts: int = 0,
    out: IO[str] | None = None,
) -> int:
    """Runs SCRIPT ARGUMENTS... as `workers` jobs of `ranks` processes; the exit status of the first that failed.

    Each gets `--gap-worker I` and `extra` appended; `{worker}` in an argument becomes its number.

    Args:
        launcher: by default deepspeed where the arguments have a DeepSpeed config, else torchrun; for one rank none.
        restarts: how often a worker that fails is started again; after that it ends all.
    Raises:
        ValueError: there is no script, or fewer devices than ranks.
    """
    if not command or not Path(command[0]).is_file():
        raise ValueError(
            f"{command[0] if command else 'nothing after --'}: is no script. Give one after --, as in: gap-ds parallel "
            "--workers 3 -- examples/translation/train.py --gap-config configs/gap/parallel_80.json ..."
        )
    out = out or sys.stdout
    environments = [_environment(os.environ, worker, workers, ranks) for worker in range(workers)]
    if launcher is None and ranks > 1:
        launcher = "deepspeed" if any("deepspeed" in word for word in command[1:]) else "torchrun"
    lock = threading.Lock()

    def start(worker: int) -> _Job:
        words = [word.replace("{worker}", str(worker)) for word in (*command, "--gap-worker", str(worker), *extra)]
        process = subprocess.Popen(
            [*_launch(launcher, ranks), *words],
            env=environments[worker] if launcher else environments[worker] | _alone(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a signal reaches all processes of a worker, and only when this one sends it
        )
        job = _Job(worker, process)
        job.reader = threading.Thread(target=_copy, args=(job, out, lock), daemon=True)
        job.reader.start()
        return job

    jobs: dict[int, _Job] = {}
    left = dict.fromkeys(range(workers), restarts)
    with _Signals() as signals:
        try:
            jobs |= {worker: start(worker) for worker in range(workers)}
            while jobs:
                if signals.seen:
                    _end(jobs.values(), signals.seen)
                    return 128 + signals.seen
                for worker, job in list(jobs.items()):
                    if (status := job.process.poll()) is None:
                        continue
                    del jobs[worker]
                    _finish(job)
                    if status and left[worker]:
                        left[worker] -= 1
                        _say(out, lock, worker, f"ended with status {_status(status)}: starting it again")
                        jobs[worker] = start(worker)
                    elif status:
                        _end(jobs.values(), signal.SIGTERM)
                        _tell(job, _status(status))
                        return _status(status)
                time.sleep(0.1)
            return 0
        finally:
            _end(jobs.values(), signal.SIGTERM)


def _alone() -> dict[str, str]:
    """What a launcher would tell the only process of a job."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def _launch(launcher: Launcher | None, ranks: int) -> list[str]:
    if launcher is None:
        return [sys.executable]
    port = str(_free_port())
    if launcher == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]


def _environment(base: Mapping[str, str], worker: int, workers: int, ranks: int) -> dict[str, str]:
    """A worker's environment: its devices, or its share of the cores."""
    import torch

    environment = dict(base)
    if torch.cuda.is_available():
        visible = base.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if len(devices) < workers * ranks:
            raise ValueError(
                f"{workers} workers of {ranks} ranks need {workers * ranks} devices, and there are {len(devices)}. "
                "Lower --workers or --ranks-per-worker, or start the workers on several machines by --gap-worker."
            )
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[worker * ranks : (worker + 1) * ranks])
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (workers * ranks))))
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _copy(job: _Job, out: IO[str], lock: threading.Lock) -> None:
    assert job.process.stdout is not None
    for line in job.process.stdout:
        job.last.append(line.rstrip("\n"))
        _say(out, lock, job.worker, line.rstrip("\n"))


def _say(out: IO[str], lock: threading.Lock, worker: int, line: str) -> None:
    with lock:
        print(f"[worker {worker}] {line}", file=out, flush=True)


def _tell(job: _Job, status: int) -> None:
    """Says once more, at the end, what ended all workers."""
    print(
        f"gap-ds parallel: worker {job.worker} ended with status {status}, so all have been ended. Its last lines:",
        *(f"    {line}" for line in job.last),
        sep="\n",
        file=sys.stderr,
    )


def _finish(job: _Job) -> None:
    """Reads what the process had still to say. A grandchild may hold the pipe open, so not for ever."""
    if job.reader is not None:
        job.reader.join(timeout=5)


def _status(code: int) -> int:
    """The exit status that a shell would show: 128 + N for a process that died of signal N."""
    return code if code >= 0 else 128 - code


def _end(jobs: Iterable[_Job], number: int) -> None:
    """Sends a signal to all processes of the workers and waits; kills those that do not leave."""
    running = [job for job in list(jobs) if job.process.poll() is None]
    for job in running:
        _signal(job, number)
    deadline = time.monotonic() + PATIENCE
    for job in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(timeout=max(0.1, deadline - time.monotonic()))
    for job in running:
        _signal(job, signal.SIGKILL)  # also what a dead launcher has left behind
        job.process.wait()
        _finish(job)


def _signal(job: _Job, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, number)


class _Signals:
    """Inside its `with`, SIGINT and SIGTERM are remembered, to be passed on to the workers."""

    def __init__(self) -> None:
        self.seen = 0

    def __enter__(self) -> _Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._notice) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _: object) -> None:
        self.seen = number
