"""Time, memory, density and resumes of sparse training by this library and by other packages, in turns.

    python -m pip install --no-deps --target build/peers torchao nvidia-modelopt scipy requests urllib3 idna certifi \\
        charset_normalizer omegaconf antlr4-python3-runtime==4.9.3 pulp nvidia-ml-py
    PYTHONPATH=build/peers OMP_NUM_THREADS=1 python benchmarks/peers.py

`peer_loops.py` describes the loops. A package that is missing has a row without figures. All loops train the same
entries of the example's model with the same AdamW. `bare again` is the bare loop a second time: the distance of its
ratio from 1 is noise. `cpu_ratio` is that of CPU time, which other processes disturb less. Extra bytes are tensors
beyond the bare run, counted by PyTorch's allocator, at the peak of a step. An update chooses new masks for all entries.

Densities are those of the entries after each of six steps, the last two of them after a resume: of the weights that
the optimizer holds, and of those that the next forward pass has. A resume is a checkpoint after four steps, which a
fresh loop loads, initialised with another seed; it is exact if its weights equal those of the run that went on, bit for
bit. `--quick` is for tests.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import overhead
import peer_loops
import torch
from peer_loops import LOOPS, Bare, Loop

#: Steps before a checkpoint, and after it.
STEPS = 4, 2


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", choices=list(peer_loops.models.PRESETS), default="small")
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
    note += "; ".join(within)
    measure.write("peers", found, args.out, note)


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = measure.device()
    batch = overhead.tokens(args, device)
    absent = {name: found for name, loop in LOOPS.items() if (found := peer_loops.missing(loop))}
    present = {name: loop for name, loop in LOOPS.items() if name not in absent}
    truths = {name: truth(loop, args, device, batch) for name, loop in present.items()}
    changed = updates(present, args, device, batch)
    # A method that differs in its updates alone has no row of steps.
    stepping = {"bare": Bare, **{name: loop for name, loop in present.items() if loop is not peer_loops.GapDsRigl}}
    loops: dict[str, Loop] = {}
    bytes_of = {name: peak(loops, name, loop, args, device, batch) for name, loop in stepping.items()}
    loops = {"bare": loops.pop("bare"), "bare again": Bare(args, device), **loops}
    weights = sum(weight.numel() for weight in loops["bare"].stored())
    works = {name: (lambda loop=loop: loop.step(batch)) for name, loop in loops.items()}
    both = measure.in_turns(works, args.rounds, timer=measure.both_seconds)
    wall = measure.compared({name: [seconds for seconds, _ in times] for name, times in both.items()}, "bare")
    cpu = measure.compared({name: [seconds for _, seconds in times] for name, times in both.items()}, "bare")
    found = []
    for name in ("bare", "bare again", *LOOPS):
        loop = LOOPS.get(name, Bare)
        row: dict[str, Any] = {"step by": name, "package": peer_loops.version(loop) if name not in absent else None}
        if name in absent:
            row["package"] = f"{loop.package}: not installed ({', '.join(absent[name])})"
        if name in wall:
            row |= {**wall[name], "cpu_ratio": cpu[name]["ratio"] if device.type == "cpu" else None}
        if name in bytes_of:
            row |= {"extra bytes per entry weight": round((bytes_of[name] - bytes_of["bare"]) / weights, 3)}
        found.append(row | {"update of the masks, ms": changed.get(name)} | truths.get(name, {}))
    return found


def peak(
    loops: dict[str, Loop],
    name: str,
    loop: type[Loop],
    args: argparse.Namespace,
    device: torch.device,
    batch: dict[str, Any],
) -> int:
    """Build a loop into `loops`. Returns the peak bytes of its tensors, model included, in its second step."""

    def start() -> None:
        loops[name] = loop(args, device)
        loops[name].step(batch)  # the optimizer has made its state

    held, _ = measure.tensor_bytes(start)
    _, most = measure.tensor_bytes(lambda: loops[name].step(batch))
    return held + most


def truth(loop: type[Loop], args: argparse.Namespace, device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the densities after steps, and whether a resumed run equals the one that went on."""
    before, after = STEPS
    stored: list[float] = []
    used: list[float] = []

    def steps(trained: Loop, first: int, count: int) -> None:
        for number in range(first, first + count):
            torch.manual_seed(number)  # dropout
            trained.step(batch)
            stored.append(density(trained.stored()))
            used.append(density(trained.used()))

    torch.manual_seed(0)
    whole = loop(args, device)
    steps(whole, 0, before)
    state = peer_loops.copied(whole.save())
    steps(whole, before, after)
    stored, used = stored[:before], used[:before]
    torch.manual_seed(1)
    resumed = loop(args, device)
    resumed.load(state)
    steps(resumed, before, after)
    same = all(torch.equal(a, b) for a, b in zip(whole.used(), resumed.used(), strict=True))
    return {
        "target density": round(whole.target, 4),
        "density held": [round(min(stored), 4), round(max(stored), 4)],
        "density of the forward pass": [round(min(used), 4), round(max(used), 4)],
        "resume": "exact" if same else "other weights",
    }


def density(weights: list[torch.Tensor]) -> float:
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    return kept / sum(weight.numel() for weight in weights)


def updates(
    present: dict[str, type[Loop]], args: argparse.Namespace, device: torch.device, batch: dict[str, Any]
) -> dict[str, float]:
    """Return milliseconds of one choice of all masks: medians, in turns."""
    works = {}
    for name, loop in present.items():
        trained = loop(args, device)
        if isinstance(trained, peer_loops.Rigl | peer_loops.GapDsRigl):
            trained.gradients(batch)
        if (work := trained.masking()) is not None:
            works[name] = work
    times = measure.in_turns(works, max(2, args.rounds // 4))
    return {name: row["ms"] for name, row in measure.compared(times, "gap_ds").items()}


if __name__ == "__main__":
    main()
