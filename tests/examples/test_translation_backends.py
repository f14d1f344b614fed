"""The identical recipe on several sharding libraries ends in the same sparse model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import data
import evaluate
import pytest
import torch
import translate
from safetensors.torch import load_file

from gap_ds import sparsify_for_inference
from gap_ds.export import compact

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}


def exported(folder: Path, backend: str, *options: str) -> dict[str, torch.Tensor]:
    """The model that two processes export after training with this backend."""
    (folder / "gap.json").write_text(json.dumps(GAP))
    out = folder / backend
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(ROOT / "examples" / "translation" / "train.py")]
    command += ["--gap-config", str(folder / "gap.json"), "--backend", backend, "--output-dir", str(out)]
    command += ["--limit", "200", "--vocab-size", "400", "--batch-tokens", "1024", "--dropout", "0", "--beams", "1"]
    command += options
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(out / "model" / "model.safetensors")


def translations(model: Any, tokenizer: Any) -> list[str]:
    sentences = list(data.load_rows(None, "test", "en", "de", limit=6)["source"])
    return evaluate.translate(model, tokenizer, sentences, beams=4)


def check_forms(folder: Path) -> None:
    """The dense folder, the compact one, and the model with all matrices by compressed rows translate alike."""
    compact(folder, folder.parent / "compact")
    dense, tokenizer = translate.load(folder, torch.float32)
    packed, _ = translate.load(folder.parent / "compact", torch.float32)
    wanted = translations(dense, tokenizer)
    assert translations(packed, tokenizer) == wanted
    assert any(choice.layout == "csr" for choice in sparsify_for_inference(dense, layout="csr"))
    assert translations(dense, tokenizer) == wanted


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return exported(tmp_path_factory.mktemp("ddp"), "ddp")


@pytest.mark.parametrize("backend", ["fsdp1", "fsdp2"])
def test_the_same_sparse_model(tmp_path: Path, ddp: dict[str, torch.Tensor], backend: str) -> None:
    """Up to rounding: gradients that differ in the last bit may swap two weights at the threshold of a boundary."""
    model = exported(tmp_path, backend)
    assert model.keys() == ddp.keys()
    for name, weight in ddp.items():
        far = (model[name] - weight).abs() > 1e-4
        assert far.float().mean() < 1e-3, name
        if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")):
            kept, wanted = model[name] != 0, weight != 0
            assert kept.sum() == wanted.sum() and (kept != wanted).float().mean() < 1e-3, name
    check_forms(tmp_path / backend / "model")


def test_a_model_of_zero3_translates_alike_in_all_forms(tmp_path: Path) -> None:
    exported(tmp_path, "deepspeed", "--deepspeed_config", str(ROOT / "configs" / "ds" / "zero3.json"))
    check_forms(tmp_path / "deepspeed" / "model")
    card = (tmp_path / "deepspeed" / "model" / "README.md").read_text()
    assert "| bleu |" in card and "BLEU|nrefs:1" in card.replace("\\|", "|")
