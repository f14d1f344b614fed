"""Models of the zoo, a few steps with two boundaries, under ZeRO-3 in bf16 or under FSDP2 in fp32.

python worker_zoo.py OUT MODEL_BACKEND ...
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import observe
import reference
import torch
import torch.distributed as dist
import worker_fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worker_zero import observers
from zoo import BATCH, ZOO, Kind

from gap_ds import GaPEngine
from gap_ds.method.entries import find_blocks

warnings.filterwarnings("ignore")

GAP = {"sparsity": 0.7, "partitions": 2, "phase_steps": 1, "rounds": 1, "finetune_steps": 2, "mask_init": "magnitude"}
STEPS = 4


def blocks_of(model: nn.Module) -> list[str]:
    return find_blocks(dict(model.named_modules()), {name: tuple(p.shape) for name, p in model.named_parameters()})


def under_zero3(model: nn.Module) -> tuple[GaPEngine, dict[str, Any]]:
    """ZeRO-3 in bf16: the working copies are others than the fp32 weights."""
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"buffer_dtype": "bf16"},  # sinusoidal positions are a buffer
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = GaPEngine.initialize(model=model, config=config, gap_config=GAP, optimizer=optimizer)
    return engine, observers(engine, {"stage": 3})


def under_fsdp2(model: nn.Module) -> tuple[GaPEngine, dict[str, Any]]:
    """FSDP2, every block a unit of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(model.get_submodule(block), mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = GaPEngine(model, GAP, optimizer=optimizer)
    return engine, {"working_copy": worker_fsdp.working_copy(engine, worker_fsdp.full_weights), "full_fp32": None}


SHARDED: dict[str, tuple[torch.dtype, Callable[[nn.Module], tuple[GaPEngine, dict[str, Any]]]]] = {
    "zero3": (torch.bfloat16, under_zero3),
    "fsdp2": (torch.float32, under_fsdp2),
}


def unprunable(model: nn.Module) -> set[str]:
    """Names of embeddings, position tables, what is tied to them, norms and biases."""
    kept = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    kept |= {id(p) for p in model.parameters() if p.dim() < 2}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in kept}


def run(kind: Kind, backend: str) -> dict[str, Any]:
    """Trains a model; what is wrong with its blocks, entries, masks and weights."""
    dtype, shard = SHARDED[backend]
    model = kind.build()
    before = {name: p.detach().to(dtype).float() for name, p in model.named_parameters()}
    blocks, dense = blocks_of(model), unprunable(model)
    engine, seen = shard(model)
    entries = {entry.name: entry for entry in engine.plan.entries}
    wrong = [f"{block} is a block" for block in blocks if not re.fullmatch(kind.block, block)]
    wrong += [f"{len(blocks)} blocks"] if len(blocks) != kind.blocks else []
    wrong += [f"{name} is an entry" for name in entries.keys() & dense]
    wrong += [f"{name} is an entry or not against the list" for name in entries.keys() ^ kind.entries()]

    def stable_sort(weights: dict[str, Tensor], masks: dict[str, Tensor], when: str) -> list[str]:
        wanted = {name: reference.largest(weight.abs(), entries[name].keep) for name, weight in weights.items()}
        return [f"{when}: mask of {n}" for n, mask in wanted.items() if not torch.equal(masks[n], mask)]

    masks = observe.full_masks(engine)
    wrong += stable_sort({name: before[name] for name in masks}, masks, "at the start")
    last: dict[str, Tensor] = {}
    handle = engine.optimizer.register_step_post_hook(
        lambda *_: last.update({name: piece.weight().clone() for name, piece in engine.mask_state.shards.items()})
    )
    boundaries = 0
    for step in range(STEPS):
        phase = engine.phase
        engine.backward(engine(**kind.data(step, dist.get_rank(), dtype)).loss)
        engine.step()
        if engine.applied_steps != step + 1:
            wrong.append(f"step {step}: {engine.applied_steps} applied steps")
        masks = observe.full_masks(engine)
        if engine.phase is not phase:
            boundaries += 1
            left = [name for name, entry in entries.items() if entry.partition in phase.dense]
            whole = observe.gather([(engine.mask_state.shards[name], last[name]) for name in left])
            wrong += stable_sort(dict(zip(left, whole, strict=True)), masks, f"step {step}")
        wrong += [f"step {step}: {mistake}" for mistake in observe.mistakes(engine, masks, **seen)]
    handle.remove()
    engine.close()
    return {"wrong": wrong, "entries": set(entries), "boundaries": boundaries, "sparse": set(masks)}


def main(out: Path, rows: list[str]) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    pairs = {row: row.split("_") for row in rows}
    observe.work_through(out, {row: partial(run, ZOO[model], backend) for row, (model, backend) in pairs.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
