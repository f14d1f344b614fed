"""A device that is not the CPU, without a GPU: nothing mixes devices, and a selection reads it once a pass.

The device is torch's PrivateUse1 key with memory of the host: a small extension, which takes about a minute to build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.full
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_all_that_belongs_to_a_weight_is_where_it_is(tmp_path: Path) -> None:
    """In a new process: the device is registered for the life of a process."""
    (build := tmp_path / "build").mkdir()
    words = [sys.executable, str(HERE / "placed.py"), str(build)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    names = "passes", "several devices", "cyclic", "rigl", "AdamW with kept state"
    assert all(f"passed: {name}" in done.stdout for name in names)
