"""Cross entropy of a language model on packed documents, over all ranks, every token once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from common import runtime, sampling
from common.cross_entropy import IGNORE
from packing import Packed
from torch import Tensor
from torch.nn import functional

#: Logits that are converted to fp32 at once.
_CHUNK = 2**22


@torch.no_grad()
def score(forward: Callable[[dict[str, Tensor]], Tensor], packed: Packed, batch_size: int) -> dict[str, float]:
    """Return `loss` in nats per predicted token, `perplexity`, its exponential, and the predicted `tokens`.

    The sums are in fp64 and do not depend on the number of ranks beyond its rounding, nor on the context's cuts beyond
    what the model sees. All ranks must call this together, and call the model equally often.

    Args:
        forward: `input_ids` and `position_ids` (R, T) -> logits (R, T, V).
        batch_size: rows of a batch of a rank.
    """
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
    for keys in sampling.evaluation_batches(len(packed), batch_size, **ranks):
        batch = packed.rows([row for _, row in keys])
        labels = batch.pop("labels")
        total += nats(forward(batch), labels)
        count += int((labels != IGNORE).sum())
    found, tokens = runtime.total_over_ranks(float(total), count)
    return figures(found, int(tokens))


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy summed over the labels other than -100, in fp64 on the CPU."""
    rows, wanted = logits.flatten(0, -2), labels.flatten().to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    step = max(1, _CHUNK // rows.shape[-1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        each = functional.cross_entropy(rows[part].float(), wanted[part], reduction="none", ignore_index=IGNORE)
        total += each.double().sum().cpu()
    return total


def bits_per_byte(scores: dict[str, Any], size: int) -> float:
    """Return the bits that the model needs for a byte of the text, which compares models of different vocabularies.

    >>> bits_per_byte({"loss": math.log(2), "tokens": 8}, 2)
    4.0
    """
    return float(scores["loss"] * scores["tokens"] / math.log(2) / size)


def text(scores: dict[str, Any]) -> str:
    """Return a line for people.

    >>> text({"loss": math.log(2), "perplexity": 2.0, "tokens": 8, "bits_per_byte": 4.0})
    'perplexity 2.000 (0.6931 nats per token, 4.0000 bits per byte, 8 tokens)'
    """
    found = f"{scores['loss']:.4f} nats per token, {scores['bits_per_byte']:.4f} bits per byte"
    return f"perplexity {scores['perplexity']:.3f} ({found}, {scores['tokens']} tokens)"


def figures(total: float, tokens: int) -> dict[str, Any]:
    """Return the figures of a sum of nats over some tokens.

    >>> figures(0.0, 3)
    {'loss': 0.0, 'perplexity': 1.0, 'tokens': 3}
    """
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
