"""The rows of the Hugging Face table: every way to shard a Trainer's model, in one pair of processes.

Accelerate keeps its choice of engine in environment variables and in state that all of a process shares; both are reset
between rows. It turns DeepSpeed and FSDP on for accelerators alone, so in those rows the processes claim to have one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import deepspeed
import observe
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gap_ds import GaPEngine
from gap_ds.hf import GaPCallback
from gap_ds.method.plan import clean_name

warnings.filterwarnings("ignore", category=FutureWarning)

GAP = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 0.75, "rounds": 1, "finetune_epochs": 0.75}
BATCH, STEPS_PER_EPOCH, STEPS = 2, 4, 9
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ds"


def build(kind: str) -> nn.Module:
    """The same weights in every process and row."""
    torch.manual_seed(3)
    size = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "seq2seq":
        sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 25))}
        sides |= {"tie_word_embeddings": False}  # FSDP2 as Accelerate calls it takes no parameter under two names
        sides |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
        config = transformers.BartConfig(**size, **sides, d_model=16, max_position_embeddings=32, dropout=0.0)
        model = transformers.BartForConditionalGeneration(config)
        model.model.shared.requires_grad_(False)  # untied, it is used by nothing
        return model
    shape = {"hidden_size": 16, "intermediate_size": 25, "num_hidden_layers": 4, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **shape, tie_word_embeddings=False))


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 50, (6,), generator=generator) for _ in range(2 * BATCH * STEPS_PER_EPOCH)]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(row: dict[str, Any], out: Path, **options: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(out / row["name"]),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "optim": "adamw_torch",
        "use_cpu": not (row["stage"] or row["fsdp"]),
        "seed": 5,
    }
    if row["stage"]:
        shipped = json.loads((CONFIGS / f"trainer_zero{max(row['stage'], 2)}.json").read_text())
        small = {"stage3_param_persistence_threshold": row.get("persistence", 0)} if row["stage"] == 3 else {}
        shipped["zero_optimization"] |= {"stage": row["stage"], **small}
        settings["deepspeed"] = shipped
    if row["fsdp"]:
        layers = ["BartEncoderLayer", "BartDecoderLayer"] if row["kind"] == "seq2seq" else ["LlamaDecoderLayer"]
        fsdp = {"version": row["fsdp"], "transformer_layer_cls_to_wrap": layers}
        fsdp |= {"sync_module_states": False} if row["fsdp"] == 1 else {}  # it would ask for an accelerator's device
        settings |= {"fsdp": True, "fsdp_config": fsdp}
    kind = transformers.Seq2SeqTrainingArguments if row["kind"] == "seq2seq" else transformers.TrainingArguments
    return kind(**{**settings, **row.get("options", {}), **options})


def claim_accelerator() -> None:
    """Makes Accelerate take this process for one with an accelerator, whose tensors lie on the CPU.

    FSDP1 moves whole weights and moments to the CPU for a state dict, and frees or reuses what they were: on a CPU, the
    very same memory. Hence a crash and wrong first moments, with or without gap_ds: so they stay where they are.
    """
    prepared, state_dict_type = accelerate.PartialState._prepare_backend, FullyShardedDataParallel.state_dict_type

    def prepare(state: Any, cpu: bool, *rest: Any) -> Any:
        return prepared(state, cpu, *rest) if cpu else ("gloo", DistributedType.MULTI_XPU)

    def stay(module: nn.Module, kind: Any, *configs: Any) -> Any:
        for config in configs:
            config.offload_to_cpu = False
        return state_dict_type(module, kind, *configs)

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    accelerate.PartialState._prepare_backend = prepare
    FullyShardedDataParallel.state_dict_type = stay


def forget_row() -> None:
    """Undoes what the row before has told transformers and Accelerate."""
    gc.collect()
    unset_hf_deepspeed_config()
    for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[key]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def whole(trainer: transformers.Trainer) -> dict[str, Tensor]:
    """Every parameter of the working model, whole, by the means of the library that shards it. All ranks call this."""
    model = trainer.model_wrapped
    context: Any = nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        context = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    elif isinstance(model, deepspeed.DeepSpeedEngine) and model.zero_optimization_stage() == 3:
        context = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with context:
        inner = model.module if isinstance(model, deepspeed.DeepSpeedEngine | DistributedDataParallel) else model
        found = {}
        for name, parameter in inner.named_parameters():
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[clean_name(name)] = tensor.detach().clone().float()
    return found


class Witness(transformers.TrainerCallback):
    """Looks at whole weights after every optimizer step, without asking the engine which of them are masked."""

    def __init__(self, callback: GaPCallback) -> None:
        self.callback, self.trainer = callback, None
        self.wrong: list[str] = []
        #: Masks after the first step of this run, after each boundary, and at the end.
        self.masks: dict[int, dict[str, Tensor]] = {}
        self.phase: Any = None

    def look(self, when: str) -> None:
        engine, weights = self.callback.engine, whole(self.trainer)
        for entry in engine.plan.entries:
            nonzero = int(weights[entry.name].count_nonzero())
            if entry.partition not in engine.phase.dense and nonzero != entry.keep:
                self.wrong.append(f"{when}: {entry.name} has {nonzero} weights instead of {entry.keep}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.look(f"step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.callback.engine.applied_steps != state.global_step:
            self.wrong.append(f"{self.callback.engine.applied_steps} applied steps at step {state.global_step}")
        if self.callback.engine.phase is not self.phase or state.global_step == STEPS:
            self.phase = self.callback.engine.phase
            self.look(f"boundary {state.global_step}")
            self.masks[state.global_step] = observe.full_masks(self.callback.engine)


def train(row: dict[str, Any], out: Path, resume: Path | None = None, **options: Any) -> tuple[Any, GaPEngine, Witness]:
    forget_row()
    args = arguments(row, out, **options)
    callback = GaPCallback(GAP)
    witness = Witness(callback)
    cls = transformers.Seq2SeqTrainer if row["kind"] == "seq2seq" else transformers.Trainer
    trainer = cls(build(row["kind"]), args, train_dataset=data(), callbacks=[callback, witness])
    witness.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, callback.engine, witness


def run(row: dict[str, Any], out: Path) -> dict[str, Any]:
    trainer, engine, witness = train(row, out, save_strategy="steps", save_steps=row["saved"])
    result: dict[str, Any] = {"wrong": witness.wrong, "masks": witness.masks, "backend": engine.run.backend.name}
    result["state"] = observe.final_state(engine)
    result["log"] = [line for line in trainer.state.log_history if "loss" in line]
    trainer.save_model(str(out / row["name"] / "final"))
    result["keep"] = {entry.name: entry.keep for entry in engine.plan.entries}
    del trainer, engine

    checkpoint = out / row["name"] / f"checkpoint-{row['saved']}"
    _, engine, again = train(row, out, checkpoint)
    result["wrong"] += again.wrong
    result["resumed"] = {"state": observe.final_state(engine), "masks": again.masks}
    return result


def by_engine(kind: str, out: Path) -> dict[str, Any]:
    """The same training by a GaPEngine over DistributedDataParallel, in a loop without Trainer and Accelerate."""
    forget_row()
    row = {"name": "loop", "stage": 0, "fsdp": 0, "kind": kind}
    sampler = transformers.Trainer(build(kind), arguments(row, out), train_dataset=data())
    transformers.set_seed(5)
    batches, epochs = [], sampler.get_train_dataloader()  # its order of the examples, on this rank
    for epoch in range(3):
        epochs.set_epoch(epoch)
        batches += list(epochs)
    model = build(kind).train()
    wrapped = DistributedDataParallel(model)
    optimizer = sampler.create_optimizer(model)
    scheduler = sampler.create_scheduler(STEPS, optimizer)
    engine = GaPEngine(wrapped, GAP, optimizer=optimizer, lr_scheduler=scheduler, steps_per_epoch=STEPS_PER_EPOCH)
    masks = {}
    for step in range(STEPS):
        items = batches[step]["labels"]
        tokens = int((items if kind == "seq2seq" else items[:, 1:]).numel()) * dist.get_world_size()
        more = {"num_items_in_batch": torch.tensor(tokens)} if sampler.model_accepts_loss_kwargs else {}
        loss = engine(**batches[step], **more).loss
        engine.backward(loss * dist.get_world_size() if more else loss)
        engine.step()
        masks[step + 1] = observe.full_masks(engine)
    state = observe.final_state(engine)
    engine.close()
    return {"masks": masks, "state": state}


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    claim_accelerator()
    rows = json.loads((out / "rows.json").read_text())
    works: dict[str, Any] = {
        f"engine_{kind}": partial(by_engine, kind, out) for kind in {row["kind"]: 0 for row in rows}
    }
    observe.work_through(out, works | {row["name"]: partial(run, row, out) for row in rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
