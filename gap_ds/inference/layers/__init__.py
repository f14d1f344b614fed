"""The layouts of a linear layer for inference: modules that replace an `nn.Linear` or a `Conv1D` of transformers.

    csr     CPU: compressed rows with 32-bit indices, multiplied in fp32 or fp64 (bf16 and fp16 weights in fp32)
    joined  CPU: csr layers that are called one after the other with one input (q, k and v) share one product
    packed  CPU: dense in the blocked layout of oneDNN, as torch.compile packs the weights of a frozen model; useful
            for layers that are not sparse, too, such as the output projection
    2:4     NVIDIA GPU of capability 8.0 or later: semi-structured, for weights that have the pattern

I input dimension, O output dimension, R rows of activations. `tuning` chooses the fastest layout.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from gap_ds.inference.layers.csr_linear import CSRLinear, csr
from gap_ds.inference.layers.joined_linear import JoinedLinear, joined
from gap_ds.inference.layers.linear import has_inputs_first, matrix
from gap_ds.inference.layers.packed_linear import PackedLinear, packed
from gap_ds.inference.layers.semi_structured_linear import is_2_of_4, semi_structured

__all__ = [
    "LAYOUTS",
    "CSRLinear",
    "JoinedLinear",
    "Layout",
    "PackedLinear",
    "csr",
    "has_inputs_first",
    "is_2_of_4",
    "joined",
    "layout_of",
    "matrix",
    "packed",
    "semi_structured",
]

Layout = Literal["dense", "packed", "csr", "joined", "2:4"]
LAYOUTS: tuple[Layout, ...] = ("dense", "packed", "csr", "joined", "2:4")


def layout_of(layer: nn.Module) -> Layout:
    """The layout of a linear layer or of its replacement."""
    if isinstance(layer, JoinedLinear):
        return "joined"
    if isinstance(layer, CSRLinear):
        return "csr"
    if isinstance(layer, PackedLinear):
        return "packed"
    return "2:4" if isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor) else "dense"
