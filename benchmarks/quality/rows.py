"""Rows of the tables: functions (sparsity, epochs) -> GaP config of exactly that many epochs.

Lengths below are in eighths of the run: epochs at the usual budget of 8. All sparse rows except `dsd` end with a
fine-tuning with fixed masks. By default sparsity is uniform and one learning-rate schedule covers the whole run.

Rows with `equal_flops` need the FLOPs of gradual pruning: `equalised` moves time between the dense phase at the start
and the fine-tuning at the end until they do. FLOPs are linear in the sparsity, so the lengths hold for every sparsity.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

Config = dict[str, Any]

TWO_SEEDS, FOUR_SEEDS = (0, 1), (0, 1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One method of a table."""

    name: str
    title: str
    make: Callable[[float], Config]  # epochs -> config without sparsity and seed
    seeds: tuple[int, ...] = (0,)
    workers: int = 1  # processes that train parts of the model in parallel (parallel GaP)
    dense: bool = False  # the baseline: one run for all sparsities
    equal_flops: bool = False  # lengths are chosen for the FLOPs of gradual pruning
    taught: bool = False  # learns from the dense model of its seed in the fine-tuning
    pretrained: bool = False  # starts from the dense model of its seed
    sparsities: tuple[float, ...] | None = None  # all that the method can have; None: those of the table

    @property
    def after_dense(self) -> bool:
        """True if it needs the dense model of its seed."""
        return self.taught or self.pretrained

    def config(self, sparsity: float, epochs: float, seed: int = 0) -> Config:
        """Return the GaP config of a run of exactly `epochs` epochs.

        >>> BY_NAME["gradual"].config(0.8, 8)["phase_epochs"], BY_NAME["gradual"].config(0.8, 4)["phase_epochs"]
        (5.0, 2.5)
        """
        assert (sparsity == 0) == self.dense
        config = self.make(epochs)
        config = equalised(config, epochs) if self.equal_flops else config
        return {**config, "sparsity": sparsity, "seed": seed}


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
    if method in ("one_shot", "gradual", "granet", "rigl", "set"):
        return 1
    return rounds * {"dsd": 2, "acdc": 2, "parallel": 1}.get(method, _partitions(config))


def _partitions(config: Mapping[str, Any]) -> int:
    partitions = config.get("partitions", 1)
    return partitions if isinstance(partitions, int) else len(partitions)


def pruned_share(config: Mapping[str, Any]) -> float:
    """Return the share of the weights to prune that is pruned, averaged over the steps of a run.

    With sparsity s and a share f of dense FLOPs in prunable weights, training FLOPs are 1 - s f times this of a dense
    run. Entries are taken to be spread evenly over the partitions.

    >>> round(pruned_share({"method": "one_shot", "phase_epochs": 4, "finetune_epochs": 4}), 3)
    0.5
    >>> round(pruned_share({"partitions": 4, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 4}), 3)
    0.875
    """
    return _pruned_share(json.dumps(config, sort_keys=True))


@functools.cache
def _pruned_share(text: str) -> float:
    from gap_ds import GaPConfig  # imports torch, for seconds: only tables with rows of equal FLOPs need it
    from gap_ds.method import schedule

    config = GaPConfig.load({**json.loads(text), "sparsity": 0.5, "seed": 0})
    plan = schedule.build(config, steps_per_epoch=1000)
    partitions = _partitions(json.loads(text))
    return 2 * (1 - plan.mean_density([1] * partitions, [2] * partitions))


def equalised(config: Config, epochs: float, tolerance: float = 0.005) -> Config:
    """Return a config with `dense_epochs` and `finetune_epochs` such that its FLOPs equal those of gradual pruning.

    Lengths within `tolerance` (of `pruned_share`) stay as they are; others become multiples of 1/800 of
    the run: 0.01 epochs at the usual budget of 8.

    Raises:
        ValueError: no lengths have these FLOPs.

    >>> changed = equalised({"partitions": 2, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 6}, 8)
    >>> changed["dense_epochs"], changed["finetune_epochs"], float(total_epochs(changed))
    (1.31, 4.69, 8.0)
    """
    wanted = pruned_share(_gradual()(epochs))
    if abs(pruned_share(config) - wanted) <= tolerance:
        return config
    free = Fraction(str(config.get("dense_epochs") or 0)) + Fraction(str(config.get("finetune_epochs") or 0))
    unit = Fraction(str(epochs)) / 800
    few, many = 0, math.ceil(free / unit) - 1  # units of the dense phase: FLOPs grow with them
    while few < many:
        middle = (few + many) // 2
        below = pruned_share(_lengthened(config, middle * unit, free)) <= wanted
        few, many = (few, middle) if below else (middle + 1, many)
    found = _lengthened(config, few * unit, free)
    if abs(pruned_share(found) - wanted) > tolerance:
        raise ValueError(
            f"{json.dumps(config)}: prunes {pruned_share(found):.3f} of the weights to prune on average, gradual "
            f"pruning {wanted:.3f}, and no dense_epochs makes them equal. Set phase_epochs or rounds."
        )
    return found


def _lengthened(config: Config, dense: Fraction, free: Fraction) -> Config:
    """Return a config with `dense` epochs in the dense phase and the rest of `free` in fine-tuning."""
    return {**config, "dense_epochs": float(dense), "finetune_epochs": float(free - dense)}


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


def _one_shot(**settings: Any) -> Callable[[float], Config]:
    return lambda epochs: {"method": "one_shot", **settings, **_times(epochs, phase=4, finetune=4)}


def _gradual(**settings: Any) -> Callable[[float], Config]:
    return lambda epochs: {"method": "gradual", **settings, **_times(epochs, dense=1, phase=5, finetune=2, update=0.1)}


def _granet(**settings: Any) -> Callable[[float], Config]:
    """Gradual pruning, whose updates also drop and grow a share of the kept weights."""
    return _gradual(method="granet", **settings)


def _rising(
    method: str = "cyclic",
    partitions: int = 3,
    rounds: int = 3,
    *,
    length: float = 0.5,
    dense: float = 0.5,
    update: float = 0.1,
    warmup: float = 0.0,
    **settings: Any,
) -> Callable[[float], Config]:
    """A level of the sparse partitions that falls by the cubic of gradual pruning.

    length (of a phase), dense, update, warmup (of grown weights): in eighths of the run; fine-tuning is the rest.
    """
    fixed = {"method": method, "partitions": partitions, "rounds": rounds, "target": "rising", "prune_ramp": 0.5}
    phases = rounds * (1 if method == "parallel" else partitions)
    times = {"phase": length, "dense": dense, "update": update, "finetune": 8 - dense - phases * length}
    times |= {"regrow_warmup": warmup} if warmup else {}
    return lambda epochs: {**fixed, **settings, **_times(epochs, **times)}


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


_GROWN: Config = {"grow": "gradient", "prune_ramp": 1.0}
_KEPT: Config = {"regrow_moments": "keep_second"}
_LONGER: Config = {"lr_density_power": 0.5}
_SCALED: Config = {"lr_density_power": 1.0}
_ERK: Config = {"distribution": "erk"}

#: C-GaP whose two partitions grow by a share: the recipe that leads, without its settings of moments and steps.
_grown = functools.partial(_rising, partitions=2, rounds=5, dense=1, grow_share=0.3, **_GROWN)
_GROWN_TITLE = "C-GaP, 2 partitions, rising target, 30% grown by gradient"

#: In the order of the runs: the rows that a table needs most come first.
ROWS: tuple[Row, ...] = (
    Row("dense", "dense", _dense, FOUR_SEEDS, dense=True),
    Row("cyclic_3", "C-GaP, 3 partitions", _cyclic(3), FOUR_SEEDS),
    Row("cyclic_3_dense_first", "C-GaP, 3 partitions, dense first, gradual in phases", _dense_first(), TWO_SEEDS),
    Row("static", "fixed random mask, learning-rate restarts", _static(True), TWO_SEEDS),
    Row("gradual", "gradual magnitude pruning", _gradual(), FOUR_SEEDS),
    Row("rigl", "RigL", _regrown("rigl"), TWO_SEEDS),
    Row("acdc", "AC/DC", _acdc, TWO_SEEDS),
    Row("one_shot", "one-shot magnitude pruning, half way", _one_shot()),
    Row("static_continuous", "fixed random mask", _static(False)),
    Row("set", "SET", _regrown("set")),
    Row("rigl_erk", "RigL, ERK", _regrown("rigl", **_ERK)),
    Row("dsd", "dense-sparse-dense, learning-rate restarts", _dsd),
    Row("cyclic_2", "C-GaP, 2 partitions", _cyclic(2)),
    Row("cyclic_3_erk", "C-GaP, 3 partitions, ERK", _cyclic(3, **_ERK)),
    Row("cyclic_3_restart", "C-GaP, 3 partitions, learning-rate restarts", _cyclic(3, lr_restart=True)),
    Row("cyclic_3_random_order", "C-GaP, 3 partitions, random order", _cyclic(3, partition_order="random")),
    Row(
        "cyclic_3_dense_first_erk",
        "C-GaP, 3 partitions, dense first, gradual in phases, ERK",
        _dense_first(**_ERK),
    ),
    Row("cyclic_3_gradual_first", "C-GaP, 3 partitions, a round after gradual pruning", _gradual_first),
    Row("parallel_3", "P-GaP, 3 partitions on 3 workers", _parallel, workers=3),
    Row(
        "parallel_3_dense_first",
        "P-GaP, 3 partitions on 3 workers, dense first, gradual in phases",
        _parallel_dense_first,
        workers=3,
    ),
    # After the others: the place of a row decides its colour and marker.
    Row("granet", "gradual pruning with regrowth (GraNet)", _granet(), FOUR_SEEDS, equal_flops=True),
    Row("cyclic_3_rising", "C-GaP, 3 partitions, rising target", _rising(), FOUR_SEEDS, equal_flops=True),
    Row(
        "cyclic_2_rising_grown",
        _GROWN_TITLE,
        _grown(),
        equal_flops=True,
    ),
    Row(
        "cyclic_3_rising_grown_fast",
        "C-GaP, 3 partitions, rising target, 30% grown by gradient, phases of 1/4 epoch",
        _rising(rounds=6, length=0.25, update=0.05, dense=1, grow_share=0.3, **_GROWN),
        equal_flops=True,
    ),
    Row(
        "cyclic_3_rising_grown",
        "C-GaP, 3 partitions, rising target, 50% grown by gradient",
        _rising(dense=1, grow="gradient", grow_share=0.5),
        equal_flops=True,
    ),
    Row(
        "granet_kept",
        "gradual pruning with regrowth (GraNet), second moments kept",
        _granet(regrow_moments="keep_second"),
        equal_flops=True,
    ),
    Row(
        "cyclic_2_rising_grown_kept",
        f"{_GROWN_TITLE}, second moments kept",
        _grown(**_KEPT),
        FOUR_SEEDS,
        equal_flops=True,
    ),
    Row(
        "cyclic_2_rising_gentle",
        "C-GaP, 2 partitions, rising target, 10% grown by gradient and warmed up, phases of 1/4 epoch",
        _rising(
            partitions=2, rounds=10, length=0.25, update=0.05, dense=1, grow_share=0.1, warmup=0.05, **_GROWN, **_KEPT
        ),
        equal_flops=True,
    ),
    Row(
        "gradual_longer",
        "gradual magnitude pruning, steps / √density",
        _gradual(**_LONGER),
        equal_flops=True,
    ),
    Row(
        "cyclic_2_rising_longer",
        f"{_GROWN_TITLE}, second moments kept, steps / √density",
        _grown(**_KEPT, **_LONGER),
        equal_flops=True,
    ),
    Row(
        "gradual_scaled",
        "gradual magnitude pruning, steps / density",
        _gradual(**_SCALED),
        FOUR_SEEDS,
        equal_flops=True,
    ),
    Row(
        "granet_scaled",
        "gradual pruning with regrowth (GraNet), second moments kept, steps / density",
        _granet(**_KEPT, **_SCALED),
        FOUR_SEEDS,
        equal_flops=True,
    ),
    Row(
        "cyclic_2_rising_scaled",
        f"{_GROWN_TITLE}, steps / density",
        _grown(**_SCALED),
        FOUR_SEEDS,
        equal_flops=True,
    ),
    Row(
        "cyclic_2_rising_kept_scaled",
        f"{_GROWN_TITLE}, second moments kept, steps / density",
        _grown(**_KEPT, **_SCALED),
        equal_flops=True,
    ),
    Row("cyclic_3_scaled", "C-GaP, 3 partitions, steps / density", _cyclic(3, **_SCALED)),
    Row(
        "parallel_3_rising",
        "P-GaP, 3 partitions on 3 workers, rising target",
        _rising("parallel", rounds=3, length=1.5),
        workers=3,
    ),
    Row("gradual_erk", "gradual magnitude pruning, ERK", _gradual(**_ERK)),
    Row(
        "gradual_scaled_erk",
        "gradual magnitude pruning, steps / density, ERK",
        _gradual(**_SCALED, **_ERK),
        equal_flops=True,
    ),
    Row("granet_erk", "gradual pruning with regrowth (GraNet), ERK", _granet(**_ERK), equal_flops=True),
    Row(
        "cyclic_2_rising_scaled_erk",
        f"{_GROWN_TITLE}, steps / density, ERK",
        _grown(**_SCALED, **_ERK),
        equal_flops=True,
    ),
    Row("one_shot_erk", "one-shot magnitude pruning, half way, ERK", _one_shot(**_ERK)),
    Row("gradual_2of4", "gradual magnitude pruning, 2:4", _gradual(pattern="2:4"), TWO_SEEDS, sparsities=(0.5,)),
    Row(
        "cyclic_2_rising_2of4",
        f"{_GROWN_TITLE}, second moments kept, 2:4",
        _grown(pattern="2:4", **_KEPT),
        TWO_SEEDS,
        equal_flops=True,
        sparsities=(0.5,),
    ),
    Row(
        "cyclic_2_rising_scaled_2of4",
        f"{_GROWN_TITLE}, steps / density, 2:4",
        _grown(pattern="2:4", **_SCALED),
        TWO_SEEDS,
        equal_flops=True,
        sparsities=(0.5,),
    ),
)
#: Those of language models, also started from the dense model of their seed, and with it as their teacher.
OF_LANGUAGE = ("gradual", "granet", "cyclic_2_rising_scaled", "gradual_2of4", "cyclic_2_rising_scaled_2of4")
ROWS += tuple(
    replace(row, name=f"{row.name}_pretrained", title=f"{row.title}, from the dense model", pretrained=True)
    for row in ROWS
    if row.name in ("dense", *OF_LANGUAGE)
)
ROWS += tuple(
    replace(row, name=f"{row.name}_taught", title=f"{row.title}, with a teacher", taught=True)
    for row in ROWS
    if row.name.removesuffix("_pretrained") in OF_LANGUAGE
)
BY_NAME = {row.name: row for row in ROWS}


def extra_rows(path: Path, epochs: float) -> tuple[Row, ...]:
    """Read rows from a JSON file {name: GaP config without sparsity and seed, times in epochs}.

    The key `"equal_flops": true` is that of `Row`; it is no setting of a method.

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
    config = dict(config)
    equal = config.pop("equal_flops", False)
    workers = _partitions(config) if config.get("method") == "parallel" else 1
    return Row(name, name, lambda _: config, workers=workers, equal_flops=equal)
