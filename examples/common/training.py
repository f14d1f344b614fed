"""The training loop of the examples: it knows steps, phases, checkpoints and signals, and not what is learned."""

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
    """What is learned."""

    #: What the throughput counts, such as "tokens".
    unit: str
    steps_per_epoch: int

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Sequence[Any]]]:
        """This rank's steps of an epoch from `start` on: (units of the whole step over all ranks, micro-batches)."""
        ...

    def loss(self, engine: GaPEngine, batch: Any, units: int, phase: Phase) -> Tensor:
        """Loss of a micro-batch, of which the engine takes the mean over ranks and micro-batches."""
        ...

    def after_step(self, engine: GaPEngine) -> None:
        """Called after every optimizer step."""
        ...

    def validate(self, engine: GaPEngine, epoch: int) -> dict[str, float]:
        """Figures of the model as it is now, after an epoch; none where there is nothing to tell."""
        ...


def train(args: RunArguments, engine: GaPEngine, folder: Path, state: dict[str, Any], task: Task) -> tuple[float, int]:
    """Trains to the end of the schedule: (units seen by this call, 0), or the signal's number where one came.

    `state` (see `run.begin`) goes into the checkpoints.
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
    """Tells how to go on after a signal; the exit status."""
    if runtime.rank() == 0:
        print(
            f"stopped at step {engine.applied_steps} and saved. Go on with the same command and --resume.",
            file=sys.stderr,
        )
    return 128 + number
