"""Corrupt every kind of file that gap_ds reads, at random: each input must work or raise a ValueError.

    python benchmarks/fuzz.py [--inputs 120000] [--seed 1]

The kinds of file (fuzz.py of the unit tests) get equally many inputs. An input that raises another error stays as
found.bin in a temporary folder, whose path is printed.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import measure
import torch

sys.path[:0] = [str(measure.ROOT), str(measure.ROOT / "tests" / "unit")]
#: Bytes of address space for reading, beyond those of the process at the start.
SPARE = 2**31


def main() -> int:
    import fuzz

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    print(f"files in {folder}")
    targets = fuzz.targets(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    started, rows = time.time(), {}
    for kind, target in targets.items():
        tally = fuzz.fuzz(target, -(-args.inputs // len(targets)), args.seed)
        rows[kind] = asdict(tally)
        print(f"{kind}: {tally}", flush=True)
    shutil.rmtree(folder)
    result = {
        "inputs": sum(row["inputs"] for row in rows.values()),
        "other_errors": 0,  # the first one would end the run
        "kinds": rows,
        "seconds": round(time.time() - started),
        "memory_limit_bytes": SPARE,
        "command": f"python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed}",
        "machine": measure.machine(),
    }
    measure.save_json(measure.RESULTS / "fuzz.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
