"""Optimizers for sparse training, whose state is held for kept weights alone.

    AdamW, SGD     as in torch.optim, with the same arguments; pass them to the engine
    sparse_state   what they share: pieces, masks, packed state; read it first
    kept           kept weights as loops in C (`cpu`, kept.c) and Triton kernels (`triton`) step over them

>>> import torch
>>> from gap_ds.optim import AdamW
>>> AdamW(torch.nn.Linear(4, 4).parameters(), lr=1e-3).defaults["betas"]
(0.9, 0.999)
"""

from gap_ds.optim.adamw import AdamW
from gap_ds.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
