"""Optimizers of every kind under the engine: what their state means, saved and restored runs, fresh starts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CYCLIC, Model, train, weights
from torch import nn

from gap_ds import GaPEngine
from gap_ds.checkpoint import portable

Make = Callable[[nn.Module], Any]


def over(kind: type[torch.optim.Optimizer], **settings: Any) -> Make:
    return lambda model: kind(model.parameters(), **settings)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, and all other parameters."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "layers" in name]
    return matrices, [p for _, p in named if all(p is not matrix for matrix in matrices)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, rest = split(model)
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


class Built(torch.optim.Optimizer):
    """Momentum whose state is made with the optimizer, and which relies on it."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p), "scale": torch.ones(()), "step": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] += 1
                    state["scale"].mul_(0.9)
                    state["momentum_buffer"].mul_(0.9).add_(p.grad)
                    p.sub_(state["momentum_buffer"] * state["scale"], alpha=group["lr"] / state["step"])


#: With the first values of the state that has one value per weight, and names of other sequences of the weights.
TABLE: dict[str, tuple[Make, dict[str, float], tuple[str, ...]]] = {
    "Adam": (over(torch.optim.Adam, lr=0.01), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "AdamW amsgrad": (
        over(torch.optim.AdamW, lr=0.01, amsgrad=True),
        {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0},
        (),
    ),
    "AdamW fused": (over(torch.optim.AdamW, lr=0.01, fused=True), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "NAdam": (over(torch.optim.NAdam, lr=0.01), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "RAdam": (over(torch.optim.RAdam, lr=0.01), {"exp_avg": 0, "exp_avg_sq": 0}, ()),
    "Adamax": (over(torch.optim.Adamax, lr=0.01), {"exp_avg": 0, "exp_inf": 0}, ()),
    "Adadelta": (over(torch.optim.Adadelta), {"square_avg": 0, "acc_delta": 0}, ()),
    "Adagrad": (over(torch.optim.Adagrad, lr=0.01, initial_accumulator_value=0.1), {"sum": 0.1}, ()),
    "ASGD": (over(torch.optim.ASGD, lr=0.01, lambd=1e-2, t0=1), {}, ("ax",)),
    "Rprop": (over(torch.optim.Rprop, lr=0.01), {"prev": 0, "step_size": 0.01}, ()),
    "RMSprop": (
        over(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
        {"square_avg": 0, "momentum_buffer": 0, "grad_avg": 0},
        (),
    ),
    "SGD": (over(torch.optim.SGD, lr=0.05), {}, ()),
    "SGD momentum": (over(torch.optim.SGD, lr=0.05, momentum=0.9), {"momentum_buffer": 0}, ()),
    "SGD dampening": (over(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.5), {"momentum_buffer": 0}, ()),
    "Adafactor": (over(torch.optim.Adafactor, lr=0.01), {}, ()),
    "Muon": (muon, {"momentum_buffer": 0}, ()),
    "Built": (over(Built, lr=0.05), {"momentum_buffer": 0}, ()),
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
    members = list(engine.run.backend.optimizers)
    found = {name: [o.state[p] for o in members if p in o.state] for name, p in engine.module.named_parameters()}
    return {name: dict(states[0]) for name, states in found.items() if states}


def test_torch_has_no_optimizer_that_the_table_lacks() -> None:
    """L-BFGS needs a closure, SparseAdam sparse gradients: neither trains a model here."""
    known = {name.partition(" ")[0] for name in TABLE} | {"AdamW", "LBFGS", "SparseAdam", "Optimizer"}
    assert {
        n for n, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)
    } <= known


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
        for optimizer in second.run.backend.optimizers:
            optimizer.zero_grad()
    train(second, 9 - stop)
    assert equal(straight, second)


@every
def test_reset_is_a_fresh_optimizer(name: str) -> None:
    """The two steps after a boundary are those of an optimizer that was just built, with the masks of the run."""
    engine = build(name, {**CYCLIC, "optimizer_state": "reset"})
    train(engine, 3)
    model = Model()
    model.load_state_dict(engine.module.state_dict())
    dense = {"method": "dense", "phase_steps": 9, "rounds": 1, "finetune_steps": 1}
    fresh = GaPEngine(model, dense, optimizer=TABLE[name][0](model))
    members = list(fresh.run.backend.optimizers)
    for step in (3, 4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        fresh.backward(fresh(x).square().mean())
        fresh.step()
        for entry in engine.plan.entries:
            if (mask := engine.mask(entry.name)) is not None:
                parameter = model.get_parameter(entry.name)
                others = [o.state[parameter][key] for o in members for key in TABLE[name][2] if parameter in o.state]
                for sequence in (parameter.detach(), *others):
                    sequence.view(-1)[~mask] = 0
    train(engine, 2)
    assert equal(fresh, engine)


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


def stateless(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, rest = split(model)
    return [torch.optim.SGD(rest, lr=0.05), torch.optim.SGD(matrices, lr=0.05)]


def one_without_state(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, rest = split(model)
    return [torch.optim.SGD(rest, lr=0.05), torch.optim.AdamW(matrices, lr=0.01)]


def groups_without_state(model: nn.Module) -> torch.optim.Optimizer:
    matrices, rest = split(model)
    return torch.optim.SGD([{"params": matrices, "momentum": 0.9}, {"params": rest}], lr=0.05)


def empty_groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, rest = split(model)
    empty: list[dict[str, Any]] = [{"params": [], "lr": lr} for lr in (0.1, 0.2)]
    return [torch.optim.AdamW([empty[0], {"params": rest}, empty[1]], lr=0.01), torch.optim.SGD(matrices, lr=0.05)]


@pytest.mark.parametrize("make", [stateless, one_without_state, groups_without_state, empty_groups])
def test_parameters_without_state_and_groups_without_parameters_resume(tmp_path: Path, make: Make) -> None:
    torch.manual_seed(0)
    first, second = (GaPEngine(m, CYCLIC, optimizer=make(m)) for m in (Model(), Model()))
    train(first, 3)
    for group in first.run.backend.optimizers.groups():
        group["lr"] /= 2
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    rates = [[group["lr"] for group in engine.run.backend.optimizers.groups()] for engine in (first, second)]
    assert rates[0] == rates[1]
    train(first, 3)
    train(second, 3)
    assert equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_run_in_another_dtype_resumes(tmp_path: Path, dtype: torch.dtype) -> None:
    """State that is in fp32 beside such weights, and values that pruned weights had, are not rounded."""

    def go_on(engine: GaPEngine, until: int) -> None:
        while engine.applied_steps < until:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(engine.applied_steps))
            engine.backward(engine(x.to(dtype)).square().mean())
            engine.step()

    config = CYCLIC | {"regrow": "last_value"}
    first, second = (
        GaPEngine(model, config, optimizer=torch.optim.NAdam(model.parameters(), lr=0.01))
        for model in (Model().to(dtype), Model().to(dtype))
    )
    go_on(first, 3)
    first.save_checkpoint(tmp_path)
    go_on(first, 9)
    second.load_checkpoint(tmp_path)
    go_on(second, 9)
    assert equal(first, second)
    for parameter, wanted in state(first).items():
        assert all(torch.equal(value, state(second)[parameter][kind]) for kind, value in wanted.items())


# -- a list of optimizers ----------------------------------------------------------------------------------------------


def test_muon_beside_adamw_restarts_its_learning_rates() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizers = muon(model)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5),
        torch.optim.lr_scheduler.MultiStepLR(optimizers[1], [1, 2]),
    ]
    engine = GaPEngine(model, {**CYCLIC, "lr_restart": True}, optimizer=optimizers, lr_scheduler=schedulers)
    rates = []
    for _ in range(6):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        train(engine, 1)
    assert rates == [pytest.approx(row) for row in [[0.02, 0.01], [0.01, 0.001], [0.005, 0.0001]] * 2]


@pytest.mark.parametrize("name", ["Muon", "NAdam", "Rprop", "ASGD", "SGD momentum", "AdamW amsgrad"])
def test_portable_files_hold_the_state_of_all_optimizers(tmp_path: Path, name: str) -> None:
    first, second = build(name), build(name)
    train(first, 4)
    folder = first.save_checkpoint(tmp_path, portable=True) / "gap"
    train(second, 4)
    before = state(second)
    with torch.no_grad():
        for parameter in second.module.parameters():
            parameter.zero_()
    for optimizer in second.run.backend.optimizers:
        optimizer.state.clear()
    portable.read(folder, second.run.backend, second.run.buffers(), second.run.world)
    assert equal(first, second)
    for parameter, kinds in before.items():
        restored = state(second)[parameter]
        for kind, value in kinds.items():
            assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(restored[kind])), kind


def test_an_optimizer_that_never_steps_beside_another_is_named() -> None:
    torch.manual_seed(0)
    model = Model()
    first, second = muon(model)
    engine = GaPEngine(model, CYCLIC, optimizer=[first, second])
    with pytest.raises(ValueError, match=r"optimizer=AdamW: has not stepped while another one did 32 times"):
        for _ in range(32):
            model(torch.ones(1, 6)).square().mean().backward()
            first.step()
            assert not engine.after_step()


@pytest.mark.parametrize(
    ("optimizers", "said"),
    [
        (lambda m: [], "the list is empty"),
        (lambda m: [torch.optim.SGD(m.parameters(), lr=0.1)] * 2, "holds an optimizer twice"),
        (
            lambda m: [torch.optim.SGD(m.parameters(), lr=0.1), torch.optim.Adam(m.head.parameters())],
            "two of SGD, Adam update the same parameter",
        ),
        (lambda m: torch.optim.LBFGS(m.parameters()), "optimizer=LBFGS: its step() needs a closure"),
        (lambda m: muon(m)[1], "does not hold layers.0.fc.weight (4 of 4 are missing)"),
        (lambda m: torch.optim.Adam(Model().parameters()), "does not hold layers.0.fc.weight"),
    ],
)
def test_optimizers_that_cannot_be_used(optimizers: Make, said: str) -> None:
    model = Model()
    with pytest.raises(ValueError) as error:
        GaPEngine(model, CYCLIC, optimizer=optimizers(model))
    assert said in str(error.value)


# -- optimizers that the table does not know ---------------------------------------------------------------------------


class Own(torch.optim.Optimizer):
    """Gradient descent to which a subclass adds state."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0})

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {}

    def change(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.add_(parameter.grad, alpha=-group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter].update(self.first(parameter))
                    self.change(parameter, self.state[parameter], group)


class Lagging(Own):
    """Its state `slow` is a second sequence of the weights, which replaces the first in every second step."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"slow": parameter.detach().clone()}

    def change(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().change(parameter, state, group)
        if group["k"] % 2 == 0:
            state["slow"].lerp_(parameter, 0.5)
            parameter.copy_(state["slow"])


class Rounded(Own):
    """Momentum in 8 bits."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"moment": torch.zeros_like(parameter, dtype=torch.int8)}


class Packed(Own):
    """Momentum in 4 bits."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"moment": torch.zeros(parameter.numel() // 2 + parameter.numel() % 2, dtype=torch.uint8)}


class Stacked(Own):
    """Two momenta side by side in one tensor."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"exp_avg": torch.zeros(2, *parameter.shape)}


class Queued(Own):
    """Gradients of the last steps."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"last": deque([torch.zeros_like(parameter)])}


class Counting(Own):
    """Counts its steps in a state of no parameter."""

    def change(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().change(parameter, state, group)
        self.state["total"] = group["k"]  # type: ignore[index]


class Optimizer2State(Own):
    """Two momenta under the names that bitsandbytes gives them."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"step": 0, "state1": torch.zeros_like(parameter), "state2": torch.zeros_like(parameter)}

    def change(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        for name in ("state1", "state2"):
            state[name].lerp_(parameter.grad, 0.5)
        parameter.add_(state["state1"], alpha=-group["lr"])


class AdamW(Optimizer2State):
    """Bitsandbytes' own, by the name of torch's."""


class Preconditioned(Own):
    """A square statistic as large as the square weights, with a list of others."""

    def first(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {"statistic": torch.eye(parameter.shape[0]), "blocks": [torch.eye(2)]}


def own(kind: type[Own], **options: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    return GaPEngine(model, CYCLIC, optimizer=kind(model.parameters()), **options)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            Lagging,
            r"optimizer=Lagging: its state 'slow' of layers.0.fc.weight .* meaning is not known. Pass optimizer_s",
        ),
        (Preconditioned, r"optimizer=Preconditioned: its state 'statistic' of layers.0.fc.weight"),
        (Stacked, r"its state 'exp_avg' .* is quantized or of a special kind \(Tensor, torch.float32, \(2, 6, 6\)\)"),
        (Queued, r"its state 'last' .* of a special kind \(deque\).* pass optimizer_state={\"last\": \"other\"}"),
        (Counting, r"optimizer=Counting: its state 'total' belongs to no parameter"),
        (Packed, r"optimizer=Packed: its state 'moment' .* is quantized .*torch.uint8"),
        (
            Rounded,
            r"optimizer=Rounded: its state 'moment' .* is quantized .*torch.int8.* Use an optimizer with 16- or 3",
        ),
    ],
)
def test_unknown_state_is_refused_at_the_first_step(kind: type[Own], said: str) -> None:
    engine = own(kind)
    with pytest.raises(ValueError, match=said):
        train(engine, 1)
    assert engine.applied_steps == 0


@pytest.mark.parametrize(
    ("kind", "meaning"), [(Lagging, {"slow": "sequence"}), (Preconditioned, {"statistic": "other"})]
)
def test_state_that_the_user_explains(tmp_path: Path, kind: type[Own], meaning: dict[str, Any]) -> None:
    engine, again = own(kind, optimizer_state=meaning), own(kind, optimizer_state=meaning)
    train(engine, 5)
    engine.save_checkpoint(tmp_path)
    again.load_checkpoint(tmp_path)
    train(engine, 9)
    train(again, 9)
    assert engine.finished and engine.stats()["kept"] == 36 and equal(engine, again)
    for name, found in state(engine).items():
        if kind is Lagging and (mask := engine.mask(name) if name in engine.mask_state.shards else None) is not None:
            assert not found["slow"].flatten()[~mask].count_nonzero() and found["slow"].flatten()[mask].any()


def test_state_is_known_by_the_bases_of_a_class_as_well() -> None:
    engine = own(AdamW)
    train(engine, 2)
    mask = engine.mask("layers.2.fc.weight")
    assert mask is not None
    train(engine, 1)
    grown = state(engine)["layers.2.fc.weight"]
    for name in ("state1", "state2"):
        assert grown[name].flatten()[mask].any() and not grown[name].flatten()[~mask].any()


def test_the_users_word_is_above_the_table() -> None:
    engine = build("Adam", optimizer_state={"exp_avg": "other"})
    train(engine, 2)
    mask = engine.mask("layers.2.fc.weight")
    assert mask is not None
    train(engine, 1)
    grown = state(engine)["layers.2.fc.weight"]
    assert grown["exp_avg"].flatten()[~mask].all() and not grown["exp_avg_sq"].flatten()[~mask].any()
    with pytest.raises(ValueError, match="optimizer_state='momentum': must be moment, sequence or other"):
        build("Adam", optimizer_state={"exp_avg": "momentum"})


class Wrapper(torch.optim.Optimizer):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.optim = base  # as torch's PostLocalSGDOptimizer calls it, and optimizers that shard another

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optim.step()


def test_a_wrapping_optimizer_is_refused_and_the_one_inside_can_be_used() -> None:
    model = Model()
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer=Wrapper: wraps another .* the SGD inside, its attribute optim;"):
        GaPEngine(model, CYCLIC, optimizer=wrapper)
    engine = GaPEngine(model, CYCLIC, optimizer=wrapper.optim)
    for step in range(14):  # as SAM: the gradient is taken at other weights, which are restored before the update
        held = {p: p.detach().clone() for p in model.parameters()}
        with torch.no_grad():
            for p in held:
                p.add_(0.01 * step)
        model(torch.ones(2, 6)).square().mean().backward()
        for p, before in held.items():
            p.data = before
        wrapper.step()
        wrapper.optim.zero_grad()
        assert engine.after_step()
    assert engine.finished and engine.stats()["kept"] == 36


# -- optimizers of other packages --------------------------------------------------------------------------------------


def of_package(package: str, kind: str, **settings: Any) -> Make:
    def make(model: nn.Module) -> Any:
        optimizer = getattr(pytest.importorskip(package), kind)(model.parameters(), **settings)
        if "ScheduleFree" in kind:
            optimizer.train()
        return optimizer

    return make


PACKAGED = {
    "AdamWScheduleFree": of_package("schedulefree", "AdamWScheduleFree", lr=0.01),
    "SGDScheduleFree": of_package("schedulefree", "SGDScheduleFree", lr=0.1),
    "RAdamScheduleFree": of_package("schedulefree", "RAdamScheduleFree", lr=0.01),
    "ScheduleFreeAdamW": of_package("pytorch_optimizer", "ScheduleFreeAdamW", lr=0.01),
    "SOAP": of_package("pytorch_optimizer", "SOAP", lr=0.01, precondition_frequency=2),
    "Shampoo": of_package("pytorch_optimizer", "Shampoo", lr=0.01, momentum=0.5),
}
FREE = [name for name in PACKAGED if "Free" in name]


def packaged(name: str, config: dict[str, Any] | None = None) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    return GaPEngine(model, config or CYCLIC, optimizer=PACKAGED[name](model))


@pytest.mark.parametrize("name", PACKAGED)
def test_optimizers_of_other_packages_train_and_resume(tmp_path: Path, name: str) -> None:
    straight = packaged(name)
    for stop in (0, 3, 5):
        train(straight, stop - straight.applied_steps)
        straight.save_checkpoint(tmp_path)
    train(straight, 9)
    assert straight.finished and straight.stats()["kept"] == 36
    for stop in (0, 3, 5):
        resumed = packaged(name)
        train(resumed, 1)
        resumed.load_checkpoint(tmp_path, f"step_{stop}")
        train(resumed, 14 - stop)
        assert equal(straight, resumed), stop


@pytest.mark.parametrize("name", PACKAGED)
def test_reset_of_optimizers_of_other_packages(name: str) -> None:
    engine = packaged(name, {**CYCLIC, "optimizer_state": "reset"})
    train(engine, 3)
    model = Model()
    model.load_state_dict(engine.module.state_dict())
    fresh = PACKAGED[name](model)
    model(torch.randn(8, 6, generator=torch.Generator().manual_seed(3))).square().mean().backward()
    fresh.step()
    train(engine, 1)
    for key, weight in weights(engine).items():
        mask = engine.mask(key) if key in engine.mask_state.shards else None
        wanted = model.get_parameter(key).detach().flatten()
        assert torch.equal(weight.flatten(), wanted if mask is None else wanted * mask), key


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_weights_are_sparse_in_both_modes_and_saved_in_either(tmp_path: Path, name: str) -> None:
    engine = packaged(name)
    while not engine.finished:
        train(engine, 1)
        engine.optimizer.eval()  # type: ignore[attr-defined]
        engine.check_weights()
        for entry in engine.plan.entries:
            if (mask := engine.mask(entry.name)) is not None:
                assert not weights(engine)[entry.name].flatten()[~mask].count_nonzero()
        if engine.applied_steps == 5:
            engine.save_checkpoint(tmp_path)
        engine.optimizer.train()  # type: ignore[attr-defined]
        engine.check_weights()
    resumed = packaged(name)
    resumed.optimizer.eval()  # type: ignore[attr-defined]
    resumed.load_checkpoint(tmp_path)
    for _ in range(9):
        resumed.optimizer.train()  # type: ignore[attr-defined]
        train(resumed, 1)
        resumed.optimizer.eval()  # type: ignore[attr-defined]
    resumed.optimizer.train()  # type: ignore[attr-defined]
    assert equal(engine, resumed)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Rprop", "Adagrad", "SGD dampened"])
def test_a_run_goes_on_from_a_boundary_that_has_reset_the_optimizer(name: str, tmp_path: Path) -> None:
    """There is no state then, and torch saves what it makes by a step: the next step must still be a first one."""
    config = {**CYCLIC, "optimizer_state": "reset"}
    make = over(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5) if "dampened" in name else TABLE[name][0]

    def engine() -> GaPEngine:
        torch.manual_seed(0)
        model = Model()
        return GaPEngine(model, config, optimizer=make(model))

    straight = engine()
    train(straight, 3)
    straight.save_checkpoint(tmp_path)
    train(straight, 3)
    second = engine()
    second.load_checkpoint(tmp_path)
    train(second, 3)
    assert equal(straight, second)


def test_a_reset_counts_from_the_beginning_where_the_optimizer_had_stepped_before() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = Model()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    optimizer.train()
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 1
    engine = GaPEngine(model, {**CYCLIC, "optimizer_state": "reset"}, optimizer=optimizer, fresh=True)
    train(engine, 3)
    assert optimizer.param_groups[0]["k"] == 0 and optimizer.param_groups[0]["weight_sum"] == 0
