"""`lr_density_power`: steps of an entry as with another learning rate, which a loop with a group for each entry has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_ds import GaPConfig, GaPEngine

GRADUAL = {
    "method": "gradual",
    "sparsity": 0.8,
    "dense_steps": 3,
    "phase_steps": 6,
    "update_steps": 2,
    "finetune_steps": 4,
}
CYCLIC = {"sparsity": 0.8, "partitions": 2, "phase_steps": 3, "rounds": 1, "finetune_steps": 3}
GROWN = {**CYCLIC, "target": "rising", "update_steps": 1, "grow": "gradient", "regrow_warmup_steps": 2}
STEPS = 13


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.fc(x).tanh())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def loss_of(module: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    return (module(x) - 1).square().mean()


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def train(config: dict[str, Any], power: float, steps: int = STEPS) -> tuple[nn.Module, GaPEngine]:
    module = model()
    engine = GaPEngine(module, {**config, "lr_density_power": power}, optimizer=adamw(module.parameters()))
    for step in range(steps):
        engine.backward(loss_of(module, step))
        engine.step()
    return module, engine


@pytest.mark.parametrize("config", [GRADUAL, CYCLIC], ids=["gradual", "cyclic"])
def test_it_is_another_learning_rate_for_each_entry(config: dict[str, Any]) -> None:
    """The loop that it is compared with looks at the weights, and sets the learning rate of each parameter's group."""
    power = 0.5
    ours, engine = train(config, power)
    theirs = model()
    named = dict(theirs.named_parameters())
    optimizer = adamw([{"params": [parameter]} for parameter in named.values()])
    other = GaPEngine(theirs, config, optimizer=optimizer)
    entries = {entry.name for entry in other.plan.entries}
    for step in range(STEPS):
        other.backward(loss_of(theirs, step))
        for name, group in zip(named, optimizer.param_groups, strict=True):
            dense = name not in entries or other.mask(name) is None
            group["lr"] = 0.01 if dense else 0.01 * (float((named[name] != 0).float().mean()) ** -power)
        other.step()
    for name, weight in ours.named_parameters():
        assert torch.equal(weight != 0, named[name] != 0), name
        assert torch.allclose(weight, named[name], rtol=0, atol=1e-6), name
    plain, _ = train(config, 0.0)
    assert not torch.allclose(ours[0].fc.weight, plain[0].fc.weight, atol=1e-3)
    assert engine.stats()["density"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("config", [GRADUAL, GROWN], ids=["gradual", "grown"])
def test_a_resumed_run_is_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = train(config, 1.0)
    _, engine = train(config, 1.0, steps=7)
    engine.save_checkpoint(tmp_path)
    module, again = train(config, 1.0, steps=0)
    again.load_checkpoint(tmp_path)
    for step in range(7, STEPS):
        again.backward(loss_of(module, step))
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True))


def test_where_it_has_no_meaning_it_is_refused() -> None:
    with pytest.raises(ValueError, match="lr_density_power"):
        GaPConfig(method="dense", sparsity=0.0, phase_steps=1, finetune_steps=0, lr_density_power=0.5)
    schedulefree = pytest.importorskip("schedulefree")
    module = model()
    optimizer = schedulefree.AdamWScheduleFree(module.parameters(), lr=0.01)
    optimizer.train()
    with pytest.raises(ValueError, match="which averages its weights"):
        GaPEngine(module, {**CYCLIC, "lr_density_power": 0.5}, optimizer=optimizer)


def test_weights_in_16_bits_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Their steps are rounded before they are made longer."""
    for dtype in (torch.float32, torch.bfloat16):
        module = model().to(dtype)
        GaPEngine(module, {**CYCLIC, "lr_density_power": 1.0}, optimizer=adamw(module.parameters()))
        assert ("a step is rounded before it is made longer" in caplog.text) == (dtype == torch.bfloat16)
