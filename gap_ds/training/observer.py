"""Optional parts of a run: each is told what happens at a boundary and with a checkpoint, and changes no decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gap_ds.method.schedule import Phase


class Observer:
    """Every method does nothing here; override what you need. All ranks call each method at the same moment."""

    def before_first_update(self) -> None:
        """Called once, before the first update after the engine was built is counted."""

    def loss_seen(self, loss: Tensor) -> None:
        """Called with the loss of a micro-batch."""

    def update_applied(self) -> None:
        """Called after every update, before a boundary that follows it."""

    def round_pruned(self, round_: int, phase: Phase, step: int) -> None:
        """Called inside the boundary that ends a round of parallel GaP, while all partitions are sparse."""

    def masks_changed(self, step: int, phase: Phase) -> None:
        """Called after masks changed; `phase` is the one that the step with this number belongs to."""

    def write(self, folder: Path) -> None:
        """Saves what `read` needs, beside the masks of a checkpoint."""

    def read(self, folder: Path) -> Any:
        """Reads what `write` saved and changes nothing yet; the result is given to `restore`."""

    def restore(self, found: Any, step: int, phase: Phase) -> None:
        """Goes on before a step, after masks and weights were restored."""

    def close(self) -> None:
        """Called when the engine lets go of the model."""
