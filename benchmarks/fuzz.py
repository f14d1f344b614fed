"""Changes every file that gap_ds reads at random, many times: each input must work or end in a ValueError.

    python benchmarks/fuzz.py [--inputs 120000] [--seed 1]

The inputs are shared out evenly among the kinds of file (fuzz.py of the unit tests). An input
that ends in another error stays as found.bin in a temporary folder, which is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import measure
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
#: Address space that reading may take beyond what the process has when it begins.
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
        "other_errors": 0,  # the first one would have ended the run
        "kinds": rows,
        "seconds": round(time.time() - started),
        "memory_limit_bytes": SPARE,
        "command": f"python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed}",
        "machine": measure.machine(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
