"""`gap-ds inspect`: golden text of what the engine writes, every kind of damage found, and hostile files survived.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/unit/cli/test_cli_inspect.py, and read the difference.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")


from gap_ds import GaPEngine
from gap_ds.masks import bitmask
from gap_ds.training import run as runs

ROOT = Path(__file__).resolve().parents[3]

STEPS = {"phase_steps": 3, "rounds": 2, "finetune_steps": 2}
CYCLIC = {"sparsity": 0.75, "partitions": 2, **STEPS}
CONFIGS: dict[str, dict[str, Any]] = {
    "cyclic": CYCLIC,
    "global": {**CYCLIC, "distribution": "global"},
    "ramp": {**CYCLIC, "prune_ramp": 0.7, "update_steps": 1},
    "2of4": {**CYCLIC, "sparsity": 0.5, "pattern": "2:4"},
    "block": {**CYCLIC, "pattern": "block:2x4"},
    "last": {**CYCLIC, "regrow": "last_value"},
    "dense": {"method": "dense", "sparsity": 0.0, "phase_steps": 3, "rounds": 1, "finetune_steps": 0},
}

Run = Callable[..., tuple[int, str, str]]
Golden = Callable[[str, str], None]
Make = Callable[..., Path]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.fc(x).tanh())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(4)), "head": nn.Linear(8, 3)})


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.setattr(runs, "__version__", "0.0.0")
    return command_line


@pytest.fixture
def make(run: Run) -> Make:
    """Trains some steps; leaves an export in `model`, and a checkpoint in `checkpoints`."""

    def make(name: str = "cyclic", steps: int = 7) -> Path:
        module = model()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        trained = GaPEngine(module, CONFIGS[name], optimizer=optimizer)
        for _ in range(steps):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(trained.applied_steps))
            for layer in module["layers"]:  # type: ignore[index]
                x = layer(x)
            trained.backward(module["head"](x).square().mean())  # type: ignore[index]
            trained.step()
        trained.export("model")
        trained.save_checkpoint("checkpoints")
        return Path.cwd()

    return make


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata)


FC = "layers.0.fc.weight"
MASKS = Path("checkpoints/step_7/gap/masks.safetensors")
STATE = Path("checkpoints/step_7/gap/state.json")
WEIGHTS = Path("model/model.safetensors")


# -- golden text and JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "argv"),
    [
        ("inspect_export.txt", "cyclic", "inspect model --entries"),
        ("inspect_export.json", "2of4", "inspect model --json"),
        ("inspect_dense.txt", "dense", "inspect model"),
        ("inspect_checkpoint.txt", "cyclic", "inspect checkpoints"),
        ("inspect_checkpoint.json", "cyclic", "inspect checkpoints/step_7 --json"),
    ],
)
def test_golden(run: Run, golden: Golden, make: Make, name: str, config: str, argv: str) -> None:
    make(config)
    code, out, err = run(*argv.split())
    assert (code, err) == (0, "")
    golden(name, out)
    if name.endswith(".txt"):
        assert all(len(line.rstrip()) <= 80 for line in out.splitlines() if not line.startswith("gap|"))


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("export_compact.txt", "export model out/small"),
        ("export_compact.json", "export checkpoints out/small --json"),
        ("export_dense.txt", "export checkpoints out/model --format dense"),
        ("export_dense.json", "export checkpoints out/model --format dense --json"),
    ],
)
def test_golden_of_export(run: Run, golden: Golden, make: Make, name: str, argv: str) -> None:
    """tests/unit/cli/test_cli_export.py has what is in the files."""
    make()
    code, out, err = run(*argv.split())
    assert (code, err) == (0, "")
    golden(name, out)


# -- what is right is not called wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [0, 2, 3, 7, 14])
def test_what_the_engine_writes_is_right(run: Run, make: Make, name: str, steps: int) -> None:
    """In dense phases, inside a ramp, at a boundary, and after the end."""
    make(name, steps)
    (gap,) = Path("checkpoints").glob("*/gap")
    for folder in "model", "checkpoints", str(gap):
        code, out, _ = run("inspect", folder, "--json")
        assert (code, json.loads(out)["problems"]) == (0, [])


def test_counts_by_hand(run: Run, make: Make) -> None:
    """4 blocks of two 8 x 12 matrices, a quarter kept; 4 x (12 + 8) biases and a head of 8 x 3 + 3."""
    make()
    figures = json.loads(run("inspect", "model", "--json")[1])
    assert [row["nonzero"] for row in figures["partitions"]] == [4 * 24, 4 * 24]
    assert figures["model"] == {"weights": 8 * 96 + 4 * 20 + 27, "nonzero": 8 * 24 + 4 * 20 + 27}
    assert figures["bytes"] == 4 * figures["model"]["weights"]
    # Step 7 is in phase 2: partition 0 dense again.
    figures = json.loads(run("inspect", "checkpoints", "--json")[1])
    assert [row["kept"] for row in figures["partitions"]] == [4 * 96, 4 * 24]
    assert figures["phase"]["dense"] == [0]


def test_sharded_export(run: Run, make: Make) -> None:
    make()
    whole = json.loads(run("inspect", "model", "--json")[1])
    weights = load_file(WEIGHTS)
    names = sorted(weights)
    parts = {f"model-{i + 1}-of-3.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, WEIGHTS.with_name(file))
    WEIGHTS.unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    path = Path("model/model.safetensors.index.json")
    path.write_text(json.dumps(index), encoding="utf-8")
    code, out, _ = run("inspect", "model", "--json")
    assert code == 0 and json.loads(out) == {**whole, "files": 3}
    # A name that no file has, a file that is not there, and one outside.
    edit(path, lambda data: data["weight_map"].update(ghost="model-1-of-3.safetensors"))
    code, out, _ = run("inspect", "model")
    assert code == 1 and "lacks ghost, which the index lists" in out
    edit(path, lambda data: data["weight_map"].update(ghost="../secret.safetensors"))
    assert run("inspect", "model")[::2] == (
        2,
        "gap-ds: model/model.safetensors.index.json: names a file that is not in its folder "
        "('../secret.safetensors').\n",
    )
    edit(path, lambda data: data["weight_map"].update(ghost="absent.safetensors"))
    assert run("inspect", "model")[0] == 2


# -- what is wrong is found --------------------------------------------------------------------------------------------


def revive(weights: dict[str, torch.Tensor]) -> None:
    flat = weights[FC].view(-1)
    flat[int((flat == 0).nonzero()[0])] = 1.0


def move(weights: dict[str, torch.Tensor]) -> None:
    """The count stays, the groups of four do not."""
    flat = weights[FC].view(-1)
    zero, other = int((flat == 0).nonzero()[0]), int((flat != 0).nonzero()[-1])
    flat[zero], flat[other] = 1.0, 0.0


def flip(weights: dict[str, torch.Tensor]) -> None:
    weights["layers.2.fc.weight"][0] ^= 1


def swap_bits(weights: dict[str, torch.Tensor]) -> None:
    """The count stays, the pattern does not."""
    bits = bitmask.unpack(weights["layers.2.fc.weight"], 96)
    zero, one = int((~bits).nonzero()[0]), int(bits.nonzero()[-1])
    bits[zero], bits[one] = True, False
    weights["layers.2.fc.weight"] = bitmask.pack(bits)


@pytest.mark.parametrize(
    ("config", "file", "change", "message"),
    [
        ("cyclic", WEIGHTS, revive, f"{FC}: has 25 weights that are not zero, gap.json has 24"),
        ("global", WEIGHTS, revive, "partition 0: has 97 weights that are not zero, its budget is 96"),
        ("2of4", WEIGHTS, move, f"{FC}: groups of 4 that keep more than 2: 1"),
        ("block", WEIGHTS, move, f"{FC}: its blocks with weights have room for 32, the budget is 24"),
        ("cyclic", WEIGHTS, lambda w: w[FC].view(-1).fill_(torch.nan), f"{FC}: holds values that are NaN or infinite"),
        ("cyclic", WEIGHTS, lambda w: w.pop(FC), f"{FC}: is in no file"),
        (
            "cyclic",
            WEIGHTS,
            lambda w: w.update({FC: w[FC].t().contiguous()}),
            f"{FC}: has the shape [8, 12], gap.json has [12",
        ),
        ("cyclic", WEIGHTS, lambda w: w.update({FC: w[FC][:4].clone()}), f"{FC}: has 32 weights, gap.json has 96"),
        ("cyclic", Path("model/gap.json"), lambda d: d.update(kept=7), 'gap.json: "kept" is 7, its entries have 192'),
        ("cyclic", Path("model/gap.json"), lambda d: d.update(entry_sparsity=0.9), "which its counts do not give"),
        ("cyclic", Path("model/gap.json"), lambda d: d["entries"][FC].update(keep=9), "24 weights that are not zero"),
        ("cyclic", MASKS, flip, "the header has 24"),
        ("2of4", MASKS, swap_bits, "groups of 4 that do not keep 2"),
        ("block", MASKS, swap_bits, "blocks of 2x4 that are kept in part"),
        ("cyclic", MASKS, lambda w: w.pop("layers.2.fc.weight"), "layers.2.fc.weight: has no mask"),
        ("cyclic", MASKS, lambda w: w.update({FC: w["layers.2.fc.weight"].clone()}), f"{FC}: has a mask in phase 2"),
        ("cyclic", MASKS, lambda w: w.update({"layers.2.fc.weight": torch.zeros(3)}), "and not a vector of bytes"),
        ("cyclic", STATE, lambda d: d["entries"][4].__setitem__(3, 30), "its mask keeps 24 weights, its budget is 30"),
        ("cyclic", STATE, lambda d: d["entries"][4].__setitem__(3, 30), "state.json: the fingerprint of its entries"),
        ("cyclic", STATE, lambda d: d["entries"][4].__setitem__(1, [9, 9]), "its mask has 12 bytes, 81 weights need"),
        ("cyclic", STATE, lambda d: d.update(plan="0" * 16), "masks.safetensors: is of plan"),
        ("cyclic", STATE, lambda d: d.update(ranks=2), "gap/rng_1.json: is missing"),
        (
            "last",
            STATE.with_name("pruned.safetensors"),
            lambda w: w["layers.2.fc.weight"].fill_(1.0),
            "of kept weights",
        ),
    ],
)
def test_what_is_wrong_is_found(
    run: Run, make: Make, config: str, file: Path, change: Callable[[Any], None], message: str
) -> None:
    make(config)
    (edit if file.suffix == ".json" else edit_weights)(file, change)
    code, out, err = run("inspect", "checkpoints" if "checkpoints" in file.parts else "model")
    assert (code, err) == (1, "")
    assert message in out and "wrong" in out, out


@pytest.mark.parametrize(("hidden", "problems"), [(-torch.inf, 0), (torch.inf, 1), (torch.nan, 1)])
def test_a_saved_mask_of_attention_is_no_damage(run: Run, hidden: float, problems: int) -> None:
    module = model()
    module.register_buffer("causal", torch.full((4, 4), hidden).triu(1))
    engine = GaPEngine(module, CYCLIC, optimizer=torch.optim.Adam(module.parameters()))
    engine.export("model")
    code, out, _ = run("inspect", "model", "--json")
    assert code == problems
    assert json.loads(out)["problems"] == ["causal: holds values that are NaN or infinite"] * problems


def test_a_library_file_that_is_missing_or_cut_short_is_found(run: Run, make: Make) -> None:
    make()
    state = next(Path("checkpoints/step_7/state").glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:-1])
    assert f"{state.name}: has {state.stat().st_size} bytes, and was saved with" in run("inspect", "checkpoints")[1]
    state.unlink()
    code, out, _ = run("inspect", "checkpoints")
    assert code == 1 and f"{state.name}: cannot be read" in out


def test_masks_beside_the_weights_of_a_trainer(run: Run, make: Make) -> None:
    """Its folder, the folder of its checkpoints, and the masks themselves."""
    make(steps=4)  # partition 1 is dense, which no count can contradict
    module = model()
    trained = GaPEngine(module, CYCLIC, optimizer=torch.optim.Adam(module.parameters()))
    trained.load_checkpoint("checkpoints")
    for folder in (Path("out/checkpoint-9"), Path("out/checkpoint-10")):
        trained.save_masks(folder / "gap")
        save_file(module.state_dict(), folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("{}")
    for folder in (Path("out"), Path("out/checkpoint-10"), Path("out/checkpoint-10/gap")):
        code, out, _ = run("inspect", str(folder), "--json")
        figures = json.loads(out)
        assert (code, figures["problems"]) == (0, [])
        assert figures["notes"][0].startswith("these are masks alone") and "checkpoint-9" not in figures["path"]
    trained.export("wanted")
    for i, folder in enumerate(("out", "out/checkpoint-10")):
        assert run("export", folder, f"exported_{i}", "--format", "dense")[0] == 0
        files = [load_file(Path(name) / "model.safetensors") for name in ("wanted", f"exported_{i}")]
        assert files[0].keys() == files[1].keys() and all(torch.equal(w, files[1][n]) for n, w in files[0].items())
    code, _, err = run("export", "out/checkpoint-10/gap", "exported")
    assert code == 2 and "holds masks alone" in err and err.endswith("export out/checkpoint-10.\n")
    edit_weights(Path("out/checkpoint-10/model.safetensors"), revive)
    edit_weights(Path("out/checkpoint-10/model.safetensors"), lambda w: w.pop("layers.1.fc.weight"))
    code, out, _ = run("inspect", "out", "--json")
    figures = json.loads(out)
    assert code == 1 and figures["problems"] == [f"{FC}: has 25 weights that are not zero, its mask keeps 24"]
    assert figures["notes"][-1].startswith("layers.1.fc.weight has another name in the files of weights")
    edit_weights(Path("out/checkpoint-9/model.safetensors"), revive)
    code, _, err = run("export", "out/checkpoint-9", "revived")
    assert code == 2 and f"{FC}: 1 of its weights are not 0 and its mask prunes them" in err
    assert not Path("revived").exists()
    for folder in (Path("out/checkpoint-9"), Path("out/checkpoint-10")):
        shutil.rmtree(folder / "gap")
    assert run("inspect", "out")[2] == (
        "gap-ds: out: holds checkpoints of a Trainer, and none has masks: it was trained without GaPCallback.\n"
    )
    assert "is a checkpoint of a Trainer without masks" in run("inspect", "out/checkpoint-9")[2]


def test_the_newest_of_masks_alone_is_that_of_the_last_step(run: Run) -> None:
    """Accelerate's checkpoint_10 and a loop's epoch_0, step_900 and step_1000 are in no order of their names."""
    module = model()
    trained = GaPEngine(module, CYCLIC, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    for i, name in enumerate(["step_900", "epoch_0", "step_1000"], 1):
        sum(parameter.square().sum() for parameter in module.parameters()).backward()
        trained.optimizer.step()
        assert trained.after_step()
        trained.save_masks(Path("out", name, "gap"))
        trained.save_masks(Path("numbered", f"checkpoint_{7 + i}", "gap"))
        for folder, newest in (("out", name), ("numbered", f"checkpoint_{7 + i}")):
            figures = json.loads(run("inspect", folder, "--json")[1])
            assert (figures["path"], figures["applied_steps"]) == (f"{folder}/{newest}", i)
    Path("out/epoch_0/gap/state.json").write_text("{")
    assert "epoch_0/gap/state.json: is damaged" in run("inspect", "out")[2]


@pytest.mark.parametrize("name", ["cyclic", "global", "ramp", "2of4"])
def test_nothing_is_wrong_with_a_schedule_that_was_ended_early(run: Run, make: Make, name: str) -> None:
    make(name, steps=4)
    module = model()
    trained = GaPEngine(module, CONFIGS[name], optimizer=torch.optim.Adam(module.parameters()))
    trained.load_checkpoint("checkpoints")
    assert trained.finish()
    trained.save_checkpoint("ended")
    code, out, _ = run("inspect", "ended", "--json")
    figures = json.loads(out)
    assert (code, figures["problems"], figures["phase"]["dense"]) == (0, [], [])
    assert figures["notes"][-1] == "the schedule was ended early, at step 4"


def test_a_config_with_another_dtype_is_found(run: Run, make: Make) -> None:
    make()
    Path("model/config.json").write_text('{"dtype": "bfloat16"}', encoding="utf-8")
    assert 'config.json: "dtype" is "bfloat16", the weights are float32' in run("inspect", "model")[1]


# -- hostile and damaged files -----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def overlapping(path: Path) -> None:
    header = json.dumps({FC: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (WEIGHTS, cut),
        (WEIGHTS, huge_header),
        (WEIGHTS, overlapping),
        (WEIGHTS, lambda path: path.write_bytes(b"")),
        (MASKS, cut),
        (MASKS, lambda path: path.unlink()),
        (MASKS, lambda path: save_file({"a": torch.zeros(1)}, path)),
        *(
            (path, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
            for path in (Path("model/gap.json"), STATE)
            for text in (
                "",
                "{",
                "[]",
                "null",
                '{"signature": 3}',
                '{"signature": ""}',
                "[" * 100_000,
                '{"entries": {"a": -1}}',
                "\0" * 9,
            )
        ),
        (STATE, lambda path: edit(path, lambda d: d.update(entries=[["x", [2**62, -1], 0, 1, [0, 1]]]))),
        (STATE, lambda path: edit(path, lambda d: d.update(applied_steps=10**30))),
        (STATE, lambda path: edit(path, lambda d: d.update(first_steps=[]))),
        (STATE, lambda path: edit(path, lambda d: d["config"].update(method="magic"))),
        (Path("model/gap.json"), lambda path: edit(path, lambda d: d["config"].update(sparsity=7))),
        (Path("model/gap.json"), lambda path: edit(path, lambda d: d["entries"][FC].update(numel=True))),
    ],
)
def test_damaged_files_end_in_a_sentence(run: Run, make: Make, file: Path, damage: Callable[[Path], None]) -> None:
    make()
    damage(file)
    code, out, err = run("inspect", file.parts[0])
    assert (code, out) == (2, "")
    assert err.startswith("gap-ds: ") and err.count("\n") == 1 and len(err) < 500, err


@pytest.mark.parametrize("settings", [{"rounds": 10**9}, {"partitions": 10**9}, {"phase_steps": 2**40}])
def test_a_config_whose_schedule_cannot_be_built_is_a_problem(run: Run, make: Make, settings: dict[str, Any]) -> None:
    make()
    edit(STATE, lambda data: data["config"].update(settings))
    code, out, _ = run("inspect", "checkpoints")
    assert code == 1 and "state.json: " in out


def test_names_cannot_move_the_cursor(run: Run, make: Make) -> None:
    make()
    edit(Path("model/gap.json"), lambda data: data.update(signature="gap|\x1b[2J"))
    edit_weights(WEIGHTS, lambda w: w.update({"\x1b]0;owned\x07": torch.tensor([torch.inf])}))
    code, out, _ = run("inspect", "model")
    assert code == 1 and "\x1b" not in out and "\x07" not in out and "\\x1b]0;owned" in out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("absent", "absent: there is no such folder."),
        (".", ".: is the folder of a run; inspect ./model or ./checkpoints."),
        ("model/gap.json", "model/gap.json: is a file; inspect the folder that it is in."),
        ("empty", "empty: holds neither a checkpoint (gap/state.json) nor an export (gap.json and model.safetensors)."),
        (
            "foreign",
            "foreign: holds weights and no gap.json: it was not exported by gap_ds. Write the model by engine.export.",
        ),
    ],
)
def test_what_cannot_be_inspected(run: Run, make: Make, folder: str, message: str) -> None:
    make()
    Path("empty").mkdir()
    Path("foreign").mkdir()
    save_file({"a": torch.zeros(1)}, "foreign/model.safetensors")
    assert run("inspect", folder) == (2, "", f"gap-ds: {message}\n")


MEASURED = """
import resource, sys
from gap_ds.cli import main
import gap_ds.cli.app
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    main()
except SystemExit as end:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
    raise
"""


def test_an_export_needs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Two tensors of 1 GiB each, in files that are all holes."""
    gigabyte = 2**30
    shape = [gigabyte // 4 // 4096, 4096]
    names = ["a.weight", "b.weight"]
    for name in names:
        header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, gigabyte]}}).encode()
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + gigabyte)
    index = {"weight_map": {name: f"{name}.safetensors" for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    row = {"keep": 0, "nonzero": 0, "numel": gigabyte // 4, "partition": 0}
    info: dict[str, Any] = {"signature": "gap|", "config": CYCLIC, "applied_steps": 1, "entry_sparsity": 1.0}
    info |= {"model_sparsity": 1.0, "kept": 0, "numel": gigabyte // 2, "model_numel": gigabyte // 2}
    info |= {"mean_density": 1.0, "entries": dict.fromkeys(names, row)}
    (tmp_path / "gap.json").write_text(json.dumps(info), encoding="utf-8")
    command = [sys.executable, "-c", MEASURED, "inspect", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) * 1024 < 1.5 * gigabyte  # pages of a mapped file count until the system takes them back
