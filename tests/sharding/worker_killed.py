"""A run that says what it is doing, so that it can be killed in the middle of it; started again, it goes on.

python worker_killed.py OUT KIND    KIND: zero2, fsdp2 (2 ranks each), parallel (a worker of 1 rank, --gap-worker I)
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import observe
import torch
import torch.distributed as dist
import toy
import worker_fsdp
import worker_zero

from gap_ds import GaPEngine, Worker, checkpoint
from gap_ds.exchange import Exchange

warnings.filterwarnings("ignore")

GAP = {**toy.GAP, "phase_steps": 3, "rounds": 4, "finetune_steps": 4}
PARALLEL = {**GAP, "method": "parallel", "rounds": 5}


class Status:
    """What this process is doing, in a file of 40 bytes: kind, and the applied step."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.step = 0
        self.say("start")

    def say(self, kind: str) -> None:
        os.pwrite(self._file, f"{kind} {self.step}".ljust(40).encode(), 0)

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        self.say(kind)
        time.sleep(0.005)
        yield
        self.say("step")

    def wrap(self, owner: Any, name: str, kind: str) -> None:
        """Says so while a method runs."""
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*arguments: Any, **keywords: Any) -> Any:
            with self.during(kind):
                return inner(*arguments, **keywords)

        setattr(owner, name, outer)


def build(kind: str, out: Path, index: int) -> GaPEngine:
    model = toy.build()
    if kind == "zero2":
        optimizer = toy.OPTIMIZERS["adamw"](toy.groups(model))
        config = worker_zero.deepspeed_config({"stage": 2, "dtype": "fp32"})
        return GaPEngine.initialize(model=model, config=config, gap_config=GAP, optimizer=optimizer)
    training: dict[str, Any] = {"gradient_accumulation_steps": toy.ACCUMULATION}
    if kind == "parallel":
        optimizer = toy.OPTIMIZERS["adamw"](toy.groups(model))
        worker = Worker(index, str(out / "exchange"), timeout=120)
        return GaPEngine(model, PARALLEL, optimizer=optimizer, worker=worker, **training)
    wrapped = worker_fsdp.wrap_fsdp2(model, {})
    optimizer = toy.OPTIMIZERS["adamw"](worker_fsdp.groups_by_name(wrapped))
    return GaPEngine(wrapped, GAP, optimizer=optimizer, **training)


def digest(engine: GaPEngine) -> str:
    """Of all weights, masks and moments."""
    state = observe.final_state(engine)
    tensors = {**state["weights"], **{f"mask {n}": m for n, m in observe.full_masks(engine).items()}}
    tensors |= {f"{n} {i}": m for n, moments in state["moments"].items() for i, m in enumerate(moments)}
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def main(out: Path, kind: str, index: int) -> None:
    rank = int(os.environ["RANK"])
    status = Status(out / f"status.{index if kind == 'parallel' else rank}")
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:  # to be in the middle of a save for long enough
        fsync(descriptor)
        time.sleep(0.003)

    os.fsync = slow_fsync
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    status.wrap(GaPEngine, "_apply", "boundary")
    status.wrap(GaPEngine, "save_checkpoint", "save")
    status.wrap(Exchange, "publish", "exchange")
    status.wrap(Exchange, "wait", "exchange")
    engine = build(kind, out, index)
    folder = out / f"checkpoints_{index}"
    if checkpoint.candidates(folder):
        engine.load_checkpoint(folder)
    with (out / "resumed").open("a") as log:
        log.write(f"{engine.applied_steps}\n")
    while not engine.finished:
        for micro in range(toy.ACCUMULATION):
            engine.backward(engine(*toy.batch(engine.applied_steps, micro, rank, skip=False)))
            if micro == toy.ACCUMULATION - 1:
                status.step = engine.applied_steps
            engine.step()
        status.step = engine.applied_steps
        status.say("step")
        time.sleep(0.01)
        if engine.applied_steps % 2 == 0 or engine.finished:
            engine.save_checkpoint(folder, keep=2)
    (out / f"final.{index}.{rank}").write_text(digest(engine))
    status.say("done")
    dist.barrier()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0]), arguments[1], int(arguments[3]) if "--gap-worker" in arguments else 0)
    sys.stdout.flush()
    os._exit(0)
