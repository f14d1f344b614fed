"""Time of `import gap_ds` beyond `import torch`, and of the translation example until its first step.

    python benchmarks/startup.py

Fresh processes, in turns. `--quick` measures the imports only, once.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure

TORCH = "import torch"
BEYOND = ("import torch; import gap_ds", "import torch; from gap_ds import GaPConfig, GaPEngine")
GAP = {"sparsity": 0.9, "partitions": 3, "phase_steps": 100, "rounds": 1, "finetune_steps": 100}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    works: dict[str, Callable[[], object]] = {code: (lambda code=code: python(code)) for code in (TORCH, *BEYOND)}
    if not args.quick:
        works["example, until its first step"] = first_step
    seconds = measure.in_turns(works, 1 if args.quick else args.rounds)
    rows = [{"what": name, **row} for name, row in measure.compared(seconds, TORCH).items()]
    for code in BEYOND:
        beyond = [b - a for a, b in zip(seconds[TORCH], seconds[code], strict=True)]
        rows.append({"what": f"{code}, beyond the first", "ms": round(1e3 * statistics.median(beyond), 1)})
    measure.write("startup", rows, args.out, "medians; beyond: median of the differences within a round")


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def first_step() -> None:
    """Run the example on the shipped corpus, tokenizer training included, until its first step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "gap.json").write_text(json.dumps(GAP))
        command = [sys.executable, str(measure.ROOT / "examples/translation/train.py"), "--backend", "none"]
        command += ["--gap-config", f"{folder}/gap.json", "--output-dir", f"{folder}/run", "--log-every", "1"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            metrics = folder / "run" / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and '"train"' in metrics.read_text()):
                time.sleep(0.01)
            ended = process.poll()
            process.kill()
            process.wait()
        assert ended is None, f"the example ended by itself: {(folder / 'log').read_text()[-2000:]}"


if __name__ == "__main__":
    main()
