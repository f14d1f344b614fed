"""The engine believes the weights: whatever changes them besides its optimizers is noticed, in a sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ranks import Ranks
from test_engine import CYCLIC, Model, build, train, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gap_ds import GaPEngine
from gap_ds.sharding.shard import Shard
from gap_ds.training import copies

SPARSE, DENSE = "layers.2.fc.weight", "layers.0.fc.weight"  # in phase 0 of CYCLIC


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def revive(engine: GaPEngine, number: int = 1, value: float = 1.0) -> None:
    """Sets pruned weights of an entry."""
    mask = engine.mask(SPARSE)
    assert mask is not None
    with torch.no_grad():
        engine.module.get_parameter(SPARSE).view(-1)[(~mask).nonzero()[:number, 0]] = value


def density(engine: GaPEngine) -> float:
    """What the weights say."""
    return sum(int(weights(engine)[e.name].count_nonzero()) for e in engine.plan.entries) / engine.plan.numel


# -- pruned weights that are not 0 -------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[GaPEngine, Path], Any]] = {
    "save_checkpoint": lambda engine, folder: engine.save_checkpoint(folder),
    "save_masks": lambda engine, folder: engine.save_masks(folder),
    "export": lambda engine, folder: engine.export(folder / "model"),
    "finish": lambda engine, folder: engine.finish(),
    "stats": lambda engine, folder: engine.stats(),
    "check_weights": lambda engine, folder: engine.check_weights(),
}


@pytest.mark.parametrize("place", PLACES)
def test_revived_weights_are_found_where_they_would_be_kept(tmp_path: Path, place: str) -> None:
    engine = build()
    train(engine, 1)
    assert engine.stats()["zeros_checked_at"] == 1
    revive(engine, 2)
    with pytest.raises(ValueError, match=rf"{SPARSE}: 2 of its pruned weights are not 0"):
        PLACES[place](engine, tmp_path)
    assert not list(tmp_path.rglob("state.json")) and not (tmp_path / "model").exists() and not engine.finished
    with pytest.raises(ValueError, match=r"2 of its pruned weights are not 0 \(before an update"):
        train(engine, 1)
    revive(engine, 2, 0.0)
    engine.optimizer.zero_grad()
    train(engine, 1)
    PLACES[place](engine, tmp_path)


def test_a_nan_among_the_pruned_weights_is_found() -> None:
    engine = build()
    revive(engine, value=float("nan"))
    with pytest.raises(ValueError, match="1 of its pruned weights are not 0"):
        engine.check_weights()


def test_weights_that_a_wrapper_writes_after_the_step_are_found_before_the_next() -> None:
    """As Lookahead does with its slow weights."""
    engine = build()
    slow = {p: p.detach() + 0.1 for p in engine.module.parameters()}
    with pytest.raises(ValueError, match=r"pruned weights are not 0 \(before an update"):
        for step in range(3):
            backward(engine.module, step)
            engine.optimizer.step()
            with torch.no_grad():
                for p, other in slow.items():
                    p.copy_(other.lerp_(p, 0.5))
            engine.after_step()


def test_weights_loaded_after_the_engine_was_built_are_noticed_at_the_first_step() -> None:
    engine = build()
    torch.manual_seed(5)
    engine.module.load_state_dict(Model().state_dict())
    with pytest.raises(
        ValueError, match=r"27 of its pruned weights are not 0 \(before the first update\).*load them f"
    ):
        train(engine, 1)


@pytest.mark.parametrize("assigned", [SPARSE, DENSE])
def test_replaced_parameters_are_noticed(assigned: str) -> None:
    """A sparse entry in the next update, a dense one at the next boundary."""
    engine = build()
    train(engine, 1)
    state = {name: value.clone() if name == assigned else value for name, value in engine.module.state_dict().items()}
    keep = {name: p for name, p in engine.module.named_parameters() if name != assigned}
    engine.module.load_state_dict(state, assign=True)
    for name, p in keep.items():
        setattr(engine.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], p)
    with pytest.raises(ValueError, match=rf"{assigned}: .*replaced, as by load_state_dict\(assign=True\)"):
        train(engine, 2)


def test_a_parameter_group_that_is_removed_in_mid_run_is_noticed() -> None:
    model = Model()
    groups = [{"params": list(part.parameters())} for part in (model.layers[3], model.layers[:3], model.head)]
    engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.SGD(groups, lr=0.1))
    train(engine, 1)
    del engine.optimizer.param_groups[0]
    with pytest.raises(ValueError, match=r"layers\.3\.fc\.weight: was not masked in an update \(1 entries were not\)"):
        train(engine, 1)


# -- steps that the hooks do not see -----------------------------------------------------------------------------------


def test_an_optimizer_that_is_built_anew_is_noticed() -> None:
    engine = build()
    train(engine, 2)
    other = torch.optim.Adam(engine.module.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"weights change, but no step of optimizer=Adam is seen"):
        for step in range(5):
            backward(engine.module, step)
            other.step()
            engine.after_step()


class InBackward(torch.optim.Optimizer):
    """Updates weights in hooks of the backward pass, by their `data` as LOMO does, and never steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        for p in self.param_groups[0]["params"]:
            p.register_hook(lambda gradient, p=p: p.data.add_(gradient, alpha=-0.05))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise AssertionError


def test_an_optimizer_that_never_steps_is_noticed() -> None:
    model = Model()
    engine = GaPEngine(model, CYCLIC, optimizer=InBackward(model.parameters()))
    with pytest.raises(ValueError, match=r"no step of optimizer=InBackward is seen.*inside the backward pass"):
        for step in range(8):
            backward(model, step)
            assert not engine.after_step()


def test_accumulating_without_a_step_is_no_mistake() -> None:
    engine = build()
    train(engine, 1)
    for step in range(40):
        backward(engine.module, step)
        assert not engine.after_step()
    engine.optimizer.step()
    assert engine.after_step()


def test_optimizers_that_step_in_backward_are_masked() -> None:
    """One for each parameter."""
    torch.manual_seed(0)
    model = Model()
    optimizers = [torch.optim.SGD([p], lr=0.05) for p in model.parameters()]
    engine = GaPEngine(model, CYCLIC, optimizer=optimizers)

    def stepped(optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return hook

    for p, optimizer in zip(model.parameters(), optimizers, strict=True):
        p.register_post_accumulate_grad_hook(stepped(optimizer))
    for step in range(14):
        backward(model, step)
        assert engine.after_step()
        assert density(engine) <= engine.density or engine.applied_steps in (3, 6, 9, 12)
    assert engine.finished and density(engine) == 0.25


@pytest.mark.parametrize("whole", [True, False], ids=["method", "function"])
def test_a_compiled_optimizer_step_is_masked(whole: bool) -> None:
    engine, plain = build(), build()
    step: Callable[[], Any] = engine.optimizer.step if whole else lambda: engine.optimizer.step()
    compiled = torch.compile(step, backend="eager")
    for i in range(14):
        backward(engine.module, i)
        compiled()
        engine.optimizer.zero_grad()
        assert engine.after_step()
    train(plain, 14)
    wanted = weights(plain)
    assert engine.finished and density(engine) == 0.25
    for name, weight in weights(engine).items():
        torch.testing.assert_close(weight, wanted[name])


def test_a_step_that_is_captured_into_a_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"optimizer=Adam: its step is captured into a CUDA graph"):
        train(build(), 1)


# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("method", ["cyclic", "rigl"])
def test_an_overflow_is_no_update(fused: bool, method: str) -> None:
    """A fused optimizer is called by the scaler all the same. RigL grows by the gradients of an applied step."""
    rigl = {"method": "rigl", "sparsity": 0.75, "phase_steps": 6, "update_steps": 2, "finetune_steps": 2}

    def run(overflows: set[int]) -> GaPEngine:
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        config = rigl if method == "rigl" else CYCLIC
        engine = GaPEngine(model, config, optimizer=optimizer, grad_scaler=scaler)
        for call in range(8 + len(overflows)):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(engine.applied_steps))
            engine.backward(engine(x).square().mean() * (float("inf") if call in overflows else 1.0))
            engine.step()
        assert engine.applied_steps == 8 and engine.stats()["kept"] == (90 if method == "cyclic" else 36)
        return engine

    smooth, rough = weights(run(set())), weights(run({0, 1, 4, 9}))
    assert all(torch.equal(weight, rough[name]) for name, weight in smooth.items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_an_overflow_of_one_of_two_optimizers_is_no_update_of_either(fused: bool, clipping: float) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, fused=fused) for part in (model.layers, model.head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    engine = GaPEngine(model, CYCLIC, optimizer=optimizers, grad_scaler=scaler, gradient_clipping=clipping)
    train(engine, 1)
    before = {name: weight.clone() for name, weight in weights(engine).items()}
    backward(engine.module, 1)
    model.head.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
    engine.step()
    engine.check_weights()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert engine.applied_steps == 1 and scaler.get_scale() == 4.0
    train(engine, 1)
    assert engine.applied_steps == 2


# -- loads -------------------------------------------------------------------------------------------------------------


def test_what_is_frozen_before_a_load_is_named(tmp_path: Path) -> None:
    first, second = build(), build()
    train(first, 4)
    first.save_checkpoint(tmp_path)
    second.module.get_submodule("head").requires_grad_(False)
    with pytest.raises(ValueError, match=r"head\.weight was trained when it was saved, and is frozen now"):
        second.load_checkpoint(tmp_path)
    model = Model()
    model.layers[0].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"another plan .*; layers\.0\.fc\.weight was an entry, and is none now"):
        GaPEngine(model, CYCLIC, optimizer=optimizer).load_checkpoint(tmp_path)


def test_masks_of_other_weights_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    first = build()
    train(first, 4)
    first.save_masks(tmp_path)
    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"27 weights of layers.0.fc.weight that its masks prune are not 0"):
        GaPEngine(model, CYCLIC, optimizer=optimizer, masks_from=tmp_path)
    engine = GaPEngine(model, CYCLIC, optimizer=optimizer)  # the refused one has given the optimizer back
    train(engine, 1)
    before, bits = weights(engine), dict(engine.mask_state.bits)
    with pytest.raises(ValueError, match=r"Restore both from the same checkpoint, the weights first"):
        engine.load_masks(tmp_path)
    assert engine.applied_steps == 1 and all(engine.mask_state.bits[name] is value for name, value in bits.items())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())


MAKES: dict[str, Callable[[Model], torch.optim.Optimizer]] = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "AMSGrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
    "centered": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True),
    "groups": lambda m: torch.optim.Adam([{"params": list(p.parameters())} for p in (m.layers, m.head)], lr=0.01),
    "fewer": lambda m: torch.optim.Adam(m.layers.parameters(), lr=0.01),
}


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        ("Adam", "SGD", "was saved with the optimizer Adam, and this is SGD"),
        ("Adam", "AMSGrad", "max_exp_avg_sq|amsgrad=False"),
        ("AMSGrad", "Adam", "max_exp_avg_sq|amsgrad=True"),
        ("RMSprop", "centered", "grad_avg|centered=False"),
        ("SGD", "momentum", "was saved by an optimizer without state, and SGD has momentum_buffer"),
        ("Adam", "groups", "was saved with 1 parameter groups, and the optimizer now has 2"),
        ("groups", "Adam", "was saved with 2 parameter groups, and the optimizer now has 1"),
        ("Adam", "fewer", "holds head.bias then and not now|optimizer's state of head.weight"),
        ("fewer", "Adam", "holds head.bias now and not then"),
    ],
)
@pytest.mark.parametrize("portable", [False, True], ids=["own", "portable"])
def test_another_optimizer_is_refused_by_name_and_nothing_is_changed(
    tmp_path: Path, saved: str, now: str, said: str, portable: bool
) -> None:
    if portable and (saved, now) in (("SGD", "momentum"), ("fewer", "Adam")):
        pytest.skip("portable files hold the settings too, and do not tell a parameter without a gradient from these")

    def run(kind: str, steps: int) -> GaPEngine:
        torch.manual_seed(0)
        model = Model()
        engine = GaPEngine(model, CYCLIC, optimizer=MAKES[kind](model))
        train(engine, steps)
        return engine

    run(saved, 4).save_checkpoint(tmp_path, portable=portable)
    engine = run(now, 2)
    if portable:  # as another backend, which reads the portable files
        object.__setattr__(engine.run, "backend", replace(engine.run.backend, name="another"))
    before, bits = weights(engine), dict(engine.mask_state.bits)
    state = copy.deepcopy(engine.optimizer.state_dict())
    with pytest.raises(ValueError, match=said):
        engine.load_checkpoint(tmp_path)
    assert engine.applied_steps == 2 and all(engine.mask_state.bits[name] is value for name, value in bits.items())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert repr(engine.optimizer.state_dict()) == repr(state)
    train(engine, 12)
    assert engine.finished


def test_a_model_of_another_shape_beside_the_entries_is_refused(tmp_path: Path) -> None:
    build().save_checkpoint(tmp_path)
    torch.manual_seed(0)
    model = Model()
    model.head = nn.Linear(6, 5)
    engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    before = weights(engine)
    with pytest.raises(ValueError, match=r"Size mismatch.*head"):
        engine.load_checkpoint(tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())


# -- the end of a schedule ---------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "cyclic": {"partitions": 2, "rounds": 2},
    "last values": {"method": "cyclic", "partitions": 2, "rounds": 2, "regrow": "last_value"},
    "dsd": {"rounds": 2},
    "acdc": {"rounds": 2, "dense_steps": 3},
    "gradual": {"update_steps": 1},
    "one_shot": {},
    "rigl": {"update_steps": 2},
    "set": {"update_steps": 2},
    "static": {"partitions": 2, "rounds": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_finished_early_is_saved_and_goes_on(tmp_path: Path, name: str) -> None:
    config = {"method": name, "sparsity": 0.75, "phase_steps": 6, "finetune_steps": 2, **METHODS[name]}
    engine, again = build(config), build(config)
    train(engine, 2)
    dense = bool(engine.phase.dense)
    assert engine.finish() == dense and engine.finished and engine.density == 0.25
    assert not engine.finish()
    masks = {entry.name: engine.mask(entry.name) for entry in engine.plan.entries}
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    train(again, 1)
    again.load_checkpoint(tmp_path)
    assert (again.phase, again.density, again.finished) == (engine.phase, 0.25, True)
    train(engine, 6)
    train(again, 6)
    wanted = weights(engine)
    assert all(torch.equal(weight, wanted[key]) for key, weight in weights(again).items())
    assert all(torch.equal(mask, again.mask(key)) for key, mask in masks.items())  # they stay as they are
    assert density(engine) <= 0.25


# -- begun anew --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_a_new_schedule_over_an_optimizer_that_has_stepped(kind: str) -> None:
    """Plain SGD has no state that would show it."""
    torch.manual_seed(0)
    model = Model()
    optimizer = MAKES[kind](model)
    first = GaPEngine(model, CYCLIC, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"another GaPEngine masks its steps\. Call close"):
        GaPEngine(model, CYCLIC, optimizer=optimizer)
    train(first, 14)
    first.close()
    with pytest.raises(ValueError, match=r"has already updated weights, and the schedule would begin at step 0"):
        GaPEngine(model, CYCLIC, optimizer=optimizer)
    second = GaPEngine(model, CYCLIC, optimizer=optimizer, fresh=True)
    train(second, 14)
    assert second.finished and density(second) == 0.25


# -- copies ------------------------------------------------------------------------------------------------------------


def test_masks_are_put_on_an_averaged_copy() -> None:
    engine = build()
    average = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(engine, 2)
    average.update_parameters(engine.module)
    plain = copy.deepcopy(average.module)
    for copied in (average, plain):
        engine.apply_to(copied)
        inner = copied.module if copied is average else copied
        for entry in engine.plan.entries:
            weight, mask = inner.get_parameter(entry.name).detach().flatten(), engine.mask(entry.name)
            assert bool(weight.all()) if mask is None else bool((weight.bool() == mask).all())
    engine.check_weights()


def test_a_copy_of_another_model_is_refused() -> None:
    engine = build()
    with pytest.raises(ValueError, match=r"layers.0.fc.weight: is no parameter of Linear. Pass a copy of the model"):
        engine.apply_to(nn.Linear(6, 6))
    other = Model()
    other.layers[3].fc = nn.Linear(6, 5)
    with pytest.raises(
        ValueError, match=r"layers.3.fc.weight: the copy has 30 weights of it on this rank, and the mod"
    ):
        engine.apply_to(other)


def test_a_copy_in_another_memory_format() -> None:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3)) for _ in range(4)]
    model = nn.Sequential(*blocks)
    engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for parameter in copied.parameters():
        nn.init.ones_(parameter)
    engine.apply_to(copied)
    for entry in engine.plan.entries:
        mask = engine.mask(entry.name)
        wanted = torch.ones(entry.numel) if mask is None else mask.float()
        assert torch.equal(copied.get_parameter(entry.name).detach().flatten(), wanted)


def test_a_sharded_copy_of_which_a_rank_holds_a_tensor_whole() -> None:
    """As FSDP1 cuts a flat parameter between two weights."""
    engine = build()
    train(engine, CYCLIC["phase_steps"] * 4)
    run, shards = engine.run, engine.mask_state.shards

    def apply(rank: Any) -> dict[str, torch.Tensor]:
        model, own = Model(), {}
        for i, (name, shard) in enumerate(shards.items()):
            n = shard.numel if i % 2 == rank.rank else 0
            own[name] = Shard.of_range(name, shard.shape, 0 if n else shard.numel, n, 0, shard.owner)
            model.get_parameter(name).data = torch.ones(shard.shape) if n else torch.empty(0)
        bits = {name: run.mask_state.bits[name][: None if own[name].numel else 0] for name in own}
        backend = replace(run.backend, comm=rank, shards=lambda: list(own.values()))
        state: Any = SimpleNamespace(bits=bits, shards=own)
        copies.apply(replace(run, backend=backend, world=rank, mask_state=state), model)
        return {name: model.get_parameter(name).detach().flatten() for name in own if own[name].numel}

    for found in Ranks(2).run(apply):
        assert len(found) == 2
        assert all(torch.equal(weight.bool(), engine.mask(name)) for name, weight in found.items())
