"""A long run with a boundary every few steps; memory and descriptors are noted as it goes.

python worker_soak.py OUT KIND STEPS    KIND: zero2, zero3, fsdp2
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toy
import worker_fsdp
import worker_zero

from gap_ds import GaPEngine

warnings.filterwarnings("ignore")

PHASE, EVERY = 5, 100


def build(kind: str, steps: int, out: Path) -> GaPEngine:
    rounds = steps // (2 * PHASE)
    gap = {**toy.GAP, "phase_steps": PHASE, "rounds": rounds, "finetune_steps": PHASE, "regrow": "last_value"}
    model, history = toy.build(), out / "gap_history.jsonl"
    if kind == "fsdp2":
        wrapped = worker_fsdp.wrap_fsdp2(model, {})
        optimizer = toy.OPTIMIZERS["adamw"](worker_fsdp.groups_by_name(wrapped))
        accumulation = {"gradient_accumulation_steps": toy.ACCUMULATION}
        return GaPEngine(wrapped, gap, optimizer=optimizer, history=history, **accumulation)
    optimizer = toy.OPTIMIZERS["adamw"](toy.groups(model))
    config = worker_zero.deepspeed_config({"stage": int(kind[-1]), "dtype": "fp32"})
    return GaPEngine.initialize(model=model, config=config, gap_config=gap, optimizer=optimizer, history=history)


def usage(step: int) -> dict[str, int]:
    """Resident memory of this process in bytes, and its open descriptors."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step,
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def main(out: Path, kind: str, steps: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    engine, rows, boundaries = build(kind, steps, out), list[dict[str, Any]](), 0
    while engine.applied_steps < steps:
        phase = engine.phase
        for micro in range(toy.ACCUMULATION):
            engine.backward(engine(*toy.batch(engine.applied_steps % 50, micro, rank, skip=False)))
            engine.step()
        boundaries += engine.phase is not phase
        if engine.applied_steps % EVERY == 0:
            engine.save_checkpoint(out / "checkpoints", keep=2, portable=True)
            rows.append(usage(engine.applied_steps))
    told = {"kind": kind, "boundaries": boundaries, "usage": rows, "checkpoints": len(os.listdir(out / "checkpoints"))}
    (out / f"soak.{rank}.json").write_text(json.dumps(told))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)
