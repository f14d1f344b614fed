"""Distillation from a dense teacher: its logits and its hidden states as parts of the loss of a sparse model.

    teacher = distill.Teacher(model)               # the exported dense model, whole or sharded like the student
    wanted = teacher(**inputs, output_hidden_states=True)
    found = engine(**inputs, output_hidden_states=True)
    loss = task_loss(found) + distill.logit_distance(found.logits, wanted.logits, kept) + distill.hidden_distance(
        found.hidden_states[1:], wanted.hidden_states[1:], kept, comm=Comm()
    )

The distances are plain functions of tensors: add them in any phase, for example `if engine.phase.kind == "finetune"`.
Everything is computed in fp32, whatever the dtypes of the two models.

Shapes: leading dimensions of positions, (B,) for pictures or (B, T) for tokens; V classes; R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gap_ds.sharding.comm import Comm, operation


class Teacher:
    """A model in evaluation mode that is called without gradients.

    Wrap a teacher in a sharding library (FSDP, ZeRO-3) first, with the same ranks as the student's. All ranks must call
    a sharded teacher equally often. The model must be in no optimizer and is not changed, but for its mode.
    """

    def __init__(self, model: nn.Module) -> None:
        model.eval()  # DeepSpeed's engine returns None here
        self.module = model

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model."""
        return self.module(*args, **kwargs)


def logit_distance(
    logits: Tensor,
    wanted: Tensor,
    kept: Tensor | None = None,
    *,
    temperature: float = 1.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return T^2 times the Kullback-Leibler divergence of the student's softmax from the teacher's, in nats.

    The divergence is summed over the kept positions and divided by `denominator`. The factor T^2 keeps the size of the
    gradients at a temperature T. Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv
    1503.02531, section 2.

    Args:
        logits, wanted: of student and teacher, (..., V), any float dtypes.
        kept: (...), False at padding, whose logits are ignored; default: all positions count.
        denominator: kept positions of the whole batch, divided by ranks and micro-batches over which the loss is
            averaged; default: the kept positions of this call (at least 1).

    Raises:
        ValueError: shapes differ, or the temperature is not above 0 and finite.

    >>> student = torch.zeros(1, 2, 4)
    >>> teacher = torch.tensor([[[0.0, 0.0, -100.0, -100.0], [9.0, 0.0, 0.0, 0.0]]])
    >>> logit_distance(student, teacher, torch.tensor([[True, False]])).item() == torch.tensor(2.0).log().item()
    True
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be above 0 and finite. Set another temperature.")
    _check("logits", logits, wanted, kept, 1)
    places = _places(kept)
    chosen = (_chosen(x, places, 1).float() for x in (logits, wanted.detach()))
    # Finite: a token that is ruled out by a logit of -inf adds nothing, which 0 x inf would not be.
    least = torch.finfo(torch.float32).min
    student, teacher = ((x if temperature == 1 else x / temperature).log_softmax(-1).clamp_min(least) for x in chosen)
    total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / (max(1, len(student)) if denominator is None else denominator)


def hidden_distance(
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
    kept: Tensor | None = None,
    *,
    comm: Comm | None = None,
) -> Tensor:
    """Return the squared distance of hidden states relative to the teacher's squared norm, summed over the layers.

    For each layer: mean (s - t)^2 / mean t^2 over the kept positions. Layers where the teacher is 0 everywhere add
    nothing. Source: SquareHead of Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language
    Models", arXiv 2310.06927, section 3.

    Args:
        states, wanted: of student and teacher, a tensor (..., width) or (B, channels, height, width) for each layer.
        kept: False at padding, whose states are ignored; of the leading dimensions of every state; default: all count.
        comm: ranks whose micro-batches make up the batch, `Comm()` for all: the norm is then that of the whole batch,
            and the average of the results over the ranks is the distance of the whole batch, also where ranks have
            unequal numbers of positions. All of them must call this together. Default: this rank alone.

    Raises:
        ValueError: there are no states, or numbers of layers or shapes differ.

    >>> states, teacher = torch.tensor([[[1.0], [9.0]]]), torch.tensor([[[2.0], [5.0]]])
    >>> hidden_distance([states], [teacher], torch.tensor([[True, False]])).item()
    0.25
    """
    given: tuple[object, object] = (states, wanted)
    if any(isinstance(layers, Tensor) for layers in given):
        raise ValueError("hidden states are given as one tensor: must be a list or tuple with a tensor for each layer.")
    if not states or len(states) != len(wanted):
        raise ValueError(
            f"hidden states of {len(states)} layers, of the teacher {len(wanted)}: must be equal and at least 1. Set "
            "output_hidden_states=True for both, or pair their layers."
        )
    norms, squares, places = [], [], _places(kept)
    for state, target in zip(states, wanted, strict=True):
        trailing = 1 if kept is None else state.dim() - kept.dim()
        _check("hidden states", state, target, kept, trailing)
        student, teacher = (_chosen(x, places, trailing).float() for x in (state, target.detach()))
        # Layers may be on several devices.
        norms.append(teacher.square().sum().to(states[0].device))
        squares.append((student - teacher).square().sum().to(states[0].device))
    norm = torch.stack(norms)
    if comm is not None:
        with operation("the norms of the teacher's hidden states"):
            norm = comm.sum(norm).to(norm.device)
    share = torch.where(norm > 0, torch.stack(squares) / norm.where(norm > 0, 1.0), 0.0)
    return (1 if comm is None else comm.size) * share.sum()


def _places(kept: Tensor | None) -> Tensor | None:
    """Return the numbers (N,) of the kept positions, for which the host waits once; None: all are kept."""
    return None if kept is None else kept.flatten().nonzero()[:, 0]


def _chosen(values: Tensor, places: Tensor | None, trailing: int) -> Tensor:
    """Return the positions at these places as rows, (N, ...) with the last `trailing` dimensions."""
    rows = values.flatten(0, -1 - trailing)
    return rows if places is None else rows[places.to(rows.device)]


def _check(what: str, found: Tensor, wanted: Tensor, kept: Tensor | None, trailing: int) -> None:
    """Raise ValueError unless student and teacher have equal shapes and `kept` those of the positions."""
    if found.shape != wanted.shape:
        raise ValueError(
            f"{what} of shape {tuple(found.shape)}, of the teacher {tuple(wanted.shape)}: must be equal. Set a teacher "
            "with the sizes of the student. Where one vocabulary is padded, pass logits[..., :size] of both."
        )
    if found.dim() <= trailing:
        raise ValueError(f"{what} of shape {tuple(found.shape)}: must have positions before the last dimension.")
    if kept is not None and (kept.dtype != torch.bool or kept.shape != found.shape[: found.dim() - trailing]):
        raise ValueError(
            f"kept of shape {tuple(kept.shape)} and {kept.dtype}: must be bool of the positions of the {what}, "
            f"{tuple(found.shape)}. Set kept to the mask of tokens that are no padding."
        )
