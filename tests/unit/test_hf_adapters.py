"""peft's own LoRA over a sparse base: masked products, merges that keep zeros, and an engine that holds them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

peft = pytest.importorskip("peft")

from gap_ds import GaPEngine  # noqa: E402
from gap_ds.hf import GaPCallback, mask_adapters, merge  # noqa: E402

HELD = {"method": "static", "mask_init": "from_weights", "phase_steps": 2, "rounds": 0, "finetune_steps": 6}


def base(kind: str = "llama", sparsity: float = 0.8) -> Any:
    """A tiny model whose matrices in blocks are sparse."""
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    elif kind == "mixtral":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes)
        model = MixtralForCausalLM(config)
    else:  # whose Conv1D has the inputs first
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and ("layers" in name or ".h." in name):
            threshold = weight.detach().abs().flatten().kthvalue(int(sparsity * weight.numel())).values
            weight.data[weight.abs() <= threshold] = 0.0
    return model.eval()


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in model.named_parameters() if 0.5 < (weight == 0).float().mean() < 1}


def adapted(model: nn.Module, **options: Any) -> Any:
    targets = ["c_attn", "c_fc"] if isinstance(model, GPT2LMHeadModel) else ["q_proj", "v_proj", "down_proj"]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options))


TOKENS = torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(1))


def loss(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    return found


def train(model: Any, steps: int = 12) -> float:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(loss(model.eval()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_is_lost_where_the_product_was_masked(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    sparse = base(kind)
    wanted, before = zeros(sparse), float(loss(sparse).detach())
    assert len(wanted) == (14 if kind == "llama" else 8)
    model = adapted(sparse)
    assert len(mask_adapters(model)) == (6 if kind == "llama" else 4)
    trained = train(model)
    assert trained < before - 0.1
    caplog.clear()
    merged = merge(model)
    assert merged.lost == 0 and set(merged.layers.values()) == {0.0} and not caplog.records
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert {name: int(mask.sum()) for name, mask in zeros(merged.model).items()} == {
        name: int(mask.sum()) for name, mask in wanted.items()
    }
    for name, mask in wanted.items():
        weight = merged.model.get_parameter(name)
        assert not weight[mask].any() and not weight[mask].signbit().any()
    with torch.no_grad():
        assert float(loss(merged.model)) == pytest.approx(trained, rel=1e-5)


def test_a_plain_merge_says_what_it_loses(caplog: pytest.LogCaptureFixture) -> None:
    sparse = base()
    wanted = zeros(sparse)
    model = adapted(sparse)
    trained = train(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    update, mask = layer.get_delta_weight("default").detach(), layer.base_layer.weight != 0
    whole = copy.deepcopy(model).merge_and_unload()
    with caplog.at_level(logging.WARNING, "gap_ds"):
        merged = merge(model)
    assert 0.7 < merged.lost < 1 and f"loses {merged.lost:.1%} of the norm" in caplog.text
    name = next(name for name in merged.layers if name.endswith("layers.0.self_attn.q_proj"))
    assert merged.layers[name] == pytest.approx(float((update * ~mask).norm() / update.norm()), rel=1e-4)
    for name, mask in wanted.items():
        assert not merged.model.get_parameter(name)[mask].any()
        if "q_proj" in name:
            assert whole.get_parameter(name)[mask].any()
    with torch.no_grad():
        assert float(loss(whole)) == pytest.approx(trained, rel=1e-5) and float(loss(merged.model)) > trained + 0.01


def test_masked_products_have_the_gradients_of_a_product_written_out() -> None:
    model = adapted(base(), lora_dropout=0.0)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    mask_adapters(model)
    x = torch.randn(3, 5, 48)
    own = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    pair = [weight.detach().clone().requires_grad_() for weight in own]
    weight = layer.base_layer.weight.detach().clone()
    wanted = x @ torch.where(weight == 0, 0.0, weight + 2 * pair[1] @ pair[0]).T
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for trained, reference in zip(own, pair, strict=True):
        torch.testing.assert_close(trained.grad, reference.grad)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)


def test_other_adapters_are_merged_and_dense_layers_are_left_alone() -> None:
    sparse = base()
    dense = sparse.model.layers[0].self_attn.q_proj.weight
    nn.init.normal_(dense)
    wanted = zeros(sparse)
    model = adapted(sparse, use_dora=True)
    train(model, 3)
    with pytest.raises(ValueError, match=r"kind DoraLinearVariant, .*use_dora=False"):
        mask_adapters(model)
    merged = merge(model)
    for name, mask in wanted.items():
        assert not merged.model.get_parameter(name)[mask].any()
    own = next(value for name, value in merged.layers.items() if name.endswith("layers.0.self_attn.q_proj"))
    assert own == 0 < merged.lost
    assert len(mask_adapters(adapted(base()))) == 6


def test_adapters_that_were_saved(tmp_path: Path) -> None:
    model = adapted(base())
    mask_adapters(model)
    trained = train(model, 3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert float(loss(again)) != pytest.approx(trained, rel=1e-4)  # the plain product of the same A and B
    mask_adapters(again)
    assert float(loss(again)) == pytest.approx(trained, rel=1e-5)
    merged = merge(again).model
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(loaded.get_parameter(n), p) for n, p in merged.named_parameters())


def test_what_cannot_be_merged_or_masked() -> None:
    for call in (merge, mask_adapters):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM: (is no model with|has no) adapters of peft"):
            call(base())
    model = adapted(base())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: is merged already. Call model.unmerge_adapter\(\) first"):
        merge(model)
    model = adapted(base())
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.ds_id = 0
    for call in (merge, mask_adapters):
        with pytest.raises(ValueError, match=r"q_proj: its base weight is spread over ranks"):
            call(model)


def kept_zeros(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    return not any(model.get_parameter(name)[mask].any() for name, mask in wanted.items())


def test_a_copy_that_was_trained_whole_keeps_the_zeros(caplog: pytest.LogCaptureFixture) -> None:
    """modules_to_save puts a trained copy in the place of a module."""
    sparse = base()
    nn.init.zeros_(sparse.lm_head.weight[7])  # padding, which a copy may fill
    wanted = zeros(sparse)
    model = adapted(sparse, modules_to_save=["up_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"up_proj\.weight: is sparse in the base and is trained whole"):
        mask_adapters(model)
    train(model, 3)
    with caplog.at_level(logging.WARNING, "gap_ds"):
        merged = merge(model)
    assert "of the norm of their update, where the base is 0." in caplog.text
    lost = {name: value for name, value in merged.layers.items() if "up_proj" in name}
    assert len(lost) == 2 and min(lost.values()) > 0.5 and merged.lost > 0
    assert kept_zeros(merged.model, wanted) and merged.model.get_parameter("lm_head.weight")[7].all()


def test_experts_in_one_tensor_keep_their_zeros() -> None:
    """target_parameters adapts a parameter, and several of one module by layers inside of each other."""
    sparse = base("mixtral")
    wanted = {name: mask for name, mask in zeros(sparse).items() if "experts" in name}
    assert len(wanted) == 4
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(sparse, target_modules=["q_proj"], target_parameters=names)
    with pytest.raises(ValueError, match=r"experts: has no LoRA adapter that can be masked"):
        mask_adapters(model)
    train(model, 3)
    merged = merge(model)
    assert merged.lost > 0.5 and kept_zeros(merged.model, wanted)
    assert sum("experts" in name for name in merged.layers) == 4


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialization_that_rewrites_the_base_is_refused(init: str) -> None:
    model = adapted(base(), init_lora_weights=init)
    for call in (merge, mask_adapters):
        with pytest.raises(ValueError, match=rf'init_lora_weights="{init}": writes another matrix into the base'):
            call(model)


def test_adapters_with_a_forward_pass_of_their_own_are_not_masked() -> None:
    settings: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 20, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(base(), peft.AdaLoraConfig(task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match=r"q_proj: has no LoRA adapter that can be masked"):
        mask_adapters(model)


def test_what_a_merge_would_change_elsewhere_is_refused_before_anything_is_merged() -> None:
    tied = base()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    twice = adapted(base(), layer_replication=[[0, 2], [0, 2]])
    with_bias = adapted(base(), lora_bias=True)
    attention = peft.get_peft_model(
        nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), peft.LoraConfig(target_modules=["attn"])
    )
    for model, message in (
        (adapted(tied, target_modules=["q_proj", "lm_head"]), r"lm_head: its base weight is that of .*embed_tokens"),
        (twice, r"layers\.0\.self_attn\.q_proj: its base weight is that of .*layers\.2\."),
        (with_bias, r"q_proj: its adapter has a bias and its base has none"),
        (attention, r"attn: its base, of class MultiheadAttention, has no weight to look at"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(model)
        assert not any(getattr(layer, "merged", False) for layer in model.modules())
    new_tokens = adapted(base(), trainable_token_indices=[1, 2])
    train(new_tokens, 2)
    assert merge(new_tokens).lost > 0


def test_an_engine_holds_the_base() -> None:
    """Its entries are the frozen matrices; the adapters are none, and train as without an engine."""
    alone = adapted(base())
    wanted = train(alone, 6)
    model = adapted(base())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    engine = GaPEngine(model, HELD, optimizer=optimizer)
    assert len(engine.plan.entries) == 14 and not any("lora" in entry.name for entry in engine.plan.entries)
    assert engine.plan.held == {entry.name for entry in engine.plan.entries}
    while not engine.finished:
        engine.backward(loss(engine))
        engine.step()
    assert engine.stats()["density"] == pytest.approx(0.2, abs=0.01)
    with torch.no_grad():
        assert float(loss(model.eval())) == wanted
    with torch.no_grad():
        engine.module.get_parameter(engine.plan.entries[0].name).add_(1.0)
    with pytest.raises(ValueError, match=r"of its pruned weights are not 0"):
        engine.check_weights()


def test_a_trainer_with_the_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(base())
    mask_adapters(model)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    options: dict[str, Any] = {"max_steps": 8, "save_steps": 4, "learning_rate": 1e-2, "logging_steps": 4}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}
    callback = GaPCallback(HELD)
    with caplog.at_level(logging.WARNING, "gap_ds"):
        Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, callbacks=[callback]).train()
    assert "frozen" not in caplog.text
    assert (tmp_path / "checkpoint-4" / "gap").is_dir()
    again = GaPCallback(HELD)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, callbacks=[again])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.engine is not None and again.engine.finished
    assert merge(model).lost == 0
