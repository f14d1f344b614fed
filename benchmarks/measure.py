"""What every benchmark says and does alike: machine and versions, work timed in turns, and how results are written.

A result is one JSON file in `benchmarks/results`, {"benchmark", "command", "machine", "rows"}, and the same rows as a
Markdown table beside it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing

from gap_ds import __version__

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What a figure depends on besides the command. The load average includes this process."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gap_ds": __version__,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}"


def command() -> str:
    """The command line of this process, without where its output went."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return "python benchmarks/" + " ".join(words)


def device() -> torch.device:
    """The GPU of this process where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call; on a GPU until its work is done."""
    _synchronize()
    started = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    works: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each work in each round, in the order A B C C B A A ..., after one round that is not counted.

    Whatever else the machine does falls on all alike, so ratios within a round are worth more than the times.
    `before` is called before each work, outside the time.
    """
    for work in works.values():
        before()
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in list(works) if turn % 2 == 0 else list(works)[::-1]:
            before()
            times[name].append(seconds(works[name]))
    return times


def compared(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """For each work its median in ms, and its time over that of `base` in the same round: median and quartiles.

    >>> compared({"a": [1.0, 1.0, 2.0], "b": [2.0, 3.0, 2.0]}, "a")["b"]
    {'ms': 2000.0, 'ratio': 2.0, 'quartiles': [1.5, 2.5]}
    """
    rows = {}
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times[base], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        rows[name] = {
            "ms": round(1e3 * statistics.median(values), 3),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return rows


def on_ranks(ranks: int, work: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """What `work(*arguments)` returns on rank 0, called in fresh processes that form a group (one: without a group)."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, folder, work, arguments), nprocs=ranks)  # type: ignore[attr-defined]
        return json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if ranks > 1:
        backend = "nccl" if torch.cuda.device_count() >= ranks else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = work(*arguments)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def peak_bytes(work: Callable[[], object]) -> int | None:
    """How far the memory of this process (on a GPU: of its tensors there) rises above the present while `work` runs.

    None where the system cannot say.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # what was freed is the system's again, not a reserve
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        work()
        return None
    before = memory()
    work()
    return _status("VmHWM") - before


def memory() -> int:
    """Bytes that this process has now: on a GPU its tensors there, else its resident memory."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def write(benchmark: str, rows: Sequence[Mapping[str, Any]], out: Path, note: str = "") -> None:
    """Writes OUT/BENCHMARK.json and .md, and prints the table."""
    about = machine()
    result = {"benchmark": benchmark, "command": command(), "note": note, "machine": about, "rows": list(rows)}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    where = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
    parts = [f"# {benchmark}", f"`{result['command']}`", where, *([note] if note else []), table(rows)]
    (out / f"{benchmark}.md").write_text("\n\n".join(parts), encoding="utf-8")
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown, one column for each key that any row has.

    >>> print(table([{"a": 1, "b": [0.5, 2]}, {"a": 2}]), end="")
    | a | b |
    |---|---|
    | 1 | 0.5 to 2 |
    | 2 |  |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [" | ".join(columns), "|".join(["---"] * len(columns))]
    lines = [f"| {lines[0]} |", f"|{lines[1]}|"]
    lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " to ".join(map(_cell, value)) if isinstance(value, list) else f"{value:,}" if _big(value) else str(value)


def _big(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 10_000
