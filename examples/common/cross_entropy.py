"""Cross entropy of tokens in little memory.

Shapes: B sequences, T positions, V vocabulary, N = B * T rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a position without loss

# Logits that `loss` converts to fp32 at once: 1 MiB on a CPU, for its cache; 16 MiB elsewhere, to launch few kernels.
_CHUNK, _CHUNK_ON_CPU = 2**22, 2**18


def loss(logits: Tensor, labels: Tensor, *, smoothing: float, denominator: int | float | Tensor) -> Tensor:
    """Return the label-smoothed cross entropy in nats, summed over labels other than -100, divided by `denominator`.

    The target distribution is (1 - smoothing) on the label plus smoothing / V everywhere, as in
    torch.nn.functional.cross_entropy. The result is a scalar in fp32.

    Args:
        logits: (B, T, V), any float dtype.
        labels: (B, T).
        denominator: target tokens of the whole batch, over all ranks and micro-batches. Then the sum of the gradients
            does not depend on how the batch was cut.

    >>> logits, labels = torch.zeros(1, 2, 8), torch.tensor([[5, -100]])
    >>> loss(logits, labels, smoothing=0.1, denominator=1).item() == torch.tensor(8.0).log().item()
    True
    """
    rows = logits.flatten(0, -2)
    total: Tensor = _SmoothedCrossEntropy.apply(rows, labels.flatten(), smoothing)  # type: ignore[no-untyped-call]
    return total / denominator


class _SmoothedCrossEntropy(torch.autograd.Function):
    """Sum of the label-smoothed cross entropy, in fp32 over chunks of rows.

    Autograd of `cross_entropy(logits.float())` holds three fp32 copies of (N, V): 2 GB at 5,120 tokens of the big
    preset. This keeps the given logits and one fp32 number per row, and writes the gradient once, in their dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        normaliser = torch.empty(len(logits), dtype=torch.float32, device=logits.device)  # log sum exp, (N,)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for rows in _chunks(logits):
            x, label = logits[rows].float(), labels[rows]
            normaliser[rows] = x.logsumexp(-1)
            at_label = x.gather(-1, label.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            row = normaliser[rows] - (1 - smoothing) * at_label
            if smoothing:
                row -= smoothing * x.mean(-1)
            total += row.masked_fill_(label == IGNORE, 0.0).sum()
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normaliser = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            label = labels[rows].unsqueeze(-1)
            p = (logits[rows] - normaliser[rows].unsqueeze(-1)).exp_()  # fp32, by promotion
            p -= ctx.smoothing / logits.shape[-1]
            p.scatter_add_(-1, label.clamp_min(0), torch.full(label.shape, ctx.smoothing - 1.0, device=p.device))
            # Scaled before the cast: a loss scale keeps small values above the smallest fp16 number.
            p *= gradients[0]
            grad[rows] = p.masked_fill_(label == IGNORE, 0.0)
        return grad, None, None


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, (_CHUNK_ON_CPU if logits.device.type == "cpu" else _CHUNK) // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
