"""Use of linear layers in a model: those that may be replaced, the rows that each sees, and groups that are alike."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gap_ds.inference.layers import has_inputs_first, matrix

#: Distinct row counts of a layer that are measured exactly. If a run shows more, they are rounded to powers of two.
_SIZES = 8


@dataclass(frozen=True)
class Usage:
    """Calls of linear layers in one run.

    rows: for each layer, its calls by their number of rows R.
    shared: names of layers of one parent that were always called one after the other with the same tensor.
    inference: True if the layers were called in inference mode.
    seconds: duration of the run.
    """

    rows: Mapping[str, Counter[int]]
    shared: tuple[tuple[str, ...], ...] = ()
    inference: bool = False
    seconds: float = 0.0

    def mode(self) -> AbstractContextManager[None]:
        """The mode in which the layers were called: inference mode and no_grad differ in the cost of a call."""
        return torch.inference_mode() if self.inference else torch.no_grad()


class Kind(NamedTuple):
    """Properties shared by the layers of a group; part of the key of a measurement. density: to two decimals."""

    outputs: int
    inputs: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    inputs_first: bool
    is_sparse: bool
    density: float


@dataclass(frozen=True, eq=False)
class Group:
    """Layers of one kind with the same calls, which are measured and replaced together.

    densities: fraction of nonzero weights, by name.
    loads: (rows, calls) of each layer; empty if the run never called it.
    """

    kind: Kind
    layers: Mapping[str, nn.Linear]
    densities: Mapping[str, float]
    loads: tuple[tuple[int, int], ...]

    @property
    def usual_rows(self) -> int:
        """The most frequent number of rows; 1 if the layers were never called."""
        return max(self.loads, key=lambda load: load[1])[0] if self.loads else 1

    @property
    def multiplications(self) -> int:
        """Dense multiplications of all calls of all layers."""
        weights = len(self.layers) * self.kind.outputs * self.kind.inputs
        return weights * sum(rows * calls for rows, calls in self.loads)


def replaceable(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may be replaced, by name. A layer with several names has its first.

    GPT-2's Conv1D is one of them: weight and bias mean the same, see `layers.matrix`.
    """
    found: dict[nn.Linear, str] = {}
    for prefix, parent in model.named_modules():
        # These pass their children's weights to a fused kernel and never call the children's forward.
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            continue
        for name, child in parent._modules.items():
            # A subclass, a hook or a patched forward may compute something else.
            is_known = type(child) is nn.Linear or (child is not None and has_inputs_first(child))
            if not is_known or child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__:
                continue
            if _is_plain(child.weight):
                found.setdefault(cast("nn.Linear", child), f"{prefix}.{name}" if prefix else name)
    return {name: layer for layer, name in found.items()}


def _is_plain(weight: object) -> bool:
    """False for quantized, 8-bit and sharded weights: they lack operations, and other code knows what they mean."""
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return False
    return weight.is_floating_point() and weight.itemsize > 1


def observe(model: nn.Module, layers: Mapping[str, nn.Linear], run: Callable[[nn.Module], object]) -> Usage:
    """Runs the model once and records the calls of these layers."""
    recorder = _Recorder(layers)
    begin = time.perf_counter()
    hooks = [layer.register_forward_pre_hook(recorder.hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():  # as `generate` does; a run may enter inference mode itself
            run(model)
    finally:
        for handle in hooks:
            handle.remove()
    return recorder.usage(time.perf_counter() - begin)


class _Recorder:
    """Collects the calls of a run. A streak is a series of calls with one tensor below one parent."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self._rows: dict[str, Counter[int]] = {name: Counter() for name in names}
        self._calls: Counter[str] = Counter()
        # The current streak of each parent. Its tensor is kept alive so that no other tensor gets its identity.
        self._current: dict[str, tuple[Tensor, list[str]]] = {}
        self._streaks: Counter[tuple[str, ...]] = Counter()
        self._inference = False

    def hook(self, name: str) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self._record(name, args[0] if args else next(iter(kwargs.values())))

        return before

    def _record(self, name: str, x: Tensor) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._calls[name] += 1
        if rows := math.prod(x.shape[:-1]):
            self._rows[name][rows] += 1
        parent = name.rpartition(".")[0]
        last, names = self._current.get(parent, (None, []))
        if last is x and name not in names:
            names.append(name)
            return
        self._streaks[tuple(names)] += 1
        self._current[parent] = x, [name]

    def usage(self, seconds: float) -> Usage:
        streaks = self._streaks + Counter(tuple(names) for _, names in self._current.values())
        shared = [s for s, n in streaks.items() if len(s) > 1 and all(self._calls[name] == n for name in s)]
        rows = {name: calls if len(calls) <= _SIZES else _rounded(calls) for name, calls in self._rows.items()}
        return Usage(rows, tuple(shared), self._inference, seconds)


def _rounded(calls: Counter[int]) -> Counter[int]:
    """Calls by their number of rows, rounded up to a power of two.

    >>> _rounded(Counter({1: 2, 5: 1, 8: 3}))
    Counter({8: 4, 1: 2})
    """
    rounded: Counter[int] = Counter()
    for rows, count in calls.items():
        rounded[1 << (rows - 1).bit_length()] += count
    return rounded


def group_alike(layers: Mapping[str, nn.Linear], usage: Usage, min_sparsity: float) -> list[Group]:
    """Groups the layers by kind and calls, in the order of their first layers."""
    members: dict[tuple[Kind, tuple[tuple[int, int], ...]], dict[str, float]] = {}
    for name, layer in layers.items():
        weight = matrix(layer)
        density = int(torch.count_nonzero(weight)) / max(1, weight.numel())
        is_sparse = density <= 1 - min_sparsity
        outputs, inputs = weight.shape
        kind = Kind(
            outputs,
            inputs,
            weight.dtype,
            weight.device,
            layer.bias is not None,
            has_inputs_first(layer),
            is_sparse,
            round(density, 2),
        )
        loads = tuple(sorted(usage.rows[name].items()))
        members.setdefault((kind, loads), {})[name] = density
    return [
        Group(kind, {name: layers[name] for name in densities}, densities, loads)
        for (kind, loads), densities in members.items()
    ]
