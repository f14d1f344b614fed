"""Saves portable checkpoints on some ranks and backends, and goes on from those of others.

python worker_resume.py OUT JOBS    JOBS: [{"save", "load", "full" or "inherit": a name, "on": how, "portable": ...}]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import observe
import torch
import torch.distributed as dist
import toy
import worker_fairscale
import worker_fsdp
import worker_zero
from safetensors.torch import load_file
from torch import Tensor

from gap_ds import GaPEngine, export

warnings.filterwarnings("ignore")

#: Micro-batches of a step over all ranks, which 1, 2 and 3 ranks can share out; and 4.
MICRO = 12 if os.environ.get("WORLD_SIZE") == "4" else 6
SAVED, LAST = 4, 8  # the boundary at step 6 lies between


#: What is pruned until the last step of a phase has another value than 0 to come back to.
GAP = {**toy.GAP, "regrow": "last_value", "regrow_storage": "bf16_cpu"}


def build(on: str, gap: dict[str, Any] = GAP, weights: Path | None = None) -> GaPEngine:
    """A toy by the name of a backend: zero2, zero2_bf16, fsdp1_flat, ddp, oss ...; with the weights of an export."""
    micro = MICRO // dist.get_world_size()
    model = toy.build()
    model.register_buffer("scale", torch.full((3,), 2.0))
    if weights is not None:
        missing, unknown = model.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
        assert not unknown and set(missing) <= {"head.weight"}, "all but the tied weight's second name"
    if on.startswith("zero"):
        dtype = "bf16" if "bf16" in on else "fp32"
        config = worker_zero.deepspeed_config({"stage": int(on[4]), "dtype": dtype, "offload": "offload" in on})
        config["gradient_accumulation_steps"] = micro
        optimizer = toy.OPTIMIZERS["adamw"](toy.groups(model))
        return GaPEngine.initialize(model=model, config=config, gap_config=gap, optimizer=optimizer)
    toy.build, before = (lambda: model), toy.build
    try:
        if on.startswith("fairscale") or on == "oss":
            row: dict[str, Any] = {"kind": "oss" if on == "oss" else "fsdp", "optimizer": "adamw", "gap": gap}
            return worker_fairscale.build(row, gradient_accumulation_steps=micro)
        kind, _, flat = on.partition("_")
        row = {"kind": kind, "flat": flat == "flat", "hybrid": flat == "hybrid", "optimizer": "adamw", "gap": gap}
        return worker_fsdp.build(row, gradient_accumulation_steps=micro)
    finally:
        toy.build = before


def state(engine: GaPEngine) -> dict[str, Any]:
    """Whole weights, moments, masks and buffers, and what counts steps; the same on all ranks."""
    steps: dict[str, float] = {}
    for shard in engine.run.backend.shards():
        if shard.trainable and shard.numel and "step" in engine.optimizer.state.get(shard.owner(), {}):
            steps[shard.name] = float(engine.optimizer.state[shard.owner()]["step"])
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, steps)
    return {
        **observe.final_state(engine),
        "masks": observe.full_masks(engine),
        "last": last_values(engine),
        "steps": {name: step for rank in everywhere for name, step in rank.items()},
        "buffers": {n: b.clone() for n, b in export.buffers(engine.module)},
        "applied": engine.applied_steps,
        "lr": [group["lr"] for group in engine.optimizer.param_groups],
    }


def last_values(engine: GaPEngine) -> dict[str, Tensor]:
    """Of each sparse entry, the values that its pruned weights had, whole."""
    state = engine.mask_state
    pieces = {name: state.last.whole(state.shards[name], bits) for name, bits in state.bits.items()}
    whole = observe.gather([(state.shards[name], piece) for name, piece in pieces.items()])
    return dict(zip(pieces, whole, strict=True))


def train(engine: GaPEngine, until: int, wrong: list[str]) -> list[float]:
    """The mean loss of each step over the same global batches, whatever the number of ranks."""
    losses = []
    while engine.applied_steps < until:
        total = torch.zeros(1)
        for micro in range(dist.get_rank(), MICRO, dist.get_world_size()):
            loss = engine(*toy.batch(engine.applied_steps, micro, 0, skip=False))
            total += loss.detach().float().cpu() / MICRO
            engine.backward(loss)
            engine.step()
        dist.all_reduce(total)
        losses.append(total.item())
        for name in engine.mask_state.bits:
            shard = engine.mask_state.shards[name]
            if shard.numel and shard.weight()[~engine.mask(name)].count_nonzero():
                wrong.append(f"step {engine.applied_steps}: {name} has pruned weights that are not 0")
    return losses


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Files of one rank cannot grow beyond some kilobytes; the kernel refuses it as it refuses a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def fill(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Saves, saves on a disk that is full for one rank, and saves again: what is said, and what is in the folder."""
    engine, folder = build(job["on"]), out / "full" / job["on"]
    found: dict[str, Any] = {"said": [], "seen": []}

    def look() -> None:
        dist.barrier()
        found["seen"].append({str(p.relative_to(folder)): p.stat().st_ino for p in sorted(folder.rglob("*"))})
        dist.barrier()

    train(engine, 1, [])
    engine.save_checkpoint(folder)
    look()
    for rank in (0, 1):
        for tag in ("next", "step_1"):
            with full_disk(rank):
                try:
                    engine.save_checkpoint(folder, tag, portable=True)
                except ValueError as error:
                    found["said"].append(str(error))
            look()
    engine.save_checkpoint(folder, "next", keep=1)
    engine.load_checkpoint(folder)
    found["left"] = sorted(path.name for path in folder.iterdir() if path.is_dir())
    engine.close()
    return found


def inherit(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """A finished sparse run, and fine-tunings that take over its masks: from its weights, and from its file."""
    engine, folder = build(job["on"]), out / "inherit" / job["on"]
    found: dict[str, Any] = {"wrong": []}
    train(engine, engine.schedule.total_steps, found["wrong"])
    found["masks"] = observe.full_masks(engine)
    saved = engine.save_checkpoint(folder / "checkpoints")
    engine.export(folder / "model")
    engine.close()
    fixed = {"method": "static", "rounds": 1, "phase_steps": 2, "finetune_steps": 1}
    inits = {"from_weights": {}, "from_file": {"mask_file": str(saved / "gap" / "masks.safetensors")}}
    for init, file in inits.items():
        engine = build(job["on"], {**fixed, "mask_init": init, **file}, folder / "model")
        train(engine, 3, found["wrong"])
        found[init] = observe.full_masks(engine)
        engine.close()
    return found


def work(job: dict[str, Any], out: Path) -> dict[str, Any]:
    if "full" in job:
        return fill(job, out)
    if "inherit" in job:
        return inherit(job, out)
    engine = build(job["on"])
    found: dict[str, Any] = {"wrong": []}
    if "save" in job:
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.008  # what no fresh optimizer has
        with torch.no_grad():
            dict(engine.module.named_buffers())["scale"].fill_(5.0)
        found["losses"] = train(engine, SAVED, found["wrong"])
        engine.save_checkpoint(out / "checkpoints" / job["save"], portable=job.get("portable", True), keep=1)
    else:
        try:
            engine.load_checkpoint(out / "checkpoints" / job["load"])
        except ValueError as error:
            return {"said": str(error)}
    found["state"] = state(engine)
    found["working"] = working_copy(engine, job["on"])
    found["later"] = train(engine, LAST, found["wrong"])
    found["end"] = state(engine)
    if job["on"].startswith("zero"):
        found["global_steps"] = engine.global_steps
    again = out / "again" / name_of(job) / str(dist.get_world_size())
    engine.save_checkpoint(again, portable=True)  # what was restored can be saved
    found["files"] = sorted(path.name for path in again.rglob("portable_*"))
    engine.close()
    return found


def working_copy(engine: GaPEngine, on: str) -> Tensor:
    """One matrix as the library itself shows it whole."""
    name = "layers.2.fc1.weight"
    if on.startswith("zero"):
        parameter = dict(engine.module.named_parameters())[name]
        with deepspeed.zero.GatheredParameters([parameter], enabled=on.startswith("zero3")):
            return parameter.detach().clone()
    if on.startswith("fsdp"):
        return worker_fsdp.full_weights(engine)[name]
    return observe.final_state(engine)["weights"][name]


def name_of(job: dict[str, Any]) -> str:
    own = job.get("save") or job.get("full") or job.get("inherit")
    return str(own or f"{job['load']}_to_{job['on']}")


def main(out: Path, jobs: list[dict[str, Any]]) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    worker_fairscale.without_cuda()
    names = [f"{name_of(job)}_{dist.get_world_size()}" for job in jobs]
    observe.work_through(out, {name: partial(work, job, out) for name, job in zip(names, jobs, strict=True)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
