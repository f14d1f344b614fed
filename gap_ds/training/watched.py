"""Looks between two updates: changes of weights, told without reading them, and parts of them to read in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

from torch import Tensor

from gap_ds.masks.local import locals_of

#: Updates in which all pruned weights are looked at, a part of them before each; and the least weights of a part.
_ROUND, _PART = 32, 2**14
_VERSION = attrgetter("_version")


class Watched:
    """Tensors that hold weights, with PyTorch's count of in-place changes and the address of each.

    PyTorch does not count changes through a parameter's `data`, nor those by CUDA graphs.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._locals = locals_of(tensors)
        self._addresses = list(map(Tensor.data_ptr, self._locals()))
        self.mark()

    def mark(self) -> None:
        """Remembers the tensors as they are now; the addresses are those that `changed` saw last."""
        self._versions = list(map(_VERSION, self._locals()))

    @property
    def first_version(self) -> int:
        """The count of the first tensor, as `mark` has seen it; 0 if there are none."""
        return self._versions[0] if self._versions else 0

    def changed(self) -> bool:
        """True if some tensor may have changed since `mark`, or was moved since the last call."""
        tensors = self._locals()
        before, self._addresses = self._addresses, list(map(Tensor.data_ptr, tensors))
        return before != self._addresses or list(map(_VERSION, tensors)) != self._versions


class Parts:
    """Parts of all pruned weights, to look at one before each update.

    A round takes `_ROUND` updates, or fewer if weights are few. Entries of which anything is on a device, where a look
    would make the host wait, and those that a phase shorter than a round leaves, come before the update ahead of the
    next change of masks.

    Args:
        pieces: this rank's pieces of the masked entries, each with its copies: offloaded weights have some on a device.
    """

    def __init__(self, pieces: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        pieces = pieces or {}
        self._left = dict.fromkeys(pieces)  # not looked at since masks changed
        on_host = {name: all(piece.device.type == "cpu" for piece in held) for name, held in pieces.items()}
        turns = {name: held[0].numel() for name, held in pieces.items() if on_host[name]}
        size = max(_PART, -(-sum(turns.values()) // _ROUND))
        self._parts: deque[list[str]] = deque()
        filled = size
        for name, numel in turns.items():
            if filled >= size:
                self._parts.append([])
                filled = 0
            self._parts[-1].append(name)
            filled += numel

    def next(self, rest: bool) -> list[str]:
        """The entries to look at now; `rest`: all that this phase has left."""
        found = self._parts[0] if self._parts else []
        self._parts.rotate(-1)
        for name in found if self._left else ():
            self._left.pop(name, None)
        if rest:
            found = [*found, *self._left]
            self._left = {}
        return found
