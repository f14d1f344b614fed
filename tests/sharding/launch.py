"""Runs a worker script in real processes that form a group over gloo, and always ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections."""
    for port in range(20000 + os.getpid() * 37 % 10000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def run_workers(script: str, ranks: int, out: Path, *arguments: str, timeout: float = 900.0) -> None:
    """Runs `python SCRIPT OUT ...` on `ranks` processes; they leave their results in `out`.

    Raises:
        AssertionError: a process failed (with the end of its output) or the time was over; none is left running.
    """
    port = free_port()
    workers, logs = [], []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]),
        }
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        logs.append((out / f"{script}.{rank}.log").open("w+"))
        command = [sys.executable, str(HERE / script), str(out), *arguments]
        workers.append(subprocess.Popen(command, env=environment, stdout=logs[-1], stderr=subprocess.STDOUT))
    try:
        end = time.monotonic() + timeout
        while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
            if any(worker.poll() not in (None, 0) for worker in workers):
                break
            time.sleep(0.1)
    finally:
        codes = [worker.poll() for worker in workers]
        for worker in workers:
            worker.kill()
            worker.wait()
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):  # DeepSpeed leaves 66 MiB for each rank
            buffer.unlink(missing_ok=True)
    if any(codes):
        time.sleep(0.2)
    if codes != [0] * ranks:
        first = next(rank for rank, code in enumerate(codes) if code != 0 and (code or not any(codes)))
        logs[first].seek(0)
        raise AssertionError(f"{script}: exit codes {codes}; rank {first} said:\n{logs[first].read()[-6000:]}")
    for log in logs:
        log.close()
