"""Parallel grow-and-prune on whole models, written without gap_ds: all workers one after the other, in one place.

Between two exchanges a worker does what `reference.train` does. At the end of a round: each worker prunes its own
partition, then all take every partition (weights, masks, and the biases and norms of its blocks) from its worker and
the mean of what lies in no partition; each grows its own again.
"""

from __future__ import annotations

from typing import Any

import reference
import torch
import toy
from torch import Tensor

WORKERS, T, ROUNDS, FINETUNE = 2, 3, 2, 3
GAP = {
    "method": "parallel",
    "sparsity": 0.8,
    "partitions": WORKERS,
    "phase_steps": T,
    "rounds": ROUNDS,
    "finetune_steps": FINETUNE,
}


class Job:
    """A worker: its model, optimizer and masks."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.model = toy.build()
        self.weights = dict(self.model.named_parameters())
        self.optimizer = toy.OPTIMIZERS["adamw"](toy.groups(self.model))
        self.masks: dict[str, Tensor] = {}
        for name, partition in reference.entries().items():
            if partition != index:
                scores = reference.random_scores(0, name, self.weights[name].numel())
                self.put_on(name, reference.largest_fifth(scores.view(self.weights[name].shape)))

    @torch.no_grad()
    def put_on(self, name: str, mask: Tensor) -> None:
        self.masks[name] = mask
        self.weights[name][~mask] = 0.0

    def train(self, first: int, last: int, every_micro_batch: bool) -> None:
        for step in range(first, last):
            for micro in range(toy.ACCUMULATION):
                loss = self.model(*toy.batch(step, micro, torch.distributed.get_rank(), skip=False))
                trained = [p for p in self.model.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(loss / toy.ACCUMULATION, trained)
                for parameter, gradient in zip(trained, gradients, strict=True):
                    gradient = reference._average(gradient) if every_micro_batch else gradient
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            for parameter in trained:
                parameter.grad = parameter.grad if every_micro_batch else reference._average(parameter.grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for name, mask in self.masks.items():
                    self.weights[name][~mask] = 0.0

    def moments(self, name: str) -> list[Tensor]:
        return [value for value in self.optimizer.state[self.weights[name]].values() if value.dim()]


@torch.no_grad()
def exchange(jobs: list[Job], last: bool, shared: str) -> None:
    for job in jobs:
        for name, partition in reference.entries().items():
            if partition == job.index:
                job.put_on(name, reference.largest_fifth(job.weights[name].abs()))
    taken: dict[str, Tensor] = {}
    for name, weight in jobs[0].weights.items():
        if not weight.requires_grad:
            continue
        if name.startswith("layers."):
            taken[name] = jobs[0 if int(name.split(".")[1]) in reference.PARTITIONS[0] else 1].weights[name].clone()
        elif shared == "average":
            taken[name] = sum(job.weights[name] for job in jobs) / len(jobs)
        else:
            taken[name] = jobs[0].weights[name].clone()
    masks = {name: jobs[partition].masks[name].clone() for name, partition in reference.entries().items()}
    for job in jobs:
        for name, weight in job.weights.items():
            if name in taken:
                weight.copy_(taken[name])
        for name, partition in reference.entries().items():
            for moment in job.moments(name):  # what comes back is as if it were new
                moment[~job.masks[name]] = 0.0
            job.masks[name] = masks[name].clone()
            if partition == job.index and not last:
                del job.masks[name]


def train(every_micro_batch: bool, shared: str = "average") -> list[dict[str, Any]]:
    """Final weights and masks of all workers, and the masks after each round, as the exchange left them."""
    jobs = [Job(index) for index in range(WORKERS)]
    history = []
    for round_ in range(ROUNDS):
        for job in jobs:
            job.train(round_ * T, (round_ + 1) * T, every_micro_batch)
        exchange(jobs, round_ == ROUNDS - 1, shared)
        history.append([{name: mask.clone() for name, mask in job.masks.items()} for job in jobs])
    jobs[0].train(ROUNDS * T, ROUNDS * T + FINETUNE, every_micro_batch)
    return [
        {
            "weights": {name: p.detach().clone() for name, p in job.weights.items()},
            "masks": [row[job.index] for row in history],
            "moments": {name: job.moments(name) for name, p in job.weights.items() if p in job.optimizer.state},
        }
        for job in jobs
    ]
