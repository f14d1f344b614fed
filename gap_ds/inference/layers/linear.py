"""A linear layer and its input, as all layouts see them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def has_inputs_first(layer: nn.Module) -> bool:
    """True for the `Conv1D` of transformers: GPT-2's linear layer, whose weight is (I, O)."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or of its replacement, without gradient: (O, I)."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight.t() if has_inputs_first(layer) else weight


def is_traced(x: Tensor) -> bool:
    """True if the product needs autograd or a compiler to see it, or is not on a CPU: the loops in C offer neither."""
    if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling() or x.device.type != "cpu":
        return True
    # Forward-mode autograd does not set requires_grad.
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
