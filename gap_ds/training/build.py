"""Builds a `Run` from what a user has, downward: config, schedule, backend, plan, masks, observers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from gap_ds import checkpoint
from gap_ds.method import plan, rules, schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import Block
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding import moments
from gap_ds.sharding.backends import Backend, Training, detect
from gap_ds.sharding.comm import Comm, raise_on_all_ranks
from gap_ds.sharding.shard import Shard, of_entries
from gap_ds.training import boundary_losses, mask_state, saving
from gap_ds.training.boundary_losses import BoundaryLosses
from gap_ds.training.consistency import LossGuard, check_model
from gap_ds.training.exchanging import Exchanging
from gap_ds.training.history import History
from gap_ds.training.learning_rate import LearningRate
from gap_ds.training.mask_state import MaskState
from gap_ds.training.observer import Observer
from gap_ds.training.regrowth import SECOND_MOMENTS
from gap_ds.training.run import Run
from gap_ds.training.structure import Structure

#: Part of the wanted density by which the entries' may be off without a warning.
_FAR = 0.1
#: Dtypes of weights whose magnitudes are ordered, and whose words are masked.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        _check_lr_restart(config, schedulers, options.masks_from)
        backend = detect(model, training)
        _check_fresh(backend, options)
        _check_moments(config, backend)
        steps = _steps(options, backend.micro_batches) if config.in_epochs else None
        if steps != given:
            phases = schedule.build(config, steps, worker.index if worker else 0)
        return config, backend, steps, phases

    config, backend, steps, phases = _on_all_ranks(world, begin)
    check_model(world, backend.shards())
    of_model = _plan(config, backend, options, world)
    raise_on_all_ranks(world, lambda: _check_dtypes(of_model, backend))
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
    raise_on_all_ranks(world, lambda: _check_held(state, backend))
    if world.rank == 0:
        _warn_of_rounding(config, state)
        _warn_of_blocks(config, of_model)
    run.observers.extend(_observers(run, options.history))
    return run


def _on_all_ranks(world: Comm, work: Callable[[], T]) -> T:
    """Returns the result of `work`; its errors are raised on all ranks, or unchanged where there is one rank."""
    return work() if world.size == 1 else raise_on_all_ranks(world, work)


def _check_fresh(backend: Backend, options: Options) -> None:
    if backend.optimizers.stepped and options.masks_from is None and not options.fresh:
        raise ValueError(
            f"optimizer={backend.optimizers.names}: has already updated weights, and the schedule would begin at step "
            "0. To go on with a run, pass masks_from or build everything anew and call load_checkpoint; to begin a new "
            "schedule from these weights, pass fresh=True."
        )


def _check_moments(config: GaPConfig, backend: Backend) -> None:
    if config.lr_density_power and backend.optimizers.has_sequences:
        raise ValueError(
            f"lr_density_power={config.lr_density_power}: is not supported with optimizer={backend.optimizers.names}, "
            "which averages its weights. Set it to 0, or use another optimizer."
        )
    if config.record.has_workers and backend.optimizers.has_sequences:
        raise ValueError(
            f'method="{config.method}": is not supported with optimizer={backend.optimizers.names}, which averages its '
            "weights: an exchange would not reach the average. Use another optimizer."
        )
    if config.regrow_moments != "zero" and not set(SECOND_MOMENTS) & backend.optimizers.moment_names:
        raise ValueError(
            f'regrow_moments="{config.regrow_moments}": has no effect with optimizer={backend.optimizers.names}, which '
            "has no second moments. Remove it."
        )
    if config.regrow_moments == "keep_second" and (names := moments.packing(backend.optimizers)):
        raise ValueError(
            f'regrow_moments="keep_second": optimizer={names} of gap_ds.optim holds no moments of pruned weights that '
            'could be kept. Set it to "mean_second" or "zero", or use the optimizer of torch.optim.'
        )


def _warn_of_rounding(config: GaPConfig, state: MaskState) -> None:
    """Warns where steps are rounded to 16 bits, many of them to none, before they are made longer."""
    trained = (shard for shard in state.shards.values() if shard.trainable and shard.numel)
    rounded = next((s for s in trained if s.owner().element_size() < 4), None) if config.lr_density_power else None
    if rounded is not None:
        log.warning(
            f"lr_density_power={config.lr_density_power}: {rounded.name} is updated in {rounded.owner().dtype}, where "
            "a step is rounded before it is made longer: small ones are lost, as they are not with a larger learning "
            "rate. Keep the weights in fp32 (autocast), or set it to 0."
        )


def _warn_of_blocks(config: GaPConfig, of_model: plan.Plan) -> None:
    """Warns where whole blocks are far from the sparsity that was asked for."""
    if config.reuses_masks or not isinstance(of_model.pattern, Block) or not isinstance(config.distribution, str):
        return
    wanted = 1 - config.sparsity
    found = sum(entry.keep for entry in of_model.entries) / sum(entry.numel for entry in of_model.entries)
    if abs(found - wanted) > _FAR * wanted:
        log.warning(
            f'pattern="{config.pattern}": the entries keep {found:.1%} of their weights, where '
            f"sparsity={config.sparsity} would be {wanted:.1%}: each keeps whole blocks, at least one. Set smaller "
            'blocks, or list small matrices in "exclude".'
        )


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


def _check_worker(config: GaPConfig, worker: ParallelWorker | None) -> None:
    if config.record.has_workers and worker is None:
        raise ValueError(
            'method="parallel": every worker is a separate job and must know its number and where to meet the others. '
            "Start them with gap-ds parallel, or pass worker=ParallelWorker(index, exchange)."
        )
    if worker is not None and not isinstance(worker, ParallelWorker):
        raise ValueError(f"worker={worker!r}: must be a ParallelWorker(index, exchange).")
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


def _check_dtypes(of_model: plan.Plan, backend: Backend) -> None:
    """Checks that this rank's pieces of all entries are of a dtype that can be pruned; ValueError if one is not."""
    for shard in of_entries([entry.name for entry in of_model.entries], backend.shards()).values():
        if shard.numel and (dtype := shard.owner().dtype) not in _DTYPES:
            raise ValueError(
                f"{shard.name}: its weights are {dtype}, and only those of 16, 32 or 64 bits that are real can be "
                'pruned by magnitude. List it in "exclude".'
            )


def _check_held(state: MaskState, backend: Backend) -> None:
    """Checks that the optimizers update every entry of which this rank has a piece; ValueError if not.

    Where parameters are spread over ranks and an optimizer holds other tensors than their pieces, it was built from
    other parameters than those that are trained: then every trained parameter is checked.
    """
    held = backend.optimizers.held()
    own = {shard.name: shard for shard in backend.shards() if shard.trainable and shard.numel}
    foreign = backend.comm.size > 1 and not held <= {id(shard.owner()) for shard in own.values()}
    wanted = own if foreign else {name: own[name] for name in state.shards if name in own}
    missing = [name for name, shard in wanted.items() if id(shard.owner()) not in held]
    if missing:
        raise ValueError(
            f"optimizer={backend.optimizers.names}: does not hold {missing[0]} ({len(missing)} of {len(wanted)} "
            "are missing), so it would not be trained. Build the optimizer from the wrapped model's "
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
