"""Exports of sharded runs: rank 0 holds a weight once, all ranks hear of its errors, and the ranks are not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from safetensors.torch import load_file

from gap_ds.cli.export import export
from gap_ds.export import load_compact


@pytest.mark.full
def test_rank_0_holds_once_what_the_last_of_four_ranks_has(tmp_path: Path) -> None:
    run_workers("worker_export.py", 4, tmp_path, "assemble", timeout=240)
    found = [json.loads((tmp_path / f"assemble.{rank}").read_text()) for rank in range(4)]
    assert [one["wrong"] for one in found] == [[]] * 4
    assert 0.5 < found[0]["share"] < 1.5 and all(one["share"] < 0.5 for one in found[1:])


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    run_workers("worker_export.py", 2, out, "faults", timeout=240)
    return out


@pytest.mark.parametrize(
    ("case", "sentence", "gathered"),
    [
        ("not_empty", "{out}/model: is not empty. Choose another folder, or overwrite it on purpose", 0),
        ("file", "{out}/file: is a file, and no folder. Choose another folder.", 0),
        ("home", "{out}/home: holds no exported model (gap.json), so it is not overwritten.", 0),
        ("current", "{out}: is the current folder, or holds it. Choose another folder.", 0),
        ("integers", "dtype=torch.int8: must be one of floating-point numbers, such as torch.bfloat16.", 0),
        ("tokenizer", "{out}/model: cannot be written (TypeError: Object of type set is not", 0),
        ("full_disk", "{out}/model: cannot be written (OSError: [Errno 28] No space left on device).", 1),
        ("changed", "{out}/model: was not written: read back, the files differ from gap.json: ", 1),
        ("no_rename", "{out}/model: cannot be written ([Errno 13] Permission denied: ", 1),
    ],
)
def test_what_rank_0_cannot_write_all_ranks_say(faults: Path, case: str, sentence: str, gathered: int) -> None:
    """And nothing is lost, or left behind; the run goes on."""
    both = [json.loads((faults / f"faults.{rank}").read_text()) for rank in range(2)]
    assert both[0][case]["said"] == both[1][case]["said"]
    for found in both:
        assert found[case]["said"].startswith("ValueError: " + sentence.format(out=faults))
        assert "\n" not in found[case]["said"]
        assert found[case]["gathered"] == gathered
        assert found[case]["left"] == ["file", "home", "model"]
        assert found["inside"] == ["README.md", "gap.json", "model.safetensors", "tokenizer.json"]
    assert "tokenizer.json" not in {path.name for path in (faults / "model").iterdir()}


def test_a_model_that_drops_the_weights_it_is_given(faults: Path) -> None:
    """Its save_pretrained takes no state_dict, and its own one has DTensors without masks."""
    folder = faults / "model" / "own"
    info = json.loads((folder / "gap.json").read_text())
    for name in ("own", "model"):
        weights = load_file(folder / f"{name}.safetensors")
        for entry, row in info["entries"].items():
            assert [list(weights[entry].shape), int(weights[entry].count_nonzero())] == [row["shape"], row["keep"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hugging_face_model_is_exported_without_its_ranks(hugging_face: Path, tmp_path: Path, dtype: str) -> None:
    """Two ranks of FSDP2 in the middle of a phase: the command writes what the engine has written."""
    engine, out = hugging_face / dtype, tmp_path / "out"

    def write(form: str, folder: Path) -> None:
        model = hugging_face / "float32"  # its config alone is taken
        export(hugging_face / "checkpoints", folder, form, model, dtype, False, lambda *_: None)

    write("dense", out)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (out, engine))
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype == getattr(torch, dtype) and torch.equal(found[n], wanted[n]) for n in wanted)
    ours, theirs = (json.loads((folder / "gap.json").read_text()) for folder in (out, engine))
    same: set[str] = ours.keys() - {"sha256"}
    assert all(ours[key] == theirs[key] for key in same) and 0 < ours["model_sparsity"] < ours["entry_sparsity"]
    write("compact", tmp_path / "compact")
    model: Any = load_compact(tmp_path / "compact")
    state = model.state_dict()
    assert type(model).__name__ == "LlamaForCausalLM" and all(torch.equal(state[n], wanted[n]) for n in wanted)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("hugging_face")
    run_workers("worker_export.py", 2, out, "hugging_face", timeout=240)
    return out
