"""`gap-ds parallel`: real processes, their output, and that none is left running whatever happens.

The scripts here write files by `note`, and wait for those of others by `await_files`. Whatever runs with the test's
folder in its command line belongs to the test.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

pytest.importorskip("typer")

from gap_ds.parallel import launch

pytestmark = pytest.mark.timeout(300)

SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
FOLDER = Path(__file__).parent
worker, rank = sys.argv[sys.argv.index("--gap-worker") + 1], os.environ["RANK"]

def note(name, text=""):
    (FOLDER / f"{name}.part").write_text(str(text))
    (FOLDER / f"{name}.part").replace(FOLDER / name)

def await_files(pattern, count):
    while len([path for path in FOLDER.glob(pattern) if path.suffix != ".part"]) < count:
        time.sleep(0.01)

def save(number, _):
    for each in (signal.SIGINT, signal.SIGTERM):  # launchers repeat a signal
        signal.signal(each, signal.SIG_IGN)
    note(f"saved_{worker}_{rank}", "half")
    time.sleep(0.5)
    note(f"saved_{worker}_{rank}", "whole")
    sys.exit(128 + number)

names = ("RANK", "WORLD_SIZE", "GAP_DS_WORKERS", "MASTER_PORT")
# One write for the whole line: two ranks of a worker share its pipe.
os.write(1, (" ".join([worker, *(os.environ[n] for n in names), *sys.argv[1:]]) + chr(10)).encode())
"""

#: Waits for a signal, and takes 0.5 s to save.
SAVING = """
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, save)
note(f"ready_{worker}_{rank}")
time.sleep(300)
"""


#: A launcher and its ranks import torch, and DeepSpeed: seconds each. One row of torchrun is in the short run.
SLOW_TORCHRUN = pytest.param("torchrun", marks=pytest.mark.slow)
SLOW_DEEPSPEED = pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.slow)


def script(folder: Path, body: str) -> str:
    path = folder / "work.py"
    path.write_text(SCRIPT + body, encoding="utf-8")
    return str(path)


def start(command: list[str], **options: object) -> tuple[int, list[str]]:
    out = io.StringIO()
    settings: dict[str, object] = {"workers": 2, "ranks": 1, "launcher": None, "out": out} | options
    status = launch.run(command, **settings)  # type: ignore[arg-type]
    return status, out.getvalue().splitlines()


def processes(folder: Path) -> list[int]:
    """Living processes with a folder in their command line; a zombie has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_POLL", 0.01)


def wait_for(folder: Path, pattern: str, count: int) -> None:
    end = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, f"{pattern} was not written {count} times"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """After every test; and what a failing one leaves is ended."""
    yield
    left = processes(tmp_path)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


# -- what is started ---------------------------------------------------------------------------------------------------


def test_every_worker_has_its_number_its_port_and_its_arguments(tmp_path: Path) -> None:
    status, lines = start([script(tmp_path, ""), "--out", "run_{worker}"], extra=["--exchange", "here"])
    assert status == 0
    found = sorted(re.fullmatch(r"\[worker (\d)\] (.*)", line).groups() for line in lines)  # type: ignore[union-attr]
    ports = {text.split()[4] for _, text in found}
    assert len(found) == 2 and len(ports) == 2
    for worker, text in found:
        number, rank, size, workers, _, *arguments = text.split()
        assert (number, rank, size, workers) == (worker, "0", "1", "2")
        assert arguments == ["--out", f"run_{worker}", "--gap-worker", worker, "--exchange", "here"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_several_ranks_by_a_launcher(tmp_path: Path, launcher: str) -> None:
    status, lines = start([script(tmp_path, "")], ranks=2, launcher=launcher)
    assert status == 0
    found = [line.split()[2:7] for line in lines if re.match(r"\[worker \d\] \d [01] 2 2 ", line)]
    assert sorted(row[:2] for row in found) == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert len({(row[0], row[-1]) for row in found}) == len({row[-1] for row in found}) == 2


@pytest.mark.parametrize("command", [[], ["missing.py"], ["-c"]])
def test_no_script(command: list[str]) -> None:
    with pytest.raises(ValueError, match=r"is no script. Name one after --"):
        start(command)


@pytest.mark.parametrize(
    ("arguments", "launcher"),
    [
        ("--deepspeed ds.json", "deepspeed"),
        ("--lr 1 --deepspeed=ds.json", "deepspeed"),
        ("--deepspeed_config ds.json", "deepspeed"),
        ("--deepspeed-config=ds.json", "deepspeed"),
        ("--output-dir runs/deepspeed-vs-fsdp", "torchrun"),
        ("--output-dir=--deepspeed", "torchrun"),
        ("--deepspeed_log file", "torchrun"),
        ("", "torchrun"),
    ],
)
def test_deepspeed_launches_what_has_its_config(arguments: str, launcher: str) -> None:
    assert launch._launcher(arguments.split()) == launcher


def test_no_two_workers_get_one_port() -> None:
    ports = launch._free_ports(500)
    assert len(set(ports)) == 500
    assert not set(launch._free_ports(400, ports)) & set(ports)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch finds four GPUs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


NAMED = ["7,6,5,4", "GPU-8f3a,GPU-11c2, GPU-5d0e,GPU-9b47", "MIG-1a,MIG-2b,MIG-3c,MIG-4d"]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("visible", [None, "", *NAMED, "2,3,0,1,9"])
def test_workers_have_different_devices(visible: str | None) -> None:
    names = visible.replace(" ", "").split(",")[:4] if visible else ["0", "1", "2", "3"]
    devices = launch._devices(visible, workers=2, ranks=2)
    assert devices == [names[:2], names[2:]]
    environments = [launch._environment({"CUDA_VISIBLE_DEVICES": "0"}, worker, devices, 2) for worker in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == [",".join(names[:2]), ",".join(names[2:])]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("visible", "there_are"), [(None, 4), ("0,1,2", 3), ("0,1,2,3,4,5", 4)])
def test_fewer_devices_than_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, there_are: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=f"3 workers of 2 ranks need 6 devices, and there are {there_are}. Lower"):
        start([script(tmp_path, "")], workers=3, ranks=2)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("visible", [None, NAMED[0], NAMED[1]])
def test_the_ranks_of_deepspeed_get_the_devices_of_their_worker(
    monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    """DeepSpeed's launcher, given our command and environment, would start the right ranks."""
    ds = pytest.importorskip("deepspeed.launcher.launch")
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    ranks: list[dict[str, str]] = []

    def popen(command: list[str], env: dict[str, str]) -> Mock:
        assert command[2] == "work.py" and command[-2:] == ["--gap-worker", "0"]
        ranks.append(dict(env))
        return Mock(returncode=0, poll=lambda: 0)

    no_signals = SimpleNamespace(signal=lambda *_: None, SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM)
    monkeypatch.setattr(ds, "subprocess", SimpleNamespace(Popen=popen))
    monkeypatch.setattr(ds, "signal", no_signals)
    monkeypatch.setattr(ds, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(ds, "get_accelerator", CUDA_Accelerator)
    devices = launch._devices(visible, workers=2, ranks=2)
    for worker in range(2):
        interpreter, _, module, *words = launch._launch("deepspeed", devices[worker], 2, 29500 + worker)
        assert (interpreter, module) == (sys.executable, ds.__name__)
        for name, value in launch._environment(os.environ, worker, devices, 2).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [module, *words, "work.py", "--gap-worker", "0"])
        ds.main()
    found = [(rank["CUDA_VISIBLE_DEVICES"], rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks]
    first, second = (",".join(names) for names in devices)
    assert first != second
    assert found == [(names, rank, rank, "2") for names in (first, second) for rank in "01"]
    assert [rank["MASTER_PORT"] for rank in ranks] == ["29500", "29500", "29501", "29501"]


# -- how they end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", [None, SLOW_TORCHRUN])
def test_one_failing_worker_ends_all_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str | None
) -> None:
    ranks = 2 if launcher else 1
    body = f"note('ready_' + worker + rank)\nawait_files('ready_*', {2 * ranks})\n"
    body += "if worker == '1':\n    raise ValueError('the reason')\ntime.sleep(300)\n"
    status, _ = start([script(tmp_path, body)], ranks=ranks, launcher=launcher)
    assert status == 1 and not processes(tmp_path)
    printed = capsys.readouterr().err
    assert "worker 1 ended with status 1" in printed and "    ValueError: the reason" in printed


def test_a_worker_may_be_started_again(tmp_path: Path) -> None:
    body = "mark = FOLDER / 'mark'\n"
    body += "if worker == '1' and not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), 9)\n"
    status, lines = start([script(tmp_path, body)], restarts=1)
    assert status == 0
    assert "[worker 1] ended with status 137: starting it again" in lines
    assert sum(line.startswith("[worker 1] 1 0 1") for line in lines) == 2


@pytest.mark.parametrize(
    ("launcher", "number"),
    [(None, signal.SIGTERM), (None, signal.SIGHUP), ("torchrun", signal.SIGINT), SLOW_DEEPSPEED],
)
def test_after_a_signal_all_ranks_save_and_nothing_is_left(
    tmp_path: Path, launcher: str | None, number: signal.Signals
) -> None:
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    workers, ranks = (1, 2) if launcher else (2, 1)

    def send() -> None:
        wait_for(tmp_path, "ready_?_?", 2)
        os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: None)  # should `run` have returned before: the test fails, and no more
    sender = threading.Thread(target=send)
    try:
        sender.start()
        status, _ = start([script(tmp_path, SAVING)], workers=workers, ranks=ranks, launcher=launcher)
        assert not processes(tmp_path)
    finally:
        sender.join()
        signal.signal(number, before)
    assert status == 128 + number
    assert [path.read_text() for path in tmp_path.glob("saved_?_?")] == ["whole"] * 2


def test_what_outlives_its_launcher_may_save(tmp_path: Path) -> None:
    """As under a launcher without a handler, which a signal to its group ends at once."""
    body = "if worker == '1':\n    await_files('ready_?_?', 1)\n    sys.exit(3)\n"
    body += "if rank == '0':\n    os.environ['RANK'] = '1'\n    subprocess.Popen([sys.executable, *sys.argv]).wait()\n"
    status, _ = start([script(tmp_path, body + SAVING)])
    assert status == 3 and not processes(tmp_path)
    assert (tmp_path / "saved_0_1").read_text() == "whole"


def test_what_does_not_leave_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 1.0)
    body = "if worker == '1':\n    await_files('ready_?', 2)\n    sys.exit(3)\n"
    body += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('ready_' + rank)\n"
    body += "if rank == '0':\n    os.environ['RANK'] = '1'\n"
    body += "    subprocess.Popen([sys.executable, *sys.argv], start_new_session=True)\ntime.sleep(300)\n"
    started = time.monotonic()
    status, _ = start([script(tmp_path, body)])
    assert status == 3 and not processes(tmp_path)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("launcher", [None, SLOW_TORCHRUN])
def test_ranks_of_a_dead_launcher_do_not_run_beside_the_new_ones(tmp_path: Path, launcher: str | None) -> None:
    """The launcher is killed by its own rank 0; without one, a rank by its child in another session."""
    body = """
def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

if (FOLDER / "killed").exists():
    note("lived_" + rank, sum(lives(int(path.read_text())) for path in FOLDER.glob("old_?")))
    sys.exit()
if LAUNCHER is None and rank == "0":
    for rank in "12":
        os.environ["RANK"] = rank
        subprocess.Popen([sys.executable, *sys.argv], start_new_session=True)
    time.sleep(300)
note("old_" + rank, os.getpid())
if rank == ("0" if LAUNCHER else "1"):
    await_files("old_?", 2)
    note("killed")
    os.kill(os.getppid(), signal.SIGKILL)
time.sleep(300)
"""
    body = body.replace("LAUNCHER", repr(launcher))
    ranks = 2 if launcher else 1
    status, lines = start([script(tmp_path, body)], workers=1, ranks=ranks, launcher=launcher, restarts=1)
    assert status == 0 and not processes(tmp_path)
    assert "[worker 0] ended with status 137: starting it again" in lines
    assert [path.read_text() for path in tmp_path.glob("lived_?")] == ["0"] * ranks


@pytest.mark.slow
def test_a_closed_output_does_not_stop_the_workers(tmp_path: Path) -> None:
    """`gap-ds parallel ... | head -1`, with more to print than a pipe holds; then SIGTERM."""
    body = "await_files('closed', 1)\nfor i in range(3000):\n    print('x' * 100, flush=True)\n"
    words = [sys.executable, "-m", "gap_ds.cli", "parallel", "--workers", "2", "--", script(tmp_path, body + SAVING)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline().startswith("[worker ")
        process.stdout.close()
        (tmp_path / "closed").touch()
        wait_for(tmp_path, "ready_?_?", 2)
        process.send_signal(signal.SIGTERM)
        printed = process.stderr.read()
        assert process.wait(timeout=90) == 128 + signal.SIGTERM
        assert not processes(tmp_path)
    finally:
        process.kill()
    assert printed == "gap-ds parallel: its output is closed. The workers go on; SIGTERM ends them.\n"
    assert [path.read_text() for path in tmp_path.glob("saved_?_?")] == ["whole"] * 2
