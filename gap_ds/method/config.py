"""What the user asks for: one validated, immutable `GaPConfig`, read from JSON, YAML or a dict.

`python -m gap_ds.method.config` prints the JSON schema, so that editors can check a config while it is typed.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gap_ds.method.pattern import NofM, Unstructured, parse

Method = Literal["cyclic", "parallel", "dsd", "acdc", "one_shot", "gradual", "rigl", "set", "static", "dense"]

_LAYOUT = ("partitions", "partition_assignment", "partition_order")
_DENSE_FIRST = ("dense_epochs", "dense_steps")
_UPDATES = ("update_epochs", "update_steps")

#: Settings that a method never reads. Setting one of them is an error, because it would have no effect.
_UNUSED: dict[str, tuple[str, ...]] = {
    "cyclic": ("drop_fraction", "unpartitioned"),
    # A worker grows at once what it has pruned and published: its last values would undo that.
    "parallel": ("drop_fraction", "partition_order", "regrow"),
    "dsd": (*_LAYOUT, "mask_init", "drop_fraction", "unpartitioned"),
    "acdc": (*_LAYOUT, "mask_init", "drop_fraction", "unpartitioned", "lr_restart"),
    "one_shot": (
        *_LAYOUT,
        *_DENSE_FIRST,
        *_UPDATES,
        "mask_init",
        "rounds",
        "prune_ramp",
        "regrow",
        "drop_fraction",
        "unpartitioned",
    ),
    "gradual": (*_LAYOUT, "mask_init", "rounds", "prune_ramp", "regrow", "drop_fraction", "unpartitioned"),
    "rigl": (*_LAYOUT, *_DENSE_FIRST, "rounds", "prune_ramp", "regrow", "unpartitioned"),
    "set": (*_LAYOUT, *_DENSE_FIRST, "rounds", "prune_ramp", "regrow", "unpartitioned"),
    "static": (
        *_DENSE_FIRST,
        *_UPDATES,
        "partition_order",
        "optimizer_state",
        "prune_ramp",
        "regrow",
        "drop_fraction",
        "unpartitioned",
    ),
    "dense": (
        *(
            "distribution",
            "pattern",
            "partition_assignment",
            "partition_order",
            "mask_init",
            "optimizer_state",
            "prune_ramp",
            "regrow",
        ),
        *("drop_fraction", "unpartitioned", *_UPDATES),
    ),
}
#: Labels of settings in the signature, which has them only where they are not the default. Labels never change: a
#: signature in an old result still compares with a new one.
_SIGNATURE_LABELS = {
    "assign": "partition_assignment",
    "order": "partition_order",
    "include": "include",
    "exclude": "exclude",
    "optimizer_state": "optimizer_state",
    "regrow": "regrow",
    "shared": "unpartitioned",
}
#: Earlier names of settings, for the sentence that refuses them.
_RENAMED = {
    "assign": "partition_assignment",
    "init": "mask_init",
    "init_file": "mask_file",
    "lr": "lr_restart",
    "order": "partition_order",
    "shared": "unpartitioned",
}
#: Lengths that every config has, in epochs or in steps.
_TIMES = ("phase", "finetune")
#: Methods without rounds: they explore in one phase.
_ONE_PHASE = ("one_shot", "gradual", "rigl", "set")


class GaPConfig(BaseModel):
    """A complete description of one sparse training run, independent of model, backend and number of ranks.

    Times are counted in applied optimizer steps: a step skipped for an fp16 overflow does not count, and gradient
    accumulation counts once. Either all times are in epochs or all are in steps.

    Raises:
        pydantic.ValidationError: (a ValueError) for unknown keys, wrong types, values out of range and settings that
            would have no effect. `GaPConfig.load` turns it into one readable sentence per mistake.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    method: Method = Field(
        "cyclic",
        description="cyclic: C-GaP. parallel: P-GaP. dsd: C-GaP with one partition. acdc: the same in short phases. "
        "one_shot: train dense, prune, retrain. gradual: prune little by little. rigl, set: drop by magnitude, grow by "
        "gradient or at random. static: fixed random masks. dense: none.",
    )
    sparsity: float = Field(
        0.0, ge=0.0, lt=1.0, description="Fraction of the entries' weights that the final model drops; must be set."
    )
    distribution: Literal["uniform", "erk", "global"] | dict[str, float] = Field(
        "uniform",
        description="How the sparsity is spread: the same for every entry; Erdos-Renyi-Kernel; one budget and one "
        "threshold for each partition (global); or a sparsity by name pattern, for the entries that match it.",
    )
    pattern: str = Field(
        "unstructured",
        description="Which weights may be kept together: unstructured, N:M (2:4) of every M inputs, or block:HxW "
        "(block:4x4) of outputs x inputs.",
    )
    partitions: int | list[list[str]] = Field(
        1, description="Number of partitions (kappa), or the partitions written out as lists of name patterns."
    )
    partition_assignment: Literal["contiguous", "interleaved", "random"] = Field(
        "contiguous", description="How blocks are dealt to the partitions when only their number is given."
    )
    partition_order: Literal["cyclic", "random"] = Field(
        "cyclic", description="Order in which the partitions become dense."
    )
    dense_epochs: float | None = Field(None, ge=0, description="Length of a first phase with all dense, in epochs.")
    dense_steps: int | None = Field(None, ge=0, description="Length of a first phase with all dense, in steps.")
    phase_epochs: float | None = Field(None, gt=0, description="T, the length of a phase, in epochs.")
    phase_steps: int | None = Field(None, gt=0, description="T, the length of a phase, in applied optimizer steps.")
    rounds: int = Field(1, ge=0, description="Number of rounds; a round makes every partition dense once.")
    prune_ramp: float = Field(
        0.0, ge=0, le=1, description="Last part of a phase in which what it leaves is pruned gradually; 0: at once."
    )
    update_epochs: float | None = Field(None, gt=0, description="Epochs between two updates of masks inside a phase.")
    update_steps: int | None = Field(None, gt=0, description="Steps between two updates of masks inside a phase.")
    drop_fraction: float = Field(
        0.3, gt=0, lt=1, description="Fraction of the kept weights that the first update of rigl and set replaces."
    )
    finetune_epochs: float | None = Field(None, ge=0, description="Length of the final phase with fixed masks, epochs.")
    finetune_steps: int | None = Field(None, ge=0, description="Length of the final phase with fixed masks, steps.")
    mask_init: Literal["random", "magnitude", "from_weights", "from_file"] = Field(
        "random",
        description="First masks: random (fresh weights) or by magnitude (pretrained weights). With static also those "
        "of a sparse model: where its weights are not zero, or as a file of masks has them.",
    )
    mask_file: str | None = Field(
        None,
        description="With mask_init from_file: the masks.safetensors of a checkpoint, all of whose entries are sparse.",
    )
    include: list[str] = Field(default=[], description="Patterns of further weights to make entries.")
    exclude: list[str] = Field(default=[], description="Patterns of weights that must stay dense.")
    optimizer_state: Literal["keep_survivors", "reset"] = Field(
        "keep_survivors", description="At a boundary: keep the moments of weights that stay, or clear all of them."
    )
    regrow: Literal["zero", "last_value"] = Field(
        "zero", description="Where a grown weight starts: at zero, or at the value it had when it was pruned."
    )
    unpartitioned: Literal["average", "first"] = Field(
        "average", description="Parallel GaP: what becomes of weights in no partition: averaged, or worker 0's."
    )
    lr_restart: bool = Field(
        False, description="Whether the learning-rate schedule starts anew in every phase; else one covers the run."
    )
    seed: int = Field(0, ge=0, description="Seed of random masks, random growth, random order and random assignment.")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        # Strict mode refuses 1 for a float, which JSON writers produce for 1.0; bool is no number here.
        if isinstance(data, dict):
            for key in ("sparsity", "prune_ramp", *(f"{name}_epochs" for name in ("dense", *_TIMES, "update"))):
                if type(data.get(key)) is int:
                    with contextlib.suppress(OverflowError):
                        data = {**data, key: float(data[key])}
        return data

    @field_validator("distribution", mode="before")
    @classmethod
    def _distribution(cls, value: Any) -> Any:
        # Checked here, because pydantic reports a mistake in a union once per member.
        if value in ("uniform", "erk", "global"):
            return value
        rows = list(value.items()) if isinstance(value, dict) else []
        if rows and all(type(name) is str and type(s) in (int, float) and 0 <= s < 1 for name, s in rows):
            return {pattern: float(s) for pattern, s in value.items()}
        raise ValueError(
            'must be "uniform", "erk", "global", or an object with name patterns and the sparsity of each in [0, 1)'
        )

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

    @model_validator(mode="after")
    def _coherent(self) -> GaPConfig:
        given = self.model_fields_set
        if not isinstance(self.partitions, int) and "partition_assignment" in given:
            raise ValueError(
                '"partition_assignment" has no effect when "partitions" lists the patterns: remove one of the two'
            )
        for key in sorted(set(_UNUSED[self.method]) & given):
            raise ValueError(f'"{key}" has no effect with method={self.method!r}: remove it')
        self._check_times()
        if self.method not in _ONE_PHASE and "rounds" not in given:
            raise ValueError(f'"rounds" must be set with method={self.method!r}')
        if self.method in ("cyclic", "parallel") and self.kappa < 2:
            raise ValueError(f'partitions: {self.method} GaP needs at least 2; with one it is method="dsd"')
        self._check_init(given)
        if self.method != "dense" and not self.reuses_masks and "sparsity" not in given:
            raise ValueError(f'"sparsity" must be set with method={self.method!r}')
        if not self.reuses_masks and (self.method == "dense") != (self.sparsity == 0.0):
            raise ValueError(f'sparsity={self.sparsity} with method="{self.method}": 0 and "dense" go together')
        self._check_selection()
        if not (self.exploring or self.dense_epochs or self.dense_steps or self.finetune_epochs or self.finetune_steps):
            raise ValueError('the run would be empty: raise "rounds" or the length of the fine-tuning')
        return self

    def _check_init(self, given: set[str]) -> None:
        if self.reuses_masks and self.method != "static":
            raise ValueError(
                f'mask_init="{self.mask_init}" with method={self.method!r}: masks taken over stay as they are, so '
                'set "method" to "static"'
            )
        for key in ("sparsity", "distribution", "pattern"):
            if self.reuses_masks and key in given:
                raise ValueError(
                    f'"{key}" has no effect with mask_init="{self.mask_init}", whose masks say what is kept: remove it'
                )
        if (self.mask_init == "from_file") != (self.mask_file is not None):
            raise ValueError(f'"mask_file" with mask_init="{self.mask_init}": the file and "from_file" go together')

    def _check_times(self) -> None:
        for name in _TIMES:
            epochs, steps = f"{name}_epochs", f"{name}_steps"
            if (getattr(self, epochs) is None) == (getattr(self, steps) is None):
                raise ValueError(f'exactly one of "{epochs}" and "{steps}" must be set')
        if (self.phase_epochs is None) != (self.finetune_epochs is None):
            raise ValueError('"phase_..." and "finetune_..." must have the same unit: both _epochs or both _steps')
        wrong, right = ("steps", "epochs") if self.in_epochs else ("epochs", "steps")
        for name in ("dense", "update"):
            if getattr(self, f"{name}_{wrong}") is not None:
                raise ValueError(
                    f'"{name}_{wrong}" and "phase_{right}" must have the same unit: set "{name}_{right}" instead'
                )
        if self.updates and self.update_epochs is None and self.update_steps is None:
            why = "prune_ramp" if self.prune_ramp else f"method={self.method!r}"
            raise ValueError(f'"update_{right}" must be set with {why}: the time between two updates of the masks')
        if not self.updates and (self.update_epochs or self.update_steps):
            raise ValueError(
                f'"update_{right}" has no effect with method={self.method!r} without "prune_ramp": remove it'
            )

    def _check_selection(self) -> None:
        pattern = parse(self.pattern)
        shown = "{...}" if isinstance(self.distribution, dict) else self.distribution
        if isinstance(pattern, NofM) and self.distribution != "uniform":
            raise ValueError(
                f'pattern="{pattern}" with distribution="{shown}": every entry keeps {pattern.n} of '
                f'{pattern.m}, so set "distribution" to "uniform"'
            )
        if isinstance(pattern, NofM) and self.sparsity != pattern.sparsity:
            raise ValueError(
                f'pattern="{pattern}" with sparsity={self.sparsity}: keeps {pattern.n} of {pattern.m}, so set '
                f'"sparsity" to {pattern.sparsity}'
            )
        if self.updates and not isinstance(pattern, Unstructured):
            why = "prune_ramp" if self.prune_ramp else f"method={self.method!r}"
            raise ValueError(
                f'pattern="{pattern}" with {why}: masks change in single weights inside a phase, so set "pattern" to '
                '"unstructured"'
            )
        if self.distribution == "global" and not isinstance(pattern, Unstructured):
            raise ValueError(
                f'pattern="{pattern}" with distribution="global": one threshold orders single weights, so set '
                '"distribution" to "uniform" or "erk"'
            )
        if self.distribution == "global" and self.method in ("rigl", "set", "static"):
            raise ValueError(
                f'distribution="global" with method={self.method!r}: its budgets are fixed before there are weights '
                'to compare, so set "distribution" to "uniform" or "erk"'
            )

    @property
    def reuses_masks(self) -> bool:
        """Whether masks and budgets are those of a model that is sparse already."""
        return self.mask_init in ("from_weights", "from_file")

    @property
    def kappa(self) -> int:
        """Number of partitions."""
        return self.partitions if isinstance(self.partitions, int) else len(self.partitions)

    @property
    def exploring(self) -> int:
        """Number of phases of length T."""
        if self.method in _ONE_PHASE:
            return 1
        per_round = {"dsd": 2, "acdc": 2, "parallel": 1}.get(self.method, self.kappa)
        return per_round * self.rounds

    @property
    def updates(self) -> bool:
        """Whether masks change inside phases too, and not at their boundaries alone."""
        return self.prune_ramp > 0 or self.method in ("gradual", "rigl", "set")

    def as_dense(self) -> GaPConfig:
        """The dense run to compare with: of the same length, with the same learning-rate restarts."""
        times = [f"{name}_{unit}" for name in ("dense", *_TIMES) for unit in ("epochs", "steps")]
        data = {key: getattr(self, key) for key in (*times, "lr_restart", "seed") if key in self.model_fields_set}
        return GaPConfig.model_validate({**data, "method": "dense", "sparsity": 0.0, "rounds": self.exploring})

    @property
    def in_epochs(self) -> bool:
        """Whether times are in epochs; then the schedule needs the number of steps in an epoch."""
        return self.phase_epochs is not None

    @classmethod
    def load(cls, source: GaPConfig | dict[str, Any] | str | Path) -> GaPConfig:
        """A config from a file (.json, .yaml, .yml), a dict, or itself.

        Raises:
            ValueError: one line per mistake, each with the value given, what is allowed and the setting to change.
        """
        if isinstance(source, GaPConfig):
            return source
        data, origin = (source, "gap_config") if isinstance(source, dict) else (_read(Path(source)), str(source))
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(explain(error, origin, list(cls.model_fields))) from None

    def signature(self, version: str) -> str:
        """One pasteable line with everything that changes a result and nothing else, as sacreBLEU has it.

        >>> config = GaPConfig(sparsity=0.8, partitions=3, phase_epochs=1.0, rounds=2, finetune_epochs=2.0)
        >>> config.signature("0.1.0")
        'gap|method:cyclic|k:3|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:random|lr:continuous|seed:0|v:0.1.0'
        """
        parts: dict[str, object] = {"method": self.method}
        parts["k"] = self.kappa if isinstance(self.partitions, int) else json.dumps(self.partitions)
        if dense := self._length("dense"):
            parts["D"] = dense
        parts |= {"T": self._length("phase")}
        if self.method not in _ONE_PHASE:
            parts["rounds"] = self.rounds
        parts["ft"] = self._length("finetune")
        if not self.reuses_masks:
            parts["s"] = _exact(self.sparsity)
            parts["dist"] = self.distribution if isinstance(self.distribution, str) else json.dumps(self.distribution)
            parts["pat"] = self.pattern
        if "mask_init" not in _UNUSED[self.method]:
            parts["init"] = self.mask_init
        parts["lr"] = "restart" if self.lr_restart else "continuous"
        if self.updates:
            parts["every"] = self._length("update")
        if self.method in ("rigl", "set"):
            parts["drop"] = _exact(self.drop_fraction)
        if self.prune_ramp:
            parts["ramp"] = _exact(self.prune_ramp)
        for label, key in _SIGNATURE_LABELS.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                parts[label] = getattr(self, key)
        parts |= {"seed": self.seed, "v": version}
        return "|".join(["gap", *(f"{key}:{value}" for key, value in parts.items())])

    def _length(self, name: str) -> str:
        """A length with its unit; empty if it is not set or 0."""
        epochs, steps = getattr(self, f"{name}_epochs"), getattr(self, f"{name}_steps")
        length = epochs if epochs is not None else steps
        return f"{_exact(length)}{'ep' if epochs is not None else 'st'}" if length or name != "dense" else ""


def _exact(number: float | None) -> str:
    """The shortest text that means just this number: two settings never share a signature.

    >>> _exact(10.0), _exact(0.8), _exact(1234567)
    ('10', '0.8', '1234567')
    """
    return str(number).removesuffix(".0")


def _read(path: Path) -> Any:
    """The parsed content of a JSON or YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path}: cannot be read as a GaP config: {reason}") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml  # optional: only YAML configs need it

            return yaml.safe_load(text)
        return json.loads(text)
    except ImportError:
        raise ValueError(f"{path}: YAML configs need PyYAML (pip install pyyaml); JSON needs nothing") from None
    except Exception as error:  # the parsers raise many kinds; all mean the same to the user
        raise ValueError(f"{path}: not valid {'YAML' if path.suffix != '.json' else 'JSON'}: {error}") from None


def explain(error: ValidationError, origin: str, known: list[str]) -> str:
    """The mistakes in a config, one sentence each: value given, what is allowed, where to change it."""
    import difflib

    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden" and where in _RENAMED:
            hint = ' (true for "restart", false for "continuous")' if where == "lr" else ""
            lines.append(f'setting "{where}" in {origin} is now called "{_RENAMED[where]}"{hint}.')
        elif item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(known)}."
            lines.append(f'unknown setting "{where}" in {origin}: {hint}')
        elif not where:
            lines.append(f"{item['msg'].removeprefix('Value error, ')} (in {origin}).")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            lines.append(f'{where}={item["input"]!r}: {message}. Set "{item["loc"][0]}" in {origin}.')
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(GaPConfig.model_json_schema(), indent=2))
