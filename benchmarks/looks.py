"""CPU time of looking whether pruned weights are 0, relative to a training step and to a boundary.

    OMP_NUM_THREADS=1 python benchmarks/looks.py
    OMP_NUM_THREADS=1 python benchmarks/looks.py --presets base --backends fsdp2

Every row has fresh processes. In one run, boundaries take turns with looks and without, so that each partition of a
cyclic run has both. `boundary_ratio` is with looks to without, the median over pairs of neighbours that prune the same
partition, `interval` its 95 % confidence interval; `look_share` the time inside the look relative to the boundary
around it, median. `step_share` is the time inside all
looks and comparisons of a step (counts of changes, addresses, names masked, a part of the weights), the mean over whole
rounds of parts, relative to the median step. All figures are of rank 0. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import overhead
import torch.distributed as dist

KEY = ("preset", "backend", "ranks", "dtype")
NOTE = "CPU time of one thread on rank 0; boundary_ratio: with looks to without, of pairs that prune the same partition"
PARTITIONS = 3  # of overhead.build


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=list(overhead.models.PRESETS), default=["base"])
    parser.add_argument("--backends", nargs="+", choices=overhead.BACKENDS, default=["plain", "fsdp2", "zero2"])
    parser.add_argument("--ranks", type=int, default=2, help="of all backends except plain, which has 1")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=256, help="target tokens of a step of one rank")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=64, help="timed steps; whole rounds of parts")
    parser.add_argument("--boundaries", type=int, default=36, help="timed, half of them without looks; a multiple of 3")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return one(argparse.Namespace(**json.loads(args.row)))
    if args.quick:
        args.presets, args.tokens, args.steps, args.boundaries = ["tiny"], 64, 4, 12
        args.backends = ["plain"]
    for preset in args.presets:
        for backend in args.backends:
            row = argparse.Namespace(**vars(args) | {"preset": preset, "backend": backend})
            row.ranks = 1 if backend == "plain" else args.ranks
            words = ["--presets", preset, "--backends", backend, "--ranks", row.ranks, "--sparsity", args.sparsity]
            words += ["--tokens", args.tokens, "--dtype", args.dtype, "--steps", args.steps]
            words += ["--boundaries", args.boundaries]
            made = " ".join(["python benchmarks/looks.py", *map(str, words)])
            measure.add("looks", [launch(row)], args.out, NOTE, KEY, made)


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """Make a row in fresh processes."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "row.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        row = json.dumps({**vars(args), "out": str(out)})
        subprocess.run([sys.executable, *(words if args.ranks > 1 else []), __file__, "--row", row], check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def one(args: argparse.Namespace) -> None:
    """Time one row, on every rank; rank 0 writes it."""
    device = overhead.start(args.backend)
    row = {key: getattr(args, key) for key in KEY}
    row |= of_steps(args, device) | of_boundaries(args, device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(row), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def of_steps(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Time steps of one endless phase, and what is looked at in them."""
    step, engine = overhead.build(args, device, sparse=True)
    batch = overhead.tokens(args, device)
    inside: list[float] = []
    updates = engine._updates
    updates._look_first, updates.complete = timed(updates._look_first, inside), timed(updates.complete, inside)
    steps = []
    for number in range(args.steps + 2):
        if number == 2:  # the first looks at everything, both load libraries
            inside.clear()
            steps.clear()
        steps.append(measure.both_seconds(lambda: step(batch))[1])
    median, looks = statistics.median(steps), sum(inside) / args.steps
    engine.close()
    return {
        "tokens": args.tokens,
        "steps": args.steps,
        "step_ms": round(1e3 * median, 1),
        "step_looks_ms": round(1e3 * looks, 3),
        "step_share": round(looks / median, 5),
    }


def of_boundaries(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Time boundaries between cyclic phases of one step, in turns with looks and without."""
    small = argparse.Namespace(**vars(args) | {"tokens": 16})
    rounds = args.boundaries // PARTITIONS + 1
    step, engine = overhead.build(small, device, sparse=True, phase_steps=1, rounds=rounds)
    batch = overhead.tokens(small, device)
    inside: list[float] = []
    look = timed(engine.mask_state.revived, inside)
    looks: list[float] = []
    times: list[tuple[bool, float]] = []
    enter = engine._enter

    def crossed(*phases: Any) -> None:
        on = len(times) % 2 == 0
        inside.clear()
        with patched(engine.mask_state, "revived", look if on else lambda *_: None):
            times.append((on, measure.both_seconds(lambda: enter(*phases))[1]))
        looks.extend([sum(inside) / times[-1][1]] if on else [])

    engine._enter = crossed
    for _ in range(args.boundaries + PARTITIONS):
        step(batch)
    engine.close()
    del times[:PARTITIONS]  # libraries are loaded and moments are made
    # An odd number of boundaries lies between two that prune the same partition: one of them has looks.
    pairs = zip(times, times[PARTITIONS:], strict=False)
    ratios = [a / b if on else b / a for (on, a), (_, b) in pairs]
    medians = {key: statistics.median(t for on, t in times if on is key) for key in (True, False)}
    return {
        "boundaries": args.boundaries,
        "boundary_ms": round(1e3 * medians[True], 1),
        "without_ms": round(1e3 * medians[False], 1),
        "boundary_ratio": round(statistics.median(ratios), 3),
        "interval": [round(value, 3) for value in measure.interval(ratios)],
        "look_share": round(statistics.median(looks[PARTITIONS // 2 + 1 :]), 3),
    }


def timed(call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """Return the call, with its CPU seconds collected."""

    def wrapper(*args: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return call(*args, **named)
        finally:
            into.append(time.process_time() - started)

    return wrapper


@contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of an instance for a while."""
    setattr(target, name, value)
    try:
        yield
    finally:
        delattr(target, name)


if __name__ == "__main__":
    main()
