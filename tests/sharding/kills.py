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
    rounds: int
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, fate: dict[int, str]) -> None:
        """Starts what is not running. `fate`: where some of them will kill themselves (see worker_killed.py)."""
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
            command = [sys.executable, str(HERE / "worker_killed.py"), str(self.out), self.kind, str(self.rounds)]
            command += ["--gap-worker", str(i)] if parallel else []
            command += ["--killed", fate[i]] if i in fate else []
            log = (self.out / f"log.{i}").open("ab")
            self.processes[i] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.port = port

    def wait(self, who: list[int]) -> list[int]:
        """Exit codes of some processes, when all of them have ended."""
        deadline = time.monotonic() + PATIENCE
        while any(self.processes[i].poll() is None for i in who):
            failed = [i for i, process in self.processes.items() if process.poll() not in (None, 0, -signal.SIGKILL)]
            assert not failed, f"{failed}: {(self.out / f'log.{failed[0]}').read_text()[-3000:]}"
            assert time.monotonic() < deadline, "hangs"
            time.sleep(0.01)
        return [self.processes[i].returncode for i in who]

    def kill(self, who: list[int]) -> None:
        for i in who:
            self.processes[i].send_signal(signal.SIGKILL)
            self.processes[i].wait()

    def end(self) -> None:
        self.kill([i for i, process in self.processes.items() if process.poll() is None])
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{getattr(self, 'port', 0)}_*"):
            buffer.unlink(missing_ok=True)


def finish(kind: str, out: Path, moments: list[str], seed: int, rounds: int) -> dict[str, Any]:
    """Runs to the end, killed once in each of `moments` (step, save, boundary, exchange); what happened.

    A kill hits both ranks of a job, or one of them (the other is then ended, too), or one of two workers. Which, at
    which occurrence of the moment, and how many milliseconds into it, is drawn from the seed.
    """
    out.mkdir(parents=True)
    rng = random.Random(seed)
    run = Run(kind, out, rounds)
    kills = []
    try:
        for moment in moments:
            victim, both = rng.randrange(2), kind != "parallel" and rng.random() < 0.5
            fate = f"{moment}:{rng.randint(1, 6 if moment == 'step' else 3)}:{rng.uniform(0, 20):.1f}"
            hit = [0, 1] if both else [victim]
            if victim in run.processes and run.processes[victim].poll() is None:  # a worker that has gone on alone
                run.kill([victim])
                kills.append({"moment": "any", "both": False})
            run.start(dict.fromkeys(hit, fate))
            codes = run.wait(hit[:1])
            assert codes == [-signal.SIGKILL], f"the run was over before {fate} came: {codes}"
            if kind != "parallel":  # the other rank dies too, or hangs in a collective
                run.kill([i for i in (0, 1) if run.processes[i].poll() is None])
            kills.append({"moment": moment, "both": both})
        run.start({})
        assert run.wait([0, 1]) == [0, 0]
        finals = sorted(path.read_text() for path in out.glob("final.*"))
        return {"kills": kills, "starts": [int(x) for x in (out / "resumed").read_text().split()], "finals": finals}
    finally:
        run.end()
