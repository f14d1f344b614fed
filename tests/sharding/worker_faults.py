"""Two ranks that disagree or do not train one model, or of which one leaves: what each says; none waits for ever."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine
from gap_ds.training import saving

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


def stages_of_a_pipeline(rank: int) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8 + 8 * rank) if i == 3 else nn.Linear(8, 8) for i in range(4)))
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def stage_without_blocks(rank: int) -> None:
    model = nn.Linear(8, 8) if rank else toy.build()
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def optimizer_of_rank_1_lacks_an_entry(rank: int) -> None:
    model = DistributedDataParallel(toy.build(), find_unused_parameters=True)
    lacking = [p for name, p in model.named_parameters() if not rank or "layers.2.fc1.weight" not in name]
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(lacking, lr=0.01))


def config_missing_on_rank_1(rank: int) -> None:
    build(partitions=2 if not rank else 99)


def own_groups() -> dist.ProcessGroup:
    """This rank's group of one."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def ddp_over_a_part(rank: int) -> None:
    model = DistributedDataParallel(toy.build(), process_group=own_groups())
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def fsdp1_over_a_part(rank: int) -> None:
    model = FullyShardedDataParallel(
        toy.build(), process_group=own_groups(), device_id=torch.device("cpu"), use_orig_params=True
    )
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def fsdp2_over_a_part(rank: int) -> None:
    model = toy.build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "data"))["data"])
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def experts_that_ddp_ignores(rank: int) -> None:
    model = toy.build()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["layers.1.fc1.weight"])
    model = DistributedDataParallel(model, find_unused_parameters=True)
    GaPEngine(model, toy.GAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


def local_sgd(rank: int) -> None:
    model = toy.build()
    engine = GaPEngine(
        model, toy.GAP, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    for _ in range(6):
        train(engine, 1)
        if engine.applied_steps == 4:
            for parameter in model.parameters():
                dist.all_reduce(parameter.data)
                parameter.data /= 2


def folder_of_each_rank(rank: int) -> None:
    engine = build()
    with tempfile.TemporaryDirectory() as folder:
        saving.require_shared(engine.run, Path(folder))


CASES = [other_seed, other_masks, loss_on_one_rank, stages_of_a_pipeline, stage_without_blocks]
CASES += [optimizer_of_rank_1_lacks_an_entry, config_missing_on_rank_1, ddp_over_a_part, fsdp1_over_a_part]
CASES += [fsdp2_over_a_part, experts_that_ddp_ignores, local_sgd, folder_of_each_rank]


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    for case in CASES:
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
