"""Memory of a run with the engine, compared with the same run without it, on every backend.

    python benchmarks/memory.py
    python benchmarks/memory.py --backends zero1

Each run has fresh processes; figures are sums over the ranks and medians of the repeats. On a CPU, memory is RSS
without mapped files; on a GPU, the allocator's tensors. RSS moves in steps of the allocator's arenas, so differences
below a megabyte or two are noise. `tensors` are PyTorch's counts, to the byte: a step's peak above the bare step's, and
the peak of a boundary, new masks included. Rows are added to existing ones: the table can be made in pieces. `--quick`
is a size for tests.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import measure
import overhead
import torch

from gap_ds.sharding.comm import Comm

STEPS = 3
NOTE = "fp32 Adam; sums over 2 ranks (plain: 1) and medians of the repeats; bits are those for each sparse weight owned"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--backends", nargs="+", default=list(overhead.BACKENDS), choices=overhead.BACKENDS)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; the median counts")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.backends, args.repeats = "tiny", args.backends[:1], 1
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns freed memory at once
    for backend in args.backends:
        ranks = 1 if backend == "plain" else 2
        runs = {
            kind: [measure.on_ranks(ranks, run, args.preset, backend, kind)[0] for _ in range(args.repeats)]
            for kind in ("bare", "engine")
        }
        made = f"python benchmarks/memory.py --preset {args.preset} --backends {backend} --repeats {args.repeats}"
        measure.add("memory", [row(args.preset, backend, runs)], args.out, NOTE, ("preset", "backend"), made)


def row(preset: str, backend: str, runs: dict[str, list[dict[str, int]]]) -> dict[str, Any]:
    bare, engine = (
        {key: statistics.median(found[key] for found in runs[kind]) for key in runs[kind][0]} for kind in runs
    )
    sparse = engine["sparse_weights"]
    over = [each["peak"] - bare["peak"] for each in runs["engine"]]
    return {
        "preset": preset,
        "backend": backend,
        "sparse weights owned": int(sparse),
        "masks, bits": round(8 * engine["mask_bytes"] / sparse, 3),
        "bare peak, MB": round(bare["peak"] / 1e6, 1),
        "engine over bare, bits": round(8 * statistics.median(over) / sparse, 2),
        "of the repeats": [round(8 * value / sparse, 2) for value in (min(over), max(over))],
        "engine over bare, tensors, bits": round(8 * (engine["tensors"] - bare["tensors"]) / sparse, 2),
        "boundary over bare, MB": round((engine["boundary_peak"] - bare["peak"]) / 1e6, 1),
        "a boundary's tensors, MB": round(engine["boundary_tensors"] / 1e6, 1),
        "largest entry's pieces, MB": round(4 * engine["largest_piece"] / 1e6, 1),
    }


def run(preset: str, backend: str, kind: str) -> list[dict[str, Any]]:
    """Run some steps on every rank; with the engine, two more phases with a boundary at the end."""
    device = measure.device()
    args = argparse.Namespace(preset=preset, backend=backend, sparsity=0.9, tokens=64, dtype="fp32")
    step, engine = overhead.build(args, device, kind == "engine", phase_steps=STEPS + 2)
    batch = overhead.tokens(args, device)
    step(batch)  # the optimizer makes its state
    base = measure.memory()
    peak = base + (measure.peak_bytes(lambda: [step(batch) for _ in range(STEPS)]) or 0)
    if kind == "bare":
        return [totals(peak=peak, tensors=step_tensors(step, batch))]
    shards = engine.mask_state.shards
    figures = {
        "mask_bytes": sum(bits.numel() for bits in engine.mask_state.bits.values()),
        "sparse_weights": sum(shards[name].numel for name in engine.mask_state.bits),
        "largest_piece": max(shard.numel for shard in shards.values()),
    }
    # The last step of the first phase with its boundary; then another phase, and its boundary counted in tensors.
    base = measure.memory()
    figures["boundary_peak"] = base + (measure.peak_bytes(lambda: step(batch)) or 0)
    assert engine.phase.index == 1
    figures["tensors"] = step_tensors(step, batch)
    for _ in range(STEPS):
        step(batch)
    taken: list[int] = []
    cross = engine.after_step
    engine.after_step = lambda: taken.append(measure.tensor_bytes(cross)[1])
    step(batch)
    assert engine.phase.index == 2 and len(taken) == 1
    return [totals(peak=peak, boundary_tensors=taken[0], **figures)]


def step_tensors(step: Any, batch: dict[str, Any]) -> int:
    """Return the peak of a step's tensors above those before it. Existing masks are not included."""
    return measure.tensor_bytes(lambda: step(batch))[1]


def totals(**figures: int) -> dict[str, int]:
    """Return sums over the ranks: a rank may own dense weights alone."""
    group = Comm()
    return dict(zip(figures, group.sum(torch.tensor(list(figures.values()))).tolist(), strict=True))


if __name__ == "__main__":
    main()
