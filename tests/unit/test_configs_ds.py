"""Every shipped DeepSpeed config runs as it is: `deepspeed.initialize` accepts it, and three steps lower the loss.

What the configs have in common, and why (JSON has no comments):

- `gradient_clipping` is 0.0, which is "off". Left out, DeepSpeed 0.19 would clip at 1.0.
- `round_robin_gradients` is false. With true, DeepSpeed's own record of which rank owns what is wrong.
- `overlap_comm` is false: nothing to overlap with on a CPU, and one order of operations everywhere.
- `train_micro_batch_size_per_gpu` is 1: batches are counted in tokens, DeepSpeed only logs this number. The example
  overrides `gradient_accumulation_steps` from its own option.
- There is no optimizer and no scheduler: the training script builds both. Hence `zero_allow_untested_optimizer`, and
  `zero_force_ds_cpu_optimizer: false` so that offload takes any torch optimizer.
- `trainer_*` are for the Trainer, which fills in "auto": tests/sharding/test_hf_sharding.py trains with them.
- Buckets are 5e7 elements instead of 5e8: 100 MB instead of 1 GB of bf16 per buffer.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ds"
TRAINER = ["trainer_zero2", "trainer_zero3"]
NAMES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]

# Runs in a process of its own: DeepSpeed and torch.distributed keep global state that other tests must not inherit.
# It ends by os._exit once its results are on disk, so that no interpreter-exit crash can turn a pass into a failure.
WORKER = """
import json, os, sys
import deepspeed, torch

out, *paths = sys.argv[1:]
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
results = {}
for path in paths:
    config = json.load(open(path))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    losses = []
    for _ in range(3):
        loss = (engine(x) - x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    results[path] = {
        "stage": engine.zero_optimization_stage(),
        "offload": engine.zero_use_cpu_optimizer(),
        "clipping": engine.gradient_clipping(),
        "steps": engine.global_steps,
        "losses": losses,
    }
    engine.destroy()
with open(out, "w") as file:
    json.dump(results, file)
sys.stdout.flush()
os._exit(0)
"""


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return result


def test_no_config_is_left_out() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == TRAINER + NAMES


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_must_be_explicit(name: str) -> None:
    config = load(name)
    zero = config["zero_optimization"]
    assert config["gradient_clipping"] == 0.0
    assert config["bf16"] == {"enabled": True}
    assert zero["stage"] == int(name.removeprefix("zero")[0])
    assert zero["round_robin_gradients"] is False
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert not {"optimizer", "scheduler", "fp16"} & config.keys()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One subprocess trains three steps with every config, one after the other."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("configs_ds")
    out = folder / "results.json"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        # torch calls `ninja` by name when it compiles DeepSpeed's extension: it lies beside the interpreter.
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = folder / "log"
    with log.open("w") as stream:
        code = subprocess.run(
            [sys.executable, "-c", WORKER, str(out), *(str(FOLDER / f"{name}.json") for name in NAMES)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=280,
        ).returncode
    assert code == 0 and out.exists(), log.read_text()[-4000:]
    return {Path(path).stem: result for path, result in json.loads(out.read_text()).items()}


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_is_and_learns(name: str, runs: dict[str, dict[str, Any]]) -> None:
    run = runs[name]
    assert run["stage"] == int(name.removeprefix("zero")[0])
    assert run["offload"] == name.endswith("_offload")
    assert run["clipping"] == 0.0
    assert run["steps"] == 3
    first, second, third = run["losses"]
    assert third < second < first
