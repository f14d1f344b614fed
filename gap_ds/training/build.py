"""Builds a `Run` from what a user has, downward: config, schedule, backend, plan, masks, observers."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gap_ds.method import plan, rules, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding.backends import Backend, Training, detect
from gap_ds.sharding.comm import Comm, raise_on_all_ranks
from gap_ds.training import mask_state, saving
from gap_ds.training.consistency import LossGuard
from gap_ds.training.exchanging import Exchanging
from gap_ds.training.history import History
from gap_ds.training.learning_rate import LearningRate
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer
from gap_ds.training.run import Run

log = logging.getLogger("gap_ds")


def build(
    model: nn.Module,
    source: GaPConfig | dict[str, Any] | str | Path,
    training: Training,
    *,
    steps_per_epoch: int | None,
    batches_per_epoch: int | None,
    worker: ParallelWorker | None,
    nonfinite_loss: Literal["stop", "skip"],
    masks_from: str | Path | None,
    history: str | Path | None,
    fresh: bool,
) -> Run:
    """A run before its first masks; the arguments are those of GaPEngine. Changes nothing that it is given.

    Raises:
        ValueError: a mistake in the config, or a combination that is not supported; the message names the setting.
    """
    config, phases = check(source, steps_per_epoch or batches_per_epoch, worker)
    schedulers = training.schedulers() or [s for s in [getattr(model, "lr_scheduler", None)] if s is not None]
    _check_lr_restart(config, schedulers, masks_from)
    backend, world = detect(model, training), Comm()
    if backend.optimizers.stepped and masks_from is None and not fresh:
        raise ValueError(
            f"optimizer={backend.optimizers.names}: has already updated weights, and the schedule would begin at step "
            "0. To go on with a run, pass masks_from or build everything anew and call load_checkpoint; to begin a new "
            "schedule from these weights, pass fresh=True."
        )
    steps = _steps(steps_per_epoch, batches_per_epoch, backend.micro_batches) if config.in_epochs else None
    if steps != (steps_per_epoch or batches_per_epoch):
        phases = schedule.build(config, steps, worker.index if worker else 0)
    if config.mask_init == "auto" and config.record.reads_setting("mask_init"):
        config = config.model_copy(update={"mask_init": "magnitude" if _pretrained(backend.module) else "random"})
    of_model = _plan(config, backend, masks_from)
    state = MaskState(of_model, config, backend)
    guard = LossGuard(nonfinite_loss, world, harmless=backend.skips_overflow)
    run = Run(
        config=config,
        steps_per_epoch=steps,
        rule=rules.rule(config),
        schedule=phases,
        plan=of_model,
        worker=worker,
        backend=backend,
        world=world,
        mask_state=state,
        learning_rate=LearningRate(schedulers, backend.optimizers),
        grad_scaler=training.grad_scaler,
        guard=guard,
        observers=[],
    )
    raise_on_all_ranks(world, lambda: _check_held(state, backend))
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


def _steps(steps: int | None, batches: int | None, micro_batches: int) -> int | None:
    """Updates in an epoch, from those or from its batches; warns where the one may have been taken for the other."""
    if steps is not None and batches is not None:
        raise ValueError(f"steps_per_epoch={steps} and batches_per_epoch={batches}: set one of them.")
    if batches is not None:
        return math.ceil(batches / micro_batches)
    if steps is not None and micro_batches > 1:
        log.warning(
            f"steps_per_epoch={steps}: counts updates, and an update has {micro_batches} micro-batches, so an epoch is "
            f"taken to have {steps * micro_batches} batches. If {steps} is len(loader), pass it as batches_per_epoch."
        )
    return steps


def _check_worker(config: GaPConfig, worker: ParallelWorker | None) -> None:
    if config.record.has_workers and worker is None:
        raise ValueError(
            'method="parallel": every worker is a separate job and must know its number and where to meet the others. '
            "Start them with gap-ds parallel, or pass worker=ParallelWorker(index, exchange)."
        )
    if not config.record.has_workers and worker is not None:
        raise ValueError(f'worker {worker.index}: has no effect with method="{config.method}". Set "method".')
    started = os.environ.get("GAP_DS_WORKERS")  # set by gap-ds parallel
    if worker is not None and started and started != str(config.kappa):
        raise ValueError(
            f"GAP_DS_WORKERS={started}: as many workers were started, and there are {config.kappa} partitions, one for "
            f'each worker. Start {config.kappa} (gap-ds parallel --workers {config.kappa}), or change "partitions".'
        )


def _pretrained(module: nn.Module) -> bool:
    """True if transformers (5.x) has loaded weights of the model by from_pretrained.

    The config's `_name_or_path` does not show it: a model built from a downloaded config has it, and random weights.
    """
    return any("_weight_conversions" in vars(part) for part in module.modules()) or any(
        getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
    )


def _check_held(state: MaskState, backend: Backend) -> None:
    """Checks that the optimizers update every entry of which this rank has a piece; ValueError if not."""
    if missing := state.unheld():
        raise ValueError(
            f"optimizer={backend.optimizers.names}: does not hold {missing[0]} ({len(missing)} of {len(state.shards)} "
            "entries are missing), so it would be pruned and not trained. Build the optimizer from the wrapped model's "
            "parameters(), after the model is wrapped and before its first forward pass; pass all optimizers as a "
            "list (optimizer=[muon, adamw]); or freeze what is not trained (requires_grad_(False))."
        )


def _check_lr_restart(config: GaPConfig, schedulers: list[Any], masks_from: str | Path | None) -> None:
    if config.lr_restart and not schedulers:
        raise ValueError(
            '"lr_restart" has no effect without a learning-rate scheduler: pass lr_scheduler, or remove it'
        )
    if config.lr_restart and masks_from is not None:
        raise ValueError(
            f'masks_from="{masks_from}" with "lr_restart": the first learning rate is not known any more. '
            "Build the engine before anything is restored, and call load_masks."
        )


def _plan(config: GaPConfig, backend: Backend, masks_from: str | Path | None) -> plan.Plan:
    """The plan of a backend's model, with the budgets of existing masks if the config reuses them.

    A resumed run has those that it was saved with: a kept weight may have become 0 since then.
    """
    shards = backend.shards()
    frozen = {shard.name for shard in shards if not shard.trainable}
    shapes = {shard.name: shard.shape for shard in shards}
    kept = None
    if config.reuses_masks:
        saved = None if masks_from is None else saving.budgets(Path(masks_from))
        kept = mask_state.inherited(config, shards, backend.comm) | (saved or {})
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
