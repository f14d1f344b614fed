"""One worker of parallel GaP on 2 ranks, for every backend; `gap-ds parallel`'s launcher starts two of them at once."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import observe
import reference_parallel as reference
import torch
import torch.distributed as dist
import toy
import worker_fsdp
import worker_zero
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine, Worker

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)

#: name -> whether gradients are averaged after every micro-batch (see test_zero.row)
ROWS = {"ddp": False, "zero2": True, "zero3": True, "fsdp2": False}


def build(name: str, index: int, out: Path, **changes: Any) -> GaPEngine:
    worker = Worker(index, str(out / f"exchange_{name}"), timeout=240)
    gap = {**reference.GAP, **changes}
    if name.startswith("zero"):
        model, row = toy.build(), {"stage": int(name[4]), "dtype": "fp32"}
        optimizer = toy.OPTIMIZERS["adamw"](toy.groups(model))
        config = worker_zero.deepspeed_config(row)
        return GaPEngine.initialize(model=model, config=config, gap_config=gap, optimizer=optimizer, worker=worker)
    model = toy.build()
    optimizer_of = toy.groups
    wrapped: Any
    if name.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
    else:
        wrapped, optimizer_of = worker_fsdp.wrap_fsdp2(model, {}), worker_fsdp.groups_by_name
    optimizer = toy.OPTIMIZERS["adamw"](optimizer_of(model))
    return GaPEngine(wrapped, gap, optimizer=optimizer, worker=worker, gradient_accumulation_steps=toy.ACCUMULATION)


def train(engine: GaPEngine, last: int | None = None) -> tuple[list[Any], list[str]]:
    history, wrong = [], []
    while not engine.finished and engine.applied_steps != last:
        phase, step = engine.phase, engine.applied_steps
        for micro in range(toy.ACCUMULATION):
            engine.backward(engine(*toy.batch(step, micro, dist.get_rank(), skip=False)))
            engine.step()
        for name in engine.masking.bits:
            if engine.masking.shards[name].weight()[~engine.mask(name)].count_nonzero():
                wrong.append(f"step {step}: {name} has pruned weights that are not 0")
        if engine.phase is not phase and phase.kind == "explore":
            history.append(observe.full_masks(engine))
    return history, wrong


def run(name: str, index: int, out: Path) -> dict[str, Any]:
    engine = build(name, index, out)
    history, wrong = train(engine)
    if index == 0:
        engine.export(out / f"model_{name}")
    result = observe.final_state(engine) | {"masks": history, "wrong": wrong, "steps": engine.applied_steps}
    engine.close()
    return result


def run_killed(index: int, out: Path) -> dict[str, Any]:
    """Worker 1 publishes its first round and loses everything since its checkpoint in the middle of it."""
    engine = build("ddp_killed", index, out)
    if index == 1:
        train(engine, last=1)
        engine.save_checkpoint(out / "checkpoints")
        train(engine, last=reference.T)  # publishes round 0 and goes on
        train(engine, last=reference.T + 1)
        engine.close()
        engine = build("ddp_killed", index, out)
        engine.load_checkpoint(out / "checkpoints")
    history, wrong = train(engine)
    result = observe.final_state(engine) | {"masks": history[-1:], "wrong": wrong}
    engine.close()
    return result


def main(out: Path, index: int) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    rank = dist.get_rank()

    def hand_over(name: str, result: Any) -> None:
        torch.save(result, out / f"{name}.{index}.{rank}.pt")

    if index == 0:
        for every in (False, True):
            hand_over(f"reference_{every}", reference.train(every))
        hand_over("reference_first", reference.train(False, shared="first"))
    try:
        for name in ROWS:
            hand_over(name, run(name, index, out))
        hand_over("ddp_killed", run_killed(index, out))
        engine = build("ddp_first", index, out, shared="first")
        history, wrong = train(engine)
        hand_over("ddp_first", observe.final_state(engine) | {"masks": history, "wrong": wrong})
    except Exception:
        hand_over("error", traceback.format_exc())
        raise
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[sys.argv.index("--gap-worker") + 1]))
    sys.stdout.flush()
    os._exit(0)
