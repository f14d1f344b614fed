"""All DeepSpeed, DDP and plain rows of the parity table, one after the other in one group of processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import observe
import reference
import torch
import torch.distributed as dist
import toy
from deepspeed.accelerator import get_accelerator
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine

warnings.filterwarnings("ignore", category=FutureWarning)


def deepspeed_config(row: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": row["stage"], "stage3_param_persistence_threshold": row.get("persistence", 0)}
    zero |= {"zero_hpz_partition_size": row["hpz"]} if "hpz" in row else {}
    if row.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": row.get("accumulation", toy.ACCUMULATION),
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if row["dtype"] == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
    if row["dtype"] == "fp16":
        config |= {"fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 1000}}
    return config


def cpu_adam(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """DeepSpeed's own Adam for offloaded weights; it compiles an extension at its first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, lr=1e-2)


OPTIMIZERS = {**toy.OPTIMIZERS, "cpu_adam": cpu_adam}


def build(row: dict[str, Any], **options: Any) -> GaPEngine:
    if row.get("beside_hpz"):  # whose groups of ranks DeepSpeed keeps for all engines of a process
        build({**row, "beside_hpz": False, "hpz": 2}).close()
    model, gap = toy.build(), row.get("gap", toy.GAP)
    optimizer = (observe.PACKED if row.get("packed") else OPTIMIZERS)[row["optimizer"]](toy.groups(model))
    if row["stage"] is None:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        return GaPEngine(wrapped, gap, optimizer=optimizer, gradient_accumulation_steps=toy.ACCUMULATION)
    config = deepspeed_config(row)
    return GaPEngine.initialize(model=model, config=config, gap_config=gap, optimizer=optimizer, **options)


def observers(engine: GaPEngine, row: dict[str, Any]) -> dict[str, Any]:
    """How DeepSpeed itself shows a whole parameter: the working copy, and the fp32 copy."""
    parameters = dict(engine.module.named_parameters())

    def working_copy(name: str) -> torch.Tensor:
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=row["stage"] == 3):
            return parameters[name].detach().clone()

    def full_fp32(name: str) -> torch.Tensor:
        return deepspeed.utils.safe_get_full_fp32_param(parameters[name])

    return {"working_copy": working_copy, "full_fp32": full_fp32 if row["stage"] in (1, 2, 3) else None}


def run(row: dict[str, Any], out: Path) -> dict[str, Any]:
    engine = build(row)
    seen = observers(engine, row)
    name = row["name"]

    def save_and_export() -> None:
        observe.draw_by_rank()
        engine.save_checkpoint(out / "checkpoints" / name, client_state={"row": name})
        engine.export(out / "mid" / name)

    skip = row["reference_arguments"]["skip"]
    result = observe.train(engine, **seen, skip=skip, at={4: save_and_export})
    result |= observe.final_state(engine) | {"stats": engine.stats(), "mask_bits": observe.mask_bits(engine)}
    engine.export(out / "final" / name)
    if row.get("packed") and row["stage"] == 3:
        result["said"] = said_of_state(engine)
    engine.close()

    resumed = build(row)
    client_state = resumed.load_checkpoint(out / "checkpoints" / name)
    result["wrong"] += observe.drawn_by_rank()
    again = observe.train(resumed, **observers(resumed, row), skip=skip, first=5)
    result["wrong"] += again["wrong"] + ([] if client_state == {"row": name} else ["client_state is lost"])
    result["resumed"] = observe.final_state(resumed) | {"masks": observe.full_masks(resumed)}
    resumed.close()
    return result


def said_of_state(engine: GaPEngine) -> str:
    """What DeepSpeed's own access to a moment says where there is none for pruned weights."""
    parameter = dict(engine.module.named_parameters())[next(iter(engine.mask_state.bits))]
    key = "exp_avg" if isinstance(engine.optimizer, torch.optim.AdamW) else "momentum_buffer"
    try:
        deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
    except AttributeError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """What is said to combinations that would train with wrong masks."""
    said = {}
    model = toy.build()
    ordinary = deepspeed_config({"stage": 2, "dtype": "fp32"})
    turned = {**ordinary, "zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    offload = {"device": "cpu", "ratio": 0.5}
    twin_flow = {**ordinary, "zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    universal = {**ordinary, "checkpoint": {"load_universal": True}}
    for name, config in (("round_robin", turned), ("twin flow", twin_flow), ("universal", universal)):
        optimizer = (observe.PACKED if name == "universal" else toy.OPTIMIZERS)["adamw"](toy.groups(model))
        try:
            GaPEngine.initialize(model=model, config=config, gap_config=toy.GAP, optimizer=optimizer)
        except ValueError as error:
            said[name] = str(error)
    engine, *_ = deepspeed.initialize(model=model, config=ordinary, optimizer=toy.OPTIMIZERS["sgd"](toy.groups(model)))
    try:
        GaPEngine(engine, toy.GAP, gradient_clipping=1.0)
    except ValueError as error:
        said["two owners"] = str(error)
    return said


def run_fp16(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains in fp16 from a loss scale that overflows at first; DeepSpeed itself counts what it skipped."""
    engine = build(row)
    seen = observers(engine, row)
    wrong, counts = [], []
    for step in range(12):
        masks = observe.full_masks(engine)
        for micro in range(toy.ACCUMULATION):
            engine.backward(engine(*toy.batch(step, micro, dist.get_rank(), skip=False)))
            engine.step()
        counts.append((engine.skipped_steps, engine.applied_steps))
        if engine.applied_steps != engine.global_steps - engine.skipped_steps:
            wrong.append(f"step {step}: {engine.applied_steps} applied, {engine.global_steps} - {engine.skipped_steps}")
        if counts[-1][1] == 0 and any(not torch.equal(m, masks[n]) for n, m in observe.full_masks(engine).items()):
            wrong.append(f"step {step}: masks changed without an applied step")
        wrong += observe.mistakes(engine, observe.full_masks(engine), seen["working_copy"], seen["full_fp32"])
    engine.close()
    return {"wrong": wrong, "counts": counts, "phase": engine.phase.index}


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings of gap_ds inside."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("gap_ds")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def run_freezing(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """The first block is frozen after a boundary, and everything is saved then and at the end."""
    engine, name = build(row), row["name"]
    seen = observers(engine, row)
    if row["stage"] == 3:
        seen["full_fp32"] = None  # DeepSpeed shows none of a frozen parameter
    found: dict[str, Any] = {"wrong": [], "warned": []}

    def freeze() -> None:
        engine.module.layers[0].requires_grad_(False)
        engine.export(out / "mid" / name)
        engine.save_checkpoint(out / "checkpoints" / name, portable=True)
        found["saved"] = observe.final_state(engine)["weights"]

    with warned() as found["warned"]:
        found["wrong"] += observe.train(engine, **seen, skip=False, at={4: freeze})["wrong"]
    found |= observe.final_state(engine) | {"kept": engine.stats()["kept"]}
    engine.export(out / "final" / name)
    engine.close()
    return found


def run_epochs(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """A schedule in epochs of 8 batches, 4 of which make an update; then with that number taken for updates."""
    gap = {"sparsity": 0.8, "partitions": 2, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 2}
    with warned() as none:
        engine = build(row | {"gap": gap, "accumulation": 4}, batches_per_epoch=8)
        phases = []
        for batch in range(4 * 8):
            engine.backward(engine(*toy.batch(batch, 0, dist.get_rank(), skip=False)))
            engine.step()
            phases.append(engine.phase.index)
    found = {"phases": phases[7::8], "applied": engine.applied_steps, "finished": engine.finished, "none": none[:]}
    engine.close()
    with warned() as found["warned"]:
        build(row | {"gap": gap, "accumulation": 4}, steps_per_epoch=8).close()
    return found


def main(out: Path) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    # DeepSpeed takes a CPU for unable to compute in fp16; torch can do it, slowly, which is enough here.
    get_accelerator().is_fp16_supported = lambda: True
    rows = json.loads((out / "rows.json").read_text())
    for name, arguments in {row["reference"]: row["reference_arguments"] for row in rows}.items():
        if arguments["optimizer_name"] not in toy.OPTIMIZERS:
            continue
        observe.hand_over(out, name, reference.train(**arguments))
    observe.hand_over(out, "refusals", refusals())
    works = {"run": run, "fp16": run_fp16, "freezing": run_freezing, "epochs": run_epochs}
    observe.work_through(out, {row["name"]: partial(works[row["work"]], row, out) for row in rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
