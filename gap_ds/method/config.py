"""The config: one validated, immutable `GaPConfig`, from JSON, YAML, a dict, or the name of a shipped config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from gap_ds.method.config_file import explain, read
from gap_ds.method.fields import FURTHER_TIMES, TIMES, Fields
from gap_ds.method.methods import METHODS
from gap_ds.method.pattern import NofM, Unstructured, parse
from gap_ds.method.rules import Method

#: Labels of the settings that the signature has only where they are not the default. Labels never change, so that an
#: old signature can be compared with a new one.
_SIGNATURE_LABELS = {
    "assign": "partition_assignment",
    "order": "partition_order",
    "include": "include",
    "exclude": "exclude",
    "optimizer_state": "optimizer_state",
    "regrow": "regrow",
    "last_values": "regrow_storage",
    "target": "target",
    "grow": "grow",
    "grow_share": "grow_share",
    "moments": "regrow_moments",
    "lr_density": "lr_density_power",
    "shared": "unpartitioned",
}


class GaPConfig(Fields):
    """A complete description of one sparse training run, independent of model, backend and number of ranks.

    Times are counted in applied optimizer steps: a step skipped for an fp16 overflow does not count, and gradient
    accumulation counts once. Either all times are in epochs or all are in steps.

    Raises:
        pydantic.ValidationError: (a ValueError) for unknown keys, wrong types, values out of range and settings that
            would have no effect. `GaPConfig.load` raises a ValueError with one sentence per mistake instead.
    """

    #: The method's record, if the config was given one instead of a name.
    _given_method: Method | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, data: Any, fields: ModelWrapValidatorHandler[GaPConfig]) -> GaPConfig:
        method = data.get("method") if isinstance(data, dict) else None
        if isinstance(method, dict):
            method = _restored(method)
            data = {**data, "method": method}
        config = fields(data)
        if isinstance(method, Method):
            config._given_method = method
        if config is not data:
            config._check()
        return config

    @field_validator("method", mode="wrap")
    @classmethod
    def _method(cls, value: Any, name: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, Method):
            return name(value)
        if METHODS.get(value.name, value) != value:
            raise ValueError("is the name of a shipped method: give your record another one")
        known = {setting.removesuffix("_epochs").removesuffix("_steps") for setting in cls.model_fields}
        if unknown := sorted(value.reads - known):
            raise ValueError(f'its record reads "{unknown[0]}", which is no setting')
        if value.updates and "update" not in value.reads:
            raise ValueError('its record has updates=True, so its reads must contain "update"')
        return value.name

    @field_serializer("method")
    def _stored(self, name: str) -> Any:
        # A checkpoint keeps a record of the user without its functions: enough to read the config again.
        if self._given_method is None:
            return name
        data = _RECORD.dump_python(self._given_method, exclude={"dense", "rule"})
        return {**data, "reads": sorted(data["reads"])}

    def _check(self) -> None:
        """Refuse settings that do not go together."""
        given, method = self.model_fields_set, self.record
        if not isinstance(self.partitions, int) and "partition_assignment" in given:
            raise ValueError(
                '"partition_assignment" has no effect when "partitions" lists the patterns: remove one of the two'
            )
        for key in sorted(given):
            if not method.reads_setting(key):
                raise ValueError(f'"{key}" has no effect with method={self.method!r}: remove it')
        self._check_times()
        if method.reads_setting("rounds") and "rounds" not in given:
            raise ValueError(f'"rounds" must be set with method={self.method!r}')
        if self.kappa < method.least_partitions:
            raise ValueError(
                f'partitions: {self.method} GaP needs at least {method.least_partitions}; with one it is method="dsd"'
            )
        self._check_init(given)
        if method.prunes and not self.reuses_masks and "sparsity" not in given:
            raise ValueError(f'"sparsity" must be set with method={self.method!r}')
        if not self.reuses_masks and method.prunes == (self.sparsity == 0.0):
            raise ValueError(f'sparsity={self.sparsity} with method="{self.method}": 0 and "dense" go together')
        self._check_growth(given)
        self._check_selection()
        if not (self.exploring or self.dense_epochs or self.dense_steps or self.finetune_epochs or self.finetune_steps):
            raise ValueError('the run would be empty: raise "rounds" or the length of the fine-tuning')

    def _check_init(self, given: set[str]) -> None:
        if self.reuses_masks and not self.record.inherits_masks:
            raise ValueError(
                f'mask_init="{self.mask_init}" with method={self.method!r}: inherited masks do not change, so '
                'set "method" to "static"'
            )
        for key in ("sparsity", "distribution", "pattern"):
            if self.reuses_masks and key in given:
                raise ValueError(
                    f'"{key}" has no effect with mask_init="{self.mask_init}", whose masks are the budget: remove it'
                )
        if self.mask_init != "auto" and not self.begins_sparse:
            dense = "dense_epochs" if self.in_epochs else "dense_steps"
            what = 'target="rising"' if self.target == "rising" else f'"{dense}"'
            raise ValueError(f'"mask_init" has no effect with {what}, which begins dense: remove it')
        if (self.mask_init == "from_file") != (self.mask_file is not None):
            raise ValueError(f'"mask_file" with mask_init="{self.mask_init}": the file and "from_file" go together')

    def _check_times(self) -> None:
        for name in TIMES:
            epochs, steps = f"{name}_epochs", f"{name}_steps"
            if (getattr(self, epochs) is None) == (getattr(self, steps) is None):
                raise ValueError(f'exactly one of "{epochs}" and "{steps}" must be set')
        if (self.phase_epochs is None) != (self.finetune_epochs is None):
            raise ValueError('"phase_..." and "finetune_..." must have the same unit: both _epochs or both _steps')
        wrong, right = ("steps", "epochs") if self.in_epochs else ("epochs", "steps")
        for name in FURTHER_TIMES:
            if getattr(self, f"{name}_{wrong}") is not None:
                raise ValueError(
                    f'"{name}_{wrong}" and "phase_{right}" must have the same unit: set "{name}_{right}" instead'
                )
        if self.updates and self.update_epochs is None and self.update_steps is None:
            if self.target == "rising":
                why = 'target="rising"'
            else:
                why = "prune_ramp" if self.prune_ramp else f"method={self.method!r}"
            raise ValueError(f'"update_{right}" must be set with {why}: the time between two updates of the masks')
        if not self.updates and (self.update_epochs or self.update_steps):
            raise ValueError(
                f'"update_{right}" has no effect with method={self.method!r} without "prune_ramp": remove it'
            )

    def _check_growth(self, given: set[str]) -> None:
        if self.grow == "dense" and "grow_share" in given:
            raise ValueError('"grow_share" has no effect with grow="dense": remove it')
        if self.regrow == "zero" and "regrow_storage" in given:
            raise ValueError('"regrow_storage" has no effect with regrow="zero": remove it')
        if self.regrow_moments != "zero" and self.optimizer_state == "reset" and not self.record.updates:
            raise ValueError(
                f'regrow_moments="{self.regrow_moments}" with optimizer_state="reset": has no effect, because all '
                "moments are cleared: remove it"
            )
        if self.regrow_moments == "mean_second" and self.record.has_workers:
            raise ValueError(
                f'regrow_moments="mean_second" with method={self.method!r}: set "regrow_moments" to "keep_second"'
            )
        if self.grow != "dense" and self.regrow != "zero":
            raise ValueError(f'grow="{self.grow}" with regrow="{self.regrow}": set "regrow" to "zero"')

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
        if self.distribution == "global" and not isinstance(pattern, Unstructured):
            raise ValueError(
                f'pattern="{pattern}" with distribution="global": one threshold orders single weights, so set '
                '"distribution" to "uniform" or "erk"'
            )
        if self.distribution == "global" and not self.record.global_budget:
            raise ValueError(
                f'distribution="global" with method={self.method!r}: its budgets are fixed before there are weights '
                'to compare, so set "distribution" to "uniform" or "erk"'
            )

    @property
    def reuses_masks(self) -> bool:
        """True if masks and budgets come from a model that is sparse already."""
        return self.mask_init in ("from_weights", "from_file")

    @property
    def begins_sparse(self) -> bool:
        """True if the first masks follow "mask_init": with a rising target, or a dense phase first, none are chosen."""
        dense = self.target == "rising" or self.dense_epochs or self.dense_steps
        return self.record.reads_setting("mask_init") and not dense

    @property
    def kappa(self) -> int:
        """Number of partitions."""
        return self.partitions if isinstance(self.partitions, int) else len(self.partitions)

    @property
    def record(self) -> Method:
        """The record of the method."""
        return self._given_method or METHODS[self.method]

    @property
    def phases_per_round(self) -> int:
        """Exploring phases of a round."""
        return self.record.phases_per_round or self.kappa

    @property
    def exploring(self) -> int:
        """Number of phases of length T."""
        return self.phases_per_round * self.rounds

    @property
    def updates(self) -> bool:
        """True if masks also change inside phases."""
        return self.prune_ramp > 0 or self.target == "rising" or self.record.updates

    def as_dense(self) -> GaPConfig:
        """Return the dense run to compare with: equally long, with the same learning-rate restarts."""
        times = [f"{name}_{unit}" for name in ("dense", *TIMES) for unit in ("epochs", "steps")]
        data = {key: getattr(self, key) for key in (*times, "lr_restart", "seed") if key in self.model_fields_set}
        return GaPConfig.model_validate({**data, "method": "dense", "sparsity": 0.0, "rounds": self.exploring})

    @property
    def in_epochs(self) -> bool:
        """True if times are in epochs; the schedule then needs the number of steps in an epoch."""
        return self.phase_epochs is not None

    @classmethod
    def load(cls, source: GaPConfig | dict[str, Any] | str | Path) -> GaPConfig:
        """Return a config from a file (.json, .yaml, .yml), the name of a shipped config, a dict, or a config.

        In a dict, `method` may be a `Method`, your record, in place of a name.

        Raises:
            ValueError: one line per mistake, each with the value given, what is allowed and the setting to change.

        >>> GaPConfig.load("cyclic_90").sparsity
        0.9
        """
        if isinstance(source, GaPConfig):
            return source
        if not isinstance(source, Mapping | str | os.PathLike) or not str(source):
            raise ValueError(
                f"config={source!r}: must be a GaPConfig, a dict, the path of a JSON or YAML file, or the name of a "
                "shipped config."
            )
        data, origin = (dict(source), "gap_config") if isinstance(source, Mapping) else (read(source), str(source))
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(explain(error, origin, list(cls.model_fields))) from None

    def signature(self, version: str) -> str:
        """Return one line with everything that changes a result and nothing else, like the signature of sacreBLEU.

        >>> config = GaPConfig(sparsity=0.8, partitions=3, phase_epochs=1.0, rounds=2, finetune_epochs=2.0)
        >>> config.signature("0.1.0")
        'gap|method:cyclic|k:3|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:random|lr:continuous|seed:0|v:0.1.0'
        """
        parts: dict[str, object] = {"method": self.method}
        parts["k"] = self.kappa if isinstance(self.partitions, int) else json.dumps(self.partitions)
        if dense := self._length("dense"):
            parts["D"] = dense
        parts |= {"T": self._length("phase")}
        if self.record.reads_setting("rounds"):
            parts["rounds"] = self.rounds
        parts["ft"] = self._length("finetune")
        if not self.reuses_masks:
            parts["s"] = _exact(self.sparsity)
            parts["dist"] = self.distribution if isinstance(self.distribution, str) else json.dumps(self.distribution)
            parts["pat"] = self.pattern
        if self.begins_sparse:
            parts["init"] = "random" if self.mask_init == "auto" else self.mask_init
        parts["lr"] = "restart" if self.lr_restart else "continuous"
        if self.updates:
            parts["every"] = self._length("update")
        if self.record.reads_setting("drop_fraction"):
            parts["drop"] = _exact(self.drop_fraction)
        if self.prune_ramp:
            parts["ramp"] = _exact(self.prune_ramp)
        if self.regrow_warmup_epochs or self.regrow_warmup_steps:
            parts["warm"] = self._length("regrow_warmup")
        for label, key in _SIGNATURE_LABELS.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                parts[label] = getattr(self, key)
        parts |= {"seed": self.seed, "v": version}
        return "|".join(["gap", *(f"{key}:{value}" for key, value in parts.items())])

    def _length(self, name: str) -> str:
        """Return a length with its unit; the empty string for dense_epochs or dense_steps of 0."""
        epochs, steps = getattr(self, f"{name}_epochs"), getattr(self, f"{name}_steps")
        length = epochs if epochs is not None else steps
        return f"{_exact(length)}{'ep' if epochs is not None else 'st'}" if length or name != "dense" else ""


_RECORD = TypeAdapter(Method)


def _restored(data: dict[str, Any]) -> Method:
    """Return a stored record; its functions raise a ValueError."""

    def absent(*_: Any) -> Any:
        raise ValueError(f'method={data["name"]!r}: its functions are in no file. Pass its record as "method".')

    try:
        return _RECORD.validate_python({**data, "dense": absent, "rule": absent})
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise ValueError(f'method: is neither a name nor a record, because "{key}" is missing or wrong') from None


def _exact(number: float | None) -> str:
    """Return the shortest text that means just this number: two settings never share a signature.

    >>> _exact(10.0), _exact(0.8), _exact(1234567)
    ('10', '0.8', '1234567')
    """
    return str(number).removesuffix(".0")
