"""Checks that a config, a model and its optimizer go together, before anything is changed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from gap_ds.method.config import GaPConfig
from gap_ds.method.pattern import Block
from gap_ds.method.plan import Plan
from gap_ds.parallel import ParallelWorker
from gap_ds.sharding import moments
from gap_ds.sharding.backends import Backend
from gap_ds.sharding.shard import of_entries
from gap_ds.training.mask_state import MaskState
from gap_ds.training.regrowth import SECOND_MOMENTS

#: Part of the wanted density by which the entries' may be off without a warning.
_FAR = 0.1
#: Dtypes of weights whose magnitudes are ordered, and whose words are masked.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

log = logging.getLogger("gap_ds")


def check_fresh(backend: Backend) -> None:
    """Checks that a new schedule begins with an optimizer that has taken no step; ValueError if not."""
    if backend.optimizers.stepped:
        raise ValueError(
            f"optimizer={backend.optimizers.names}: has already updated weights, and the schedule would begin at step "
            "0. To go on with a run, pass masks_from or build everything anew and call load_checkpoint; to begin a new "
            "schedule from these weights, pass fresh=True."
        )


def check_moments(config: GaPConfig, backend: Backend) -> None:
    """Checks that the optimizer's state allows what the config asks for; ValueError if not."""
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


def warn_of_rounding(config: GaPConfig, state: MaskState) -> None:
    """Warns where steps are rounded to 16 bits, many of them to none, before they are made longer."""
    trained = (shard for shard in state.shards.values() if shard.trainable and shard.numel)
    rounded = next((s for s in trained if s.owner().element_size() < 4), None) if config.lr_density_power else None
    if rounded is not None:
        log.warning(
            f"lr_density_power={config.lr_density_power}: {rounded.name} is updated in {rounded.owner().dtype}, where "
            "a step is rounded before it is made longer: small ones are lost, as they are not with a larger learning "
            "rate. Keep the weights in fp32 (autocast), or set it to 0."
        )


def warn_of_blocks(config: GaPConfig, of_model: Plan) -> None:
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


def check_worker(config: GaPConfig, worker: ParallelWorker | None) -> None:
    """Checks that there is a worker if, and only if, the method has workers; ValueError if not."""
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


def check_dtypes(of_model: Plan, backend: Backend) -> None:
    """Checks that this rank's pieces of all entries are of a dtype that can be pruned; ValueError if one is not."""
    for shard in of_entries([entry.name for entry in of_model.entries], backend.shards()).values():
        if shard.numel and (dtype := shard.owner().dtype) not in _DTYPES:
            raise ValueError(
                f"{shard.name}: its weights are {dtype}, and only those of 16, 32 or 64 bits that are real can be "
                'pruned by magnitude. List it in "exclude".'
            )


def check_held(state: MaskState, backend: Backend) -> None:
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


def check_lr_restart(config: GaPConfig, schedulers: list[Any], masks_from: str | Path | None) -> None:
    """Checks that there is a learning rate to restart; ValueError if not."""
    if config.lr_restart and not schedulers:
        raise ValueError(
            '"lr_restart" has no effect without a learning-rate scheduler: pass lr_scheduler, or remove it'
        )
    if config.lr_restart and masks_from is not None:
        raise ValueError(
            f'masks_from="{masks_from}" with "lr_restart": the first learning rate is not known any more. '
            "Build the engine before anything is restored, and call load_masks."
        )
