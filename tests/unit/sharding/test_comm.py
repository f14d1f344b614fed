"""Where the tensors of a group of ranks travel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

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
