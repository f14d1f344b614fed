"""`gap-ds parallel`: starts the workers of parallel GaP on one machine, each as a job under torchrun or deepspeed.

Workers have different ports and devices. Their output is interleaved line by line, each line with the number of its
worker. A worker that fails ends all others, unless it may be restarted. SIGINT, SIGTERM and SIGHUP are passed on, and
the workers get time to save. In the end no process of any worker is left running.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

Launcher = Literal["torchrun", "deepspeed"]

#: Seconds that workers get to save and exit after a signal, before they are killed. The deepspeed launcher kills its
#: ranks after 30 s, which cannot be changed.
PATIENCE = 60.0
#: Last lines of a failed worker that are repeated at the end. torchrun prints 40 lines after the error itself, and 5
#: more for each further rank that failed.
_LAST_LINES = 100
#: Environment variable with a unique value for each job, by which `_processes` finds all its processes.
_MARK = "GAP_DS_JOB"
#: Seconds between two looks at the processes.
_POLL = 0.1


@dataclass
class _Job:
    """A started worker: its process (a launcher, or the only rank) and the last lines that the job printed."""

    worker: int
    process: subprocess.Popen[str]
    mark: str
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
    """Run SCRIPT ARGUMENTS... as `workers` jobs of `ranks` processes. Return 0, or the status of the first failure.

    Each job gets `--gap-worker I` and `extra` appended, and GAP_DS_WORKERS, the number of workers, in its environment;
    `{worker}` in an argument becomes I. After signal N the status is 128 + N. If `out` is closed, the workers go on.

    Args:
        launcher: None: deepspeed if the arguments contain a DeepSpeed config, else torchrun; for one rank no launcher.
        restarts: how often a worker that fails is restarted before its failure ends all workers.
    Raises:
        ValueError: there is no script, or there are fewer devices than ranks.
    """
    if not command or not Path(command[0]).is_file():
        raise ValueError(
            f"{command[0] if command else 'nothing after --'}: is no script. Name one after --, as in: gap-ds parallel "
            "--workers 3 -- examples/translation/train.py --gap-config configs/gap/parallel_80.json ..."
        )
    team = _Workers(
        (*command, "--gap-worker", "{worker}", *extra),
        launcher or (_launcher(command[1:]) if ranks > 1 else None),
        ranks,
        _devices(os.environ.get("CUDA_VISIBLE_DEVICES"), workers, ranks),
        _Output(out or sys.stdout),
    )
    with _Signals() as signals:
        try:
            return team.work(restarts, signals)
        finally:
            team.end(signal.SIGTERM)


@dataclass
class _Workers:
    """All workers of a run: starts, restarts and ends them.

    devices: of each worker, as `_devices` returns them. jobs: the latest of each worker, running or not.
    """

    command: Sequence[str]
    launcher: Launcher | None
    ranks: int
    devices: Sequence[Sequence[str]]
    output: _Output
    jobs: dict[int, _Job] = field(default_factory=dict)
    ports: dict[int, int] = field(default_factory=dict)

    def work(self, restarts: int, signals: _Signals) -> int:
        """Start all workers and wait for them. Return the exit status. Some may still run if this raises."""
        running = set(range(len(self.devices)))
        left = dict.fromkeys(running, restarts)
        self.ports = dict(enumerate(_free_ports(len(running))))
        for worker in self.ports:
            self._start(worker)
        while running:
            if signals.seen:
                self.end(signals.to_pass_on)
                return 128 + signals.seen
            for worker in sorted(running):
                if (status := self.jobs[worker].process.poll()) is None:
                    continue
                if status == 0:
                    running.remove(worker)
                elif left[worker]:
                    left[worker] -= 1
                    self._start_again(worker, _status(status))
                else:
                    self.end(signal.SIGTERM)
                    _print_failure(self.jobs[worker], _status(status))
                    return _status(status)
            time.sleep(_POLL)
        return 0

    def end(self, number: int) -> None:
        """End all workers with a signal, as `_end` does."""
        _end(self.jobs.values(), number)

    def _start(self, worker: int) -> None:
        mark, port = secrets.token_hex(8), self.ports[worker]
        environment = _environment(os.environ, worker, self.devices, self.ranks) | {_MARK: mark}
        if self.launcher is None:
            environment |= _alone(port)
        words = [word.replace("{worker}", str(worker)) for word in self.command]
        process = subprocess.Popen(
            [*_launch(self.launcher, self.devices[worker], self.ranks, port), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal reaches it only through `_signal`
        )
        self.jobs[worker] = job = _Job(worker, process, mark)
        job.reader = threading.Thread(target=_copy, args=(job, self.output), daemon=True)
        job.reader.start()

    def _start_again(self, worker: int, status: int) -> None:
        # The ranks of a killed launcher live on, and would write to the same files as the new ones.
        _end([self.jobs[worker]], signal.SIGKILL)
        self.output.print(worker, f"ended with status {status}: starting it again")
        (self.ports[worker],) = _free_ports(1, self.ports.values())
        self._start(worker)


# -- commands, devices, environments -----------------------------------------------------------------------------------


def _launcher(arguments: Iterable[str]) -> Launcher:
    """Return the launcher for the arguments of a script.

    >>> _launcher(["--deepspeed_config=zero2.json"]), _launcher(["--output-dir", "runs/deepspeed"])
    ('deepspeed', 'torchrun')
    """
    options = {"--deepspeed", "--deepspeed_config", "--deepspeed-config"}
    return "deepspeed" if any(word.partition("=")[0] in options for word in arguments) else "torchrun"


def _launch(launcher: Launcher | None, devices: Sequence[str], ranks: int, port: int) -> list[str]:
    """Return the words before the script: command lines of the launchers of DeepSpeed 0.19.8 and torch 2.13."""
    if launcher is None:
        return [sys.executable]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    # The command `deepspeed` (launcher/runner.py) starts this same module on one machine. It is left out, because with
    # --num_gpus it ignores CUDA_VISIBLE_DEVICES and gives every worker the first GPUs, a signal ends it before the
    # ranks have saved, and it exits with 0 after a signal has ended the module.
    slots = {"localhost": list(devices) or [str(i) for i in range(ranks)]}
    info = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    words = [f"--world_info={info}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *words]


def _alone(port: int) -> dict[str, str]:
    """Return the variables that a launcher would set for a job of one process."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _devices(visible: str | None, workers: int, ranks: int) -> list[list[str]]:
    """Return the GPUs of each worker, by their names in CUDA_VISIBLE_DEVICES; empty lists on a machine without GPUs.

    Args:
        visible: CUDA_VISIBLE_DEVICES: numbers, or UUIDs of GPUs or of MIG instances.
    Raises:
        ValueError: there are GPUs, but too few.
    """
    import torch

    if not torch.cuda.is_available():
        return [[] for _ in range(workers)]
    count = torch.cuda.device_count()  # CUDA ignores the names after the first unknown one
    devices = [name.strip() for name in visible.split(",")][:count] if visible else [str(i) for i in range(count)]
    if len(devices) < workers * ranks:
        raise ValueError(
            f"{workers} workers of {ranks} ranks need {workers * ranks} devices, and there are {len(devices)}. "
            "Lower --workers or --ranks-per-worker, or start the workers on several machines by --gap-worker."
        )
    return [devices[worker * ranks : (worker + 1) * ranks] for worker in range(workers)]


def _environment(base: Mapping[str, str], worker: int, devices: Sequence[Sequence[str]], ranks: int) -> dict[str, str]:
    """Return the environment of a worker: its devices or its share of the cores, and the number of workers."""
    # torchrun kills ranks that take longer to exit; its default is 30 s.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{PATIENCE:.0f}", **base, "GAP_DS_WORKERS": str(len(devices))}
    if devices[worker]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[worker])
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (len(devices) * ranks))))
    return environment


def _free_ports(count: int, taken: Collection[int] = ()) -> list[int]:
    """Return ports that are free and not `taken` by a worker that is starting."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:  # a port that is released early may be chosen twice
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("", 0))
            if (port := probe.getsockname()[1]) not in taken:
                ports.append(port)
    return ports


# -- output ------------------------------------------------------------------------------------------------------------


class _Output:
    """The stream for the lines of all workers, until its reader closes it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._lock, self._open = stream, threading.Lock(), True

    def print(self, worker: int, line: str) -> None:
        """Print a line of a worker. Never raises: a worker blocks when nobody reads its output."""
        with self._lock:
            if self._open and not _print(f"[worker {worker}] {line}", self._stream):
                self._open = False
                _print("gap-ds parallel: its output is closed. The workers go on; SIGTERM ends them.", sys.stderr)


def _print(text: str, stream: IO[str]) -> bool:
    """Print a text. Return False if that is impossible."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):  # a pipe without a reader, a lost terminal, a full disk; a closed file
        if stream in (sys.stdout, sys.stderr):
            # Otherwise Python flushes the unwritten text at exit, fails, and exits with 120.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


def _copy(job: _Job, output: _Output) -> None:
    assert job.process.stdout is not None
    for line in job.process.stdout:
        job.last.append(line.rstrip("\n"))
        output.print(job.worker, line.rstrip("\n"))


def _print_failure(job: _Job, status: int) -> None:
    """Repeat the last lines of the worker that ended all."""
    head = f"gap-ds parallel: worker {job.worker} ended with status {status}, so all have been ended. Its last lines:"
    _print("\n".join([head, *(f"    {line}" for line in list(job.last))]), sys.stderr)


def _status(code: int) -> int:
    """Return the exit status as a shell shows it: 128 + N for a process that died of signal N."""
    return code if code >= 0 else 128 - code


# -- signals and the end -----------------------------------------------------------------------------------------------


def _end(jobs: Iterable[_Job], number: int) -> None:
    """Send a signal to all processes of the jobs, wait until they are gone, and kill those that stay.

    It waits for ranks too: a launcher may die at once while its ranks save, or may have been killed while they train.
    """
    jobs = list(jobs)
    for job in jobs:
        _signal(job, number)
    if not _gone(jobs, kill=number == signal.SIGKILL):
        _gone(jobs, kill=True)
    for job in jobs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(timeout=5)
        if job.reader is not None:
            job.reader.join(timeout=5)  # for their last lines


def _gone(jobs: Sequence[_Job], *, kill: bool) -> bool:
    """Wait for all processes of the jobs, at most PATIENCE seconds. Return whether they are gone."""
    deadline, left = time.monotonic() + PATIENCE, set[int]()
    while True:
        for job in jobs if kill else ():
            _signal(job, signal.SIGKILL)  # each time: a process may have started another one just before its end
        left = {pid for pid in left.union(_processes(jobs)) if _runs(pid)}
        if not left and all(job.process.poll() is not None for job in jobs):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)


def _signal(job: _Job, number: int) -> None:
    """Send a signal to the launcher of a job, which ends its ranks; to every process for SIGKILL or a dead launcher."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if job.process.poll() is None:
            # The ranks of deepspeed are in this group. torchrun passes the signal on to its ranks.
            os.killpg(job.process.pid, number)
            if number != signal.SIGKILL:
                return
    for pid in _processes([job]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _processes(jobs: Sequence[_Job]) -> set[int]:
    """Return all processes of the jobs, by the mark that they have inherited: launchers, ranks and their children.

    Sessions, parents and stored process numbers do not identify them: torchrun starts each rank in a new session, the
    ranks of a dead launcher have another parent, and numbers are reused. A process that overwrites its environment with
    a title (setproctitle) is not found; its launcher ends it. Empty without /proc: then only launchers and their groups
    are ended.
    """
    marks = [f"{_MARK}={job.mark}".encode() for job in jobs]
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            environment = path.read_bytes()  # empty in a zombie
            if any(mark in environment for mark in marks):
                found.add(int(path.parent.name))
    return found


def _runs(pid: int) -> bool:
    """Return whether a process runs. A zombie does not; in a container it may never be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class _Signals:
    """Within its `with` block, records SIGINT, SIGTERM and SIGHUP, to be passed on to the workers."""

    def __init__(self) -> None:
        self.seen = 0

    @property
    def to_pass_on(self) -> int:
        """The signal for the workers: SIGTERM instead of SIGHUP, for which scripts seldom have a handler."""
        return signal.SIGTERM if self.seen == signal.SIGHUP else self.seen

    def __enter__(self) -> _Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: object) -> None:
        self.seen = number
