"""Processes, signals, progress and metrics of a training script. Nothing here is specific to GaP."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import datasets
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging


def start_processes(seed: int, threads: int | None, deepspeed: bool) -> torch.device:
    """Join the processes of torchrun or the deepspeed launcher, if any, seed them, and return this rank's device.

    On a CPU the processes share the cores evenly, unless `threads` or OMP_NUM_THREADS is set.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif threads or "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // here))
    if deepspeed:
        import deepspeed as ds

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by deprecated names; users cannot change that.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        ds.init_distributed()
    elif int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    # torch warns when a run of one process is saved without a process group; here that is intended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    if rank() != 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    seed_everything(seed)  # every rank builds the same model; the recipe reseeds dropout per rank
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def end_processes() -> None:
    """Leave the process group once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[bool]:
    """Let rank 0 run the body before the others, which read its caches. Yields True on rank 0."""
    if rank() != 0:
        barrier()
    yield rank() == 0
    if rank() == 0:
        barrier()


def total_over_ranks(*values: float) -> list[float]:
    """Return the sums of some numbers over all ranks."""
    if world_size() == 1:
        return list(values)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return numbers.tolist()


class Interrupt:
    """Context in which SIGINT or SIGTERM on any rank lets all ranks finish their step, save and end together.

    `requested()` is a collective: all ranks call it after the same step and get the same answer, the signal's number or
    0. It sends one small message over the CPU and does not synchronise with a GPU. A signal after the last call acts
    when the context ends. After `requested()` has returned a signal, further signals are ignored: launchers pass on the
    same Ctrl-C up to three times.
    """

    def __init__(self) -> None:
        self._seen = self._answered = 0
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._notice) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._answered:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._seen:
            os.kill(os.getpid(), self._seen)

    def _notice(self, number: int, _: Any) -> None:
        self._seen = number

    def requested(self) -> int:
        flag = torch.tensor([self._seen])
        if self._group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        self._answered = int(flag)
        return self._answered


class Monitor:
    """Progress on rank 0: a bar on a terminal, else plain lines; `metrics.jsonl`; TensorBoard on request.

    A run that continues at step `start` keeps the lines up to that step. Later lines belong to steps that it repeats.
    """

    def __init__(self, folder: Path, total: int, start: int, every: int, tensorboard: bool) -> None:
        self._leads, self._every, self._start, self._total = rank() == 0, every, time.perf_counter(), total
        self._writer: Any = None
        if not self._leads:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= start]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        hidden = not self.console.is_terminal
        self._bar = Progress(*columns, *times, console=self.console, disable=hidden)
        self._task = self._bar.add_task("training", total=total, completed=start)

    def __enter__(self) -> Monitor:
        if self._leads:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leads:
            self._bar.stop()
            self._file.close()
            if self._writer:
                self._writer.close()

    def step(self, step: int, **figures: float | int | str) -> None:
        """Update the progress after a step; write a line every `every` steps."""
        if not self._leads:
            return
        text = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        self._bar.update(self._task, completed=step, description=text)
        if step % self._every == 0 or step == self._total:
            self.write("train", step, **figures)
            if self._bar.disable:
                print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Write a line of `metrics.jsonl`, and points of TensorBoard."""
        if not self._leads:
            return
        row = {"kind": kind, "step": step, "seconds": round(time.perf_counter() - self._start, 3), **figures}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer:
            for key, value in figures.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{key}", value, step)


def _step_of(line: str) -> float:
    """Return the step of a line of `metrics.jsonl`, infinity for a line cut short by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program and end this process with its exit status.

    ValueError and OSError become one line on one rank (status 2), and so do Ctrl-C with nothing to save (130) and the
    end of another rank (1). Other errors are bugs and keep their traceback.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
        if _launched_rank() == 0:
            print("interrupted; earlier checkpoints are unchanged.", file=sys.stderr)
    except Exception as error:
        if _lost_a_rank(error):
            status = 1
            if _launched_rank() == 0:
                print("ended because another rank has: see its message, or it was killed.", file=sys.stderr)
        elif isinstance(error, ValueError | OSError) or _port_is_taken(error):
            status = _fail(error)
        else:
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # libraries that clean up at exit would wait for the other ranks
    sys.exit(0)


def _fail(error: Exception) -> int:
    """Print an error once, on any number of ranks, and return the exit status 2."""
    own = _launched_rank()
    if own:
        time.sleep(10)  # if rank 0 fails alike, it prints first and the launcher ends the others
    print(f"error{f' on rank {own}' if own else ''}: {error}", file=sys.stderr, flush=True)
    return 2


def _launched_rank() -> int:
    """Return the launcher's rank, known before and after there is a process group."""
    return int(os.environ.get("RANK", 0))


def _port_is_taken(error: BaseException) -> bool:
    """Return True if rank 0 could not listen on MASTER_PORT. The message contains the port."""
    return isinstance(error, dist.DistNetworkError) and "EADDRINUSE" in str(error)


def _lost_a_rank(error: BaseException | None) -> bool:
    """Return True if a collective failed because another process ended. gloo has no error class for that."""
    texts = "Connection closed by peer", "Connection reset by peer", "Broken pipe"
    while error is not None:
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError) and not _port_is_taken(error):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in texts):
            return True
        error = error.__cause__
    return False
