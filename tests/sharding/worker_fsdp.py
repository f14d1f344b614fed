"""All rows of PyTorch's own sharding, one after the other in one group of processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import observe
import reference
import torch
import torch.distributed as dist
import torchtitan_like
import toy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine
from gap_ds.method.plan import clean_name

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)


def groups_by_unit(model: nn.Module) -> list[dict[str, object]]:
    """Parameter groups that flat parameters allow: the blocks, and the rest."""
    trained = [(clean_name(name).startswith("layers."), p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for block, p in trained if block], "weight_decay": 0.01},
        {"params": [p for block, p in trained if not block], "weight_decay": 0.0},
    ]


#: A group of each rank alone.
GROUPS: dict[int, Any] = {}

MATRICES = {name for name, p in toy.build().named_parameters() if p.dim() >= 2}


def groups_by_name(model: nn.Module) -> list[dict[str, object]]:
    """The groups of `toy.groups`, where the parameters no longer have their shapes."""
    trained = [(clean_name(name) in MATRICES, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for matrix, p in trained if matrix], "weight_decay": 0.01},
        {"params": [p for matrix, p in trained if not matrix], "weight_decay": 0.0},
    ]


def by_unit(row: dict[str, Any]) -> bool:
    return bool(row.get("flat"))


def wrap(row: dict[str, Any]) -> nn.Module:
    """The toy, wrapped as the row says."""
    model: nn.Module = toy.build()
    if row.get("checkpointing") == "before":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, toy.Block))
    if row["kind"] == "fsdp1":
        model = wrap_fsdp1(model, row)
    elif row["kind"] == "fsdp2":
        model = wrap_fsdp2(model, row)
    elif row["kind"] == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    if row.get("checkpointing") == "after":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, toy.Block))
    return torch.compile(model, backend="eager") if row.get("compile") else model


def wrap_fsdp1(model: nn.Module, row: dict[str, Any]) -> nn.Module:
    bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    strategy = ShardingStrategy[row.get("strategy", "FULL_SHARD")]
    arguments: dict[str, Any] = {
        "device_id": torch.device("cpu"),
        "use_orig_params": not row.get("flat"),
        "sharding_strategy": strategy,
        "mixed_precision": bf16 if row.get("bf16") else None,
    }
    if "HYBRID" in strategy.name:
        arguments["device_mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    # A flat parameter is frozen or trained as a whole: flat, the frozen layer needs a unit of its own.
    frozen = model.frozen if row.get("flat") else None
    policy = CustomPolicy(lambda module: isinstance(module, toy.Block) or module is frozen)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, **arguments)


def wrap_fsdp2(model: nn.Module, row: dict[str, Any]) -> nn.Module:
    arguments: dict[str, Any] = {}
    if row.get("bf16"):
        arguments["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if row.get("offload"):
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    shape = (2, dist.get_world_size() // 2) if row.get("hybrid") else (dist.get_world_size(),)
    arguments["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in model.layers:
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def build(row: dict[str, Any], **training: Any) -> GaPEngine:
    model = wrap(row)
    inside = getattr(model, "_orig_mod", model)
    inside = inside.module if row["kind"] == "ddp" else inside
    made = observe.PACKED if row.get("packed") else toy.OPTIMIZERS
    optimizer = made[row["optimizer"]]((groups_by_unit if by_unit(row) else groups_by_name)(inside))
    if row.get("evaluate"):
        evaluate(model)
    training = {"gradient_accumulation_steps": toy.ACCUMULATION, "gradient_clipping": row.get("clip", 0.0), **training}
    return GaPEngine(model, row.get("gap", toy.GAP), optimizer=optimizer, **training)


def evaluate(model: nn.Module) -> None:
    """A forward pass without a backward pass, which leaves whole parameters behind."""
    with torch.no_grad():
        model(*toy.batch(99, 0, 0))


Weights = Callable[[GaPEngine], dict[str, Tensor]]


def full_weights(engine: GaPEngine) -> dict[str, Tensor]:
    """All whole parameters, by the library's own means."""
    root = getattr(engine.run.backend.forward, "_orig_mod", engine.run.backend.forward)
    fsdp1 = isinstance(root, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(root, writeback=False) if fsdp1 else contextlib.nullcontext():
        return {
            clean_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in (root if fsdp1 else engine.module).named_parameters()
        }


def working_copy(engine: GaPEngine, weights: Weights) -> Callable[[str], Tensor]:
    """Each whole parameter; all are gathered at once, once per step."""
    seen: dict[int, dict[str, Tensor]] = {}

    def weight(name: str) -> Tensor:
        if engine.applied_steps not in seen:
            seen.clear()
            seen[engine.applied_steps] = weights(engine)
        return seen[engine.applied_steps][name]

    return weight


def run(
    row: dict[str, Any], out: Path, build: Callable[..., GaPEngine] = build, weights: Weights = full_weights
) -> dict[str, Any]:
    """A whole run, saved and exported in step 4, and a second engine that goes on from there."""
    engine = build(row)
    name = row["name"]

    def save_and_export() -> None:
        observe.draw_by_rank()
        engine.save_checkpoint(out / "checkpoints" / name, client_state={"row": name})
        engine.export(out / "mid" / name)

    at = {4: save_and_export}
    if row.get("evaluate"):
        at |= {step: lambda: evaluate(engine.run.backend.forward) for step in (2, 7, 11)}
    result = observe.train(engine, working_copy(engine, weights), at=at)
    result |= observe.final_state(engine) | {"plan": engine.plan, "backend": engine.run.backend.name}
    engine.export(out / "final" / name)
    result["reloaded"] = reload(out / "final" / name) if dist.get_rank() == 0 else {}
    engine.close()

    resumed = build(row)
    client_state = resumed.load_checkpoint(out / "checkpoints" / name)
    result["wrong"] += observe.drawn_by_rank()
    again = observe.train(resumed, working_copy(resumed, weights), first=5)
    result["wrong"] += again["wrong"] + ([] if client_state == {"row": name} else ["client_state is lost"])
    result["resumed"] = observe.final_state(resumed) | {"masks": observe.full_masks(resumed)}
    resumed.close()
    return result


def reload(folder: Path) -> dict[str, Tensor]:
    """The exported weights as the unsharded model has them after loading."""
    model = toy.build()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def overflow(row: dict[str, Any]) -> dict[str, Any]:
    """Steps 2 and 3 overflow on one rank only: they are not counted, nothing changes, masks hold."""
    scaler = ShardedGradScaler("cpu", init_scale=8.0) if row["kind"] == "fsdp1" else torch.amp.GradScaler("cpu", 8.0)
    engine = build(row, grad_scaler=scaler)
    applied, changed, wrong = [], [], []
    for step in range(6):
        before = observe.final_state(engine)["weights"]
        for micro in range(toy.ACCUMULATION):
            tokens, use_all = toy.batch(step, micro, dist.get_rank())
            loss = engine(tokens, use_all)
            if step in (2, 3) and micro == 1 and dist.get_rank() == 1:
                loss = loss * float("inf")
            engine.backward(loss)
            engine.step()
        after = observe.final_state(engine)["weights"]
        applied.append(engine.applied_steps)
        changed.append(any(not torch.equal(before[n], after[n]) for n in after))
        for name, mask in observe.full_masks(engine).items():
            if after[name][~mask].count_nonzero() or int(mask.sum()) != reference.KEEP:
                wrong.append(f"step {step}: {name}")
    return {"applied": applied, "changed": changed, "wrong": wrong, "scale": scaler.get_scale()}


def early(
    row: dict[str, Any], out: Path, build: Callable[..., GaPEngine] = build, weights: Weights = full_weights
) -> dict[str, Any]:
    """Saving before the first step, and going on from there in a new engine or back in this one, changes nothing."""
    first, second, plain = build(row), build(row), build(row)
    found: dict[str, Any] = {"wrong": []}
    first.save_checkpoint(out / "checkpoints" / row["name"])
    for name, engine in (("saved", first), ("resumed", second), ("back", first), ("plain", plain)):
        if name in ("resumed", "back"):
            engine.load_checkpoint(out / "checkpoints" / row["name"])
        found["wrong"] += observe.train(engine, working_copy(engine, weights), last=4)["wrong"]
        found[name] = observe.final_state(engine)
    return found


def torchtitan(out: Path) -> dict[str, Any]:
    """The code of docs/from-torchtitan.md, as it stands there, around a trainer like torchtitan's; trained through and
    resumed."""
    page = Path(__file__).parents[2] / "docs" / "from-torchtitan.md"
    code = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    sys.modules["torchtitan"] = ModuleType("torchtitan")
    sys.modules["torchtitan.trainer"] = torchtitan_like
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    names["GAP"] = toy.GAP

    def train(folder: Path) -> dict[str, Any]:
        trainer = names["SparseTrainer"](wrap({"kind": "fsdp2"}), folder, toy.STEPS, interval=4)
        trainer.train()
        exported = load_file(folder / "sparse-model" / "model.safetensors")
        return observe.final_state(trainer.engine) | {"exported": exported, "applied": trainer.engine.applied_steps}

    found = train(out / "torchtitan")
    saved = out / "torchtitan_resumed" / "checkpoint" / "step-8"
    if dist.get_rank() == 0:
        shutil.copytree(out / "torchtitan" / "checkpoint" / "step-8", saved)
    dist.barrier()
    return found | {"resumed": train(out / "torchtitan_resumed")}


def refused() -> dict[str, Any]:
    """The message of each combination that is refused."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def fsdp1_tensor_parallel() -> GaPEngine:
        """FSDP1 around tensor parallelism over all ranks."""
        model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))
        mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {f"{i}.0": ColwiseParallel() for i in range(4)})
        wrapped = FullyShardedDataParallel(
            model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
        )
        return GaPEngine(wrapped, toy.GAP, optimizer=sgd(wrapped))

    def alone() -> GaPEngine:
        """FSDP2 over a mesh of this rank alone."""
        model = toy.build()
        mesh = DeviceMesh.from_group(GROUPS[dist.get_rank()], "cpu", mesh_dim_names=("dp",))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return GaPEngine(fully_shard(model, mesh=mesh), toy.GAP, optimizer=sgd(model))

    def other_group() -> GaPEngine:
        model = wrap({"kind": "fsdp2"})
        return GaPEngine(model, toy.GAP, optimizer=sgd(model), group=GROUPS[dist.get_rank()])

    def ddp_of_fewer() -> GaPEngine:
        model = DistributedDataParallel(toy.build(), process_group=GROUPS[dist.get_rank()])
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def whole_with_global() -> GaPEngine:
        model = wrap({"kind": "fsdp2"})
        return GaPEngine(model, toy.GAP | {"distribution": "global"}, optimizer=sgd(model), whole=toy.build())

    def other_whole() -> GaPEngine:
        model = wrap({"kind": "fsdp2"})
        whole = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))
        return GaPEngine(model, toy.GAP, optimizer=sgd(model), whole=whole)

    def whole_with_masks() -> GaPEngine:
        model = wrap({"kind": "fsdp2"})
        gap = {"method": "static", "mask_init": "from_weights", "phase_steps": 1, "rounds": 0, "finetune_steps": 3}
        return GaPEngine(model, gap, optimizer=sgd(model), whole=toy.build())

    def partial_sums() -> GaPEngine:
        model = toy.build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        linear = model.layers[0].fc1
        linear.weight = nn.Parameter(DTensor.from_local(linear.weight.detach(), mesh, [Partial()]))
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def strided() -> GaPEngine:
        """A weight that says it is contiguous, and whose local tensor is the transpose of what lies in memory."""
        model = toy.build()
        mesh, linear = init_device_mesh("cpu", (dist.get_world_size(),)), model.layers[0].fc1
        whole = linear.weight.detach()
        strided = whole.T.contiguous().T
        cut = DTensor.from_local(
            strided, mesh, [Replicate()], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        linear.weight = nn.Parameter(cut)
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def overlapping() -> GaPEngine:
        """A weight of which one rank has rows and the other one columns, as no placement of torch cuts it."""
        model, rank = toy.build(), dist.get_rank()
        mesh, linear = init_device_mesh("cpu", (dist.get_world_size(),)), model.layers[0].fc1
        whole = linear.weight.detach()
        piece = whole.chunk(2, dim=rank)[rank].contiguous()
        cut = DTensor.from_local(piece, mesh, [Shard(rank)], run_check=False, shape=whole.shape, stride=whole.stride())
        linear.weight = nn.Parameter(cut)
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def mesh_out_of_order() -> GaPEngine:
        """On a mesh of ranks that do not ascend, the rank in a group of torch is not the place in the mesh."""
        model = fully_shard(toy.build(), mesh=DeviceMesh("cpu", torch.tensor([1, 0])))
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def uneven_otherwise() -> GaPEngine:
        """37 rows as 18 and 19, of which torch makes 19 and 18."""
        model, rank = toy.build(), dist.get_rank()
        mesh, linear = init_device_mesh("cpu", (dist.get_world_size(),)), model.layers[0].fc1
        whole = linear.weight.detach()
        piece = whole.tensor_split([18])[rank].contiguous()
        cut = DTensor.from_local(piece, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        linear.weight = nn.Parameter(cut)
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def uneven_runs() -> GaPEngine:
        """37 rows in two groups of 19 and 18, of each of which a rank has a part."""
        model, rank = toy.build(), dist.get_rank()
        mesh, linear = init_device_mesh("cpu", (dist.get_world_size(),)), model.layers[0].fc1
        whole, cut = linear.weight.detach(), _StridedShard(0, split_factor=2)
        piece = torch.cat([group.chunk(2)[rank] for group in whole.chunk(2)])
        held = DTensor.from_local(piece, mesh, [cut], run_check=False, shape=whole.shape, stride=whole.stride())
        linear.weight = nn.Parameter(held)
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def ignored_experts() -> GaPEngine:
        model = toy.build()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["layers.0.fc1.weight"])
        model = DistributedDataParallel(model)
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def flat_compiled() -> GaPEngine:
        model = torch.compile(wrap({"kind": "fsdp1", "flat": True}), backend="eager")
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def meta() -> GaPEngine:
        with torch.device("meta"):
            model = toy.Toy()
        for layer in model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def optimizer_too_early(kind: str) -> GaPEngine:
        model = toy.build()
        optimizer = sgd(model)
        model = (wrap_fsdp1 if kind == "fsdp1" else wrap_fsdp2)(model, {"flat": True})
        return GaPEngine(model, toy.GAP, optimizer=optimizer)

    def optimizer_after_evaluation() -> GaPEngine:
        model = wrap({"kind": "fsdp2"})
        evaluate(model)  # leaves whole parameters in the root, which are not the ones that are trained
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def root_not_wrapped() -> GaPEngine:
        model = toy.build()
        for layer in model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def ignored() -> GaPEngine:
        model = toy.build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, ignored_params={model.layers[0].fc1.weight})
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def checkpointing_outside() -> GaPEngine:
        model = wrap({"kind": "fsdp1", "checkpointing": "before"})
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def mixed_strategies() -> GaPEngine:
        model = toy.build()
        for i, layer in enumerate(model.layers):
            model.layers[i] = FullyShardedDataParallel(
                layer, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True
            )
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def sharding_optimizer() -> GaPEngine:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = DistributedDataParallel(toy.build())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.SGD, lr=0.1)
        return GaPEngine(model, toy.GAP, optimizer=optimizer)

    def no_optimizer() -> GaPEngine:
        return GaPEngine(wrap({"kind": "fsdp2"}), toy.GAP)

    cases: dict[str, Callable[[], GaPEngine]] = {
        "fsdp1_tensor_parallel": fsdp1_tensor_parallel,
        "mesh_of_fewer": alone,
        "ddp_of_fewer": ddp_of_fewer,
        "mesh_of_more": other_group,
        "whole_with_global": whole_with_global,
        "other_whole": other_whole,
        "whole_with_masks": whole_with_masks,
        "partial_sums": partial_sums,
        "strided": strided,
        "overlapping": overlapping,
        "mesh_out_of_order": mesh_out_of_order,
        "uneven_otherwise": uneven_otherwise,
        "uneven_runs": uneven_runs,
        "ignored_experts": ignored_experts,
        "flat_compiled": flat_compiled,
        "meta": meta,
        "optimizer_too_early_fsdp1": partial(optimizer_too_early, "fsdp1"),
        "optimizer_too_early_fsdp2": partial(optimizer_too_early, "fsdp2"),
        "optimizer_after_evaluation": optimizer_after_evaluation,
        "root_not_wrapped": root_not_wrapped,
        "ignored": ignored,
        "checkpointing_outside": checkpointing_outside,
        "mixed_strategies": mixed_strategies,
        "sharding_optimizer": sharding_optimizer,
        "no_optimizer": no_optimizer,
    }
    return {name: message(case) for name, case in cases.items()}


def message(case: Callable[[], GaPEngine]) -> str:
    """What the refusal says."""
    try:
        case()
    except ValueError as error:
        return str(error)
    return "not refused"


def work_through(out: Path, rows: list[dict[str, Any]], works: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """The references that the rows need, then the works one after the other; each result is handed over at once."""
    for optimizer, unit, clip in sorted({(row["optimizer"], by_unit(row), row.get("clip", 0.0)) for row in rows}):
        for unused in (True, False):
            groups = groups_by_unit if unit else toy.groups
            result = reference.train(optimizer, unused, groups, clip)
            observe.hand_over(out, f"reference_{optimizer}_{unit}_{clip}_{unused}", result)
    observe.work_through(out, works)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    GROUPS.update({rank: dist.new_group([rank]) for rank in range(dist.get_world_size())})
    rows = json.loads((out / "rows.json").read_text())
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "overflow": overflow,
        "early": lambda row: early(row, out),
        "refused": lambda row: refused(),
        "torchtitan": lambda row: torchtitan(out),
        "run": lambda row: run(row, out),
    }
    work_through(out, rows, {row["name"]: partial(kinds[row.get("what", "run")], row) for row in rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
