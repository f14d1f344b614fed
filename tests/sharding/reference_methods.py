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

#: What is done to a partition; the pruned part of the weights to prune that it has then; and the progress of a cosine
#: or the share that is grown (1 where there is none).
Event = tuple[str, int, Fraction, Fraction]


def cubic(progress: str) -> Fraction:
    """What gradual pruning has pruned."""
    return 1 - (1 - Fraction(progress)) ** 3


def prune(partition: int = 0, progress: str = "1") -> Event:
    """The largest stay: the budget, or as many more as the cubic ramp has left."""
    return prune_to(partition, cubic(progress))


def prune_to(partition: int, pruned: Fraction) -> Event:
    return "prune", partition, pruned, Fraction(1)


def grow(partition: int = 0) -> Event:
    """No mask any more."""
    return "grow", partition, Fraction(0), Fraction(1)


def grow_by(partition: int, pruned: Fraction, share: str) -> Event:
    """The largest stay, and a share of all others is grown."""
    return "grow_by", partition, pruned, Fraction(share)


def random(partition: int = 0, pruned: str = "1") -> Event:
    """The first mask of fresh weights."""
    return "random", partition, Fraction(pruned), Fraction(1)


def exchange(progress: str, pruned: Fraction = Fraction(1)) -> Event:
    """Drop by magnitude, and grow by gradient (RigL, GraNet) or at random (SET)."""
    return "exchange", 0, pruned, Fraction(progress)


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
        listed = {name: k for name, k in reference.entries().items() if name.split(".")[-2] in self.keep}
        found = {name: k if self.kappa == 2 else 0 for name, k in listed.items()}
        return found | ({"sometimes.weight": 0} if "sometimes" in self.keep else {})

    def budget(self, name: str) -> int:
        return self.keep[name.split(".")[-2]]

    def budgets(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.budget(name) for name in names}

    def largest(self, magnitudes: Mapping[str, Tensor], pruned: Fraction) -> dict[str, Tensor]:
        """The masks that pruning the entries of one partition leaves."""
        budgets = self.budgets(magnitudes)
        if "pattern" in self.gap:
            return {name: in_fours(m, left(m.numel(), budgets[name], pruned)) for name, m in magnitudes.items()}
        return largest(magnitudes, budgets, pruned, shared_budget=self.shared_budget)

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
    "granet": Scenario(
        {"method": "granet", "sparsity": 0.8, "dense_steps": 2, "phase_steps": 11, "update_steps": 3}
        | {"finetune_steps": 2, "drop_fraction": 0.5, "regrow_warmup_steps": 2},
        steps=15,
        saved=9,
        events={
            **{5: [exchange("3/11", cubic("3/11"))], 8: [exchange("6/11", cubic("6/11"))]},
            **{11: [exchange("9/11", cubic("9/11"))], 13: [prune()]},
        },
    ),
    # 3 of 4 are left where half of what is to be pruned is. Then 148 weights can be replaced.
    "granet_2of4": Scenario(
        {"method": "granet", "sparsity": 0.5, "pattern": "2:4", "exclude": ["fc2"], "dense_steps": 2, "phase_steps": 11}
        | {"update_steps": 3, "finetune_steps": 2, "drop_fraction": 0.5, "regrow_moments": "keep_second"},
        steps=15,
        saved=9,
        events={
            **{5: [exchange("3/11", Fraction(1, 2))], 8: [exchange("6/11")], 11: [exchange("9/11")], 13: [prune()]},
        },
        keep={"fc1": 296},
    ),
    # The level rises from step 2 to step 12. The ramps begin at 4 and 9: updates 4 and 9 are none of theirs.
    "rising": Scenario(
        {"method": "cyclic", "sparsity": 0.8, "partitions": 2, "target": "rising", "dense_steps": 2, "phase_steps": 5}
        | {"rounds": 1, "finetune_steps": 3, "update_steps": 2, "prune_ramp": 0.6, "regrow_moments": "mean_second"},
        steps=15,
        saved=10,
        events={
            **{2: [prune(1, "0")], 4: [prune(1, "2/10")]},
            **{6: [prune(1, "4/10"), prune_to(0, cubic("2/3") * cubic("4/10"))], 7: [prune(0, "5/10"), grow(1)]},
            **{9: [prune(0, "7/10")], 11: [prune(0, "9/10"), prune_to(1, cubic("2/3") * cubic("9/10"))]},
            12: [prune(0), prune(1)],
        },
        kappa=2,
    ),
    "rising_global": Scenario(
        {"method": "cyclic", "sparsity": 0.8, "partitions": 2, "target": "rising", "dense_steps": 2, "phase_steps": 5}
        | {"rounds": 1, "finetune_steps": 3, "update_steps": 2, "distribution": "global", "regrow": "last_value"}
        | {"regrow_storage": "bf16_cpu"}
        | {"regrow_warmup_steps": 4, "regrow_moments": "keep_second"},
        steps=15,
        saved=9,
        events={
            **{2: [prune(1, "0")], 4: [prune(1, "2/10")], 6: [prune(1, "4/10")], 7: [prune(0, "5/10"), grow(1)]},
            **{9: [prune(0, "7/10")], 11: [prune(0, "9/10")], 12: [prune(0), prune(1)]},
        },
        kappa=2,
    ),
    # The second phase grows 0.4 / 2 (1 + cos(pi / 2)) of what is pruned.
    "rising_grow": Scenario(
        {"method": "cyclic", "sparsity": 0.8, "partitions": 2, "target": "rising", "dense_steps": 2, "phase_steps": 5}
        | {"rounds": 1, "finetune_steps": 3, "update_steps": 2, "prune_ramp": 0.6, "grow": "random", "grow_share": 0.4}
        | {"distribution": "global"},
        steps=15,
        saved=10,
        events={
            **{2: [prune(0, "0"), prune(1, "0")], 4: [prune(1, "2/10")]},
            6: [prune(1, "4/10"), prune_to(0, cubic("2/3") * cubic("4/10"))],
            7: [prune(0, "5/10"), grow_by(1, cubic("5/10"), "0.2")],
            9: [prune(0, "7/10")],
            11: [
                prune(0, "9/10"),
                prune_to(1, cubic("5/10") * 4 / 5 + cubic("2/3") * (cubic("9/10") - cubic("5/10") * 4 / 5)),
            ],
            12: [prune(0), prune(1)],
        },
        optimizer="sgd",
        kappa=2,
    ),
    "cyclic_grow": Scenario(
        {"method": "cyclic", "sparsity": 0.8, "partitions": 2, "phase_steps": 5, "rounds": 1, "finetune_steps": 3}
        | {"grow": "gradient", "grow_share": 0.5, "regrow_warmup_steps": 3, "regrow_moments": "mean_second"},
        steps=13,
        saved=6,
        events={
            **{0: [random(0, "0.5"), random(1)], 5: [prune(0), grow_by(1, Fraction(1), "0.25")], 10: [prune(1)]},
        },
        kappa=2,
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


def left(numel: int, keep: int, pruned: Fraction) -> int:
    """Weights that are left when a part of those to prune is pruned, rounded half up."""
    return math.floor(numel - pruned * (numel - keep) + Fraction(1, 2))


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


def exchanged_in_fours(keep: int, drop: int, mask: Tensor, magnitude: Tensor, growth: Tensor) -> Tensor:
    """The same with as many in every four consecutive weights; the last of the drops are where they cost least."""
    size, sizes, came = mask.numel(), magnitude.tolist(), growth.tolist()
    starts, new = range(0, size, 4), [False] * size
    ranked = {s: sorted((i for i in range(s, s + 4) if mask[i]), key=lambda i: (-sizes[i], i)) for s in starts}
    each, more = divmod(drop, len(starts))
    stays = keep // len(starts) - each
    cheapest = sorted(starts, key=lambda s: (sizes[ranked[s][stays - 1]], -s))[:more]
    for s in starts:
        here = ranked[s][: stays - (s in cheapest)]
        others = sorted((i for i in range(s, s + 4) if i not in here), key=lambda i: (-came[i], i))
        for i in [*here, *others[: each + (s in cheapest)]]:
            new[i] = True
    return torch.tensor(new)


def in_fours(magnitude: Tensor, keep: int) -> Tensor:
    """The largest of every four consecutive weights."""
    every = torch.ones(magnitude.numel(), dtype=torch.bool)
    return exchanged_in_fours(keep, 0, every, magnitude.flatten(), magnitude.flatten()).view(magnitude.shape)


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
    for action, partition, pruned, progress in scenario.events.get(step, []):
        names = [name for name, k in scenario.entries().items() if k == partition]
        if action == "prune":
            magnitudes = {name: weights[name].abs() for name in names}
            found |= scenario.largest(magnitudes, pruned)
        by_gradient = gap["method"] in ("rigl", "granet") or gap.get("grow") == "gradient"
        counts = dict[str, tuple[int, int]]()  # kept and replaced weights
        for name in names:
            weight, keep = weights[name], left(weights[name].numel(), scenario.budget(name), pruned)
            if action == "grow":
                found[name] = None
            if action == "random":
                found[name] = reference.largest(scores(seed, name, weight.numel()).view(weight.shape), keep)
            if action == "exchange":
                drop = dropped(weight.numel(), keep, gap.get("drop_fraction", 0.3), progress)
                counts[name] = keep, drop
            if action == "grow_by":
                grown = left(weight.numel(), scenario.budget(name), pruned * (1 - progress))
                counts[name] = grown, grown - keep
        groups = [list(counts)] if scenario.shared_budget and counts else [[name] for name in counts]
        for group in groups:
            growth = [
                gradients[n].abs().flatten() if by_gradient else scores(seed, f"{n} {step}", weights[n].numel())
                for n in group
            ]
            joined = [
                torch.cat([tensors[n].flatten() for n in group]) for tensors in (_or_ones(masks, weights), weights)
            ]
            keep, drop = (sum(counts[n][i] for n in group) for i in (0, 1))
            rule = exchanged_in_fours if "pattern" in gap else exchanged
            new = rule(keep, drop, joined[0], joined[1].abs(), torch.cat(growth))
            parts = torch.split(new, [weights[n].numel() for n in group])
            found |= {n: part.view(weights[n].shape) for n, part in zip(group, parts, strict=True)}
    return found


def _or_ones(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks; those of dense entries keep everything."""
    return {name: masks.get(name, torch.ones_like(weight, dtype=torch.bool)) for name, weight in weights.items()}


def largest(
    magnitudes: Mapping[str, Tensor], budgets: Mapping[str, int], pruned: Fraction, *, shared_budget: bool
) -> dict[str, Tensor]:
    """The masks that pruning the entries of one partition leaves; with distribution "global" they are one vector."""
    keep = {n: left(m.numel(), budgets[n], pruned) for n, m in magnitudes.items()}
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
        kept = sum(int(masks[name].sum()) if name in masks else weights[name].numel() for name in names)
        final, budgets = {name: masks[name] for name in names if name in masks}, scenario.budgets(names)
        if kept != sum(budgets.values()):
            magnitudes = {name: weights[name].abs() for name in names}
            final = scenario.largest(magnitudes, Fraction(1))
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
    young: dict[str, tuple[Tensor, int]] = {}
    boundary(scenario, 0, masks, last, weights, {}, optimizer, young)
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
        before = {name: p.detach().clone() for name, p in weights.items()}
        optimizer.step()
        warm_up(young, step, scenario.gap.get("regrow_warmup_steps", 1), before, weights)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()}
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name][~mask] = 0.0
        boundary(scenario, step + 1, masks, last, weights, gradients, optimizer, young)
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
def warm_up(
    young: Mapping[str, tuple[Tensor, int]],
    step: int,
    length: int,
    before: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> None:
    """The t-th step of a grown weight is t / length of what it would be."""
    for name, (grown, since) in young.items():
        taken = step - since + 1
        if taken < length:
            scaled = before[name] + (weights[name] - before[name]) * (taken / length)
            weights[name].copy_(torch.where(grown, scaled, weights[name]))


def second_moment(scenario: Scenario, moment: Tensor, old: Tensor, new: Tensor) -> Tensor | float:
    """The second moments of weights that are grown."""
    which = scenario.gap.get("regrow_moments")
    if which == "keep_second":
        return moment[new & ~old].clone()
    kept = [Fraction(value) for value in moment[old].tolist()]
    if which != "mean_second" or not any(kept):
        return 0.0
    # In units of 2^-30 of the power of two above the largest one, rounded down.
    unit = Fraction(2) ** (math.frexp(max(kept))[1] - 30)
    return float(sum(math.floor(value / unit) for value in kept) * unit / len(kept))


@torch.no_grad()
def boundary(
    scenario: Scenario,
    step: int,
    masks: dict[str, Tensor],
    last: dict[str, Tensor],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    young: dict[str, tuple[Tensor, int]],
) -> None:
    """Changes masks, weights and moments before a step; `last`: the values that weights had when they were pruned."""
    grows = {k for action, k, *_ in scenario.events.get(step, []) if action in ("grow", "grow_by", "exchange")}
    for name, mask in changed(scenario, step, masks, weights, gradients).items():
        weight = weights[name]
        old = masks.pop(name, torch.ones_like(weight, dtype=torch.bool))
        new = torch.ones_like(old) if mask is None else mask
        for key, moment in optimizer.state[weight].items():
            if moment.dim():
                moment[new & ~old] = second_moment(scenario, moment, old, new) if key == "exp_avg_sq" else 0.0
        if scenario.entries()[name] in grows and step:
            young[name] = new & ~old, step
        if scenario.gap.get("regrow") == "last_value":
            value = last.setdefault(name, torch.zeros_like(weight))
            stored = torch.bfloat16 if "regrow_storage" in scenario.gap else weight.dtype
            value[old & ~new] = weight[old & ~new].to(stored).to(weight.dtype)
            weight[new & ~old] = value[new & ~old]
        weight[~new] = 0.0
        if mask is not None:
            masks[name] = mask
    # Between the phases of dsd, every 4 steps: all state starts again.
    if scenario.gap.get("optimizer_state") == "reset" and step and step % scenario.gap["phase_steps"] == 0:
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
