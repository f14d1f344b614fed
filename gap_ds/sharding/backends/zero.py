"""DeepSpeed: ZeRO stages 0, 1, 2 and 3, in fp32, bf16 and fp16, the optimizer offloaded to the CPU or not.

Where a rank's pieces lie is in `zero_places.py`, and what is refused in `zero_limits.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from gap_ds.sharding.backends import Backend, Training
from gap_ds.sharding.backends.plain import require_world
from gap_ds.sharding.backends.zero_limits import refuse_config, refuse_offload
from gap_ds.sharding.backends.zero_places import places, shard
from gap_ds.sharding.comm import raise_on_all_ranks
from gap_ds.sharding.mesh import Layout
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard


def recognises(model: nn.Module) -> bool:
    """True for a DeepSpeed engine. Does not need deepspeed to be installed."""
    return any(
        cls.__module__.startswith("deepspeed.") and cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__
    )


wraps = recognises  # an engine is the outermost module


def initialize(*, config: Any, **arguments: Any) -> Any:
    """As `deepspeed.initialize`; returns the engine alone.

    Raises:
        ValueError: DeepSpeed does not accept its config; the message names the setting.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    for part in ("offload_optimizer", "offload_param"):
        # Refused before DeepSpeed looks for libraries and optimizers that only these would need.
        if isinstance(zero, dict) and isinstance(zero.get(part), dict):
            refuse_offload(part, zero[part].get("device"), zero[part].get("ratio", 1.0))
    try:
        engine, *_ = deepspeed.initialize(config=config, **arguments)
    except ValidationError as error:
        mistakes = (f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError(f"DeepSpeed config, {error.title}: {'; '.join(mistakes)}") from error
    except (AssertionError, DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed config: {error}") from error
    return engine


def build(engine: Any, training: Training) -> Backend:
    """The backend of a DeepSpeed engine.

    Raises:
        ValueError: a setting under which pieces lie elsewhere, or the optimizer is not called.
    """
    _refuse(engine, training)
    refuse_config(engine, _innermost(engine.optimizer))
    require_world(engine.seq_data_parallel_group.size() * engine.mp_world_size, training.world)
    stage: int = engine.zero_optimization_stage()
    place, comm, publish = places(engine, stage, training.world)
    module: nn.Module = engine.module
    cut_at = engine.mpu.get_tensor_model_parallel_rank() if engine.mp_world_size > 1 else 0
    # What is frozen later keeps its fragment and its place in the optimizer's buffers.
    trained = {p for p in module.parameters() if p.requires_grad}

    def shards() -> list[Shard]:
        return [shard(name, p, place, p in trained, comm.rank, cut_at) for name, p in module.named_parameters()]

    spread = Layout(comm, shards, False)
    if engine.mp_world_size > 1:
        raise_on_all_ranks(training.world, shards)  # a piece that is no box is refused on its own rank alone
        spread = Layout.over(shards, training.world)
    return Backend(
        name=f"zero{stage}",
        forward=engine,
        module=module,
        optimizers=_optimizers(engine, stage, training),
        micro_batches=engine.gradient_accumulation_steps(),
        comm=spread.comm,
        shards=spread.shards,
        replicated=spread.replicated,
        publish=publish,
        backward=engine.backward,
        step=engine.step,
        save=lambda folder: _save(engine, folder),
        load=lambda folder: _load(engine, folder),
        discard=lambda: _discard(engine),
        counters=lambda: _counters(engine),
        recount=lambda applied, counters: _recount(engine, applied, counters),
        skips_overflow=engine.fp16_enabled(),
    )


def _refuse(engine: Any, training: Training) -> None:
    """Refuses arguments that are the engine's own settings, and an engine that updates no weights."""
    given = {k for k, v in vars(training).items() if v != type(training).__dataclass_fields__[k].default}
    if given := given - {"optimizer_state", "world"}:
        raise ValueError(
            f"{', '.join(sorted(given))}: has no effect with a DeepSpeed engine, which has its own. Pass it to "
            "deepspeed.initialize, or set it in the DeepSpeed config."
        )
    if engine.optimizer is None or type(engine.optimizer).__name__ == "DummyOptim":
        raise ValueError(
            "the DeepSpeed engine has no optimizer: pass one to deepspeed.initialize, or set it in its config"
        )


def _optimizers(engine: Any, stage: int, training: Training) -> Optimizers:
    """The innermost optimizer. Stage 3 lists its tensors only while it steps a sub-group."""
    flat = (lambda: {id(p) for p in engine.optimizer.fp32_partitioned_groups_flat}) if stage == 3 else None
    if stage == 3:  # DeepSpeed leaves the pieces in the groups of Adagrad alone, and can't load its state then
        engine.optimizer._clear_fp32_optimizer_param_groups()
    return Optimizers(
        [_innermost(engine.optimizer)],
        held=flat,
        stepped=lambda: engine.global_steps > 0,
        meanings=training.optimizer_state,
    )


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _save(engine: Any, folder: Path) -> None:
    """DeepSpeed's own checkpoint. A rank that cannot write still meets the others, and says so at the end."""
    errors: list[Exception] = []
    with _outlived(engine.checkpoint_engine, "save", errors), _outlived(engine, "_copy_recovery_script", errors):
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    if errors:
        raise errors[0]


@contextmanager
def _outlived(target: Any, name: str, errors: list[Exception]) -> Iterator[None]:
    """Keeps the errors of a method for later."""
    method = getattr(target, name)

    def call(*arguments: Any, **keywords: Any) -> None:
        try:
            method(*arguments, **keywords)
        except Exception as error:  # torch.save raises RuntimeError when the disk is full
            errors.append(error)

    setattr(target, name, call)
    try:
        yield
    finally:
        delattr(target, name)  # the class has it still


def _load(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise ValueError(f"{folder}: DeepSpeed found none of its checkpoints in it")


def _discard(engine: Any) -> None:
    optimizer = engine.optimizer
    engine.micro_steps = 0
    engine.zero_grad()
    optimizer.zero_grad()
    for name in ("averaged_gradients", "all_grad_tensors"):  # of ZeRO-1 and -2
        getattr(optimizer, name, {}).clear()
    if hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = 0 if engine.zero_optimization_stage() == 3 else -1


#: Of the loss scaler, if it has them.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", optimizer)


def _counters(engine: Any) -> dict[str, float]:
    scaler = {key: getattr(_scaler(engine), key, None) for key in _SCALER}
    scaler = {key: value for key, value in scaler.items() if isinstance(value, int | float)}
    return {"skipped_steps": engine.skipped_steps, "global_samples": engine.global_samples, **scaler}


def _recount(engine: Any, applied_steps: int, counters: dict[str, float]) -> None:
    engine.skipped_steps = int(counters.get("skipped_steps", 0))
    engine.global_steps = applied_steps + engine.skipped_steps
    samples = engine.global_steps * engine.train_batch_size()
    engine.global_samples = int(counters.get("global_samples", samples))
    engine.micro_steps = 0
    for key in _SCALER:
        if key in counters and hasattr(_scaler(engine), key):
            setattr(_scaler(engine), key, counters[key])
