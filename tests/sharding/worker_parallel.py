"""One worker of parallel GaP on 2 ranks, for every backend. `gap_ds.parallel.launch` starts two or three of them.

Each plays the rows of that number of workers.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import observe
import reference_parallel as reference
import torch
import torch.distributed as dist
import toy
import worker_fsdp
import worker_zero
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine, ParallelWorker

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)

#: By number of workers: name -> scenario of the reference, and whether gradients are averaged after every micro-batch
#: (see test_zero.row)
ROWS = {
    2: {
        **{"ddp": ("two", False), "zero2": ("two", True), "zero3": ("two", True), "fsdp2": ("two", False)},
        **{"ddp_rising": ("rising", False), "zero3_rising": ("rising", True)},
    },
    3: {
        **{f"zero3_{scenario}": (scenario, True) for scenario in ("erk", "global")},
        **{f"fsdp2_{scenario}": (scenario, False) for scenario in ("erk", "global")},
    },
}


def build(name: str, index: int, out: Path, scenario: str = "two", **changes: Any) -> GaPEngine:
    worker = ParallelWorker(index, str(out / f"exchange_{name}"), timeout=240)
    run = reference.SCENARIOS[scenario]
    gap = {**run.gap, **changes}
    model: Any = toy.build()
    wrapped, groups = model, toy.groups
    if name.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
    elif name.startswith("fsdp2"):
        wrapped, groups = worker_fsdp.wrap_fsdp2(model, {}), worker_fsdp.groups_by_name
    optimizer = toy.OPTIMIZERS[run.optimizer](groups(model))
    training: dict[str, Any] = {"optimizer": optimizer, "worker": worker}
    if gap.get("lr_restart"):
        training["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, reference.decay)
    if name.startswith("zero"):
        config = worker_zero.deepspeed_config({"stage": int(name[4]), "dtype": "fp32"})
        return GaPEngine.initialize(model=model, config=config, gap_config=gap, **training)
    return GaPEngine(wrapped, gap, gradient_accumulation_steps=toy.ACCUMULATION, **training)


def train(engine: GaPEngine, last: int | None = None) -> tuple[list[Any], list[str]]:
    history, wrong = [], []
    while not engine.finished and engine.applied_steps != last:
        phase, step = engine.phase, engine.applied_steps
        for micro in range(toy.ACCUMULATION):
            engine.backward(engine(*toy.batch(step, micro, dist.get_rank(), skip=False)))
            engine.step()
        for name in engine.mask_state.bits:
            if engine.mask_state.shards[name].weight()[~engine.mask(name)].count_nonzero():
                wrong.append(f"step {step}: {name} has pruned weights that are not 0")
        if engine.phase is not phase:
            history.append(observe.full_masks(engine))
    return history, wrong


def run(name: str, index: int, out: Path, scenario: str = "two", **changes: Any) -> dict[str, Any]:
    engine = build(name, index, out, scenario, **changes)
    history, wrong = train(engine)
    if index == 0:
        engine.export(out / f"model_{name}")
    result = observe.final_state(engine) | {"masks": history, "wrong": wrong, "steps": engine.applied_steps}
    engine.close()
    return result


def run_killed(index: int, out: Path) -> dict[str, Any]:
    """Worker 1 publishes its first round, and then loses everything since its checkpoint before that."""
    engine = build("ddp_killed", index, out)
    if index == 1:
        train(engine, last=1)
        engine.save_checkpoint(out / "checkpoints")
        train(engine, last=4)  # publishes round 0 before step 3 and goes on
        engine.close()
        engine = build("ddp_killed", index, out)
        engine.load_checkpoint(out / "checkpoints")
    history, wrong = train(engine)
    result = observe.final_state(engine) | {"masks": history[-1:], "wrong": wrong}
    engine.close()
    return result


def main(out: Path, index: int) -> None:
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    rank, rows = dist.get_rank(), ROWS[int(os.environ["GAP_DS_WORKERS"])]

    def hand_over(name: str, result: Any) -> None:
        torch.save(result, out / f"{name}.{index}.{rank}.pt")

    try:
        if index == 0:
            for scenario, every in sorted(set(rows.values())):
                hand_over(f"reference_{scenario}_{every}", reference.train(reference.SCENARIOS[scenario], every))
        for name, (scenario, _) in rows.items():
            hand_over(name, run(name, index, out, scenario))
        if "ddp" in rows:
            hand_over("ddp_killed", run_killed(index, out))
            if index == 0:
                first = reference.train(reference.SCENARIOS["two"], False, unpartitioned="first")
                hand_over("reference_first", first)
            hand_over("ddp_first", run("ddp_first", index, out, unpartitioned="first"))
    except Exception:
        hand_over("error", traceback.format_exc())
        raise
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[sys.argv.index("--gap-worker") + 1]))
    sys.stdout.flush()
    os._exit(0)
