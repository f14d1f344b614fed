"""Every figure that needs a GPU, in one command of a few minutes; needs no network.

    python benchmarks/gpu.py

Runs the other benchmarks on the first GPU and writes gpu.json with all of their rows. Ends with a message where there
is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import torch

RUNS = {
    "masks": ["--weights", "1000000", "20000000", "176160768", "--rounds", "20"],
    "boundary": ["--ranks", "1", "--weights", "20000000", "58720256", "176160768", "--rounds", "5"],
    "peers": ["--preset", "big", "--tokens", "4096", "--rounds", "10"],
    "memory": ["--preset", "big", "--backends", "plain"],
    "throughput": ["--preset", "base", "--tokens", "4096", "--steps", "60"],
}
OVERHEAD = [["--preset", preset, "--backend", "plain", "--tokens", "4096"] for preset in ("small", "base", "big")]
LIMIT = 470  # seconds of all of them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU benchmarks need one. `make bench` runs those for a CPU.", file=sys.stderr)
        return 2
    failed, end = [], time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {run: [f"{run}.py", *words, "--out", name] for run, words in RUNS.items()}
        commands |= {
            f"overhead {words[1]}": ["overhead.py", *words, "--out", f"{name}/overhead.json"] for words in OVERHEAD
        }
        for run, words in commands.items():
            command = [sys.executable, str(measure.ROOT / "benchmarks" / words[0]), *words[1:]]
            try:
                subprocess.run(
                    command,
                    check=True,
                    timeout=max(1, end - time.monotonic()),
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.append({"benchmark": run, "error": str(error)})
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps({"results": results, "failed": failed}, indent=1) + "\n")
    print(f"{args.out / 'gpu.json'}: {len(results)} results, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
