"""`GaPEngine.initialize`, the counterpart of `deepspeed.initialize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from gap_ds.training.build import Options, check

T = TypeVar("T")


def initialize(cls: type[T], /, *, model: nn.Module, config: Any, gap_config: Any, **arguments: Any) -> T:
    """Like `deepspeed.initialize`: builds the DeepSpeed engine, and returns a GaPEngine around it.

    Args:
        config: the DeepSpeed config, a dict or a JSON file.
        gap_config: the GaP config; it is validated before DeepSpeed starts.
        arguments: those of GaPEngine that a DeepSpeed engine allows, such as steps_per_epoch; the rest is DeepSpeed's.
    """
    from gap_ds.sharding.backends import zero

    options = {field.name for field in dataclasses.fields(Options)} | {"optimizer_state"}
    own = {name: arguments.pop(name) for name in options & arguments.keys()}
    counts = {name: own[name] for name in ("steps_per_epoch", "batches_per_epoch") if name in own}
    gap, _ = check(gap_config, Options(**counts).per_epoch(), own.get("worker"))
    if not {"optimizer", "model_parameters"} & arguments.keys():
        arguments["model_parameters"] = [p for p in model.parameters() if p.requires_grad]
    config = str(config) if isinstance(config, Path) else config
    return cls(zero.initialize(model=model, config=config, **arguments), gap, **own)  # type: ignore[call-arg]
