"""What the user asks for: one validated, immutable `GaPConfig`, read from JSON, YAML or a dict.

`python -m gap_ds.config` prints the JSON schema, so that editors can check a config while it is typed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gap_ds.pattern import NofM, parse

Method = Literal["cyclic", "dsd", "static", "dense"]

#: Settings that a method never reads. Setting one of them is an error, because it would have no effect.
_UNUSED: dict[str, tuple[str, ...]] = {
    "cyclic": (),
    "dsd": ("partitions", "assign", "order", "init"),
    "static": ("order", "optimizer_state"),
    "dense": ("distribution", "pattern", "assign", "order", "init", "optimizer_state"),
}


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
        "cyclic", description="cyclic: C-GaP. dsd: C-GaP with one partition. static: fixed masks. dense: none."
    )
    sparsity: float = Field(ge=0.0, lt=1.0, description="Fraction of the entries' weights that the final model drops.")
    distribution: Literal["uniform", "erk"] = Field(
        "uniform", description="How the sparsity is spread: the same for every entry, or Erdos-Renyi-Kernel."
    )
    pattern: str = Field(
        "unstructured",
        description="Which weights may be kept together: unstructured, N:M (2:4) of every M inputs, or block:HxW "
        "(block:4x4) of outputs x inputs.",
    )
    partitions: int | list[list[str]] = Field(
        1, description="Number of partitions (kappa), or the partitions written out as lists of name patterns."
    )
    assign: Literal["contiguous", "interleaved", "random"] = Field(
        "contiguous", description="How blocks are dealt to the partitions when only their number is given."
    )
    order: Literal["cyclic", "random"] = Field("cyclic", description="Order in which the partitions become dense.")
    phase_epochs: float | None = Field(None, gt=0, description="T, the length of a phase, in epochs.")
    phase_steps: int | None = Field(None, gt=0, description="T, the length of a phase, in applied optimizer steps.")
    rounds: int = Field(ge=0, description="Number of rounds; a round makes every partition dense once.")
    finetune_epochs: float | None = Field(None, ge=0, description="Length of the final phase with fixed masks, epochs.")
    finetune_steps: int | None = Field(None, ge=0, description="Length of the final phase with fixed masks, steps.")
    init: Literal["random", "magnitude"] = Field(
        "random", description="First masks: random (fresh weights) or by magnitude (pretrained weights)."
    )
    include: list[str] = Field(default=[], description="Patterns of further weights to make entries.")
    exclude: list[str] = Field(default=[], description="Patterns of weights that must stay dense.")
    optimizer_state: Literal["keep_survivors", "reset"] = Field(
        "keep_survivors", description="At a boundary: keep the moments of weights that stay, or clear all of them."
    )
    lr: Literal["continuous", "restart"] = Field(
        "continuous", description="One learning-rate schedule over the run, or the same one again in every phase."
    )
    seed: int = Field(0, ge=0, description="Seed of the random masks, the random order and the random assignment.")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        # Strict mode refuses 1 for a float, which JSON writers produce for 1.0; bool is no number here.
        if isinstance(data, dict):
            for key in ("sparsity", "phase_epochs", "finetune_epochs"):
                if type(data.get(key)) is int:
                    data = {**data, key: float(data[key])}
        return data

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
        for epochs, steps in (("phase_epochs", "phase_steps"), ("finetune_epochs", "finetune_steps")):
            if (getattr(self, epochs) is None) == (getattr(self, steps) is None):
                raise ValueError(f'exactly one of "{epochs}" and "{steps}" must be set')
        if (self.phase_epochs is None) != (self.finetune_epochs is None):
            raise ValueError('"phase_..." and "finetune_..." must have the same unit: both _epochs or both _steps')
        if not isinstance(self.partitions, int) and "assign" in self.model_fields_set:
            raise ValueError('"assign" has no effect when "partitions" lists the patterns: remove one of the two')
        for key in sorted(set(_UNUSED[self.method]) & self.model_fields_set):
            raise ValueError(f'"{key}" has no effect with method={self.method!r}: remove it')
        if self.method == "cyclic" and self.kappa < 2:
            raise ValueError('partitions: cyclic GaP needs at least 2; with one it is method="dsd"')
        if (self.method == "dense") != (self.sparsity == 0.0):
            raise ValueError(f'sparsity={self.sparsity} with method="{self.method}": 0 and "dense" go together')
        pattern = parse(self.pattern)
        if isinstance(pattern, NofM) and self.distribution != "uniform":
            raise ValueError(
                f'pattern="{pattern}" with distribution="{self.distribution}": every entry keeps {pattern.n} of '
                f'{pattern.m}, so set "distribution" to "uniform"'
            )
        if isinstance(pattern, NofM) and self.sparsity != pattern.sparsity:
            raise ValueError(
                f'pattern="{pattern}" with sparsity={self.sparsity}: keeps {pattern.n} of {pattern.m}, so set '
                f'"sparsity" to {pattern.sparsity}'
            )
        if self.rounds == 0 and not (self.finetune_epochs or self.finetune_steps):
            raise ValueError('the run would be empty: raise "rounds" or the length of the fine-tuning')
        return self

    @property
    def kappa(self) -> int:
        """Number of partitions."""
        return self.partitions if isinstance(self.partitions, int) else len(self.partitions)

    def as_dense(self) -> GaPConfig:
        """The dense run to compare with: of the same length, with the same learning-rate restarts."""
        same = ("phase_epochs", "phase_steps", "rounds", "finetune_epochs", "finetune_steps", "lr", "seed")
        phases = 2 * self.rounds if self.method == "dsd" else self.kappa * self.rounds
        data = {key: getattr(self, key) for key in same if key in self.model_fields_set}
        return GaPConfig.model_validate({**data, "method": "dense", "sparsity": 0.0, "rounds": phases})

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
        unit = "ep" if self.in_epochs else "st"
        length = self.phase_epochs if self.in_epochs else self.phase_steps
        finetune = self.finetune_epochs if self.in_epochs else self.finetune_steps
        parts: dict[str, object] = {"method": self.method}
        parts["k"] = self.kappa if isinstance(self.partitions, int) else json.dumps(self.partitions)
        parts |= {"T": f"{_exact(length)}{unit}", "rounds": self.rounds, "ft": f"{_exact(finetune)}{unit}"}
        parts["s"] = _exact(self.sparsity)
        parts |= {"dist": self.distribution, "pat": self.pattern}
        if "init" not in _UNUSED[self.method]:
            parts["init"] = self.init
        parts["lr"] = self.lr
        for key in ("assign", "order", "include", "exclude", "optimizer_state"):
            if getattr(self, key) != type(self).model_fields[key].default:
                parts[key] = getattr(self, key)
        parts |= {"seed": self.seed, "v": version}
        return "|".join(["gap", *(f"{key}:{value}" for key, value in parts.items())])


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
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(known)}."
            lines.append(f'unknown setting "{where}" in {origin}: {hint}')
        elif item["type"] == "missing":
            lines.append(f'"{where}" is missing in {origin}: it must be set.')
        elif not where:
            lines.append(f"{item['msg'].removeprefix('Value error, ')} (in {origin}).")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            lines.append(f'{where}={item["input"]!r}: {message}. Set "{item["loc"][0]}" in {origin}.')
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(GaPConfig.model_json_schema(), indent=2))
