"""Train ResNet-50 sparse on real pictures: budgets, zeros, and the time of a step with the engine.

    torchrun --nproc-per-node 2 benchmarks/vision.py --backend zero1 --data DATA/clothing_small_96

C-GaP with 4 partitions at 90 %, ERK over all convolutions and the classifier. Crosses every boundary and counts the
kept weights after each, and at the end in an export. For the first `--pairs` steps a copy of the model without the
engine takes turns with it on the same pictures. Adds a row to benchmarks/results/vision_resnet50.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import measure
import overhead
import torch
from torch import nn

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "vision"))

import classifier
import images
from common import runtime, sampling, sharding
from safetensors.torch import load_file

from gap_ds import GaPEngine

PARTITIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=overhead.BACKENDS, default="zero1")
    parser.add_argument("--data", help="folder with train.parquet, or a tree of classes; default: drawn pictures")
    parser.add_argument("--model", choices=list(classifier.PRESETS), default="resnet50")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a step of one rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.002, help="constant")
    parser.add_argument("--pairs", type=int, default=30, help="steps timed against a copy without the engine")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "vision_resnet50.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = runtime.start_processes(seed=0, threads=None, deepspeed=args.backend.startswith("zero"))

    source = images.load(args.data, "train")
    keys = sampling.Batches(
        len(source), args.batch * runtime.world_size(), world_size=runtime.world_size(), rank=runtime.rank()
    ).micro_batches(0)
    batches = images.Loader(source, images.Training(args.size), seed=0, workers=0, skip=False)(keys)
    bare, engine = (build(args, source.classes, device, sparse) for sparse in (False, True))

    seconds: dict[str, list[float]] = {"bare": [], "engine": []}
    losses: list[float] = []
    boundaries: list[float] = []
    for number in range(args.steps):
        batch = next(batches)
        works = {"engine": engine, "bare": bare} if number < args.pairs else {"engine": engine}
        phase = engine.phase
        for name, trained in list(works.items())[:: 1 if number % 2 else -1]:
            runtime.barrier()
            started = time.perf_counter()
            loss = step(args, trained, batch, device)
            seconds[name].append(time.perf_counter() - started)
            if name == "engine":
                losses.append(loss)
        if engine.phase is not phase:
            boundaries.append(engine.last_boundary_seconds)
            seconds["engine"][-1] -= engine.last_boundary_seconds
            check_masks(engine)
        if runtime.rank() == 0 and (number + 1) % 10 == 0:
            print(f"step {number + 1}/{args.steps}  {engine.phase}  loss {losses[-1]:.3f}", flush=True)
    check_export(engine)
    if runtime.rank() == 0:
        row = summary(args, engine, seconds, losses, boundaries)
        print(json.dumps(row, indent=1))
        rows = json.loads(args.out.read_text()) if args.out.exists() else []
        rows = [other for other in rows if other["backend"] != args.backend or other["model"] != args.model] + [row]
        measure.save_json(args.out, rows)
    runtime.end_processes()


def build(args: argparse.Namespace, classes: tuple[str, ...], device: torch.device, sparse: bool) -> Any:
    """Return what trains a fresh model, with or without the engine."""
    torch.manual_seed(0)
    model: nn.Module = classifier.build(args.model, classes)
    classifier.use_own_batch_norm(model, everywhere=False)
    phase = args.steps // (PARTITIONS + 2)
    gap = {
        **{"sparsity": 0.9, "partitions": PARTITIONS, "distribution": "erk"},
        **{"include": ["embedder.embedder", "classifier"]},
        **{"phase_steps": phase, "rounds": 1, "finetune_steps": args.steps - PARTITIONS * phase},
    }
    if not args.backend.startswith("zero"):
        model = sharding.wrap(model.to(device), "none" if args.backend == "plain" else args.backend, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.875, weight_decay=3.05e-5)
    if not args.backend.startswith("zero"):
        return GaPEngine(model, gap, optimizer=optimizer) if sparse else overhead.Bare(model, optimizer)
    import deepspeed

    config = json.loads((measure.ROOT / "configs" / "ds" / f"{args.backend}.json").read_text(encoding="utf-8"))
    config["bf16"]["enabled"] = args.dtype == "bf16"
    trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return GaPEngine(trained, gap) if sparse else trained


def step(args: argparse.Namespace, trained: Any, batch: dict[str, Any], device: torch.device) -> float:
    """Take one training step and return the loss in nats."""
    mean, deviation = torch.tensor([0.5] * 3, device=device), torch.tensor([0.25] * 3, device=device)
    pixels = images.normalise(batch["pictures"].to(device), mean, deviation)
    autocast = args.dtype == "bf16" and not args.backend.startswith("zero")
    is_bf16 = args.dtype == "bf16" and not autocast
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = trained(pixel_values=pixels.bfloat16() if is_bf16 else pixels).logits
    loss = nn.functional.cross_entropy(logits.float(), batch["labels"].to(device), label_smoothing=0.1)
    trained.backward(loss)
    trained.step()
    return float(loss.detach())


def check_masks(engine: GaPEngine) -> None:
    """Assert that every entry outside the dense partition has exactly its budget."""
    plan, stats = engine.plan, engine.stats()["entries"]
    for entry in plan.entries:
        wanted = entry.numel if entry.partition in engine.phase.dense else entry.keep
        assert stats[entry.name]["kept"] == wanted, (entry, stats[entry.name])


def check_export(engine: GaPEngine) -> None:
    """Assert that no exported entry has more nonzero weights than its budget."""
    with tempfile.TemporaryDirectory() as folder:
        engine.export(Path(folder) / str(runtime.rank()))
        if runtime.rank() == 0:
            weights = load_file(Path(folder) / "0" / "model.safetensors")
            for entry in engine.plan.entries:
                assert int(weights[entry.name].count_nonzero()) <= entry.keep, entry


def summary(
    args: argparse.Namespace,
    engine: GaPEngine,
    seconds: dict[str, list[float]],
    losses: list[float],
    boundaries: list[float],
) -> dict[str, Any]:
    """Return the figures, with everything needed to repeat them."""
    timed = {name: times[2 : args.pairs] for name, times in seconds.items()}  # the first two warm up
    figures = measure.compared(timed, "bare")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "data")}
    words = " ".join(f"--{k} {v}" for k, v in settings.items())
    if args.data:
        settings["data"] = Path(args.data).name
        words += f" --data DATA/{settings['data']}"
    keep, numel = engine.plan.keep, engine.plan.numel
    return {
        **settings,
        "ranks": runtime.world_size(),
        "bare_ms": figures["bare"]["ms"],
        "engine_ms": figures["engine"]["ms"],
        "median_of_ratios": figures["engine"]["ratio"],
        "quartiles_of_ratios": figures["engine"]["quartiles"],
        "boundary_ms": [round(1e3 * s, 1) for s in boundaries],
        "boundaries": len(boundaries),
        "entries": len(engine.plan.entries),
        "kept": keep,
        "weights_in_entries": numel,
        "parameters": engine.plan.total,
        "loss_first_and_last_20": [round(statistics.mean(part), 3) for part in (losses[:20], losses[-20:])],
        "signature": engine.signature,
        "command": f"torchrun --nproc-per-node {runtime.world_size()} benchmarks/vision.py {words}",
        "machine": measure.machine(),
    }


if __name__ == "__main__":
    main()
