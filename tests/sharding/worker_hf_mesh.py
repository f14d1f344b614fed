"""Models of transformers on meshes: loaded in pieces by transformers, or wrapped by Accelerate, on 4 processes.

Every row trains the same weights on the same example, whatever rank and step it is, so that one process without
sharding is the reference of them all.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import observe
import torch
import torch.distributed as dist
import toy
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from worker_hf import claim_accelerator, forget_row

from gap_ds import GaPEngine
from gap_ds.hf import GaPCallback, prepare
from gap_ds.method.plan import clean_name

warnings.filterwarnings("ignore", category=FutureWarning)

GAP = {"sparsity": 0.75, "partitions": 2, "phase_steps": 3, "rounds": 1, "finetune_steps": 3}
GAP |= {"mask_init": "magnitude"}
STEPS, SAVED = 9, 4
SHAPE = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 4, "num_attention_heads": 4}
EXAMPLE = torch.randint(3, 50, (6,), generator=torch.Generator().manual_seed(7))


def write(folder: Path) -> None:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=52, **SHAPE, num_key_value_heads=4, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def load(out: Path, **sizes: Any) -> nn.Module:
    """The model, whole, or in pieces on transformers' own mesh."""
    spread = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    return transformers.LlamaForCausalLM.from_pretrained(out / "model", **spread).train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # One tensor at a time: torch's grouped updates do not take tensors of several meshes.
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, foreach=False
    )


def batch() -> dict[str, Tensor]:
    ids = EXAMPLE.repeat(2, 1)
    return {"input_ids": ids, "labels": ids}


class Seen:
    """The masks after each boundary, and everything that was wrong with whole weights after a step."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.masks: list[dict[str, Tensor]] = []
        self.phase: Any = None

    def look(self, engine: GaPEngine) -> None:
        engine.run.backend.publish()
        weights = {clean_name(name): p.detach() for name, p in engine.module.named_parameters()}
        for entry in engine.plan.entries:
            weight = weights[entry.name]
            nonzero = int((weight.full_tensor() if isinstance(weight, DTensor) else weight).count_nonzero())
            if entry.partition not in engine.phase.dense and nonzero != entry.keep:
                self.wrong.append(f"step {engine.applied_steps}: {entry.name} has {nonzero}, not {entry.keep}")
        if engine.phase is not self.phase:
            self.phase = engine.phase
            self.masks.append(observe.full_masks(engine))


def steps(engine: GaPEngine, backward: Callable[[Tensor], None], step: Callable[[], None]) -> Iterator[int]:
    """The loop: yields after every step."""
    for number in range(engine.applied_steps, STEPS):
        backward(engine.run.backend.forward(**batch()).loss)
        step()
        engine.after_step()
        yield number + 1


def finish(engine: GaPEngine, seen: Seen, out: Path, name: str) -> dict[str, Any]:
    result = observe.final_state(engine) | {"wrong": seen.wrong, "masks": seen.masks}
    result |= {"plan": engine.plan, "stats": engine.stats(), "backend": engine.run.backend.name}
    engine.export(out / "final" / name)
    result["exported"] = load_file(out / "final" / name / "model.safetensors") if dist.get_rank() == 0 else {}
    engine.close()
    return result


def alone(out: Path) -> dict[str, Any]:
    """The whole model on each rank, without the others."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    toy.Job.group = groups[dist.get_rank()]
    model = load(out)
    optimizer, seen = adamw(model), Seen()
    engine = GaPEngine(model, GAP, optimizer=optimizer, group=toy.Job.group)
    for _ in steps(engine, lambda loss: loss.backward(), lambda: advance(optimizer)):
        seen.look(engine)
    result = observe.final_state(engine) | {"masks": seen.masks, "wrong": seen.wrong}
    engine.close()
    toy.Job.group = None
    return result


def advance(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


def by_engine(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """A model that transformers has loaded in pieces, in a loop of one's own; resumed from a GaPEngine's checkpoint."""
    forget_row()
    folder = out / "checkpoints" / row["name"]

    def build() -> GaPEngine:
        model = load(out, **row["sizes"])
        return GaPEngine(model, GAP, optimizer=adamw(model))

    engine, seen = build(), Seen()
    for step in steps(engine, engine.backward, lambda: engine.optimizer.step() or engine.optimizer.zero_grad()):
        seen.look(engine)
        if step == SAVED:
            engine.save_checkpoint(folder)
    result = finish(engine, seen, out, row["name"])
    resumed = build()
    resumed.load_checkpoint(folder)
    for _ in steps(resumed, resumed.backward, lambda: resumed.optimizer.step() or resumed.optimizer.zero_grad()):
        pass
    result["resumed"] = observe.final_state(resumed) | {"masks": observe.full_masks(resumed)}
    resumed.close()
    return result


def by_accelerate(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """Accelerate's own loop; resumed by its `save_state` and `load_state`, or by the engine's checkpoints.

    Accelerate 1.15 can't save DTensors where FSDP is off.
    """
    folder = str(out / "states" / row["name"])

    def build() -> tuple[Accelerator, GaPEngine, Any]:
        forget_row()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **row["fsdp"]) if "fsdp" in row else None
        accelerator = Accelerator(parallelism_config=ParallelismConfig(**row["mesh"]), fsdp_plugin=plugin)
        model = load(out, **row.get("sizes", {}))
        model, optimizer = accelerator.prepare(model, adamw(model))
        return accelerator, prepare(accelerator, model, optimizer, None, GAP), optimizer

    accelerator, engine, optimizer = build()
    seen = Seen()
    for step in steps(engine, accelerator.backward, lambda: advance(optimizer)):
        seen.look(engine)
        if step == SAVED:
            accelerator.save_state(folder) if "fsdp" in row else engine.save_checkpoint(folder)
    result = finish(engine, seen, out, row["name"])
    accelerator, engine, optimizer = build()
    accelerator.load_state(folder) if "fsdp" in row else engine.load_checkpoint(folder)
    for _ in steps(engine, accelerator.backward, lambda: advance(optimizer)):
        pass
    result["resumed"] = observe.final_state(engine) | {"masks": observe.full_masks(engine)}
    engine.close()
    return result


class Witness(transformers.TrainerCallback):
    def __init__(self, callback: GaPCallback) -> None:
        self.callback, self.seen = callback, Seen()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.look(self.callback.engine)


def by_trainer(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """The Trainer of a model that transformers has loaded in pieces."""
    forget_row()
    model = load(out, **row["sizes"])
    settings = {"output_dir": str(out / row["name"]), "max_steps": STEPS, "per_device_train_batch_size": 2}
    settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch"}
    callback = GaPCallback(GAP)
    witness = Witness(callback)
    examples = [{"input_ids": EXAMPLE, "labels": EXAMPLE} for _ in range(64)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=examples,
        callbacks=[callback, witness],
        optimizers=(adamw(model), None),
    )
    trainer.train()
    trainer.save_model(str(out / row["name"] / "saved"))
    result = finish(callback.engine, witness.seen, out, row["name"])
    saved = out / row["name"] / "saved" / "model.safetensors"
    return result | {"saved": load_file(saved) if dist.get_rank() == 0 else {}}


def by_deepspeed(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """AutoTP: DeepSpeed cuts the layers of the whole model itself. A row may be refused."""
    forget_row()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": row["stage"]},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": row["autotp"]},
        "steps_per_print": 10**9,
    }

    def build() -> GaPEngine:
        model = load(out)
        if row.get("frozen"):  # so that the ranges of ZeRO end inside a row of a weight that is cut by columns
            model.model.embed_tokens.requires_grad_(False)
            model.model.layers[0].requires_grad_(False)
        return GaPEngine.initialize(model=model, optimizer=adamw(model), config=config, gap_config=GAP)

    def train(engine: GaPEngine) -> Iterator[int]:
        while engine.applied_steps < STEPS:
            engine.backward(engine(**batch()).loss)
            engine.step()
            yield engine.applied_steps

    try:
        engine = build()
    except ValueError as error:
        return {"refused": str(error)}
    seen = Seen()
    for step in train(engine):
        seen.masks.append(observe.full_masks(engine)) if engine.phase is not seen.phase else None
        seen.phase = engine.phase
        if step == SAVED:
            engine.save_checkpoint(out / "checkpoints" / row["name"])
    result = finish(engine, seen, out, row["name"])
    resumed = build()
    resumed.load_checkpoint(out / "checkpoints" / row["name"])
    for _ in train(resumed):
        pass
    result["resumed"] = observe.final_state(resumed) | {"masks": observe.full_masks(resumed)}
    resumed.close()
    return result


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    claim_accelerator()
    if dist.get_rank() == 0:
        write(out / "model")
    dist.barrier()
    rows = json.loads((out / "rows.json").read_text())
    kinds = {"engine": by_engine, "accelerate": by_accelerate, "trainer": by_trainer, "deepspeed": by_deepspeed}
    works: dict[str, Any] = {"alone": partial(alone, out)}
    observe.work_through(out, works | {row["name"]: partial(kinds[row["what"]], row, out) for row in rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
