"""A small model and its data, made to be awkward for sharding; the same in every row of the parity tables.

Tied embeddings; an odd-sized matrix (37 x 16) that shard boundaries cut in the middle of a row; two parameter groups
with other weight decay; a frozen parameter; a parameter that gets no gradient in every other step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, HIDDEN, BLOCKS = 11, 16, 37, 4
GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 3}
STEPS, ACCUMULATION = 15, 2


class Job:
    """Which of the processes train one model, and which data this one sees: by default all, each its own."""

    group: Any = None
    data_rank: int | None = None

    @classmethod
    def rank(cls) -> int:
        """The number of this process's data."""
        if cls.data_rank is not None:
            return cls.data_rank
        return dist.get_rank() if dist.is_initialized() else 0

    @classmethod
    def size(cls) -> int:
        """How many processes train the model."""
        return dist.get_world_size(cls.group) if dist.is_initialized() else 1


class Block(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, hidden)
        self.fc2 = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class Toy(nn.Module):
    """A language model that predicts the token before the current one."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(hidden) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.weight.requires_grad_(False)
        self.frozen.bias.requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, use_all: bool) -> Tensor:
        """Mean cross entropy of tokens (B, T)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.frozen(x)
        if use_all:
            x = x + self.sometimes(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(1, dims=1).flatten())


def build(hidden: int = HIDDEN) -> Toy:
    """The same weights in every process."""
    torch.manual_seed(1)
    return Toy(hidden)


def batch(step: int, micro: int, rank: int, skip: bool = True) -> tuple[Tensor, bool]:
    """Tokens (4, 8) of one rank's micro-batch, and whether every parameter is used: with `skip`, in even steps only."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randint(0, VOCABULARY, (4, 8), generator=generator), not skip or step % 2 == 0


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Two parameter groups: matrices with weight decay, the rest without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}
