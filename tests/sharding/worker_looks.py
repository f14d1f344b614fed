"""Masking broken on purpose, one way after the other in one group of processes: what each rank is told, and when.

Every fault is put in after two updates of a phase of three, on all ranks or on one. A rank that is told something
hands it over and meets the others; a rank that waits for ever fails the test by its timeout.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import toy
import worker_fsdp
import worker_zero
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine
from gap_ds.training.run import Run

warnings.filterwarnings("ignore")

GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 3}
#: Sparse in the first phase, where the blocks of the first partition are dense.
ENTRY = "layers.3.fc1.weight"
FAULTS: dict[str, Callable[[], GaPEngine]] = {}


class ScheduleFree(torch.optim.Optimizer):
    """SGD with another sequence z of the weights, of which y is the average: the form of schedule-free optimizers."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, 0.5)


class AdamWScheduleFree(ScheduleFree):
    """By this name the engine knows what z is."""


def ddp(optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **changes: Any) -> GaPEngine:
    model = toy.build()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return GaPEngine(
        wrapped, GAP | changes, optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=0.05)
    )


def zero(stage: int, dtype: str = "bf16", **options: Any) -> GaPEngine:
    return worker_zero.build({"stage": stage, "dtype": dtype, "optimizer": "adamw", "gap": GAP, **options})


def fsdp(kind: str, **options: Any) -> GaPEngine:
    return worker_fsdp.build({"kind": kind, "optimizer": "adamw", "gap": GAP, **options})


def train(engine: GaPEngine, updates: int) -> None:
    """Trains updates, each of as many micro-batches as the backend has."""
    for _ in range(updates):
        for micro in range(engine.run.backend.micro_batches):
            engine.backward(engine(*toy.batch(engine.applied_steps, micro, dist.get_rank())))
            engine.step()


def revive(engine: GaPEngine, tensor: Tensor | None = None) -> None:
    """Sets this rank's pruned weights of the entry to 1, in the tensor that the optimizer updates or in another."""
    shard, kept = engine.mask_state.shards[ENTRY], engine.mask(ENTRY)
    with torch.no_grad():
        (shard.weight() if tensor is None else tensor)[~kept] = 1.0


def fault(run: Callable[[], None]) -> Callable[[], None]:
    FAULTS[run.__name__] = run
    return run


# -- the ten and their siblings ----------------------------------------------------------------------------------------


@fault
def hook_dropped() -> None:
    engine = ddp()
    train(engine, 2)
    engine.optimizer._optimizer_step_post_hooks.clear()
    train(engine, 4)


@fault
def hook_dropped_on_one_rank() -> None:
    engine = ddp()
    train(engine, 1)
    if dist.get_rank() == 1:
        engine.optimizer._optimizer_step_post_hooks.clear()
    train(engine, 5)


@fault
def hook_dropped_fsdp2() -> None:
    engine = fsdp("fsdp2")
    train(engine, 1)
    if dist.get_rank() == 1:
        engine.optimizer._optimizer_step_post_hooks.clear()
    train(engine, 5)


@fault
def parameter_replaced() -> None:
    engine = ddp()
    train(engine, 2)
    layer = engine.module.get_submodule(ENTRY.rpartition(".")[0])
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    train(engine, 4)


@fault
def owner_swapped() -> None:
    """ZeRO-1: DeepSpeed's flat partition is another tensor than the one that the optimizer updates."""
    engine = zero(1, "fp32")
    train(engine, 2)
    inner = engine.run.backend.forward.optimizer
    inner.single_partition_of_fp32_groups[0] = inner.single_partition_of_fp32_groups[0].clone()
    train(engine, 4)


@fault
def data_swapped() -> None:
    engine = ddp()
    train(engine, 1)
    weight = engine.mask_state.shards[ENTRY].owner()
    weight.data = weight.data + 1.0
    train(engine, 5)


@fault
def revived_between_steps() -> None:
    engine = ddp()
    train(engine, 1)
    revive(engine)
    train(engine, 5)


@fault
def revived_on_rank_1() -> None:
    engine = ddp()
    train(engine, 1)
    if dist.get_rank() == 1:
        revive(engine)
    train(engine, 5)


@fault
def revived_in_every_step() -> None:
    """Through `.data`, which PyTorch does not count as a change."""
    engine = ddp()
    train(engine, 1)
    for _ in range(5):
        engine.mask_state.shards[ENTRY].owner().data.add_(0.01)
        train(engine, 1)


def revived_in_pieces(build: Callable[[], GaPEngine]) -> None:
    engine = build()
    train(engine, 1)
    revive(engine)
    train(engine, 5)


@fault
def revived_fsdp1() -> None:
    revived_in_pieces(lambda: fsdp("fsdp1"))


@fault
def revived_fsdp1_flat() -> None:
    revived_in_pieces(lambda: fsdp("fsdp1", flat=True))


@fault
def revived_fsdp2() -> None:
    revived_in_pieces(lambda: fsdp("fsdp2"))


@fault
def revived_zero2() -> None:
    revived_in_pieces(lambda: zero(2))


@fault
def revived_zero3() -> None:
    revived_in_pieces(lambda: zero(3))


def revived_in_working_copy(stage: int) -> None:
    engine = zero(stage)
    train(engine, 1)
    (copy,) = engine.mask_state.shards[ENTRY].copies() or (torch.ones(0),)
    if copy.numel():
        revive(engine, copy)
    train(engine, 5)


@fault
def working_copy_zero1() -> None:
    revived_in_working_copy(1)


@fault
def working_copy_zero2() -> None:
    revived_in_working_copy(2)


@fault
def working_copy_zero3() -> None:
    revived_in_working_copy(3)


@fault
def second_sequence() -> None:
    engine = ddp(AdamWScheduleFree)
    train(engine, 2)
    revive(engine, engine.optimizer.state[engine.mask_state.shards[ENTRY].owner()]["z"].view(-1))
    train(engine, 4)


@fault
def another_optimizer() -> None:
    engine = ddp()
    other = torch.optim.SGD(engine.module.parameters(), lr=0.01, momentum=0.9)
    for _ in range(6):
        train(engine, 1)
        for parameter in engine.module.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        other.step()
        other.zero_grad()


@fault
def optimizer_rebuilt() -> None:
    """The one that is stepped from now on has no hooks."""
    engine = ddp()
    train(engine, 1)
    other = torch.optim.SGD(engine.module.parameters(), lr=0.01)
    for step in range(6):
        engine(*toy.batch(step, 0, dist.get_rank())).backward()
        other.step()
        other.zero_grad()
        engine.after_step()


@fault
def loaded_late() -> None:
    engine = ddp()
    torch.manual_seed(7)
    engine.module.load_state_dict(toy.Toy().state_dict())
    train(engine, 6)


@fault
def loaded_late_zero2() -> None:
    """Into the working copies alone."""
    engine = zero(2)
    torch.manual_seed(7)
    engine.module.load_state_dict(toy.Toy().state_dict())
    train(engine, 6)


@fault
def bit_flipped_on_rank_1() -> None:
    engine = ddp()
    train(engine, 2)
    if dist.get_rank() == 1:
        bits = engine.mask_state.bits[ENTRY]
        flipped = (bits[0] & 1) ^ 1
        bits[0] = bits[0] & 0xFE | flipped
    train(engine, 4)


@fault
def groups_emptied() -> None:
    engine = ddp()
    train(engine, 1)
    for group in engine.optimizer.param_groups:
        group["params"] = []
    train(engine, 5)


@fault
def group_emptied_on_rank_1() -> None:
    engine = ddp()
    train(engine, 1)
    if dist.get_rank() == 1:
        engine.optimizer.param_groups[0]["params"] = [
            p for p in engine.optimizer.param_groups[0]["params"] if p is not engine.mask_state.shards[ENTRY].owner()
        ]
    train(engine, 5)


# -- nothing is wrong --------------------------------------------------------------------------------------------------


def quiet(build: Callable[[], GaPEngine]) -> dict[str, Any]:
    """A run without a fault: the steps before which weights were looked at, besides boundaries, with the entries."""
    engine, looks = build(), []
    look = Run.doubt_weights

    def counted(run: Run, place: str, names: Collection[str] | None = None, wait: bool = False) -> None:
        if place.startswith("before"):
            masked = set(run.mask_state.masked_weights())
            looks.append((engine.applied_steps, names is None, names is None or set(names) == masked))
        look(run, place, names, wait)

    with mock.patch.object(Run, "doubt_weights", counted):
        train(engine, 7)
    engine.close()
    return {"looks": looks}


QUIET: dict[str, Callable[[], GaPEngine]] = {
    "ddp": ddp,
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
    "fsdp1": lambda: fsdp("fsdp1"),
    "fsdp1_flat": lambda: fsdp("fsdp1", flat=True),
    "fsdp2": lambda: fsdp("fsdp2", bf16=True),
}


def main(out: Path, names: list[str]) -> None:
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name in names:
        if name in QUIET:
            torch.save(quiet(QUIET[name]), out / f"{name}.{rank}.pt")
            continue
        told = "nothing"
        try:
            FAULTS[name]()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        (out / f"{name}.{rank}").write_text(told)
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)
