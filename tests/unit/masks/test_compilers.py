"""The loops in C by other compilers and for other processors, where these are installed: Clang, and 64-bit ARM.

`pip install ziglang` has Clang with the libraries of both; Debian's packages are clang, gcc-aarch64-linux-gnu and
qemu-user.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gap_ds

MAIN = Path(__file__).with_name("loops_main.c")
SOURCES = [Path(gap_ds.__file__).parent / name for name in ("masks/cpu.c", "masks/same.c", "optim/kept.c")]
FLAGS = ["-O3", "-fopenmp-simd", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
ZIG = [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None
CLANG = ["clang"] if shutil.which("clang") else ZIG
ARM_GCC, ARM_ZIG = "aarch64-linux-gnu-gcc", [*ZIG, "-target", "aarch64-linux-musl"] if ZIG else None
ARM = [ARM_GCC] if shutil.which(ARM_GCC) else ARM_ZIG
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = pytest.mark.full


def run(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr[-4000:]}"


@pytest.mark.skipif(CLANG is None, reason="needs clang, or the package ziglang")
def test_clang(tmp_path: Path) -> None:
    assert CLANG is not None
    for source in SOURCES:
        run(*CLANG, *FLAGS, "-shared", "-fPIC", source, "-o", tmp_path / "loops.so")
    run(*CLANG, *FLAGS, MAIN, "-o", tmp_path / "main")
    run(tmp_path / "main")


@pytest.mark.skipif(ARM is None, reason="needs gcc for aarch64, or the package ziglang")
def test_64_bit_arm(tmp_path: Path) -> None:
    assert ARM is not None
    for source in SOURCES:
        run(*ARM, *FLAGS, "-c", "-fPIC", source, "-o", tmp_path / "loops.o")
    run(*ARM, *FLAGS, "-static", MAIN, "-o", tmp_path / "main")
    if QEMU is None:
        pytest.skip("compiled without warnings, but not run: needs qemu-user")
    run(QEMU, tmp_path / "main")
