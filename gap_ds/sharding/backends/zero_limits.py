"""Settings of DeepSpeed that are refused: they would train with wrong masks, or save what cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from gap_ds.optim.sparse_state import SparseState
from gap_ds.sharding.backends.zero_places import version


class _Limit(NamedTuple):
    """A setting with a value that is refused, why, and a sentence on what to do."""

    setting: str
    value: object
    why: str
    instead: str


def refuse_config(engine: Any, inner: torch.optim.Optimizer) -> None:
    """Refuses the settings of an engine, `inner` being its innermost optimizer.

    Raises:
        ValueError: the first setting that is not supported, with the reason.
    """
    zero = engine._config.zero_config
    for part in ("offload_optimizer", "offload_param"):
        if (offload := getattr(zero, part)) is not None:
            device = str(getattr(offload.device, "value", offload.device))
            refuse_offload(part, device, getattr(offload, "ratio", 1.0), getattr(offload, "super_offload", False))
    for limit in (*_of_zero(zero), *_of_engine(engine, inner)):
        _refuse(limit)


def refuse_offload(part: str, device: object, ratio: object, super_offload: object = False) -> None:
    """Refuses fp32 weights, or some of them, where the innermost optimizer does not update them.

    Args:
        part: "offload_optimizer" or "offload_param"; the others are settings in it.

    Raises:
        ValueError: the weights lie there.
    """
    setting = f"zero_optimization.{part}"
    if device == "nvme":
        why = "the fp32 weights are swapped out between steps, where masks cannot reach them"
        _refuse(_Limit(f"{setting}.device", device, why, 'Set it to "cpu".'))
    if ratio != 1.0:
        why = "a part of the weights is then updated by a second optimizer that DeepSpeed keeps to itself"
        _refuse(_Limit(f"{setting}.ratio", ratio, why, "Set it to 1.0."))
    if super_offload:
        why = "its CPU workers update the weights without the optimizer's step"
        _refuse(_Limit(f"{setting}.super_offload", True, why, "Set it to false."))


def _refuse(limit: _Limit) -> None:
    setting, value, why, instead = limit
    raise ValueError(f"DeepSpeed config: {setting}={value!r} is not supported: {why}. {instead}")


def _of_zero(zero: Any) -> Iterator[_Limit]:
    if zero.stage in (1, 2) and zero.round_robin_gradients:
        yield _Limit(
            "zero_optimization.round_robin_gradients",
            True,
            "DeepSpeed's record of which weights a rank owns can point at another parameter",
            "Set it to false.",
        )
    if getattr(zero, "zenflow", None) is not None:
        yield _Limit(
            "zero_optimization.zenflow", "set", "it updates weights outside the optimizer's step", "Remove it."
        )
    if getattr(zero, "mics_shard_size", -1) not in (-1, 0, None):
        yield _Limit(
            "zero_optimization.mics_shard_size",
            zero.mics_shard_size,
            "MiCS shards within groups of ranks, which was not tested",
            "Remove it.",
        )


def _of_engine(engine: Any, inner: torch.optim.Optimizer) -> Iterator[_Limit]:
    if getattr(engine, "has_moe_layers", False):
        yield _Limit(
            "MoE layers",
            "AutoEP" if engine._config.expert_parallel_config.enabled else "deepspeed.moe",
            f"DeepSpeed {version()} gives the experts of each rank the same names, so that they are no pieces of one "
            "parameter",
            "Use experts held on every rank, or FSDP2 with experts as DTensors.",
        )
    if engine.checkpoint_engine.is_decoupled():
        yield _Limit(
            "checkpoint engine",
            type(engine.checkpoint_engine).__name__,
            "it goes on writing after the checkpoint is listed as whole",
            "Use the default one.",
        )
    if isinstance(inner, SparseState) and engine.load_universal_checkpoint():
        yield _Limit(
            "checkpoint.load_universal",
            True,
            f"it restores whole state, and {type(inner).__name__} of gap_ds.optim holds that of kept weights alone",
            "Set it to false, and go on from a checkpoint saved with portable=True.",
        )
    parts, stage = engine.mp_world_size, engine.zero_optimization_stage()
    if parts > 1 and not (engine.autotp_size() == parts and stage in (1, 2)):
        yield _Limit(
            "tensor parallelism",
            parts,
            f"DeepSpeed {version()} records how weights are cut only for AutoTP, and only that with stage 1 or 2 was "
            "tested",
            'Set "tensor_parallel": {"autotp_size": N} with stage 1 or 2, or its size to 1.',
        )
