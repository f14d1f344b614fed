"""Every method over the backends: rows trained one after the other, watched after every step.

With one process (WORLD_SIZE=1) there is no process group at all: these are the rows without any wrapper.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import observe
import reference
import reference_methods
import torch
import torch.distributed as dist
import toy
import worker_fairscale
import worker_fsdp
import worker_zero
from reference_methods import SCENARIOS, Scenario
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine

warnings.filterwarnings("ignore")


class Alone:
    """What the watchers ask of `torch.distributed`, in a process that has no group."""

    get_rank, get_world_size = staticmethod(lambda: 0), staticmethod(lambda: 1)

    @staticmethod
    def all_reduce(tensor: Tensor, group: Any = None) -> None:
        """The sum over one process."""

    @staticmethod
    def all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        found[0] = own

    @staticmethod
    def barrier() -> None:
        """Nobody to wait for."""


def build(row: dict[str, Any]) -> tuple[GaPEngine, dict[str, Any]]:
    """The engine of a row, and how its library shows a whole parameter."""
    if row.get("kind") in ("plain", "ddp"):
        model = toy.build().to(torch.bfloat16 if row["dtype"] == "bf16" else torch.float32)
        optimizer = toy.OPTIMIZERS[row["optimizer"]](toy.groups(model))
        wrapped = model if row["kind"] == "plain" else DistributedDataParallel(model, find_unused_parameters=True)
        engine = GaPEngine(wrapped, row["gap"], optimizer=optimizer, gradient_accumulation_steps=toy.ACCUMULATION)
        return engine, {"working_copy": dict(model.named_parameters()).__getitem__, "full_fp32": None}
    if "stage" in row:
        engine = worker_zero.build(row)
        return engine, worker_zero.observers(engine, row)
    if row["kind"] in ("fsdp1", "fsdp2"):
        engine = worker_fsdp.build(row)
        weights = worker_fsdp.full_weights
    else:
        worker_fairscale.without_cuda()  # changes torch for good: such rows come last
        engine = worker_fairscale.build(row)
        weights = worker_fairscale.full_weights
    return engine, {"working_copy": worker_fsdp.working_copy(engine, weights), "full_fp32": None}


class Last:
    """Weights and gradients as the last optimizer step has left and taken them, piece by piece."""

    def __init__(self, engine: GaPEngine) -> None:
        self.shards, self.weights, self.gradients = engine.mask_state.shards, dict[str, Tensor](), dict[str, Tensor]()
        # Runs after the engine's own hook: pruned weights are 0 already.
        self.handle = engine.optimizer.register_step_post_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        owners = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, shard in self.shards.items():
            if not shard.numel or id(owner := shard.owner()) in owners:
                self.weights[name] = weight = shard.weight().clone()
                gradient = owner.grad if shard.numel else None
                self.gradients[name] = torch.zeros_like(weight) if gradient is None else shard.of(gradient).clone()

    def whole(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        found = observe.gather([(shard, pieces[name]) for name, shard in self.shards.items()])
        return dict(zip(self.shards, found, strict=True))


def train(
    engine: GaPEngine, seen: dict[str, Any], scenario: Scenario, skip: bool, first: int = 0, at_saved: Any = None
) -> dict[str, Any]:
    """Trains on from step `first`; `wrong` lists every violated invariant."""
    last, wrong, losses = Last(engine), list[str](), []
    masks = observe.full_masks(engine)
    history = {first: masks} if first in scenario.events else {}
    for step in range(first, scenario.steps):
        bits = {name: b.clone() for name, b in engine.mask_state.bits.items()}
        for micro in range(toy.ACCUMULATION):
            loss = engine(*toy.batch(step, micro, dist.get_rank(), skip))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        now = f"after {step + 1} steps"
        if engine.applied_steps != step + 1:
            wrong.append(f"{now}: {engine.applied_steps} applied steps")
        if step + 1 in scenario.events:
            weights, gradients = last.whole(last.weights), last.whole(last.gradients)
            new = masks | reference_methods.changed(scenario, step + 1, masks, weights, gradients)
            wanted = {name: mask for name, mask in new.items() if mask is not None}
            masks = history[step + 1] = observe.full_masks(engine)
            different = [n for n in masks.keys() & wanted.keys() if not torch.equal(masks[n], wanted[n])]
            if different or masks.keys() != wanted.keys():
                wrong.append(f"{now}: masks {different} of {sorted(masks)}, wanted are {sorted(wanted)}")
        elif bits.keys() != engine.mask_state.bits.keys() or any(
            not torch.equal(b, bits[n]) for n, b in engine.mask_state.bits.items()
        ):
            wrong.append(f"{now}: masks have changed")
        for name, shard in engine.mask_state.shards.items():
            if (mask := engine.mask(name)) is not None and shard.weight()[~mask].count_nonzero():
                wrong.append(f"{now}: {name} has pruned weights that are not 0")
        for what, weight in seen.items():
            if weight is not None:
                broken = [name for name, mask in masks.items() if weight(name)[~mask].count_nonzero()]
                wrong += [f"{now}: {what} of {name} has pruned weights that are not 0" for name in broken]
        if step + 1 == scenario.saved and at_saved:
            at_saved()
    last.handle.remove()
    return {"wrong": wrong, "losses": losses, "masks": history, "final": masks}


def run(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """A whole run, saved and exported on its way, and a second engine that goes on from there."""
    scenario, name, skip = SCENARIOS[row["scenario"]], row["name"], row["reference_arguments"]["skip"]
    engine, seen = build(row)

    def save_and_export() -> None:
        engine.save_checkpoint(out / "checkpoints" / name)
        engine.export(out / "mid" / name)

    result = train(engine, seen, scenario, skip, at_saved=save_and_export) | observe.final_state(engine)
    result |= {"plan": engine.plan, "kept": engine.stats()["kept"], "backend": engine.run.backend.name}
    engine.export(out / "final" / name)
    engine.close()

    resumed, seen = build(row)
    resumed.load_checkpoint(out / "checkpoints" / name)
    again = train(resumed, seen, scenario, skip, first=scenario.saved)
    result["wrong"] += [f"resumed: {mistake}" for mistake in again["wrong"]]
    result["resumed"] = again | observe.final_state(resumed)
    resumed.close()
    return result


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        deepspeed.init_distributed()
    else:
        for watcher in (observe, reference, reference_methods, sys.modules[__name__]):
            watcher.dist = Alone
    rows = [row for row in json.loads((out / "rows.json").read_text()) if row["ranks"] == ranks]
    for row in {row["reference"]: row for row in rows if "reference" in row}.values():
        result = reference_methods.train(SCENARIOS[row["scenario"]], **row["reference_arguments"])
        observe.hand_over(out, row["reference"], result)
    observe.work_through(out, {row["name"]: partial(run, row, out) for row in rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
