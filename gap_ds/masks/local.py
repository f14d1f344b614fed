"""`local`: the part of a tensor that lies on this rank, which is what masks and optimizer steps work on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The tensor that this rank holds: of a DTensor its local shard, else the tensor itself."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """True for a DTensor. There can be none before their module is loaded, which takes half as long as torch."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
