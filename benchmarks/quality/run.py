"""Run a table of methods x sparsities x seeds on one task with one budget; continue after a stop.

    python benchmarks/quality/run.py --preset cpu --data DATA --out RUNS [--jobs 2] [--rows NAME...] [--list]

Each run is an example's training script in a separate process and folder, RUNS/<row>_s<sparsity>_seed<seed>/. Results
go to benchmarks/results/quality_<preset>.jsonl, from which `report.py` makes the table. Seed 0 of all rows runs first.

Ctrl-C or SIGTERM (also from `timeout -s INT 570 python ...`) lets the runs save and ends; the same command continues. A
failed run is reported with the end of its log, and the others continue. Exit status: 0 if all runs are finished, 1 if
some are not, 2 for a mistake in the command, 130 after Ctrl-C.

With --background the command returns at once and the runs go on with the lowest priority, one command for each folder
RUNS; `--list` shows their states, `--stop` ends them as Ctrl-C does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NoReturn

import background
import records
from presets import PRESETS, Preset
from records import ROOT, Run
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rows import BY_NAME, Row, extra_rows

GRACE_S = 90  # seconds for a run to finish its step and save
QUIET_S = 300  # seconds between two lines of progress without a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing runs of a table; return the exit status."""
    args = parser().parse_args(argv)
    try:
        runs = plan(PRESETS[args.preset], args)
        if args.stop or args.background:
            return detached(args, sys.argv[1:] if argv is None else argv)
        return execute(runs, args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--preset", choices=list(PRESETS), required=True)
    result.add_argument("--data", type=Path, help="folder with the folders of the data sets; smoke needs none")
    result.add_argument("--out", type=Path, help="folder of the runs")
    result.add_argument("--jobs", type=int, help="runs at a time; default: the preset's")
    result.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only; default: the preset's")
    result.add_argument("--sparsities", nargs="+", type=float, metavar="S", help="default: the preset's")
    result.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="of every row; default: the seeds of each row"
    )
    result.add_argument("--extra", type=Path, metavar="FILE", help="JSON with rows to run instead: name -> GaP config")
    result.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the JSONL file")
    result.add_argument("--list", action="store_true", help="list the runs and their states; start nothing")
    result.add_argument("--background", action="store_true", help="return at once; log: OUT/background.log")
    result.add_argument("--stop", action="store_true", help="let the runs of --background save and end")
    return result


def detached(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the same command in the background, or stop that of the folder."""
    if args.out is None:
        raise ValueError("--out: must be set, to a folder for the runs.")
    if args.stop:
        ended = background.stop(args.out, GRACE_S + 10)
        print("nothing runs in the background" if ended else f"{background.alive(args.out)} has not ended yet")
        return int(not ended)
    number = background.start(Path(__file__), [word for word in argv if word != "--background"], args.out)
    print(f"process {number}; its log is {args.out / 'background.log'}, --list shows the runs, --stop ends them")
    return 0


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(preset: Preset, args: argparse.Namespace) -> list[Run]:
    """Return the requested runs, in the order of their start. ValueError for an invalid name or number."""
    if args.extra:
        rows = extra_rows(args.extra, preset.epochs)
        named = {row.name: row for row in rows}
    else:
        rows = tuple(BY_NAME[name] for name in preset.rows)
        named = BY_NAME
    if unknown := sorted(set(args.rows or ()) - set(named)):
        raise ValueError(f"--rows {unknown[0]}: no such row, only {', '.join(named)}.")
    if args.rows:
        rows = tuple(named[name] for name in dict.fromkeys(args.rows))
    for sparsity in args.sparsities or ():
        if not 0 < sparsity < 1:
            raise ValueError(f"--sparsities {sparsity:g}: must lie in (0, 1); the dense run is a row.")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: must be at least 1.")
    return order(preset, rows, args.sparsities or preset.sparsities, args.seeds or preset.seeds)


def order(preset: Preset, rows: Iterable[Row], sparsities: Sequence[float], seeds: Sequence[int] | None) -> list[Run]:
    """Return the runs seed by seed, then sparsity by sparsity: a table stopped early is complete up to there."""
    rows = list(rows)
    runs: list[Run] = []
    every = dict.fromkeys([*(s for row in rows for s in row.sparsities or ()), *sparsities])
    for seed in sorted({seed for row in rows for seed in seeds or row.seeds}):
        of_seed = [row for row in rows if seed in (seeds or row.seeds)]
        runs += [Run(preset, row, 0.0, seed) for row in of_seed if row.dense]
        sparse = [row for row in of_seed if not row.dense]
        runs += [Run(preset, row, s, seed) for s in every for row in sparse if s in (row.sparsities or sparsities)]
    return runs


def execute(runs: list[Run], args: argparse.Namespace) -> int:
    """Collect finished runs and run the others."""
    preset, out = PRESETS[args.preset], args.out
    store = args.results / f"quality_{preset.name}{'_extra' if args.extra else ''}.jsonl"
    known = {records.key(record) for record in records.read(store)}
    if args.list:
        for run in runs:
            print(f"{run.name:36} {state(run, known, out)}")
        return 0
    if out is None:
        raise ValueError("--out: must be set, to a folder for the runs.")
    if preset.parts and args.data is None:
        raise ValueError(f"--data: must be set; preset {preset.name!r} needs {', '.join(preset.parts)} in it.")
    out, data = out.resolve(), (args.data or Path()).resolve()
    missing = [run for run in runs if run.key not in known]
    for run in missing:
        records.check_folder(run, out)
    if missing and preset.parts:
        records.joined(preset, data, out)
    with Table(len(runs), len(runs) - len(missing)) as table:
        return Queue(missing, data, out, store, args.jobs or preset.jobs, table).work()


def state(run: Run, known: set[records.Key], out: Path | None) -> str:
    """Return the state of a run in words."""
    if run.key in known:
        return "finished"
    if out is None or not (out / run.name).exists():
        return "to run"
    return "finished, to collect" if records.finished(run, out) else "to go on"


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A run in training."""

    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    offset: int  # start of this attempt in the log, in bytes
    lock: IO[bytes]
    started: float
    first: float  # fraction done before this attempt
    done: float = 0.0  # fraction done now


class Busy(ValueError):
    """Another process runs it."""


class Queue:
    """Keeps up to `jobs` runs going until none is left. A run counts as many as it has workers."""

    def __init__(self, runs: Sequence[Run], data: Path, out: Path, store: Path, jobs: int, table: Table) -> None:
        self._waiting, self._running, self._failed = list(runs), list[Job](), list[Run]()
        self._data, self._out, self._store, self._jobs, self._table = data, out, store, jobs, table

    def work(self) -> int:
        """Run the queue. Returns 0, 1 if a run failed, or 130 after Ctrl-C, SIGTERM or SIGHUP. Ends all children."""
        before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            while self._waiting or self._running:
                while self._waiting and self._fits(self._waiting[0]):
                    self._begin(self._waiting.pop(0))
                for job in [job for job in self._running if job.process.poll() is not None]:
                    self._running.remove(job)
                    self._end(job)
                self._table.update(self._running, len(self._waiting))
                if self._running:
                    time.sleep(0.3)
        except KeyboardInterrupt:
            self._table.say(f"ends: {len(self._running)} runs are saving; the same command goes on with them")
            return 130
        finally:
            stop(self._running)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._failed:
            self._table.say(f"not finished: {', '.join(run.name for run in self._failed)}")
        return int(bool(self._failed))

    def _fits(self, run: Run) -> bool:
        needed = run.dense(self._out).parent if run.row.after_dense else None
        if any(self._out / job.run.name == needed for job in self._running):
            return False
        busy = sum(job.run.row.workers for job in self._running)
        return not busy or busy + run.row.workers <= self._jobs

    def _begin(self, run: Run) -> None:
        try:
            if records.finished(run, self._out):
                return self._keep(run)
            self._running.append(start(run, self._data, self._out))
            self._table.say(f"{run.name}: started")
        except (ValueError, OSError) as error:
            self._fail(run, str(error))

    def _end(self, job: Job) -> None:
        job.lock.close()
        if job.process.returncode == 0 and records.finished(job.run, self._out):
            try:
                return self._keep(job.run, job.first)
            except (ValueError, KeyError, OSError) as error:
                return self._fail(job.run, f"its results cannot be read: {error!r}")
        self._fail(job.run, f"ended with status {job.process.returncode}:\n{tail(job.log, job.offset)}")

    def _keep(self, run: Run, before: float = 1.0) -> None:
        record = records.collect(run, self._out)
        records.append(self._store, record)
        for folder in run.folders(self._out):  # no longer needed, and most of a run's size
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self._table.finished(before)
        name, title = next(iter(run.preset.example.scores.items()))
        minutes = record["train_seconds"] / 60
        self._table.say(
            f"{run.name}: {title} {record[name]:.{run.preset.example.digits}f}, trained in {minutes:.1f} min"
        )

    def _fail(self, run: Run, reason: str) -> None:
        self._failed.append(run)
        self._table.failed()
        self._table.say(f"{run.name}: FAILED, {reason}")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def start(run: Run, data: Path, out: Path) -> Job:
    """Start or continue a run in a new session. Busy if another process runs it."""
    if run.row.after_dense and not run.dense(out).is_dir():
        raise ValueError(f"{run.dense(out)}: the dense model is not there, and the run needs it. Run its row first.")
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("ab")
    try:
        # The child inherits the lock: while it lives, even without this process, the run cannot start again.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Busy(f"{folder} is being run by another process.") from None
    (folder / "setup.txt").write_text(run.setup + "\n", encoding="utf-8")
    (folder / "gap.json").write_text(json.dumps(run.config, indent=1) + "\n", encoding="utf-8")
    log = folder / "log.txt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    if run.preset.threads:  # also one thread in tokenizers and similar libraries
        environment |= {"OMP_NUM_THREADS": str(run.preset.threads), "TOKENIZERS_PARALLELISM": "false"}
    first = fraction(log, 0) if any((each / "checkpoints").exists() for each in run.folders(out)) else 0.0
    with log.open("ab") as file:
        offset = file.tell()
        process = subprocess.Popen(
            run.command(data, out, sys.executable),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, through `stop`
            pass_fds=(lock.fileno(),),
        )
    return Job(run, process, log, offset, lock, time.monotonic(), first, first)


def stop(jobs: Sequence[Job], grace: float = GRACE_S) -> None:
    """Let runs save and end. Kill those left after `grace` seconds, or at a second Ctrl-C."""
    try:
        for job in jobs:
            _signal(job, signal.SIGINT)
        deadline = time.monotonic() + grace
        while any(job.process.poll() is None for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        for job in jobs:
            if job.process.poll() is None:
                for pid in (*descendants(job.process.pid), job.process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            job.process.wait()
            job.lock.close()


def _signal(job: Job, number: int) -> None:
    """Signal the run alone, which passes it on to its workers."""
    if job.process.poll() is None:
        job.process.send_signal(number)


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process, also those in other sessions."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text(encoding="ascii").split()):
                found += [*descendants(child), child]
    return found


def fraction(log: Path, offset: int) -> float:
    """Return the fraction of a run that is done, by the last `step 50/1976` in its log from `offset` bytes on."""
    steps = re.findall(r"^(?:\[worker 0\] )?step (\d+)/(\d+)", _end_of(log, offset), re.MULTILINE)
    return int(steps[-1][0]) / int(steps[-1][1]) if steps else 0.0


def tail(log: Path, offset: int, lines: int = 12) -> str:
    """Return the last lines of a log from `offset` bytes on."""
    return "\n".join(f"    {line}" for line in _end_of(log, offset).rstrip().splitlines()[-lines:])


def _end_of(log: Path, offset: int, size: int = 8192) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - size))
        return file.read().decode(errors="replace")


# --- progress ---------------------------------------------------------------------------------------------------------


class Table:
    """Progress: a bar on a terminal, else plain lines, with the time left, estimated from the work of this call."""

    def __init__(self, total: int, known: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._total, self._done, self._failed, self._gained = total, known, 0, 0.0
        self._began = self._spoke = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=max(1, total), completed=known, left="")

    def __enter__(self) -> Table:
        self._bar.start()
        self.say(f"{self._done} of {self._total} runs are finished already")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def finished(self, before: float) -> None:
        """Count a finished run. before: fraction that was done before this call."""
        self._done += 1
        self._gained += 1 - before

    def failed(self) -> None:
        """Count a failed run."""
        self._failed += 1

    def update(self, jobs: Sequence[Job], waiting: int) -> None:
        """Show the progress of the runs."""
        for job in jobs:
            job.done = max(job.done, fraction(job.log, job.offset))
        left = self.left(jobs, waiting)
        text = f"{self._done} of {self._total} runs" + (f", {self._failed} failed" if self._failed else "")
        self._bar.update(self._task, completed=self._done + sum(job.done for job in jobs), description=text, left=left)
        if self._bar.disable and time.monotonic() - self._spoke >= QUIET_S:
            self.say(f"{', '.join(f'{job.run.name} {job.done:.0%}' for job in jobs)}; {text} finished, {left}")

    def left(self, jobs: Sequence[Job], waiting: int) -> str:
        """Return the time left in words, at the speed of this call so far."""
        gained = self._gained + sum(job.done - job.first for job in jobs)
        to_do = waiting + sum(1 - job.done for job in jobs)
        if gained <= 0 or not to_do:
            return ""
        return f"about {duration((time.monotonic() - self._began) * to_do / gained)} left"

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self._spoke = time.monotonic()
        self.console.print(escape(f"[{self._done}/{self._total}] {text}"))


def duration(seconds: float) -> str:
    """Return seconds in words.

    >>> duration(50), duration(600), duration(7500)
    ('1 min', '10 min', '2 h 5 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    sys.exit(main())
