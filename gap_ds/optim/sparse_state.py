"""`SparseState`: optimizers whose state for a masked piece of a tensor is held for the kept weights alone.

    owner, 12 weights         w w w w w w w w w w w w       a tensor that the optimizer updates
    pieces                    |  whole  |   masked  |
    mask                                 1 0 0 1 0 0
    state["exp_avg"]          [m m m m m m, m m]             `Packed`: a tensor for each piece, 6 and 2 values

An engine divides an owner into pieces (`divide`) and gives them masks (`change_mask`). Before it does, and for owners
that it does not divide, everything is as in torch's optimizer of the same name: whole state, made at the first step.
Pruned weights must be 0; a step neither reads nor writes them.

`state_dict` returns whole tensors, with zeros where weights are pruned, and `load_state_dict` takes them, so that every
library's checkpoint holds what torch's optimizer would have saved. Loaded state stays whole until the masks that belong
to it are known: until `settle`, or the next step.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gap_ds.masks import bitmask, packing
from gap_ds.masks.local import gradient_of, local
from gap_ds.optim import cpu
from gap_ds.optim.kept import Kept, Mask, Steps, check


@dataclass(frozen=True)
class Piece:
    """A range of an owner's weights, with a mask or without one."""

    start: int
    numel: int
    mask: Mask | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This range (numel,) of a tensor that is laid out as the owner; a view where that is contiguous."""
        return local(tensor).detach().reshape(-1)[self.start : self.start + self.numel]

    def pack(self, values: Tensor) -> Tensor:
        """Return the part of values (numel,) that is held, in a new tensor."""
        return values.clone() if self.mask is None else packing.gather(values, self.mask.bits, self.mask.kept)

    def unpack(self, held: Tensor, fill: float = 0.0) -> Tensor:
        """Values (numel,) from what is held of them; those of pruned weights are `fill`."""
        return held if self.mask is None else packing.spread(held, self.mask.bits, self.numel, fill)

    @property
    def held(self) -> int:
        """Values that are held for each moment."""
        return self.numel if self.mask is None else self.mask.kept


class Packed(list[Any]):
    """State of a divided owner under one name: for each piece the values that are held of it.

    It is no tensor. Libraries that read state as one, such as DeepSpeed's `safe_get_full_optimizer_state` under ZeRO-3,
    get an error that names another way.
    """

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this optimizer state is held for kept weights alone (gap_ds.optim) and is no tensor with {name!r}. Read "
            "optimizer.state_dict(), which has whole tensors, or save a portable checkpoint."
        )


@dataclass(frozen=True)
class Part:
    """The unit that a step updates: a piece of an owner, or an undivided owner.

    weight, grad: tensors of one shape; of a masked piece with its pruned weights. step: a count that the update raises.
    state, index: where the owner's moments are.
    """

    owner: Tensor
    weight: Tensor
    grad: Tensor
    step: Tensor | None
    state: dict[str, Any]
    index: int | None = None
    piece: Piece | None = None

    def moment(self, name: str) -> Tensor | None:
        """A moment, packed if the piece is masked; None before it is made."""
        value: Any = self.state.get(name)
        found: Tensor | None = value if self.index is None or value is None else value[self.index]
        return None if found is None else local(found)

    @property
    def mask(self) -> Mask | None:
        """The mask of its piece, if it has one."""
        return None if self.piece is None else self.piece.mask

    def is_fp32_on(self, device: torch.device) -> bool:
        """True if weights and gradients are, and lie in memory in their order."""
        tensors = self.weight, self.grad
        return all(t.dtype == torch.float32 and t.device == device and t.is_contiguous() for t in tensors)

    def kept(self, names: Iterable[str]) -> Kept:
        """The kept weights of a masked part, with these moments, which have been made."""
        assert self.mask is not None
        return Kept(self.weight, self.grad, self.mask, tuple(self.made(name) for name in names))

    def made(self, name: str) -> Tensor:
        """A moment that has been made."""
        found = self.moment(name)
        assert found is not None
        return found

    def set_moment(self, name: str, value: Tensor) -> None:
        """Puts a moment into the state, if the update has made it."""
        if self.moment(name) is not None:
            return
        if self.index is None:
            self.state[name] = torch.zeros_like(self.owner, memory_format=torch.preserve_format)
            local(self.state[name]).copy_(value)
        else:
            self.state[name][self.index] = value


class SparseState(torch.optim.Optimizer):
    """The base. A subclass names its moments and updates tensors as torch's optimizer of the same name does."""

    #: Names of all state with one value per weight.
    MOMENTS: ClassVar[tuple[str, ...]] = ()

    @functools.cached_property
    def _pieces(self) -> dict[Tensor, list[Piece]]:
        """The pieces of each divided owner, in order; together they are the owner."""
        return {}

    def _first_state(self, owner: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """State of an owner before its first step that is not per weight."""
        raise NotImplementedError

    def _first_moments(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """Names of the moments in a group; True: they begin with zeros, False: the first update makes them."""
        raise NotImplementedError

    def _update(self, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Updates weights, moments and counts of parts without pruned weights."""
        raise NotImplementedError

    def _update_by(self, steps: Steps, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Updates kept weights, moments and counts of masked parts that are fp32 on one device."""
        raise NotImplementedError

    def _update_kept(self, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Updates kept weights, moments and counts of masked parts, the gathered ones of one part at a time."""
        device = parts[0].weight.device
        plain = _plain(group) and all(part.is_fp32_on(device) for part in parts)
        if plain and (steps := _steps(device)) is not None:
            self._update_by(steps, group, parts)
            return
        for part in parts:
            assert part.mask is not None
            at = packing.places(part.mask.bits, part.mask.numel, part.mask.kept)
            packed = replace(part, weight=part.weight[at], grad=part.grad[at])
            self._update(group, [packed])
            part.weight[at] = packed.weight

    # -- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parts = [part for owner in group["params"] if owner.grad is not None for part in self._parts(owner, group)]
            masked = [part for part in parts if part.mask is not None]
            if len(masked) < len(parts):
                self._update(group, [part for part in parts if part.mask is None])
            if masked:
                self._update_kept(group, masked)
        return loss

    def _parts(self, owner: Tensor, group: Mapping[str, Any]) -> Iterator[Part]:
        """All parts of an owner, whose state is made if there is none."""
        gradient = gradient_of(owner)
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError(f"{type(self).__name__} takes no sparse gradients. Use torch.optim.SparseAdam for them.")
        state, pieces = self.state.get(owner) or self._first_state(owner, group), self._pieces.get(owner)
        moments = self._first_moments(group)
        if state or moments:  # torch's optimizers have no empty state: loading takes it for another's
            self.state[owner] = state
        for name, zeros in moments.items():
            if name not in state and pieces is not None:
                like = local(owner)
                state[name] = Packed(like.new_zeros(piece.held) if zeros else None for piece in pieces)
            elif name not in state and zeros:
                state[name] = torch.zeros_like(owner, memory_format=torch.preserve_format)
        step = state.get("step")
        if pieces is None:
            yield Part(owner, local(owner).detach(), local(gradient).detach(), step, state)
            return
        self._settle(owner)
        for i, piece in enumerate(pieces):
            # The update counts for each part; the last one counts for the owner.
            count = step if step is None or i == len(pieces) - 1 else step.clone()
            yield Part(owner, piece.of(owner), piece.of(gradient), count, state, i, piece)

    # -- what an engine calls --------------------------------------------------------------------------------------

    def divide(self, owner: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        """Divides an owner into ranges (start, numel) of its flattened local part, and what lies between them.

        Each range may get a mask, by `change_mask`. Ranges do not overlap.
        """
        pieces, end = list[Piece](), 0
        for start, numel in sorted(ranges):
            pieces += [Piece(end, start - end)] if start > end else []
            pieces.append(Piece(start, numel))
            end = start + numel
        rest = local(owner).numel() - end
        self._pieces[owner] = [*pieces, Piece(end, rest)] if rest else pieces
        self._settle(owner)

    def divides(self, owner: Tensor) -> bool:
        """True for an owner that an engine has divided, and not released."""
        return owner in self._pieces

    def release(self) -> None:
        """Takes all masks and divisions off: all state is whole, with zeros where weights are pruned."""
        for owner in self._pieces:
            if owner in self.state:
                self.state[owner] = self._whole(owner, self.state[owner])
        self._pieces.clear()

    @torch.no_grad()
    def change_mask(
        self, owner: Tensor, start: int, bits: Tensor | None, first: Mapping[str, float] | None = None
    ) -> None:
        """Gives a range of a divided owner another mask, or none.

        Args:
            start: of a range of `divide`.
            first: the value that each moment has of weights that only the new mask keeps, by default 0. None: state
                that was loaded and is still whole belongs to the new mask, and is taken as it is.
        """
        index, piece = next((i, p) for i, p in enumerate(self._pieces[owner]) if p.start == start)
        changed = replace(piece, mask=None if bits is None else Mask(bits, piece.numel, bitmask.count(bits)))
        for name, value in self._moments_of(owner):
            if isinstance(value, Tensor):
                if first is not None and piece.mask is not None:
                    piece.of(value)[~bitmask.unpack(piece.mask.bits, piece.numel)] = first.get(name, 0.0)
            elif value[index] is not None:
                whole = piece.unpack(value[index], (first or {}).get(name, 0.0))
                value[index] = whole if bits is None else changed.pack(whole)
        self._pieces[owner][index] = changed

    def settle(self) -> None:
        """Packs state that was loaded and is still whole, by the masks as they are now."""
        for owner in self._pieces:
            self._settle(owner)

    def bits(self, owner: Tensor, start: int) -> Tensor | None:
        """The mask of the range that begins there; None without one, and of an owner that is not divided."""
        found = next((piece.mask for piece in self._pieces.get(owner, ()) if piece.start == start), None)
        return None if found is None else found.bits

    def values(self, owner: Tensor, start: int, numel: int) -> Iterator[tuple[str, Tensor]]:
        """Name and values (numel,) of each moment in a part of an owner, sorted by name; 0 where weights are pruned.

        They are views, or copies if a part of them is masked or they lie in several ranges: a parameter does whose rows
        are several entries. Of an owner that is not divided there are none.
        """
        pieces, end = self._pieces.get(owner, []), start + numel
        self._settle(owner)
        first, last = (bisect.bisect(pieces, at, key=lambda piece: piece.start) for at in (start, end - 1))
        for name, value in self._moments_of(owner) if pieces else []:
            parts = [
                piece.unpack(held)[max(start - piece.start, 0) : end - piece.start]
                for piece, held in zip(pieces[first - 1 : last], value[first - 1 : last], strict=True)
                if held is not None
            ]
            if parts:
                yield name, parts[0] if len(parts) == 1 else torch.cat(parts)

    def _moments_of(self, owner: Tensor) -> list[tuple[str, Any]]:
        """Name and value, whole or a list of what is held of each piece, of the moments of an owner that has any."""
        state = self.state.get(owner, {})
        return [(name, state[name]) for name in sorted(self.MOMENTS) if state.get(name) is not None]

    @torch.no_grad()
    def _settle(self, owner: Tensor) -> None:
        for name, value in self._moments_of(owner) if owner in self._pieces else []:
            if isinstance(value, Tensor):
                self.state[owner][name] = Packed(piece.pack(piece.of(value)) for piece in self._pieces[owner])

    # -- state as torch's optimizer has it -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state dict of torch's optimizer of the same name: whole tensors, 0 where weights are pruned."""
        held = self.state
        self.state = defaultdict(dict, {owner: self._whole(owner, state) for owner, state in held.items()})
        try:
            return super().state_dict()
        finally:
            self.state = held

    def __getstate__(self) -> dict[str, Any]:
        whole = {owner: self._whole(owner, state) for owner, state in self.state.items()}
        return {**super().__getstate__(), "state": defaultdict(dict, whole)}

    @torch.no_grad()
    def _whole(self, owner: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(state)
        for name, value in state.items():
            if name in self.MOMENTS and isinstance(value, list):
                found[name] = None
                if all(held is not None for held in value):
                    found[name] = torch.zeros_like(owner, requires_grad=False)
                    for piece, held in zip(self._pieces[owner], value, strict=True):
                        piece.of(found[name]).copy_(piece.unpack(held))
        return found


def _steps(device: torch.device) -> Steps | None:
    """The steps over kept weights in fp32 on this device, other than PyTorch's operations; None if there are none."""
    return cpu.loops() if device.type == "cpu" else kernels(device)


@functools.cache
def kernels(device: torch.device) -> Steps | None:
    """Triton's kernels if they compile and agree with PyTorch on this device up to rounding; otherwise None.

    The first call tests them, for which the host waits. A kernel that fails the test is reported by a warning.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        found: Steps = importlib.import_module("gap_ds.optim.triton").Kernels()
        check(found, device, lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6))
    except Exception as error:  # compilers fail in many ways, and PyTorch can take over
        warnings.warn(f"triton's steps are not used on {device}: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return found


def _plain(group: Mapping[str, Any]) -> bool:
    """True if no setting of a parameter group is a tensor, or asks for a way of computing that torch has."""
    ways = ("fused", "capturable", "differentiable")
    settings = [value for key, value in group.items() if key != "params"]
    numbers = [number for value in settings for number in (value if isinstance(value, tuple) else (value,))]
    return not any(group.get(way) for way in ways) and not any(isinstance(number, Tensor) for number in numbers)
