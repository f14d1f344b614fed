"""benchmarks/quality/run.py with a script in place of the example, and a whole table."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quality_runs import QUALITY, leave_results, small_run

pytest.importorskip("rich")

import background
import presets
import records
import report
import run as runner

SCRIPT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
print("step 3/4", flush=True)
{body}
(folder / "results.json").write_text((folder / "prepared.json").read_text())
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], list[str]]:
    """Set the scripts of the runs, by name; return the arguments of `main`."""

    def prepare(bodies: dict[str, str]) -> list[str]:
        def command(run: records.Run, data: Path, out: Path, python: str = "python") -> list[str]:
            folder = out / run.name
            if not (folder / "prepared.json").exists() and python != "python":
                leave_results(run, tmp_path / "prepared")
                source = tmp_path / "prepared" / run.name
                (source / "results.json").rename(folder / "prepared.json")
                (source / "metrics.jsonl").rename(folder / "metrics.jsonl")
            return [python, "-c", SCRIPT.format(body=bodies.get(run.row.name, "")), str(folder)]

        monkeypatch.setattr(records.Run, "command", command)
        rows = ["--rows", "dense", "static", "cyclic_3"]
        return ["--preset", "smoke", *rows, "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]

    return prepare


def stored(tmp_path: Path) -> list[str]:
    return [found["row"] for found in records.read(tmp_path / "results" / "quality_smoke.jsonl")]


def test_a_run_that_fails_does_not_stop_the_others_and_is_run_again(
    scripted: Callable[[dict[str, str]], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = scripted({"static": "sys.exit('the reason')"})
    assert runner.main([*arguments, "--jobs", "2"]) == 1
    shown = capsys.readouterr().out
    assert "static_s0.8_seed0: FAILED, ended with status 1" in shown and "the reason" in shown
    assert sorted(stored(tmp_path)) == ["cyclic_3", "dense"]
    arguments = scripted({"dense": "sys.exit('must not be run again')"})
    assert runner.main([*arguments, "--list"]) == 0
    listed = re.findall(r"seed0 +(.*)", capsys.readouterr().out)
    assert listed == ["finished", "to go on", "finished"]
    assert runner.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 runs are finished already" in shown and "FAILED" not in shown
    assert stored(tmp_path)[-1] == "static"


def test_a_finished_run_is_collected_without_being_run(
    scripted: Callable[[dict[str, str]], list[str]], tmp_path: Path
) -> None:
    arguments = scripted({})
    assert runner.main(arguments) == 0
    (tmp_path / "results" / "quality_smoke.jsonl").unlink()
    assert runner.main(scripted(dict.fromkeys(("dense", "static", "cyclic_3"), "sys.exit(1)"))) == 0
    assert stored(tmp_path) == ["dense", "static", "cyclic_3"]


def test_an_interrupt_ends_the_children(
    scripted: Callable[[dict[str, str]], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "saved"
    waits = f"try:\n    time.sleep(60)\nfinally:\n    pathlib.Path({str(marker)!r}).touch()"
    arguments = scripted({"dense": waits})
    seen: list[runner.Job] = []

    def update(table: runner.Table, jobs: list[runner.Job], waiting: int) -> None:
        if "step 3/4" in jobs[0].log.read_text():  # the child is inside its `try`, or about to enter it
            seen.append(jobs[0])
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.Table, "update", update)
    before = signal.getsignal(signal.SIGTERM)
    assert runner.main([*arguments, "--jobs", "1"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert marker.exists() and seen[0].process.returncode
    assert not (tmp_path / "results").exists()


def test_a_run_is_not_started_twice(tmp_path: Path, scripted: Callable[[dict[str, str]], list[str]]) -> None:
    scripted({"static": "time.sleep(60)"})
    run = small_run()
    job = runner.start(run, tmp_path, tmp_path / "out")
    try:
        with pytest.raises(runner.Busy, match="another process"):
            runner.start(run, tmp_path, tmp_path / "out")
    finally:
        runner.stop([job], grace=20)
    assert job.process.returncode


def test_a_table_in_the_background_is_stopped_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
        "print('begun')\n"
        "time.sleep(60)\n"
    )

    def times(word: str) -> int:
        return (out / "background.log").read_text().count(word)

    assert background.alive(out) is None and background.stop(out, 1)
    for attempt in (1, 2):
        number = background.start(script, ["--rows", "dense"], out)
        assert background.alive(out) == number
        with pytest.raises(ValueError, match=f"has a process already, {number}"):
            background.start(script, [], out)
        wait_for(lambda attempt=attempt: times("begun") == attempt)
        assert os.getpriority(os.PRIO_PROCESS, number) == 19
        assert background.stop(out, 20) and background.alive(out) is None
        assert times("saved") == attempt
    assert runner.main(["--preset", "smoke", "--out", str(out), "--stop"]) == 0
    assert "nothing runs" in capsys.readouterr().out
    assert runner.main(["--preset", "smoke", "--background"]) == 2


def wait_for(reached: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_progress_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert runner.fraction(log, 0) == 0.0
    log.write_text("step 50/200  loss 3\nsomething\nstep 100/200  loss 2\nmore\n")
    assert runner.fraction(log, 0) == 0.5
    assert runner.fraction(log, log.stat().st_size) == 0.0
    log.write_text("[worker 1] step 9/10\n[worker 0] step 1/10  loss 3\n")
    assert runner.fraction(log, 0) == 0.1


@pytest.mark.slow
def test_the_smoke_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(QUALITY / "run.py"), "--preset", "smoke", "--out", str(tmp_path / "runs")]
    command += ["--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["row"]: line for line in records.read(tmp_path / "quality_smoke.jsonl")}
    assert tuple(found) == presets.SMOKE.rows
    assert all(line["epochs"] == 8 and len(line["validation_loss"]) == 8 for line in found.values())
    assert found["dense"]["training_flops"] == 1 > found["cyclic_3"]["training_flops"] > found["rigl"]["training_flops"]
    assert str(tmp_path) not in (tmp_path / "quality_smoke.jsonl").read_text()
    assert report.main(["--results", str(tmp_path), "--no-plot"]) == 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "4 of 4 runs are finished already" in again.stdout
