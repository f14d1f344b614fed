"""Starts the workers of parallel GaP on one machine: each an ordinary job of some ranks, by torchrun or deepspeed.

Every worker has its own port and its own devices. Their output is interleaved line by line, each with its worker's
number. A worker that fails ends all others, unless it may be restarted. SIGINT, SIGTERM and SIGHUP are passed on, and
the workers may save: whatever ends them, none of their processes is left running.
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

#: Seconds that workers have to save and leave after a signal, before they are killed. The deepspeed launcher kills its
#: ranks after 30 of them, which cannot be set.
PATIENCE = 60.0
#: Lines of a failed worker that are shown again at the end, when the others' lines have scrolled them away. After the
#: error itself torchrun prints 40 lines of its own, and 5 more for each further rank that failed.
_LAST_LINES = 100
#: In the environment of all processes of a job, with a value that no other job has: they are found by it, see
#: `_processes`.
_MARK = "GAP_DS_JOB"


@dataclass
class _Job:
    """A worker's process (a launcher, or the only rank), and the last lines that it and its children printed."""

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
    """Runs SCRIPT ARGUMENTS... as `workers` jobs of `ranks` processes; the exit status of the first that failed.

    Each gets `--gap-worker I` and `extra` appended; `{worker}` in an argument becomes its number. In its environment
    GAP_DS_WORKERS is the number of all. After a signal the status is 128 + its number. Where `out` is closed, the
    workers go on without it.

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


class _Workers:
    """All workers: starts them, starts again what failed, ends them.

    Args:
        devices: of each worker, one for each of its `ranks`; as in `_devices`.
    """

    def __init__(
        self,
        command: Sequence[str],
        launcher: Launcher | None,
        ranks: int,
        devices: Sequence[Sequence[str]],
        output: _Output,
    ) -> None:
        self._command, self._launcher, self._ranks = command, launcher, ranks
        self._devices, self._output = devices, output
        self._jobs: dict[int, _Job] = {}  # the newest of each worker, also those that have ended
        self._ports: dict[int, int] = {}

    def work(self, restarts: int, signals: _Signals) -> int:
        """Starts all and waits for them; the exit status. Workers may be running still if it raises."""
        running = set(range(len(self._devices)))
        left = dict.fromkeys(running, restarts)
        self._ports = dict(enumerate(_free_ports(len(running))))
        for worker in self._ports:
            self._start(worker)
        while running:
            if signals.seen:
                self.end(signals.to_pass_on)
                return 128 + signals.seen
            for worker in sorted(running):
                if (status := self._jobs[worker].process.poll()) is None:
                    continue
                if status == 0:
                    running.remove(worker)
                elif left[worker]:
                    left[worker] -= 1
                    self._start_again(worker, _status(status))
                else:
                    self.end(signal.SIGTERM)
                    _tell(self._jobs[worker], _status(status))
                    return _status(status)
            time.sleep(0.1)
        return 0

    def end(self, number: int) -> None:
        """Ends all, as in `_end`; at once if they have ended."""
        _end(self._jobs.values(), number)

    def _start(self, worker: int) -> None:
        mark, port = secrets.token_hex(8), self._ports[worker]
        environment = _environment(os.environ, worker, self._devices, self._ranks) | {_MARK: mark}
        if self._launcher is None:
            environment |= _alone(port)
        words = [word.replace("{worker}", str(worker)) for word in self._command]
        process = subprocess.Popen(
            [*_launch(self._launcher, self._devices[worker], self._ranks, port), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal reaches it through `_signal` alone
        )
        self._jobs[worker] = job = _Job(worker, process, mark)
        job.reader = threading.Thread(target=_copy, args=(job, self._output), daemon=True)
        job.reader.start()

    def _start_again(self, worker: int, status: int) -> None:
        # Of a launcher that was killed the ranks live on, and would write where the new ones do.
        _end([self._jobs[worker]], signal.SIGKILL)
        self._output.say(worker, f"ended with status {status}: starting it again")
        (self._ports[worker],) = _free_ports(1, self._ports.values())
        self._start(worker)


# -- what is started ---------------------------------------------------------------------------------------------------


def _launcher(arguments: Iterable[str]) -> Launcher:
    """The launcher for a script's arguments.

    >>> _launcher(["--deepspeed_config=zero2.json"]), _launcher(["--output-dir", "runs/deepspeed"])
    ('deepspeed', 'torchrun')
    """
    options = {"--deepspeed", "--deepspeed_config", "--deepspeed-config"}
    return "deepspeed" if any(word.partition("=")[0] in options for word in arguments) else "torchrun"


def _launch(launcher: Launcher | None, devices: Sequence[str], ranks: int, port: int) -> list[str]:
    """What comes before the script. Knows the launchers' command lines, as of DeepSpeed 0.19.8 and torch 2.13."""
    if launcher is None:
        return [sys.executable]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    # Started as the command `deepspeed` starts it on one machine, without that command's own process before it
    # (launcher/runner.py): with --num_gpus that one gives every worker the first GPUs, whatever CUDA_VISIBLE_DEVICES
    # is, a signal ends it before the ranks have saved, and it ends with 0 when a signal has ended this launcher.
    slots = {"localhost": list(devices) or [str(i) for i in range(ranks)]}
    info = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    words = [f"--world_info={info}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *words]


def _alone(port: int) -> dict[str, str]:
    """What a launcher would tell the only process of a job."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _devices(visible: str | None, workers: int, ranks: int) -> list[list[str]]:
    """The GPUs of each worker, by the names that CUDA_VISIBLE_DEVICES has for them; empty lists where there are none.

    Args:
        visible: CUDA_VISIBLE_DEVICES: numbers, or UUIDs of GPUs or of MIG instances.
    Raises:
        ValueError: there are GPUs, but too few.
    """
    import torch

    if not torch.cuda.is_available():
        return [[] for _ in range(workers)]
    count = torch.cuda.device_count()  # fewer than are named, if CUDA does not know one of them
    devices = [name.strip() for name in visible.split(",")][:count] if visible else [str(i) for i in range(count)]
    if len(devices) < workers * ranks:
        raise ValueError(
            f"{workers} workers of {ranks} ranks need {workers * ranks} devices, and there are {len(devices)}. "
            "Lower --workers or --ranks-per-worker, or start the workers on several machines by --gap-worker."
        )
    return [devices[worker * ranks : (worker + 1) * ranks] for worker in range(workers)]


def _environment(base: Mapping[str, str], worker: int, devices: Sequence[Sequence[str]], ranks: int) -> dict[str, str]:
    """A worker's environment: its devices or its share of the cores, and how many workers there are."""
    # torchrun kills ranks that take longer to leave than this; its default is 30 s.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{PATIENCE:.0f}", **base, "GAP_DS_WORKERS": str(len(devices))}
    if devices[worker]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[worker])
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (len(devices) * ranks))))
    return environment


def _free_ports(count: int, taken: Collection[int] = ()) -> list[int]:
    """Ports that are free now and not among `taken`, which workers that are starting have been told to use."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:  # until all are chosen: a port that is let go may be given out again
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("", 0))
            if (port := probe.getsockname()[1]) not in taken:
                ports.append(port)
    return ports


# -- what they print ---------------------------------------------------------------------------------------------------


class _Output:
    """Where the lines of all workers go, until nobody reads them any more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._lock, self._open = stream, threading.Lock(), True

    def say(self, worker: int, line: str) -> None:
        """Prints a line of a worker's; never raises, for a worker whose output is not read would stand still."""
        with self._lock:
            if self._open and not _print(f"[worker {worker}] {line}", self._stream):
                self._open = False
                _print("gap-ds parallel: its output is closed. The workers go on; SIGTERM ends them.", sys.stderr)


def _print(text: str, stream: IO[str]) -> bool:
    """Prints, and returns whether that was possible."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):  # a pipe without a reader, a terminal that has gone, a full disk; a closed file
        if stream in (sys.stdout, sys.stderr):
            # Or Python fails at exit, with status 120, when it flushes what could not be written.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


def _copy(job: _Job, output: _Output) -> None:
    assert job.process.stdout is not None
    for line in job.process.stdout:
        job.last.append(line.rstrip("\n"))
        output.say(job.worker, line.rstrip("\n"))


def _tell(job: _Job, status: int) -> None:
    """Says once more, at the end, what ended all workers."""
    head = f"gap-ds parallel: worker {job.worker} ended with status {status}, so all have been ended. Its last lines:"
    _print("\n".join([head, *(f"    {line}" for line in list(job.last))]), sys.stderr)


def _status(code: int) -> int:
    """The exit status that a shell would show: 128 + N for a process that died of signal N."""
    return code if code >= 0 else 128 - code


# -- how they end ------------------------------------------------------------------------------------------------------


def _end(jobs: Iterable[_Job], number: int) -> None:
    """Sends a signal to all processes of the jobs, waits until they are gone, and kills those that stay.

    Not only for the launchers: one that dies at once leaves ranks that are saving, and one that was killed before has
    left ranks that train on.
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
            job.reader.join(timeout=5)  # for what they had still to say


def _gone(jobs: Sequence[_Job], *, kill: bool) -> bool:
    """Waits for all processes of the jobs, PATIENCE seconds at most; whether they are gone."""
    deadline, left = time.monotonic() + PATIENCE, set[int]()
    while True:
        for job in jobs if kill else ():
            _signal(job, signal.SIGKILL)  # each time: what is killed may have started something just before
        left = {pid for pid in left.union(_processes(jobs)) if _runs(pid)}
        if not left and all(job.process.poll() is not None for job in jobs):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _signal(job: _Job, number: int) -> None:
    """Lets a job's launcher end its ranks; where it is dead, or all shall die, signals every process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if job.process.poll() is None:
            # To its group: ranks of deepspeed are in it. Those of torchrun are not, and hear of it from torchrun.
            os.killpg(job.process.pid, number)
            if number != signal.SIGKILL:
                return
    for pid in _processes([job]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _processes(jobs: Sequence[_Job]) -> set[int]:
    """All processes of the jobs: launchers, ranks, and what those have started, also without living parents.

    They are those that have inherited the mark. Neither sessions nor descent would do: torchrun puts ranks in sessions
    of their own, the ranks of a dead launcher have a new parent, and a number kept from before may be another process's
    by now. Not found is what writes a title over its environment (setproctitle): its launcher ends that, if it lives.
    Empty where there is no /proc: only launchers and their groups are ended there.
    """
    marks = [f"{_MARK}={job.mark}".encode() for job in jobs]
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone, or another user's
            environment = path.read_bytes()  # empty in a zombie
            if any(mark in environment for mark in marks):
                found.add(int(path.parent.name))
    return found


def _runs(pid: int) -> bool:
    """Whether a process lives; a zombie does not, and in a container nobody may ever collect it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class _Signals:
    """Inside its `with`, SIGINT, SIGTERM and SIGHUP are remembered, to be passed on to the workers."""

    def __init__(self) -> None:
        self.seen = 0

    @property
    def to_pass_on(self) -> int:
        """What the workers get: SIGTERM in the place of SIGHUP, for which scripts seldom have a handler."""
        return signal.SIGTERM if self.seen == signal.SIGHUP else self.seen

    def __enter__(self) -> _Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._notice) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _: object) -> None:
        self.seen = number
