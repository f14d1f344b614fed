"""What matters on a GPU alone, and can be looked at without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gap_ds import GaPEngine
from gap_ds.sharding.comm import Comm


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_nccl_sends_from_the_device_that_its_group_is_bound_to(
    monkeypatch: pytest.MonkeyPatch, group: dist.ProcessGroup
) -> None:
    """By init_process_group(device_id=...). Without that, a process says by set_device which device is its own."""
    assert Comm()._device == torch.device("cpu")
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert Comm()._device == torch.device("cuda", 0)
    group.bound_device_id = torch.device("cuda", 3)
    assert Comm()._device == torch.device("cuda", 3)


def test_an_event_from_before_a_boundary_is_not_what_fsdp2_waits_for(group: dist.ProcessGroup) -> None:
    """A loop may set the end of the optimizer's step as the event that the next all-gather waits for."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"sparsity": 0.5, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 1, "include": [".*"]}
    engine = GaPEngine(model, config, optimizer=optimizer)
    events = model._get_fsdp_state()._state_ctx
    for step in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        model.set_post_optim_event("the end of the step")
        assert engine.after_step()
        assert (events.post_optim_event is None) == (step == 1)
        events.post_optim_event = None
