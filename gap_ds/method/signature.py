"""A run's signature read back: the line has everything that changes a result, so also its config and its schedule."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from gap_ds.method import schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.schedule import Schedule

#: Longer ones are no signature; it bounds what a hostile file can make the parsers below do.
_LONGEST = 100_000
_MOST_SPLITS = 100
_MOST_PHASES = 20_000
_MOST_UPDATES = 1_000_000


def config_of(signature: str) -> GaPConfig | None:
    """The config that has this signature; None where there is none, as after a change of its format.

    >>> config = GaPConfig(method="rigl", sparsity=0.9, phase_steps=10, finetune_steps=5, update_steps=2, seed=3)
    >>> config_of(config.signature("0.1.0")) == config, config_of("gap|method:rigl|v:1"), config_of("nonsense")
    (True, None, None)
    """
    if not signature.startswith("gap|") or len(signature) > _LONGEST:
        return None
    settings: dict[str, Any] = {}
    version = ""
    try:
        parts = _SPLIT.split(signature)[1:]
        while parts:
            key, _, text = parts.pop(0).partition(":")
            if key == "v":
                version = text
            elif key in _LENGTHS:
                unit, number = {"ep": ("epochs", float), "st": ("steps", int)}[text[-2:]]
                settings[f"{_LENGTHS[key]}_{unit}"] = number(text[:-2])
            else:
                name, read = _SETTINGS[key]
                settings[name] = _read(read, text, parts)
        if settings.get("mask_init") == "from_file":
            settings["mask_file"] = "masks.safetensors"  # whose path is in no signature
        # What has its default may be a setting that the method refuses to be given.
        given = {k: v for k, v in settings.items() if k == "rounds" or v != GaPConfig.model_fields[k].default}
        config = GaPConfig.model_validate(given)
        return config if config.signature(version) == signature and _is_sane(config) else None
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError):
        return None


def schedule_of(config: GaPConfig, first_steps: Sequence[int], worker: int = 0) -> Schedule | None:
    """The schedule of a config whose phases begin at these steps; None if there is none.

    A checkpoint has these steps and not the number of steps in an epoch, of which there is at most one that gives them.

    >>> config = GaPConfig(sparsity=0.5, partitions=2, phase_epochs=0.5, rounds=1, finetune_epochs=1.0)
    >>> schedule_of(config, [0, 4, 7]) == schedule.build(config, 7), schedule_of(config, [0, 4, 9])
    (True, None)
    """
    try:
        if not config.in_epochs:
            candidates: Sequence[int | None] = [None]
        else:
            unit = 1_000_000
            last = schedule.build(config, unit, worker).phases[-1].first_step
            if not first_steps or not unit // 1000 < last < unit**2:
                return None
            # The last boundary is rounded to a step, so an epoch is known to half a step over its epochs.
            near, slack = first_steps[-1] * unit // last, unit // last + 2
            if slack * len(first_steps) > _MOST_PHASES:
                return None
            candidates = range(max(1, near - slack), near + slack + 1)
        for steps_per_epoch in candidates:
            try:
                found = schedule.build(config, steps_per_epoch, worker)
            except ValueError:  # so few steps that a phase has none
                continue
            if [phase.first_step for phase in found.phases] == list(first_steps):
                return found
    except (ValueError, MemoryError, OverflowError):
        pass
    return None


def _is_sane(config: GaPConfig) -> bool:
    """Whether its schedule can be built: a hostile signature may ask for one that fills the memory."""
    length, update = (getattr(config, f"{n}_{'epochs' if config.in_epochs else 'steps'}") for n in ("phase", "update"))
    dense = config.dense_epochs or config.dense_steps or 0
    updates = max(length, dense) / update if update else 0
    return max(config.kappa, config.exploring) <= _MOST_PHASES and updates <= _MOST_UPDATES


def _read(read: Callable[[str], Any], text: str, rest: list[str]) -> Any:
    """The value of a text, which may go on in the parts after it: patterns may hold the separator and a key."""
    for _ in range(_MOST_SPLITS):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            if not rest:
                raise
            text += f"|{rest.pop(0)}"
    raise ValueError("cut too often")


_LENGTHS = {"D": "dense", "T": "phase", "ft": "finetune", "every": "update"}
_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "method": ("method", str),
    "k": ("partitions", json.loads),
    "rounds": ("rounds", int),
    "s": ("sparsity", float),
    "dist": ("distribution", lambda text: json.loads(text) if text.startswith("{") else text),
    "pat": ("pattern", str),
    "init": ("mask_init", str),
    "lr": ("lr_restart", lambda text: {"restart": True, "continuous": False}[text]),
    "drop": ("drop_fraction", float),
    "ramp": ("prune_ramp", float),
    "assign": ("partition_assignment", str),
    "order": ("partition_order", str),
    "include": ("include", ast.literal_eval),
    "exclude": ("exclude", ast.literal_eval),
    "optimizer_state": ("optimizer_state", str),
    "regrow": ("regrow", str),
    "shared": ("unpartitioned", str),
    "seed": ("seed", int),
}
_SPLIT = re.compile(rf"\|(?=(?:{'|'.join(map(re.escape, [*_LENGTHS, *_SETTINGS, 'v']))}):)")
