"""Rows of the parity table with a pattern: N:M and blocks over shards whose boundaries cut groups."""

from __future__ import annotations

import itertools
import json
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
import toy
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from worker_zero import deepspeed_config, observers

from gap_ds import GaPEngine

warnings.filterwarnings("ignore", category=FutureWarning)


def groups(pattern: str, rows: int, columns: int) -> list[list[int]]:
    """Flat indices of the weights of a matrix (out, in) that belong together, in order of the first of each."""
    if pattern.startswith("block:"):
        height, width = map(int, pattern.removeprefix("block:").split("x"))
    else:
        height, width = 1, int(pattern.split(":")[1])
    return [
        [i * columns + j for i in range(top, top + height) for j in range(left, left + width)]
        for top, left in itertools.product(range(0, rows, height), range(0, columns, width))
    ]


def legal_mask(scores: Tensor, keep: int, pattern: str) -> Tensor:
    """The mask that the pattern asks for, by plain sorts of Python lists."""
    values, together = scores.flatten().tolist(), groups(pattern, *scores.shape)
    if pattern.startswith("block:"):
        together.sort(key=lambda group: (-sum(values[i] for i in group), group[0]))
        kept = [i for group in together for i in group][:keep]
    else:
        n = int(pattern.split(":")[0])
        kept = [i for group in together for i in sorted(group, key=lambda i: (-values[i], i))[:n]]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[kept] = True
    assert int(mask.sum()) == keep
    return mask.view(scores.shape)


def selects(row: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Scores of a matrix to the mask that the row asks for; all matrices of the toy have the same budget."""
    return partial(legal_mask, keep=row["keep"], pattern=row["pattern"])


def build(row: dict[str, Any]) -> GaPEngine:
    model = toy.build(row["hidden"])
    optimizer = toy.OPTIMIZERS["adamw"](toy.groups(model))
    gap = toy.GAP | {"pattern": row["pattern"], "sparsity": row["sparsity"]}
    if row["stage"] is None:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        return GaPEngine(wrapped, gap, optimizer=optimizer, gradient_accumulation_steps=toy.ACCUMULATION)
    return GaPEngine.initialize(model=model, config=deepspeed_config(row), gap_config=gap, optimizer=optimizer)


def cut_groups(engine: GaPEngine, pattern: str) -> int:
    """Groups of entries in the middle of which this rank's piece begins."""
    return sum(
        group[0] < engine.mask_state.shards[entry.name].box.start <= group[-1]
        for entry in engine.plan.entries
        for group in groups(pattern, *entry.shape)
        if engine.mask_state.shards[entry.name].numel
    )


def run(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """A whole run, saved and exported in step 4, and a second engine that goes on from there."""
    engine = build(row)
    name, skip = row["name"], row["reference_arguments"]["skip"]

    def save_and_export() -> None:
        engine.save_checkpoint(out / "checkpoints" / name)
        engine.export(out / "mid" / name)

    select = partial(legal_mask, pattern=row["pattern"])
    result = observe.train(engine, **observers(engine, row), skip=skip, at={4: save_and_export}, select=select)
    result |= observe.final_state(engine) | {"cut": cut_groups(engine, row["pattern"])}
    engine.export(out / "final" / name)
    engine.close()

    resumed = build(row)
    resumed.load_checkpoint(out / "checkpoints" / name)
    again = observe.train(resumed, **observers(resumed, row), skip=skip, first=5, select=select)
    result["wrong"] += again["wrong"]
    result["resumed"] = observe.final_state(resumed) | {"masks": observe.full_masks(resumed)}
    resumed.close()
    return result


def start(row: dict[str, Any], out: Path) -> dict[str, Any]:
    """Masks for equal weights: random ones in the first phase, by magnitude in an export before the first step."""
    engine = build(row)
    engine.export(out / "start" / row["name"])
    masks = observe.full_masks(engine)
    result = {"masks": masks, "cut": cut_groups(engine, row["pattern"]), "wrong": []}
    engine.close()
    select, weights = selects(row), dict(toy.build(row["hidden"]).named_parameters())
    exported = load_file(out / "start" / row["name"] / "model.safetensors") if dist.get_rank() == 0 else {}
    for name, partition in reference.entries().items():
        weight = weights[name].detach()
        if partition == 0 and exported:
            wanted = select(weight.abs())
            masks[name] = exported[name] != 0
        else:
            wanted = select(reference.random_scores(0, name, weight.numel()).view(weight.shape))
        if name in masks and not torch.equal(masks[name], wanted):
            result["wrong"].append(name)
    return result


def main(out: Path) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    rows = json.loads((out / "rows.json").read_text())
    for row in {row["reference"]: row for row in rows if "reference" in row}.values():
        arguments = row["reference_arguments"] | {"hidden": row["hidden"], "select": selects(row)}
        observe.hand_over(out, row["reference"], reference.train("adamw", **arguments))
    works = {row["name"]: partial(run if "reference" in row else start, row, out) for row in rows}
    observe.work_through(out, works)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # results are handed over: no library's clean-up at exit can spoil them
