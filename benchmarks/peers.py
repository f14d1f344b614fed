"""Time of a training step and of a mask update, in this library and in common alternatives, in turns.

    OMP_NUM_THREADS=1 python benchmarks/peers.py

    bare              AdamW alone: the reference
    bare again        the same again: the distance of its ratio from 1 is noise
    gap_ds            GaPEngine, packed masks after the step
    torch_prune       torch.nn.utils.prune: a mask multiplied in every forward pass
    asp               like apex's ASP: boolean masks on gradients before, on weights after the optimizer's step
    rigl              boolean masks after the step; an update sorts whole tensors, on every rank

The peers are short equivalents in stock PyTorch, not the packages themselves, on the same entries and the example's
model. `cpu_ratio` is that of CPU time, which other processes disturb less. Extra bytes are tensors beyond the bare run,
counted by PyTorch's allocator: masks, and the rise of a step's peak. An update prunes by magnitude (torch_prune, asp,
gap_ds) or exchanges weights by magnitude and gradient (rigl, gap_ds with method rigl), and ends with new masks.
`--quick` is for tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))

import model as models
import overhead

from gap_ds import GaPEngine
from gap_ds.method import rules

NEVER = 10**9
#: Fraction of the kept weights that an update of RigL exchanges.
FRACTION = 0.3


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", choices=list(models.PRESETS), default="small")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.tokens, args.rounds = "tiny", 64, 2
    found = rows(args)
    low, high = next(row["interval"] for row in found if row["step by"] == "bare again")
    within = [row["step by"] for row in found if "ratio" in row and low <= row["ratio"] <= high]
    note = "ratio of steps: to the bare step in the same round; interval: of that median, at 95 %; "
    note += f"{args.preset}, {args.tokens} tokens, fp32, 1 rank; equal to the bare step within noise: "
    note += ", ".join(within)
    measure.write("peers", found, args.out, note)


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = measure.device()
    batch = overhead.tokens(args, device)
    steps: dict[str, Step] = {}
    bytes_of: dict[str, int] = {}
    for kind in (bare, gap_ds, torch_prune, asp, rigl):
        bytes_of[kind.__name__] = tensors(steps, kind, args, device, batch)
    steps = {"bare": steps.pop("bare"), "bare again": bare(args, device), **steps}
    both = measure.in_turns(
        {name: (lambda step=step: step(batch)) for name, step in steps.items()}, args.rounds, timer=measure.both_seconds
    )
    wall = {name: [seconds for seconds, _ in times] for name, times in both.items()}
    cpu = measure.compared({name: [seconds for _, seconds in times] for name, times in both.items()}, "bare")
    changed = updates(args, device, batch)
    weights = sum(module.weight.numel() for module in entries(build(args, device)[0]))
    found = []
    for name, figures in measure.compared(wall, "bare").items():
        row = {"step by": name, **figures, "cpu_ratio": cpu[name]["ratio"] if device.type == "cpu" else None}
        if name in bytes_of:
            row |= {"extra bytes per entry weight": round((bytes_of[name] - bytes_of["bare"]) / weights, 3)}
        found.append(row | {"update of the masks, ms": changed.pop(name, None)})
    return found + [{"step by": name, "update of the masks, ms": ms} for name, ms in changed.items()]


def tensors(
    steps: dict[str, Step],
    kind: Callable[[argparse.Namespace, torch.device], Step],
    args: argparse.Namespace,
    device: torch.device,
    batch: dict[str, Any],
) -> int:
    """Build a peer into `steps`. Returns the peak bytes of its tensors, model included, in its second step."""

    def start() -> None:
        steps[kind.__name__] = step = kind(args, device)
        step(batch)  # the optimizer has made its state

    held, _ = measure.tensor_bytes(start)
    _, peak = measure.tensor_bytes(lambda: steps[kind.__name__](batch))
    return held + peak


def build(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = models.build_model(models.build_config(args.preset, vocab_size=overhead.VOCABULARY)).to(device)
    models.choose_attention(model, device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def entries(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers inside the blocks, the entries of the library."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in found if "layers" in name.split(".")]


Step = Callable[[dict[str, Any]], None]


def training_step(
    args: argparse.Namespace, model: Any, backward: Callable[[Tensor], Any], step: Callable[[], Any]
) -> Step:
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


def bare(args: argparse.Namespace, device: torch.device) -> Step:
    model, optimizer = build(args, device)
    return training_step(args, model, Tensor.backward, _loop(optimizer))


def engine(args: argparse.Namespace, device: torch.device, **config: Any) -> GaPEngine:
    model, optimizer = build(args, device)
    return GaPEngine(model, {"sparsity": args.sparsity, "finetune_steps": 1, **config}, optimizer=optimizer)


def gap_ds(args: argparse.Namespace, device: torch.device) -> Step:
    """All entries sparse, as for every peer."""
    trained = engine(args, device, method="static", rounds=1, partitions=1, phase_steps=NEVER)
    return training_step(args, trained, trained.backward, trained.step)


def torch_prune(args: argparse.Namespace, device: torch.device) -> Step:
    model, optimizer = build(args, device)
    for module in entries(model):
        prune.l1_unstructured(module, "weight", args.sparsity)
    # A buffer for the float mask, and a product in each forward pass.
    return training_step(args, model, Tensor.backward, _loop(optimizer))


def asp(args: argparse.Namespace, device: torch.device) -> Step:
    return masked(args, device, gradients=True)


def rigl(args: argparse.Namespace, device: torch.device) -> Step:
    return masked(args, device, gradients=False)


def masked(args: argparse.Namespace, device: torch.device, gradients: bool) -> Step:
    """Boolean masks on the weights after every step, and on the gradients before it if `gradients`."""
    model, optimizer = build(args, device)
    masks = [(module.weight, kept_largest(module.weight.detach(), args.sparsity)) for module in entries(model)]

    @torch.no_grad()
    def step() -> None:
        if gradients:
            for weight, kept in masks:
                weight.grad.mul_(kept)
        optimizer.step()
        for weight, kept in masks:
            weight.mul_(kept)
        optimizer.zero_grad(set_to_none=True)

    return training_step(args, model, Tensor.backward, step)


def kept_largest(weight: Tensor, sparsity: float) -> Tensor:
    keep = round((1 - sparsity) * weight.numel())
    kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[weight.abs().view(-1).topk(keep).indices] = True
    return kept.view(weight.shape)


def updates(args: argparse.Namespace, device: torch.device, batch: dict[str, Any]) -> dict[str, float]:
    """Return milliseconds of one update of all masks, after one training step: medians, in turns."""
    model, optimizer = build(args, device)
    training_step(args, model, Tensor.backward, optimizer.step)(batch)
    weights = [module.weight.detach() for module in entries(model)]
    gradients = [module.weight.grad for module in entries(model)]
    masks = [kept_largest(weight, args.sparsity) for weight in weights]
    largest = engine(args, device, method="static", rounds=1, partitions=1, phase_steps=NEVER)
    pruned = {entry: rules.PruneByMagnitude(entry.keep) for entry in largest.plan.entries}
    moving = engine(args, device, method="rigl", phase_steps=NEVER, update_steps=NEVER // 10)
    # `engine.step` would discard the gradients.
    training_step(args, moving, moving.backward, lambda: moving.mask_state.copy_gradients(moving.optimizer))(batch)
    moved = {e: rules.DropAndGrow(e.keep, int(FRACTION * e.keep), by_gradient=True) for e in moving.plan.entries}
    works = {
        "gap_ds": lambda: largest.mask_state.select(pruned, 0),
        "asp": lambda: [kept_largest(weight, args.sparsity) for weight in weights],
        "rigl": lambda: [exchange(*triple) for triple in zip(weights, gradients, masks, strict=True)],
        "gap_ds, method rigl": lambda: moving.mask_state.select(moved, 1),
    }
    times = measure.in_turns(works, max(2, args.rounds // 4))
    return {name: row["ms"] for name, row in measure.compared(times, "gap_ds").items()}


def exchange(weight: Tensor, gradient: Tensor, kept: Tensor, fraction: float = FRACTION) -> Tensor:
    """Update a mask like RigL, by two sorts of the whole tensor."""
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
