"""A training step and an update of the masks, by this library and by what a user would otherwise do, in turns.

    OMP_NUM_THREADS=1 python benchmarks/peers.py

    bare              AdamW alone: the yardstick
    gap_ds            GaPEngine, packed masks after the step
    prune             torch.nn.utils.prune: a mask multiplied in every forward pass
    asp               as apex's ASP: boolean masks on gradients before, on weights after the optimizer's step
    rigl              float masks after the step; an update sorts whole tensors (on every rank, if there are several)

The peers are short equivalents in stock PyTorch, not the packages themselves, on the same entries.
Extra bytes are those of the tensors that masks take beyond the bare run. An update prunes by magnitude (`prune`, `asp`,
`gap_ds`) or exchanges weights by magnitude and gradient (`rigl`, and gap_ds with its method). `--quick` is for tests.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import model as models
import overhead

from gap_ds import GaPEngine, methods

NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(models.PRESETS), default="small")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.tokens, args.rounds = "tiny", 64, 2
    measure.write("peers", rows(args), args.out, f"ratio of steps: to the bare step in the same round; {args.preset}")


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = measure.device()
    batch = overhead.tokens(args, device)
    peers = {kind.__name__: kind(args, device) for kind in (bare, gap_ds, torch_prune, asp, rigl)}
    seconds = measure.in_turns(
        {name: (lambda step=step: step(batch)) for name, (step, _) in peers.items()}, args.rounds
    )
    found = measure.compared(seconds, "bare")
    changed = updates(args, device, batch)
    return [
        {"step by": name, **found[name], "extra bytes per entry weight": round(peers[name][1], 3)}
        | {"update of the masks, ms": changed.pop(name, None)}
        for name in peers
    ] + [{"step by": name, "update of the masks, ms": ms} for name, ms in changed.items()]


def build(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = models.build_model(models.build_config(args.preset, vocab_size=overhead.VOCABULARY)).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def entries(model: nn.Module) -> list[nn.Linear]:
    """The matrices inside the layers: what the library takes as entries."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in found if "layers" in name.split(".")]


def training_step(
    args: argparse.Namespace, model: Any, backward: Callable[[Tensor], Any], step: Callable[[], Any]
) -> Callable[[dict[str, Any]], None]:
    def run(batch: dict[str, Any]) -> None:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        backward(models.loss(logits, batch["labels"], smoothing=0.1, denominator=args.tokens))
        step()

    return run


def _loop(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


Peer = tuple[Callable[[dict[str, Any]], None], float]


def bare(args: argparse.Namespace, device: torch.device) -> Peer:
    model, optimizer = build(args, device)
    return training_step(args, model, Tensor.backward, _loop(optimizer)), 0.0


def engine(args: argparse.Namespace, device: torch.device, **config: Any) -> GaPEngine:
    model, optimizer = build(args, device)
    return GaPEngine(model, {"sparsity": args.sparsity, "finetune_steps": 1, **config}, optimizer=optimizer)


def gap_ds(args: argparse.Namespace, device: torch.device) -> Peer:
    """All entries sparse, as with every peer."""
    trained = engine(args, device, method="static", rounds=1, partitions=1, phase_steps=NEVER)
    size = trained.stats()["mask_bytes"] / trained.plan.numel
    return training_step(args, trained, trained.backward, trained.step), size


def torch_prune(args: argparse.Namespace, device: torch.device) -> Peer:
    model, optimizer = build(args, device)
    for module in entries(model):
        prune.l1_unstructured(module, "weight", args.sparsity)
    # A float mask, and the product that each forward pass makes.
    return training_step(args, model, Tensor.backward, _loop(optimizer)), 4.0 + 4.0


def asp(args: argparse.Namespace, device: torch.device) -> Peer:
    model, optimizer = build(args, device)
    masked = [(module.weight, kept_largest(module.weight.detach(), args.sparsity)) for module in entries(model)]
    stock = optimizer.step

    def step() -> None:
        for weight, kept in masked:
            weight.grad.mul_(kept)
        stock()
        with torch.no_grad():
            for weight, kept in masked:
                weight.mul_(kept)
        optimizer.zero_grad(set_to_none=True)

    return training_step(args, model, Tensor.backward, step), 1.0


def rigl(args: argparse.Namespace, device: torch.device) -> Peer:
    model, optimizer = build(args, device)
    masked = [(m.weight, kept_largest(m.weight.detach(), args.sparsity).float()) for m in entries(model)]

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            for weight, kept in masked:
                weight.mul_(kept)
        optimizer.zero_grad(set_to_none=True)

    return training_step(args, model, Tensor.backward, step), 4.0


def kept_largest(weight: Tensor, sparsity: float) -> Tensor:
    keep = round((1 - sparsity) * weight.numel())
    kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[weight.abs().view(-1).topk(keep).indices] = True
    return kept.view(weight.shape)


def updates(args: argparse.Namespace, device: torch.device, batch: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of one update of all entries' masks, on fresh weights; medians of turns."""
    model, _ = build(args, device)
    weights = [module.weight.detach() for module in entries(model)]
    gradients = [torch.randn_like(weight) for weight in weights]
    masks = [kept_largest(weight, args.sparsity) for weight in weights]
    largest = engine(args, device, method="static", rounds=1, partitions=1, phase_steps=NEVER)
    pruned = {entry: methods.Largest(entry.keep) for entry in largest.plan.entries}
    works = {
        "gap_ds": lambda: largest.masking.select(pruned, 0),
        "asp": lambda: [kept_largest(weight, args.sparsity) for weight in weights],
        "rigl": lambda: [exchange(*triple) for triple in zip(weights, gradients, masks, strict=True)],
    }
    found = {name: row["ms"] for name, row in measure.compared(measure.in_turns(works, 5), "gap_ds").items()}
    exchanging = engine(args, device, method="rigl", phase_steps=100, update_steps=1)
    step = training_step(args, exchanging, exchanging.backward, exchanging.step)
    seconds = []
    for _ in range(4):
        step(batch)
        seconds.append(exchanging.last_boundary_seconds)
    return found | {"gap_ds, method rigl": round(1e3 * statistics.median(seconds[1:]), 3)}


def exchange(weight: Tensor, gradient: Tensor, kept: Tensor, fraction: float = 0.3) -> Tensor:
    """RigL's update by two sorts of whole tensors."""
    flat, mask = weight.view(-1), kept.view(-1)
    dropped = int(fraction * int(mask.sum()))
    order = torch.sort(torch.where(mask, flat.abs(), torch.inf)).indices[:dropped]
    after = mask.clone()
    after[order] = False
    grown = torch.sort(torch.where(mask, -1.0, gradient.view(-1).abs()), descending=True).indices[:dropped]
    after[grown] = True
    return after.view(weight.shape)


if __name__ == "__main__":
    main()
