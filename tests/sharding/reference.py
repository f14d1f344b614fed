"""Cyclic grow-and-prune on a whole model, written without gap_ds: what every backend must reproduce.

Run by every process of a group: the model is whole everywhere, gradients are averaged by all-reduce, masks come from a
stable sort of full tensors, and the schedule is spelled out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import toy
from torch import Tensor

#: Steps before which a partition is grown: (step, dense partition); None: all sparse.
BOUNDARIES = [(0, 0), (3, 1), (6, 0), (9, 1), (12, None)]
#: Blocks of each partition; keep of a matrix of 16 x 37 weights at 80 %.
PARTITIONS = [(0, 1), (2, 3)]
KEEP = 118


def entries() -> dict[str, int]:
    """Partition of each entry, in module order."""
    return {
        f"layers.{block}.{matrix}.weight": k
        for k, blocks in enumerate(PARTITIONS)
        for block in blocks
        for matrix in ("fc1", "fc2")
    }


def largest(scores: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest scores; of equal ones the first."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view(scores.shape)


def random_scores(seed: int, name: str, numel: int) -> Tensor:
    """Scores of the first random masks, by plain integers: the counter-based hash of (seed, name, index)."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    a, b = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    scores = []
    for index in range(numel):
        x = (index & 0xFFFFFFFF) ^ a ^ ((index >> 32) * 0x9E3779B1 % 2**32)
        for constant in (0x85EBCA6B, 0xC2B2AE35, b | 1):
            x ^= x >> 16
            x = x * constant % 2**32
        scores.append((x ^ (x >> 15)) >> 1)
    return torch.tensor(scores, dtype=torch.int64)


def largest_fifth(scores: Tensor) -> Tensor:
    """The mask of a matrix at 80 %."""
    return largest(scores, KEEP)


def train(
    optimizer_name: str,
    unused_is_zero: bool = True,
    groups: Any = toy.groups,
    clip: float = 0.0,
    *,
    skip: bool = True,
    every_micro_batch: bool = False,
    hidden: int = toy.HIDDEN,
    select: Callable[[Tensor], Tensor] = largest_fifth,
) -> dict[str, Any]:
    """Trains the toy; final weights, moments, losses, and the masks after each boundary.

    unused_is_zero: whether a parameter without gradient is updated as if its gradient were zero (libraries with flat
    buffers do that) or left alone (as torch's optimizers do).
    groups: the model's parameter groups; clip: norm of all gradients together to clip at (0: off).
    skip: whether one parameter gets no gradient in every other step.
    every_micro_batch: whether gradients are averaged over the ranks before they are summed over micro-batches, or
        after. The two orders of summation differ in the last bit.
    hidden: width of the toy's blocks; select: the mask for an entry's scores.
    """
    model = toy.build(hidden)
    weights = dict(model.named_parameters())
    optimizer = toy.OPTIMIZERS[optimizer_name](groups(model))
    masks: dict[str, Tensor] = {}
    history, losses = [], []
    boundaries = dict(BOUNDARIES)
    for step in range(toy.STEPS):
        if step in boundaries:
            _cross(step, boundaries[step], masks, weights, optimizer, select)
            history.append({name: mask.clone() for name, mask in masks.items()})
        for micro in range(toy.ACCUMULATION):
            loss = model(*toy.batch(step, micro, toy.Job.rank(), skip))
            losses.append(loss.item())
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss / toy.ACCUMULATION, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is None and unused_is_zero:
                    gradient = torch.zeros_like(parameter)
                if gradient is not None:
                    gradient = _average(gradient) if every_micro_batch else gradient
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for parameter in trained:
            if parameter.grad is not None and not every_micro_batch:
                parameter.grad = _average(parameter.grad)
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name][~mask] = 0.0
    moments = {
        n: [s for s in optimizer.state[p].values() if s.dim()] for n, p in weights.items() if p in optimizer.state
    }
    return {
        "weights": {name: p.detach().clone() for name, p in weights.items()},
        "moments": moments,
        "masks": history,
        "losses": losses,
    }


def _average(gradient: Tensor) -> Tensor:
    """The mean over the ranks."""
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=toy.Job.group)
    return gradient / toy.Job.size()


@torch.no_grad()
def _cross(
    step: int,
    dense: int | None,
    masks: dict[str, Tensor],
    weights: Any,
    optimizer: Any,
    select: Callable[[Tensor], Tensor],
) -> None:
    for name, partition in entries().items():
        weight = weights[name]
        if partition == dense:
            mask = masks.pop(name, None)
            if mask is not None:
                for moment in optimizer.state[weight].values():
                    if moment.dim():
                        moment[~mask] = 0.0
        elif name not in masks:
            scores = weight.abs() if step else random_scores(0, name, weight.numel()).view(weight.shape)
            masks[name] = select(scores)
            weight[~masks[name]] = 0.0
