"""The engine over a plain model, in this process: the loop, its options, checkpoints, export, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gap_ds import GaPConfig, GaPEngine
from gap_ds.method import plan

STEPS = {"phase_steps": 3, "rounds": 2, "finetune_steps": 2}
CYCLIC = {"sparsity": 0.75, "partitions": 2, **STEPS}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x).tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.scale)


def build(config: dict[str, Any] | None = None, lr: Any = None, **options: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr) if lr else None
    return GaPEngine(model, config or CYCLIC, optimizer=optimizer, lr_scheduler=scheduler, **options)


def train(engine: GaPEngine, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(engine.applied_steps)
        x = torch.randn(8, 6, generator=generator)
        engine.backward(engine(x).square().mean())
        engine.step()


def weights(engine: GaPEngine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def test_exactly_one_partition_is_dense_until_the_fine_tuning() -> None:
    engine, dense = build(), []
    while not engine.finished:
        rows = engine.stats()["entries"].values()
        dense.append({row["partition"] for row in rows if row["dense"]})
        assert all(row["kept"] == (36 if row["dense"] else 9) for row in rows)
        train(engine, 1)
    assert dense == [{0}] * 3 + [{1}] * 3 + [{0}] * 3 + [{1}] * 3 + [set()] * 2
    assert engine.density == 0.25 and engine.stats()["model_sparsity"] == 4 * 27 / (4 * 42 + 21)
    for name, weight in weights(engine).items():
        if name.startswith("layers") and name.endswith("weight"):
            assert int(weight.count_nonzero()) == 9


def test_all_methods_run_to_their_end() -> None:
    kept = {"dense": 144, "dsd": 36, "static": 36, "cyclic": 36}
    for method, expected in kept.items():
        config = {"method": method, "sparsity": 0.0 if method == "dense" else 0.75, **STEPS}
        if method in ("cyclic", "static"):
            config["partitions"] = 2
        engine = build(config)
        before = engine.stats()["kept"]
        train(engine, engine.schedule.total_steps)
        assert engine.stats()["kept"] == expected, method
        assert before == {"dense": 144, "dsd": 144, "static": 36, "cyclic": 90}[method]


def test_first_masks_by_magnitude_keep_the_largest_of_the_given_weights() -> None:
    torch.manual_seed(0)
    given = dict(Model().named_parameters())
    engine = build({**CYCLIC, "mask_init": "magnitude"})
    for name in ("layers.2.fc.weight", "layers.3.fc.weight"):
        mask = engine.mask(name)
        assert mask is not None
        magnitudes = given[name].detach().abs().flatten()
        assert magnitudes[mask].min() >= magnitudes[~mask].max()
    assert engine.mask("layers.0.fc.weight") is None


def test_a_grown_weight_starts_at_zero_with_moments_at_zero_and_survivors_keep_theirs() -> None:
    engine = build()
    name = "layers.2.fc.weight"  # sparse in phase 0, grown at step 3
    train(engine, 2)
    mask = engine.mask(name)
    assert mask is not None
    train(engine, 1)
    parameter = dict(engine.module.named_parameters())[name]
    state = engine.optimizer.state[parameter]
    assert engine.mask(name) is None
    for moment in (state["exp_avg"], state["exp_avg_sq"]):
        assert not moment.flatten()[~mask].count_nonzero()
        assert moment.flatten()[mask].count_nonzero() == mask.sum()
    assert not parameter.detach().flatten()[~mask].count_nonzero()
    train(engine, 1)
    assert parameter.detach().flatten()[~mask].count_nonzero()


def test_optimizer_state_reset_clears_everything_at_a_boundary() -> None:
    engine = build({**CYCLIC, "optimizer_state": "reset"})
    train(engine, 2)
    assert all(state["step"] == 2 for state in engine.optimizer.state.values())
    train(engine, 1)
    for state in engine.optimizer.state.values():
        assert state["step"] == 0
        assert not state["exp_avg"].count_nonzero() and not state["exp_avg_sq"].count_nonzero()


def test_lr_restart_repeats_the_schedule_in_every_phase() -> None:
    rates: dict[bool, list[float]] = {}
    for lr in (True, False):
        engine = build({**CYCLIC, "lr_restart": lr}, lr=lambda step: 1 / (1 + step))
        rates[lr] = []
        for _ in range(8):
            rates[lr].append(engine.optimizer.param_groups[0]["lr"])
            train(engine, 1)
    assert rates[True] == pytest.approx([0.01, 0.005, 0.01 / 3] * 2 + [0.01, 0.005])
    assert rates[False] == pytest.approx([0.01 / (1 + step) for step in range(8)])


def test_accumulated_micro_batches_are_one_step() -> None:
    engine = build(gradient_accumulation_steps=2)
    train(engine, 5)
    assert engine.applied_steps == 2
    train(engine, 1)
    assert engine.applied_steps == 3 and engine.phase.index == 1


@pytest.mark.parametrize("stop", [1, 3, 5, 13])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, stop: int) -> None:
    straight = build(lr=lambda step: 1 / (1 + step))
    train(straight, 14)
    first = build(lr=lambda step: 1 / (1 + step))
    train(first, stop)
    first.save_checkpoint(tmp_path, client_state={"epoch": 3})
    expected_noise = torch.rand(3)
    second = build(lr=lambda step: 1 / (1 + step))
    assert second.load_checkpoint(tmp_path) == {"epoch": 3}
    assert torch.equal(torch.rand(3), expected_noise)
    assert second.applied_steps == stop and second.phase == first.phase
    train(second, 14 - stop)
    wanted = weights(straight)
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights(second).items())
    assert second.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity": 0.5}, "was written for another plan"),
        ({"partitions": 4}, "was written for another plan"),
        ({"seed": 1}, "was written with seed=0 (now 1)"),
        ({"phase_steps": 4}, "was written with phase_steps=3 (now 4)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    build().save_checkpoint(tmp_path)
    other = build({**CYCLIC, **change})
    before = weights(other)
    with pytest.raises(ValueError, match="start in a new folder") as error:
        other.load_checkpoint(tmp_path)
    assert said in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(other).items())


def test_an_epoch_of_another_length_is_refused(tmp_path: Path) -> None:
    config = {"sparsity": 0.5, "partitions": 2, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 1}
    build(config, steps_per_epoch=4).save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="an epoch had another number of steps"):
        build(config, steps_per_epoch=5).load_checkpoint(tmp_path)


def test_export_prunes_in_the_copy_and_overwrites_nothing_unasked(tmp_path: Path) -> None:
    engine = build()
    train(engine, 4)
    before = weights(engine)
    engine.export(tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.keys() == engine.module.state_dict().keys()
    for name, weight in weights(engine).items():
        assert torch.equal(weight, before[name])
        entry = name.startswith("layers") and name.endswith("weight")
        kept = exported[name] != 0
        assert int(kept.sum()) == (9 if entry else int(weight.count_nonzero()))
        assert torch.equal(exported[name][kept], weight[kept])
    info = json.loads((tmp_path / "model" / "gap.json").read_text())
    assert info["signature"] == engine.signature and info["kept"] == 36
    with pytest.raises(ValueError, match="is not empty"):
        engine.export(tmp_path / "model")
    engine.export(tmp_path / "model", overwrite=True)


def test_nan_stops_a_boundary_with_the_name_of_the_entry() -> None:
    engine = build()
    train(engine, 2)
    # The losses before it were finite, so nothing but the weights can tell; the first entry is named.
    engine.backward(engine(torch.ones(1, 6)).sum())
    for name, parameter in engine.module.named_parameters():
        if name in ("layers.0.fc.weight", "layers.1.fc.weight"):
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layers\.0\.fc\.weight: 36 weights are NaN"):
        engine.step()


def test_attributes_reach_the_wrapped_model_and_close_takes_the_hook_off() -> None:
    engine = build()
    assert engine.head is engine.module.head
    engine.eval()
    assert not engine.module.training
    with pytest.raises(AttributeError):
        _ = engine.no_such_thing
    engine.close()
    name = "layers.2.fc.weight"
    weight = dict(engine.module.named_parameters())[name]
    engine(torch.ones(1, 6)).sum().backward()
    engine.optimizer.step()
    assert int(weight.count_nonzero()) > 9


def test_data_parallel_adds_nothing_to_the_names(tmp_path: Path) -> None:
    model = Model()
    engine = GaPEngine(nn.DataParallel(model), CYCLIC, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert engine.module is model and engine.plan == build().plan
    train(engine, 14)
    engine.export(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


EPOCHS = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 1}
COUNTS = ("steps_per_epoch", "batches_per_epoch")


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (CYCLIC, {"optimizer": None}, "optimizer=None: must be the torch.optim.Optimizer"),
        ({**CYCLIC, "partitions": 5}, {}, "partitions=5"),
        ({**CYCLIC, "lr_restart": True}, {}, '"lr_restart" has no effect without a learning-rate scheduler'),
        ({**CYCLIC, "exclude": ["no.such"]}, {}, 'exclude: pattern "no.such" matches none of 4 weights'),
        ({**CYCLIC, "sparsity": 1.2}, {}, "sparsity=1.2"),
        *(
            (CYCLIC, {"gradient_accumulation_steps": n}, f"gradient_accumulation_steps={n!r}: must be a whole number")
            for n in (0, -1, 1.5, "2")
        ),
        *(
            (CYCLIC, {"gradient_clipping": n}, f"gradient_clipping={n!r}: must be a norm of at least 0")
            for n in (-1, math.nan, None, "1")
        ),
        *((EPOCHS, {name: 2.5}, f"{name}=2.5: must be a whole number.") for name in COUNTS),
        *((EPOCHS, {name: 0}, "steps_per_epoch=0: must be the number of applied steps") for name in COUNTS),
        (CYCLIC, {"lr_scheduler": 3}, "lr_scheduler=3: must be a learning-rate scheduler"),
        (CYCLIC, {"grad_scaler": 3}, "grad_scaler=3: must be a torch.amp.GradScaler"),
        (CYCLIC, {"optimizer_state": "moment"}, "optimizer_state='moment': must be a dict"),
        (CYCLIC, {"whole": 3}, "whole=3: must be the whole model"),
        (CYCLIC, {"worker": 3}, "worker=3: must be a ParallelWorker"),
    ],
)
def test_mistakes_are_named(config: dict[str, Any], options: dict[str, Any], said: str) -> None:
    model = Model()
    arguments = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **options}
    with pytest.raises(ValueError) as error:
        GaPEngine(model, config, **arguments)
    assert said in str(error.value)


def test_the_signature_of_a_run_is_one_line() -> None:
    assert "\n" not in build().signature
    assert build().signature == GaPConfig.load(CYCLIC).signature(__import__("gap_ds").__version__)


def test_optimizers_of_all_kinds_leave_exact_zeros() -> None:
    kinds: list[Any] = [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ]
    for kind in kinds:
        torch.manual_seed(0)
        model = Model()
        engine = GaPEngine(model, CYCLIC, optimizer=kind(model.parameters()))
        for _ in range(14):
            train(engine, 1)
            for entry in engine.plan.entries:
                mask = engine.mask(entry.name)
                if mask is not None:
                    weight = dict(model.named_parameters())[entry.name].detach().flatten()
                    assert int(mask.sum()) == 9 and not weight[~mask].count_nonzero()


def test_the_engine_keeps_no_tensor_but_bits() -> None:
    """No view of a weight and no expanded mask survives a step: other libraries replace what they would look at."""
    engine = build()
    for _ in range(14):
        train(engine, 1)
        attributes = [*vars(engine).values(), *vars(engine.mask_state).values()]
        kept = attributes + [v for value in attributes if isinstance(value, dict) for v in value.values()]
        tensors = [value for value in kept if isinstance(value, torch.Tensor)]
        assert all(t.dtype == torch.uint8 and t.numel() == 5 for t in tensors)  # 36 bits in 5 bytes
        assert len(tensors) == sum(not row["dense"] for row in engine.stats()["entries"].values())
        shard = engine.mask_state.shards["layers.0.fc.weight"]
        assert not any(isinstance(value, torch.Tensor) for value in vars(shard).values())


# -- masks of a model that is sparse already -----------------------------------------------------------------------

INHERIT = {"method": "static", "partitions": 2, **STEPS}


def sparse_run(tmp_path: Path) -> GaPEngine:
    """A finished sparse run, with a checkpoint in tmp_path/end."""
    engine = build()
    train(engine, 14)
    engine.save_checkpoint(tmp_path, "end")
    return engine


def fine_tune(tmp_path: Path, config: dict[str, Any], weights_of: GaPEngine) -> GaPEngine:
    torch.manual_seed(1)
    model = Model()
    model.load_state_dict(weights_of.module.state_dict())
    return GaPEngine(model, config, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))


@pytest.mark.parametrize("init", ["from_weights", "from_file"])
def test_fine_tuning_keeps_the_masks_of_a_sparse_model(tmp_path: Path, init: str) -> None:
    before = sparse_run(tmp_path)
    path = tmp_path / "end" / "gap" / "masks.safetensors"
    config = {**INHERIT, "mask_init": init, **({"mask_file": str(path)} if init == "from_file" else {})}
    engine = fine_tune(tmp_path, config, before)
    assert weights(engine).keys() == weights(before).keys()
    assert all(torch.equal(weight, weights(engine)[name]) for name, weight in weights(before).items())
    train(engine, 14)
    assert engine.finished and engine.stats()["kept"] == 36
    for entry in engine.plan.entries:
        mask, wanted = engine.mask(entry.name), before.mask(entry.name)
        assert mask is not None and wanted is not None and torch.equal(mask, wanted)
        weight, old = weights(engine)[entry.name], weights(before)[entry.name]
        assert not weight.flatten()[~mask].count_nonzero() and not torch.equal(weight, old)


def test_a_kept_weight_that_is_zero_is_in_the_file_of_masks_alone(tmp_path: Path) -> None:
    before = sparse_run(tmp_path)
    weight = dict(before.module.named_parameters())["layers.1.fc.weight"]
    with torch.no_grad():
        weight.view(-1)[int(weight.flatten().nonzero()[0])] = 0.0
    path = str(tmp_path / "end" / "gap" / "masks.safetensors")
    by_file = fine_tune(tmp_path, {**INHERIT, "mask_init": "from_file", "mask_file": path}, before)
    by_weights = fine_tune(tmp_path, {**INHERIT, "mask_init": "from_weights"}, before)
    kept = [engine.stats()["entries"]["layers.1.fc.weight"]["kept"] for engine in (by_file, by_weights)]
    assert kept == [9, 8]


def test_masks_that_cannot_be_taken_over_are_refused(tmp_path: Path) -> None:
    before = build()
    with pytest.raises(ValueError, match=r"no entry has a pruned weight. Load the sparse weights before the engine"):
        build({**INHERIT, "mask_init": "from_weights"})
    train(before, 4)  # partition 1 is dense
    before.save_checkpoint(tmp_path, "early")
    path = tmp_path / "early" / "gap" / "masks.safetensors"
    config = {**INHERIT, "mask_init": "from_file", "mask_file": str(path)}
    with pytest.raises(ValueError, match=r"layers.2.fc.weight has no mask in .* Use the last checkpoint"):
        build(config)
    with pytest.raises(ValueError, match=r"the mask of layers.0.fc.weight, which is no entry here"):
        other = nn.ModuleList(nn.ModuleList([nn.Linear(6, 6)]) for _ in range(4))
        GaPEngine(other, config, optimizer=torch.optim.Adam(other.parameters()))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated or damaged"):
        build(config)
    with pytest.raises(ValueError, match="known in training alone"):
        plan.build(Model(), GaPConfig.load(config))


def test_weights_in_another_memory_format_are_refused() -> None:
    model = nn.ModuleList(nn.ModuleList([nn.Conv2d(4, 4, 3)]) for _ in range(2)).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"0\.0\.weight: is laid out in another memory format \(channels_last\?\)"):
        GaPEngine(model, CYCLIC, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_without_an_order_are_refused(dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    with pytest.raises(ValueError, match=rf"layers\.0\.fc\.weight: its weights are {dtype}, and only"):
        GaPEngine(model, CYCLIC, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_what_has_no_weights_is_no_entry() -> None:
    model = nn.ModuleList(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 0)]) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = GaPEngine(model, {**CYCLIC, "include": [".*weight"]}, optimizer=optimizer)
    assert [entry.name for entry in engine.plan.entries] == ["0.0.weight", "1.0.weight"]


def test_a_client_state_may_hold_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """Such as the best loss before there was any."""
    engine = build()
    engine.save_checkpoint(tmp_path, "t", {"best": float("inf")})
    assert build().load_checkpoint(tmp_path, "t") == {"best": float("inf")}


def test_a_client_state_that_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was not saved, .* holds what JSON cannot express: .*surrogate"):
        build().save_checkpoint(tmp_path, "t", {"file": "\udce4"})


def test_a_load_forgets_what_the_weights_before_it_have_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight, engine = build(gradient_accumulation_steps=2), build(gradient_accumulation_steps=2)
    for run in (straight, engine):
        train(run, 4)
    engine.save_checkpoint(tmp_path)
    assert "in the middle of an update" not in caplog.text
    train(engine, 1)
    engine.save_checkpoint(tmp_path / "late")
    assert "step_2: is saved in the middle of an update" in caplog.text
    engine.backward(engine(torch.ones(1, 6)).sum() * float("nan"))
    engine.load_checkpoint(tmp_path)
    for run in (straight, engine):
        train(run, 8)
    assert all(torch.equal(weight, weights(straight)[name]) for name, weight in weights(engine).items())


def test_after_a_boundary_that_failed_nothing_is_trained_or_saved(tmp_path: Path) -> None:
    engine = build()
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    engine.watch(torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="a loss before the boundary at step 3 was NaN"):
        train(engine, 1)
    for call in (engine.step, engine.finish, lambda: engine.save_checkpoint(tmp_path), lambda: engine.export("model")):
        with pytest.raises(ValueError, match="the boundary at step 3 ended in an error, so the masks are not those"):
            call()
    engine.load_checkpoint(tmp_path)
    train(engine, 12)
    straight = build()
    train(straight, 14)
    assert engine.finished
    assert all(torch.equal(weight, weights(straight)[name]) for name, weight in weights(engine).items())


def test_a_scheduler_too_many_or_too_few_is_told(tmp_path: Path) -> None:
    decay: Any = lambda step: 1 / (1 + step)  # noqa: E731
    for lr, other, said in ((decay, None, "saved with a learning-rate sch"), (None, decay, "saved with no learning-r")):
        engine = build(lr=lr)
        train(engine, 1)
        engine.save_checkpoint(tmp_path, "t")
        with pytest.warns(UserWarning, match=said):
            build(lr=other).load_checkpoint(tmp_path, "t")


def test_defaults_of_torch_change_nothing(tmp_path: Path) -> None:
    """A script may set a default device or dtype for its own tensors: those of the library have theirs."""
    growth = {"target": "rising", "dense_steps": 2, "grow": "gradient", "grow_share": 0.3, "update_steps": 1}
    configs: list[dict[str, Any]] = [
        {**CYCLIC, **growth, "regrow_moments": "mean_second", "regrow_warmup_steps": 2},
        {"method": "rigl", "sparsity": 0.5, "pattern": "1:2", "update_steps": 2, "phase_steps": 8, "finetune_steps": 2},
        {**CYCLIC, "distribution": "global"},
    ]
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]

    def run(folder: Path, models: list[Model]) -> list[dict[str, torch.Tensor]]:
        found = []
        for n, config in enumerate(configs):
            engines = [
                GaPEngine(model, config, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
                for model in models[2 * n : 2 * n + 2]
            ]
            for engine, some in zip(engines, (batches[:5], batches[5:]), strict=True):
                for x in some:
                    engine.backward(engine(x).square().mean())
                    engine.step()
                if engine is engines[0]:
                    engine.save_checkpoint(folder / str(n), tag="a", portable=True)
                    engines[1].load_checkpoint(folder / str(n), "a")
            engines[1].export(folder / f"model{n}")
            found.append(load_file(folder / f"model{n}" / "model.safetensors"))
        return found

    torch.manual_seed(0)
    models = [Model() for _ in range(2 * len(configs))]
    expected = run(tmp_path / "usual", copy.deepcopy(models))
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = run(tmp_path / "changed", models)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_blocks_that_are_far_from_the_sparsity_are_told(caplog: pytest.LogCaptureFixture) -> None:
    blocks = {**CYCLIC, "pattern": "block:3x3"}
    build({**blocks, "sparsity": 0.75})
    assert "blocks" not in caplog.text
    build({**blocks, "sparsity": 0.9})
    assert "the entries keep 25.0% of their weights, where sparsity=0.9 would be 10.0%" in caplog.text
