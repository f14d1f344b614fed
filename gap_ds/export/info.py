"""gap.json: the record of an exported model. E entries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from gap_ds.checkpoint.run_state import StoredConfig
from gap_ds.masks.legality import possible_dims
from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Plan
from gap_ds.method.schedule import Schedule
from gap_ds.storage.atomic import sha256
from gap_ds.storage.json import Count, Record, read_json, write_json

INFO = "gap.json"


class EntryInfo(Record):
    """One of the E entries: its budget, its weights that are not zero, and all of its weights."""

    keep: Count
    nonzero: Count
    numel: Count
    partition: Annotated[int, Field(ge=0, lt=2**31)]
    dims: list[Count] | None = None
    shape: list[Count] | None = None

    def known_dims(self, n: int) -> tuple[int, int] | None:
        """Output and input dimension of a tensor of n dimensions, if they are given and possible."""
        pair = tuple(self.dims or ())
        return (pair[0], pair[1]) if pair in possible_dims(n) else None


class Score(Record):
    """A score of the model. how: the metric's own signature or settings."""

    metric: str
    value: float
    dataset: str
    how: str


class ExportKeys(Record):
    """The keys of gap.json by which an exported model is known; all others are kept when the file is rewritten.

    sha256: of each file of weights, by its name.
    """

    model_config = ConfigDict(extra="allow")

    signature: str
    entries: dict[str, Any]
    sha256: dict[str, str] = Field(default_factory=dict)


class ExportInfo(ExportKeys):
    """Contents of gap.json.

    steps_per_epoch: of a config in epochs. phase: that of the next step. finished: the schedule of `total_steps` was
    trained, or `finish` ended it before the step `ended_at`.
    pruned_in_copy: partitions that were dense then, and are pruned in the export alone, without fine-tuning.
    mean_density, training_flops: of the steps that were taken, FLOPs relative to dense training; planned_...: of the
    whole schedule.
    """

    config: StoredConfig
    applied_steps: Count
    total_steps: Count | None = None
    steps_per_epoch: Count | None = None
    finished: bool | None = None
    ended_at: Count | None = None
    phase: str = ""
    pruned_in_copy: list[Count] = Field(default_factory=list)
    entry_sparsity: float
    model_sparsity: float
    kept: Count
    numel: Count
    model_numel: Count
    mean_density: float
    planned_mean_density: float | None = None
    training_flops: float | None = None
    planned_training_flops: float | None = None
    entries: dict[str, EntryInfo]
    scores: list[Score] = Field(default_factory=list)

    @property
    def progress(self) -> str:
        """Sentences on how far the schedule was trained."""
        steps = f"Exported after {self.applied_steps:,}"
        if self.total_steps is None or (self.finished and self.ended_at is None):
            return f"{steps} optimizer steps."
        steps += f" of {self.total_steps:,} optimizer steps"
        if self.ended_at is not None:
            return f"{steps}: the schedule was ended early, at step {self.ended_at:,}."
        names = ", ".join(map(str, self.pruned_in_copy))
        pruned = f" Dense partitions ({names}) are pruned in this copy, without fine-tuning."
        return f"{steps}, in {self.phase}: the schedule is not finished.{pruned if names else ''}"

    @classmethod
    def of(
        cls,
        plan: Plan,
        schedule: Schedule,
        config: GaPConfig,
        signature: str,
        applied_steps: int,
        ended_at: int | None,
        steps_per_epoch: int | None,
        nonzero: Mapping[str, int],
    ) -> ExportInfo:
        """The record of a model that is exported after `applied_steps`.

        Args:
            ended_at: step before which `finish` ended the schedule; the masks are fixed from there.
            nonzero: weights of each entry that are not zero.
        """
        pruned = plan.numel - plan.keep
        phase = schedule.phases[-1] if ended_at is not None else schedule.phase_at(applied_steps)
        by_schedule = applied_steps if ended_at is None else ended_at
        scheduled = schedule.mean_density(*plan.per_partition(), by_schedule)
        mean_density = scheduled
        if by_schedule < applied_steps:
            final = plan.keep / plan.numel
            mean_density = (scheduled * by_schedule + final * (applied_steps - by_schedule)) / applied_steps
        pruned_here = {e.partition for e in plan.entries if e.keep < e.numel and not phase.at_target(e.partition)}
        return cls(
            signature=signature,
            config=config,
            applied_steps=applied_steps,
            total_steps=schedule.total_steps,
            steps_per_epoch=steps_per_epoch,
            finished=ended_at is not None or applied_steps >= schedule.total_steps,
            ended_at=ended_at,
            phase=str(phase),
            pruned_in_copy=sorted(pruned_here),
            entry_sparsity=pruned / plan.numel,
            model_sparsity=pruned / plan.total,
            kept=plan.keep,
            numel=plan.numel,
            model_numel=plan.total,
            mean_density=mean_density,
            planned_mean_density=schedule.mean_density(*plan.per_partition()),
            entries={
                e.name: EntryInfo(
                    keep=e.keep,
                    nonzero=nonzero[e.name],
                    numel=e.numel,
                    partition=e.partition,
                    dims=list(e.dims),
                    shape=list(e.shape),
                )
                for e in plan.entries
            },
        )


def is_export(folder: Path) -> bool:
    """True if a folder has the gap.json of an exported model; a config may have the same name."""
    try:
        read_json(folder / INFO, ExportKeys)
    except ValueError:
        return False
    return True


def is_as_recorded(path: Path, digests: Mapping[str, str]) -> bool:
    """False if a file of weights has another SHA-256 than its folder's gap.json has of it."""
    return path.name not in digests or sha256(path) == digests[path.name]


def renew_digests(folder: Path) -> None:
    """Writes the digests of a folder's weights to its gap.json."""
    digests = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    write_json(folder / INFO, read_json(folder / INFO, ExportKeys).model_copy(update={"sha256": digests}))


def has_model_config(folder: Path) -> bool:
    """True if a folder has the config.json of a transformers model, maybe damaged; those of others lack its keys."""
    path = folder / "config.json"
    try:
        return path.is_file() and not {"model_type", "architectures"}.isdisjoint(read_json(path, dict[str, Any]))
    except ValueError:
        return True
