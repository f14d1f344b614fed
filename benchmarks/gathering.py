"""Memory of rank 0 while it writes a model that is spread over the ranks: export, portable checkpoint, exchange.

    python benchmarks/gathering.py
    python benchmarks/gathering.py --backends fsdp2 --preset big

Each must cost no more than one whole weight, this rank's piece of it, and the part that travels. Figures are the peak
of the host's RSS without mapped files, looked at every millisecond, above that before. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import overhead

from gap_ds import export
from gap_ds.checkpoint import portable
from gap_ds.parallel import Exchange, ParallelWorker, identity, items_of
from gap_ds.sharding.comm import Comm

NOTE = "MB; rank 0 of 2, fp32; one whole weight is the largest that travels"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", default="big")
    parser.add_argument("--backends", nargs="+", default=["fsdp2", "zero1", "zero3"], choices=overhead.BACKENDS)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.backends = "tiny", args.backends[:1]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns freed memory at once
    for backend in args.backends:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure.on_ranks(2, run, args.preset, backend, folder)
        made = f"python benchmarks/gathering.py --preset {args.preset} --backends {backend}"
        measure.add("gathering", rows, args.out, NOTE, ("preset", "backend"), made)


def run(preset: str, backend: str, folder: str) -> list[dict[str, Any]]:
    args = argparse.Namespace(preset=preset, backend=backend, sparsity=0.9, tokens=64, dtype="fp32")
    step, engine = overhead.build(args, measure.device(), True, phase_steps=10)
    step(overhead.tokens(args, measure.device()))  # the optimizer makes its state
    shards, buffers = engine.run.backend.shards(), engine.run.buffers()
    sizes = [4 * shard.full_numel for shard in shards]
    Path(folder, "gap").mkdir(exist_ok=True)
    engine.run.world.barrier()
    works: dict[str, Callable[[], object]] = {
        "export": lambda: engine.export(f"{folder}/model"),
        "portable checkpoint": lambda: portable.write(
            Path(folder, "gap"), engine.run.backend, buffers, engine.run.world
        ),
        "exchange": lambda: publish(engine, f"{folder}/meeting"),
    }
    found = {name: round(peak(work) / 1e6, 1) for name, work in works.items()}
    weights = {"model": round(sum(sizes) / 1e6, 1), "largest weight": round(max(sizes) / 1e6, 1)}
    return [{"preset": preset, "backend": backend, **weights, **found}]


def peak(work: Callable[[], object]) -> int:
    """Return by how many bytes the memory of this process rises while `work` runs."""
    measure.reset_peak()  # returns freed memory to the system
    found, stop = [measure.status("RssAnon")], threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            found.append(max(found[-1], measure.status("RssAnon")))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return found[-1] - found[0]


def publish(engine: Any, folder: str) -> None:
    """Write the file of the worker whose partition is sparse now."""
    plan, comm, buffers = engine.plan, engine.run.backend.comm, dict(export.buffers(engine.module))
    items = items_of(plan, engine.run.backend.shards(), buffers)
    of_run = (plan.kappa, engine.signature, plan.fingerprint, identity.of_tensors(items))
    exchange = Exchange(ParallelWorker(1, folder), *of_run, Comm(), comm)
    exchange.publish(0, items, engine.mask_state.bits)


if __name__ == "__main__":
    main()
