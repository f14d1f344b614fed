"""`gap-ds parallel`: real processes, their output, and that none is left running whatever happens."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")

from gap_ds.cli import launch

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import os, sys, time
from pathlib import Path
worker = sys.argv[sys.argv.index("--gap-worker") + 1]
names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
# One write for the whole line: two ranks of a worker share its pipe.
os.write(1, (" ".join([worker, *(os.environ[n] for n in names), *sys.argv[1:]]) + chr(10)).encode())
"""


def script(folder: Path, body: str) -> str:
    path = folder / "work.py"
    path.write_text(SCRIPT + body, encoding="utf-8")
    return str(path)


def start(command: list[str], **options: object) -> tuple[int, list[str]]:
    out = io.StringIO()
    settings: dict[str, object] = {"workers": 2, "ranks": 1, "launcher": None, "out": out} | options
    status = launch.run(command, **settings)  # type: ignore[arg-type]
    return status, out.getvalue().splitlines()


def test_every_worker_has_its_number_its_port_and_its_arguments(tmp_path: Path) -> None:
    status, lines = start([script(tmp_path, ""), "--out", "run_{worker}"], extra=["--exchange", "here"])
    assert status == 0
    said = sorted(re.fullmatch(r"\[worker (\d)\] (.*)", line).groups() for line in lines)  # type: ignore[union-attr]
    ports = {text.split()[3] for _, text in said}
    assert len(said) == 2 and len(ports) == 2
    for worker, text in said:
        number, rank, size, _, *arguments = text.split()
        assert (number, rank, size) == (worker, "0", "1")
        assert arguments == ["--out", f"run_{worker}", "--gap-worker", worker, "--exchange", "here"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_several_ranks_by_a_launcher(tmp_path: Path, launcher: str) -> None:
    status, lines = start([script(tmp_path, "")], ranks=2, launcher=launcher)
    assert status == 0
    found = [line.split()[2:5] for line in lines if re.match(r"\[worker \d\] \d [01] 2 ", line)]
    assert sorted(row[:2] for row in found) == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]


def test_one_failing_worker_ends_all_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "Path(sys.argv[1], worker).write_text(str(os.getpid()))\n"
    body += "sys.exit('the reason') if worker == '1' else time.sleep(300)\n"
    started = time.monotonic()
    status, _ = start([script(tmp_path, body), str(tmp_path)])
    assert status == 1 and time.monotonic() - started < 60
    said = capsys.readouterr().err
    assert "worker 1 ended with status 1" in said and "    the reason" in said
    assert not any(_runs(int((tmp_path / worker).read_text())) for worker in "01" if (tmp_path / worker).exists())


def test_a_worker_may_be_started_again(tmp_path: Path) -> None:
    body = "mark = Path(sys.argv[1], 'mark')\n"
    body += "if worker == '1' and not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), 9)\n"
    status, lines = start([script(tmp_path, body), str(tmp_path)], restarts=1)
    assert status == 0
    assert "[worker 1] ended with status 137: starting it again" in lines
    assert sum(line.startswith("[worker 1] 1 0 1") for line in lines) == 2


def test_a_signal_reaches_the_workers_and_nothing_is_left(tmp_path: Path) -> None:
    body = "import signal\n"
    body += "def leave(*_): Path(sys.argv[1], 'left' + worker).touch(); sys.exit(0)\n"
    body += "signal.signal(signal.SIGTERM, leave)\n"
    body += "Path(sys.argv[1], 'pid' + worker).write_text(str(os.getpid()))\ntime.sleep(300)\n"
    command = [sys.executable, "-m", "gap_ds.cli", "parallel", "--workers", "2", "--", script(tmp_path, body)]
    process = subprocess.Popen([*command, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert len(list(tmp_path.glob("left*"))) == 2
    assert not any(_runs(int(path.read_text())) for path in tmp_path.glob("pid*"))


@pytest.mark.parametrize("command", [[], ["missing.py"], ["-c"]])
def test_no_script(command: list[str]) -> None:
    with pytest.raises(ValueError, match=r"is no script. Give one after --"):
        start(command)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else True
