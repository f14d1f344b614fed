"""`run_workers` itself: every group ends, and a test learns why."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launch import run_workers

START = "import os, signal, sys, time\nout, rank = sys.argv[1], int(os.environ['RANK'])\n"


def script(folder: Path, *lines: str) -> str:
    path = folder / "worker.py"
    path.write_text(START + "\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("assert rank == 0, 'broken'", "exit codes [None, 1]; rank 1 said:"),
        ("rank and sys.exit(3)", "exit codes [None, 3]; rank 1 said:"),
        ("rank and os.kill(os.getpid(), signal.SIGKILL)", "exit codes [None, -9]; rank 1 said:"),
        ("pass", "exit codes [None, None]; rank 0 said:"),
    ],
    ids=["raises", "exits", "killed", "hangs"],
)
def test_a_group_that_fails_or_hangs_is_ended(tmp_path: Path, line: str, message: str) -> None:
    """The other rank, too, which would wait for an hour."""
    name = script(tmp_path, "print('I am', os.getpid(), flush=True)", line, "time.sleep(3600)")
    hangs = line == "pass"
    with pytest.raises(AssertionError) as error:
        run_workers(name, 2, tmp_path, timeout=1.0 if hangs else 600.0)
    assert message in str(error.value) and ("I am" in str(error.value) or hangs)
    assert ("AssertionError: broken" in str(error.value)) == ("broken" in line)
    for log in tmp_path.glob("worker.py.*.log"):
        for pid in [word for word in log.read_text().split() if word.isdigit()][:1]:
            while Path("/proc", pid).exists():  # until the server has waited for it
                time.sleep(0.01)


def test_every_process_is_new_and_has_its_libraries_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", "1")
    name = script(
        tmp_path,
        "assert 'torch' in sys.modules and 'deepspeed' in sys.modules",
        "import torch",
        "assert not hasattr(torch, 'left_behind') and 'LEFT' not in os.environ and os.environ['OF_THE_TEST'] == '1'",
        "torch.left_behind = os.environ['LEFT'] = 'x'",
        "open(f'{out}/{rank} {sys.argv[2]}', 'w').close()",
    )
    for argument in ("first", "second"):
        run_workers(name, 2, tmp_path, argument)
    done = {path.name for path in tmp_path.iterdir() if " " in path.name}
    assert done == {"0 first", "1 first", "0 second", "1 second"}
