"""The settings of a config: type, range, default and description of each. How they go together is in config.py."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gap_ds.method.distribution import DISTRIBUTIONS
from gap_ds.method.methods import METHODS
from gap_ds.method.pattern import parse

if TYPE_CHECKING:
    MethodName = str
    DistributionName = str
else:  # derived, so that a new one is added in one place
    MethodName = Literal[tuple(METHODS)]
    DistributionName = Literal[tuple(DISTRIBUTIONS)]

#: Lengths that every config has, in epochs or in steps, and those that only some have.
TIMES, FURTHER_TIMES = ("phase", "finetune"), ("dense", "update", "regrow_warmup")


class Fields(BaseModel):
    """All settings, each valid by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    method: MethodName = Field(
        "cyclic", description=" ".join(f"{method.name}: {method.summary}." for method in METHODS.values())
    )
    sparsity: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the entries' weights that are zero in the final model; must be set.",
    )
    distribution: DistributionName | dict[str, float] = Field(
        "uniform",
        description="How the sparsity is spread over the entries. "
        + " ".join(f"{name}: {(f.__doc__ or '').partition(chr(10))[0]}" for name, f in DISTRIBUTIONS.items())
        + " An object: name patterns, and the sparsity of the entries that match each.",
    )
    pattern: str = Field(
        "unstructured",
        description="Legal sets of kept weights: unstructured, N:M (2:4) of every M inputs, or block:HxW "
        "(block:4x4) of outputs x inputs.",
    )
    partitions: int | list[list[str]] = Field(
        1,
        description="Number of partitions (kappa), or the partitions written out as lists of name patterns. "
        "A pattern may end in a slice of the experts that it matches: experts[0:4].",
    )
    partition_assignment: Literal["contiguous", "interleaved", "random"] = Field(
        "contiguous", description="How blocks are assigned to partitions if only their number is given."
    )
    partition_order: Literal["cyclic", "random"] = Field(
        "cyclic", description="Order in which the partitions become dense."
    )
    dense_epochs: float | None = Field(
        None, ge=0, description="Length of a first phase with all partitions dense, in epochs."
    )
    dense_steps: int | None = Field(
        None, ge=0, description="Length of a first phase with all partitions dense, in steps."
    )
    phase_epochs: float | None = Field(None, gt=0, description="T, the length of a phase, in epochs.")
    phase_steps: int | None = Field(None, gt=0, description="T, the length of a phase, in applied optimizer steps.")
    rounds: int = Field(1, ge=0, description="Number of rounds; a round makes every partition dense once.")
    prune_ramp: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of a phase, at its end, in which the outgoing partition is pruned gradually; 0: at once.",
    )
    target: Literal["constant", "rising"] = Field(
        "constant",
        description="Level of the sparse partitions. constant: always the target. rising: dense at first, and from the "
        "end of the dense phase to the last boundary the cubic of gradual pruning, at every boundary and update.",
    )
    grow: Literal["dense", "gradient", "random"] = Field(
        "dense",
        description="Growth of a partition at the beginning of its phase: to dense, or a share of its pruned weights, "
        "by gradient or at random.",
    )
    grow_share: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="With grow: share of the pruned weights that the first phase grows; over the phases it falls to 0 "
        "by a cosine.",
    )
    update_epochs: float | None = Field(None, gt=0, description="Epochs between two updates of masks inside a phase.")
    update_steps: int | None = Field(None, gt=0, description="Steps between two updates of masks inside a phase.")
    drop_fraction: float = Field(
        0.3, gt=0, lt=1, description="Fraction of the kept weights that the first drop-and-grow update replaces."
    )
    finetune_epochs: float | None = Field(
        None, ge=0, description="Length of the final phase with fixed masks, in epochs."
    )
    finetune_steps: int | None = Field(None, ge=0, description="Length of the final phase with fixed masks, in steps.")
    mask_init: Literal["auto", "random", "magnitude", "from_weights", "from_file"] = Field(
        "auto",
        description="First masks: random, by magnitude, or auto: by magnitude if the model was loaded by "
        "from_pretrained, else random. With static also those of a sparse model: its nonzero weights, or the content "
        "of a file of masks.",
    )
    mask_file: str | None = Field(
        None,
        description="With mask_init from_file: the masks.safetensors of a checkpoint in which all entries are sparse.",
    )
    include: list[str] = Field(default=[], description="Name patterns of further weights to prune.")
    exclude: list[str] = Field(default=[], description="Name patterns of weights that stay dense.")
    optimizer_state: Literal["keep_survivors", "reset"] = Field(
        "keep_survivors", description="At a boundary: keep the moments of kept weights, or clear all moments."
    )
    regrow: Literal["zero", "last_value"] = Field(
        "zero", description="Value of a grown weight: zero, or its value when it was pruned."
    )
    regrow_storage: Literal["exact", "bf16_cpu"] = Field(
        "exact",
        description="Last values of pruned weights. exact: in the dtype and on the device of the weights. bf16_cpu: "
        "rounded to bfloat16, in host memory.",
    )
    regrow_moments: Literal["zero", "keep_second", "mean_second"] = Field(
        "zero",
        description="Second moment of a grown weight (Adam's exp_avg_sq): zero, the one that it has kept while pruned, "
        "or the mean over the kept weights of its entry. Its first moment is zero.",
    )
    regrow_warmup_epochs: float | None = Field(
        None, gt=0, description="Epochs over which the steps of grown weights rise linearly to their full size."
    )
    regrow_warmup_steps: int | None = Field(
        None, gt=0, description="Steps over which the steps of grown weights rise linearly to their full size."
    )
    lr_density_power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="p: the steps of an entry are density ** -p times as large, with its density at that step. 0: as "
        "the optimizer takes them.",
    )
    unpartitioned: Literal["average", "first"] = Field(
        "average",
        description="Parallel GaP, weights in no partition: the average over the workers, or those of worker 0.",
    )
    lr_restart: bool = Field(
        False,
        description="True: the learning-rate schedule restarts in every phase. False: one schedule covers the run.",
    )
    seed: int = Field(0, ge=0, description="Seed of random masks, random growth, random order and random assignment.")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        # Strict mode refuses 1 for a float, which JSON writers produce for 1.0; bool is no number here.
        if isinstance(data, dict):
            for key in (
                "sparsity",
                "prune_ramp",
                "lr_density_power",
                *(f"{name}_epochs" for name in TIMES + FURTHER_TIMES),
            ):
                if type(data.get(key)) is int:
                    with contextlib.suppress(OverflowError):
                        data = {**data, key: float(data[key])}
        return data

    @field_validator("distribution", mode="before")
    @classmethod
    def _distribution(cls, value: Any) -> Any:
        # Checked here, because pydantic reports a mistake in a union once per member.
        if isinstance(value, str) and value in DISTRIBUTIONS:
            return value
        rows = list(value.items()) if isinstance(value, dict) else []
        if rows and all(type(name) is str and type(s) in (int, float) and 0 <= s < 1 for name, s in rows):
            return {pattern: float(s) for pattern, s in value.items()}
        names = ", ".join(f'"{name}"' for name in DISTRIBUTIONS)
        raise ValueError(f"must be {names}, or an object with name patterns and the sparsity of each in [0, 1)")

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        parse(value)
        return value

    @field_validator("partitions", mode="before")
    @classmethod
    def _partitions(cls, value: Any) -> Any:
        # Checked here, because pydantic reports a mistake in a union once per member.
        if type(value) is int and value >= 1:
            return value
        groups = value if isinstance(value, list) else []
        lists = bool(groups) and all(isinstance(group, list) and group for group in groups)
        if lists and all(isinstance(pattern, str) for group in groups for pattern in group):
            return value
        raise ValueError("must be an integer of at least 1, or a list of non-empty lists of name patterns")
