"""A mixture whose tensors of experts are cut by partitions, on 2 ranks: FSDP, ZeRO and fairscale, against plain code.

python worker_experts.py OUT BACKEND ...
"""

from __future__ import annotations

import os
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
import transformers
import worker_fairscale
from fairscale.nn.data_parallel import FullyShardedDataParallel as FairscaleFSDP
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim import OSS
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from gap_ds import GaPEngine

warnings.filterwarnings("ignore")

GAP = {"sparsity": 0.7, "partitions": 4, "phase_steps": 1, "rounds": 1, "finetune_steps": 2, "mask_init": "magnitude"}
STEPS, LAYERS = 6, 2
#: Of each layer: tensor, rows, partition after that of the layer, kept weights. Attention has 768 weights and an expert
#: 384, so the even cut of 2304 is after the first expert; 30 % of a tensor are shared by its rows.
ENTRIES = [
    ("self_attn.q_proj.weight", slice(None), 0, 77),
    ("self_attn.k_proj.weight", slice(None), 0, 38),
    ("self_attn.v_proj.weight", slice(None), 0, 38),
    ("self_attn.o_proj.weight", slice(None), 0, 77),
    ("mlp.experts.gate_up_proj", slice(0, 1), 0, 77),
    ("mlp.experts.gate_up_proj", slice(1, 4), 1, 230),
    ("mlp.experts.down_proj", slice(0, 1), 0, 39),
    ("mlp.experts.down_proj", slice(1, 4), 1, 115),
]


def build() -> nn.Module:
    torch.manual_seed(4)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_local_experts": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": LAYERS}
    config = transformers.MixtralConfig(**sizes, **heads, max_position_embeddings=32)
    config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config).train()


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    tokens = torch.randint(0, 30, (2, 8), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


#: With an eps that counts beside the gradients. The first update of a grown weight is about
#: lr x constant x g / (|g| + eps): with a tiny eps all these weights tie but for rounding after a phase of one step,
#: and the rounding of a gradient decides the mask.
ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "foreach": False}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **ADAMW)


def entries() -> list[tuple[str, slice, int, int]]:
    """Tensor, rows, partition and kept weights of each entry of the model."""
    return [
        (f"model.layers.{layer}.{leaf}", rows, 2 * layer + k, keep)
        for layer in range(LAYERS)
        for leaf, rows, k, keep in ENTRIES
    ]


def named(parameter: str, rows: slice) -> str:
    return parameter if rows.start is None else f"{parameter}[{rows.start}:{rows.stop}]"


@torch.no_grad()
def plain() -> dict[str, Any]:
    """The same training of the whole model on every rank, without gap_ds: masks after each boundary, final weights."""
    model = build()
    optimizer = adamw(model)
    weights = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    history = []
    for step in range(STEPS):
        if step <= 4:
            for name, rows, partition, keep in entries():
                weight, entry = weights[name][rows], named(name, rows)
                if partition == step:
                    if (mask := masks.pop(entry, None)) is not None:
                        for moment in optimizer.state[weights[name]].values():
                            if moment.dim():
                                moment[rows][~mask] = 0.0
                elif entry not in masks:
                    masks[entry] = reference.largest(weight.abs(), keep)
                    weight[~masks[entry]] = 0.0
            history.append({name: mask.clone() for name, mask in masks.items()})
        with torch.enable_grad():
            model(**batch(step)).loss.backward()
        for parameter in weights.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        for name, rows, _, _ in entries():
            if (mask := masks.get(named(name, rows))) is not None:
                weights[name][rows][~mask] = 0.0
    return {"masks": history, "weights": {name: p.detach().clone() for name, p in weights.items()}}


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_units(wrapper: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    """A unit for each layer, one for the rest."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrapper(layer)
    return wrapper(model)


cpu = torch.device("cpu")
FSDP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp2": fsdp2,
    "fsdp1": partial(by_units, partial(FullyShardedDataParallel, device_id=cpu, use_orig_params=True)),
    "fsdp1_flat": partial(by_units, partial(FullyShardedDataParallel, device_id=cpu, use_orig_params=False)),
    "fairscale": partial(by_units, partial(FairscaleFSDP, compute_device=cpu, bucket_cap_mb=0)),
}


def sharded(backend: str) -> GaPEngine:
    model = build()
    if backend in FSDP:
        model = FSDP[backend](model)
        return GaPEngine(model, GAP, optimizer=adamw(model))
    if backend == "oss":
        optimizer = OSS(model.parameters(), optim=torch.optim.AdamW, **ADAMW)
        return GaPEngine(ShardedDataParallel(model, optimizer), GAP, optimizer=optimizer)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(backend[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return GaPEngine.initialize(model=model, config=config, gap_config=GAP, optimizer=adamw(model))


def train(engine: GaPEngine, until: int) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The masks before each step, and those of a boundary that are no stable sort of whole tensors."""
    history, wrong, last = [], [], dict[str, Tensor]()
    shards = [shard for shard in engine.run.backend.shards() if shard.trainable]

    def remember(*_: object) -> None:
        last.update({shard.name: shard.weight().clone() for shard in shards})

    handle = engine.optimizer.register_step_post_hook(remember)
    while engine.applied_steps < until:
        history.append(observe.full_masks(engine))
        before, left = engine.applied_steps, engine.phase.dense
        engine.backward(engine(**batch(before)).loss)
        engine.step()
        found = observe.gather([(shard, last[shard.name]) for shard in shards])
        weights, masks = dict(zip(last, found, strict=True)), observe.full_masks(engine)
        for name, rows, partition, keep in entries() if engine.phase.dense != left else ():
            if partition in left:
                wanted = reference.largest(weights[name][rows].abs(), keep)
                wrong += (
                    [] if torch.equal(masks[named(name, rows)], wanted) else [f"step {before}: {named(name, rows)}"]
                )
    handle.remove()
    return history, wrong


def run(backend: str, out: Path) -> dict[str, Any]:
    """A whole run, and one that goes on from its third step; the export of both."""
    engine = sharded(backend)
    masks, wrong = train(engine, 3)
    engine.save_checkpoint(out / backend, "middle", portable=True)
    more_masks, more_wrong = train(engine, STEPS)
    found: dict[str, Any] = {"masks": masks + more_masks, "wrong": wrong + more_wrong}
    found |= {"final": observe.final_state(engine), "stats": engine.stats(), "plan": engine.plan}
    engine.export(out / f"{backend}_exported")
    found["exported"] = load_file(out / f"{backend}_exported" / "model.safetensors")
    engine.close()
    resumed = sharded(backend)
    resumed.load_checkpoint(out / backend, "middle")
    train(resumed, STEPS)
    found["resumed"] = observe.final_state(resumed)
    resumed.close()
    return found


def main(out: Path, backends: list[str]) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    worker_fairscale.without_cuda()
    works = {backend: partial(run, backend, out) for backend in backends}
    observe.work_through(out, {"plain": plain, **works})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
