"""A sparse model under the trainers of other packages: docs/keep-sparse.md, run against the packages themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from common import bpe

from gap_ds import GaPConfig
from gap_ds.hf import GaPCallback

pytestmark = pytest.mark.full

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
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[clients]'")
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


@pytest.mark.parametrize("named", [True, False])
def test_the_plugin_of_axolotl(named: bool, tmp_path: Path) -> None:
    """As axolotl loads it: by name, its settings among its own, its callback for a trainer that was made."""
    pytest.importorskip("axolotl", reason="axolotl is not installed: pip install axolotl")
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.plugins.clear()
    manager.register("gap_ds.hf.axolotl.GaPPlugin")
    _, settings = merge_input_args()
    gap: Any = HELD.model_dump(exclude_defaults=True)
    if named:
        (tmp_path / "held.json").write_text(json.dumps(gap))
        gap = str(tmp_path / "held.json")
    given = {"base_model": "sparse", "micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    given |= {"datasets": [{"path": "rows.jsonl", "type": "completion"}], "gap": gap}
    cfg = DictDefault(settings(**given).model_dump(exclude_none=True))
    with pytest.raises(ValueError, match=r'sparsity=2.0: .*Set "sparsity"'):
        settings(**given | {"gap": {"sparsity": 2.0}})

    model = sparse(bpe.train(TEXTS, 300, end=False), tmp_path / "sparse")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(200, (8, 6))]
    args = TrainingArguments(str(tmp_path / "out"), save_strategy="no", disable_tqdm=True, **options)
    trainer = Trainer(model, args, train_dataset=rows)
    (callback,) = manager.add_callbacks_post_trainer(cfg, trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.engine is not None and callback.engine.applied_steps == 4
    for entry in callback.engine.plan.entries:
        now = model.get_parameter(entry.name)
        assert not now[before[entry.name] == 0].any() and not torch.equal(now, before[entry.name])
