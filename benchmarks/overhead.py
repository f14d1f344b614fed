"""What a training step costs with the engine, relative to the same step without it.

    torchrun --nproc-per-node 2 benchmarks/overhead.py --preset small --backend zero2
    python benchmarks/overhead.py --preset base --backend plain

Two copies of a model take turns on the same batches in one process: A bare, B inside a GaPEngine, in the order A B B A,
so that whatever else the machine does falls on both alike. Reported are the medians and the median of the ratios of
neighbouring steps. No boundary falls into the timed steps: its cost is reported separately (boundary.py, and
`last_boundary_seconds` in a run). fairscale names CUDA streams: without a GPU the tests' stand-in for them is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import model as models
from common import sharding

from gap_ds import GaPEngine

BACKENDS = ("plain", "ddp", "fsdp1", "fsdp2", "fairscale", "zero0", "zero1", "zero2", "zero3")
VOCABULARY = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(models.PRESETS), default="small")
    parser.add_argument("--backend", choices=BACKENDS, default="plain")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=2048, help="target tokens of a step of one rank")
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs of steps")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--quick", action="store_true", help="a size for tests")
    parser.add_argument("--out", type=Path, help="JSON file to add the result to")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.tokens, args.pairs = "tiny", 64, 3

    warnings.filterwarnings("ignore", category=FutureWarning)
    device = start(args.backend)
    steps = {name: build(args, device, sparse=name == "engine")[0] for name in ("bare", "engine")}
    batch = tokens(args, device)
    works = {name: (lambda step=step: step(batch)) for name, step in steps.items()}
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    measure.in_turns(works, min(4, args.pairs), barrier)
    seconds = measure.in_turns(works, args.pairs, barrier)
    if not dist.is_initialized() or dist.get_rank() == 0:
        result = summary(args, seconds)
        print(json.dumps(result, indent=1))
        if args.out:
            results = json.loads(args.out.read_text()) if args.out.exists() else []
            args.out.write_text(json.dumps([*results, result], indent=1) + "\n")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def start(backend: str) -> torch.device:
    """Joins the launcher's processes, if there are any."""
    device = measure.device()
    if backend.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed()
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def build(
    args: argparse.Namespace, device: torch.device, sparse: bool, phase_steps: int = 10**9
) -> tuple[Callable[[dict[str, Any]], None], Any]:
    """One training step of a fresh model, bare or inside the engine; and what trains it."""
    torch.manual_seed(0)
    model = models.build_model(models.build_config(args.preset, vocab_size=VOCABULARY)).to(device)
    if not args.backend.startswith("zero"):
        model = wrap(model, args.backend, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    # By default one phase that never ends: two of three partitions are sparse, as in most of a cyclic run.
    gap = {"sparsity": args.sparsity, "partitions": 3, "phase_steps": phase_steps, "rounds": 1, "finetune_steps": 1}
    trained: Any = model
    if args.backend.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(args.backend[-1])},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if args.dtype == "bf16":
            config |= {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
        trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if sparse:
            trained = GaPEngine(trained, gap)
    else:
        trained = GaPEngine(model, gap, optimizer=optimizer) if sparse else Bare(model, optimizer)
    autocast = args.dtype == "bf16" and not args.backend.startswith("zero")

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = trained(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            loss = models.loss(logits, batch["labels"], smoothing=0.1, denominator=args.tokens)
        trained.backward(loss)
        trained.step()

    return step, trained


def wrap(model: nn.Module, backend: str, device: torch.device) -> nn.Module:
    """The model as the examples shard it; fairscale on a CPU as the tests do."""
    if backend != "fairscale" or device.type == "cuda":
        return sharding.wrap(model, "none" if backend == "plain" else backend, device)
    sys.path.insert(0, str(measure.ROOT / "tests" / "sharding"))
    import worker_fairscale

    worker_fairscale.without_cuda()
    for stack in (model.model.encoder.layers, model.model.decoder.layers):
        for i, layer in enumerate(stack):
            stack[i] = worker_fairscale.FullyShardedDataParallel(layer, compute_device=device, bucket_cap_mb=0)
    return worker_fairscale.FullyShardedDataParallel(model, compute_device=device, bucket_cap_mb=0)


class Bare:
    """The loop that a user writes without the engine."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def tokens(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A batch of 16-token sentences (B, 16)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens // 16, 16)
    ids = [torch.randint(4, VOCABULARY, shape, generator=generator).to(device) for _ in range(3)]
    return {"input_ids": ids[0], "decoder_input_ids": ids[1], "labels": ids[2]}


def summary(args: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures, and all that it takes to repeat them."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    launcher = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python"
    figures = measure.compared(seconds, "bare")
    engine, bare = figures["engine"], figures["bare"]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick")}
    return {
        "ratio_of_medians": round(statistics.median(seconds["engine"]) / statistics.median(seconds["bare"]), 4),
        "median_of_ratios": engine["ratio"],
        "bare_ms": bare["ms"],
        "engine_ms": engine["ms"],
        "quartiles_of_ratios": engine["quartiles"],
        **settings,
        "command": f"{launcher} benchmarks/overhead.py " + " ".join(f"--{k} {v}" for k, v in settings.items()),
        "ranks": ranks,
        "machine": measure.machine(),
        "seed": 0,
    }


if __name__ == "__main__":
    main()
