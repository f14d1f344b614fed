"""A sparse model under the trainers of other packages: docs/keep-sparse.md, run against the packages themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from common import bpe

from gap_ds import GaPConfig
from gap_ds.hf import GaPCallback

pytestmark = pytest.mark.full
trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

TEXTS = ["a small dog runs in the park", "two men sit on a bench", "a woman reads a book at home"] * 4
HELD = GaPConfig(method="static", mask_init="from_weights", phase_steps=1, rounds=0, finetune_steps=4)


def sparse(tokenizer: Any, folder: Path) -> Any:
    """A sparse model as from_pretrained gives it: DPO loads its reference from the same folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special))
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "layers" in name:
            weight.data[:, ::2] = 0.0
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_the_trainers_of_trl(kind: str, tmp_path: Path) -> None:
    tokenizer = bpe.train(TEXTS, 300, end=False)
    model = sparse(tokenizer, tmp_path / "sparse")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = getattr(trl, f"{kind}Config")(**options)
    rows = [{"text": text} for text in TEXTS]
    if kind == "DPO":
        rows = [{"prompt": "say", "chosen": f" {text}", "rejected": f" {text[::-1]}"} for text in TEXTS]
    callback = GaPCallback(HELD)
    data = datasets.Dataset.from_list(rows)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    assert callback.engine is not None and callback.engine.applied_steps == 6
    for entry in callback.engine.plan.entries:
        now = trainer.model.get_parameter(entry.name)
        assert not now[before[entry.name] == 0].any() and not torch.equal(now, before[entry.name])
