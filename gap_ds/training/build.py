"""Builds a `Run` from what a user has, downward: config, schedule, backend, plan, masks, observers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from gap_ds import checkpoint
from gap_ds.method import plan, rules, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding.backends import Backend, Training, detect
from gap_ds.sharding.comm import Comm, raise_on_all_ranks
from gap_ds.sharding.shard import Shard, of_entries
from gap_ds.training import boundary_losses, mask_state, saving
from gap_ds.training.boundary_losses import BoundaryLosses
from gap_ds.training.checks import (
    check_dtypes,
    check_fresh,
    check_held,
    check_lr_restart,
    check_moments,
    check_worker,
    warn_of_blocks,
    warn_of_rounding,
)
from gap_ds.training.consistency import LossGuard, check_model
from gap_ds.training.exchanging import Exchanging
from gap_ds.training.history import History
from gap_ds.training.learning_rate import LearningRate
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer
from gap_ds.training.run import Run
from gap_ds.training.structure import Structure

#: Share of the weights of an entry that are not 0 unless a sparse run or a special initialization made them so.
_FULL = 0.95

log = logging.getLogger("gap_ds")

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Further settings of a run: the arguments of GaPEngine with these names."""

    steps_per_epoch: int | None = None
    batches_per_epoch: int | None = None
    worker: ParallelWorker | None = None
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    masks_from: str | Path | None = None
    history: str | Path | None = None
    fresh: bool = False
    whole: nn.Module | None = None

    def per_epoch(self) -> int | None:
        """Updates or batches in an epoch, whichever was given; ValueError for what is no number of them."""
        counts: dict[str, Any] = {"steps_per_epoch": self.steps_per_epoch, "batches_per_epoch": self.batches_per_epoch}
        given = {name: count for name, count in counts.items() if count is not None}
        for name, count in given.items():
            if not isinstance(count, Integral):
                raise ValueError(f"{name}={count!r}: must be a whole number.")
        return next(iter(given.values()), None)


def build(
    model: nn.Module, source: GaPConfig | dict[str, Any] | str | Path, training: Training, options: Options
) -> Run:
    """A run before its first masks; the arguments are those of GaPEngine. Changes nothing that it is given.

    Raises:
        ValueError: a mistake in the config, or a combination that is not supported; the message names the setting.
    """
    world, worker = training.world, options.worker
    schedulers = training.schedulers() or [s for s in [getattr(model, "lr_scheduler", None)] if s is not None]

    def begin() -> tuple[GaPConfig, Backend, int | None, schedule.Schedule]:
        training.check()
        given = options.per_epoch()
        config, phases = check(source, given, worker)
        check_lr_restart(config, schedulers, options.masks_from)
        backend = detect(model, training)
        if options.masks_from is None and not options.fresh:
            check_fresh(backend)
        check_moments(config, backend)
        steps = _steps(options, backend.micro_batches) if config.in_epochs else None
        if steps != given:
            phases = schedule.build(config, steps, worker.index if worker else 0)
        return config, backend, steps, phases

    config, backend, steps, phases = _on_all_ranks(world, begin)
    check_model(world, backend.shards())
    of_model = _plan(config, backend, options, world)
    raise_on_all_ranks(world, lambda: check_dtypes(of_model, backend))
    if config.mask_init == "auto" and config.begins_sparse:
        config = config.model_copy(update={"mask_init": _first_masks(of_model, backend, options, world)})
    state = MaskState(of_model, config, backend, phases.regrow_warmup)
    run = Run(
        config=config,
        steps_per_epoch=steps,
        rule=rules.rule(config),
        schedule=phases,
        plan=of_model,
        structure=Structure(of_model, backend.module),
        worker=worker,
        backend=backend,
        world=world,
        mask_state=state,
        learning_rate=LearningRate(schedulers, backend.optimizers),
        grad_scaler=training.grad_scaler,
        guard=LossGuard(options.nonfinite_loss, world, harmless=backend.skips_overflow),
        observers=[],
    )
    raise_on_all_ranks(world, lambda: check_held(state, backend))
    if world.rank == 0:
        warn_of_rounding(config, state)
        warn_of_blocks(config, of_model)
    run.observers.extend(_observers(run, options.history))
    return run


def _on_all_ranks(world: Comm, work: Callable[[], T]) -> T:
    """Returns the result of `work`; its errors are raised on all ranks, or unchanged where there is one rank."""
    return work() if world.size == 1 else raise_on_all_ranks(world, work)


def check(
    source: GaPConfig | dict[str, Any] | str | Path, steps_per_epoch: int | None, worker: ParallelWorker | None
) -> tuple[GaPConfig, schedule.Schedule]:
    """The config and its schedule, checked before anything is allocated.

    Raises:
        ValueError: a mistake in the config, or a worker that does not fit it.
    """
    config = GaPConfig.load(source)
    check_worker(config, worker)
    return config, schedule.build(config, steps_per_epoch, worker.index if worker else 0)


def _steps(options: Options, micro_batches: int) -> int | None:
    """Updates in an epoch, from those or from its batches; warns where the one may have been taken for the other."""
    steps, batches = options.steps_per_epoch, options.batches_per_epoch
    if steps is not None and batches is not None:
        raise ValueError(f"steps_per_epoch={steps} and batches_per_epoch={batches}: set one of them.")
    if batches is not None:
        # Accumulation goes on across epochs: rounded up, the schedule would not end.
        return max(1, batches // micro_batches)
    if steps is not None and micro_batches > 1:
        log.warning(
            f"steps_per_epoch={steps}: counts updates, and an update has {micro_batches} micro-batches, so an epoch is "
            f"taken to have {steps * micro_batches} batches. If {steps} is len(loader), pass it as batches_per_epoch."
        )
    return steps


def _pretrained(module: nn.Module) -> bool:
    """True if transformers (5.x) has loaded weights of the model by from_pretrained.

    The config's `_name_or_path` does not show it: a model built from a downloaded config has it, and random weights.
    """
    return any("_weight_conversions" in vars(part) for part in module.modules()) or any(
        getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
    )


def _first_masks(of_model: plan.Plan, backend: Backend, options: Options, world: Comm) -> str:
    """How `mask_init: auto` chooses the first masks. All ranks call it."""
    if _pretrained(backend.module):
        return "magnitude"
    if options.masks_from is not None:
        return "random"
    entries = {entry.name: entry.numel for entry in of_model.entries}
    counts = mask_state.nonzero(list(of_entries(entries, backend.shards()).values()), backend.comm)
    sparse = [name for name, n in counts.items() if 0 < n <= _FULL * entries[name]]
    if sparse and world.rank == 0:
        log.warning(
            f"{sparse[0]}: a part of it is 0, as a sparse run leaves it, so the first masks are by magnitude. To go on "
            "with that run, use load_checkpoint or masks_from; to begin a new one, set mask_init."
        )
    return "magnitude" if sparse else "random"


def _plan(config: GaPConfig, backend: Backend, options: Options, world: Comm) -> plan.Plan:
    """The plan of a backend's model, with the budgets of existing masks if the config reuses them.

    A resumed run has those that it was saved with: a kept weight may have become 0 since then.
    """
    shards = backend.shards()
    frozen = {shard.name for shard in shards if not shard.trainable}
    shapes = {shard.name: shard.shape for shard in shards}
    if (whole := options.whole) is not None:
        if not isinstance(whole, nn.Module):
            raise ValueError(f"whole={whole!r}: must be the whole model, of which this one is a stage.")
        if config.reuses_masks:
            raise ValueError(
                f'whole: has no effect with mask_init="{config.mask_init}", where budgets are those of masks. Leave it '
                "out."
            )
        return _on_all_ranks(world, lambda: plan.of_part(plan.build(whole, config), backend.module, shapes))
    draft = _on_all_ranks(world, lambda: plan.draft(backend.module, config, shapes, frozen))
    kept = _inherited(draft, config, shards, backend, options, world) if config.reuses_masks else None
    return _on_all_ranks(world, lambda: plan.budgeted(draft, config, kept))


def _inherited(
    draft: plan.Plan, config: GaPConfig, shards: Sequence[Shard], backend: Backend, options: Options, world: Comm
) -> dict[str, int]:
    """The weights that each entry keeps by the masks that the run takes over."""
    saved = _on_all_ranks(world, lambda: options.masks_from and saving.budgets(Path(options.masks_from))) or {}
    if config.mask_file is not None:
        path = Path(config.mask_file)
        return _on_all_ranks(world, lambda: checkpoint.inherited_budgets(path, draft)) | saved
    sizes = {entry.name: entry.numel for entry in draft.entries}
    nonzero = mask_state.nonzero(list(of_entries(sizes, shards).values()), backend.comm)
    # What is 0 everywhere was initialized by zeros, as last layers of branches often are, and not pruned.
    zero = [name for name, n in nonzero.items() if not n]
    if zero and world.rank == 0:
        log.warning(
            f"{zero[0]} (and {len(zero) - 1} others): is 0 everywhere, as an initialization leaves it, so it is "
            "kept whole: from_weights takes zeros for pruned weights where others are beside them."
        )
    return nonzero | {name: sizes[name] for name in zero} | saved


def _observers(run: Run, history: str | Path | None) -> list[Observer]:
    found: list[Observer] = []
    if history is not None:
        comms = (run.backend.comm, run.world)
        found.append(History(Path(history), run.plan, run.signature, run.mask_state, *comms))
        found.append(BoundaryLosses(Path(history).with_name(boundary_losses.NAME), run.world))
    if run.worker is not None:
        of_run = (run.plan, run.signature, run.config.unpartitioned)
        found.append(Exchanging(run.worker, *of_run, run.mask_state, run.backend, run.world))
    return found
