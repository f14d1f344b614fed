"""Every other method on a whole model, written without gap_ds: tables of events, stable sorts, formulas spelled out.

As in reference.py every process has the whole model. A scenario's events are written down by hand, and not computed
from its config: what happens before which step to which partition, and how far the change has come there.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import reference
import torch
import torch.distributed as dist
import toy
from torch import Tensor

#: What is done to a partition, and the progress of a ramp or a cosine there (1 where there is none).
Event = tuple[str, int, Fraction]


def prune(partition: int = 0, progress: str = "1") -> Event:
    """The largest stay: the budget, or as many more as the cubic ramp has left."""
    return "prune", partition, Fraction(progress)


def grow(partition: int = 0) -> Event:
    """No mask any more."""
    return "grow", partition, Fraction(1)


def random(partition: int = 0) -> Event:
    """The first mask of fresh weights."""
    return "random", partition, Fraction(1)


def exchange(progress: str) -> Event:
    """Drop by magnitude, and grow by gradient (RigL) or at random (SET)."""
    return "exchange", 0, Fraction(progress)


@dataclass(frozen=True)
class Scenario:
    """A config and what it means: the events before each step, and the budget of each kind of matrix.

    saved: after how many steps the run is saved and exported: inside a phase, and where there are updates between two.
    skip: whether `sometimes` gets no gradient in every other step (in the last one before each update, here).
    """

    gap: dict[str, Any]
    steps: int
    saved: int
    events: dict[int, list[Event]]
    optimizer: str = "adamw"
    keep: dict[str, int] = field(default_factory=lambda: {"fc1": 118, "fc2": 118})
    kappa: int = 1
    skip: bool = False

    def entries(self) -> dict[str, int]:
        """Partition of each entry, in module order."""
        found = {name: k if self.kappa == 2 else 0 for name, k in reference.entries().items()}
        return found | ({"sometimes.weight": 0} if "sometimes" in self.keep else {})

    def budget(self, name: str) -> int:
        return self.keep[name.split(".")[-2]]

    def budgets(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.budget(name) for name in names}

    @property
    def shared_budget(self) -> bool:
        """Whether the entries of a partition share their budgets."""
        return self.gap.get("distribution") == "global"


SCENARIOS = {
    # ERK over 8 matrices of 16 x 37 and one of 16 x 16: 998 weights, proportional to 53 (each 115.996) and 32 (70.04).
    "rigl": Scenario(
        {"method": "rigl", "sparsity": 0.8, "phase_steps": 12, "update_steps": 4, "finetune_steps": 3}
        | {"distribution": "erk", "include": ["sometimes"]},
        steps=15,
        saved=6,
        events={0: [random()], 4: [exchange("4/12")], 8: [exchange("8/12")]},
        keep={"fc1": 116, "fc2": 116, "sometimes": 70},
        skip=True,
    ),
    # At progress 1/2 alpha is 1/4, of which 148 is 37 exactly. Of fc1 only 59 weights are pruned: no more can come.
    "set": Scenario(
        {"method": "set", "sparsity": 0.75, "phase_steps": 12, "update_steps": 3, "finetune_steps": 3, "seed": 7}
        | {"distribution": {r"layers\.\d\.fc1": 0.1}, "mask_init": "magnitude", "drop_fraction": 0.5},
        steps=15,
        saved=7,
        events={0: [prune()], 3: [exchange("3/12")], 6: [exchange("6/12")], 9: [exchange("9/12")]},
        optimizer="sgd",
        keep={"fc1": 533, "fc2": 148},
    ),
    "gradual": Scenario(
        {"method": "gradual", "sparsity": 0.8, "dense_steps": 2, "phase_steps": 11, "update_steps": 3}
        | {"finetune_steps": 2},
        steps=15,
        saved=7,
        events={
            **{5: [prune(0, "3/11")], 8: [prune(0, "6/11")], 11: [prune(0, "9/11")]},
            13: [prune()],
        },
    ),
    # Three quarters of 4 steps: the ramp begins after the first.
    "dsd": Scenario(
        {"method": "dsd", "sparsity": 0.8, "phase_steps": 4, "rounds": 2, "finetune_steps": 0, "update_steps": 1}
        | {"prune_ramp": 0.75, "regrow": "last_value", "optimizer_state": "reset"},
        steps=16,
        saved=10,
        events={
            **{2: [prune(0, "1/3")], 3: [prune(0, "2/3")], 4: [prune()], 8: [grow()]},
            **{10: [prune(0, "1/3")], 11: [prune(0, "2/3")], 12: [prune()]},
        },
    ),
    "acdc": Scenario(
        {"method": "acdc", "sparsity": 0.8, "dense_steps": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 1}
        | {"distribution": "global"},
        steps=15,
        saved=9,
        events={5: [prune()], 8: [grow()], 11: [prune()]},
        optimizer="sgd",
    ),
    "one_shot": Scenario(
        {"method": "one_shot", "sparsity": 0.9, "phase_steps": 5, "finetune_steps": 3} | {"distribution": {"fc2": 0.5}},
        steps=8,
        saved=3,
        events={5: [prune()]},
        keep={"fc1": 59, "fc2": 296},
    ),
    "static": Scenario(
        {"method": "static", "sparsity": 0.8, "phase_steps": 3, "rounds": 2, "finetune_steps": 2, "seed": 3},
        steps=8,
        saved=4,
        events={0: [random()]},
    ),
    # The ramp of the first phase begins at 0.6 and updates at 1.6 and 2.6: at 1, 2, and 3, where the phase is over.
    "cyclic": Scenario(
        {"method": "cyclic", "sparsity": 0.8, "partitions": 2, "dense_steps": 3, "phase_steps": 5, "rounds": 1}
        | {"finetune_steps": 2, "update_steps": 1, "prune_ramp": 0.8, "regrow": "last_value"},
        steps=15,
        saved=6,
        events={
            **{2: [prune(1, "1/2")], 3: [prune(1)]},
            **{5: [prune(0, "1/4")], 6: [prune(0, "2/4")], 7: [prune(0, "3/4")], 8: [prune(0), grow(1)]},
            **{10: [prune(1, "1/4")], 11: [prune(1, "2/4")], 12: [prune(1, "3/4")], 13: [prune(1)]},
        },
        kappa=2,
    ),
    # What a partition grows to are its fresh weights here, which the random masks pruned.
    "cyclic_global": Scenario(
        {"method": "cyclic", "sparsity": 0.8, "partitions": 2, "phase_steps": 5, "rounds": 1, "finetune_steps": 3}
        | {"distribution": "global", "update_steps": 1, "prune_ramp": 0.6, "regrow": "last_value"},
        steps=13,
        saved=8,
        events={
            **{0: [random(1)], 3: [prune(0, "1/3")], 4: [prune(0, "2/3")], 5: [prune(0), grow(1)]},
            **{8: [prune(1, "1/3")], 9: [prune(1, "2/3")], 10: [prune(1)]},
        },
        optimizer="sgd",
        kappa=2,
    ),
}


def ramp_keep(numel: int, keep: int, progress: Fraction) -> int:
    """Weights that gradual pruning has left, rounded half up."""
    return math.floor(numel - (1 - (1 - progress) ** 3) * (numel - keep) + Fraction(1, 2))


def dropped(numel: int, keep: int, fraction: float, progress: Fraction) -> int:
    """Weights that an update of RigL or SET replaces, at most those that there are to come."""
    alpha = fraction / 2 * (1 + math.cos(math.pi * progress))
    return min(math.floor(Fraction(round(alpha * 10**9), 10**9) * keep), numel - keep)


@functools.cache
def scores(seed: int, name: str, numel: int) -> Tensor:
    return reference.random_scores(seed, name, numel)


def exchanged(keep: int, drop: int, mask: Tensor, magnitude: Tensor, growth: Tensor) -> Tensor:
    """The mask after an update of RigL or SET: the largest of the old one, then the best of all others."""
    order = torch.sort(magnitude.flatten(), descending=True, stable=True).indices.tolist()
    active, growth = mask.flatten().tolist(), growth.flatten()
    new = torch.zeros(mask.numel(), dtype=torch.bool)
    new[[i for i in order if active[i]][: keep - drop]] = True
    best = torch.sort(growth, descending=True, stable=True).indices.tolist()
    survives = new.tolist()
    new[[i for i in best if not survives[i]][:drop]] = True
    return new.view(mask.shape)


def changed(
    scenario: Scenario,
    step: int,
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> dict[str, Tensor | None]:
    """The new masks of all entries that the events before a step change; None: grown.

    weights, gradients: whole, those that the last optimizer step left and took.
    """
    gap, found = scenario.gap, dict[str, Tensor | None]()
    seed = gap.get("seed", 0)
    for action, partition, progress in scenario.events.get(step, []):
        names = [name for name, k in scenario.entries().items() if k == partition]
        if action == "prune":
            magnitudes = {name: weights[name].abs() for name in names}
            found |= largest(magnitudes, scenario.budgets(names), progress, shared_budget=scenario.shared_budget)
        for name in names:
            weight, keep = weights[name], scenario.budget(name)
            if action == "grow":
                found[name] = None
            if action == "random":
                found[name] = reference.largest(scores(seed, name, weight.numel()).view(weight.shape), keep)
            if action == "exchange":
                drop = dropped(weight.numel(), keep, gap.get("drop_fraction", 0.3), progress)
                rigl = gap["method"] == "rigl"
                growth = gradients[name].abs() if rigl else scores(seed, f"{name} {step}", weight.numel())
                found[name] = exchanged(keep, drop, masks[name], weight.abs(), growth)
    return found


def largest(
    magnitudes: Mapping[str, Tensor], budgets: Mapping[str, int], progress: Fraction, *, shared_budget: bool
) -> dict[str, Tensor]:
    """The masks that pruning the entries of one partition leaves; with distribution "global" they are one vector."""
    keep = {n: ramp_keep(m.numel(), budgets[n], progress) for n, m in magnitudes.items()}
    if not shared_budget:
        return {name: reference.largest(m, keep[name]) for name, m in magnitudes.items()}
    together = reference.largest(torch.cat([m.flatten() for m in magnitudes.values()]), sum(keep.values()))
    parts = torch.split(together, [m.numel() for m in magnitudes.values()])
    return {name: part.view(m.shape) for part, (name, m) in zip(parts, magnitudes.items(), strict=True)}


def exported(scenario: Scenario, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of an exported model: what is not yet at its target is pruned to it."""
    found: dict[str, Tensor] = {}
    for k in range(scenario.kappa):
        names = [name for name, partition in scenario.entries().items() if partition == k]
        left = sum(int(masks[name].sum()) if name in masks else weights[name].numel() for name in names)
        final, budgets = {name: masks[name] for name in names if name in masks}, scenario.budgets(names)
        if left != sum(budgets.values()):
            magnitudes = {name: weights[name].abs() for name in names}
            final = largest(magnitudes, budgets, Fraction(1), shared_budget=scenario.shared_budget)
        found |= {name: torch.where(final[name], weights[name].detach(), 0.0) for name in names}
    return found


def train(scenario: Scenario, *, skip: bool, unused_is_zero: bool, every_micro_batch: bool) -> dict[str, Any]:
    """Trains the toy; final weights, moments and losses, the masks after each event, and the entries as exported.

    The arguments are those of `reference.train`.
    """
    model = toy.build()
    weights = dict(model.named_parameters())
    optimizer = toy.OPTIMIZERS[scenario.optimizer](toy.groups(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    masks: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    history, losses, middle = {}, [], {}
    boundary(scenario, 0, masks, last, weights, {}, optimizer)
    if 0 in scenario.events:
        history[0] = dict(masks)
    for step in range(scenario.steps):
        totals: list[Tensor | None] = [None] * len(trained)
        for micro in range(toy.ACCUMULATION):
            loss = model(*toy.batch(step, micro, dist.get_rank(), skip))
            losses.append(loss.item())
            found: list[Tensor | None] = list(torch.autograd.grad(loss / toy.ACCUMULATION, trained, allow_unused=True))
            for i, gradient in enumerate(found):
                if gradient is None and unused_is_zero:
                    gradient = torch.zeros_like(trained[i])
                if gradient is not None:
                    gradient = reference._average(gradient) if every_micro_batch else gradient
                    totals[i] = gradient if (total := totals[i]) is None else total + gradient
        for parameter, total in zip(trained, totals, strict=True):
            parameter.grad = total if total is None or every_micro_batch else reference._average(total)
        optimizer.step()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()}
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name][~mask] = 0.0
        boundary(scenario, step + 1, masks, last, weights, gradients, optimizer)
        if step + 1 in scenario.events:
            history[step + 1] = dict(masks)
        if step + 1 == scenario.saved:
            middle = copy.deepcopy(exported(scenario, masks, weights))
    moments = {n: [s for _, s in sorted(optimizer.state[p].items()) if s.dim()] for n, p in weights.items()}
    return {
        "weights": {name: p.detach().clone() for name, p in weights.items()},
        "moments": {name: values for name, values in moments.items() if values},
        **{"masks": history, "losses": losses, "middle": middle},
    }


@torch.no_grad()
def boundary(
    scenario: Scenario,
    step: int,
    masks: dict[str, Tensor],
    last: dict[str, Tensor],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Changes masks, weights and moments before a step; `last`: the values that weights had when they were pruned."""
    for name, mask in changed(scenario, step, masks, weights, gradients).items():
        weight = weights[name]
        old = masks.pop(name, torch.ones_like(weight, dtype=torch.bool))
        new = torch.ones_like(old) if mask is None else mask
        for moment in optimizer.state[weight].values():
            if moment.dim():
                moment[new & ~old] = 0.0
        if scenario.gap.get("regrow") == "last_value":
            value = last.setdefault(name, torch.zeros_like(weight))
            value[old & ~new] = weight[old & ~new]
            weight[new & ~old] = value[new & ~old]
        weight[~new] = 0.0
        if mask is not None:
            masks[name] = mask
    # Between the phases of dsd, every 4 steps: all state starts again.
    if scenario.gap.get("optimizer_state") == "reset" and step and step % scenario.gap["phase_steps"] == 0:
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
