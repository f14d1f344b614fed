"""Optimizers of every kind under the engine: what their state means, saved and restored runs, fresh starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CYCLIC, Model, train, weights
from torch import nn

from gap_ds import GaPEngine

O = torch.optim  # noqa: E741
Make = Callable[[nn.Module], Any]


def over(kind: type[O.Optimizer], **settings: Any) -> Make:
    return lambda model: kind(model.parameters(), **settings)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, and all other parameters."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "layers" in name]
    return matrices, [p for _, p in named if all(p is not matrix for matrix in matrices)]


def muon(model: nn.Module) -> list[O.Optimizer]:
    matrices, rest = split(model)
    return [O.Muon(matrices, lr=0.02), O.AdamW(rest, lr=0.01)]


#: With the first values of the state that has one value per weight, and names of other sequences of the weights.
TABLE: dict[str, tuple[Make, dict[str, float], tuple[str, ...]]] = {
    "Adam": (over(O.Adam, lr=0.01), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "AdamW amsgrad": (
        over(O.AdamW, lr=0.01, amsgrad=True),
        {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0},
        (),
    ),
    "AdamW fused": (over(O.AdamW, lr=0.01, fused=True), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "NAdam": (over(O.NAdam, lr=0.01), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "RAdam": (over(O.RAdam, lr=0.01), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "Adamax": (over(O.Adamax, lr=0.01), {"exp_avg": 0, "exp_inf": 0}, ()),
    "Adadelta": (over(O.Adadelta), {"square_avg": 0, "acc_delta": 0}, ()),
    "Adagrad": (over(O.Adagrad, lr=0.01, initial_accumulator_value=0.1), {"sum": 0.1}, ()),
    "ASGD": (over(O.ASGD, lr=0.01, lambd=1e-2, t0=1), {}, ("ax",)),
    "Rprop": (over(O.Rprop, lr=0.01), {"prev": 0, "step_size": 0.01}, ()),
    "RMSprop": (
        over(O.RMSprop, lr=0.01, momentum=0.9, centered=True),
        {"square_avg": 0, "momentum_buffer": 0, "grad_avg": 0},
        (),
    ),
    "SGD": (over(O.SGD, lr=0.05), {}, ()),
    "SGD momentum": (over(O.SGD, lr=0.05, momentum=0.9), {"momentum_buffer": 0}, ()),
    "SGD dampening": (over(O.SGD, lr=0.05, momentum=0.9, dampening=0.5), {"momentum_buffer": 0}, ()),
    "Adafactor": (over(O.Adafactor, lr=0.01), {}, ()),
    "Muon": (muon, {"momentum_buffer": 0}, ()),
}
every = pytest.mark.parametrize("name", TABLE)


def build(name: str, config: dict[str, Any] | None = None, **options: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    return GaPEngine(model, config or CYCLIC, optimizer=TABLE[name][0](model), **options)


def equal(a: GaPEngine, b: GaPEngine) -> bool:
    wanted = weights(a)
    return all(torch.equal(weight, wanted[name]) for name, weight in weights(b).items())


def state(engine: GaPEngine) -> dict[str, dict[str, Any]]:
    """The optimizers' state by parameter name."""
    members = list(engine._backend.optimizers)
    found = {name: [o.state[p] for o in members if p in o.state] for name, p in engine.module.named_parameters()}
    return {name: dict(states[0]) for name, states in found.items() if states}


@every
def test_torch_has_no_optimizer_that_the_table_lacks(name: str) -> None:
    """L-BFGS needs a closure, SparseAdam sparse gradients: neither trains a model here."""
    known = {name.partition(" ")[0] for name in TABLE} | {"AdamW", "LBFGS", "SparseAdam", "Optimizer"}
    assert {n for n, v in vars(O).items() if isinstance(v, type) and issubclass(v, O.Optimizer)} <= known


@every
def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path: Path, name: str) -> None:
    straight, saved = build(name), build(name)
    saved.save_checkpoint(tmp_path)
    train(straight, 7)
    train(saved, 7)
    assert equal(straight, saved)
    resumed = build(name)
    train(resumed, 2)
    resumed.load_checkpoint(tmp_path)
    train(resumed, 7)
    assert equal(straight, resumed)


@every
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, name: str, stop: int) -> None:
    straight, first, second = build(name), build(name), build(name)
    train(straight, 9)
    train(first, stop)
    first.save_checkpoint(tmp_path)
    if stop == 5:  # neither gradients nor empty state nor steps that were made keep it from being restored
        train(second, 1)
        second(torch.ones(1, 6)).sum().backward()
        for parameter in second.module.parameters():
            _ = second.optimizer.state[parameter]
    second.load_checkpoint(tmp_path)
    if stop == 5:
        for optimizer in second._backend.optimizers:
            optimizer.zero_grad()
    train(second, 9 - stop)
    assert equal(straight, second)


@every
def test_reset_is_a_fresh_optimizer(name: str) -> None:
    engine = build(name, {**CYCLIC, "optimizer_state": "reset"})
    train(engine, 3)
    torch.manual_seed(0)
    model = Model()
    model.load_state_dict(engine.module.state_dict())
    rest = {"phase_steps": 3, "finetune_steps": 2, "sparsity": 0.75, "partitions": 2, "rounds": 1}
    rest |= {"mask_init": "magnitude", "partition_order": "cyclic"}
    train(engine, 2)
    # The same steps with an optimizer that was just built; the masks are those of the run.
    fresh = TABLE[name][0](model)
    for step in (3, 4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        for optimizer in fresh if isinstance(fresh, list) else [fresh]:
            optimizer.step()
            optimizer.zero_grad()
        for entry in engine.plan.entries:
            if (mask := engine.mask(entry.name)) is not None:
                weight = model.get_parameter(entry.name).detach().view(-1)
                weight[~mask] = 0
                for own in (
                    [o.state.get(model.get_parameter(entry.name), {}) for o in fresh]
                    if isinstance(fresh, list)
                    else [fresh.state[model.get_parameter(entry.name)]]
                ):
                    for key in TABLE[name][2]:
                        if key in own:
                            own[key].view(-1)[~mask] = 0
    wanted = dict(model.named_parameters())
    assert all(torch.equal(weight, wanted[key]) for key, weight in weights(engine).items())


@every
def test_regrown_weights_have_the_first_values_of_their_moments(name: str) -> None:
    _, firsts, sequences = TABLE[name]
    engine, grown = build(name), "layers.2.fc.weight"  # sparse in phase 0, dense from step 3 on
    train(engine, 2)
    mask = engine.mask(grown)
    assert mask is not None
    before = {
        key: value.flatten()[~mask].clone() for key, value in state(engine).get(grown, {}).items() if key in firsts
    }
    assert before.keys() == firsts.keys()
    assert all(bool((before[key] != first).any()) for key, first in firsts.items())
    train(engine, 1)
    assert engine.mask(grown) is None
    for key, first in firsts.items():
        moment = state(engine)[grown][key].flatten()
        assert bool((moment[~mask] == first).all()) and bool((moment[mask] != first).any()), key
    for key in sequences:
        assert not state(engine)[grown][key].flatten()[~mask].count_nonzero()


@every
def test_masks_hold_in_every_sequence_of_the_weights(name: str) -> None:
    engine, (_, _, sequences) = build(name), TABLE[name]
    while not engine.finished:
        train(engine, 1)
        for entry in engine.plan.entries:
            if (mask := engine.mask(entry.name)) is not None:
                pieces = [
                    engine.module.get_parameter(entry.name),
                    *(state(engine)[entry.name][key] for key in sequences),
                ]
                for piece in pieces:
                    assert not piece.detach().flatten()[~mask].count_nonzero()
    assert engine.stats()["kept"] == 36
