"""The config: accepted settings, and the sentence for each mistake: the value, what is allowed, what to change."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gap_ds.method.config import GaPConfig
from gap_ds.method.config_file import SHIPPED
from gap_ds.method.distribution import DISTRIBUTIONS
from gap_ds.method.methods import METHODS as RECORDS

#: Settings that a method does not read.
UNREAD = {
    name: tuple(setting for setting in GaPConfig.model_fields if not record.reads_setting(setting))
    for name, record in RECORDS.items()
}
BASE: dict[str, Any] = {"sparsity": 0.8, "partitions": 3, "phase_epochs": 1.0, "rounds": 2, "finetune_epochs": 2.0}
REMOVE = object()

#: Changes that turn BASE into a valid config of each method.
METHODS: dict[str, dict[str, Any]] = {
    name: {
        "method": name,
        **{setting: REMOVE for setting in ("partitions", "rounds") if not record.reads_setting(setting)},
        **({"update_epochs": 0.25} if record.updates else {}),
        **({} if record.prunes else {"sparsity": 0}),
    }
    for name, record in RECORDS.items()
}


def data(several: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (BASE | (several or {}) | changes).items() if value is not REMOVE}


def config(**changes: Any) -> GaPConfig:
    return GaPConfig.load(data(**changes))


def steps(**changes: Any) -> dict[str, Any]:
    return data(phase_epochs=REMOVE, finetune_epochs=REMOVE, **({"phase_steps": 10, "finetune_steps": 5} | changes))


def test_defaults() -> None:
    loaded = config()
    assert (loaded.method, loaded.distribution, loaded.partition_assignment, loaded.partition_order) == (
        "cyclic",
        "uniform",
        "contiguous",
        "cyclic",
    )
    assert (loaded.mask_init, loaded.optimizer_state, loaded.lr_restart, loaded.seed) == (
        "auto",
        "keep_survivors",
        False,
        0,
    )
    assert (loaded.prune_ramp, loaded.drop_fraction, loaded.regrow, loaded.unpartitioned) == (
        0.0,
        0.3,
        "zero",
        "average",
    )
    assert loaded.dense_epochs is loaded.dense_steps is loaded.update_epochs is loaded.update_steps is None
    assert loaded.include == loaded.exclude == []
    assert loaded.kappa == 3 and loaded.in_epochs
    assert not GaPConfig.load(steps()).in_epochs


def test_whole_numbers_are_numbers() -> None:
    assert config(phase_epochs=1, finetune_epochs=2) == config()
    whole = config(dense_epochs=3, update_epochs=1, prune_ramp=1, distribution={"a": 0})
    assert whole == config(dense_epochs=3.0, update_epochs=1.0, prune_ramp=1.0, distribution={"a": 0.0})


EXPLORING = {"cyclic": 6, "parallel": 2, "dsd": 4, "acdc": 4, "static": 6, "dense": 6}
EXPLORING |= dict.fromkeys(("one_shot", "gradual", "rigl", "set"), 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    loaded = config(**METHODS[method])
    assert (loaded.method, loaded.record) == (method, RECORDS[method])
    assert loaded.exploring == EXPLORING.get(method, loaded.exploring)
    assert loaded.updates == RECORDS[method].updates
    assert GaPConfig.load(json.loads(loaded.model_dump_json(exclude_unset=True))) == loaded


def test_the_names_of_methods_and_distributions_are_those_of_their_tables() -> None:
    settings = GaPConfig.model_json_schema()["properties"]
    assert settings["method"]["enum"] == list(RECORDS) and set(EXPLORING) <= set(RECORDS)
    assert settings["distribution"]["anyOf"][0]["enum"] == list(DISTRIBUTIONS)
    assert {name for name, record in RECORDS.items() if record.updates} >= {"gradual", "rigl", "set"}
    # A setting that no method reads would be dead, and a record cannot read one that does not exist.
    read = set().union(*(record.reads for record in RECORDS.values()))
    assert read <= {name.removesuffix("_epochs").removesuffix("_steps") for name in GaPConfig.model_fields}
    assert not set.intersection(*(set(names) for names in UNREAD.values()))


def test_it_does_not_change() -> None:
    with pytest.raises(ValidationError):
        config().sparsity = 0.5


# -- mistakes ------------------------------------------------------------------------------------------------------

PATTERNS = "must be an integer of at least 1, or a list of non-empty lists of name patterns"
PATTERN = (
    'must be "unstructured", "N:M" with 1 <= N < M <= 32 such as "2:4", or "block:HxW" of at least 2 weights such as '
    '"block:4x4"'
)
DISTRIBUTION = 'must be "uniform", "erk", "global", or an object with name patterns and the sparsity of each in [0, 1)'
GLOBAL = (
    "distribution=\"global\" with method='{}': its budgets are fixed before there are weights to compare, so set "
    '"distribution" to "uniform" or "erk" (in gap_config).'
)
UNIT_TOO = '"{}_steps" and "phase_epochs" must have the same unit: set "{}_epochs" instead (in gap_config).'
UNIT = 'exactly one of "{}_epochs" and "{}_steps" must be set (in gap_config).'

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.2}, 'sparsity=1.2: input should be less than 1. Set "sparsity" in gap_config.'),
    ({"sparsity": 1}, 'sparsity=1.0: input should be less than 1. Set "sparsity" in gap_config.'),
    ({"sparsity": -0.1}, 'sparsity=-0.1: input should be greater than or equal to 0. Set "sparsity" in gap_config.'),
    ({"sparsity": float("nan")}, 'sparsity=nan: input should be a finite number. Set "sparsity" in gap_config.'),
    ({"sparsity": "0.8"}, "sparsity='0.8': input should be a valid number. Set \"sparsity\" in gap_config."),
    ({"sparsity": True}, 'sparsity=True: input should be a valid number. Set "sparsity" in gap_config.'),
    ({"sparsity": REMOVE}, "\"sparsity\" must be set with method='cyclic' (in gap_config)."),
    ({"sparsity": 0}, 'sparsity=0.0 with method="cyclic": 0 and "dense" go together (in gap_config).'),
    (
        {"method": "dense", "partitions": REMOVE},
        'sparsity=0.8 with method="dense": 0 and "dense" go together (in gap_config).',
    ),
    (
        {"method": "cyclical"},
        "method='cyclical': input should be 'cyclic', 'parallel', 'dsd', 'acdc', 'one_shot', 'gradual', 'granet', "
        "'rigl', 'set', 'static' or 'dense'. Set \"method\" in gap_config.",
    ),
    *(
        ({"distribution": value}, f'distribution={value!r}: {DISTRIBUTION}. Set "distribution" in gap_config.')
        for value in (
            *("er", "", None, 0.5, ["erk"], {}),
            *({"a": "0.5"}, {"a": 1}, {"a": -0.1}, {"a": True}, {"a": None}, {"a": 0.5, "b": 2.0}, {"a": {"b": 0.5}}),
        )
    ),
    *(({"distribution": "global"} | METHODS[method], GLOBAL.format(method)) for method in ("rigl", "set", "static")),
    (
        {"distribution": "global", "pattern": "block:4x4"},
        'pattern="block:4x4" with distribution="global": one threshold orders single weights, so set "distribution" to '
        '"uniform" or "erk" (in gap_config).',
    ),
    *(
        (
            {"pattern": "2:4", "sparsity": 0.5, "distribution": value},
            f'pattern="2:4" with distribution="{shown}": every entry keeps 2 of 4, so set "distribution" to "uniform" '
            "(in gap_config).",
        )
        for value, shown in (("global", "global"), ({"a": 0.5}, "{...}"))
    ),
    ({"grow_share": 0.2}, '"grow_share" has no effect with grow="dense": remove it (in gap_config).'),
    (
        {"grow": "gradient", "regrow": "last_value"},
        'grow="gradient" with regrow="last_value": set "regrow" to "zero" (in gap_config).',
    ),
    (
        {"regrow_storage": "bf16_cpu"},
        '"regrow_storage" has no effect with regrow="zero": remove it (in gap_config).',
    ),
    (
        {"target": "rising"},
        '"update_epochs" must be set with target="rising": the time between two updates of the masks (in gap_config).',
    ),
    (
        {"target": "rising", "update_epochs": 0.25, "mask_init": "random"},
        '"mask_init" has no effect with target="rising", which begins dense: remove it (in gap_config).',
    ),
    (
        {"dense_epochs": 0.5, "mask_init": "random"},
        '"mask_init" has no effect with "dense_epochs", which begins dense: remove it (in gap_config).',
    ),
    (
        {"regrow_moments": "keep_second", "optimizer_state": "reset"},
        'regrow_moments="keep_second" with optimizer_state="reset": has no effect, because all moments are cleared: '
        "remove it (in gap_config).",
    ),
    (
        {"method": "parallel", "regrow_moments": "mean_second"},
        'regrow_moments="mean_second" with method=\'parallel\': set "regrow_moments" to "keep_second" (in gap_config).',
    ),
    ({"partitions": 0}, f'partitions=0: {PATTERNS}. Set "partitions" in gap_config.'),
    ({"partitions": 2.0}, f'partitions=2.0: {PATTERNS}. Set "partitions" in gap_config.'),
    ({"partitions": True}, f'partitions=True: {PATTERNS}. Set "partitions" in gap_config.'),
    ({"partitions": "3"}, f"partitions='3': {PATTERNS}. Set \"partitions\" in gap_config."),
    ({"partitions": None}, f'partitions=None: {PATTERNS}. Set "partitions" in gap_config.'),
    ({"partitions": []}, f'partitions=[]: {PATTERNS}. Set "partitions" in gap_config.'),
    ({"partitions": [["a"], []]}, f"partitions=[['a'], []]: {PATTERNS}. Set \"partitions\" in gap_config."),
    ({"partitions": [["a"], "b"]}, f"partitions=[['a'], 'b']: {PATTERNS}. Set \"partitions\" in gap_config."),
    ({"partitions": [["a"], [1]]}, f"partitions=[['a'], [1]]: {PATTERNS}. Set \"partitions\" in gap_config."),
    ({"partitions": 1}, 'partitions: cyclic GaP needs at least 2; with one it is method="dsd" (in gap_config).'),
    ({"partitions": REMOVE}, 'partitions: cyclic GaP needs at least 2; with one it is method="dsd" (in gap_config).'),
    *(
        (
            {"method": "parallel", "partitions": value},
            'partitions: parallel GaP needs at least 2; with one it is method="dsd" (in gap_config).',
        )
        for value in (1, [["a"]], REMOVE)
    ),
    ({"phase_epochs": 0}, 'phase_epochs=0.0: input should be greater than 0. Set "phase_epochs" in gap_config.'),
    (
        {"phase_epochs": float("inf")},
        'phase_epochs=inf: input should be a finite number. Set "phase_epochs" in gap_config.',
    ),
    ({"phase_epochs": REMOVE}, UNIT.format("phase", "phase")),
    ({"phase_steps": 5}, UNIT.format("phase", "phase")),
    ({"finetune_epochs": REMOVE}, UNIT.format("finetune", "finetune")),
    ({"finetune_steps": 5}, UNIT.format("finetune", "finetune")),
    (
        {"finetune_epochs": REMOVE, "finetune_steps": 5},
        '"phase_..." and "finetune_..." must have the same unit: both _epochs or both _steps (in gap_config).',
    ),
    (
        {"finetune_epochs": -1},
        'finetune_epochs=-1.0: input should be greater than or equal to 0. Set "finetune_epochs" in gap_config.',
    ),
    *(
        ({"dense_steps": value}, UNIT_TOO.format("dense", "dense"))  # 0 has the wrong unit too
        for value in (5, 0)
    ),
    ({"update_steps": 5}, UNIT_TOO.format("update", "update")),
    ({"prune_ramp": 0.5, "update_steps": 5}, UNIT_TOO.format("update", "update")),
    (
        {"dense_epochs": -1},
        'dense_epochs=-1.0: input should be greater than or equal to 0. Set "dense_epochs" in gap_config.',
    ),
    ({"update_epochs": 0}, 'update_epochs=0.0: input should be greater than 0. Set "update_epochs" in gap_config.'),
    *(
        (
            METHODS[method] | {"update_epochs": REMOVE},
            f"\"update_epochs\" must be set with method='{method}': the time between two updates of the masks (in "
            "gap_config).",
        )
        for method in ("gradual", "rigl", "set")
    ),
    (
        {"prune_ramp": 0.5},
        '"update_epochs" must be set with prune_ramp: the time between two updates of the masks (in gap_config).',
    ),
    *(
        (
            METHODS[method] | {"update_epochs": 0.5},
            f'"update_epochs" has no effect with method=\'{method}\' without "prune_ramp": remove it (in gap_config).',
        )
        for method in ("cyclic", "parallel", "dsd", "acdc")
    ),
    ({"prune_ramp": 1.5}, 'prune_ramp=1.5: input should be less than or equal to 1. Set "prune_ramp" in gap_config.'),
    (
        {"prune_ramp": -1},
        'prune_ramp=-1.0: input should be greater than or equal to 0. Set "prune_ramp" in gap_config.',
    ),
    *(
        (
            METHODS["rigl"] | {"drop_fraction": value},
            f'drop_fraction={value}: input should be {bound}. Set "drop_fraction" in gap_config.',
        )
        for value, bound in ((0, "greater than 0"), (1, "less than 1"), (1.5, "less than 1"))
    ),
    ({"regrow": "last"}, "regrow='last': input should be 'zero' or 'last_value'. Set \"regrow\" in gap_config."),
    (
        {"method": "parallel", "unpartitioned": "mean"},
        "unpartitioned='mean': input should be 'average' or 'first'. Set \"unpartitioned\" in gap_config.",
    ),
    *(
        (METHODS[method] | {"rounds": REMOVE}, f"\"rounds\" must be set with method='{method}' (in gap_config).")
        for method in ("cyclic", "parallel", "dsd", "acdc", "static", "dense")
    ),
    ({"rounds": -1}, 'rounds=-1: input should be greater than or equal to 0. Set "rounds" in gap_config.'),
    ({"rounds": 2.0}, 'rounds=2.0: input should be a valid integer. Set "rounds" in gap_config.'),
    (
        {"rounds": 0, "finetune_epochs": 0},
        'the run would be empty: raise "rounds" or the length of the fine-tuning (in gap_config).',
    ),
    ({"include": "fc"}, "include='fc': input should be a valid list. Set \"include\" in gap_config."),
    ({"exclude": ["a", 1]}, 'exclude.1=1: input should be a valid string. Set "exclude" in gap_config.'),
    ({"seed": -1}, 'seed=-1: input should be greater than or equal to 0. Set "seed" in gap_config.'),
    ({"seed": 0.0}, 'seed=0.0: input should be a valid integer. Set "seed" in gap_config.'),
    (
        {"mask_init": "zero"},
        "mask_init='zero': input should be 'auto', 'random', 'magnitude', 'from_weights' or 'from_file'. "
        'Set "mask_init" in gap_config.',
    ),
    (
        {"mask_init": "from_weights"},
        "mask_init=\"from_weights\" with method='cyclic': inherited masks do not change, so "
        'set "method" to "static" (in gap_config).',
    ),
    (
        {"method": "static", "mask_init": "from_weights"},
        '"sparsity" has no effect with mask_init="from_weights", whose masks are the budget: '
        "remove it (in gap_config).",
    ),
    (
        {"method": "static", "mask_init": "from_file", "mask_file": "m", "sparsity": REMOVE, "pattern": "unstructured"},
        '"pattern" has no effect with mask_init="from_file", whose masks are the budget: remove it (in gap_config).',
    ),
    (
        {"method": "static", "mask_init": "from_file", "sparsity": REMOVE},
        '"mask_file" with mask_init="from_file": the file and "from_file" go together (in gap_config).',
    ),
    (
        {"mask_file": "masks.safetensors"},
        '"mask_file" with mask_init="auto": the file and "from_file" go together (in gap_config).',
    ),
    ({"sparsty": 0.9}, 'unknown setting "sparsty" in gap_config: did you mean "sparsity"?'),
    ({"phase_epoch": 1}, 'unknown setting "phase_epoch" in gap_config: did you mean "phase_epochs"?'),
    *(
        ({"pattern": value}, f'pattern={value!r}: {PATTERN}. Set "pattern" in gap_config.')
        for value in ("", "2", "4:2", "4:4", "0:4", "02:4", "2:33", "2:4 ", "block:4", "block:1x1", "block:0x4", "N:M")
    ),
    ({"pattern": 2}, 'pattern=2: input should be a valid string. Set "pattern" in gap_config.'),
    (
        {"pattern": "2:4"},
        'pattern="2:4" with sparsity=0.8: keeps 2 of 4, so set "sparsity" to 0.5 (in gap_config).',
    ),
    (
        {"pattern": "1:3", "sparsity": 0.666},
        'pattern="1:3" with sparsity=0.666: keeps 1 of 3, so set "sparsity" to 0.6666666666666666 (in gap_config).',
    ),
    (
        {"pattern": "2:4", "sparsity": 0.5, "distribution": "erk"},
        'pattern="2:4" with distribution="erk": every entry keeps 2 of 4, so set "distribution" to "uniform" (in '
        "gap_config).",
    ),
    (
        {"partitions": [["a"], ["b"]], "partition_assignment": "random"},
        '"partition_assignment" has no effect when "partitions" lists the patterns: '
        "remove one of the two (in gap_config).",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(sorted(changes)) for changes, _ in MISTAKES])
def test_a_mistake_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert str(error.value) == message


def test_steps_are_whole_and_positive() -> None:
    for value, reason in ((0, "greater than 0"), (2.5, "valid integer")):
        with pytest.raises(ValueError, match=rf'phase_steps={value}: input should be .*{reason}. Set "phase_steps"'):
            GaPConfig.load(steps(phase_steps=value))


def test_a_name_pattern_is_a_string() -> None:
    with pytest.raises(ValueError) as error:
        config(distribution={0: 0.5})
    assert str(error.value) == f'distribution={{0: 0.5}}: {DISTRIBUTION}. Set "distribution" in gap_config.'


def test_a_run_in_steps_requires_steps() -> None:
    same = 'and "phase_steps" must have the same unit: set'
    for changes, message in (
        ({"dense_epochs": 1}, f'"dense_epochs" {same} "dense_steps" instead (in gap_config).'),
        ({"update_epochs": 0.5}, f'"update_epochs" {same} "update_steps" instead (in gap_config).'),
        (
            {"prune_ramp": 0.5},
            '"update_steps" must be set with prune_ramp: the time between two updates of the masks (in gap_config).',
        ),
        (
            {"update_steps": 2},
            '"update_steps" has no effect with method=\'cyclic\' without "prune_ramp": remove it (in gap_config).',
        ),
        ({"update_steps": 0}, 'update_steps=0: input should be greater than 0. Set "update_steps" in gap_config.'),
        ({"dense_steps": 1.5}, 'dense_steps=1.5: input should be a valid integer. Set "dense_steps" in gap_config.'),
    ):
        with pytest.raises(ValueError) as error:
            GaPConfig.load(steps(**changes))
        assert str(error.value) == message


def test_a_first_dense_phase_alone_is_a_run() -> None:
    assert config(dense_epochs=1, rounds=0, finetune_epochs=0).exploring == 0
    with pytest.raises(ValueError, match="the run would be empty"):
        config(dense_epochs=0, rounds=0, finetune_epochs=0)


def test_an_unknown_setting_like_no_other_lists_all() -> None:
    with pytest.raises(ValueError, match='unknown setting "zzz" in gap_config: known settings: ') as error:
        config(zzz=1)
    assert all(name in str(error.value) for name in GaPConfig.model_fields)


def test_several_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ValueError) as error:
        config(sparsity=2, seed="x", sparsty=1)
    assert len(str(error.value).splitlines()) == 3


VALUES = {
    "partitions": 2,
    "lr_density_power": 0.5,
    "partition_assignment": "interleaved",
    "partition_order": "random",
    "mask_init": "magnitude",
    "optimizer_state": "reset",
    "distribution": "erk",
    "pattern": "block:4x4",
    "dense_epochs": 1.0,
    "dense_steps": 2,
    "rounds": 3,
    "update_epochs": 0.5,
    "update_steps": 3,
    "prune_ramp": 0.5,
    "drop_fraction": 0.2,
    "target": "rising",
    "grow": "gradient",
    "grow_share": 0.2,
    "regrow": "last_value",
    "regrow_storage": "bf16_cpu",
    "regrow_moments": "keep_second",
    "regrow_warmup_epochs": 0.5,
    "regrow_warmup_steps": 3,
    "unpartitioned": "first",
    "lr_restart": True,
}

PAIRS = [(method, setting) for method, names in UNREAD.items() for setting in names]


def in_steps(changes: dict[str, Any]) -> dict[str, Any]:
    """The same config with times in steps, ten to an epoch."""
    times = {
        f"{name}_steps": int(10 * value)
        for name in ("dense", "phase", "update", "finetune", "regrow_warmup")
        if (value := (BASE | changes).get(f"{name}_epochs", REMOVE)) is not REMOVE
    }
    gone = dict.fromkeys([f"{name}_epochs" for name in ("dense", "phase", "update", "finetune")], REMOVE)
    return changes | gone | times


@pytest.mark.parametrize(("method", "setting"), PAIRS)
def test_a_setting_without_effect_is_refused(method: str, setting: str) -> None:
    fits = METHODS[method]
    if setting.endswith("_steps"):
        fits = in_steps(fits)
    config(**fits)
    for value in (VALUES[setting], GaPConfig.model_fields[setting].default):
        with pytest.raises(ValueError) as error:
            config(**(fits | {setting: value}))
        assert str(error.value) == f"\"{setting}\" has no effect with method='{method}': remove it (in gap_config)."


#: The settings that a method reads, but for those that another one must go with.
READ = [
    (method, setting)
    for method, names in UNREAD.items()
    for setting in VALUES
    if setting not in names and not setting.startswith("update")
]


@pytest.mark.parametrize(("method", "setting"), READ)
def test_a_setting_with_effect_is_another_run(method: str, setting: str) -> None:
    fits = METHODS[method]
    changes = {setting: VALUES[setting]}
    if setting in ("prune_ramp", "target"):
        changes["update_epochs"] = 0.25
    if setting == "grow_share":
        fits = {**fits, "grow": "random"}
    if setting == "regrow_storage":
        fits = {**fits, "regrow": "last_value"}
    if setting.endswith("_steps"):
        fits = in_steps(fits)
    assert config(**(fits | changes)).signature("1") != config(**fits).signature("1")


# -- files ---------------------------------------------------------------------------------------------------------


def test_json_yaml_dict_and_itself(tmp_path: Path) -> None:
    expected = config(include=["stem"], partitions=[["a", "b"], ["c"]])
    as_json, as_yaml = tmp_path / "gap.json", tmp_path / "gap.yml"
    as_json.write_text(json.dumps(data(include=["stem"], partitions=[["a", "b"], ["c"]])))
    as_yaml.write_text(
        "sparsity: 0.8\npartitions: [[a, b], [c]]\nphase_epochs: 1\nrounds: 2\nfinetune_epochs: 2\ninclude:\n- stem\n"
    )
    pytest.importorskip("yaml")
    assert GaPConfig.load(as_json) == GaPConfig.load(str(as_json)) == GaPConfig.load(as_yaml) == expected
    assert GaPConfig.load(expected) is expected
    assert GaPConfig.load(MappingProxyType(data())) == config()
    as_yaml.write_text("sparsity: 0.5\npattern: 2:4\nmethod: dsd\nphase_epochs: 1\nfinetune_epochs: 2\nrounds: 2\n")
    assert GaPConfig.load(as_yaml).pattern == "2:4"  # a number in YAML 1.1


@pytest.mark.parametrize("source", [None, 3, [], b"cyclic_90", "", dict])
def test_what_is_no_config_is_named(source: Any) -> None:
    with pytest.raises(ValueError, match=rf"^config={re.escape(repr(source))}: must be a GaPConfig, a dict, the path"):
        GaPConfig.load(source)


def test_a_mistake_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "gap.json"
    path.write_text(json.dumps(data(sparsity=2)))
    with pytest.raises(ValueError, match=rf'sparsity=2\.0: .*Set "sparsity" in {re.escape(str(path))}\.'):
        GaPConfig.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gap.json", None, "cannot be read as a GaP config: No such file or directory"),
        ("gap.json", b"{'a': 1}", "not valid JSON: Expecting property name"),
        ("gap.json", b'{"sparsity": 0.8', "not valid JSON: Expecting ',' delimiter"),
        ("gap.json", b"", "not valid JSON"),
        ("gap.json", b"\xff\xfe\x00", "cannot be read as a GaP config: it is not UTF-8 text"),
        ("gap.yaml", b"sparsity: [", "not valid YAML"),
        ("gap.json", b"[1]", "input should be a valid dictionary"),
        ("gap.yaml", b"", "input should be a valid dictionary"),
        ("gap.json", b'{"sparsity": 0.8, "sparsity": 0.9}', '"sparsity" is set twice. Remove one of the two.'),
        ("gap.YAML", b"distribution: {stem: 0.5, stem: 0.9}", '"stem" is set twice. Remove one of the two.'),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        GaPConfig.load(path)
    assert str(path) in str(error.value)
    assert message.lower() in str(error.value).lower()


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a GaP config: Is a directory"):
        GaPConfig.load(tmp_path)


# -- signature, dense twin, schema ---------------------------------------------------------------------------------

SIGNATURES: list[tuple[dict[str, Any], str]] = [
    (
        data(),
        "gap|method:cyclic|k:3|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:random"
        "|lr:continuous|seed:0|v:1",
    ),
    (
        steps(sparsity=0.9, phase_steps=1234567, distribution="erk", lr_restart=True, partition_order="random", seed=7),
        "gap|method:cyclic|k:3|T:1234567st|rounds:2|ft:5st|s:0.9|dist:erk|pat:unstructured|init:random"
        "|lr:restart|order:random|seed:7|v:1",
    ),
    (
        data(partitions=[["enc"], ["dec"]], include=["stem"], exclude=["fc"], optimizer_state="reset"),
        'gap|method:cyclic|k:[["enc"], ["dec"]]|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured'
        "|init:random|lr:continuous|include:['stem']|exclude:['fc']|optimizer_state:reset|seed:0|v:1",
    ),
    (
        data(method="dsd", partitions=REMOVE, phase_epochs=0.25),
        "gap|method:dsd|k:1|T:0.25ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|lr:continuous|seed:0|v:1",
    ),
    (
        data(method="static", mask_init="magnitude", partition_assignment="random"),
        "gap|method:static|k:3|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:magnitude"
        "|lr:continuous|assign:random|seed:0|v:1",
    ),
    (
        data(sparsity=0.5, pattern="2:4"),
        "gap|method:cyclic|k:3|T:1ep|rounds:2|ft:2ep|s:0.5|dist:uniform|pat:2:4|init:random|lr:continuous|seed:0|v:1",
    ),
    (
        data(method="static", mask_init="from_file", mask_file="masks.safetensors", sparsity=REMOVE),
        "gap|method:static|k:3|T:1ep|rounds:2|ft:2ep|init:from_file|lr:continuous|seed:0|v:1",
    ),
    (
        data(method="dense", sparsity=0),
        "gap|method:dense|k:3|T:1ep|rounds:2|ft:2ep|s:0|dist:uniform|pat:unstructured|lr:continuous|seed:0|v:1",
    ),
    (
        data(method="parallel", dense_epochs=0.5, prune_ramp=0.25, update_epochs=0.125, unpartitioned="first"),
        "gap|method:parallel|k:3|D:0.5ep|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured"
        "|lr:continuous|every:0.125ep|ramp:0.25|shared:first|seed:0|v:1",
    ),
    (
        steps(method="acdc", partitions=REMOVE, dense_steps=100, regrow="last_value", distribution="global"),
        "gap|method:acdc|k:1|D:100st|T:10st|rounds:2|ft:5st|s:0.8|dist:global|pat:unstructured|lr:continuous"
        "|regrow:last_value|seed:0|v:1",
    ),
    (
        data(regrow="last_value", regrow_storage="bf16_cpu"),
        "gap|method:cyclic|k:3|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:random|lr:continuous"
        "|regrow:last_value|last_values:bf16_cpu|seed:0|v:1",
    ),
    (
        data(method="one_shot", partitions=REMOVE, rounds=REMOVE, phase_epochs=90, optimizer_state="reset"),
        "gap|method:one_shot|k:1|T:90ep|ft:2ep|s:0.8|dist:uniform|pat:unstructured|lr:continuous|optimizer_state:reset"
        "|seed:0|v:1",
    ),
    (
        steps(method="gradual", partitions=REMOVE, rounds=REMOVE, dense_steps=0, update_steps=100),
        "gap|method:gradual|k:1|T:10st|ft:5st|s:0.8|dist:uniform|pat:unstructured|lr:continuous|every:100st|seed:0|v:1",
    ),
    (
        data(METHODS["rigl"], mask_init="magnitude", distribution={"enc": 0.9, "dec": 0}, lr_restart=True),
        'gap|method:rigl|k:1|T:1ep|ft:2ep|s:0.8|dist:{"enc": 0.9, "dec": 0.0}|pat:unstructured|init:magnitude'
        "|lr:restart|every:0.25ep|drop:0.3|seed:0|v:1",
    ),
    (
        data(METHODS["set"], drop_fraction=0.5),
        "gap|method:set|k:1|T:1ep|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:random|lr:continuous|every:0.25ep"
        "|drop:0.5|seed:0|v:1",
    ),
]


@pytest.mark.parametrize(("settings", "line"), SIGNATURES)
def test_signature(settings: dict[str, Any], line: str) -> None:
    assert GaPConfig.load(settings).signature("1") == line


def test_different_settings_have_different_signatures() -> None:
    variants: list[dict[str, Any]] = [
        data(),
        data(sparsity=0.8000001),
        data(partitions=4),
        data(distribution="erk"),
        data(pattern="block:4x4"),
        data(pattern="block:4x8"),
        data(partition_assignment="interleaved"),
        data(partition_order="random"),
        data(phase_epochs=1.0000001),
        data(rounds=3),
        data(finetune_epochs=2.5),
        data(mask_init="magnitude"),
        data(include=["x"]),
        data(exclude=["x"]),
        data(optimizer_state="reset"),
        data(lr_restart=True),
        data(seed=1),
        steps(phase_steps=1, finetune_steps=2),
        steps(phase_steps=10_000_000),
        steps(phase_steps=10_000_001),
        *(data(METHODS[method]) for method in METHODS if method != "cyclic"),
        data(distribution="global"),
        data(distribution={"a": 0.5}),
        data(distribution={"a": 0.8}),
        data(distribution={"b": 0.5}),
        data(distribution={"a": 0.5, "b": 0.5}),
        data(regrow="last_value"),
        data(regrow="last_value", regrow_storage="bf16_cpu"),
        data(dense_epochs=1),
        data(dense_epochs=0.5),
        data(prune_ramp=0.5, update_epochs=0.25),
        data(prune_ramp=0.50001, update_epochs=0.25),
        data(prune_ramp=0.5, update_epochs=0.125),
        data(method="parallel", unpartitioned="first"),
        data(METHODS["rigl"], drop_fraction=0.4),
        data(METHODS["rigl"], update_epochs=0.5),
        data(METHODS["rigl"], mask_init="magnitude"),
        steps(dense_steps=1),
        steps(prune_ramp=0.5, update_steps=1),
    ]
    signatures = [GaPConfig.load(variant).signature("1") for variant in variants]
    assert len(set(signatures)) == len(variants)
    # A default that is written out is no other setting.
    assert (
        config(partition_assignment="contiguous", seed=0, include=[], regrow="zero", prune_ramp=0).signature("1")
        == signatures[0]
    )
    assert config(dense_epochs=0).signature("1") == signatures[0]


PROPERTY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
TAGS = {"s": "sparsity", "dist": "distribution", "pat": "pattern", "drop": "drop_fraction", "ramp": "prune_ramp"}
TAGS |= {"init": "mask_init", "assign": "partition_assignment", "order": "partition_order", "shared": "unpartitioned"}
TAGS |= {"moments": "regrow_moments", "last_values": "regrow_storage"}
TIMES = {"D": "dense", "T": "phase", "ft": "finetune", "every": "update", "warm": "regrow_warmup"}


def parsed(signature: str) -> dict[str, Any]:
    """The settings in a signature, read by an independent reader, written from the format alone."""
    first, *parts = signature.split("|")
    assert first == "gap"
    found: dict[str, Any] = {}
    for part in parts:
        key, _, text = part.partition(":")
        value: Any = text
        if text[:1] in "[{0123456789":
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(text)
        if key in TIMES:
            number, unit = text[:-2], {"ep": "epochs", "st": "steps"}[text[-2:]]
            found[f"{TIMES[key]}_{unit}"] = float(number) if unit == "epochs" else int(number)
        elif key == "k":
            found["partitions"] = value
        elif key == "lr":
            found["lr_restart"] = {"restart": True, "continuous": False}[text]
        elif key != "v":
            found[TAGS.get(key, key)] = value
    return {key: value for key, value in found.items() if key not in UNREAD[found["method"]]}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid config."""
    method = draw(st.sampled_from(sorted(METHODS)))
    in_epochs = draw(st.booleans())
    length = st.integers(1, 10**6) if not in_epochs else st.floats(0.001, 1000).map(lambda x: float(f"{x:.5g}"))
    unit = "epochs" if in_epochs else "steps"
    one_in = st.sampled_from([True, False, False])
    found: dict[str, Any] = {"method": method, f"phase_{unit}": draw(length), f"finetune_{unit}": draw(length)}
    found["sparsity"] = 0.0 if method == "dense" else draw(st.sampled_from([0.5, 0.8, 0.9, 0.995, 1e-6, 0.123456789]))
    found |= {"rounds": draw(st.integers(0, 20)), "partitions": draw(st.sampled_from([2, 7, [["a"], ["b", "c"]]]))}
    moves = method in ("gradual", "granet", "rigl", "set")
    if draw(one_in):
        found["target"] = "rising"
    if draw(one_in):
        found |= {"grow": draw(st.sampled_from(["gradient", "random"])), "grow_share": draw(st.floats(0.001, 0.999))}
    if not moves and draw(st.booleans()):
        found["prune_ramp"] = draw(st.floats(0.001, 1.0))
    if moves or any(key in found and key not in UNREAD[method] for key in ("prune_ramp", "target")):
        found[f"update_{unit}"] = draw(length)
    budgets: list[Any] = ["uniform", "erk", {"a": 0.5}, {"a": 0.5, "b": 0.999}]
    budgets += [] if method in ("rigl", "set", "static") else ["global"]
    choices: dict[str, list[Any]] = {
        "distribution": budgets,
        "partition_assignment": ["contiguous", "interleaved", "random"],
        "partition_order": ["cyclic", "random"],
        "mask_init": ["random", "magnitude"],
        "include": [[], ["x"], ["x", "y.z"]],
        "exclude": [[], ["x"]],
        "optimizer_state": ["keep_survivors", "reset"],
        "regrow": ["zero", "last_value"],
        "regrow_storage": ["exact", "bf16_cpu"],
        "regrow_moments": ["zero", "keep_second", "mean_second"],
        f"regrow_warmup_{unit}": [2] if unit == "steps" else [0.125],
        "unpartitioned": ["average", "first"],
        "lr_restart": [False, True],
        "drop_fraction": [0.3, 0.1, 0.123456789],
        "seed": [0, 1, 10**12],
        f"dense_{unit}": [0, 1, 3 if not in_epochs else 0.25],
    }
    for key, values in choices.items():
        if draw(one_in):
            found[key] = draw(st.sampled_from(values))
    if not isinstance(found["partitions"], int):
        found.pop("partition_assignment", None)
    if ("target" in found and "target" not in UNREAD[method]) or found.get(f"dense_{unit}"):
        found.pop("mask_init", None)
    if "grow" in found:
        found.pop("regrow", None)
    if found.get("regrow") != "last_value":
        found.pop("regrow_storage", None)
    if method == "parallel" and found.get("regrow_moments") == "mean_second":
        found["regrow_moments"] = "keep_second"
    if not moves and found.get("optimizer_state") == "reset":
        found.pop("regrow_moments", None)
    if draw(one_in) and found.get("distribution") != "global":
        found["pattern"] = "block:4x4"
    return {key: value for key, value in found.items() if key not in UNREAD[method]}


@PROPERTY
@given(configs())
def test_a_signature_has_every_setting_that_changes_a_run(settings: dict[str, Any]) -> None:
    """The config can be had back from it, so that no two configs share one."""
    loaded = GaPConfig.load(settings)
    again = GaPConfig.load(parsed(loaded.signature("1")))
    assert again.signature("1") == loaded.signature("1")
    plain = {"auto": "random"}  # undecided is random where nothing was loaded; D: 0 is none
    one, other = ({k: plain.get(str(v), v) or None for k, v in c.model_dump().items()} for c in (loaded, again))
    assert one == other


@PROPERTY
@given(configs())
def test_as_dense_is_valid_for_every_config(settings: dict[str, Any]) -> None:
    loaded = GaPConfig.load(settings)
    dense = loaded.as_dense()
    assert (dense.method, dense.kappa, dense.rounds) == ("dense", 1, loaded.exploring)
    for name in ("dense", "phase", "finetune"):
        for unit in ("epochs", "steps"):
            assert getattr(dense, f"{name}_{unit}") == getattr(loaded, f"{name}_{unit}")
    assert (dense.lr_restart, dense.seed, dense.updates) == (loaded.lr_restart, loaded.seed, False)
    assert dense.as_dense() == dense


def test_as_dense() -> None:
    dense = config(
        lr_restart=True, seed=3, distribution="erk", mask_init="magnitude", partition_order="random"
    ).as_dense()
    assert (dense.method, dense.sparsity, dense.rounds, dense.kappa) == ("dense", 0.0, 6, 1)
    assert (dense.phase_epochs, dense.finetune_epochs, dense.lr_restart, dense.seed) == (1.0, 2.0, True, 3)
    assert dense.as_dense().signature("1") == dense.signature("1")
    assert config(method="dsd", partitions=REMOVE).as_dense().rounds == 4
    assert config(method="static").as_dense().rounds == 6
    assert config(partitions=[["a"], ["b"]]).as_dense().rounds == 4
    twin = GaPConfig.load(steps(dense_steps=7)).as_dense()
    assert (twin.dense_steps, twin.phase_steps, twin.finetune_steps, twin.phase_epochs) == (7, 10, 5, None)
    rounds = {"parallel": 2, "acdc": 4, "one_shot": 1, "gradual": 1, "rigl": 1, "set": 1}
    assert {method: config(**METHODS[method]).as_dense().rounds for method in rounds} == rounds


def test_the_schema_describes_every_setting() -> None:
    schema = GaPConfig.model_json_schema()
    assert schema["properties"].keys() == GaPConfig.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert all("description" in entry for entry in schema["properties"].values())


# -- shipped configs -----------------------------------------------------------------------------------------------

CONFIGS = sorted(SHIPPED.glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    loaded = GaPConfig.load(path)
    assert loaded.signature("1").startswith("gap|method:")
    assert GaPConfig.load(path.stem) == GaPConfig.load(Path(path.stem)) == loaded


def test_an_unknown_name_lists_the_shipped_configs() -> None:
    with pytest.raises(ValueError) as error:
        GaPConfig.load("cyclic_91")
    names = ", ".join(path.stem for path in CONFIGS)
    assert str(error.value) == f"cyclic_91: is neither a file nor a shipped config. Shipped are {names}."


def test_a_file_comes_before_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cyclic_90").mkdir()  # a folder of that name, such as a run's, is no config
    assert GaPConfig.load("cyclic_90").sparsity == 0.9
    Path("cyclic_80").write_text(json.dumps(data(sparsity=0.5)))
    assert GaPConfig.load("cyclic_80").sparsity == 0.5


def test_the_old_folder_of_configs_leads_to_the_shipped_ones() -> None:
    assert (Path(__file__).resolve().parents[3] / "configs" / "gap").resolve() == SHIPPED
