"""Small sparse layers and models for the tests of inference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.inference.layers import CSRLinear, Layout, PackedLinear, layout_of


def linear(outputs: int, inputs: int, density: float, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand_like(layer.weight) >= density, 0.0)
    return layer


def network(density: float = 0.1) -> nn.Module:
    return nn.Sequential(linear(48, 32, density), nn.ReLU(), linear(32, 48, density), nn.Linear(32, 5))


def layouts(model: nn.Module) -> list[str]:
    """The layouts of all linear layers, in order."""
    return [layout_of(m) for m in model.modules() if isinstance(m, (nn.Linear, CSRLinear, PackedLinear))]


def times(**seconds: float) -> Any:
    """A `measure` that returns these seconds by layout, for any layers and rows; 9 for layouts not named."""

    def measure(layers: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
        return {layout: seconds.get(layout, 9.0) for layout in layers}

    return measure


def clock(cost: Callable[[nn.Module], float], noise: float = 0.0, seed: int = 0) -> Any:
    """Replaces `timing.seconds`: a run takes the sum of the costs of its modules, times lognormal noise."""
    rng = random.Random(seed)

    def seconds(call: Any, x: Any, device: torch.device) -> float:
        assert isinstance(x, nn.Module)
        return sum(cost(module) for module in x.modules()) * math.exp(rng.gauss(0, noise))

    return seconds


class Attention(nn.Module):
    """q, k and v of one input; k and v of another one if it is given."""

    def __init__(self, density: float = 0.2, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(o, 16, density, bias, seed=o) for o in (24, 8, 8))
        self.out = linear(16, 8, density, bias)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = self.q(x), self.k(other), self.v(other)
        return self.out(q[..., :8] * k + v)
