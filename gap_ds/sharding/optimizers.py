"""The optimizers of a run: which tensors they update, and their state of each, by its meaning (`meanings.py`)."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gap_ds.masks.local import local
from gap_ds.optim.sparse_state import SparseState
from gap_ds.sharding.meanings import KNOWN, USUAL, Kinds, Meaning
from gap_ds.sharding.shard import Shard

#: Where optimizers count in a parameter group: steps, and schedule-free's sums of its averaging.
_COUNTERS = ("step", "k", "weight_sum", "lr_max")
#: Optimizers that have stepped, or whose loaded state had. Some have no state that would show it, such as plain SGD.
_USED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Optimizers(Sequence[torch.optim.Optimizer]):
    """The innermost optimizers of a run, in the order given. An update is complete when each of them has stepped.

    Args:
        members: those whose `step` changes the weights.
        held: ids of the tensors that they update, where their parameter groups do not list them between steps.
        stepped: whether training has begun, where the state of the members does not tell.
        meanings: by state name, for optimizers that the table does not know.
    """

    def __init__(
        self,
        members: Sequence[torch.optim.Optimizer],
        *,
        held: Callable[[], set[int]] | None = None,
        stepped: Callable[[], bool] | None = None,
        meanings: Mapping[str, Meaning] | None = None,
    ) -> None:
        self._members = tuple(members)
        self._held, self._stepped = held, stepped
        given = dict(meanings or {})
        if unknown := sorted({str(v) for v in given.values()} - {"moment", "sequence", "other"}):
            raise ValueError(f"optimizer_state={unknown[0]!r}: must be moment, sequence or other.")
        self._given = Kinds(
            {name: 0.0 for name, meaning in given.items() if meaning == "moment"},
            tuple(name for name, meaning in given.items() if meaning == "sequence"),
            tuple(name for name, meaning in given.items() if meaning == "other"),
        )
        #: True while a step is none of the training's: hooks ignore it.
        self.quiet = False
        self._first_counters = [[_counters(optimizer, group) for group in optimizer.param_groups] for optimizer in self]
        #: Of each member, the state that it made when it was built, as a few do, and that its step relies on.
        self._built = [{} if optimizer in _USED else _first_state(optimizer) for optimizer in self]

    @property
    def used(self) -> bool:
        """True once a step was seen, by this or an earlier engine, or state of a run that had stepped was loaded."""
        return any(optimizer in _USED for optimizer in self._members)

    @used.setter
    def used(self, used: bool) -> None:
        (_USED.update if used else _USED.difference_update)(self)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        return self._members[index]

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all members."""
        return [group for optimizer in self for group in optimizer.param_groups]

    def held(self) -> set[int]:
        """The ids of all tensors that some member updates."""
        if self._held is not None:
            return self._held()
        return {id(p) for group in self.groups() for p in group["params"]}

    @property
    def names(self) -> str:
        """The class names of the members, for messages."""
        return ", ".join(type(optimizer).__name__ for optimizer in self)

    @property
    def moment_names(self) -> set[str]:
        """Names of the moments that members may have."""
        return {name for optimizer in self for name in self._kinds(optimizer).moments}

    @functools.cached_property
    def has_sequences(self) -> bool:
        """True if a member keeps another sequence of the weights, which must be masked after each update, too."""
        return any(self._kinds(optimizer).sequences for optimizer in self)

    @property
    def stepped(self) -> bool:
        """True once an optimizer has updated weights, here or before its state was loaded."""
        if self._stepped is not None:
            return self._stepped()
        lazy = [optimizer for optimizer, built in zip(self, self._built, strict=True) if not built]
        return self.used or any(_has_stepped(state) for optimizer in lazy for state in optimizer.state.values())

    def alike(self, names: Sequence[str], same_class: bool) -> bool:
        """True if optimizers of other class names have state of the same meaning, in the same order.

        Args:
            same_class: the class names must be the same; else a library's own variant will do (AdamW, FusedAdam).
        """
        own = [type(optimizer).__name__ for optimizer in self]
        pairs = list(zip(own, names, strict=False))
        equal = all(a == b or (not same_class and KNOWN.get(a, a) is KNOWN.get(b, b)) for a, b in pairs)
        return equal and len(own) == len(names)

    # -- state of one tensor ---------------------------------------------------------------------------------------

    def holder(self, owner: Tensor) -> torch.optim.Optimizer:
        """The member that has state for a tensor, or else lists it, or else the first."""
        for optimizer in self:
            if optimizer.state.get(owner):
                return optimizer
        listed = (o for o in self for group in o.param_groups if any(p is owner for p in group["params"]))
        found: torch.optim.Optimizer = next(listed, self[0])
        return found

    def state(self, owner: Tensor) -> dict[str, Any]:
        """The state that the members have for a tensor; empty before its first step."""
        for optimizer in self:
            if found := optimizer.state.get(owner):
                return dict(found)
        return {}

    def per_weight(self, shard: Shard) -> dict[str, Tensor]:
        """This rank's piece (numel,) of all state with one value per weight, by name; views, of packed state copies."""
        return {name: piece for name, piece, _ in self._per_weight(shard)}

    def moments(self, shard: Shard) -> Iterator[tuple[str, Tensor, float]]:
        """The name, this rank's piece (numel,), and the first value of each moment, sorted by name.

        Pieces are views; of packed state they are copies, with 0 where weights are pruned. Libraries that load an
        optimizer's state put it back in any order, another one on every rank.
        """
        for name, piece, kinds in self._per_weight(shard):
            if (first := kinds.moments.get(name)) is not None:
                yield name, piece, first(self._group(shard.owner())) if callable(first) else first

    def sequences(self, shard: Shard) -> Iterator[Tensor]:
        """This rank's piece (numel,) of every other sequence of the weights; views."""
        if not self.has_sequences or shard.numel == 0:
            return iter(())
        return (shard.of(tensor) for tensor in self.sequence_tensors(shard.owner()))

    def sequence_tensors(self, owner: Tensor) -> list[Tensor]:
        """Every other sequence of the weights in a tensor, laid out as it is."""
        for optimizer in self if self.has_sequences else ():
            if state := optimizer.state.get(owner):
                return [state[name] for name in self._kinds(optimizer).sequences if _as_large(state.get(name), owner)]
        return []

    def _per_weight(self, shard: Shard) -> Iterator[tuple[str, Tensor, Kinds]]:
        if shard.numel == 0:
            return
        owner = shard.owner()
        holder = self.holder(owner)
        kinds = self._kinds(holder)
        if isinstance(holder, SparseState):
            yield from ((name, value, kinds) for name, value in holder.values(owner, shard.offset, shard.numel))
        for name, value in sorted(self.state(owner).items()):
            if _as_large(value, owner) and kinds.of(name) in ("moment", "sequence"):
                yield name, shard.of(value), kinds

    def _kinds(self, optimizer: torch.optim.Optimizer) -> Kinds:
        """Meaning of the state of a member: by the user's word, else by the table, a class before its bases."""
        tables = [KNOWN[cls.__name__] for cls in type(optimizer).__mro__ if cls.__name__ in KNOWN]
        return functools.reduce(Kinds.over, [self._given, *(tables or [USUAL])])

    def _group(self, owner: Tensor) -> Mapping[str, Any]:
        groups = self.holder(owner).param_groups
        return next((group for group in groups if any(p is owner for p in group["params"])), groups[0])

    def check_state(self, shards: Iterable[Shard]) -> None:
        """Checks that the meaning of all state of some pieces is known; call it once there is state.

        Raises:
            ValueError: a state tensor that may be per weight is not in the table, or is quantized; or state belongs to
                no parameter.
        """
        for optimizer in self:
            _check_keys(optimizer)
        for shard in shards:
            if shard.numel:
                self._check_state_of(shard)

    def _check_state_of(self, shard: Shard) -> None:
        owner = shard.owner()
        optimizer = self.holder(owner)
        if isinstance(optimizer, SparseState):
            return
        kinds = self._kinds(optimizer)
        unknown = []
        for name, value in self.state(owner).items():
            if kinds.of(name) == "other" or not any(_per_weight(part, owner) for part in _tensors(value)):
                continue
            if not isinstance(value, Tensor) or not _plain(value) or not _as_large(value, owner):
                raise ValueError(
                    f"optimizer={type(optimizer).__name__}: its state {name!r} of {shard.name} is quantized or of a "
                    f"special kind ({_describe(value)}), where the value of one weight cannot be cleared. Use an "
                    "optimizer with 16- or 32-bit state; if nothing in it is the value of one weight, pass "
                    f'optimizer_state={{"{name}": "other"}}.'
                )
            if kinds.of(name) is None:
                unknown.append(name)
        if unknown:
            given = ", ".join(f'"{name}": "moment"' for name in unknown)
            raise ValueError(
                f"optimizer={type(optimizer).__name__}: its state {', '.join(map(repr, unknown))} of {shard.name} is "
                f"as large as the weights, and its meaning is not known. Pass optimizer_state={{{given}}}, with "
                '"moment" for what has one value per weight that starts at 0, "sequence" for another sequence of the '
                'weights, "other" for what is neither.'
            )

    # -- all state -------------------------------------------------------------------------------------------------

    def reset(self, among: Container[int] | None = None) -> None:
        """Makes all state, step counts included, what it is before the first step.

        Args:
            among: numbers of the members to reset; None: all.
        """
        for i, (optimizer, built, counters) in enumerate(zip(self, self._built, self._first_counters, strict=True)):
            if among is not None and i not in among:
                continue
            if type(optimizer) is torch.optim.Adagrad:  # whatever it held when this object was made
                for owner, state in optimizer.state.items():
                    state["step"] = torch.zeros_like(state["step"])
                    state["sum"].fill_(self._group(owner).get("initial_accumulator_value", 0.0))
            elif built:
                for owner, first in built.items():
                    state = optimizer.state[owner]
                    for name in state.keys() - first.keys():
                        del state[name]
                    for name, value in first.items():
                        if isinstance(value, Tensor):
                            state[name].copy_(value)  # one value for all, or one each
                        else:
                            state[name] = copy.copy(value)
            else:
                optimizer.state.clear()
            for group, first in zip(optimizer.param_groups, counters, strict=False):
                for key in _COUNTERS:
                    group.pop(key, None)  # some make it in their first step, and their state with it
                group.update(first)

    def clear(self) -> None:
        """Clears the state that an optimizer makes anew in its next step; what was made when it was built stays."""
        for optimizer, built in zip(self, self._built, strict=True):
            if not built:
                optimizer.state.clear()

    @contextmanager
    def aside(self) -> Iterator[Aside]:
        """Puts state, settings and gradients aside while torch makes first state by a step with learning rate 0.

        Inside, there are no gradients, and no entry of the state is empty: either would keep torch from making any. At
        the end everything is put back, but for state and settings if `keep` was called.
        """
        saved = Aside(
            [{owner: dict(state) for owner, state in optimizer.state.items()} for optimizer in self],
            [{k: v for k, v in group.items() if k != "params"} for group in self.groups()],
        )
        gradients = [(p, p.grad) for group in self.groups() for p in group["params"] if p.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        for optimizer in self:
            for owner in [owner for owner, state in optimizer.state.items() if not state]:
                del optimizer.state[owner]
        self.quiet = True
        try:
            yield saved
        finally:
            self.quiet = False
            if not saved.kept:
                for optimizer, state in zip(self, saved.states, strict=True):
                    optimizer.state.clear()
                    optimizer.state.update(state)
                for group, settings in zip(self.groups(), saved.settings, strict=True):
                    for key in group.keys() - settings.keys() - {"params"}:
                        del group[key]
                    group.update(settings)
            for parameter, gradient in gradients:
                parameter.grad = gradient


@dataclass
class Aside:
    """State and settings that `Optimizers.aside` has put aside."""

    states: list[dict[Any, dict[str, Any]]]
    settings: list[dict[str, Any]]
    kept: bool = False

    def keep(self) -> None:
        """Goes on with the state and the settings that were made or loaded meanwhile."""
        self.kept = True


def of_user(given: Any, meanings: Mapping[str, Meaning] | None = None) -> Optimizers:
    """The optimizers of a user's own loop: one, or a list of several.

    Raises:
        ValueError: one is none, runs no hooks, or only wraps the one that updates the weights.
    """
    members = list(given) if isinstance(given, list | tuple) else [given]
    for optimizer in members:
        name = type(optimizer).__name__
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer={optimizer!r}: must be the torch.optim.Optimizer of the model's parameters or a list of "
                "them, unless the model is a DeepSpeed engine, which brings its own."
            )
        if isinstance(getattr(optimizer, "optim", None), torch.optim.Optimizer) and hasattr(
            optimizer, "consolidate_state_dict"
        ):
            raise ValueError(
                f"optimizer={name}: shards the optimizer of an unsharded model, so that its state would be out of "
                "reach. Wrap the model by fairscale's ShardedDataParallel (with OSS), or by fully_shard and use a "
                "plain torch optimizer."
            )
        if (
            closure := inspect.signature(optimizer.step).parameters.get("closure")
        ) and closure.default is closure.empty:
            raise ValueError(
                f"optimizer={name}: its step() needs a closure, without which its state can be neither saved nor "
                "restored. Use another optimizer."
            )
        inner = next((v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)), None)
        if inner is not None:
            names = ("optimizer", "optim", "base_optimizer", "inner_optimizer")
            where = next((f", its attribute {name}" for name in names if getattr(optimizer, name, None) is inner), "")
            raise ValueError(
                f"optimizer={name}: wraps another optimizer and may change the weights after its step, where masks "
                f"would not hold. Pass the {type(inner).__name__} inside{where}; a wrapper that changes weights after "
                "that one's step (Lookahead, averaging) cannot be used, one that restores them before it (SAM) can."
            )
        if not hasattr(optimizer, "_optimizer_step_post_hooks") or not getattr(type(optimizer).step, "hooked", False):
            raise ValueError(
                f"optimizer={name}: its step() runs no hooks, because its class does not call "
                "torch.optim.Optimizer.__init__, so masks cannot be applied. Use an optimizer that does."
            )
        _check_keys(optimizer)
    if len({id(optimizer) for optimizer in members}) < len(members) or not members:
        raise ValueError("optimizer: the list is empty, or holds an optimizer twice. Pass each optimizer once.")
    listed = [{id(p): p for group in o.param_groups for p in group["params"]} for o in members]
    if twice := [p for i, own in enumerate(listed) for key, p in own.items() if any(key in o for o in listed[:i])]:
        raise ValueError(
            f"optimizer: two of {', '.join(type(o).__name__ for o in members)} update the same parameter (of shape "
            f"{tuple(twice[0].shape)}). Give each parameter to one optimizer."
        )
    return Optimizers(members, meanings=meanings)


def _has_stepped(state: Mapping[str, Any]) -> bool:
    steps = state.get("step")
    return bool(state) if steps is None else float(steps) > 0


def _counters(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The counts that an optimizer has in a group before its first step, also if it has stepped."""
    first = optimizer.defaults if optimizer.state else group
    return {key: first[key] for key in _COUNTERS if key in first}


def _first_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """State of an optimizer that has not stepped: each tensor as its one value, or a copy. Empty if it has stepped."""
    found: dict[Tensor, dict[str, Any]] = {}
    for owner, state in optimizer.state.items():
        values = [value for key, value in state.items() if isinstance(value, Tensor) and key != "step"]
        if float(state.get("step", 0)) > 0 or not all(_is_constant(value) for value in values):
            return {}
        if state:
            found[owner] = {
                name: local(value).flatten()[:1].clone().squeeze() if isinstance(value, Tensor) else copy.copy(value)
                for name, value in state.items()
            }
    return found


def _is_constant(value: Tensor) -> bool:
    inner = local(value)
    return type(inner) in (Tensor, torch.nn.Parameter) and bool((inner == inner.flatten()[:1]).all())


def _as_large(value: Any, owner: Tensor) -> bool:
    """True if a state value has as many elements as the tensor it belongs to, or a part of it as large.

    A count has no dimensions, as the moments of a tensor without any: these are told apart by their names alone.
    """
    if not isinstance(value, Tensor) or (owner.dim() and not value.dim()):
        return False
    return local(value).numel() == local(owner).numel()


def _per_weight(value: Tensor, owner: Tensor) -> bool:
    """True if a tensor may hold something of each weight: one value, several side by side, or half a byte."""
    if _as_large(value, owner):
        return True
    shape, own = local(value).shape, local(owner).shape
    several = len(shape) > len(own) and own in (shape[: len(own)], shape[-len(own) :])
    return several or (value.element_size() == 1 and value.numel() == -(-own.numel() // 2))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of a state, which may be a container of them (list, dict, deque)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _check_keys(optimizer: torch.optim.Optimizer) -> None:
    """Checks that all state is that of a parameter; ValueError if not."""
    if others := [key for key in optimizer.state if not isinstance(key, Tensor)]:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its state {others[0]!r} belongs to no parameter, so it could be "
            "neither reset nor restored with the masks. Use another optimizer."
        )


def _plain(value: Tensor) -> bool:
    """True for floating-point values, one for each weight; the dtype of a quantized tensor subclass lies."""
    inner = local(value)
    return type(inner) in (Tensor, torch.nn.Parameter) and inner.is_floating_point() and inner.element_size() > 1


def _describe(value: Any) -> str:
    shown = isinstance(value, Tensor)
    return f"{type(value).__name__}, {value.dtype}, {tuple(value.shape)}" if shown else type(value).__name__
