"""Tiny randomly initialised Hugging Face models of many kinds, and what of each is to be pruned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

BATCH, LENGTH, VOCABULARY = 2, 8, 50


@dataclass(frozen=True)
class Kind:
    """A model: its class, settings, a regular expression for its blocks, how many, and which batch it takes."""

    model: str
    config: str
    settings: dict[str, Any]
    block: str
    blocks: int
    batch: str

    def build(self) -> nn.Module:
        """The same weights in every process."""
        torch.manual_seed(3)
        transformers.logging.set_verbosity_error()
        model: nn.Module = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings))
        return model.train()

    def data(self, step: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """One rank's batch."""
        generator = torch.Generator().manual_seed(10 * step + rank)
        tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
        if self.batch == "tokens":
            return {"input_ids": tokens, "labels": tokens}
        if self.batch == "images":
            pixels = torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype)
            return {"pixel_values": pixels, "labels": tokens[:, 0] % 2}
        sound = torch.randn(BATCH, 80, 2 * LENGTH, generator=generator).to(dtype)
        return {"input_features": sound, "labels": tokens}

    def entries(self) -> set[str]:
        """Names of the weights to prune: every matrix, convolution and expert in a block, routers apart."""
        names = set()
        for path, module in self.build().named_modules():
            if not re.match(self.block + r"\.", path) or "Router" in type(module).__name__:
                continue
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or type(module).__name__ == "Conv1D":
                names.add(f"{path}.weight")
            if type(module).__name__.endswith("Experts"):
                names |= {f"{path}.gate_up_proj", f"{path}.down_proj"}
        return names


_ONE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ONE |= {"intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _ONE | {"num_key_value_heads": 1}
_SIDES = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
_SIDES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_SIDES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_SIDES |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
_POSITIONS = {"max_position_embeddings": 32}
_WHISPER = {"max_source_positions": LENGTH, "max_target_positions": 32, "begin_suppress_tokens": None}
_LAYERS = r"model\.layers\.\d+"
_BOTH = r"model\.(encoder|decoder)\.layers\.\d+"

ZOO: dict[str, Kind] = {
    "t5": Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
        r"(encoder|decoder)\.block\.\d+",
        4,
        "tokens",
    ),
    "bart": Kind("BartForConditionalGeneration", "BartConfig", _SIDES | _POSITIONS, _BOTH, 4, "tokens"),
    "m2m100": Kind("M2M100ForConditionalGeneration", "M2M100Config", _SIDES | _POSITIONS, _BOTH, 4, "tokens"),
    "marian": Kind("MarianMTModel", "MarianConfig", _SIDES | _POSITIONS, _BOTH, 4, "tokens"),
    "whisper": Kind("WhisperForConditionalGeneration", "WhisperConfig", _SIDES | _WHISPER, _BOTH, 4, "sound"),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        | {"bos_token_id": 1, "eos_token_id": 2},
        r"transformer\.h\.\d+",
        2,
        "tokens",
    ),
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", _GROUPED, _LAYERS, 2, "tokens"),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, _LAYERS, 2, "tokens"),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", _GROUPED, _LAYERS, 2, "tokens"),
    "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", _GROUPED | {"num_local_experts": 3}, _LAYERS, 2, "tokens"),
    "opt": Kind(
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "ffn_dim": 24, "pad_token_id": 0, **_POSITIONS},
        r"model\.decoder\.layers\.\d+",
        2,
        "tokens",
    ),
    "bert": Kind("BertForMaskedLM", "BertConfig", _ONE | _POSITIONS, r"bert\.encoder\.layer\.\d+", 2, "tokens"),
    "roberta": Kind(
        "RobertaForMaskedLM", "RobertaConfig", _ONE | _POSITIONS, r"roberta\.encoder\.layer\.\d+", 2, "tokens"
    ),
    "vit": Kind(
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        | {"image_size": 32, "patch_size": 8},
        r"vit\.layers\.\d+",
        2,
        "images",
    ),
    "resnet": Kind(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic"},
        r"resnet\.encoder\.stages\.\d+\.layers\.\d+",
        3,
        "images",
    ),
}
