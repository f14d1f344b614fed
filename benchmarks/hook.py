"""Host time of what the engine adds to a step and to a boundary, by the number of entries, and before a change.

    OMP_NUM_THREADS=1 python benchmarks/hook.py
    git worktree add ../before COMMIT; OMP_NUM_THREADS=1 python benchmarks/hook.py --before ../before

Entries are tiny (8 x 8), so that nearly all time is the host's work for each, which a GPU would wait for. All are
sparse. `hook` is the masking after the optimizer's step. With ZeRO-3 it is called for each sub-group, and its time is
the sum; DeepSpeed's own step of each sub-group is called, without passes over the layers. `warm` is the same a second
time, with its data in the caches, as after a step of fewer layers. `rest` is the remaining work of the hooks and of
counting the update. `boundary` is one at which half of the entries are pruned and the other half grow. Times are CPU
time of the thread that trains, which other load on the machine affects less than wall time, but does affect by way of
the caches. With `--before` a second process runs the code of another checkout, and both take turns step by step.
`--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import nn

#: name -> (backend, sub-groups of ZeRO-3)
ROWS = {"plain": ("plain", 0), "fsdp2": ("fsdp2", 0), "zero3": ("zero3", 1), "zero3, 100 sub-groups": ("zero3", 100)}
SIDE = 8
KEY = ("backend", "entries", "code")
NOTE = "ms of CPU time, medians; one rank; interval: of the median, at 95 %"
PARTS = ("hook", "warm", "rest", "boundary")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[100, 560, 1000, 2000])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each row")
    parser.add_argument("--boundaries", type=int, default=4)
    parser.add_argument("--before", type=Path, help="checkout of the code to compare with")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    if args.quick:
        args.entries, args.rows, args.steps, args.boundaries = [6], ["plain", "fsdp2"], 3, 2
    codes = {"now": measure.ROOT} | ({"before": args.before.resolve()} if args.before else {})
    for name in args.rows:
        for entries in args.entries:
            rows = compare(name, entries, codes, args)
            words = ["--entries", entries, "--steps", args.steps, "--boundaries", args.boundaries]
            made = f'python benchmarks/hook.py --rows "{name}" {" ".join(map(str, words))}'
            measure.add("hook", rows, args.out, NOTE, KEY, made + (" --before COMMIT" if args.before else ""))


def compare(name: str, entries: int, codes: dict[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the codes in turns; return a row for each."""
    backend, groups = ROWS[name]
    row = json.dumps({"backend": backend, "groups": groups, "entries": entries})
    workers = {code: start(row, path) for code, path in codes.items()}
    times: dict[str, dict[str, list[float]]] = {code: {part: [] for part in PARTS} for code in codes}
    try:
        for turn in range(3 + args.steps + 1 + args.boundaries):
            kind, warm = ("step", turn < 3) if turn < 3 + args.steps else ("boundary", turn == 3 + args.steps)
            for code in list(codes) if turn % 2 else reversed(codes):
                found = ask(workers[code], kind)
                for part, ms in found.items() if not warm else ():
                    times[code][part].append(ms)
    finally:
        for each in workers.values():
            each.kill()
            each.wait()
    rows = []
    for code, parts in times.items():
        figures = {part: round(statistics.median(ms), 3) for part, ms in parts.items()}
        figures["hook, fastest"] = round(min(parts["warm"]), 3)
        hook = [round(ms, 3) for ms in measure.interval(parts["hook"])]
        rows.append({"backend": name, "entries": entries, "code": code, **figures, "interval of the hook": hook})
    return rows


def start(row: str, code: Path) -> subprocess.Popen[str]:
    """A process that trains with the code of a checkout, a step for each line that it is sent."""
    environment = os.environ | {"PYTHONPATH": f"{code}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", row]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=code
    )
    assert ask(process, "ready") == {}
    return process


def ask(process: subprocess.Popen[str], kind: str) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    print(kind, file=process.stdin, flush=True)
    for line in process.stdout:  # libraries print, too
        if line.startswith("times "):
            found: dict[str, float] = json.loads(line.removeprefix("times "))
            return found
    raise RuntimeError("a worker has ended: see its error above")


def worker(row: dict[str, Any]) -> None:
    """Train a step, or cross a boundary, for each line of the standard input, and print its times in ms."""
    torch.set_num_threads(1)
    works: dict[str, Callable[[], dict[str, float]]] = {"ready": dict, "step": steps(row), "boundary": lambda: {}}
    for line in sys.stdin:
        if (kind := line.strip()) == "boundary" and "crossed" not in works:
            works["boundary"] = works["crossed"] = boundaries(row)
        print("times", json.dumps(works[kind]()), flush=True)


def steps(row: dict[str, Any]) -> Callable[[], dict[str, float]]:
    engine, step = build(row, {"method": "static", "phase_steps": 10**6, "rounds": 1})
    updates, spent = engine._updates, {"hook": 0.0, "all": 0.0, "warm": 0.0}
    mask = engine.mask_state.zero_pruned
    once, again = timed(mask, spent, "hook"), timed(mask, spent, "warm")

    def twice(optimizer: torch.optim.Optimizer) -> Any:
        found = once(optimizer)
        again(optimizer)
        return found

    engine.mask_state.zero_pruned = twice
    for name in ("_look_first", "_mask", "complete"):
        setattr(updates, name, timed(getattr(updates, name), spent, "all"))

    def one() -> dict[str, float]:
        spent.update(hook=0.0, all=0.0, warm=0.0)
        step()
        rest = spent["all"] - spent["hook"] - spent["warm"]
        return {"hook": spent["hook"], "warm": spent["warm"], "rest": rest}

    return one


def boundaries(row: dict[str, Any]) -> Callable[[], dict[str, float]]:
    config = {"partitions": 2, "phase_steps": 1, "rounds": 10**4}
    engine, step = build(row, config)
    spent = {"boundary": 0.0}
    engine._enter = timed(engine._enter, spent, "boundary")

    def one() -> dict[str, float]:
        spent.update(boundary=0.0)
        step()
        return dict(spent)

    return one


def timed(call: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        started = time.thread_time_ns()
        try:
            return call(*args)
        finally:
            spent[name] += (time.thread_time_ns() - started) / 1e6

    return wrapper


def build(row: dict[str, Any], gap: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """Return an engine over a model of many small layers, and a training step."""
    from gap_ds import GaPEngine

    gap |= {"sparsity": 0.9, "finetune_steps": 1, "include": [r".*\.weight"]}
    torch.manual_seed(0)
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(row["entries"])]
    model = nn.Sequential(*[nn.Sequential(*layers[i : i + 10]) for i in range(0, len(layers), 10)])
    # Sharding libraries are timed on the CPU: their groups have one rank, over gloo.
    device = measure.device() if row["backend"] == "plain" else torch.device("cpu")
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if row["backend"] == "zero3":
        import deepspeed

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", **alone())
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        size = -(-row["entries"] * SIDE * SIDE // row["groups"])
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "sub_group_size": size},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine = GaPEngine(trained, gap)
        inner = trained.optimizer
        for flat in inner.fp32_partitioned_groups_flat:
            flat.grad = torch.zeros_like(flat)

        def step_each() -> None:
            for group in range(len(inner.fp32_partitioned_groups_flat)):
                inner._optimizer_step(group)
            engine.after_step()

        return engine, step_each
    else:
        if row["backend"] == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo", **alone())
            fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine = GaPEngine(model, gap, optimizer=optimizer)
    batch = torch.randn(1, SIDE, device=device)

    def step_again() -> None:
        engine.optimizer.step()
        engine.after_step()

    # Gradients are kept, here and above: forward and backward passes of so many layers take long and tell nothing.
    engine.backward(engine(batch).square().mean())
    return engine, step_again


def alone() -> dict[str, Any]:
    """Arguments of a process group of one rank."""
    file = Path(tempfile.mkdtemp()) / "store"
    return {"init_method": f"file://{file}", "rank": 0, "world_size": 1}


if __name__ == "__main__":
    main()
