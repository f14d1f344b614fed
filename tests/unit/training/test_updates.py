"""The details of an update and of a restored run, each against numbers made by hand: see tests/mutants.py.

One process and a plain model: these are faults that otherwise only runs over several ranks find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_engine import CYCLIC, Model, build, train, weights
from torch import Tensor

from gap_ds import GaPConfig, GaPEngine
from gap_ds.cli.plan import forecast
from gap_ds.method import plan
from gap_ds.method.rules import Grow, PruneByMagnitude
from gap_ds.sharding.backends import Training, detect
from gap_ds.training.mask_state import MaskState

KEEP, ENTRIES = 9, [f"layers.{i}.fc.weight" for i in range(4)]
#: alpha is 3/8 at step 4 and 1/8 at step 8, of 9 kept weights: 3 and 1 are replaced.
MOVING = {"sparsity": 0.75, "phase_steps": 12, "update_steps": 4, "finetune_steps": 2, "drop_fraction": 0.5}
REPLACED = {4: 3, 8: 1}


class Seen:
    """Weights and gradients that the last optimizer step left and took, after the engine has masked the weights."""

    def __init__(self, engine: GaPEngine) -> None:
        self.parameters = {name: p for name, p in engine.module.named_parameters() if name in ENTRIES}
        self.weights, self.gradients = dict[str, Tensor](), dict[str, Tensor]()
        engine.optimizer.register_step_post_hook(self.look)

    def look(self, *_: object) -> None:
        self.weights = {name: p.detach().flatten().clone() for name, p in self.parameters.items()}
        self.gradients = {name: p.grad.flatten().clone() for name, p in self.parameters.items() if p.grad is not None}


def masks(engine: GaPEngine) -> dict[str, Tensor]:
    found = {name: engine.mask(name) for name in ENTRIES}
    return {name: torch.ones(36, dtype=torch.bool) if mask is None else mask for name, mask in found.items()}


def moments(engine: GaPEngine, name: str) -> list[Tensor]:
    state = engine.optimizer.state[dict(engine.module.named_parameters())[name]]
    return [state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()]


def best(scores: Tensor, allowed: Tensor, n: int) -> Tensor:
    """Mask of the n largest allowed scores."""
    mask = torch.zeros_like(allowed)
    mask[torch.where(allowed, scores.abs(), -1.0).sort(descending=True, stable=True).indices[:n]] = True
    return mask


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_moving_mask_changes_at_its_updates_alone_and_what_comes_is_new(method: str) -> None:
    """RigL grows by the gradient of the step before the update; weights that come have weight and moments zero."""
    engine = build({"method": method, **MOVING})
    seen, before, changed = Seen(engine), masks(engine), []
    while not engine.finished:
        train(engine, 1)
        now, step = masks(engine), engine.applied_steps
        if any(not torch.equal(now[name], before[name]) for name in ENTRIES):
            changed.append(step)
            for name, old in before.items():
                survivors = best(seen.weights[name], old, KEEP - REPLACED[step])
                if method == "rigl":
                    grown = best(seen.gradients[name], ~survivors, REPLACED[step])
                    assert torch.equal(now[name], survivors | grown), (name, step)
                assert int((now[name] & survivors).sum()) == KEEP - REPLACED[step] and int(now[name].sum()) == KEEP
                came = now[name] & ~old
                assert not weights(engine)[name].flatten()[came].count_nonzero()
                for moment in moments(engine, name):
                    assert not moment[came].count_nonzero() and moment[survivors].all()
        before = now
    assert changed == list(REPLACED)


@pytest.mark.parametrize("storage", ["exact", "bf16_cpu"])
@pytest.mark.parametrize("ramp", [0.0, 0.7], ids=["at once", "ramp"])
def test_last_values_are_those_that_each_weight_had_when_it_was_pruned(
    ramp: float, storage: str, tmp_path: Path
) -> None:
    """By whichever of a ramp's masks; also of a run that goes on from a checkpoint inside the ramp."""
    config = {"method": "dsd", "sparsity": 0.75, "phase_steps": 6, "rounds": 2, "finetune_steps": 1}
    config |= {"regrow": "last_value", **({"prune_ramp": ramp, "update_steps": 1} if ramp else {})}
    config |= {"regrow_storage": storage}
    dtype = {"exact": torch.float32, "bf16_cpu": torch.bfloat16}[storage]
    engine = build(config)
    seen, before = Seen(engine), masks(engine)
    last = {name: torch.zeros(36) for name in ENTRIES}
    events, held = [], list[int]()
    while engine.applied_steps < 12:
        if engine.applied_steps == 4:
            engine.save_checkpoint(tmp_path)
            engine = build(config)
            engine.load_checkpoint(tmp_path)
            seen = Seen(engine)
        train(engine, 1)
        now = masks(engine)
        for name in ENTRIES:
            went = before[name] & ~now[name]
            last[name][went] = seen.weights[name][went].to(dtype).float()
        pruned_now = sum(36 - int(now[name].sum()) for name in ENTRIES)
        held.append(engine.stats()["last_value_bytes"])
        assert held[-1] == dtype.itemsize * pruned_now
        if any(not torch.equal(now[name], before[name]) for name in ENTRIES):
            events.append(engine.applied_steps)
        before = now
    if not ramp:  # a plan has the mean density of a phase
        assert max(held) == forecast(engine.module, GaPConfig.load(config))["last_values"]["most"]
    # A ramp over the last 4.2 of 6 steps, which has reached 9 of 36 at its third update; then 6 sparse steps.
    assert events == ([3, 4, 5, 12] if ramp else [6, 12])
    for name, weight in weights(engine).items():
        if name in ENTRIES:
            pruned = last[name] != 0
            assert int(pruned.sum()) == 36 - KEEP and torch.equal(weight.flatten()[pruned], last[name][pruned])


def test_an_export_in_a_ramp_has_the_final_budget(tmp_path: Path) -> None:
    engine = build({**CYCLIC, "phase_steps": 6, "prune_ramp": 0.7, "update_steps": 1})
    train(engine, 4)
    ramping = {name: mask for name, mask in masks(engine).items() if KEEP < int(mask.sum()) < 36}
    assert sorted(ramping) == ENTRIES[:2]
    engine.export(tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in weights(engine).items():
        if name in ENTRIES:
            wanted = best(weight.flatten(), masks(engine)[name], KEEP)
            assert torch.equal(exported[name].flatten(), torch.where(wanted, weight.flatten(), 0.0)), name
    assert all(torch.equal(masks(engine)[name], mask) for name, mask in ramping.items())


@pytest.mark.parametrize("regrow", ["zero", "last_value"])
def test_every_change_of_weights_is_published_after_it(regrow: str) -> None:
    """Growing to the last values, too, changes weights."""
    config = GaPConfig.load({**CYCLIC, "regrow": regrow})
    model = Model()
    backend = detect(model, Training(torch.optim.SGD(model.parameters(), lr=0.1)))
    published: list[int] = []
    weight = model.layers[0].fc.weight
    recording = replace(backend, publish=lambda: published.append(int(weight.count_nonzero())))
    state = MaskState(plan.build(model, config), config, recording)
    entry = state._plan.entries[0]
    assert entry.name == ENTRIES[0] and not published
    state.apply({entry: PruneByMagnitude(entry.keep)}, 3)
    assert published == [KEEP]
    state.apply({entry: Grow()}, 6)
    assert published == ([KEEP, 36] if regrow == "last_value" else [KEEP])  # zeros are there already


def test_a_checkpoint_undoes_an_early_end(tmp_path: Path) -> None:
    """Phase, density and `finished` are the checkpoint's."""
    engine = build()
    train(engine, 4)
    engine.save_checkpoint(tmp_path)
    before = engine.phase, engine.density, engine.finished
    assert engine.finish() and engine.finished
    engine.load_checkpoint(tmp_path)
    assert (engine.phase, engine.density, engine.finished) == before == (engine.schedule.phases[1], 0.625, False)
    train(engine, 10)
    straight = build()
    train(straight, 14)
    wanted = weights(straight)
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights(engine).items())


def scaled(lr: Callable[[int], float], enabled: bool = True) -> tuple[GaPEngine, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
    return build(lr=lr, grad_scaler=scaler), scaler


def overflow(engine: GaPEngine) -> None:
    engine.backward(engine(torch.ones(2, 6)).sum() * float("inf"))
    engine.step()


def test_a_step_that_the_gradient_scaler_skips_is_none_for_the_learning_rate(tmp_path: Path) -> None:
    """And the scale goes on in a resumed run."""
    engine, scaler = scaled(lambda step: 1 / (1 + step))
    rates = []
    for skipped in (False, True, False, True):
        (overflow if skipped else lambda e: train(e, 1))(engine)
        rates.append(engine.optimizer.param_groups[0]["lr"])
    assert engine.applied_steps == 2 and scaler.get_scale() == 2.0
    assert rates == pytest.approx([0.01 / 2, 0.01 / 2, 0.01 / 3, 0.01 / 3])
    engine.save_checkpoint(tmp_path)
    again, fresh = scaled(lambda step: 1 / (1 + step))
    again.load_checkpoint(tmp_path)
    assert fresh.get_scale() == 2.0 and again.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 3)
    off, _ = scaled(lambda step: 1 / (1 + step), enabled=False)
    off.load_checkpoint(tmp_path)
    off.save_checkpoint(tmp_path, "off")
    with pytest.warns(UserWarning, match="the loss scale begins anew"):
        again.load_checkpoint(tmp_path, "off")
    assert again.applied_steps == 2


def test_updates_that_nobody_counts_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = build()
    train(engine, 20)
    assert "stands still" not in caplog.text
    for _ in range(20):
        engine(torch.randn(8, 6)).square().mean().backward()
        engine.optimizer.step()
    assert caplog.text.count("updates were made without engine.step() or engine.after_step()") == 1


class Descent(torch.optim.SGD):
    """Plain descent."""

    reuses = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])
                if self.reuses:
                    parameter.grad.copy_(parameter)


class Reusing(Descent):
    """Leaves other values in the memory of the gradients, as Muon and schedule-free optimizers do."""

    reuses = True


def test_growth_is_by_the_gradient_that_the_optimizer_was_given() -> None:
    """Also where its step uses the gradient's memory for something else, or makes the gradient by a closure."""

    def run(kind: type[Descent], by_closure: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        model = Model()
        optimizer = kind(model.parameters(), lr=0.1)
        engine = GaPEngine(model, {"method": "rigl", **MOVING}, optimizer=optimizer)

        def gradients() -> None:
            optimizer.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(engine.applied_steps))
            engine(x).square().mean().backward()

        found = list[Tensor]()
        while not engine.finished:
            if not by_closure:
                gradients()
            optimizer.step(gradients if by_closure else None)
            engine.after_step()
            found += masks(engine).values()
        return found

    plain = run(Descent)
    assert not torch.equal(plain[0], plain[-4])
    assert all(map(torch.equal, plain, run(Reusing)))
    assert all(map(torch.equal, plain, run(Descent, by_closure=True)))


def test_a_run_that_was_ended_early_goes_on_where_a_budget_is_the_whole_entry(tmp_path: Path) -> None:
    config = {**CYCLIC, "distribution": {"layers.0": 0.0}}
    engine = build(config)
    train(engine, 1)
    assert engine.finish()
    engine.save_checkpoint(tmp_path)
    again = build(config)
    again.load_checkpoint(tmp_path)
    assert again.stats()["kept"] == engine.stats()["kept"] == engine.plan.keep
    dense = build({"method": "dense", "phase_steps": 4, "rounds": 1, "finetune_steps": 1})
    assert not dense.finish() and dense.density == 1.0
