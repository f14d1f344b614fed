"""`import gap_ds` is light: libraries that a run may not need are imported where they are used."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = (
    "accelerate datasets deepspeed fairscale matplotlib rich sacrebleu tokenizers transformers typer yaml".split()
)


def modules_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.split())


def loaded_after(statement: str) -> set[str]:
    """Their top-level names."""
    return {name.partition(".")[0] for name in modules_after(statement)}


def test_import_gap_ds_loads_no_optional_library() -> None:
    loaded = loaded_after("import gap_ds; gap_ds.GaPEngine, gap_ds.GaPConfig, gap_ds.__version__")
    assert {"gap_ds", "torch", "pydantic"} <= loaded
    # What torch itself loads, should it ever begin to, is not ours to answer for.
    assert not (loaded - loaded_after("import torch, torch.distributed.checkpoint")) & set(OPTIONAL)


def test_import_gap_ds_alone_loads_nothing_heavy() -> None:
    """Names are imported at first use: the import itself costs milliseconds, whatever else is installed."""
    heavy = {"torch", "numpy", "pydantic", "safetensors", *OPTIONAL}
    assert not loaded_after("import gap_ds; gap_ds.__version__") & heavy


def test_the_engine_loads_no_slow_part_of_torch() -> None:
    """DTensor and what needs it take half as long as torch itself; a run loads them when it uses them."""
    slow = {f"torch.distributed.{part}" for part in ("tensor", "fsdp", "checkpoint")} | {"torch._dynamo"}
    loaded = modules_after("from gap_ds import GaPConfig, GaPEngine")
    assert {"gap_ds.training.engine", "gap_ds.sharding.shard", "torch.distributed"} <= loaded
    assert not (loaded - modules_after("import torch")) & slow


def test_the_version_is_read_without_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    import gap_ds._version

    subprocess.run([sys.executable, "-c", code, gap_ds._version.__file__], timeout=60, check=True)
