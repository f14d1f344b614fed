"""Report of a machine: its facts, and which parts of gap_ds work on it.

`look` collects the facts, importing torch alone. `judge` is a pure function of them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gap_ds._version import __version__
from gap_ds.masks import cpu

#: The oldest version of DeepSpeed that the backend was tested with; it reads private names.
_DEEPSPEED = "0.19.8"
_PACKAGES = ("torch", "deepspeed", "transformers", "fairscale", "accelerate")
_EXAMPLE = ("transformers", "datasets", "tokenizers", "sacrebleu")
_LAUNCHERS = ("deepspeed", "torchrun", "accelerate")

Status = Literal["yes", "limited", "no"]


@dataclass(frozen=True)
class Facts:
    """Facts of a machine and its environment. Missing packages and launchers are absent from their dicts.

    packages: versions by name. launchers: paths by name. accelerators: names of the GPUs that torch can use.
    cuda_build: CUDA or ROCm version of the torch build. nvidia_driver: True if nvidia-smi is installed. compiler,
    ninja, headers: the tools with which DeepSpeed compiles extensions. loops: path of gap_ds's compiled C loops; empty
    if they are compiled in every process, None if they cannot be compiled.
    """

    python: str
    system: str
    cores: int
    packages: dict[str, str]
    launchers: dict[str, str]
    accelerators: tuple[str, ...]
    cuda_build: str | None
    bf16: bool
    nvidia_driver: bool
    compiler: str | None
    ninja: bool
    headers: bool
    loops: str | None


@dataclass(frozen=True)
class Finding:
    """One part of gap_ds: if it works here, and the reason or the remedy."""

    what: str
    works: Status
    why: str


def look() -> Facts:
    """Return the facts of this machine and environment."""
    has_cuda = torch.cuda.is_available()
    packages = {name: version for name in {*_PACKAGES, *_EXAMPLE, "pyyaml"} if (version := _version(name))}
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages=dict(sorted(packages.items())),
        launchers={name: path for name in _LAUNCHERS if (path := _find(name))},
        accelerators=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if has_cuda else (),
        cuda_build=torch.version.cuda or torch.version.hip,
        bf16=torch.cuda.is_bf16_supported() if has_cuda else True,
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        compiler=shutil.which(os.environ.get("CXX") or "c++"),
        ninja=shutil.which("ninja") is not None,
        headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        loops=None if cpu.library() is None else str(cpu.file_of(cpu.SOURCE) or ""),
    )


def judge(facts: Facts) -> list[Finding]:
    """Return one finding for each part of gap_ds."""
    return [
        _gpu(facts),
        _ddp(facts),
        _deepspeed(facts),
        *_sharding(facts),
        _bf16(facts),
        _loops(facts),
        *_extras(facts),
    ]


def report() -> dict[str, Any]:
    """Return facts and findings for JSON."""
    facts = look()
    return {
        "gap_ds": __version__,
        **dataclasses.asdict(facts),
        "findings": [dataclasses.asdict(finding) for finding in judge(facts)],
    }


def _gpu(facts: Facts) -> Finding:
    if facts.accelerators:
        return Finding("GPU", "yes", f"{len(facts.accelerators)} x {facts.accelerators[0]}")
    if facts.nvidia_driver and facts.cuda_build is None:
        return Finding("GPU", "no", "nvidia-smi is installed, but torch is a build for CPUs: install one for CUDA")
    if facts.cuda_build is not None:
        return Finding("GPU", "no", f"torch, built for {facts.cuda_build}, finds none: run nvidia-smi or rocm-smi")
    return Finding(
        "GPU", "no", f"none found: everything runs on {facts.cores} CPU cores; use the presets tiny and small"
    )


def _ddp(facts: Facts) -> Finding:
    if "torchrun" in facts.launchers:
        return Finding("plain PyTorch, DDP", "yes", "start with python, or with torchrun --nproc-per-node N")
    return Finding("plain PyTorch, DDP", "limited", "torchrun is not found: use python -m torch.distributed.run")


def _deepspeed(facts: Facts) -> Finding:
    what, version = "DeepSpeed ZeRO 0-3", facts.packages.get("deepspeed")
    if version is None:
        return Finding(what, "no", 'deepspeed is not installed: pip install "gap_ds[deepspeed]"')
    missing = [
        tool
        for tool, is_here in (
            ("a C++ compiler (g++, or set CXX)", facts.compiler),
            ("ninja on the path", facts.ninja),
            ("Python.h (python3-dev)", facts.headers),
        )
        if not is_here
    ]
    if missing and not facts.accelerators:
        return Finding(what, "no", f"on CPUs it compiles an extension, which needs {', '.join(missing)}")
    if _numbers(version) < _numbers(_DEEPSPEED):
        return Finding(what, "limited", f"{version} is older than {_DEEPSPEED}, the oldest version tested")
    if "deepspeed" not in facts.launchers:
        return Finding(what, "limited", "its launcher is not found: start with torchrun")
    if facts.accelerators and missing:
        return Finding(what, "limited", f"torch's optimizers work; its own need {', '.join(missing)}")
    if facts.accelerators:
        return Finding(what, "yes", "start with deepspeed --num_gpus N")
    return Finding(
        what, "yes", "start with deepspeed --num_accelerators N; the first run compiles an extension, about a minute"
    )


def _sharding(facts: Facts) -> list[Finding]:
    start = "start with torchrun --nproc-per-node N"
    fairscale = Finding("fairscale", "yes", start)
    if "fairscale" not in facts.packages:
        fairscale = Finding("fairscale", "no", 'fairscale is not installed: pip install "gap_ds[fairscale]"')
    elif not facts.accelerators:
        fairscale = Finding("fairscale", "limited", "its OSS and DDP run on CPUs, its FSDP needs a GPU")
    return [Finding("FSDP", "yes", start), fairscale]


def _bf16(facts: Facts) -> Finding:
    if not facts.bf16:
        return Finding("bf16", "limited", f"{facts.accelerators[0]} emulates it: fp16 is faster")
    return Finding("bf16", "yes", "on the GPU" if facts.accelerators else "on CPUs; fast only with AMX")


def _loops(facts: Facts) -> Finding:
    if facts.loops:
        return Finding("loops in C", "yes", f"for masks and sparse layers on CPUs: {facts.loops}")
    if facts.loops is not None:
        why = "every process compiles them: the cache ($XDG_CACHE_HOME or ~/.cache) is not this user's alone, or full"
        return Finding("loops in C", "limited", why)
    why = "masks and sparse layers take about twice as long: install gcc, or set CC, and do not set GAP_DS_NATIVE to 0"
    return Finding("loops in C", "limited", f"no C compiler is used, so on CPUs {why}")


def _extras(facts: Facts) -> list[Finding]:
    missing = [name for name in _EXAMPLE if name not in facts.packages]
    example = (
        Finding("translation example", "no", f'{", ".join(missing)} missing: pip install "gap_ds[examples]"')
        if missing
        else Finding("translation example", "yes", "see examples/translation/README.md")
    )
    plan = (
        Finding("gap-ds plan", "yes", "presets and configs; hub ids if there is a network")
        if "transformers" in facts.packages
        else Finding("gap-ds plan", "no", "transformers is not installed: pip install transformers")
    )
    yaml = (
        Finding("YAML configs", "yes", "as well as JSON")
        if "pyyaml" in facts.packages
        else Finding("YAML configs", "no", "PyYAML is not installed: pip install pyyaml, or write JSON")
    )
    return [example, plan, yaml]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find(tool: str) -> str | None:
    """Return the path of a tool, on PATH or beside the running python (in an environment that is not activated)."""
    return shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    >>> _numbers("0.19.8+cpu") < _numbers("0.20.0rc1")
    True
    """
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
