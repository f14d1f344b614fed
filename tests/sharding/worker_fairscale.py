"""All fairscale rows, one after the other in one group of processes.

fairscale's FullyShardedDataParallel names CUDA streams. Without a GPU its module gets torch.cpu's instead.
"""

from __future__ import annotations

import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fairscale.nn.data_parallel.fully_sharded_data_parallel as fairscale_fsdp
import torch
import torch.distributed as dist
import toy
import worker_fsdp
from fairscale.nn.data_parallel import FullyShardedDataParallel, ShardedDataParallel
from fairscale.optim import OSS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine
from gap_ds.method.plan import clean_name

warnings.filterwarnings("ignore")


def without_cuda() -> None:
    """torch.cpu's streams in place of CUDA's, in fairscale's module alone."""
    cuda = types.SimpleNamespace(
        Stream=torch.cpu.Stream,
        stream=torch.cpu.stream,
        current_stream=torch.cpu.current_stream,
        is_available=lambda: True,
        synchronize=lambda *_: None,
    )

    class Torch(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return cuda if name == "cuda" else getattr(torch, name)

    fairscale_fsdp.torch = Torch("torch")
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign, assignment]


def build(row: dict[str, Any], **training: Any) -> GaPEngine:
    training = {"gradient_accumulation_steps": toy.ACCUMULATION, "gradient_clipping": row.get("clip", 0.0), **training}
    model, gap = toy.build(), row.get("gap", toy.GAP)
    if row["kind"] == "oss":
        model = model.bfloat16() if row.get("bf16") else model
        kind, rest = {
            "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
            "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
        }[row["optimizer"]]
        optimizer = OSS(toy.groups(model), optim=kind, **rest)
        wrapped: nn.Module = ShardedDataParallel(model, optimizer, reduce_buffer_size=row.get("buffer", 2**23))
        return GaPEngine(wrapped, gap, optimizer=optimizer, **training)
    wrapped = wrap(model, row)
    if row.get("evaluate"):
        worker_fsdp.evaluate(wrapped)
    groups = worker_fsdp.groups_by_unit if row.get("flat") else worker_fsdp.groups_by_name
    return GaPEngine(wrapped, gap, optimizer=toy.OPTIMIZERS[row["optimizer"]](groups(wrapped)), **training)


def wrap(model: nn.Module, row: dict[str, Any]) -> nn.Module:
    arguments: dict[str, Any] = {
        "flatten_parameters": bool(row.get("flat")),
        "compute_device": torch.device("cpu"),
        "bucket_cap_mb": 0,
        "mixed_precision": bool(row.get("bf16")),
        "compute_dtype": torch.bfloat16 if row.get("bf16") else None,
    }
    for i, layer in enumerate(model.layers):
        model.layers[i] = FullyShardedDataParallel(layer, **arguments)
    if row.get("flat"):
        model.frozen = FullyShardedDataParallel(model.frozen, **arguments)
    return FullyShardedDataParallel(model, **arguments)


def full_weights(engine: GaPEngine) -> dict[str, Tensor]:
    """All whole parameters, by the library's own means."""
    root = engine.run.backend.forward
    if isinstance(root, ShardedDataParallel):
        return {name: p.detach().clone() for name, p in root.module.named_parameters()}
    with root.summon_full_params(volatile=True):
        return {clean_name(name): p.detach().clone() for name, p in nn.Module.named_parameters(root)}


def refused() -> dict[str, Any]:
    """The message of each combination that is refused."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def root_not_wrapped() -> GaPEngine:
        model = toy.build()
        model.layers[0] = FullyShardedDataParallel(model.layers[0], compute_device=torch.device("cpu"))
        return GaPEngine(model, toy.GAP, optimizer=sgd(model))

    def compiled() -> GaPEngine:
        model = wrap(toy.build(), {"flat": True})
        return GaPEngine(torch.compile(model, backend="eager"), toy.GAP, optimizer=sgd(model))

    def another_optimizer() -> GaPEngine:
        model = toy.build()
        wrapped = ShardedDataParallel(model, OSS(toy.groups(model), optim=torch.optim.SGD, lr=0.1))
        return GaPEngine(wrapped, toy.GAP, optimizer=sgd(model))

    def oss_with_ddp() -> GaPEngine:
        model = toy.build()
        optimizer = OSS(toy.groups(model), optim=torch.optim.SGD, lr=0.1)
        return GaPEngine(DistributedDataParallel(model), toy.GAP, optimizer=optimizer)

    def optimizer_too_early() -> GaPEngine:
        model = toy.build()
        optimizer = sgd(model)
        return GaPEngine(wrap(model, {"flat": True}), toy.GAP, optimizer=optimizer)

    def two_groups() -> GaPEngine:
        model = toy.build()
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        for i, layer in enumerate(model.layers):
            model.layers[i] = FullyShardedDataParallel(layer, process_group=alone, compute_device=torch.device("cpu"))
        root = FullyShardedDataParallel(model, flatten_parameters=False, compute_device=torch.device("cpu"))
        return GaPEngine(root, toy.GAP, optimizer=sgd(root))

    cases: dict[str, Callable[[], GaPEngine]] = {
        "root_not_wrapped": root_not_wrapped,
        "compiled": compiled,
        "another_optimizer": another_optimizer,
        "oss_with_ddp": oss_with_ddp,
        "optimizer_too_early": optimizer_too_early,
        "two_groups": two_groups,
    }
    return {name: worker_fsdp.message(case) for name, case in cases.items()}


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    without_cuda()
    rows = json.loads((out / "rows.json").read_text())
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "early": lambda row: worker_fsdp.early(row, out, build, full_weights),
        "refused": lambda row: refused(),
        "run": lambda row: worker_fsdp.run(row, out, build, full_weights),
    }
    works = {row["name"]: partial(kinds[row.get("what", "run")], row) for row in rows}
    worker_fsdp.work_through(out, rows, works)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
