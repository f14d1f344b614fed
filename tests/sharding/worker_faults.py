"""Two ranks that come to disagree, or of which one leaves: what each of them says, and that none waits for ever."""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toy
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine

warnings.filterwarnings("ignore")


def build(**changes: Any) -> GaPEngine:
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return GaPEngine(
        DistributedDataParallel(model, find_unused_parameters=True), toy.GAP | changes, optimizer=optimizer
    )


def train(engine: GaPEngine, steps: int, factor: float = 1.0) -> None:
    for _ in range(steps):
        engine.backward(engine(*toy.batch(engine.applied_steps, 0, dist.get_rank())) * factor)
        engine.step()


def other_seed(rank: int) -> None:
    build(seed=rank)


def other_masks(rank: int) -> None:
    engine = build()
    if rank == 1:
        bits = engine.mask_state.bits["layers.3.fc1.weight"]
        bits[0] ^= 0b11  # two weights change places, so that the count stays
    train(engine, 3)


def loss_on_one_rank(rank: int) -> None:
    engine = build()
    train(engine, 2)
    train(engine, 1, float("nan") if rank == 1 else 1.0)


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    for case in (other_seed, other_masks, loss_on_one_rank):
        try:
            case(rank)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        (out / f"{case.__name__}.{rank}").write_text(said)
        dist.barrier()
    engine = build()
    if rank == 1:
        os._exit(0)
    started = time.monotonic()
    try:
        engine._enter(engine.phase, engine.phase)
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    (out / "left.0").write_text(f"{time.monotonic() - started:.0f} {said}")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
