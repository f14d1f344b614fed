"""The Trainer's callback and the Accelerate helper on one process; tests/sharding/test_hf_sharding.py has the rest."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from gap_ds import GaPEngine, optim
from gap_ds.export.info import ExportInfo
from gap_ds.hf import GaPCallback, prepare
from gap_ds.report import runs

GAP = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 0.6, "rounds": 1, "finetune_epochs": 0.8}
STEPS_PER_EPOCH, EPOCHS = 5, 2  # 19 examples, 2 in a batch, 2 batches in a step: the last step of an epoch has 2, too
BOUNDARIES = [3, 6, 10]


def model(dropout: float = 0.0) -> nn.Module:
    """A tiny language model, with the same weights at every call."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    built: nn.Module = transformers.LlamaForCausalLM(config)
    return built


def data(examples: int = 19) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 50, (6,), generator=generator) for _ in range(examples)]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(**{**settings, **options})


class Witness(TrainerCallback):
    """Looks at the weights after every optimizer step, without asking the engine which of them are masked."""

    def __init__(self, callback: GaPCallback) -> None:
        self.callback, self.wrong = callback, list[str]()
        self.masks: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        engine, weights = self.callback.engine, dict(model.named_parameters())
        for entry in engine.plan.entries:
            nonzero = int(weights[entry.name].count_nonzero())
            if entry.partition not in engine.phase.dense and nonzero > entry.keep:
                self.wrong.append(f"step {state.global_step}: {entry.name} has {nonzero} of {entry.keep}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        engine = self.callback.engine
        if engine.applied_steps != state.global_step:
            self.wrong.append(f"{engine.applied_steps} applied steps, {state.global_step} of the Trainer")
        self.masks.append({n: m for e in engine.plan.entries if (m := engine.mask(n := e.name)) is not None})


def train(folder: Path, resume: str | None = None, **options: Any) -> tuple[Trainer, GaPCallback, Witness]:
    callback = GaPCallback(options.pop("gap", GAP), **options.pop("callback", {}))
    witness = Witness(callback)
    trained = options.pop("model", None) or model(options.pop("dropout", 0.0))
    more, evaluated = options.pop("callbacks", []), options.pop("eval_dataset", None)
    optimizers = options.pop("optimizers", lambda trained: (None, None))
    trainer = Trainer(
        trained,
        arguments(folder, **options),
        train_dataset=data(),
        eval_dataset=evaluated,
        optimizers=optimizers(trained),
        callbacks=[witness, *more, callback],  # the callback takes its place itself
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback, witness


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def sparse(trained: nn.Module, engine: GaPEngine) -> bool:
    weights = dict(trained.named_parameters())
    return all(int(weights[e.name].count_nonzero()) == e.keep for e in engine.plan.entries)


def test_the_callback_equals_a_loop_with_an_engine(tmp_path: Path) -> None:
    trainer, callback, witness = train(tmp_path, max_grad_norm=0.0)
    assert witness.wrong == []
    assert [phase.end_step for phase in callback.engine.schedule.phases] == BOUNDARIES

    # The same batches, in the same order, with the same accumulation of loss, in a loop without the Trainer.
    again = Trainer(model(), arguments(tmp_path), train_dataset=data())
    transformers.set_seed(5)
    loader, plain = again.get_train_dataloader(), again.model.train()
    optimizer = again.create_optimizer()
    scheduler = again.create_scheduler(10, optimizer)
    engine = GaPEngine(plain, GAP, optimizer=optimizer, lr_scheduler=scheduler, steps_per_epoch=STEPS_PER_EPOCH)
    masks = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        batches = list(loader)
        for i in range(0, len(batches), 2):
            tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches[i : i + 2])
            for batch in batches[i : i + 2]:
                engine.backward(engine(**batch, num_items_in_batch=torch.tensor(tokens)).loss)
            engine.step()
            masks.append({n: m for e in engine.plan.entries if (m := engine.mask(n := e.name)) is not None})
    assert engine.applied_steps == len(witness.masks) == 10
    for got, wanted in zip(witness.masks, masks, strict=True):
        assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    assert same(trainer.model, plain)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    """9 examples are 5 batches of 2, and with an accumulation over 2 they are 3 steps."""
    gap = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 1, "rounds": 1, "finetune_epochs": 1}
    callback = GaPCallback(gap)
    trainer = Trainer(model(), arguments(tmp_path, num_train_epochs=3), train_dataset=data(9), callbacks=[callback])
    trainer.train()
    assert callback.engine is not None and callback.engine.applied_steps == 9
    assert [phase.end_step for phase in callback.engine.schedule.phases] == [3, 6, 9]


def test_resuming_equals_never_having_stopped(tmp_path: Path) -> None:
    straight, _, seen = train(tmp_path, save_strategy="steps", save_steps=4, dropout=0.2)
    resumed, callback, witness = train(tmp_path, str(tmp_path / "checkpoint-4"), dropout=0.2)
    assert witness.wrong == [] and len(witness.masks) == 6
    for got, wanted in zip(witness.masks, seen.masks[4:], strict=True):
        assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    assert same(straight.model, resumed.model)
    assert callback.engine.finished


def test_the_saved_model_is_exactly_sparse(tmp_path: Path) -> None:
    trainer, callback, _ = train(tmp_path)
    trainer.save_model(str(tmp_path / "final"))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert sparse(loaded, callback.engine) and same(loaded, trainer.model)
    # Beside it lies what gap-ds needs, with counts of the files; and the output folder is that of a run.
    info = ExportInfo.model_validate_json((tmp_path / "final" / "gap.json").read_text())
    assert info.finished and {n: e.nonzero for n, e in info.entries.items()} == {
        e.name: e.keep for e in callback.engine.plan.entries
    }
    trainer.save_model()
    trainer.save_state()
    run = runs.load(tmp_path, "run")
    logged = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    assert run.train == logged and run.schedule == callback.engine.schedule
    assert run.missing == []


def test_a_model_with_a_dense_partition_gets_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class SaveEarly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                trainer.save_model(str(tmp_path / "early"))

    trainer = Trainer(model(), arguments(tmp_path), train_dataset=data(), callbacks=[GaPCallback(GAP), SaveEarly()])
    trainer.train()
    assert "no gap.json was written" in caplog.text and "so it is not the sparse model" in caplog.text
    assert (tmp_path / "early" / "model.safetensors").is_file() and not (tmp_path / "early" / "gap.json").exists()


def test_phases_are_logged_by_the_trainer(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        rows: ClassVar[list[dict[str, Any]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            self.rows.append(logs)

    trainer, _, _ = train(tmp_path, callbacks=[Reporter()], logging_steps=5)
    rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert sorted(rows) == [3, 5, 6, 10]  # the boundaries as well
    assert [rows[step]["gap/phase"] for step in sorted(rows)] == [1, 1, 2, 2]
    assert [rows[step]["gap/partition"] for step in sorted(rows)] == [1, 1, -1, -1]
    assert rows[10]["gap/density"] == pytest.approx(0.25) and rows[5]["gap/density"] > 0.5
    assert [row["gap/phase"] for row in Reporter.rows if "loss" in row] == [1, 1, 2, 2]
    assert all("gap/phase" not in row for row in Reporter.rows if "loss" not in row)


def test_early_stopping_prunes_what_is_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    trainer, callback, _ = train(tmp_path / "a", callbacks=[Stop()])
    assert sparse(trainer.model, callback.engine) and callback.engine.applied_steps == 4 and callback.engine.finished
    assert callback.engine.density == pytest.approx(0.25, abs=1e-3)
    assert "the training ended at step 4 in phase 1" in caplog.text and "without fine-tuning" in caplog.text
    caplog.clear()
    trainer, callback, _ = train(tmp_path / "b", callbacks=[Stop()], callback={"prune_at_end": False})
    assert not sparse(trainer.model, callback.engine) and "it is left so" in caplog.text


def test_the_best_model_gets_its_own_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The metric is best at step 4, where partition 1 is dense; early stopping ends the training soon after."""

    class Best(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 4:
                self.weights = copy.deepcopy(model.state_dict())

    best = Best()

    class Metric(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": abs(self.state.global_step - 4.0)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    callback = GaPCallback(GAP)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = Metric(
        model(),
        arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **options),
        train_dataset=data(),
        eval_dataset=data(4),
        callbacks=[callback, best, EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert "Set eval_delay=6" in caplog.text
    assert "the best model" in caplog.text and "ended at step 4 in phase 1" in caplog.text
    assert sparse(trainer.model, callback.engine)
    engine = callback.engine
    for entry in engine.plan.entries:
        weight, was = dict(trainer.model.named_parameters())[entry.name], best.weights[entry.name]
        assert torch.equal(weight, torch.where(engine.mask(entry.name).view(was.shape), was, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a loss before the boundary at step 6 was NaN or infinite on rank 0"),
        ({"save_strategy": "steps", "save_steps": 5}, "a loss before the masks saved at step 5 was NaN or infinite"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """The Trainer itself goes on, and logs a running mean in the place of such a loss."""
    ruined, calls = model(), iter(range(100))

    def ruin(module: nn.Module, args: Any, output: Any) -> None:
        if next(calls) == 7:  # of the fourth step
            output["loss"] = output["loss"] * math.inf

    ruined.register_forward_hook(ruin)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=ruined, **options)
    assert not any(tmp_path.rglob("state.json"))


def test_updates_that_a_gradient_scaler_leaves_out_end_no_training(tmp_path: Path) -> None:
    """Accelerate has a scaler under fp16 on a GPU, whose first scale may be too large for several steps."""
    rough, calls = model(), iter(range(100))

    def overflow(module: nn.Module, args: Any, output: Any) -> None:
        if next(calls) < 10:  # of the first five steps
            output["loss"] = output["loss"] * math.inf

    rough.register_forward_hook(overflow)
    callback = GaPCallback(GAP)
    options = arguments(tmp_path, num_train_epochs=3, max_grad_norm=0.0)
    trainer = Trainer(rough, options, train_dataset=data(), callbacks=[callback])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    trainer.train()
    assert callback.engine.applied_steps == 10 and callback.engine.finished
    assert sparse(trainer.model, callback.engine)


def test_a_second_training_begins_anew_only_where_asked_for(tmp_path: Path) -> None:
    trainer, callback, witness = train(tmp_path)
    first = callback.engine
    with pytest.raises(ValueError, match=r"AdamW: has already updated weights.*fresh=True"):
        trainer.train()
    callback.fresh = True
    trainer.train()
    assert callback.engine is not first and callback.engine.applied_steps == 10
    assert first.applied_steps == 10 and witness.wrong == []
    assert sparse(trainer.model, callback.engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 1}, "num_train_epochs=1: the training has 5 steps and the schedule 10"),
        ({"max_steps": 7}, "max_steps=7: the training has 7 steps and the schedule 10"),
    ],
)
def test_a_schedule_longer_than_the_training_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)


def test_data_without_a_length_needs_times_in_steps(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(data())

    def run(gap: dict[str, Any]) -> GaPCallback:
        callback = GaPCallback(gap)
        Trainer(model(), arguments(tmp_path, max_steps=4), train_dataset=Stream(), callbacks=[callback]).train()
        return callback

    with pytest.raises(ValueError, match=r'the training data has no length.*"phase_steps", "finetune_steps"'):
        run(GAP)
    steps = {"sparsity": 0.75, "partitions": 2, "phase_steps": 1, "rounds": 1, "finetune_steps": 2}
    assert run(steps).engine.finished


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    plain = Trainer(model(), arguments(tmp_path, save_strategy="steps", save_steps=4), train_dataset=data())
    plain.train()
    with pytest.raises(ValueError, match=r"checkpoint-4/gap: holds no masks: .* Use an earlier checkpoint"):
        train(tmp_path, str(tmp_path / "checkpoint-4"))


def test_another_config_cannot_resume(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match=r"was written with rounds=1 \(now 0\)"):
        train(tmp_path, str(tmp_path / "checkpoint-4"), gap=GAP | {"rounds": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "parallel"}, 'method="parallel": a worker of parallel GaP is a separate job'),
        ({"lr_restart": True}, '"lr_restart": the scheduler that the Trainer builds covers the whole training'),
        ({"sparsity": 1.5}, "sparsity=1.5: input should be less than 1"),
    ],
)
def test_what_the_callback_refuses_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaPCallback(GAP | change)


def test_a_hyperparameter_search_must_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = GaPCallback(GAP)
    trainer = Trainer(model(), arguments(tmp_path, save_strategy="steps"), train_dataset=data(), callbacks=[callback])
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    with pytest.raises(ValueError, match=r'^save_strategy=steps: .*hyperparameter search .* Set save_strategy to "no"'):
        trainer._inner_training_loop(2, trainer.args, trial={"learning_rate": 1e-3})


class Noted(torch.optim.SGD):
    """Keeps the last gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["last"] = parameter.grad.clone()
        super().step(closure)


def test_state_of_an_optimizer_can_be_explained(tmp_path: Path) -> None:
    options = {"optimizers": lambda trained: (Noted(trained.parameters(), lr=0.1), None)}
    with pytest.raises(ValueError, match=r'Pass optimizer_state=\{"last": "moment"\}'):
        train(tmp_path / "refused", **options)
    trainer, callback, _ = train(tmp_path / "trained", callback={"optimizer_state": {"last": "other"}}, **options)
    assert callback.engine.finished and sparse(trainer.model, callback.engine)


def test_it_must_be_called_by_a_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not called by the train"):
        GaPCallback(GAP).on_train_begin(None, None, None)


# -- Accelerate --------------------------------------------------------------------------------------------------------

ACCELERATED = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 0.6, "rounds": 1, "finetune_epochs": 0.8}


def accelerated(stop: int, resume: Path | None = None, save: Path | None = None, **gap: Any) -> tuple[Any, GaPEngine]:
    """Ten steps of a loop written for Accelerate, or fewer."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    loader = torch.utils.data.DataLoader(data(), batch_size=2)
    net, optimizer, loader, scheduler = accelerator.prepare(plain, optimizer, loader, scheduler)
    engine = prepare(
        accelerator, net, optimizer, scheduler, ACCELERATED | gap, steps_per_epoch=math.ceil(len(loader) / 2)
    )
    first = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        first = engine.applied_steps
    step = 0
    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(net):
                if not first <= step < stop:
                    step += accelerator.sync_gradients
                    continue
                accelerator.backward(net(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if engine.after_step():
                    step += 1
                    if step == 4 and save is not None:
                        accelerator.save_state(str(save))
    return accelerator.unwrap_model(net), engine


@pytest.mark.parametrize("gap", [{}, {"lr_restart": True}, {"regrow": "last_value"}])
def test_an_accelerate_loop_saves_and_resumes(tmp_path: Path, gap: dict[str, Any]) -> None:
    straight, engine = accelerated(10, save=tmp_path / "state", **gap)
    assert engine.finished and sparse(straight, engine)
    resumed, again = accelerated(10, resume=tmp_path / "state", **gap)
    assert again.finished and same(straight, resumed)
    for entry in engine.plan.entries:
        assert torch.equal(engine.mask(entry.name), again.mask(entry.name))


def test_prepare_refuses_parallel() -> None:
    with pytest.raises(ValueError, match="a worker of parallel GaP is a separate job"):
        prepare(None, model(), None, None, ACCELERATED | {"method": "parallel"})


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gap_ds")
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.full
def test_state_for_kept_weights_alone_in_a_trainer(tmp_path: Path) -> None:
    """Equal to torch's AdamW, and when resumed in the middle of a phase."""

    def over(kind: Any) -> Any:
        def made(trained: nn.Module) -> tuple[Any, Any]:
            optimizer = kind(trained.parameters(), lr=1e-2)
            return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

        return made

    saving = {"save_strategy": "steps", "save_steps": 4, "save_only_model": False}
    ours, callback, witness = train(tmp_path / "ours", optimizers=over(optim.AdamW), **saving)
    theirs, *_ = train(tmp_path / "theirs", optimizers=over(torch.optim.AdamW))
    assert witness.wrong == [] and sparse(ours.model, callback.engine) and same(ours.model, theirs.model)
    resumed, *_ = train(
        tmp_path / "ours", str(tmp_path / "ours" / "checkpoint-4"), optimizers=over(optim.AdamW), **saving
    )
    assert same(resumed.model, ours.model)
