"""A step with the engine allocates, copies between devices and waits no more than without it.

Counted as the operations that PyTorch dispatches, over 100 steps. The kernels that mask are called directly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gap_ds import GaPEngine
from gap_ds.masks import bitmask, cpu
from gap_ds.sharding.optimizers import Optimizers
from gap_ds.sharding.shard import Fixed, Shard
from gap_ds.training.regrowth import Young

STEPS = 100
#: What makes the host wait for a device, or moves data.
WAITING = ("_local_scalar_dense", "nonzero", "item", "_to_copy", "copy_", "_copy_from", "equal", "is_nonzero")
CONFIG = {"sparsity": 0.8, "partitions": 2, "phase_steps": 10**6, "rounds": 1, "finetune_steps": 1, "include": [".*"]}


class Counting(TorchDispatchMode):
    """Counts operations that make the host wait, and results in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Counter[str] = Counter()
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in WAITING:
            self.waiting[name] += 1
        if name.startswith("index") and any(t.dtype == torch.bool for t in flat(args[1:2])):
            self.waiting["index by flags"] += 1  # the host waits for their number
        known = {place(t) for t in flat((args, kwargs or {}))}
        found = func(*args, **(kwargs or {}))
        self.allocated += sum(place(t) not in known for t in flat(found))
        return found


def flat(values: Any) -> Iterator[Tensor]:
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, Tensor):
            yield value


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def model_and_optimizer(make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    return model, make(model.parameters(), lr=1e-3)


def counted(step: Callable[[Tensor], object]) -> Counting:
    """What steps 11 to 110 do: the first ones make the optimizer's state and our lists."""
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        step(batch)
    with Counting() as counting:
        for _ in range(STEPS):
            step(batch)
    return counting


@contextmanager
def always_compiled() -> Iterator[None]:
    before, bitmask.COMPILED = bitmask.COMPILED, 1
    try:
        yield
    finally:
        bitmask.COMPILED = before


@pytest.mark.skipif(cpu.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.ASGD], ids=lambda optimizer: optimizer.__name__)
def test_a_step_neither_waits_nor_allocates(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, optimizer = model_and_optimizer(make)

    def bare(batch: Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    sparse, its = model_and_optimizer(make)
    engine = GaPEngine(sparse, CONFIG, optimizer=its)

    def ours(batch: Tensor) -> None:
        engine.backward(engine(batch).square().mean())
        engine.step()

    with always_compiled():
        found, expected = counted(ours), counted(bare)
    assert engine.mask_state.bits and engine.applied_steps == STEPS + 10
    assert found.waiting == expected.waiting
    assert found.allocated == expected.allocated > STEPS


def test_steps_of_grown_weights_are_scaled_without_waiting() -> None:
    weight = nn.Parameter(torch.arange(10.0))
    shard = Shard.of_range("w", (10,), 0, 10, 0, Fixed(weight))
    young = Young(4, Optimizers([torch.optim.SGD([weight], lr=0.1)]))
    young.grow("w", bitmask.pack(torch.arange(10) % 3 == 0), step=5)
    with Counting() as counting, torch.no_grad():
        young.before_update([shard], 6)
        weight.add_(8.0)
        young.after_update([shard], 6)
    assert not counting.waiting
    assert weight.tolist() == [i + (4.0 if i % 3 == 0 else 8.0) for i in range(10)]  # the second of four
