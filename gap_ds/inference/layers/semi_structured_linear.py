"""A linear layer with a semi-structured (2:4) weight, for NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gap_ds.inference.layers.linear import matrix


def is_2_of_4(weight: Tensor) -> bool:
    """True if at most 2 of every 4 neighbours along the input dimension of a weight (O, I) are nonzero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return not bool(((weight != 0).reshape(-1, 4).sum(dim=1) > 2).any())


class SemiStructuredLinear(nn.Linear):
    """A linear layer whose weight is semi-structured (2:4).

    torch's product of such weights takes the rows of its input for neighbours in memory, whatever its strides are, and
    refuses an input that is no view of rows, such as a transposed one. It has no product of nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features, dtype=self.weight.dtype)
        return super().forward(input.contiguous())


def semi_structured(linear: nn.Linear) -> nn.Module | None:
    """The layer with a semi-structured weight; None if its pattern, dtype, sizes or device do not allow it."""
    weight = matrix(linear)
    if not weight.is_cuda or torch.version.cuda is None or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return None
    if weight.dtype not in (torch.float16, torch.bfloat16) or not is_2_of_4(weight):
        return None
    try:
        made = SemiStructuredLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.contiguous()), requires_grad=False)
        made.bias = linear.bias
        made.eval()(weight.new_zeros(2, weight.shape[1]))
        return made
    except (RuntimeError, NotImplementedError, ValueError):  # the only way to ask torch which sizes it takes
        return None
