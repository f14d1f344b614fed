"""The config: what is accepted, and that every mistake is told with its value, what is allowed and what to change."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gap_ds.config import _UNUSED, GaPConfig

BASE: dict[str, Any] = {"sparsity": 0.8, "partitions": 3, "phase_epochs": 1.0, "rounds": 2, "finetune_epochs": 2.0}
REMOVE = object()


def data(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (BASE | changes).items() if value is not REMOVE}


def config(**changes: Any) -> GaPConfig:
    return GaPConfig.load(data(**changes))


def steps(**changes: Any) -> dict[str, Any]:
    return data(phase_epochs=REMOVE, finetune_epochs=REMOVE, **({"phase_steps": 10, "finetune_steps": 5} | changes))


def test_defaults() -> None:
    loaded = config()
    assert (loaded.method, loaded.distribution, loaded.assign, loaded.order) == (
        "cyclic",
        "uniform",
        "contiguous",
        "cyclic",
    )
    assert (loaded.init, loaded.optimizer_state, loaded.lr, loaded.seed) == (
        "random",
        "keep_survivors",
        "continuous",
        0,
    )
    assert loaded.include == loaded.exclude == []
    assert loaded.kappa == 3 and loaded.in_epochs
    assert not GaPConfig.load(steps()).in_epochs


def test_whole_numbers_are_numbers() -> None:
    assert config(phase_epochs=1, finetune_epochs=2) == config()


def test_it_does_not_change() -> None:
    with pytest.raises(ValidationError):
        config().sparsity = 0.5  # type: ignore[misc]


# -- mistakes ------------------------------------------------------------------------------------------------------

PATTERNS = "must be an integer of at least 1, or a list of non-empty lists of name patterns"
PATTERN = (
    'must be "unstructured", "N:M" with 1 <= N < M <= 32 such as "2:4", or "block:HxW" of at least 2 weights such as '
    '"block:4x4"'
)
UNIT = 'exactly one of "{}_epochs" and "{}_steps" must be set (in gap_config).'

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.2}, 'sparsity=1.2: input should be less than 1. Set "sparsity" in gap_config.'),
    ({"sparsity": 1}, 'sparsity=1.0: input should be less than 1. Set "sparsity" in gap_config.'),
    ({"sparsity": -0.1}, 'sparsity=-0.1: input should be greater than or equal to 0. Set "sparsity" in gap_config.'),
    ({"sparsity": float("nan")}, 'sparsity=nan: input should be a finite number. Set "sparsity" in gap_config.'),
    ({"sparsity": "0.8"}, "sparsity='0.8': input should be a valid number. Set \"sparsity\" in gap_config."),
    ({"sparsity": True}, 'sparsity=True: input should be a valid number. Set "sparsity" in gap_config.'),
    ({"sparsity": REMOVE}, '"sparsity" is missing in gap_config: it must be set.'),
    ({"sparsity": 0}, 'sparsity=0.0 with method="cyclic": 0 and "dense" go together (in gap_config).'),
    (
        {"method": "dense", "partitions": REMOVE},
        'sparsity=0.8 with method="dense": 0 and "dense" go together (in gap_config).',
    ),
    (
        {"method": "cyclical"},
        "method='cyclical': input should be 'cyclic', 'dsd', 'static' or 'dense'. Set \"method\" in gap_config.",
    ),
    (
        {"distribution": "global"},
        "distribution='global': input should be 'uniform' or 'erk'. Set \"distribution\" in gap_config.",
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
    ({"rounds": REMOVE}, '"rounds" is missing in gap_config: it must be set.'),
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
    ({"init": "zero"}, "init='zero': input should be 'random' or 'magnitude'. Set \"init\" in gap_config."),
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
        {"partitions": [["a"], ["b"]], "assign": "random"},
        '"assign" has no effect when "partitions" lists the patterns: remove one of the two (in gap_config).',
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


def test_an_unknown_setting_like_no_other_lists_all() -> None:
    with pytest.raises(ValueError, match='unknown setting "zzz" in gap_config: known settings: ') as error:
        config(zzz=1)
    assert all(name in str(error.value) for name in GaPConfig.model_fields)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        config(sparsity=2, seed="x", sparsty=1)
    assert len(str(error.value).splitlines()) == 3


VALUES = {
    "partitions": 2,
    "assign": "interleaved",
    "order": "random",
    "init": "magnitude",
    "optimizer_state": "reset",
    "distribution": "erk",
    "pattern": "block:4x4",
}


@pytest.mark.parametrize(("method", "setting"), [(m, s) for m, names in _UNUSED.items() for s in names])
def test_a_setting_without_effect_is_refused(method: str, setting: str) -> None:
    fits: dict[str, Any] = {"method": method, "partitions": REMOVE if method == "dsd" else 3}
    fits |= {"sparsity": 0} if method == "dense" else {}
    config(**fits)
    for value in (VALUES[setting], GaPConfig.model_fields[setting].default):
        with pytest.raises(ValueError) as error:
            config(**(fits | {setting: value}))
        assert str(error.value) == f"\"{setting}\" has no effect with method='{method}': remove it (in gap_config)."


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
        steps(sparsity=0.9, phase_steps=1234567, distribution="erk", lr="restart", order="random", seed=7),
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
        data(method="static", init="magnitude", assign="random"),
        "gap|method:static|k:3|T:1ep|rounds:2|ft:2ep|s:0.8|dist:uniform|pat:unstructured|init:magnitude"
        "|lr:continuous|assign:random|seed:0|v:1",
    ),
    (
        data(sparsity=0.5, pattern="2:4"),
        "gap|method:cyclic|k:3|T:1ep|rounds:2|ft:2ep|s:0.5|dist:uniform|pat:2:4|init:random|lr:continuous|seed:0|v:1",
    ),
    (
        data(method="dense", sparsity=0),
        "gap|method:dense|k:3|T:1ep|rounds:2|ft:2ep|s:0|dist:uniform|pat:unstructured|lr:continuous|seed:0|v:1",
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
        data(assign="interleaved"),
        data(order="random"),
        data(phase_epochs=1.0000001),
        data(rounds=3),
        data(finetune_epochs=2.5),
        data(init="magnitude"),
        data(include=["x"]),
        data(exclude=["x"]),
        data(optimizer_state="reset"),
        data(lr="restart"),
        data(seed=1),
        steps(phase_steps=1, finetune_steps=2),
        steps(phase_steps=10_000_000),
        steps(phase_steps=10_000_001),
    ]
    signatures = [GaPConfig.load(variant).signature("1") for variant in variants]
    assert len(set(signatures)) == len(variants)
    # A default that is written out is no other setting.
    assert config(assign="contiguous", seed=0, include=[]).signature("1") == signatures[0]


def test_as_dense() -> None:
    dense = config(lr="restart", seed=3, distribution="erk", init="magnitude", order="random").as_dense()
    assert (dense.method, dense.sparsity, dense.rounds, dense.kappa) == ("dense", 0.0, 6, 1)
    assert (dense.phase_epochs, dense.finetune_epochs, dense.lr, dense.seed) == (1.0, 2.0, "restart", 3)
    assert dense.as_dense().signature("1") == dense.signature("1")
    assert config(method="dsd", partitions=REMOVE).as_dense().rounds == 4
    assert config(method="static").as_dense().rounds == 6
    assert config(partitions=[["a"], ["b"]]).as_dense().rounds == 4
    in_steps = GaPConfig.load(steps()).as_dense()
    assert (in_steps.phase_steps, in_steps.finetune_steps, in_steps.phase_epochs) == (10, 5, None)


def test_the_schema_is_printed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gap_ds.config"], capture_output=True, text=True, timeout=120, check=True
    )
    schema = json.loads(result.stdout)
    assert schema["properties"].keys() == GaPConfig.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"sparsity", "rounds"}
    assert all("description" in entry for entry in schema["properties"].values())


CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs" / "gap").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    assert GaPConfig.load(path).signature("1").startswith("gap|method:")
