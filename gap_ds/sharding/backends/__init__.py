"""Backends: the only place with other libraries' private names.

A backend is one value: where the pieces lie (`shards`), which optimizer updates them, and what the sharding library
does its own way (publish, backward, step, save, load). `detect` builds it from the objects that a user already has:
`zero` (with `zero_places` and `zero_limits`), `fairscale`, `fsdp` or `plain` (with `torch_state`). Outside this folder
only the reading of a checkpoint, whose files are the library's, depends on which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.sharding.comm import Comm
from gap_ds.sharding.meanings import Meaning
from gap_ds.sharding.optimizers import Optimizers, of_user
from gap_ds.sharding.shard import Shard


class OtherOptimizerError(ValueError):
    """A checkpoint holds the state of another optimizer. Nothing was changed."""


@dataclass(frozen=True)
class Backend:
    """A sharding library, as the engine sees it.

    name: for logs and results, and in checkpoints, where it tells whose files they are.
    forward: what is called with a batch.
    module: the model inside, whose module tree has the names of the plan.
    optimizers: the innermost optimizers; their post-step hooks fire after the fp32 weights changed and before the
        library copies them to low precision and spreads them.
    comm: the ranks among which the pieces of parameters are spread.
    replicated: whether some pieces are on several ranks of `comm`, which must keep them equal.
    shards: this rank's piece of every parameter, trainable or not, in an order that is the same on all ranks.
    publish: makes a change of the fp32 pieces outside an optimizer step known to working copies and other ranks.
    skips_overflow: whether a step whose gradients are not finite is left out, as loss scaling does.
    backward, step: one micro-batch's backward pass; the update, if this micro-batch completes one.
    micro_batches: how many micro-batches an update has.
    save, load: the library's own checkpoint of weights and optimizer, in a folder that exists on every rank.
    reshards: names of the backends whose checkpoints `load` reads, also those of another number of ranks.
    discard: forgets the gradients and micro-batches since the last update.
    counters: what the library counts besides, as plain numbers; `recount`: sets them, from those of any backend, after
        weights and optimizer state were restored without `load`.
    """

    name: str
    forward: nn.Module
    module: nn.Module
    optimizers: Optimizers
    comm: Comm
    shards: Callable[[], list[Shard]]
    publish: Callable[[], None]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    discard: Callable[[], None]
    micro_batches: int = 1
    skips_overflow: bool = False
    reshards: Collection[str] = ()
    replicated: bool = False
    counters: Callable[[], dict[str, float]] = dict
    recount: Callable[[int, dict[str, float]], None] = lambda applied_steps, counters: None


@dataclass(frozen=True)
class Training:
    """Settings of the loop around the optimizer, for backends that bring no engine with such a loop."""

    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None
    lr_scheduler: Any = None
    gradient_accumulation_steps: int = 1
    gradient_clipping: float = 0.0
    grad_scaler: Any = None
    optimizer_state: Mapping[str, Meaning] | None = None
    #: All ranks that train the model.
    world: Comm = field(default_factory=Comm)

    def check(self) -> None:
        """Raises ValueError for a setting whose value can be seen to be wrong without a model."""
        steps: Any = self.gradient_accumulation_steps
        clipping: Any = self.gradient_clipping
        meanings: Any = self.optimizer_state or {}
        if not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"gradient_accumulation_steps={steps!r}: must be a whole number of at least 1.")
        if not isinstance(clipping, Real) or not float(clipping) >= 0:
            raise ValueError(f"gradient_clipping={clipping!r}: must be a norm of at least 0; 0 turns clipping off.")
        if wrong := [s for s in self.schedulers() if not hasattr(s, "step") or not hasattr(s, "load_state_dict")]:
            raise ValueError(f"lr_scheduler={wrong[0]!r}: must be a learning-rate scheduler, or a list of them.")
        if self.grad_scaler is not None and not hasattr(self.grad_scaler, "unscale_"):
            raise ValueError(f"grad_scaler={self.grad_scaler!r}: must be a torch.amp.GradScaler.")
        if not isinstance(meanings, Mapping):
            raise ValueError(f"optimizer_state={meanings!r}: must be a dict, state name to meaning.")

    def optimizers(self) -> Optimizers:
        """The user's optimizers; ValueError if one cannot be used."""
        return of_user(self.optimizer, self.optimizer_state)

    @property
    def skips_overflow(self) -> bool:
        """True if a gradient scaler leaves out updates whose gradients are not finite; one that is off does not."""
        return self.grad_scaler is not None and self.grad_scaler.is_enabled()

    def schedulers(self) -> list[Any]:
        """The user's learning-rate schedulers; empty if there are none."""
        given = self.lr_scheduler
        return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def detect(model: nn.Module, training: Training) -> Backend:
    """The backend of the objects that a user has; `model` may be compiled, or inside a wrapper of another library.

    Raises:
        ValueError: the combination is not supported, with the reason and the setting to change.
    """
    from gap_ds.sharding.backends import fairscale, fsdp, plain, zero

    outer, model = model, held_by(model)
    inside = outermost(model)
    if meta := [name for name, parameter in inside.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{meta[0]}: is on the meta device and has no weights to select from. Give the parameters a device and "
            "their values (to_empty, load_state_dict) before the engine is built."
        )
    kinds: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module, Training], Backend]], ...]
    kinds = (
        (zero.recognises, zero.build),
        (fairscale.recognises, fairscale.build),
        (fsdp.recognises, fsdp.build),
        (plain.recognises, plain.build),
    )
    backend = next(build for recognises, build in kinds if recognises(inside))(model, training)
    return backend if model is outer else replace(backend, forward=outer)


def brings_optimizer(model: nn.Module) -> bool:
    """True for an engine that brings its optimizer and learning-rate scheduler (DeepSpeed's)."""
    from gap_ds.sharding.backends import zero

    return zero.recognises(outermost(held_by(model)))


def held_by(model: nn.Module) -> nn.Module:
    """The sharded model inside a wrapper of another library, such as Lightning Fabric's; else the model itself.

    A wrapper holds all of its parameters in one child, in which a library replicates or shards them, or holds them
    twice, as they are and wrapped.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if is_sharded(model) or not own:
        return model
    held = [(child, {id(p) for p in child.parameters()}) for child in model._modules.values() if child is not None]
    whole = [child for child, parameters in held if parameters == own]
    if any(parameters and parameters != own for _, parameters in held):
        return model  # a part of it, such as a head with tied weights, lies beside: no wrapper
    found = [held_by(child) for child in whole]
    return next((one for one in found if is_sharded(one)), found[0] if len(found) > 1 else model)


def is_sharded(model: nn.Module) -> bool:
    """True for the outermost module of a model that a library replicates or shards, compiled or not."""
    return _is_wrapper(outermost(model))


def outermost(model: nn.Module) -> nn.Module:
    """The module that a library has wrapped: the one inside a compiled model, or the compiled one itself.

    The latter is what `fully_shard` after torch.compile makes, as Accelerate does.
    """
    return model if _is_wrapper(model) else uncompiled(model)


def _is_wrapper(module: nn.Module) -> bool:
    from gap_ds.sharding.backends import fairscale, fsdp, plain, zero

    return any(backend.wraps(module) for backend in (zero, fairscale, fsdp, plain))


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, if it has."""
    return model._modules.get("_orig_mod") or model
