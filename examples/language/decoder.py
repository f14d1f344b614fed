"""Decoder-only language models: fresh ones of the sizes in models/, or pretrained ones.

The files in models/ are configs of transformers: `gap-ds plan --model examples/language/models/llama_1b.json` plans
the same model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import pretrained

MODELS = Path(__file__).parent / "models"

#: Names of settings of dropout, of GPT-2 and Llama.
_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout")


def presets() -> list[str]:
    """Return the names of the sizes."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def build(preset: str, tokenizer: PreTrainedTokenizerBase, *, context: int, dropout: float = 0.0) -> PreTrainedModel:
    """Return a freshly initialised model (from torch's global random state), in training mode.

    Args:
        tokenizer: gives the size of the vocabulary and the special tokens.
        context: longest sequence in tokens.
        dropout: in [0, 1); of everything that the architecture drops.
    Raises:
        ValueError: there is no such preset.
    """
    if preset not in presets():
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(presets())}. Set --preset.")
    config = AutoConfig.from_pretrained(MODELS / f"{preset}.json", local_files_only=True)
    changes: dict[str, Any] = {name: dropout for name in _DROPOUT if hasattr(config, name)}
    changes |= {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    changes |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config)


def load_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """Load a pretrained decoder in fp32. Arguments and errors as in `pretrained.load`."""
    return pretrained.load(
        AutoModelForCausalLM, "a decoder-only language model", name, **{"dtype": torch.float32, **options}
    )


def check_context(model: PreTrainedModel, context: int) -> None:
    """Raise ValueError if a model has no positions for a context."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < context:
        raise ValueError(f"context={context}: the model has {positions} positions. Set --context.")


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel) -> None:
    """Raise ValueError if a token of a packed row depends on the document before its own.

    Models of transformers build that mask from position ids; others may ignore them. Tried with two documents of four
    tokens on one row.
    """
    rows = torch.arange(8, device=model.device).repeat(2, 1)
    rows[1, :4] += 8  # another first document
    training = model.training
    model.eval()
    logits = model(input_ids=rows, position_ids=torch.arange(4).repeat(2, 2).to(model.device), use_cache=False).logits
    model.train(training)
    one, other = logits[:, 4:].float()
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        raise ValueError(
            f"{type(model).__name__}: attends across the documents of a row although their positions begin anew. Set "
            "--across-documents to train it so, or use another model."
        )
