"""Every figure that needs a GPU, in one command of a few minutes; needs no network.

    python benchmarks/gpu.py

Runs the other benchmarks on the first GPU and writes gpu.json with all of their rows, after each of them. Needs torch
with CUDA, transformers, datasets, rich and sacrebleu, and deepspeed for its rows, as wheels: nothing is compiled but
Triton's kernel. What fails is left out and named. Ends with a message where there is no GPU.
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

STEPS = ["--tokens", "4096", "--seconds", "8", "--pairs", "20", "200"]
#: (script, its options), those first that the aims are about.
RUNS = [
    ("masks", ["--weights", "1000000", "20000000", "176160768", "--rounds", "10"]),
    ("overhead", ["--presets", "big", "small", "base", "--backends", "plain", *STEPS]),
    ("boundary", ["--ranks", "1", "--weights", "20000000", "58720256", "176160768", "--rounds", "20"]),
    ("overhead", ["--presets", "base", "--backends", "zero2", "zero3", "fsdp2", "--ranks", "1", *STEPS]),
    ("peers", ["--preset", "big", "--tokens", "4096", "--rounds", "20"]),
    ("memory", ["--preset", "big", "--backends", "plain", "--repeats", "1"]),
    ("throughput", ["--preset", "base", "--tokens", "2048", "--steps", "60"]),
    ("profile_paths", ["--preset", "big", "--tokens", "4096"]),
]
LIMIT = 470  # seconds of all of them
#: No hub is asked, and DeepSpeed does not look for a compiler of CUDA: none of its own kernels is used.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_IGNORE_CUDA_DETECTION": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds, after which what is left is left out")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU benchmarks need one. `make bench` runs those for a CPU.", file=sys.stderr)
        return 2
    return run(RUNS, args.limit, args.out)


def run(runs: list[tuple[str, list[str]]], limit: float, out: Path) -> int:
    """Runs one after the other, and writes gpu.json; 1 if any failed."""
    started, failed = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for script, words in runs:
            left = limit - (time.monotonic() - started)
            if error := one(script, words, Path(name), left):
                failed.append({"benchmark": script, "options": words, "error": error})
            results = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(name).glob("*.json"))}
            about = {"benchmark": "gpu", "command": measure.command(), "machine": measure.machine()}
            about |= {"seconds": round(time.monotonic() - started), "failed": failed, "results": results}
            (out / "gpu.json.partial").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            (out / "gpu.json.partial").replace(out / "gpu.json")
    print(f"{out / 'gpu.json'}: {len(results)} results, {len(failed)} failed, {about['seconds']} s")
    return int(bool(failed))


def one(script: str, words: list[str], out: Path, seconds: float) -> str:
    """What went wrong; nothing if nothing did."""
    command = [sys.executable, str(measure.ROOT / "benchmarks" / f"{script}.py"), *words, "--out", str(out)]
    print("==", script, *words, flush=True)
    if seconds <= 1:
        return "no time was left"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            subprocess.run(command, check=True, timeout=seconds, env=os.environ | OFFLINE, stderr=errors)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            errors.seek(0)
            tail = errors.read()[-2000:]
            print(tail, file=sys.stderr)
            return f"{type(error).__name__}: {tail.strip().splitlines()[-1] if tail.strip() else error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
