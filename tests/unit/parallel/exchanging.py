"""Workers of parallel GaP in one process, for the tests of the exchange."""

from __future__ import annotations

import math
from typing import Any

import fsspec
import torch
from fake_ranks import item_of
from hypothesis import settings
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.parallel import Exchange, Item, ParallelWorker, Received
from gap_ds.sharding.comm import Comm

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


SIGNATURE = "gap|method:parallel|k:2|s:0.8|v:0.1.0"


ALONE = Comm(single=True)


def raw(folder: str, name: str) -> bytes:
    with fsspec.open(f"{folder}/{name}", "rb") as file:
        return bytes(file.read())


def overwrite(folder: str, name: str, data: bytes) -> None:
    with fsspec.open(f"{folder}/{name}", "wb") as file:
        file.write(data)


class Model:
    """The tensors of one worker: two entries in each of K partitions, and what is exchanged beside them."""

    SHAPES = (("fc1.weight", (3, 7)), ("fc2.weight", (5, 5)))

    def __init__(self, worker: int, workers: int = 2, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(1000 * seed + worker)
        self.workers = workers
        self.tensors: dict[str, tuple[Tensor, int | None, int | None]] = {}
        self.bits: dict[str, Tensor] = {}
        for k in range(workers):
            for n, (leaf, shape) in enumerate(self.SHAPES):
                weight = torch.randn(shape, generator=random)
                keep = 4 + n
                if k == worker:
                    kept = torch.zeros(math.prod(shape), dtype=torch.bool)
                    kept[torch.randperm(kept.numel(), generator=random)[:keep]] = True
                    weight.view(-1)[~kept] = 0.0
                    self.bits[f"{k}.{leaf}"] = bitmask.pack(kept)
                self.tensors[f"{k}.{leaf}"] = (weight, k, keep)
            self.tensors[f"{k}.norm.bias"] = (torch.randn(7, generator=random), k, None)
            self.tensors[f"{k}.norm.steps"] = (torch.tensor(10 * worker + k), k, None)
        self.tensors["embedding"] = (torch.randn(4, 3, generator=random), None, None)
        self.tensors["mean"] = (torch.randn(2, generator=random).double(), None, None)
        self.tensors["count"] = (torch.tensor(worker + 5), None, None)
        self.tensors["flags"] = (torch.tensor([True, False, worker > 0]), None, None)

    def items(self) -> list[Item]:
        return [
            item_of(name, tuple(t.shape), where, 0, t.numel(), lambda t=t: t.reshape(-1), keep, dtype=t.dtype)
            for name, (t, where, keep) in self.tensors.items()
        ]


def start(folder: str, worker: int, workers: int = 2, **changes: Any) -> Exchange:
    """A job of a worker, which may have published before."""
    arguments = {"signature": SIGNATURE, "fingerprint": "abc", "tensors": "def"} | changes
    worker_values = {"timeout": 60.0, "run": "", "resume": True}
    worker_values |= {name: arguments.pop(name) for name in worker_values.keys() & arguments.keys()}
    return Exchange(ParallelWorker(worker, folder, **worker_values), workers, world=ALONE, comm=ALONE, **arguments)


def publish_all(folder: str, workers: int = 2, round: int = 0) -> list[Exchange]:
    jobs = [start(folder, worker, workers) for worker in range(workers)]
    for worker, job in enumerate(jobs):
        model = Model(worker, workers)
        job.publish(round, model.items(), model.bits)
    return jobs


def combine(job: Exchange, round: int, items: list[Item], bits: dict[str, Tensor]) -> list[Received]:
    found: list[Received] = []
    job.combine(round, items, bits, found.append)
    return found


def read(job: Exchange, items: list[Item], round: int = 0) -> list[Received]:
    """Return everything that a job receives once all workers have published."""
    found: list[Received] = []
    job.read(round, items, job.wait(round), found.append)
    return found


def take(job: Exchange, round: int = 0) -> dict[str, Received]:
    model = Model(job.worker.index, job.workers)
    return {received.name: received for received in combine(job, round, model.items(), model.bits)}


def expected(workers: int, shared: str = "average") -> dict[str, Tensor]:
    """Return the tensors of every worker after the exchange, computed without the code under test."""
    models = [Model(worker, workers) for worker in range(workers)]
    result = {}
    for name, (tensor, where, _) in models[0].tensors.items():
        every = [model.tensors[name][0] for model in models]
        if where is not None:
            result[name] = every[where]
        elif shared == "first" or not tensor.is_floating_point():
            result[name] = every[0]
        else:
            result[name] = (sum(t.double() for t in every) / workers).to(tensor.dtype)
    return result


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, signs of zeros included."""
    a, b = a.reshape(-1), b.reshape(-1)
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def cut(tensor: Tensor, edges: list[int], rank: int) -> tuple[int, int]:
    """(start, numel) of a rank's piece; edges are points in [0, numel], in order."""
    points = [0, *edges, tensor.numel()]
    return points[rank], points[rank + 1] - points[rank]
