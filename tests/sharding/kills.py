"""Kills runs (SIGKILL) while they step, save, cross a boundary or exchange, and starts them again until they finish."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from launch import HERE, free_port

#: Seconds that one start may take to come to its next kill, or to the end.
PATIENCE = 240.0
#: kind -> jobs (the workers of parallel GaP, or one), and ranks of each.
KINDS = {
    "zero2": (1, 2),
    "fsdp2": (1, 2),
    "zero2_packed": (1, 2),
    "fsdp2_packed": (1, 2),
    "parallel": (2, 1),
    "parallel_fsdp2": (2, 2),
}


@dataclass
class Run:
    """The processes of a run by their number: those of worker 0, rank by rank, then those of worker 1."""

    kind: str
    out: Path
    rounds: int
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def numbers(self) -> range:
        workers, ranks = KINDS[self.kind]
        return range(workers * ranks)

    def of_worker(self, worker: int) -> list[int]:
        ranks = KINDS[self.kind][1]
        return list(range(worker * ranks, (worker + 1) * ranks))

    def running(self) -> list[int]:
        return [i for i, process in self.processes.items() if process.poll() is None]

    def start(self, fate: dict[int, str]) -> None:
        """Starts what is not running. `fate`: where some of them will kill themselves (see worker_killed.py)."""
        port = free_port()
        workers, ranks = KINDS[self.kind]
        for i in sorted(set(self.numbers) - set(self.running())):
            worker, rank = divmod(i, ranks)
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port + worker),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
            }
            if not torch.cuda.is_available():
                environment["DS_ACCELERATOR"] = "cpu"
            command = [sys.executable, str(HERE / "worker_killed.py"), str(self.out), self.kind, str(self.rounds)]
            command += ["--gap-worker", str(worker)] if workers > 1 else []
            command += ["--killed", fate[i]] if i in fate else []
            log = (self.out / f"log.{i}").open("ab")
            self.processes[i] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.port = port

    def wait(self, who: Sequence[int]) -> list[int]:
        """Exit codes of some processes, when all of them have ended."""
        deadline = time.monotonic() + PATIENCE
        while any(self.processes[i].poll() is None for i in who):
            failed = [i for i, process in self.processes.items() if process.poll() not in (None, 0, -signal.SIGKILL)]
            assert not failed, f"{failed}: {(self.out / f'log.{failed[0]}').read_text()[-3000:]}"
            assert time.monotonic() < deadline, "hangs"
            time.sleep(0.01)
        return [self.processes[i].returncode for i in who]

    def kill(self, who: Sequence[int]) -> None:
        for i in who:
            self.processes[i].send_signal(signal.SIGKILL)
        for i in who:
            self.processes[i].wait()

    def end(self) -> None:
        self.kill(self.running())
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{getattr(self, 'port', 0)}_*"):
            buffer.unlink(missing_ok=True)


def finish(kind: str, out: Path, moments: list[str], seed: int, rounds: int) -> dict[str, Any]:
    """Runs to the end, killed once in each of `moments` (step, save, boundary, exchange); what happened.

    A kill hits both ranks of a job, or one of them (the other is then ended, too), or one of two workers with all its
    ranks. Which, at which occurrence of the moment, and how many milliseconds into it, is drawn from the seed; a moment
    WORKER:MOMENT:N:MS sets it.
    """
    out.mkdir(parents=True)
    rng = random.Random(seed)
    run = Run(kind, out, rounds)
    workers, ranks = KINDS[kind]
    kills = []
    try:
        for moment in moments:
            if ":" in moment:
                number, _, fate = moment.partition(":")
                victim, both = int(number), False
            else:
                victim, both = rng.randrange(2), workers == 1 and rng.random() < 0.5
                fate = f"{moment}:{rng.randint(1, 6 if moment == 'step' else 3)}:{rng.uniform(0, 20):.1f}"
            if workers > 1:  # the first rank of a worker kills itself, and here the others are killed with it
                job = run.of_worker(victim)
                hit = job[:1]
            else:
                job = list(run.numbers)
                hit = job if both else [victim]
            if set(job) & set(run.running()):  # a worker that has gone on alone
                run.kill(job)
                kills.append({"moment": "any", "both": ranks > 1})
            run.start(dict.fromkeys(hit, fate))
            codes = run.wait(hit[:1])
            assert codes == [-signal.SIGKILL], f"the run was over before {fate} came: {codes}"
            run.kill(job)  # another rank of the job dies too, or hangs in a collective
            kills.append({"moment": fate.partition(":")[0], "both": both or (workers > 1 and ranks > 1)})
        run.start({})
        codes = run.wait(run.numbers)
        assert codes == [0 for _ in codes]
        finals = sorted(path.read_text() for path in out.glob("final.*"))
        return {"kills": kills, "starts": [int(x) for x in (out / "resumed").read_text().split()], "finals": finals}
    finally:
        run.end()
