"""Second moments of grown weights: their mean over kept weights does not depend on how an entry is cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_ds import GaPEngine
from gap_ds.masks import bitmask
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Shard
from gap_ds.training.regrowth import mean_second_moments


class Together:
    """Pieces of several ranks in one process: each collective gets the rows of all of them."""

    def all_gather(self, row: Tensor) -> Tensor:
        return row.amax(0, keepdim=True).expand_as(row)[None]

    def sum(self, counts: Tensor) -> Tensor:
        return counts.sum(0, keepdim=True).expand_as(counts)


def mean(values: Tensor, kept: Tensor, cuts: Sequence[int]) -> float:
    """The mean as ranks find it that have these pieces of one entry: here they are entries, added up."""
    parameter = nn.Parameter(torch.zeros(values.numel()))
    optimizer = torch.optim.Adam([parameter])
    optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": values.clone(), "exp_avg_sq": values.clone()}
    shards, bits = [], {}
    for i, (lo, hi) in enumerate(itertools.pairwise([0, *cuts, values.numel()])):
        shards.append(Shard.of_range(f"{i}", (values.numel(),), lo, hi - lo, lo, lambda: parameter))
        bits[f"{i}"] = bitmask.pack(kept[lo:hi])
    found = mean_second_moments(shards, bits, Optimizers([optimizer]), Together())  # type: ignore[arg-type]
    return found["0", "exp_avg_sq"]


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_the_mean_does_not_depend_on_the_cut(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator).square() * scale
    kept = torch.rand(1000, generator=generator) < 0.3
    exact = sum(Fraction(v) for v in values[kept].tolist()) / int(kept.sum())
    wanted = mean(values, kept, [])
    assert math.isclose(wanted, exact, rel_tol=1e-7)
    for cuts in ([500], [1, 2, 3], [0, 999], list(range(10, 1000, 10))):
        assert mean(values, kept, cuts) == wanted
    assert mean(values, torch.zeros(1000, dtype=torch.bool), [500]) == 0


@pytest.mark.parametrize("which", ["keep_second", "mean_second"])
def test_an_optimizer_without_second_moments_is_refused(which: str) -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    config: dict[str, Any] = {"sparsity": 0.5, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=rf'regrow_moments="{which}": has no effect with optimizer=SGD, which has no'):
        GaPEngine(model, {**config, "regrow_moments": which}, optimizer=optimizer)


def test_a_sequence_that_is_made_in_a_warm_up_began_as_the_weights() -> None:
    """After a reset a schedule-free optimizer makes z in its next step, in which grown weights are young."""
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)) for _ in range(2))
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    config: dict[str, Any] = {"sparsity": 0.75, "partitions": 2, "rounds": 1, "phase_steps": 2, "finetune_steps": 2}
    config |= {"optimizer_state": "reset", "regrow_warmup_steps": 4}
    engine = GaPEngine(model, config, optimizer=optimizer)
    weight, grown = model[1][0].weight, torch.zeros(64, dtype=torch.bool)
    for step in range(3):
        before = weight.detach().flatten().clone()
        if (mask := engine.mask("1.0.weight")) is not None:
            grown = ~mask
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for block in model:
            x = x + block(x)
        engine.backward(x.square().mean())
        assert weight.grad is not None
        gradient = weight.grad.flatten().clone()
        engine.step()
    z = optimizer.state[weight]["z"].flatten()
    assert grown.any() and engine.mask("1.0.weight") is None
    torch.testing.assert_close((z - before)[grown], -0.1 * gradient[grown] / 4)
