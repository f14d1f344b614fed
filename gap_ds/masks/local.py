"""`local`: the part of a tensor that lies on this rank, which is what masks and optimizer steps work on."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The tensor that this rank holds: of a DTensor its local shard, else the tensor itself."""
    # There can be no DTensor before their module is loaded, which takes half as long as torch.
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        shard: Tensor = tensor.to_local()
        return shard
    return tensor
