"""LoRA adapters over a sparse base in a Trainer on 2 processes: the masked product, by how the model is sharded."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import observe
import peft
import torch
import torch.distributed as dist
import transformers
import worker_hf
from torch import Tensor, nn

from gap_ds.hf import GaPCallback, mask_adapters

HELD = {"method": "static", "mask_init": "from_weights", "phase_steps": 1, "rounds": 0, "finetune_steps": 5}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base() -> nn.Module:
    """A Llama whose matrices in blocks are 80 % zero; the last down_proj is dense."""
    model = worker_hf.build("causal")
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "layers" in name and "layers.3.mlp.down_proj" not in name:
            threshold = weight.detach().abs().flatten().kthvalue(int(0.8 * weight.numel())).values
            weight.data[weight.abs() <= threshold] = 0.0
    return model


def adapted() -> nn.Module:
    torch.manual_seed(4)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(base(), peft.LoraConfig(**settings))


def run(row: dict[str, Any], out: Path) -> dict[str, Any]:
    worker_hf.forget_row()
    args = worker_hf.arguments(row, out, per_device_eval_batch_size=2, max_steps=6, learning_rate=5e-2)
    model = adapted()
    masked = mask_adapters(model)
    callback, data = GaPCallback(HELD), worker_hf.data()
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train()
    engine = callback.engine
    assert engine is not None
    engine.check_weights()
    found = {
        "backend": engine.run.backend.name,
        "masked": masked,
        "entries": [entry.name for entry in engine.plan.entries],
        "density": engine.stats()["density"],
        "loss": trainer.evaluate()["eval_loss"],
        "weights": worker_hf.whole(trainer),
    }
    trainer.save_model(str(out / row["name"] / "adapters"))
    return found


def loss(model: nn.Module) -> float:
    """The loss that `Trainer.evaluate` returns, on one process."""
    rows = torch.stack([row["input_ids"] for row in worker_hf.data()])
    with torch.no_grad():
        found: Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
    return float(found)


ROWS = {
    name: {"name": name, "kind": "causal", "stage": stage, "fsdp": fsdp}
    for name, stage, fsdp in (("ddp", 0, 0), ("zero2", 2, 0), ("zero3", 3, 0), ("fsdp2", 0, 2))
}


def main(out: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    worker_hf.claim_accelerator()
    observe.work_through(out, {name: partial(run, ROWS[name], out) for name in names})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
