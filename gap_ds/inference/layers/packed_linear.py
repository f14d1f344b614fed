"""A dense linear layer in the blocked layout of oneDNN, for CPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.inference.layers.linear import has_inputs_first, is_traced, matrix


class PackedLinear(nn.Module):
    """A linear layer with a second copy of its weight, in the blocked layout that oneDNN multiplies fastest.

    The weight itself stays, for the state dict and for tied weights; when it changes, it is packed again. Changes that
    torch does not count, by `.data` or NumPy, go unseen. Under autocast, and where a gradient of the input is wanted,
    the layer acts as the given one.

    Args:
        rows: rows of activations that it usually gets at once. Others give correct results, too.
    """

    def __init__(self, linear: nn.Linear, rows: int = 1) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix(linear).shape
        self._inputs_first, self._rows = has_inputs_first(linear), rows
        self.weight, self.bias = linear.weight, linear.bias
        self.register_load_state_dict_post_hook(_repack)  # type: ignore[no-untyped-call]
        self._build()

    @property
    def _matrix(self) -> Tensor:
        return self.weight.t() if self._inputs_first else self.weight

    def forward(self, input: Tensor) -> Tensor:
        # A compiler cannot lower the packed product, and packs frozen weights itself; autograd has no formula for it.
        if is_traced(input):
            return nn.functional.linear(input, self._matrix, self.bias)
        source, version = self._source
        if self.weight is not source or _version(self.weight) != version:
            self._build()
        packed, is_cast = self._packed, torch.is_autocast_enabled(input.device.type)
        if packed is None or is_cast or input.dtype != packed.dtype or input.numel() == 0:
            return nn.functional.linear(input, self._matrix, self.bias)
        rows = input.reshape(-1, self.in_features)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, self.bias, "none", [], "")
        return y.view(*input.shape[:-1], self.out_features)

    def _build(self) -> None:
        self._packed: Tensor | None = None
        self._source = self.weight, _version(self.weight)
        if self.weight.device.type != "cpu" or self.weight.dtype not in (torch.float32, torch.bfloat16):
            return
        refused = contextlib.suppress(RuntimeError)  # bf16 on a CPU without such products: the layer stays dense
        with refused, torch.no_grad(), torch.inference_mode(False):  # oneDNN takes no inference tensors
            weight = self._matrix.clone() if self.weight.is_inference() else self._matrix.detach()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_source")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _version(weight: Tensor) -> int | None:
    """Number of changes in place; torch does not count those of inference tensors."""
    return None if weight.is_inference() else weight._version


def _repack(layer: PackedLinear, incompatible_keys: object) -> None:
    """A hook for `load_state_dict`, because the versions of inference tensors do not change."""
    layer._build()


def packed(linear: nn.Linear, rows: int) -> nn.Module | None:
    """The layer packed for oneDNN; None where this torch, CPU or dtype has no such product."""
    if linear.weight.numel() == 0:
        return None
    try:
        made = PackedLinear(linear, rows)
        with torch.inference_mode():
            made(linear.weight.new_zeros(2, made.in_features))
        return made if made._packed is not None else None
    except (RuntimeError, AttributeError, NotImplementedError):  # private operators of torch
        return None
