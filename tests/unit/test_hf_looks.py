"""The Trainer and Accelerate: pretrained weights, a second training, several engines, and files of converted models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_hf import arguments, data, model, same
from torch import nn
from transformers import Trainer

from gap_ds import GaPEngine
from gap_ds.hf import GaPCallback, prepare
from gap_ds.hf.callback import _check_best

GAP = {"sparsity": 0.75, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}


# -- the first mask ----------------------------------------------------------------------------------------------------


def kept_are_largest(engine: GaPEngine, given: nn.Module) -> bool:
    largest = []
    for entry in engine.plan.entries:
        if (mask := engine.mask(entry.name)) is not None:
            magnitudes = given.get_parameter(entry.name).detach().abs().flatten()
            largest.append(bool(magnitudes[mask].min() >= magnitudes[~mask].max()))
    assert largest
    return all(largest)


@pytest.mark.parametrize(
    ("kind", "mask_init", "by_magnitude"),
    [
        ("from_pretrained", None, True),
        ("from_pretrained", "random", False),
        ("from_config", None, False),
        ("from_config", "magnitude", True),
        ("new", None, False),
        ("new head", None, True),
    ],
)
def test_the_first_mask_of_pretrained_weights_is_by_magnitude(
    tmp_path: Path, kind: str, mask_init: str | None, by_magnitude: bool
) -> None:
    """Random weights with the config of a pretrained model are not pretrained, though the config has its name."""
    model().save_pretrained(tmp_path)
    if kind == "from_pretrained":
        trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    elif kind == "new head":
        trained = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    elif kind == "from_config":
        trained = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
        assert trained.config._name_or_path
    else:
        trained = model()
    given = copy.deepcopy(trained)
    config = GAP if mask_init is None else {**GAP, "mask_init": mask_init}
    engine = GaPEngine(trained, config, optimizer=torch.optim.SGD(trained.parameters(), lr=0.1))
    assert kept_are_largest(engine, given) == by_magnitude
    assert engine.config.mask_init == (mask_init or ("magnitude" if by_magnitude else "random"))


# -- a second training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_second_training_begins_anew_only_when_asked(tmp_path: Path, optim: str) -> None:
    callback = GaPCallback(GAP)
    trainer = Trainer(
        model(), arguments(tmp_path, optim=optim, max_steps=6), train_dataset=data(), callbacks=[callback]
    )
    trainer.train()
    with pytest.raises(ValueError, match=r"has already updated weights.*fresh=True"):
        trainer.train()
    callback.fresh = True
    trainer.train()
    assert callback.engine is not None and callback.engine.finished
    callback.engine.check_weights()


def test_a_second_training_resumes(tmp_path: Path) -> None:
    callback = GaPCallback(GAP)
    settings = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    trainer = Trainer(model(), settings, train_dataset=data(), callbacks=[callback])
    trainer.train()
    wanted = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, wanted[name]) for name, p in trainer.model.named_parameters())


# -- checkpoints whose names transformers converts ---------------------------------------------------------------------


def test_a_checkpoint_that_transformers_loads_wrongly_is_refused(tmp_path: Path) -> None:
    """transformers 5 saves a mixture's experts one by one, and resumes without them."""

    def mixture(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
        config = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes)
        built: nn.Module = transformers.MixtralForCausalLM(config)
        return built

    def run(seed: int, resume: str | None) -> None:
        settings = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = Trainer(mixture(seed), settings, train_dataset=data(), callbacks=[GaPCallback(GAP)])
        trainer.train(resume_from_checkpoint=resume)

    run(0, None)
    with pytest.raises(ValueError, match=r"that its masks prune are not 0: .*from_pretrained"):
        run(1, str(tmp_path / "checkpoint-3"))


# -- Accelerate --------------------------------------------------------------------------------------------------------


def prepared(accelerator: Any, seed: int, masks: int) -> tuple[nn.Module, Any, GaPEngine]:
    torch.manual_seed(seed)
    trained = model() if seed == 0 else transformers.LlamaForCausalLM(model().config)
    wrapped, optimizer = accelerator.prepare(trained, torch.optim.AdamW(trained.parameters(), lr=0.01))
    return wrapped, optimizer, prepare(accelerator, wrapped, optimizer, None, {**GAP, "seed": masks})


def steps(accelerator: Any, trained: list[tuple[nn.Module, Any, GaPEngine]], first: int, last: int) -> None:
    for step in range(first, last):
        for wrapped, optimizer, engine in trained:
            accelerator.backward(wrapped(**{key: value[None] for key, value in data()[step].items()}).loss)
            optimizer.step()
            optimizer.zero_grad()
            assert engine.after_step()


def test_two_engines_of_one_accelerator_have_their_own_masks(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    both = [prepared(accelerator, 0, masks) for masks in (0, 1)]
    steps(accelerator, both, 0, 3)
    accelerator.save_state(tmp_path)
    steps(accelerator, both, 3, 6)

    again = accelerate.Accelerator(cpu=True)
    resumed = [prepared(again, seed, masks) for seed, masks in ((0, 0), (2, 1))]
    again.load_state(tmp_path)
    steps(again, resumed, 3, 6)
    for (one, _, engine), (other, _, also) in zip(both, resumed, strict=True):
        assert same(one, other) and also.finished and also.applied_steps == engine.applied_steps
    a, b = (resumed[i][2].mask(resumed[0][2].plan.entries[0].name) for i in (0, 1))
    assert a is not None and b is not None and not torch.equal(a, b)


def test_a_state_without_masks_is_refused(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    plain = model()
    accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.01))
    accelerator.save_state(tmp_path)
    again = accelerate.Accelerator(cpu=True)
    prepared(again, 0, 0)
    with pytest.raises(ValueError, match="holds no masks: it was saved before gap_ds prepared this model"):
        again.load_state(tmp_path)


def test_a_closed_engine_is_no_part_of_what_accelerate_saves(tmp_path: Path) -> None:
    """Its model is trained on without masks."""
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped, optimizer, engine = prepared(accelerator, 0, 0)
    steps(accelerator, [(wrapped, optimizer, engine)], 0, 2)
    engine.close()
    accelerator.backward(wrapped(**{key: value[None] for key, value in data()[0].items()}).loss)
    optimizer.step()
    accelerator.save_state(tmp_path)
    assert not (tmp_path / "gap" / "state.json").exists()


def test_a_best_model_of_other_names_is_refused(tmp_path: Path) -> None:
    """The Trainer passes over such weights, and the masks alone may not show it."""
    found = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(4))})
    engine = GaPEngine(found, GAP, optimizer=torch.optim.SGD(found.parameters(), lr=0.1))
    weights = {name: p.detach().clone() for name, p in found.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    _check_best(engine, tmp_path)
    save_file({f"old.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.0\.weight and 3 other entries were saved under other names"):
        _check_best(engine, tmp_path)
