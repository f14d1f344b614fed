"""`prepare`: an engine around what Accelerate has prepared, and masks in the states that it saves and loads."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from gap_ds.hf.wrapped import FOLDER, innermost, refuse
from gap_ds.method.config import GaPConfig
from gap_ds.sharding.backends import brings_optimizer
from gap_ds.sharding.meanings import Meaning
from gap_ds.training.engine import GaPEngine

#: The engines that `prepare` has built for each Accelerator.
_PREPARED: weakref.WeakKeyDictionary[Any, list[GaPEngine]] = weakref.WeakKeyDictionary()


def prepare(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    config: GaPConfig | dict[str, Any] | str | Path,
    *,
    steps_per_epoch: int | None = None,
    batches_per_epoch: int | None = None,
    fresh: bool = False,
    optimizer_state: Mapping[str, Meaning] | None = None,
) -> GaPEngine:
    """A GaPEngine around what `accelerator.prepare` has returned, for your own loop.

    The loop stays as it is, with `engine.after_step()` after `scheduler.step()`. `accelerator.save_state` and
    `load_state` carry the masks from now on.

    Args:
        model, optimizer, scheduler: as prepared; there may be no scheduler (None).
        steps_per_epoch, batches_per_epoch: updates in an epoch, or batches, len(loader); one of them is required if the
            config counts in epochs.
        fresh: begin a new schedule although the optimizer has stepped.
        optimizer_state: what state of the optimizer means that gap_ds does not know, as in GaPEngine.
    Raises:
        ValueError: as GaPEngine.
    """
    settings = GaPConfig.load(config)
    if settings.record.has_workers:
        refuse(settings)
    if batches_per_epoch is not None and steps_per_epoch is None:  # Accelerate accumulates, not the engine
        steps_per_epoch = math.ceil(batches_per_epoch / accelerator.gradient_accumulation_steps)
    # A DeepSpeed engine brings both itself.
    inner = None if brings_optimizer(model) else getattr(scheduler, "scheduler", scheduler)
    engine = GaPEngine(
        model,
        settings,
        optimizer=innermost(model, optimizer),
        lr_scheduler=inner,
        steps_per_epoch=steps_per_epoch,
        fresh=fresh,
        grad_scaler=accelerator.scaler,
        optimizer_state=optimizer_state,
    )
    others = _PREPARED.setdefault(accelerator, [])
    masks = _MasksOfState(engine, f"{FOLDER}_{len(others)}" if others else FOLDER)
    others.append(engine)
    accelerator.register_save_state_pre_hook(masks.save)
    accelerator.register_load_state_pre_hook(masks.look)
    accelerator.register_for_checkpointing(masks)
    return engine


class _MasksOfState:
    """The masks in what `accelerator.save_state` writes: a folder beside the weights. A closed engine has none.

    Accelerate loads weights and optimizer after its pre-hooks and before its registered objects, and masks are compared
    with the weights that they are loaded for. So the pre-hook only notes where, and the object's turn is the time.
    """

    def __init__(self, engine: GaPEngine, name: str) -> None:
        self._engine, self._name, self._folder = engine, name, Path()

    def save(self, _models: Any, _weights: Any, folder: str) -> None:
        if not self._engine.closed:
            self._engine.save_masks(Path(folder, self._name))

    def look(self, _models: Any, folder: str) -> None:
        self._folder = Path(folder, self._name)
        if not (self._engine.closed or (self._folder / "state.json").is_file()):
            raise ValueError(f"{self._folder}: holds no masks: it was saved before gap_ds prepared this model.")

    def state_dict(self) -> dict[str, str]:
        return {"folder": self._name}

    def load_state_dict(self, state: dict[str, str]) -> None:
        if not self._engine.closed:
            self._engine.load_masks(self._folder)


_load_state, _save_state = Accelerator.load_state, Accelerator.save_state


@contextmanager
def _quiet(accelerator: Any) -> Iterator[None]:
    """Inside, the engines of an Accelerator ignore steps of their optimizers.

    With FSDP2, torch makes the state of an optimizer that has none by a step with learning rate 0, when it is saved or
    loaded. It is no step of the training, and when it comes, the weights are loaded already and the masks are not.
    """
    optimizers = [engine.run.backend.optimizers for engine in _PREPARED.get(accelerator, ()) if not engine.closed]
    try:
        for one in optimizers:
            one.quiet = True
        yield
    finally:
        for one in optimizers:
            one.quiet = False


@functools.wraps(_save_state)
def _save_quietly(accelerator: Any, *args: Any, **named: Any) -> Any:
    """Saves as Accelerate does; a step that makes the optimizer's state is not counted."""
    with _quiet(accelerator):
        return _save_state(accelerator, *args, **named)


@functools.wraps(_load_state)
def _load_masks_too(accelerator: Any, input_dir: str | None = None, *args: Any, **named: Any) -> Any:
    """Refuses to restore a run's weights without its masks, before anything is changed.

    Accelerate itself would load weights and optimizer, and then miss a registered object without a word about masks.
    """
    if input_dir is not None and accelerator not in _PREPARED and (Path(input_dir, FOLDER) / "state.json").is_file():
        raise ValueError(
            f"{input_dir}: holds masks, and this Accelerator has no engine yet that they belong to. Call "
            "gap_ds.hf.prepare before accelerator.load_state, which restores weights, optimizer and masks together."
        )
    with _quiet(accelerator):
        return _load_state(accelerator, input_dir, *args, **named)


Accelerator.load_state, Accelerator.save_state = _load_masks_too, _save_quietly
