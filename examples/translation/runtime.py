"""What a training script needs around its recipe: processes, signals, progress, figures. Nothing here is about GaP."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def start_processes(seed: int, threads: int | None, deepspeed: bool) -> torch.device:
    """Joins the processes of torchrun or the deepspeed launcher (or stands alone) and seeds them; this rank's device.

    On a CPU the cores are shared out among the processes of the machine unless `threads` or OMP_NUM_THREADS says so.
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
        # DeepSpeed calls collectives by names that torch deprecates; its users cannot change that.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        ds.init_distributed()
    elif int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    # Every rank builds the same model from this seed; `seed_rank` makes their dropout differ afterwards.
    seed_everything(seed)
    return device


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
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


@contextmanager
def first_rank_first() -> Iterator[bool]:
    """Rank 0 runs the body before the others do (it fills caches that they read); yields whether this is rank 0."""
    if rank() != 0:
        barrier()
    yield rank() == 0
    if rank() == 0:
        barrier()


def total_over_ranks(*values: float) -> list[float]:
    """Sums of some numbers over all ranks."""
    if world_size() == 1:
        return list(values)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return numbers.tolist()


class Interrupt:
    """Notices SIGINT and SIGTERM on any rank, so that all ranks can finish their step, save and leave together.

    `requested()` is a collective: all ranks call it after the same step and get the same answer, the signal's number or
    0. It costs one small message over the CPU, and no synchronisation with a GPU.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._notice)

    def _notice(self, number: int, _: Any) -> None:
        self._seen = number

    def requested(self) -> int:
        if self._group is None:
            return self._seen
        flag = torch.tensor([self._seen])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)


class Monitor:
    """Progress on rank 0: a bar on a terminal, else plain lines; `metrics.jsonl`; TensorBoard when asked for."""

    def __init__(self, folder: Path, total: int, start: int, every: int, tensorboard: bool) -> None:
        self._leads, self._every, self._start, self._total = rank() == 0, every, time.perf_counter(), total
        self._writer: Any = None
        if not self._leads:
            return
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))
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
        """After every step; writes a line every `every` steps."""
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
        """A line of `metrics.jsonl` (and points in TensorBoard)."""
        if not self._leads:
            return
        row = {"kind": kind, "step": step, "seconds": round(time.perf_counter() - self._start, 3), **figures}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer:
            for key, value in figures.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{key}", value, step)


def fail(error: BaseException) -> int:
    """Says what is wrong once, whatever the number of ranks; the exit status 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if own := int(os.environ.get("RANK", 0)):
        time.sleep(3)  # where rank 0 fails alike, it speaks first, and the launcher ends the others meanwhile
    print(f"error{f' on rank {own}' if own else ''}: {error}", file=sys.stderr, flush=True)
    return 2
