"""A Triton kernel for masks on a GPU: bits in, zeros out, one pass. `gap_ds.masks` has the same in PyTorch.

Importing this module needs triton, which comes with the CUDA builds of torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Weights of one program.
_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _store_zeros(words: Any, bits: Any, numel: Any, block: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < numel
    byte = tl.load(bits + at // 8, mask=inside, other=255)
    pruned = ((byte >> (at % 8).to(tl.uint8)) & 1) == 0
    # Kept weights are neither read nor written.
    tl.store(words + at, tl.zeros_like(at).to(words.dtype.element_ty), mask=inside & pruned)


def zero_pruned_(words: Tensor, bits: Tensor) -> None:
    """Sets to zero the integers (N,) whose bit is not set; see `gap_ds.masks` for the layout of the bits."""
    numel = words.numel()
    if numel:
        # Triton launches on the current device, wherever its arguments are.
        with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
            _store_zeros[(triton.cdiv(numel, _BLOCK),)](words, bits, numel, block=_BLOCK)
