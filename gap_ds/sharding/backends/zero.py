"""DeepSpeed: ZeRO stages 0, 1, 2 and 3, in fp32, bf16 and fp16, the optimizer offloaded to the CPU or not.

DeepSpeed keeps fp32 weights in flat buffers, one per parameter group (stages 1 and 2, BF16_Optimizer) or sub-group
(stage 3), and the innermost optimizer updates those. The buffers' geometry is read from DeepSpeed's own records:

    stages 1, 2, bf16:  p._hp_mapping      lp_fragment_address: where in p;  hp_fragment_address: where in the buffer
    stage 3:            grad_position      (sub-group, offset, numel) of this rank's piece of p
    stage 0, fp16:      fp32_groups_flat   whole parameters one after the other, or fp32_groups, one tensor each

With AutoTP (stages 1 and 2) a parameter in the module is a rank's cut of it along one dimension, and the records are of
that cut. A rank's piece is then a range of the cut, which must be a box of the whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gap_ds.masks.box import Box
from gap_ds.method.plan import clean_name
from gap_ds.sharding.backends import Backend, Training
from gap_ds.sharding.backends.plain import require_world
from gap_ds.sharding.comm import Comm, raise_on_all_ranks
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
            _refuse_parts(part, zero[part].get("device"), zero[part].get("ratio", 1.0))
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
    require_world(engine.seq_data_parallel_group.size() * engine.mp_world_size, training.world)
    stage: int = engine.zero_optimization_stage()
    layout, comm, publish = _layout(engine, stage, training.world)
    module: nn.Module = engine.module
    cut_at = engine.mpu.get_tensor_model_parallel_rank() if engine.mp_world_size > 1 else 0
    # What is frozen later keeps its fragment and its place in the optimizer's buffers.
    trained = {p for p in module.parameters() if p.requires_grad}

    def shards() -> list[Shard]:
        return [_shard(name, p, layout, p in trained, cut_at) for name, p in module.named_parameters()]

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
        counters=lambda: _counters(engine),
        recount=lambda applied, counters: _recount(engine, applied, counters),
        skips_overflow=engine.fp16_enabled(),
    )


def _refuse(engine: Any, training: Training) -> None:
    """Refuses what would silently train with wrong masks."""
    config = engine._config
    zero = config.zero_config
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

    _refuse_offload(zero)
    if zero.stage in (1, 2) and zero.round_robin_gradients:
        _refuse_value(
            "zero_optimization.round_robin_gradients",
            True,
            "DeepSpeed's record of which weights a rank owns can point at another parameter",
            "Set it to false.",
        )
    if getattr(zero, "zenflow", None) is not None:
        _refuse_value(
            "zero_optimization.zenflow", "set", "it updates weights outside the optimizer's step", "Remove it."
        )
    if getattr(zero, "mics_shard_size", -1) not in (-1, 0, None):
        _refuse_value(
            "zero_optimization.mics_shard_size",
            zero.mics_shard_size,
            "MiCS shards within groups of ranks, which was not tested",
            "Remove it.",
        )
    if getattr(engine, "has_moe_layers", False):
        _refuse_value(
            "MoE layers",
            "AutoEP" if engine._config.expert_parallel_config.enabled else "deepspeed.moe",
            f"DeepSpeed {_version()} gives the experts of each rank the same names, so that they are no pieces of one "
            "parameter",
            "Use experts held on every rank, or FSDP2 with experts as DTensors.",
        )
    if engine.checkpoint_engine.is_decoupled():
        _refuse_value(
            "checkpoint engine",
            type(engine.checkpoint_engine).__name__,
            "it goes on writing after the checkpoint is listed as whole",
            "Use the default one.",
        )
    if engine.mp_world_size > 1 and not (engine.autotp_size() == engine.mp_world_size and zero.stage in (1, 2)):
        _refuse_value(
            "tensor parallelism",
            engine.mp_world_size,
            f"DeepSpeed {_version()} records how weights are cut only for AutoTP, and only that with stage 1 or 2 was "
            "tested",
            'Set "tensor_parallel": {"autotp_size": N} with stage 1 or 2, or its size to 1.',
        )


def _refuse_offload(zero: Any) -> None:
    for part in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, part)
        if offload is not None:
            _refuse_parts(part, str(getattr(offload.device, "value", offload.device)), getattr(offload, "ratio", 1.0))
        if getattr(offload, "super_offload", False):
            _refuse_value(
                f"zero_optimization.{part}.super_offload",
                True,
                "its CPU workers update the weights without the optimizer's step",
                "Set it to false.",
            )


def _refuse_parts(part: str, device: object, ratio: object) -> None:
    """Refuses fp32 weights, or some of them, where the innermost optimizer does not update them."""
    setting = f"zero_optimization.{part}"
    if device == "nvme":
        reason = "the fp32 weights are swapped out between steps, where masks cannot reach them"
        _refuse_value(f"{setting}.device", device, reason, 'Set it to "cpu".')
    if ratio != 1.0:
        reason = "a part of the weights is then updated by a second optimizer that DeepSpeed keeps to itself"
        _refuse_value(f"{setting}.ratio", ratio, reason, "Set it to 1.0.")


def _refuse_value(setting: str, value: object, reason: str, change: str) -> NoReturn:
    raise ValueError(f"DeepSpeed config: {setting}={value!r} is not supported: {reason}. {change}")


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


#: (start, numel, offset, owner) of this rank's piece of a parameter that is trained
_Place = tuple[int, int, int, Callable[[], Tensor]]
_Layout = Callable[[nn.Parameter], _Place]


def _shard(name: str, parameter: Any, layout: _Layout, trained: bool, cut_at: int) -> Shard:
    """This rank's piece of a parameter; `cut_at` is the rank's number among those of tensor parallelism."""
    name = clean_name(name)
    if not trained:
        start, numel, offset, owner = _untrained_place(parameter)
        return Shard(name, *_box(name, parameter, start, numel, cut_at), offset, owner, trainable=False)
    try:
        start, numel, offset, owner = layout(parameter)
    except (AttributeError, KeyError):
        raise ValueError(
            f"{name}: is not among the parameters of the DeepSpeed engine's optimizer, though it requires a gradient. "
            "Build the optimizer over it, or freeze it (requires_grad_(False)) before deepspeed.initialize."
        ) from None

    def copies() -> tuple[Tensor, ...]:
        """The piece of what the forward pass reads, where that is another tensor."""
        held = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
        first = 0 if hasattr(parameter, "ds_tensor") else start
        return () if not numel or owner() is parameter else (held[first : first + numel],)

    return Shard(name, *_box(name, parameter, start, numel, cut_at), offset, owner, copies=copies)


def _box(name: str, parameter: Any, start: int, numel: int, cut_at: int) -> tuple[tuple[int, ...], Box]:
    """The whole shape of a parameter, and the box of a range of what this rank's module has of it.

    Raises:
        ValueError: AutoTP has cut it in a way that makes the range no box.
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    cut = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    if cut is None or cut["conversion"]["replicated"]:
        return shape, Box.span(start, numel, math.prod(shape))
    sides, dim, sizes = Box.span(start, numel, math.prod(shape)).sides(shape), cut["partition_dim"], None
    if cut["sub_param_shard_widths"] is None and cut["conversion"]["unsupported_reason"] is None:
        sizes = cut["partition_sizes"]
    if sides is None or dim is None or sizes is None:
        raise ValueError(
            f"{name}: AutoTP has cut it into {shape}, and ZeRO gives this rank elements {start} to {start + numel} of "
            f"that, which is no box of the whole weight. DeepSpeed {_version()} has no option to cut by rows. Set "
            '"autotp_size" to the number of ranks, use stage 3 without AutoTP, or FSDP2 with tensor parallelism.'
        )
    whole = (*shape[:dim], sum(sizes), *shape[dim + 1 :])
    if not numel:
        return whole, Box.span(0, 0, math.prod(whole))
    offset, size = sides
    return whole, Box.of(whole, (*offset[:dim], offset[dim] + sum(sizes[:cut_at]), *offset[dim + 1 :]), size)


def _version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def _untrained_place(parameter: Any) -> _Place:
    if not hasattr(parameter, "ds_tensor"):
        return _whole_place(parameter)
    n = parameter.ds_tensor.ds_numel
    start = min(torch.distributed.get_rank(getattr(parameter, "ds_process_group", None)) * n, parameter.ds_numel)
    return start, min(n, parameter.ds_numel - start), 0, lambda: parameter.ds_tensor


def _layout(engine: Any, stage: int, world: Comm) -> tuple[_Layout, Comm, Callable[[], None]]:
    """Where pieces lie, who shares them, and how changes are made known, for the optimizer that DeepSpeed built."""
    optimizer = engine.optimizer
    if stage == 3:
        return (
            _stage3_place(optimizer),
            Comm(optimizer.dp_process_group, within=world),
            partial(_publish_stage3, optimizer),
        )
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2, and stage 1's BF16_Optimizer
        comm = Comm(engine.seq_data_parallel_group, within=world)
        return _fragment_place(optimizer), comm, optimizer.update_lp_params
    if hasattr(optimizer, "fp32_groups_flat") or hasattr(optimizer, "fp32_groups"):  # stage 0 with fp32 copies
        return _copied_place(optimizer), Comm(single=True, within=world), partial(_publish_copies, optimizer)
    return _whole_place, Comm(single=True, within=world), lambda: None


def _whole_place(parameter: nn.Parameter) -> _Place:
    return 0, parameter.numel(), 0, lambda: parameter


def _fragment_place(optimizer: Any) -> _Layout:
    """Stages 1 and 2: a fragment of the parameter in its group's flat fp32 partition."""
    name = "single_partition_of_fp32_groups"  # of the ZeRO optimizer; BF16_Optimizer has another word for it
    name = name if hasattr(optimizer, name) else "fp32_groups_flat_partition"

    def place(parameter: Any) -> _Place:
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0, lambda: parameter
        low, high, group = mapping.lp_fragment_address, mapping.hp_fragment_address, mapping.param_group_index
        return low.start, low.numel, high.start, lambda: getattr(optimizer, name)[group]

    return place


def _stage3_place(optimizer: Any) -> _Layout:
    """Stage 3: rank r owns elements [r * n, (r + 1) * n) of each parameter; the end of the last piece is padding."""

    def place(parameter: Any) -> _Place:
        group, offset, n = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(torch.distributed.get_rank(optimizer.dp_process_group) * n, parameter.ds_numel)
        numel = min(n, parameter.ds_numel - start)
        return start, numel, offset, lambda: optimizer.fp32_partitioned_groups_flat[group]

    return place


def _publish_stage3(optimizer: Any) -> None:
    # The order of DeepSpeed's own step: release gathered parameters, copy the pieces, gather the persistent ones again.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.zero_hpz_partition_size > 1:
        optimizer.invalidate_secondary_tensor()  # else the next forward pass gathers the weights from before
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _copied_place(optimizer: Any) -> _Layout:
    """Stage 0 in 16 bits: whole fp32 copies, in one flat tensor per group or one tensor per parameter."""
    flat = hasattr(optimizer, "fp32_groups_flat")
    places: dict[int, _Place] = {}
    for g, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for i, parameter in enumerate(group):
            places[id(parameter)] = (0, parameter.numel(), offset if flat else 0, partial(_copy, optimizer, g, i))
            offset += parameter.numel()
    return lambda parameter: places[id(parameter)]


def _copy(optimizer: Any, group: int, index: int) -> Tensor:
    """The fp32 tensor that holds a parameter: its group's flat one, or its own."""
    if hasattr(optimizer, "fp32_groups_flat"):
        return cast(Tensor, optimizer.fp32_groups_flat[group])
    return cast(Tensor, optimizer.fp32_groups[group][index])


def _publish_copies(optimizer: Any) -> None:
    place = _copied_place(optimizer)
    for group in optimizer.fp16_groups:
        for parameter in group:
            _, numel, offset, owner = place(parameter)
            parameter.data.view(-1).copy_(owner().detach().view(-1)[offset : offset + numel])


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
