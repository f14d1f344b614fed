"""Kill real runs repeatedly (SIGKILL) and compare their final weights with those of undisturbed runs.

python benchmarks/faults.py [--kills 12] [--seed 0] --out RUNS

Three runs of the tests' small model: ZeRO-2 and FSDP2 on 2 ranks, and parallel GaP with 2 workers. Each is killed
`--kills` times while it steps, saves, crosses a boundary, or exchanges. Writes benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import measure

sys.path[:0] = [str(measure.ROOT), str(measure.ROOT / "tests" / "sharding")]

MOMENTS = {
    "zero2": ("save", "boundary", "step"),
    "fsdp2": ("save", "boundary", "step"),
    "parallel": ("exchange", "save", "boundary"),
}


def main() -> int:
    from kills import finish

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="of each of the three runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; it is emptied")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    rows = []
    for kind, moments in MOMENTS.items():
        rounds = 4 + 3 * args.kills  # enough for the last kill to hit a running process
        wanted = finish(kind, args.out / f"{kind}_undisturbed", [], args.seed, rounds)
        chosen = list(itertools.islice(itertools.cycle(moments), args.kills))
        found = finish(kind, args.out / f"{kind}_killed", chosen, args.seed, rounds)
        rows.append(row(kind, wanted, found))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "rows": rows,
        "command": f"python benchmarks/faults.py --kills {args.kills} --seed {args.seed} --out RUNS",
        "machine": measure.machine(),
    }
    measure.save_json(measure.RESULTS / "faults.json", result)
    return int(not all(each["same_final_bits"] for each in rows))


def row(kind: str, wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one run."""
    by_moment = dict(Counter(kill["moment"] for kill in found["kills"]))
    return {
        "run": kind,
        "kills": len(found["kills"]),
        "kills_during": by_moment,
        "both_ranks_at_once": sum(kill["both"] for kill in found["kills"]),
        "starts": len(found["starts"]),
        "same_final_bits": found["finals"] == wanted["finals"] and bool(wanted["finals"]),
    }


if __name__ == "__main__":
    sys.exit(main())
