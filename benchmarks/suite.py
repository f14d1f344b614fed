"""Time of the tests, part by part, as in `make test`.

    python benchmarks/suite.py

Writes test_times.json. Run it through `make test-times` on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path
from typing import Any

import measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes of the tests that run side by side")
    parser.add_argument("--only", nargs="+", help="a part of the tests instead, as pytest takes it")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    spread = ["-n", str(args.jobs), "--dist", "loadfile", "--no-loadscope-reorder"]
    parts = {
        "tests of one process, doctests": [*spread, "--ignore", "tests/sharding"],
        "tests of sharded runs": [*spread, "tests/sharding"],
    }
    rows = [timed(name, words) for name, words in ({"some": args.only} if args.only else parts).items()]
    measure.write("test_times", rows, args.out, f"`make test` without lint, {args.jobs} jobs")
    return max(row["status"] for row in rows)


def timed(name: str, words: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        started = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", *words, f"--junitxml={report}"]
        status = subprocess.run(command, cwd=measure.ROOT).returncode
        seconds = time.perf_counter() - started
        cases = xml.parse(report).findall(".//testcase")
    slowest = max(cases, key=lambda case: float(case.get("time", 0)), default=None)
    files: Counter[str] = Counter()
    for case in cases:
        files[str(case.get("classname")).removeprefix("tests.")] += float(case.get("time", 0))
    return {
        "part": name,
        "tests": len(cases),
        "seconds": round(seconds, 1),
        "slowest": f"{slowest.get('classname')}.{slowest.get('name')}" if slowest is not None else "",
        "slowest_s": round(float(slowest.get("time", 0)), 1) if slowest is not None else 0.0,
        "longest_files_s": ", ".join(f"{file} {seconds:.0f}" for file, seconds in files.most_common(5)),
        "status": status,
    }


if __name__ == "__main__":
    sys.exit(main())
