"""Layers in compressed rows that share one product."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.inference.layers.csr_linear import CSRLinear, no_beta_warning, product, shaped
from gap_ds.inference.layers.linear import is_traced


class JoinedLinear(CSRLinear):
    """A `CSRLinear` that shares one product with other layers that are called right after it with the same input.

    The first layer multiplies the rows of all layers, and each other layer fetches its part. It does so once, and only
    if its input is the tensor that was multiplied, unchanged since (in inference mode, where torch counts no changes:
    if it has equal values). Otherwise it computes its own product. So results equal those of separate layers for any
    order of calls, other inputs, inputs changed in place and calls from several threads. The one exception: a change
    that torch does not count, by `.data` or NumPy, between two of the calls goes unseen. The product is held until all
    parts are fetched or the first layer is called again.
    """

    def __init__(self, layer: nn.Linear | CSRLinear, join: _Join, place: int) -> None:
        nn.Module.__init__(self)
        made = layer if isinstance(layer, CSRLinear) else CSRLinear(layer)
        self.in_features, self.out_features = made.in_features, made.out_features
        self._inputs_first = made._inputs_first
        for name in ("crow", "col", "values"):
            self.register_buffer(name, getattr(made, name), persistent=False)
        self.bias = made.bias
        self._join, self._place = join, place
        self._build()

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                return self.forward(input)
        # A held product has no autograd history, and a compiler would treat it as a constant.
        if is_traced(input):
            return super().forward(input)
        y = self._join.fetch(self._place, input) if self._place else self._join.multiply(input)
        return super().forward(input) if y is None else shaped(y, input)

    def _build(self) -> None:
        super()._build()
        self._join.reset()


class _Join:
    """State shared by joined layers: their rows stacked in one matrix, and the parts not fetched yet."""

    def __init__(self) -> None:
        self.layers: list[JoinedLinear] = []
        self.reset()

    def reset(self) -> None:
        """Drops the stacked matrix; the next product builds it again."""
        self._stack: Tensor | None = None
        self._held: _Held | None = None

    def multiply(self, x: Tensor) -> Tensor | None:
        """Returns the first layer's part and holds the others. None if dtypes, devices or biases no longer agree."""
        stack = self._build() if self._stack is None else self._stack
        biases = [bias for layer in self.layers if (bias := layer.cast_bias()) is not None]
        if stack is None or len(biases) not in (0, len(self.layers)):
            return None
        bias = torch.cat(biases) if biases else None
        first, *others = product(stack, bias, x, [layer.out_features for layer in self.layers])
        held, version = (x.clone(), None) if x.is_inference() else (x, x._version)
        self._held = _Held(held, version, torch.is_inference_mode_enabled(), dict(enumerate(others, start=1)))
        return first

    def fetch(self, place: int, x: Tensor) -> Tensor | None:
        """The held part of the layer at this place; None if it was fetched or made from another input."""
        held = self._held  # read once: another thread may replace it
        if held is None or not held.is_of(x):
            return None
        y = held.left.pop(place, None)
        if not held.left and self._held is held:
            self._held = None
        return y

    def _build(self) -> Tensor | None:
        """Stacks the layers' rows; None if dtypes or devices no longer agree."""
        layers = self.layers
        if len({(layer._matrix.dtype, layer.values.device) for layer in layers}) > 1:
            return None
        with _BUILDING:
            kept = [layer.values.numel() for layer in layers]
            starts = [sum(kept[:i]) for i in range(len(layers))]
            crows = [layers[0].crow[:1], *(layer.crow[1:] + at for layer, at in zip(layers, starts, strict=True))]
            col = torch.cat([layer.col for layer in layers])
            values = torch.cat([layer._matrix.values() for layer in layers])
            size = (sum(layer.out_features for layer in layers), layers[0].in_features)
            with no_beta_warning():
                stack = torch.sparse_csr_tensor(
                    torch.cat(crows), col, values, size, check_invariants=False, device=values.device
                )
            for layer, own_col, own in zip(layers, torch.split(col, kept), torch.split(values, kept), strict=True):
                layer.col = own_col  # a view, so that no weight is stored twice
                layer.values = own if layer.values.dtype == own.dtype else layer.values
                layer._matrix = layer._csr(own)
            self._stack = stack
            return stack

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self.reset()


@dataclass(frozen=True)
class _Held:
    """The product of all joined layers.

    x: the input that was multiplied, kept alive so that no other tensor gets its identity. A copy if it is an
        inference tensor, which has no version.
    version: version counter of x at the product; torch increments it at each change in place. None with a copy.
    inference: True if the product was made in inference mode.
    left: the parts not fetched yet, by place.
    """

    x: Tensor
    version: int | None
    inference: bool
    left: dict[int, Tensor]

    def is_of(self, x: Tensor) -> bool:
        if self.inference != torch.is_inference_mode_enabled():
            return False
        if self.version is not None:
            return self.x is x and x._version == self.version
        return self.x.dtype == x.dtype and self.x.shape == x.shape and torch.equal(self.x, x)


_BUILDING = threading.Lock()


def joined(layers: Sequence[CSRLinear]) -> list[JoinedLinear]:
    """Layers that share one product, to be called in this order. They share their weights with the given ones.

    Raises:
        ValueError: the layers differ in input dimension, dtype or use of a bias, or hold 2^31 weights or more.
    """
    first = layers[0]
    if any((layer.in_features, layer.values.dtype) != (first.in_features, first.values.dtype) for layer in layers):
        raise ValueError("layers that are joined have the same input dimension and dtype.")
    if sum(layer.values.numel() for layer in layers) >= 2**31 or len({layer.bias is None for layer in layers}) > 1:
        raise ValueError("layers that are joined all have a bias or none, and fewer than 2^31 weights.")
    join = _Join()
    join.layers = [JoinedLinear(layer, join, place) for place, layer in enumerate(layers)]
    return join.layers
