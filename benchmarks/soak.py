"""Memory and file descriptors of a long run on 2 ranks: a boundary every 5 steps, a checkpoint every 100.

    python benchmarks/soak.py [--steps 2400] [--kinds zero2 zero3 fsdp2]

Writes benchmarks/results/soak.json: the usage every 100 steps, by kind and rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import measure

sys.path[:0] = [str(measure.ROOT), str(measure.ROOT / "tests" / "sharding")]


def main() -> None:
    from launch import run_workers

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--kinds", nargs="+", default=["zero2", "zero3", "fsdp2"])
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            run_workers("worker_soak.py", 2, Path(folder), kind, str(args.steps), timeout=3600)
            for rank in (0, 1):
                found = json.loads((Path(folder) / f"soak.{rank}.json").read_text())
                rows.append({"rank": rank, **found})
                first, last = found["usage"][len(found["usage"]) // 4], found["usage"][-1]
                grown = (last["resident_bytes"] - first["resident_bytes"]) / 2**20
                print(
                    f"{kind} rank {rank}: {found['boundaries']} boundaries; step {first['step']} to {last['step']}: "
                    f"{grown:+.1f} MiB, {last['descriptors'] - first['descriptors']:+d} descriptors",
                    flush=True,
                )
    result = {"benchmark": "soak", "command": measure.command(), "machine": measure.machine(), "rows": rows}
    measure.save_json(measure.RESULTS / "soak.json", result)


if __name__ == "__main__":
    main()
