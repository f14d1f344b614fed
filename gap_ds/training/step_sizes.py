"""Larger steps for sparser entries: the setting `lr_density_power`.

A step of Adam has the same size for a weight of a dense and of a sparse matrix, but a tenth of the weights change a
unit's output a tenth as much. So a learning rate that suits the dense model is too small for what is left of it.
Source: Dey, Bergsma and Hestness, Sparse maximal update parameterization, 2024, arXiv 2405.15743, section 3: Adam's
learning rate in proportion to 1 / density (power 1), for a density that is fixed from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from gap_ds.sharding.shard import Shard


class StepSizes:
    """Multiplies the step that an optimizer takes with an entry by density ** -power.

    All of the step is multiplied, decoupled weight decay included, so for optimizers whose step is proportional to
    their learning rate it is the same as another learning rate for the entry, whatever tensor its piece lies in. While
    an optimizer steps, this takes 4 bytes for each weight of a masked entry.
    """

    def __init__(self, power: float) -> None:
        self._power = power
        #: Of each masked entry; empty with a power of 0.
        self.factors: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}

    def follow(self, densities: Mapping[str, float]) -> None:
        """Takes the densities of the masked entries, which hold until the masks change again."""
        self.factors = {name: density**-self._power for name, density in densities.items() if density > 0}

    def before_update(self, shards: Iterable[Shard]) -> None:
        """Remembers the weights of masked entries before the optimizer steps."""
        self._before = {shard.name: shard.weight().clone() for shard in shards}

    def after_update(self, shards: Iterable[Shard]) -> None:
        """Makes the step that the optimizer has just taken longer."""
        for shard in shards:
            if (before := self._before.pop(shard.name, None)) is not None:
                shard.weight().sub_(before).mul_(self.factors[shard.name]).add_(before)
