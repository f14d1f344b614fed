"""Values that pruned weights had, for `regrow: last_value`: those of pruned weights alone, in the order of the bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gap_ds.masks import bitmask, packing
from gap_ds.method.config import GaPConfig
from gap_ds.sharding.shard import Shard


class LastValues:
    """The values that this rank's pruned weights had when they were pruned.

    With `regrow_storage: exact` they have the dtype and the device of their weights. With `bf16_cpu` they are rounded
    to bfloat16 once, when their weight is pruned, and lie in host memory.
    """

    def __init__(self, config: GaPConfig) -> None:
        self._rounded = config.regrow_storage == "bf16_cpu"
        #: Of this rank's piece of each sparse entry: values (n,) of its n pruned weights, in ascending order.
        self.packed: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all values on this rank."""
        return sum(values.nbytes for values in self.packed.values())

    def remember(self, shard: Shard, before: Tensor | None, bits: Tensor) -> None:
        """Takes the weights of a piece that a new mask prunes, before they are zeroed. Call it before the mask changes.

        Args:
            before: the mask until now, or None. Values of weights that it has pruned are kept if `bits` prune them too.
        """
        values = shard.weight()
        if before is not None:
            values = self._over(values.clone(), shard.name, before)
        self.packed[shard.name] = self.pack(shard, values, bits)

    def put_back(self, shard: Shard, bits: Tensor, pieces: Iterable[Tensor]) -> None:
        """Gives the weights that a mask has pruned their last values, and forgets these.

        Args:
            pieces: the weights (numel,), and other sequences of them; changed in place.
        """
        for piece in pieces:
            self._over(piece, shard.name, bits)
        del self.packed[shard.name]

    def pack(self, shard: Shard, values: Tensor, bits: Tensor) -> Tensor:
        """Return those of values (numel,) whose weights a mask prunes, as they are held."""
        packed = packing.gather(values, ~bits, values.numel() - bitmask.count(bits))
        weight = shard.weight()
        return packed.to("cpu", torch.bfloat16) if self._rounded else packed.to(weight)

    def whole(self, shard: Shard, bits: Tensor) -> Tensor:
        """Values (numel,) of all weights of a piece, in fp32 or fp64; 0 for those that the mask keeps."""
        packed = self.packed[shard.name].to(bits.device)
        packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
        return packing.spread(packed, ~bits, shard.numel)

    def _over(self, values: Tensor, name: str, bits: Tensor) -> Tensor:
        """Puts the values of an entry over those of its pruned weights, in place."""
        packing.scatter_(values, ~bits, self.packed[name].to(values))
        return values
