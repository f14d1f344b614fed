"""Ray Train: the worker's loop of docs/keep-sparse.md, in 2 real workers, against the same training on one process."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gap_ds import GaPEngine

pytestmark = pytest.mark.full
ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[clients]'")

# First masks by magnitude, so that they do not depend on names.
GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 3, "mask_init": "magnitude"}


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))


def batch(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def train(model: Any, config: dict[str, Any], rows: Any) -> GaPEngine:
    """The loop of a worker, and of one process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = GaPEngine(model, config, optimizer=optimizer)
    step = 0
    while not engine.finished:
        loss = (model(rows(step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.after_step()
        step += 1
    return engine


def test_two_workers_train_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def worker(settings: dict[str, Any]) -> None:
        import ray.train.torch as ray_torch
        from ray.train import get_context

        rank = get_context().get_world_rank()
        model = ray_torch.prepare_model(build())
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        engine = train(model, GAP, lambda step: batch(step).chunk(2)[rank])
        engine.export(settings["out"])

    for name in ("RAY_raylet_start_wait_time_s", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):  # a machine may be busy
        monkeypatch.setenv(name, "600")
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "600000")
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    short = tempfile.mkdtemp()  # names of sockets have 107 bytes at most
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=short)
    try:
        run = RunConfig(storage_path=str(tmp_path / "ray"))
        settings = {"out": str(tmp_path / "sparse")}
        TorchTrainer(
            worker, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=2), run_config=run
        ).fit()
    finally:
        ray.shutdown()
        shutil.rmtree(short, ignore_errors=True)
    wanted = train(build(), GAP, batch)
    wanted.export(tmp_path / "one")
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "one"))
    assert weights.keys() == expected.keys() and len(wanted.plan.entries) == 4
    for name, weight in expected.items():
        assert torch.equal(weights[name] == 0, weight == 0), name
        assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), name
