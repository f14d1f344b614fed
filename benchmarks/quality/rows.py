"""Rows of the tables: functions (sparsity, epochs) -> GaP config of exactly that many epochs.

Lengths below are in eighths of the run: epochs at the usual budget of 8. All sparse rows except `dsd` end with a
fine-tuning with fixed masks. By default sparsity is uniform and one learning-rate schedule covers the whole run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

Config = dict[str, Any]

TWO_SEEDS = (0, 1)


@dataclass(frozen=True)
class Row:
    """One method of a table."""

    name: str
    title: str
    make: Callable[[float], Config]  # epochs -> config without sparsity and seed
    seeds: tuple[int, ...] = (0,)
    workers: int = 1  # processes that train parts of the model in parallel (parallel GaP)
    dense: bool = False  # the baseline: one run for all sparsities

    def config(self, sparsity: float, epochs: float, seed: int = 0) -> Config:
        """Return the GaP config of a run of exactly `epochs` epochs.

        >>> BY_NAME["gradual"].config(0.8, 8)["phase_epochs"], BY_NAME["gradual"].config(0.8, 4)["phase_epochs"]
        (5.0, 2.5)
        """
        assert (sparsity == 0) == self.dense
        return {**self.make(epochs), "sparsity": sparsity, "seed": seed}


def total_epochs(config: Mapping[str, Any]) -> Fraction:
    """Return the epochs of a whole run: dense_epochs + phases x phase_epochs + finetune_epochs.

    >>> total_epochs({"method": "acdc", "dense_epochs": 1, "rounds": 5, "phase_epochs": 0.5, "finetune_epochs": 2})
    Fraction(8, 1)
    """
    dense, phase, finetune = (
        Fraction(str(config.get(f"{name}_epochs") or 0)) for name in ("dense", "phase", "finetune")
    )
    return dense + _phases(config) * phase + finetune


def _phases(config: Mapping[str, Any]) -> int:
    method, rounds = config.get("method", "cyclic"), int(config.get("rounds", 1))
    if method in ("one_shot", "gradual", "rigl", "set"):
        return 1
    return rounds * {"dsd": 2, "acdc": 2, "parallel": 1}.get(method, _partitions(config))


def _partitions(config: Mapping[str, Any]) -> int:
    partitions = config.get("partitions", 1)
    return partitions if isinstance(partitions, int) else len(partitions)


def _times(epochs: float, **eighths: float) -> Config:
    """Return lengths in epochs. Multiples of 1/2 are exact in binary, so the sum is exactly the budget."""
    return {f"{name}_epochs": epochs * value / 8 for name, value in eighths.items()}


def _dense(epochs: float) -> Config:
    return {"method": "dense", "rounds": 1, **_times(epochs, phase=8, finetune=0)}


def _cyclic(partitions: int, **settings: Any) -> Callable[[float], Config]:
    rounds = 6 // partitions  # six phases of one epoch for any number of partitions
    fixed = {"method": "cyclic", "partitions": partitions, "rounds": rounds, **settings}
    return lambda epochs: {**fixed, **_times(epochs, phase=1, finetune=2)}


def _dense_first(**settings: Any) -> Callable[[float], Config]:
    """Dense at first, then one round with gradual pruning in the second half of every phase."""
    fixed = {"method": "cyclic", "partitions": 3, "rounds": 1, "prune_ramp": 0.5, **settings}
    return lambda epochs: {**fixed, **_times(epochs, dense=2, phase=1, finetune=3, update=0.1)}


def _gradual_first(epochs: float) -> Config:
    """Gradual pruning of all but the first partition, then one short round of C-GaP."""
    fixed = {"method": "cyclic", "partitions": 3, "rounds": 1, "prune_ramp": 0.75}
    return {**fixed, **_times(epochs, dense=4, phase=0.5, finetune=2.5, update=0.1)}


def _static(restart: bool) -> Callable[[float], Config]:
    """The phases of `cyclic_3`, so that learning-rate restarts fall on the same steps."""
    fixed = {"method": "static", "partitions": 3, "rounds": 2, "lr_restart": restart}
    return lambda epochs: {**fixed, **_times(epochs, phase=1, finetune=2)}


def _one_shot(epochs: float) -> Config:
    return {"method": "one_shot", **_times(epochs, phase=4, finetune=4)}


def _gradual(epochs: float) -> Config:
    return {"method": "gradual", **_times(epochs, dense=1, phase=5, finetune=2, update=0.1)}


def _regrown(method: str, **settings: Any) -> Callable[[float], Config]:
    return lambda epochs: {"method": method, **settings, **_times(epochs, phase=6, finetune=2, update=0.1)}


def _dsd(epochs: float) -> Config:
    return {"method": "dsd", "rounds": 2, "lr_restart": True, **_times(epochs, phase=2, finetune=0)}


def _acdc(epochs: float) -> Config:
    return {"method": "acdc", "rounds": 5, **_times(epochs, dense=1, phase=0.5, finetune=2)}


def _parallel(epochs: float) -> Config:
    return {"method": "parallel", "partitions": 3, "rounds": 6, **_times(epochs, phase=1, finetune=2)}


def _parallel_dense_first(epochs: float) -> Config:
    """The phases of `cyclic_3_dense_first`, with every partition dense in all of them."""
    fixed = {"method": "parallel", "partitions": 3, "rounds": 3, "prune_ramp": 0.5}
    return {**fixed, **_times(epochs, dense=2, phase=1, finetune=3, update=0.1)}


#: In the order of the runs: the rows that a table needs most come first.
ROWS: tuple[Row, ...] = (
    Row("dense", "dense", _dense, TWO_SEEDS, dense=True),
    Row("cyclic_3", "C-GaP, 3 partitions", _cyclic(3), TWO_SEEDS),
    Row("cyclic_3_dense_first", "C-GaP, 3 partitions, dense first, gradual in phases", _dense_first(), TWO_SEEDS),
    Row("static", "fixed random mask, learning-rate restarts", _static(True), TWO_SEEDS),
    Row("gradual", "gradual magnitude pruning", _gradual, TWO_SEEDS),
    Row("rigl", "RigL", _regrown("rigl"), TWO_SEEDS),
    Row("acdc", "AC/DC", _acdc, TWO_SEEDS),
    Row("one_shot", "one-shot magnitude pruning, half way", _one_shot),
    Row("static_continuous", "fixed random mask", _static(False)),
    Row("set", "SET", _regrown("set")),
    Row("rigl_erk", "RigL, ERK", _regrown("rigl", distribution="erk")),
    Row("dsd", "dense-sparse-dense, learning-rate restarts", _dsd),
    Row("cyclic_2", "C-GaP, 2 partitions", _cyclic(2)),
    Row("cyclic_3_erk", "C-GaP, 3 partitions, ERK", _cyclic(3, distribution="erk")),
    Row("cyclic_3_restart", "C-GaP, 3 partitions, learning-rate restarts", _cyclic(3, lr_restart=True)),
    Row("cyclic_3_random_order", "C-GaP, 3 partitions, random order", _cyclic(3, partition_order="random")),
    Row(
        "cyclic_3_dense_first_erk",
        "C-GaP, 3 partitions, dense first, gradual in phases, ERK",
        _dense_first(distribution="erk"),
    ),
    Row("cyclic_3_gradual_first", "C-GaP, 3 partitions, a round after gradual pruning", _gradual_first),
    Row("parallel_3", "P-GaP, 3 partitions on 3 workers", _parallel, workers=3),
    Row(
        "parallel_3_dense_first",
        "P-GaP, 3 partitions on 3 workers, dense first, gradual in phases",
        _parallel_dense_first,
        workers=3,
    ),
)
BY_NAME = {row.name: row for row in ROWS}


def extra_rows(path: Path, epochs: float) -> tuple[Row, ...]:
    """Read rows from a JSON file {name: GaP config without sparsity and seed, times in epochs}.

    Raises:
        ValueError: a row is not comparable, for example by its length or a taken name. Names row and setting.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--extra {path}: cannot be read as JSON ({error}).") from None
    if not isinstance(given, dict) or not all(isinstance(config, dict) for config in given.values()):
        raise ValueError(f"--extra {path}: must hold an object of GaP configs by name.")
    return tuple(_extra(name, config, epochs, f"row {name!r} of --extra {path}") for name, config in given.items())


def _extra(name: str, config: Config, epochs: float, where: str) -> Row:
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        raise ValueError(f"{where}: a name must be of letters, digits and _.+-, because it names a folder.")
    if name in BY_NAME:
        raise ValueError(f"{where}: is the name of a row of the table. Choose another.")
    if taken := sorted({"sparsity", "seed"} & set(config)):
        raise ValueError(f'{where}: "{taken[0]}" is set by the table. Remove it.')
    if any(key.endswith("_steps") for key in config):
        raise ValueError(f"{where}: lengths must be in epochs. Set phase_epochs and so on.")
    if config.get("method") == "dense":
        raise ValueError(f"{where}: the dense run is a row of the table already. Remove this one.")
    if (length := total_epochs(config)) != Fraction(str(epochs)):
        raise ValueError(f"{where}: lasts {float(length):g} epochs, must last {epochs:g}. Set phase_epochs or rounds.")
    workers = _partitions(config) if config.get("method") == "parallel" else 1
    return Row(name, name, lambda _: config, workers=workers)
