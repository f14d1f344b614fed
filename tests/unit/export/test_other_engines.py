"""An exported folder by the published rules of engines that are not run here, and through GGUF's files and back.

The rules are written out here, without gap_ds: TensorRT's of structured sparsity (its developer guide), vLLM's of what
a checkpoint may hold (its model loader), GGUF's block types (the package gguf, whose files transformers reads).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gap_ds import GaPEngine

CONFIG = {"sparsity": 0.5, "pattern": "2:4", "partitions": 2, "phase_steps": 1, "rounds": 1, "finetune_steps": 1}
HEADS, LAYERS = 4, 2


def trained(model: nn.Module, loss: Any) -> GaPEngine:
    engine = GaPEngine(model, CONFIG, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    while not engine.finished:
        engine.backward(loss(engine))
        engine.step()
    return engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=True))
    tokens = torch.randint(64, (2, 8))
    out = tmp_path_factory.mktemp("engines") / "llama"
    trained(model, lambda engine: engine(input_ids=tokens, labels=tokens).loss).export(out)
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def entries(folder: Path) -> list[str]:
    return list(json.loads((folder / "gap.json").read_text())["entries"])


def most_of_four(weight: Tensor) -> int:
    """Most weights that are not 0 in any 4 consecutive input channels, for each output channel and kernel position."""
    channels_last = weight.flatten(2).transpose(1, 2) if weight.dim() > 2 else weight
    return int((channels_last.reshape(-1, 4) != 0).sum(1).max())


def test_every_group_fits_the_rule_of_tensorrt(llama: Path, tmp_path: Path) -> None:
    weights = tensors(llama)
    found = {name: most_of_four(weights[name]) for name in entries(llama)}
    assert len(found) == 7 * LAYERS and set(found.values()) == {2}
    assert most_of_four(weights["model.embed_tokens.weight"]) == 4

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)]
    x = torch.randn(2, 8, 5, 5)
    trained(nn.Sequential(*layers), lambda engine: engine(x).square().mean()).export(tmp_path / "convolutions")
    weights = tensors(tmp_path / "convolutions")
    found = {name: most_of_four(weights[name]) for name in entries(tmp_path / "convolutions")}
    assert len(found) == 4 and set(found.values()) == {2}


def test_a_folder_is_what_vllm_loads_as_a_dense_model(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # By one of these it would choose a quantization method, and refuse or unpack the weights.
    assert not {"quantization_config", "compression_config", "sparsity_config"} & config.keys()
    # All *.safetensors are read, and those of an index alone if there is one; no file may repeat or add a tensor.
    assert [path.name for path in llama.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(llama.glob("*.bin")) + list(llama.glob("*.index.json"))
    weights = tensors(llama)
    with torch.device("meta"):
        wanted = dict(LlamaForCausalLM(LlamaConfig(**config)).named_parameters())
    # A name that its model lacks is an error, and so is one that is missing; a tied lm_head is not in the file.
    assert weights.keys() == wanted.keys() and "lm_head.weight" not in weights
    assert all(weights[name].shape == weight.shape for name, weight in wanted.items())
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    # It joins these into one weight each: their inputs must agree.
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({weights[f"{layer}.{part}.weight"].shape[1] for part in parts}) == 1


def permuted(weight: Tensor) -> Tensor:
    """The rows of q and k in the order of GGUF's rotary embedding: pairs side by side."""
    return weight.view(HEADS, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(gguf: Any, folder: Path, kind: Any) -> str:
    """Write the exported Llama as one GGUF file, its matrices in this type; return the file's name."""
    config = json.loads((folder / "config.json").read_text())
    name = f"model-{kind.name}.gguf"
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for tensor, weight in tensors(folder).items():
        weight = permuted(weight) if "q_proj" in tensor or "k_proj" in tensor else weight
        of = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        base, _, leaf = tensor.rpartition(".")
        writer.add_tensor(f"{names.get_name(base)}.{leaf}", gguf.quants.quantize(weight.numpy(), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name


@pytest.mark.full
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_zeros_are_kept_through_gguf(llama: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[clients]'")
    file = write_gguf(gguf, llama, gguf.GGMLQuantizationType[kind])
    loaded = AutoModelForCausalLM.from_pretrained(llama, gguf_file=file, dtype=torch.float32)
    weights = tensors(llama)
    for name in entries(llama):
        found = loaded.get_parameter(name)
        assert not found[weights[name] == 0].any(), name
        assert torch.allclose(found, weights[name], atol={"F32": 0, "BF16": 1e-3, "Q8_0": 1e-3}[kind]), name
        assert most_of_four(found) <= 2


@pytest.mark.full
def test_which_types_of_gguf_keep_zeros() -> None:
    """Those without an offset: in the others a block's zeros become the multiple of the scale next to its offset."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[clients]'")
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    weight[torch.rand(weight.shape) < 0.9] = 0.0
    kept = {}
    for name in ("F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1"):
        kind = gguf.GGMLQuantizationType[name]
        back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
        kept[name] = not back[weight == 0].any()
    assert kept == {name: name not in ("Q5_1", "Q4_1") for name in kept}
