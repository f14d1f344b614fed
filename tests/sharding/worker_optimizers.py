"""Several optimizers at once, on two ranks: trained, saved in mid-phase, resumed, and moved to another backend."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import observe
import torch
import torch.distributed as dist
import toy
import worker_fsdp
import worker_zero
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine
from gap_ds.method.plan import clean_name

warnings.filterwarnings("ignore")

#: Saved in the middle of the second phase; the last of the schedule's 15 steps are of no interest.
SAVED, STEPS = 4, 8


def optimizers(model: nn.Module, matrices: str) -> list[torch.optim.Optimizer]:
    """One for the matrices of the blocks, another for the rest."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = clean_name(name).startswith("layers.") and clean_name(name) in worker_fsdp.MATRICES
        if parameter.requires_grad:
            (inner if in_block else rest).append(parameter)
    first = torch.optim.Muon(inner, lr=0.02) if matrices == "muon" else torch.optim.SGD(inner, lr=0.05, momentum=0.9)
    return [first, torch.optim.AdamW(rest, lr=1e-2)]


def build(kind: str, matrices: str) -> GaPEngine:
    """Without a wrapper, every rank trains on the batches of both. zero3: Adagrad alone."""
    if kind == "zero3":
        model = toy.build()
        adagrad = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], lr=0.05)
        config = worker_zero.deepspeed_config({"stage": 3, "dtype": "fp32", "accumulation": 1})
        return GaPEngine.initialize(model=model, config=config, gap_config=toy.GAP, optimizer=adagrad)
    if kind == "fsdp2":
        model = worker_fsdp.wrap({"kind": "fsdp2"})
        return GaPEngine(model, toy.GAP, optimizer=optimizers(model, matrices))
    model = toy.build()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if kind == "ddp" else model
    micro = 2 if kind == "plain" else 1
    return GaPEngine(wrapped, toy.GAP, optimizer=optimizers(model, matrices), gradient_accumulation_steps=micro)


def train(engine: GaPEngine, last: int) -> list[Any]:
    """Trains up to a step; returns the masks after each."""
    masks = []
    while engine.applied_steps < last:
        step = engine.applied_steps
        for rank in range(2) if engine.run.backend.name == "plain" else [dist.get_rank()]:
            engine.backward(engine(*toy.batch(step, 0, rank)))
            engine.step()
        masks.append(observe.full_masks(engine))
    return masks


def run(kind: str, matrices: str, folder: Path) -> dict[str, Any]:
    engine = build(kind, matrices)
    masks = train(engine, SAVED)
    if kind != "plain":
        engine.save_checkpoint(folder, portable=True)
    saved = observe.final_state(engine)
    masks += train(engine, STEPS)
    found = {"masks": masks, "saved": saved, "end": observe.final_state(engine), "kept": engine.stats()["kept"]}
    engine.close()
    return found


def resume(kind: str, matrices: str, folder: Path) -> dict[str, Any]:
    engine = build(kind, matrices)
    engine.load_checkpoint(folder)
    found: dict[str, Any] = {"saved": observe.final_state(engine), "masks": train(engine, STEPS)}
    found["end"] = observe.final_state(engine)
    engine.close()
    return found


def main(out: Path, jobs: list[list[str]]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name, kind, matrices, source in jobs:
        folder = out / "checkpoints" / (source or name)
        result = resume(kind, matrices, folder) if source else run(kind, matrices, folder)
        observe.hand_over(out, name, result)
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    os._exit(0)
