"""The part of a tensor that lies on this rank, which is what masks and optimizer steps work on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor

_LOCAL = attrgetter("_local_tensor")  # `to_local` under autograd takes 50 times as long


def local(tensor: Tensor) -> Tensor:
    """The tensor that this rank holds: of a DTensor its local shard, else the tensor itself."""
    shard: Tensor = _LOCAL(tensor) if _is_dtensor(tensor) else tensor
    return shard


def gradient_of(tensor: Any) -> Tensor | None:
    """The gradient of a tensor, laid out as the tensor is. All ranks of a DTensor's mesh must call this.

    Where each rank computes with another part of the batch or of a sequence, torch leaves the gradient of a replicated
    DTensor as one summand on each rank.
    """
    gradient = tensor.grad
    if gradient is not None and _is_dtensor(gradient) and gradient.placements != tensor.placements:
        gradient = gradient.redistribute(placements=tensor.placements)
    found: Tensor | None = gradient
    return found


def locals_of(tensors: Iterable[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a call that looks up the `local` tensor of each, as it is then; those of DTensors come last."""
    listed = list(tensors)
    spread = [tensor for tensor in listed if _is_dtensor(tensor)]
    whole = [tensor for tensor in listed if not _is_dtensor(tensor)] if spread else listed
    return (lambda: [*whole, *map(_LOCAL, spread)]) if spread else (lambda: whole)


def _is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor. There can be none before their module is loaded, which takes half as long as torch."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
