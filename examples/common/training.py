"""Training loop of the examples: steps, phases, checkpoints and signals. The task is a parameter."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from common import run, runtime
from common.arguments import RunArguments
from gap_ds import GaPEngine
from gap_ds.method.schedule import Phase


class Task(Protocol):
    """Data, loss and validation of a training run."""

    #: Unit of the throughput, such as "tokens".
    unit: str
    steps_per_epoch: int

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield this rank's steps of an epoch from `start` on: (units of the step over all ranks, micro-batches)."""
        ...

    def loss(self, engine: GaPEngine, batch: Any, units: int, phase: Phase) -> Tensor:
        """Return the loss of a micro-batch. The engine averages it over ranks and micro-batches."""
        ...

    def after_step(self, engine: GaPEngine) -> None:
        """Run after every optimizer step."""
        ...

    def validate(self, engine: GaPEngine, epoch: int) -> dict[str, float]:
        """Return figures of the model after an epoch; empty if there are none."""
        ...


def train(args: RunArguments, engine: GaPEngine, folder: Path, state: dict[str, Any], task: Task) -> tuple[float, int]:
    """Train to the end of the schedule, or until a signal. Returns (units seen by this call, the signal's number or 0).

    `state` (see `run.begin`) is saved in the checkpoints.
    """
    per_epoch = task.steps_per_epoch
    seen, since, total = 0.0, time.perf_counter(), engine.schedule.total_steps
    every = args.save_every or per_epoch
    engine.train()
    with (
        runtime.Interrupt() as interrupt,
        runtime.Monitor(folder, total, engine.applied_steps, args.log_every, args.tensorboard) as monitor,
    ):
        while not engine.finished:
            epoch, start = divmod(state["batches"], per_epoch)
            for units, micro_batches in task.batches(epoch, start):
                phase, density, losses = engine.phase, engine.density, []
                lr = float(engine.optimizer.param_groups[0]["lr"])
                for batch in micro_batches:
                    loss = task.loss(engine, batch, units, phase)
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.detach())
                task.after_step(engine)
                seen += units
                state["batches"] += 1
                done = engine.applied_steps
                figures = {
                    "epoch": epoch,
                    "phase": phase.index,
                    "density": density,
                    "loss": float(sum(losses)) / args.accumulation,
                    "lr": lr,
                    f"{task.unit}_per_s": seen / (time.perf_counter() - since),
                }
                monitor.step(done, **figures)
                if state["batches"] % per_epoch == 0 or engine.finished:
                    engine.eval()
                    if found := task.validate(engine, epoch):
                        monitor.write("validation", done, epoch=epoch, **found, density=engine.density)
                    engine.train()
                stopped = interrupt.requested()
                if stopped or state["batches"] % every == 0 or engine.finished:
                    run.save(args, engine, folder / "checkpoints", state)
                if stopped:
                    return seen, stopped
                if engine.finished:
                    break
    return seen, 0


def say_stopped(engine: GaPEngine, number: int) -> int:
    """Print how to continue after a signal, and return the exit status."""
    if runtime.rank() == 0:
        print(
            f"stopped at step {engine.applied_steps} and saved. Go on with the same command and --resume.",
            file=sys.stderr,
        )
    return 128 + number
