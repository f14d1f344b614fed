"""Translation models: four sizes of a pre-norm Transformer built from transformers.

Every preset is an M2M100 of transformers: layer norms before the blocks, sinusoidal positions, and one embedding
shared by encoder, decoder and output. `big`, with a vocabulary of 33,712, has 176.2 M weights in the q/k/v/out/fc1/fc2
matrices and 34.5 M in the embedding, like the Transformer-big of the GaP paper (arXiv 2106.09857, section 4).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, M2M100Config, M2M100ForConditionalGeneration, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import pretrained
from common.cross_entropy import IGNORE as IGNORE
from common.cross_entropy import loss as loss

from gap_ds.cli.presets import PRESETS, Preset

# Special tokens of every tokenizer of this example: <s> 0, <pad> 1, </s> 2, <unk> 3.
BOS, PAD, EOS, UNK = 0, 1, 2, 3


def build_config(
    preset: str | Preset, *, vocab_size: int, dropout: float = 0.1, max_positions: int = 1024
) -> M2M100Config:
    """Return the configuration of a preset, for a tokenizer with `</s>` after every sentence and the specials above.

    Args:
        dropout: in [0, 1); of activations, attention weights and the hidden layer of the feed-forward block.
        max_positions: longest sequence in tokens, on either side.
    Raises:
        ValueError: a value is out of range.
    """
    size = _preset(preset)
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout={dropout}: must lie in [0, 1). Set "--dropout".')
    if vocab_size <= UNK + 1:
        raise ValueError(f"vocab_size={vocab_size}: must be above 4, the number of specials. Set another tokenizer.")
    if max_positions < 2:
        raise ValueError(f'max_positions={max_positions}: must be at least 2. Set "--max-positions".')
    return M2M100Config(
        vocab_size=vocab_size,
        **size.m2m100(),
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=max_positions,
        # One deviation for embedding and matrices: half of the usual d^-0.5. Preset tiny learns faster with it than
        # with d^-0.5 or transformers' 0.02 (training loss 5.08, 5.30, 5.42 after 300 steps on captions, one seed).
        init_std=0.5 * size.d_model**-0.5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )


def build_model(config: M2M100Config) -> PreTrainedModel:
    """Return a freshly initialised model (from torch's global random state), in training mode.

    Under `with torch.device("meta")` no weights are allocated.
    """
    return M2M100ForConditionalGeneration(config)


def choose_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Set the faster implementation of attention for sentences on `device`. The computed function is the same.

    On a CPU, plain products reduce the time of a training step to 0.5 to 0.9 of that with PyTorch's fused attention, at
    12 to 512 tokens (bf16, one thread, torch 2.13; benchmarks/attention.py). On other devices nothing changes.
    """
    if device.type == "cpu":
        model.set_attn_implementation("eager")


def load_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """Load a pretrained encoder-decoder. Arguments and errors as in `pretrained.load`."""
    return pretrained.load(AutoModelForSeq2SeqLM, "an encoder-decoder", name, **options)


def _preset(preset: str | Preset) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f'preset={preset!r}: must be one of {", ".join(PRESETS)}. Set "--preset".')
    return PRESETS[preset]
