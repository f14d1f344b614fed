"""Make all figures that need a GPU, in one command of a few minutes without network.

    python benchmarks/gpu.py

Runs the other benchmarks on the first GPU and writes all their rows to gpu.json, after each of them. Needs wheels of
torch with CUDA, transformers, datasets, rich and sacrebleu, and deepspeed for its rows. Only Triton's kernel is
compiled. gpu.json names the benchmarks that fail. Without a GPU it ends with a message, unless `--quick` asks for all
of them at their size for tests: the same scripts, on the device that there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import torch

STEPS = ["--tokens", "4096", "--seconds", "8", "--pairs", "20", "200"]
#: (script, its options). Those with an aim come first.
RUNS = [
    ("device", []),
    ("masks", ["--weights", "1000000", "20000000", "176160768", "--rounds", "10"]),
    ("overhead", ["--presets", "big", "small", "base", "--backends", "plain", *STEPS]),
    ("boundary", ["--ranks", "1", "--weights", "20000000", "58720256", "176160768", "--rounds", "20"]),
    ("overhead", ["--presets", "base", "--backends", "zero2", "zero3", "fsdp2", "--ranks", "1", *STEPS]),
    ("peers", ["--preset", "big", "--tokens", "4096", "--rounds", "20"]),
    ("hook", ["--rows", "plain", "--entries", "560", "1000", "--steps", "20", "--boundaries", "2"]),
    ("kept_state", ["--only", "time", "--weights", "20000000", "--rounds", "20"]),
    ("memory", ["--preset", "big", "--backends", "plain", "--repeats", "1"]),
    ("throughput", ["--preset", "base", "--tokens", "2048", "--steps", "60"]),
    ("short_quality", []),
    ("profile_paths", ["--preset", "big", "--tokens", "4096"]),
]
LIMIT = 470  # seconds of all of them
#: No request to the hub, and no search of DeepSpeed for a CUDA compiler: none of its kernels is used.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_IGNORE_CUDA_DETECTION": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds; later benchmarks are left out")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--quick", action="store_true", help="sizes for tests, also without a GPU")
    args = parser.parse_args()
    if args.quick:
        return run([(script, [*words, "--quick"]) for script, words in RUNS], args.limit, args.out)
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU benchmarks need one. `make bench` runs those for a CPU.", file=sys.stderr)
        return 2
    return run(RUNS, args.limit, args.out)


def run(runs: list[tuple[str, list[str]]], limit: float, out: Path) -> int:
    """Run one benchmark after the other and write gpu.json. Returns 1 if any failed."""
    started, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        for script, words in runs:
            left = limit - (time.monotonic() - started)
            if error := one(script, words, Path(name), left):
                failed.append({"benchmark": script, "options": words, "error": error})
            results = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(name).glob("*.json"))}
            about = {"benchmark": "gpu", "command": measure.command(), "machine": measure.machine()}
            about |= {"seconds": round(time.monotonic() - started), "failed": failed, "results": results}
            measure.save_json(out / "gpu.json", about)
    print(f"{out / 'gpu.json'}: {len(results)} results, {len(failed)} failed, {about['seconds']} s")
    return int(bool(failed))


def one(script: str, words: list[str], out: Path, seconds: float) -> str:
    """Run a benchmark. Returns its error as one line, empty on success."""
    command = [sys.executable, str(measure.ROOT / "benchmarks" / f"{script}.py"), *words, "--out", str(out)]
    print("==", script, *words, flush=True)
    if seconds <= 1:
        return "no time was left"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, env=os.environ | OFFLINE, stderr=errors, start_new_session=True)
        try:
            if status := process.wait(seconds):
                raise subprocess.CalledProcessError(status, command)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            errors.seek(0)
            tail = errors.read()[-2000:]
            print(tail, file=sys.stderr)
            return f"{type(error).__name__}: {tail.strip().splitlines()[-1] if tail.strip() else error}"
        finally:
            end(process)
    return ""


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a benchmark. Its ranks would be measured along with the next one."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            for _ in range(100):  # a launcher has 10 seconds to end its ranks, which are no part of the group
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
