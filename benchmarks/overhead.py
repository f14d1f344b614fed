"""What a training step costs with the engine, relative to the same step without it.

    torchrun --nproc-per-node 2 benchmarks/overhead.py --preset small --backend zero2
    python benchmarks/overhead.py --preset small --backend plain

Two copies of a model take turns on the same batches in one process: A bare, B inside a GaPEngine, in the order A B B A,
so that whatever else the machine does falls on both alike. Reported are the medians and the median of the ratios of
neighbouring steps. No boundary falls into the timed steps: its cost is reported separately, as the engine measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "translation"))

import model as models

from gap_ds import GaPEngine, __version__

BACKENDS = ("plain", "ddp", "zero0", "zero1", "zero2", "zero3")
VOCABULARY = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(models.PRESETS), default="small")
    parser.add_argument("--backend", choices=BACKENDS, default="plain")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=2048, help="target tokens of a step of one rank")
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs of steps")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, help="JSON file to add the result to")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", category=FutureWarning)
    device = start(args.backend)
    bare = build(args, device, sparse=False)
    engine = build(args, device, sparse=True)
    batch = tokens(args, device)
    for _ in range(5):
        for step in (bare, engine):
            step(batch)
    seconds: dict[str, list[float]] = {"bare": [], "engine": []}
    for pair in range(args.pairs):
        turns = [("bare", bare), ("engine", engine)]
        for name, step in turns if pair % 2 == 0 else turns[::-1]:
            seconds[name].append(timed(step, batch, device))
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    result = summary(args, seconds)
    print(json.dumps(result, indent=1))
    if args.out:
        results = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps([*results, result], indent=1) + "\n")


def start(backend: str) -> torch.device:
    """Joins the launcher's processes, if there are any."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if backend.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed()
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def build(args: argparse.Namespace, device: torch.device, sparse: bool) -> Callable[[dict[str, Any]], None]:
    """One training step of a fresh model, bare or inside the engine."""
    torch.manual_seed(0)
    model = models.build_model(models.build_config(args.preset, vocab_size=VOCABULARY)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    # One phase that never ends: two of three partitions are sparse, as in most of a cyclic run.
    gap = {"sparsity": args.sparsity, "partitions": 3, "phase_steps": 10**9, "rounds": 1, "finetune_steps": 1}
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
        wrapped = DistributedDataParallel(model) if args.backend == "ddp" else model
        trained = GaPEngine(wrapped, gap, optimizer=optimizer) if sparse else Bare(wrapped, optimizer)
    autocast = args.dtype == "bf16" and not args.backend.startswith("zero")

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = trained(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            loss = models.loss(logits, batch["labels"], smoothing=0.1, denominator=args.tokens)
        trained.backward(loss)
        trained.step()

    return step


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


def timed(step: Callable[[dict[str, Any]], None], batch: dict[str, Any], device: torch.device) -> float:
    """Seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def summary(args: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures, and all that it takes to repeat them."""
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["engine"], strict=True)]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    launcher = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python"
    return {
        "ratio_of_medians": round(statistics.median(seconds["engine"]) / statistics.median(seconds["bare"]), 4),
        "median_of_ratios": round(statistics.median(ratios), 4),
        "bare_ms": round(1e3 * statistics.median(seconds["bare"]), 2),
        "engine_ms": round(1e3 * statistics.median(seconds["engine"]), 2),
        "quartiles_of_ratios": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        **{k: v for k, v in vars(args).items() if k != "out"},
        "command": f"{launcher} benchmarks/overhead.py "
        + " ".join(f"--{k} {v}" for k, v in vars(args).items() if k != "out"),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "gap_ds": __version__,
        "seed": 0,
    }


if __name__ == "__main__":
    main()
