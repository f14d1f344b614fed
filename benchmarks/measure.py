"""Shared by all benchmarks: machine and versions, interleaved timing, memory, and files of results.

A result is a JSON file in `benchmarks/results`, {"benchmark", "command", "note", "machine", "rows"}, with its rows as a
Markdown table beside it. Rows made by separate commands (`add`) each record their command, machine and time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils import benchmark as torch_benchmark
from torch.utils import collect_env

from gap_ds import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Measured = TypeVar("Measured")


def machine() -> dict[str, Any]:
    """Return the hardware, versions and load that figures depend on. The load average includes this process."""
    about = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gap_ds": __version__,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    return about | _gpu() if torch.cuda.is_available() else about


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_GB": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) or "unknown",
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}"


def command() -> str:
    """Return the command line of this process, relative to the repository and without `--out`."""
    words = [str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return " ".join(["python", *words])


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark, described by the first line of `doc`."""
    result = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    result.add_argument("--quick", action="store_true", help="a size for tests")
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return result


def device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call, in seconds. On a GPU it ends when the GPU is idle."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def both_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall time of one call and the CPU time of all threads of this process, in seconds.

    CPU time excludes time taken by other processes, but not their effect on the caches, and most of the waiting for
    other ranks. It is meaningless on a GPU.
    """
    started = time.process_time()
    wall = seconds(work)
    return wall, time.process_time() - started


def device_seconds(work: Callable[[], object], calls: int = 50) -> float:
    """Return the mean time of `calls` calls in sequence, in seconds. On a GPU launches overlap with its work."""
    return torch_benchmark.Timer("work()", globals={"work": work}).timeit(calls).mean


def synchronize() -> None:
    """Wait until the GPU of this process, if there is one, is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    timer: Callable[[Callable[[], object]], Measured] = seconds,  # type: ignore[assignment]
) -> dict[str, list[Measured]]:
    """Time each work once per round, after one round that does not count. Returns the times by name.

    The order rotates: A B, B A, A B of two works; A B C, B C A, C A B of three. Other load on the machine affects all
    works alike, so ratios within a round are more reliable than times. torch.utils.benchmark and pytest-benchmark time
    one work after the other.

    Args:
        before: called before each work, untimed.
        timer: measures one call of a work.
    """
    names = list(works)
    for work in works.values():
        before()
        work()
    times: dict[str, list[Measured]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before()
            times[name].append(timer(works[name]))
    return times


def compared(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """Return for each work the median in ms, and its time relative to `base` in the same round: median, quartiles.

    `interval` is the 95 % confidence interval of the median ratio.

    >>> compared({"a": [1.0, 1.0, 2.0], "b": [2.0, 3.0, 2.0]}, "a")["b"]
    {'ms': 2000.0, 'ratio': 2.0, 'quartiles': [1.5, 2.5], 'interval': [1.0, 3.0]}
    """
    rows = {}
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times[base], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        rows[name] = {
            "ms": round(1e3 * statistics.median(values), 3),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "interval": [round(value, 3) for value in interval(ratios)],
        }
    return rows


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the median, by order statistics, for any distribution.

    The whole range for fewer than 6 values.

    >>> interval(list(range(100)))
    (39, 60)
    >>> interval([3, 1, 2])
    (1, 3)
    """
    n, ordered = len(values), sorted(values)
    # P(fewer than k of n values below the median), as for a fair coin; the largest k with at most 2.5 % on each side.
    total, k = 0.0, 0
    while k < n // 2 and (total := total + _coin(n, k)) <= (1 - level) / 2:
        k += 1
    return ordered[max(0, k - 1)], ordered[n - max(1, k)]


def _coin(n: int, k: int) -> float:
    """Return the probability of k heads in n throws of a fair coin."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def on_ranks(ranks: int, work: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """Call `work(*arguments)` in fresh processes, which form a group if several. Returns the result of rank 0."""
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
    """Return by how many bytes the memory of this process (on a GPU: its tensors there) rises while `work` runs.

    None where the system has no such figure.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if not reset_peak():
        work()
        return None
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def reset_peak() -> bool:
    """Return freed memory to the system and restart the peak `VmHWM` of this process. False if the system cannot."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def tensor_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Return (left, peak) in bytes: tensors that `work` leaves allocated, and their peak, both above the state before.

    Counted by PyTorch's allocator, to the byte. Memory of NumPy (blocks of a megabyte in `bitmask`) is not included.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    left = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        left += event.nbytes()
        peak = max(peak, left)
    return left, peak


def memory() -> int:
    """Return the bytes of this process: on a GPU its tensors there, else its resident memory without mapped files.

    The system drops and rereads pages of libraries, so with mapped files two runs differ by many megabytes.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return status("RssAnon") + status("RssShmem")


def status(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def write(benchmark: str, rows: Sequence[Mapping[str, Any]], out: Path, note: str = "") -> None:
    """Write OUT/BENCHMARK.json and .md, and print the table."""
    about = machine()
    result = {"benchmark": benchmark, "command": command(), "note": note, "machine": about, "rows": list(rows)}
    _save(benchmark, result, out, [f"`{result['command']}`", _listed(about), *([note] if note else [])])
    print(table(rows))


def add(
    benchmark: str, rows: Sequence[Mapping[str, Any]], out: Path, note: str, key: Sequence[str], made: str | None = None
) -> None:
    """Add rows to OUT/BENCHMARK.json and .md. They replace rows with equal values of all of `key`.

    A table can thus be made in pieces. "made" in each row has its command, date and machine.

    Args:
        made: the command, if it is not that of this process.
    """
    about = {"command": made or command(), **machine()}
    path = out / f"{benchmark}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    new = {tuple(row.get(k) for k in key): {**row, "made": about} for row in rows}
    merged = {tuple(row.get(k) for k in key): row for row in before if "made" in row} | new
    result = {"benchmark": benchmark, "command": command(), "note": note, "machine": about, "rows": [*merged.values()]}
    commands = list(dict.fromkeys(f"`{row['made']['command']}`" for row in merged.values()))
    _save(benchmark, result, out, ["\n".join(f"- {each}" for each in commands), _listed(about), note])
    print(table(rows))


def _save(benchmark: str, result: dict[str, Any], out: Path, about: Sequence[str]) -> None:
    shown = [{k: v for k, v in row.items() if k != "made"} | _made(row) for row in result["rows"]]
    save_json(out / f"{benchmark}.json", result)
    save(out / f"{benchmark}.md", "\n\n".join([f"# {benchmark}", *about, table(shown)]))


def save_json(path: Path, result: Any) -> None:
    """Write a result as JSON. The file is whole or as it was."""
    save(path, json.dumps(result, indent=1) + "\n")


def save(path: Path, text: str) -> None:
    """Write a text file. It is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _made(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return when a row was made, under which load, with which torch."""
    if (made := row.get("made")) is None:
        return {}
    return {"date": made["date"], "load": made["load_average"][0], "torch": made["torch"]}


def _listed(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items() if value is not None and key != "command")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as Markdown, with one column for each key of any row.

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
