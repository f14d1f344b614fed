"""Learning-rate schedulers of torch: resumed to equal state, and begun again in every phase."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CYCLIC, Model, train, weights
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from gap_ds import GaPEngine


class Decay:
    """A function of the step with attributes, which LambdaLR saves."""

    def __init__(self) -> None:
        self.rate, self.table = 0.5, {3: 1.5}

    def __call__(self, step: int) -> float:
        return self.table.get(step, 1.0) / (1 + self.rate * step)


ALL: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR object": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.MultiStepLR(o, [2, 4])], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3),
    "CyclicLR function": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3, scale_fn=lambda x: 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=20),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=4),
}
every = pytest.mark.parametrize("name", ALL)


def build(name: str, tensor: bool = False, **config: Any) -> tuple[GaPEngine, Any]:
    torch.manual_seed(0)
    model = Model()
    lr = torch.tensor(0.01) if tensor else 0.01
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=False)
    scheduler = ALL[name](optimizer)
    return GaPEngine(model, {**CYCLIC, **config}, optimizer=optimizer, lr_scheduler=scheduler), scheduler


def plain(value: Any) -> Any:
    """A scheduler's attributes, without its optimizer and with a word for each function."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key != "optimizer"}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    if hasattr(value, "state_dict") or isinstance(value, Decay):
        return plain(vars(value))
    return "function" if callable(value) else value


def group(engine: GaPEngine) -> dict[str, Any]:
    return {key: value for key, value in engine.optimizer.param_groups[0].items() if key != "params"}


def test_no_scheduler_of_torch_is_left_out() -> None:
    """ReduceLROnPlateau is below."""
    known = {name.partition(" ")[0] for name in ALL} | {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"}
    kinds = [kind for kind in vars(lr_scheduler).values() if isinstance(kind, type)]
    assert {kind.__name__ for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)} <= known


@every
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_resumed_scheduler_has_equal_state(tmp_path: Path, name: str, tensor: bool) -> None:
    straight, scheduler = build(name, tensor)
    train(straight, 4)
    straight.save_checkpoint(tmp_path)
    resumed, again = build(name, tensor)
    resumed.load_checkpoint(tmp_path)
    assert repr(plain(vars(scheduler))) == repr(plain(vars(again)))
    train(straight, 5)
    train(resumed, 5)
    assert repr(plain(vars(scheduler))) == repr(plain(vars(again))) and group(straight) == group(resumed)
    assert isinstance(group(resumed)["lr"], torch.Tensor) == tensor
    wanted = weights(straight)
    assert all(torch.equal(weight, wanted[key]) for key, weight in weights(resumed).items())


@every
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_restarted_scheduler_repeats_itself(name: str, tensor: bool) -> None:
    """Momentum, too, which cyclic ones change against the learning rate."""
    engine, _ = build(name, tensor, lr_restart=True)
    first = engine.optimizer.param_groups[0]["lr"]
    rows = []
    for _ in range(6):
        rows.append((float(group(engine)["lr"]), group(engine)["betas"]))
        train(engine, 1)
    assert rows[:3] == rows[3:]
    assert not tensor or engine.optimizer.param_groups[0]["lr"] is first


def test_a_scheduler_with_a_metric_is_stepped_by_the_user_and_saved(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL, "plateau", lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1))
        (engine, scheduler), (resumed, again) = build("plateau"), build("plateau")
    for _ in range(5):
        train(engine, 1)
        scheduler.step(1.0)
    assert group(engine)["lr"] == pytest.approx(1e-4)
    engine.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    assert plain(vars(scheduler)) == plain(vars(again)) and group(resumed)["lr"] == group(engine)["lr"]


def test_another_scheduler_is_refused(tmp_path: Path) -> None:
    engine, _ = build("StepLR")
    engine.save_checkpoint(tmp_path)
    other, _ = build("CosineAnnealingLR")
    with pytest.raises(ValueError, match="was written with another learning-rate scheduler"):
        other.load_checkpoint(tmp_path)
