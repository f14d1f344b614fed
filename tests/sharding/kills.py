"""Kills runs (SIGKILL) while they step, save, cross a boundary or exchange, and starts them again until they finish."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from launch import HERE, free_port

#: Seconds that one start may take to come to its next kill, or to the end.
PATIENCE = 240.0


@dataclass
class Run:
    """The processes of a run: 2 ranks of one job, or 2 workers of 1 rank each."""

    kind: str
    out: Path
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        """Starts what is not running."""
        port = free_port()
        for i in (0, 1):
            if i in self.processes and self.processes[i].poll() is None:
                continue
            parallel = self.kind == "parallel"
            told = {"RANK": "0" if parallel else str(i), "WORLD_SIZE": "1" if parallel else "2"}
            environment = {
                **os.environ,
                **told,
                "LOCAL_RANK": told["RANK"],
                "LOCAL_WORLD_SIZE": told["WORLD_SIZE"],
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port + (i if parallel else 0)),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
            }
            if not torch.cuda.is_available():
                environment["DS_ACCELERATOR"] = "cpu"
            command = [sys.executable, str(HERE / "worker_killed.py"), str(self.out), self.kind]
            command += ["--gap-worker", str(i)] if parallel else []
            log = (self.out / f"log.{i}").open("ab")
            (self.out / f"status.{i}").unlink(missing_ok=True)
            self.processes[i] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.port = port

    def status(self, i: int) -> str:
        try:
            return (self.out / f"status.{i}").read_text().split(" ")[0]
        except OSError:
            return "start"

    def kill(self, who: list[int]) -> None:
        for i in who:
            self.processes[i].send_signal(signal.SIGKILL)
            self.processes[i].wait()

    def end(self) -> None:
        self.kill([i for i, process in self.processes.items() if process.poll() is None])
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{getattr(self, 'port', 0)}_*"):
            buffer.unlink(missing_ok=True)


def finish(kind: str, out: Path, moments: list[str], seed: int) -> dict[str, Any]:
    """Runs to the end, killed once in each of `moments` (step, save, boundary, exchange); what happened.

    A kill hits both ranks of a job, or one of them (the other must then end by itself or is ended after it was seen to
    wait), or one of two workers.
    """
    out.mkdir(parents=True)
    rng = random.Random(seed)
    run = Run(kind, out)
    kills = []
    try:
        for moment in [*moments, None]:
            run.start()
            patience = rng.randrange(1, 12)  # how many times the moment is let pass first
            victim, inside = rng.randrange(2), False
            started = time.monotonic()
            while True:
                codes = [run.processes[i].poll() for i in (0, 1)]
                if moment is None and codes == [0, 0]:
                    break
                failed = [i for i, code in enumerate(codes) if code not in (None, 0)]
                assert not failed, f"{failed} ended with {codes}: {(out / f'log.{failed[0]}').read_text()[-3000:]}"
                assert time.monotonic() - started < PATIENCE, f"hangs: {[run.status(i) for i in (0, 1)]}"
                if moment is not None and codes == [0, 0]:
                    break  # it has finished before this moment came again
                here = run.status(victim) == moment
                patience -= here and not inside
                inside = here
                if moment is not None and here and patience <= 0 and codes[victim] is None:
                    time.sleep(rng.uniform(0, 0.01))
                    both = kind != "parallel" and rng.random() < 0.5
                    run.kill([0, 1] if both else [victim])
                    kills.append({"moment": moment, "both": both})
                    if kind != "parallel" and not both:  # the other rank notices, or hangs in a collective: end it
                        time.sleep(0.2)
                        run.kill([1 - victim])
                    break
                time.sleep(0.001)
            if moment is not None and codes == [0, 0]:
                break
        finals = sorted(path.read_text() for path in out.glob("final.*"))
        return {"kills": kills, "starts": [int(x) for x in (out / "resumed").read_text().split()], "finals": finals}
    finally:
        run.end()
