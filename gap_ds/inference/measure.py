"""Seconds of linear layers in each layout that they can have, measured alone on this machine.

The layers of a group are called in turn, so that no layer's weights stay in the cache, as in a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gap_ds.inference import layers, timing
from gap_ds.inference.layers import CSRLinear, JoinedLinear, Layout
from gap_ds.inference.usage import Group

#: (the same layers in each layout, rows R) -> seconds of one call in each layout.
Measure: TypeAlias = Callable[[Mapping[Layout, Sequence[nn.Module]], int], Mapping[Layout, float]]

#: Layers that are called in turn; calls in each layout at most; seconds after which three calls are enough.
_LAYERS, _CALLS, _SECONDS = 12, 60, 0.5

#: Results of `measure_layers`, kept for the life of the process. Clear it to measure again.
MEASURED: dict[Any, Mapping[Layout, float]] = {}


def candidates(group: Group, wanted: str) -> dict[Layout, list[nn.Module]]:
    """The layers of a group as they are ("dense") and in each other layout that all of them can have.

    Args:
        wanted: the one layout to try, or "auto" for all.
    """
    linears = list(group.layers.values())
    builders: dict[Layout, Callable[[nn.Linear], nn.Module | None]] = {
        "packed": lambda layer: layers.packed(layer, group.usual_rows)
    }
    if group.kind.is_sparse:
        builders |= {"csr": layers.csr, "2:4": layers.semi_structured}
    found: dict[Layout, list[nn.Module]] = {"dense": [*linears]}
    for layout, build in builders.items():
        if wanted in ("auto", layout):
            made = [made for layer in linears if (made := build(layer)) is not None]
            if len(made) == len(linears):
                found[layout] = made
    return found


@dataclass(frozen=True)
class Times:
    """Seconds that all calls of all layers of a group take in a run, by layout.

    best: the fastest layout other than dense.
    layers: the layers in that layout.
    """

    seconds: Mapping[Layout, float]
    best: Layout
    layers: Sequence[nn.Module]

    @property
    def saving(self) -> float:
        return self.seconds["dense"] - self.seconds[self.best]


def time_group(
    group: Group, made: Mapping[Layout, Sequence[nn.Module]], inference: bool, measure: Measure | None
) -> Times:
    """Times the candidates with the rows that the group sees.

    Args:
        made: a result of `candidates` with at least one layout besides "dense".
        inference: the layers are called in inference mode; part of the key in `MEASURED`.
        measure: used in place of `measure_layers`; its results are not kept.
    """
    count = len(group.layers)
    totals = dict.fromkeys(made, 0.0)
    for rows, calls in group.loads:
        key = (group.kind, group.usual_rows, count, rows, inference, tuple(made))
        found = _measured(key, made, rows, measure)
        for layout in totals:
            totals[layout] += count * calls * found[layout]
    best = min((layout for layout in made if layout != "dense"), key=lambda layout: totals[layout])
    return Times(totals, best, made[best])


def time_joined(
    sets: Sequence[Sequence[CSRLinear]],
    joined: Sequence[Sequence[JoinedLinear]],
    groups: Sequence[Group],
    inference: bool,
    measure: Measure | None,
) -> float:
    """Seconds of sets of joined layers over those of the same layers apart; infinity if the latter take no time.

    Args:
        sets: alike sets of layers that are called one after the other.
        joined: the same, joined.
        groups: the group of each layer of a set.
    """
    made: dict[Layout, list[nn.Module]] = {
        "csr": [_InTurn(one) for one in sets],
        "joined": [_InTurn(one) for one in joined],
    }
    apart = together = 0.0
    alike = tuple((group.kind, group.loads) for group in groups)
    for rows, calls in groups[0].loads:
        found = _measured((alike, len(sets), rows, inference, "joined"), made, rows, measure)
        apart, together = apart + calls * found["csr"], together + calls * found["joined"]
    return together / apart if apart > 0 else float("inf")


class _InTurn(nn.Module):
    """Layers that are called one after the other with the same input and timed as one."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def weight(self) -> Any:
        return self.members[0].weight

    def forward(self, x: Tensor) -> None:
        for layer in self.members:
            layer(x)


def _measured(
    key: tuple[Any, ...], made: Mapping[Layout, Sequence[nn.Module]], rows: int, measure: Measure | None
) -> Mapping[Layout, float]:
    if measure is not None:
        return measure(made, rows)
    key = (*key, torch.get_num_threads())
    if key not in MEASURED:
        MEASURED[key] = measure_layers(made, rows)
    return MEASURED[key]


def measure_layers(made: Mapping[Layout, Sequence[nn.Module]], rows: int) -> dict[Layout, float]:
    """Median seconds of a call with `rows` rows, by layout. Layouts alternate, so that other load affects all alike."""
    weight = layers.matrix(next(iter(made.values()))[0])
    # Not torch's global generator: a seeded run must not depend on what was measured before it.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator, device="cpu").to(weight.device, weight.dtype)
    seconds: dict[Layout, list[float]] = {layout: [] for layout in made}
    with torch.no_grad():
        for modules in made.values():
            modules[0](x)
        begin = time.perf_counter()
        for done in range(_CALLS):
            if done >= 3 and time.perf_counter() - begin > _SECONDS:
                break
            for layout, modules in made.items():
                seconds[layout].append(timing.seconds(modules[done % min(len(modules), _LAYERS)], x, x.device))
    return {layout: statistics.median(times) for layout, times in seconds.items()}
