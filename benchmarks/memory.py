"""Memory of a run with the engine over the same run without it, on every backend.

    python benchmarks/memory.py

Each run has fresh processes; figures are sums over the ranks. On a CPU the memory is what the system has given them
(RSS); on a GPU what the allocator holds. `masks` is what the masks themselves take. RSS moves in steps of the
allocator's arenas, so it says little below a megabyte or two. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import measure
import overhead
import torch

from gap_ds.comm import Comm

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base")
    parser.add_argument("--backends", nargs="+", default=["plain", *overhead.BACKENDS[1:]], choices=overhead.BACKENDS)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind, of which the median is taken")
    parser.add_argument("--name", default="memory", help="of the result")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.backends, args.repeats = "tiny", ["plain"], 1
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc gives back at once what is freed
    rows = []
    for backend in args.backends:
        runs = {
            kind: [
                measure.on_ranks(1 if backend == "plain" else 2, run, args.preset, backend, kind)[0]
                for _ in range(args.repeats)
            ]
            for kind in ("bare", "engine", "boundary")
        }
        rows.append(row(backend, {kind: sorted(found, key=_peak)[len(found) // 2] for kind, found in runs.items()}))
        measure.write(args.name, rows, args.out, f"preset {args.preset}, fp32 Adam; sums over 2 ranks (plain: 1)")


def _peak(figures: dict[str, Any]) -> int:
    peak: int = figures["peak"]
    return peak


def row(backend: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    sparse = runs["engine"]["sparse_weights"]
    return {
        "backend": backend,
        "sparse weights owned": sparse,
        "masks, bits per weight": round(8 * runs["engine"]["mask_bytes"] / sparse, 3),
        "bare peak, MB": round(runs["bare"]["peak"] / 1e6, 1),
        "engine over bare, bits per weight": round(8 * (runs["engine"]["peak"] - runs["bare"]["peak"]) / sparse, 2),
        "boundary over bare, MB": round((runs["boundary"]["peak"] - runs["bare"]["peak"]) / 1e6, 1),
        "largest entry's pieces, MB": round(4 * runs["engine"]["largest_piece"] / 1e6, 1),
    }


def run(preset: str, backend: str, kind: str) -> list[dict[str, Any]]:
    """Runs on every rank: some steps, and with `boundary` one after the last of them."""
    device = measure.device()
    args = argparse.Namespace(preset=preset, backend=backend, sparsity=0.9, tokens=64, dtype="fp32")
    step, engine = overhead.build(args, device, kind != "bare", STEPS + 1 if kind == "boundary" else 10**9)
    batch = overhead.tokens(args, device)
    step(batch)  # the optimizer has made its state
    base = measure.memory()
    peak = base + (measure.peak_bytes(lambda: [step(batch) for _ in range(STEPS)]) or 0)
    if kind == "bare":
        return [totals(peak=peak)]
    shards = engine.masking.shards
    return [
        totals(
            peak=peak,
            mask_bytes=sum(bits.numel() for bits in engine.masking.bits.values()),
            sparse_weights=sum(shards[name].numel for name in engine.masking.bits),
            largest_piece=max(shard.numel for shard in shards.values()),
        )
    ]


def totals(**figures: int) -> dict[str, int]:
    """The sums over the ranks: a rank may own nothing but weights that are dense now."""
    group = Comm()
    return dict(zip(figures, group.sum(torch.tensor(list(figures.values()))).tolist(), strict=True))


if __name__ == "__main__":
    main()
