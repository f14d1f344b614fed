"""Builds a `Run` from what a user has, downward: config, schedule, backend, plan, masks, observers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gap_ds.method import plan, rules, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding.backends import Backend, Training, detect
from gap_ds.sharding.comm import Comm
from gap_ds.training import mask_state
from gap_ds.training.consistency import LossGuard
from gap_ds.training.exchanging import Exchanging
from gap_ds.training.history import History
from gap_ds.training.learning_rate import LearningRate
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer
from gap_ds.training.run import Run


def build(
    model: nn.Module,
    source: GaPConfig | dict[str, Any] | str | Path,
    training: Training,
    steps_per_epoch: int | None,
    worker: ParallelWorker | None,
    nonfinite_loss: Literal["stop", "skip"],
    masks_from: str | Path | None,
    history: str | Path | None,
) -> Run:
    """A run before its first masks; the arguments are those of GaPEngine. Changes nothing that it is given.

    Raises:
        ValueError: a mistake in the config, or a combination that is not supported; the message names the setting.
    """
    config, phases = check(source, steps_per_epoch, worker)
    scheduler = training.lr_scheduler if training.lr_scheduler is not None else getattr(model, "lr_scheduler", None)
    _check_lr_restart(config, scheduler, masks_from)
    backend, world = detect(model, training), Comm()
    of_model = _plan(config, backend)
    state = MaskState(of_model, config, backend)
    guard = LossGuard(nonfinite_loss, world, harmless=backend.skips_overflow)
    run = Run(
        config=config,
        rule=rules.rule(config),
        schedule=phases,
        plan=of_model,
        worker=worker,
        backend=backend,
        world=world,
        mask_state=state,
        learning_rate=LearningRate(scheduler, backend.optimizer),
        grad_scaler=training.grad_scaler,
        guard=guard,
        observers=[],
    )
    run.observers.extend(_observers(run, history))
    return run


def check(
    source: GaPConfig | dict[str, Any] | str | Path, steps_per_epoch: int | None, worker: ParallelWorker | None
) -> tuple[GaPConfig, schedule.Schedule]:
    """The config and its schedule, checked before anything is allocated.

    Raises:
        ValueError: a mistake in the config, or a worker that does not fit it.
    """
    config = GaPConfig.load(source)
    _check_worker(config, worker)
    return config, schedule.build(config, steps_per_epoch, worker.index if worker else 0)


def _check_worker(config: GaPConfig, worker: ParallelWorker | None) -> None:
    if config.method == "parallel" and worker is None:
        raise ValueError(
            'method="parallel": every worker is a separate job and must know its number and where to meet the others. '
            "Start them with gap-ds parallel, or pass worker=ParallelWorker(index, exchange)."
        )
    if config.method != "parallel" and worker is not None:
        raise ValueError(f'worker {worker.index}: has no effect with method="{config.method}". Set "method".')
    started = os.environ.get("GAP_DS_WORKERS")  # set by gap-ds parallel
    if worker is not None and started and started != str(config.kappa):
        raise ValueError(
            f"GAP_DS_WORKERS={started}: as many workers were started, and there are {config.kappa} partitions, one for "
            f'each worker. Start {config.kappa} (gap-ds parallel --workers {config.kappa}), or change "partitions".'
        )


def _check_lr_restart(config: GaPConfig, scheduler: Any, masks_from: str | Path | None) -> None:
    if config.lr_restart and scheduler is None:
        raise ValueError(
            '"lr_restart" has no effect without a learning-rate scheduler: pass lr_scheduler, or remove it'
        )
    if config.lr_restart and masks_from is not None:
        raise ValueError(
            f'masks_from="{masks_from}" with "lr_restart": the first learning rate is not known any more. '
            "Build the engine before anything is restored, and call load_masks."
        )


def _plan(config: GaPConfig, backend: Backend) -> plan.Plan:
    """The plan of a backend's model, with the budgets of existing masks if the config reuses them."""
    shards = backend.shards()
    frozen = {shard.name for shard in shards if not shard.trainable}
    shapes = {shard.name: shard.shape for shard in shards}
    kept = mask_state.inherited(config, shards, backend.comm) if config.reuses_masks else None
    return plan.build(backend.module, config, shapes, frozen, kept)


def _observers(run: Run, history: str | Path | None) -> list[Observer]:
    found: list[Observer] = []
    if history is not None:
        comms = (run.backend.comm, run.world)
        found.append(History(Path(history), run.plan, run.signature, run.mask_state, *comms))
    if run.worker is not None:
        of_run = (run.plan, run.signature, run.config.unpartitioned)
        found.append(Exchanging(run.worker, *of_run, run.mask_state, run.backend, run.world))
    return found
