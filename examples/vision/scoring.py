"""Accuracy over all ranks, every picture counted once, and recomputed statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import classifier
import images
import torch
from common import runtime
from torch import Tensor, nn
from torch.nn import functional

#: Pictures as the loader leaves them -> logits (B, K).
Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def score(forward: Forward, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in per cent, and the mean cross entropy in nats.

    All ranks must call this, each with its batches of `sampling.evaluation_batches`.
    """
    top1, top5, loss, count = 0.0, 0.0, 0.0, 0
    for batch in batches:
        logits = forward(batch["pictures"]).float()
        labels = batch["labels"].to(logits.device)
        real = labels != images.IGNORED
        first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        top1 += float(first[real, 0].sum())
        top5 += float(first[real].sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum", ignore_index=images.IGNORED))
        count += int(real.sum())
    top1, top5, loss, pictures = runtime.total_over_ranks(top1, top5, loss, count)
    return {"top1": 100 * top1 / pictures, "top5": 100 * top5 / pictures, "loss": loss / pictures, "pictures": pictures}


@torch.no_grad()
def recompute_statistics(model: nn.Module, forward: Forward, batches: Iterable[dict[str, Any]]) -> None:
    """Replace BatchNorm's running statistics by means over some batches, the same on all ranks.

    The running statistics belong to the crops of training and, after pruning, to activations of the model before it.
    Nothing else changes. All ranks must call this with the same number of batches.
    """
    norms = classifier.batch_norms(model)
    if not norms:
        return
    momenta, training = [norm.momentum for norm in norms], model.training
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    for number, batch in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number  # the running mean is then the mean so far
        forward(batch["pictures"])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
    classifier.average_statistics(model)
