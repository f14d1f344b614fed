"""Parallel grow-and-prune on whole models, written without gap_ds: all workers step by step, in one place.

Between two exchanges a worker does what `reference.train` does. At the end of a round: each worker prunes its own
partition, then all take every partition (weights, masks, and the biases and norms of its blocks) from its worker and
the mean of what lies in no partition; each grows its own again. A scenario's events are written down by hand, and not
computed from its config. K workers, one for each partition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import reference
import reference_methods
import torch
import toy
from torch import Tensor

#: What all workers do: "random" (the first masks of the others' partitions), "own" or "others" (prune these partitions
#: by magnitude), "exchange"; and the progress of a ramp there (1 where there is none).
Event = tuple[str, Fraction]

RANDOM, OTHERS, OWN, EXCHANGE = ((name, Fraction(1)) for name in ("random", "others", "own", "exchange"))


@dataclass(frozen=True)
class Scenario:
    """A config and what it means for each of the K workers.

    events: what happens before which step. boundaries: the steps before which a phase ends.
    homes: the partition of every module that has entries, in module order; keep: budget of each kind of matrix.
    steps: of worker 0, which alone goes on after the last exchange.
    """

    gap: dict[str, Any]
    steps: int
    events: dict[int, list[Event]]
    boundaries: tuple[int, ...]
    homes: dict[str, int]
    keep: dict[str, int] = field(default_factory=lambda: {"fc1": reference.KEEP, "fc2": reference.KEEP})
    optimizer: str = "adamw"
    lr: float = 1e-2

    @property
    def workers(self) -> int:
        return max(self.homes.values()) + 1

    @property
    def last_exchange(self) -> int:
        return max(step for step, events in self.events.items() if EXCHANGE in events)

    def partition_of(self, name: str) -> int | None:
        """The partition that a parameter goes with; None: shared."""
        return next((k for module, k in self.homes.items() if name.startswith(f"{module}.")), None)

    def entries(self) -> dict[str, int]:
        """Partition of each entry, in module order."""
        matrices = {module: (".fc1", ".fc2") if module.startswith("layers") else ("",) for module in self.homes}
        return {f"{module}{name}.weight": k for module, k in self.homes.items() for name in matrices[module]}


SCENARIOS = {
    "two": Scenario(
        {"method": "parallel", "sparsity": 0.8, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 3},
        steps=9,
        events={0: [RANDOM], 3: [OWN, EXCHANGE], 6: [OWN, EXCHANGE]},
        boundaries=(3, 6),
        homes={"layers.0": 0, "layers.1": 0, "layers.2": 1, "layers.3": 1},
    ),
    # The level rises from step 2 to step 10: partitions are exchanged at 7/8 and at their target.
    "rising": Scenario(
        {"method": "parallel", "sparsity": 0.8, "partitions": 2, "target": "rising", "dense_steps": 2, "phase_steps": 4}
        | {"rounds": 2, "finetune_steps": 2, "update_steps": 2},
        steps=12,
        events={
            **{2: [("others", Fraction(0))], 4: [("others", Fraction(2, 8))]},
            **{6: [("others", Fraction(4, 8)), ("own", Fraction(4, 8)), EXCHANGE], 8: [("others", Fraction(6, 8))]},
            10: [OTHERS, OWN, EXCHANGE],
        },
        boundaries=(2, 6, 10),
        homes={"layers.0": 0, "layers.1": 0, "layers.2": 1, "layers.3": 1},
    ),
    # ERK over 8 matrices of 16 x 37 and one of 16 x 16: see reference_methods. All dense first; each phase has the
    # learning rates of the first, and a ramp over its last half.
    "erk": Scenario(
        {"method": "parallel", "sparsity": 0.8, "distribution": "erk", "include": ["sometimes"], "partitions": 3}
        | {"partition_assignment": "interleaved", "dense_steps": 4, "phase_steps": 4, "rounds": 2, "finetune_steps": 2}
        | {"prune_ramp": 0.5, "update_steps": 1, "lr_restart": True},
        steps=14,
        events={
            **{3: [("others", Fraction(1, 2))], 4: [OTHERS]},
            **{7: [("own", Fraction(1, 2))], 8: [OWN, EXCHANGE]},
            **{11: [("own", Fraction(1, 2))], 12: [OWN, EXCHANGE]},
        },
        boundaries=(4, 8, 12),
        homes={"layers.0": 0, "layers.1": 1, "layers.2": 2, "layers.3": 0, "sometimes": 0},
        keep={"fc1": 116, "fc2": 116, "sometimes": 70},
        optimizer="sgd",
        lr=0.05,
    ),
    # One threshold for each partition, a ramp over three of four steps, and all optimizer state anew in each phase.
    "global": Scenario(
        {"method": "parallel", "sparsity": 0.8, "distribution": "global", "partitions": 3, "phase_steps": 4}
        | {"rounds": 2, "finetune_steps": 2, "prune_ramp": 0.75, "update_steps": 1}
        | {"optimizer_state": "reset", "seed": 5},
        steps=10,
        events={
            **{0: [RANDOM], 2: [("own", Fraction(1, 3))], 3: [("own", Fraction(2, 3))], 4: [OWN, EXCHANGE]},
            **{6: [("own", Fraction(1, 3))], 7: [("own", Fraction(2, 3))], 8: [OWN, EXCHANGE]},
        },
        boundaries=(4, 8),
        homes={"layers.0": 0, "layers.1": 1, "layers.2": 2, "layers.3": 2},
    ),
}


def decay(step: int) -> float:
    """What the learning rate is multiplied with in a step of a phase, where it begins again in each."""
    return 0.5**step


class Job:
    """A worker: its model, optimizer and masks."""

    def __init__(self, run: Scenario, index: int) -> None:
        self.run, self.index = run, index
        self.model = toy.build()
        self.weights = dict(self.model.named_parameters())
        self.optimizer = toy.OPTIMIZERS[run.optimizer](toy.groups(self.model))
        self.masks: dict[str, Tensor] = {}

    def change(self, action: str, progress: Fraction) -> None:
        """Puts on first masks, or prunes."""
        for k in range(self.run.workers):
            if (k == self.index) != (action == "own"):
                continue
            magnitudes = {name: self.weights[name].abs() for name, home in self.run.entries().items() if home == k}
            budgets = {name: self.run.keep[name.split(".")[-2]] for name in magnitudes}
            if action == "random":
                for name, shaped in magnitudes.items():
                    scores = reference.random_scores(self.run.gap.get("seed", 0), name, shaped.numel())
                    self.put_on(name, reference.largest(scores.view(shaped.shape), budgets[name]))
                continue
            shared_budget = self.run.gap.get("distribution") == "global"
            for name, mask in reference_methods.largest(
                magnitudes, budgets, 1 - (1 - progress) ** 3, shared_budget=shared_budget
            ).items():
                self.put_on(name, mask)

    @torch.no_grad()
    def put_on(self, name: str, mask: Tensor) -> None:
        self.masks[name] = mask
        self.weights[name][~mask] = 0.0

    def step(self, step: int, every_micro_batch: bool) -> None:
        if self.run.gap.get("lr_restart"):
            begin = max(boundary for boundary in (0, *self.run.boundaries) if boundary <= step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.run.lr * decay(step - begin)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for micro in range(toy.ACCUMULATION):
            loss = self.model(*toy.batch(step, micro, torch.distributed.get_rank(), skip=False))
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
def exchange(jobs: list[Job], last: bool, unpartitioned: str) -> int:
    """Makes all workers equal, and grows each one's partition if it is not the last time.

    Returns how many shared weights would be others if the workers' were summed in fp32, and not in fp64.
    """
    run, rounded = jobs[0].run, 0
    taken: dict[str, Tensor] = {}
    for name, weight in jobs[0].weights.items():
        if not weight.requires_grad:
            continue
        if (home := run.partition_of(name)) is not None:
            taken[name] = jobs[home].weights[name].clone()
        elif unpartitioned == "average":
            taken[name] = (sum(job.weights[name].double() for job in jobs) / len(jobs)).float()
            rounded += int((taken[name] != sum(job.weights[name] for job in jobs) / len(jobs)).sum())
        else:
            taken[name] = weight.clone()
    masks = {name: jobs[partition].masks[name].clone() for name, partition in run.entries().items()}
    for job in jobs:
        for name, value in taken.items():
            job.weights[name].copy_(value)
        for name, partition in run.entries().items():
            for moment in job.moments(name):  # what comes back is as if it were new
                moment[~job.masks[name]] = 0.0
            job.masks[name] = masks[name].clone()
            if partition == job.index and not last:
                del job.masks[name]
    return rounded


def train(run: Scenario, every_micro_batch: bool, unpartitioned: str = "average") -> list[dict[str, Any]]:
    """Final weights, moments and masks of all workers, and the masks as each boundary left them.

    rounded: weights that `exchange` counted.
    """
    jobs = [Job(run, index) for index in range(run.workers)]
    history: list[list[dict[str, Tensor]]] = [[] for _ in jobs]
    rounded = 0
    for step in range(run.steps):
        for action, progress in run.events.get(step, []):
            if action == "exchange":
                rounded += exchange(jobs, step == run.last_exchange, unpartitioned)
                continue
            for job in jobs:
                job.change(action, progress)
        if step in run.boundaries:
            for job, masks in zip(jobs, history, strict=True):
                masks.append({name: mask.clone() for name, mask in job.masks.items()})
                if run.gap.get("optimizer_state") == "reset":
                    for value in (value for state in job.optimizer.state.values() for value in state.values()):
                        value.zero_()
        for job in jobs if step < run.last_exchange else jobs[:1]:
            job.step(step, every_micro_batch)
    return [
        {
            "weights": {name: p.detach().clone() for name, p in job.weights.items()},
            "masks": history[job.index],
            "moments": {name: job.moments(name) for name, p in job.weights.items() if p in job.optimizer.state},
            "steps": run.steps if job.index == 0 else run.last_exchange,
            "rounded": rounded,
        }
        for job in jobs
    ]
