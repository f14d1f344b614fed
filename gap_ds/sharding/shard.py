"""Where a rank's piece of each parameter lies.

    parameter (4, 6), on 4 ranks:    | 0 0 0 1 1 1 |    the owner on rank 1, e.g. a flat buffer:
                                     | 0 0 0 1 1 1 |    [ other ... | 3 4 5 9 10 11 | other ... ]
                                     | 2 2 2 3 3 3 |                  ^ offset
                                     | 2 2 2 3 3 3 |

In every backend a rank's piece of a parameter is a box of it (`gap_ds.masks.box`), a range of the flattened parameter
being one, and lies inside one tensor, the owner, that the innermost optimizer updates. So this record is the whole
truth about a backend's geometry, and the same slice of the owner, of its gradient and of its optimizer state is the
weight, the gradient and the moment. A library may hold the same weights a second time, such as in 16 bits for the
forward pass: the shard's `copies`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gap_ds.masks.box import Box
from gap_ds.masks.local import local
from gap_ds.method.names import rows_of, with_rows


@dataclass(frozen=True, eq=False)
class Fixed:
    """A tensor that stays the owner for life, as FSDP2's parameters do; calling it returns the tensor."""

    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor that a dict holds, as a module its parameters; calling it looks it up, None if it is gone."""

    holder: dict[str, Any]
    name: str

    def __call__(self) -> Tensor | None:
        found: Tensor | None = self.holder.get(self.name)
        return found


@dataclass(frozen=True, eq=False)
class Item:
    """A tensor in a list that a library holds; calling it looks up the list, and the tensor in it."""

    of: Callable[[], list[Tensor]]
    index: int

    def __call__(self) -> Tensor:
        return self.of()[self.index]


@dataclass(frozen=True)
class Shard:
    """The box of a flattened parameter is flatten(owner())[offset : offset + numel], on this rank.

    `owner` is asked afresh at every use: libraries replace tensors, and a view kept across steps may stop being the
    weight. Where this rank owns nothing of the parameter, the box is empty and `owner` is not asked.
    `copies` returns the other tensors (numel,) that hold the same weights between two steps.
    `counted`: False if a rank before this one, of those among which pieces are spread, has the same box: each weight
    is counted on one rank.
    `find`: the same as `owner` where that takes long, but None where that raises an error.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    offset: int
    owner: Callable[[], Tensor]
    trainable: bool = True
    copies: Callable[[], Sequence[Tensor]] = tuple
    counted: bool = True
    find: Callable[[], Tensor | None] | None = None

    @classmethod
    def of_range(
        cls,
        name: str,
        shape: tuple[int, ...],
        start: int,
        numel: int,
        offset: int,
        owner: Callable[[], Tensor],
        trainable: bool = True,
    ) -> Shard:
        """Return the shard of flatten(parameter)[start : start + numel]."""
        return cls(name, shape, Box.span(start, numel, math.prod(shape)), offset, owner, trainable)

    @classmethod
    def of_frozen(cls, name: str, parameter: Tensor, rank: int) -> Shard:
        """Return the shard of a frozen parameter that all ranks of a group hold whole; rank 0 of them counts it."""
        found = cls.of_range(name, tuple(parameter.shape), 0, parameter.numel(), 0, Fixed(parameter), trainable=False)
        return replace(found, counted=rank == 0)

    @property
    def numel(self) -> int:
        """Weights of this rank's piece."""
        return self.box.numel

    def of(self, tensor: Tensor) -> Tensor:
        """This piece (numel,) of a tensor that is laid out as the owner; a view."""
        return local(tensor).detach().view(-1)[self.offset : self.offset + self.numel]

    def weight(self) -> Tensor:
        """The weights (numel,), as the optimizer updates them; a view."""
        return self.of(self.owner()) if self.numel else torch.empty(0, device="cpu")

    def rows(self, lo: int, hi: int) -> Shard:
        """The shard of rows lo to hi of the parameter's first dimension, as a parameter by itself; in the same owner.

        A box of a tensor cut along its first dimension is a box, and its elements follow each other in the owner.
        """
        row = math.prod(self.shape[1:])
        box, first = self.box.between(lo * row, hi * row), self.box.before(lo * row)

        def copies() -> tuple[Tensor, ...]:
            return tuple(copy[first : first + box.numel] for copy in self.copies())

        name, shape = with_rows(self.name, lo, hi), (hi - lo, *self.shape[1:])
        return replace(self, name=name, shape=shape, box=box, offset=self.offset + first, copies=copies)

    def part(self, entry: str, piece: Tensor) -> Tensor:
        """The part that an entry of the parameter has of a tensor (numel,) laid out as this piece; a view."""
        if (rows := rows_of(entry)[1]) is None:
            return piece
        own = self.rows(*rows)
        return piece[own.offset - self.offset : own.offset - self.offset + own.numel]

    @property
    def full_numel(self) -> int:
        """Weights of the whole parameter."""
        return math.prod(self.shape)


def of_entries(names: Iterable[str], shards: Iterable[Shard]) -> dict[str, Shard]:
    """This rank's piece of each entry, by name, from its pieces of the parameters; here parameters become entries.

    >>> experts = Shard.of_range("up", (4, 2, 3), 9, 15, 2, torch.Tensor)
    >>> pieces = of_entries(["up[0:2]", "up[2:4]"], [experts])
    >>> [(piece.box.start, piece.numel, piece.offset) for piece in pieces.values()]
    [(9, 3, 2), (0, 12, 5)]
    """
    of_parameter: Mapping[str, Shard] = {shard.name: shard for shard in shards}
    found = {}
    for name in names:
        parameter, rows = rows_of(name)
        found[name] = of_parameter[parameter] if rows is None else of_parameter[parameter].rows(*rows)
    return found
