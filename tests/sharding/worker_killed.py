"""A run that kills itself (SIGKILL) in the middle of something; started again, it goes on.

python worker_killed.py OUT KIND ROUNDS [--gap-worker I] [--killed MOMENT:N:MS]

KIND: zero2, fsdp2 (2 ranks each), also with packed state (zero2_packed, fsdp2_packed), parallel (a worker of 1 rank),
parallel_fsdp2 (a worker of 2 ranks). MOMENT: step, save, boundary, exchange, and packing, that of a moment of one entry
at a boundary: killed MS milliseconds after the N-th of them has begun.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import observe
import torch
import torch.distributed as dist
import toy
import worker_fsdp

from gap_ds import GaPEngine, ParallelWorker, checkpoint, optim
from gap_ds.optim.sparse_state import Piece
from gap_ds.parallel import Exchange

warnings.filterwarnings("ignore")

GAP = {**toy.GAP, "phase_steps": 3, "finetune_steps": 4}


class Fate:
    """When this process will kill itself."""

    def __init__(self, text: str | None) -> None:
        self.moment, self.left, self.delay = "", 0, 0.0
        if text is not None:
            moment, number, milliseconds = text.split(":")
            self.moment, self.left, self.delay = moment, int(number), float(milliseconds) / 1000

    def begins(self, moment: str) -> None:
        self.left -= moment == self.moment
        if moment == self.moment and self.left == 0:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def watch(self, owner: Any, name: str, moment: str) -> None:
        """The moment begins whenever a method is called, and lasts long enough to be killed in."""
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*arguments: Any, **keywords: Any) -> Any:
            self.begins(moment)
            time.sleep(0.005)
            return inner(*arguments, **keywords)

        setattr(owner, name, outer)


def watch_packing(fate: Fate) -> None:
    """Watches what boundaries pack, and not what is packed when an engine is built or a checkpoint is loaded."""
    inner: Callable[..., Any] = GaPEngine._enter

    def enter(engine: GaPEngine, before: Any, after: Any) -> Any:
        if before is not None:
            fate.watch(Piece, "pack", "packing")
        try:
            return inner(engine, before, after)
        finally:
            Piece.pack = pack  # type: ignore[method-assign]

    pack = Piece.pack
    GaPEngine._enter = enter  # type: ignore[method-assign]


def build(kind: str, rounds: int, out: Path, index: int) -> GaPEngine:
    model, gap = toy.build(), {**GAP, "rounds": rounds}
    made = partial(optim.AdamW, lr=1e-2) if kind.endswith("_packed") else toy.OPTIMIZERS["adamw"]
    if kind.startswith("zero2"):
        import worker_zero  # no other kind needs DeepSpeed, which takes its time to import

        optimizer = made(toy.groups(model))
        config = worker_zero.deepspeed_config({"stage": 2, "dtype": "fp32"})
        return GaPEngine.initialize(model=model, config=config, gap_config=gap, optimizer=optimizer)
    training: dict[str, Any] = {"gradient_accumulation_steps": toy.ACCUMULATION}
    if kind.startswith("parallel"):
        gap["method"] = "parallel"
        training["worker"] = ParallelWorker(index, str(out / "exchange"), timeout=120)
    if kind == "parallel":
        return GaPEngine(model, gap, optimizer=toy.OPTIMIZERS["adamw"](toy.groups(model)), **training)
    wrapped = worker_fsdp.wrap_fsdp2(model, {})
    optimizer = made(worker_fsdp.groups_by_name(wrapped))
    return GaPEngine(wrapped, gap, optimizer=optimizer, **training)


def digest(engine: GaPEngine) -> str:
    """Of all weights, masks and moments."""
    state = observe.final_state(engine)
    tensors = {**state["weights"], **{f"mask {n}": m for n, m in observe.full_masks(engine).items()}}
    tensors |= {f"{n} {i}": m for n, moments in state["moments"].items() for i, m in enumerate(moments)}
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def main(out: Path, kind: str, rounds: int, index: int, killed: str | None) -> None:
    rank = int(os.environ["RANK"])
    fate = Fate(killed)
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:  # to be in the middle of a save for long enough
        fsync(descriptor)
        time.sleep(0.003)

    os.fsync = slow_fsync
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    fate.watch(GaPEngine, "_enter", "boundary")
    fate.watch(GaPEngine, "save_checkpoint", "save")
    watch_packing(fate)
    fate.watch(Exchange, "publish", "exchange")
    fate.watch(Exchange, "wait", "exchange")
    engine = build(kind, rounds, out, index)
    folder = out / f"checkpoints_{index}"
    if checkpoint.candidates(folder):
        engine.load_checkpoint(folder)
    with (out / "resumed").open("a") as log:
        log.write(f"{engine.applied_steps}\n")
    while not engine.finished:
        for micro in range(toy.ACCUMULATION):
            engine.backward(engine(*toy.batch(engine.applied_steps, micro, rank, skip=False)))
            engine.step()
        fate.begins("step")
        if engine.applied_steps % 2 == 0 or engine.finished:
            engine.save_checkpoint(folder, keep=2)
    (out / f"final.{index}.{rank}").write_text(digest(engine))
    dist.barrier()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("kind")
    parser.add_argument("rounds", type=int)
    parser.add_argument("--gap-worker", type=int, default=0)
    parser.add_argument("--killed")
    args = parser.parse_args()
    main(args.out, args.kind, args.rounds, args.gap_worker, args.killed)
    sys.stdout.flush()
    os._exit(0)
