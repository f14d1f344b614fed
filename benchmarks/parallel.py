"""Train by parallel GaP with workers that exchange through a folder: undisturbed, and with one of them killed.

    python benchmarks/parallel.py --data DATA --out RUNS

Trains the translation example on Multi30k twice for each number of workers, by `gap-ds parallel`. In the second run
worker 1 is killed (SIGKILL) in the middle of the second round, and the launcher restarts it. Both runs must export the
same model, bit for bit. Writes benchmarks/results/parallel.json with the bytes exchanged. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure

ROUNDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with wmt16_multi30k")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; it is emptied")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--limit", type=int, default=29000, help="sentence pairs; all of them make 247 steps an epoch")
    parser.add_argument("--phase", type=int, default=150, help="steps of a round")
    parser.add_argument("--finetune", type=int, default=150, help="steps of the fine-tuning")
    args = parser.parse_args()
    rows = []
    for workers in args.workers:
        runs = {kind: run(args, workers, kind) for kind in ("undisturbed", "killed")}
        same = runs["undisturbed"]["model_sha256"] == runs["killed"]["model_sha256"]
        rows.append({"workers": workers, "final_models_are_equal": same, **runs})
        print(f"{workers} workers: the final models are {'equal' if same else 'NOT EQUAL'}", flush=True)
    result = {
        "rows": rows,
        "command": f"python benchmarks/parallel.py --data DATA --out RUNS --workers {' '.join(map(str, args.workers))} "
        f"--limit {args.limit} --phase {args.phase} --finetune {args.finetune}",
        "machine": measure.machine(),
    }
    measure.save_json(measure.RESULTS / "parallel.json", result)
    return int(not all(row["final_models_are_equal"] for row in rows))


def run(args: argparse.Namespace, workers: int, kind: str) -> dict[str, Any]:
    """Run once; return the bytes exchanged and the exported model's hash."""
    folder = args.out / f"{kind}_{workers}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gap = {"method": "parallel", "sparsity": 0.9, "partitions": workers, "rounds": ROUNDS}
    gap |= {"phase_steps": args.phase, "finetune_steps": args.finetune}
    (folder / "gap.json").write_text(json.dumps(gap), encoding="utf-8")
    script = [str(measure.ROOT / "examples" / "translation" / "train.py"), "--gap-config", str(folder / "gap.json")]
    script += ["--backend", "none", "--dataset", str(args.data / "wmt16_multi30k"), "--test-split", "test_2016_flickr"]
    script += ["--limit", str(args.limit), "--save-every", str(max(1, args.phase // 3)), "--log-every", "5"]
    script += ["--bf16", "--threads", "1", "--resume"]
    script += ["--samples", "0", "--beams", "1", "--output-dir", str(folder / "run")]
    command = [sys.executable, "-m", "gap_ds.cli", "parallel", "--workers", str(workers), "--restarts", "1"]
    started = time.perf_counter()
    killed_at = None
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen([*command, "--", *script], stdout=log, stderr=log)
        if kind == "killed":
            killed_at = kill_worker(folder, process, args.phase)
        if process.wait() != 0:
            raise SystemExit(f"{kind}: failed, see {folder / 'log.txt'}")
    text = (folder / "log.txt").read_text(encoding="utf-8")
    assert ("starting it again" in text) == (kind == "killed")
    wrote = re.findall(r"round (\d+): worker (\d+) wrote (\d+) bytes and read (\d+) bytes", text)
    results = json.loads((folder / "run" / "worker_0" / "results.json").read_text(encoding="utf-8"))
    exported = (folder / "run" / "worker_0" / "model" / "model.safetensors").read_bytes()
    files = {
        str(path.relative_to(folder / "run" / "exchange")): path.stat().st_size
        for path in sorted((folder / "run" / "exchange").rglob("*.safetensors"))
    }
    for round_, worker, size, _ in wrote:  # the log agrees with the files
        assert int(size) in (0, files[f"round_{round_}/worker_{worker}.safetensors"])
    return {
        "signature": results["signature"],
        "bleu": results["bleu"],
        "model_sha256": hashlib.sha256(exported).hexdigest(),
        "killed_at_step": killed_at,
        "bytes_written": files,
        "seconds": round(time.perf_counter() - started, 1),
    }


def kill_worker(folder: Path, process: subprocess.Popen[bytes], phase: int) -> int:
    """Kill worker 1 in the middle of its second round. Returns the step at that time."""
    metrics = folder / "run" / "worker_1" / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        steps = [int(found[1]) for line in lines if (found := re.search(r'"step": (\d+)', line))]
        if steps and max(steps) >= phase + phase // 2:
            found = subprocess.run(
                ["pgrep", "-f", f"train.py .*{folder / 'run'} --gap-worker 1"], capture_output=True, text=True
            )
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            return max(steps)
        time.sleep(0.05)
    raise SystemExit("the run ended before worker 1 could be killed")


if __name__ == "__main__":
    sys.exit(main())
