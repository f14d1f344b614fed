"""A sparse model with a dense teacher on two ranks, which have unequal numbers of tokens: losses and final weights."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import toy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gap_ds import GaPEngine, distill
from gap_ds.sharding.comm import Comm

warnings.filterwarnings("ignore")

GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 3}
STEPS, TEMPERATURE = 7, 2.0
#: Tokens of the four sentences of a batch; two are rank 0's.
LENGTHS = (8, 3, 5, 1)


class Model(nn.Module):
    """The blocks of the toy; returns logits (B, T, V) and the hidden states after each block, (B, T, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(toy.VOCABULARY, toy.WIDTH)
        self.layers = nn.ModuleList(toy.Block() for _ in range(toy.BLOCKS))
        self.head = nn.Linear(toy.WIDTH, toy.VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, states = self.embedding(tokens), []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return self.head(x), states


def build(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (4, 8) of all ranks in a step, and which of them are no padding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, toy.VOCABULARY, (4, 8), generator=generator)
    return tokens, torch.arange(8) < torch.tensor(LENGTHS)[:, None]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def zero(stage: int) -> dict[str, object]:
    shards = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "steps_per_print": 10**9}
    return {**config, "zero_optimization": shards, "zero_allow_untested_optimizer": True}


def start(backend: str) -> tuple[GaPEngine, distill.Teacher]:
    """Student and teacher. Where weights are sharded, those of the teacher are, too."""
    if backend == "fsdp2":
        student, teacher = sharded(build(1)), sharded(build(2))
        return GaPEngine(student, GAP, optimizer=optimizer(student)), distill.Teacher(teacher)
    stage, model = int(backend[-1]), build(1)
    engine = GaPEngine.initialize(model=model, config=zero(stage), gap_config=GAP, optimizer=optimizer(model))
    whole = build(2)
    return engine, distill.Teacher(deepspeed.initialize(model=whole, config=zero(3))[0] if stage == 3 else whole)


def train(engine: GaPEngine, teacher: distill.Teacher) -> list[Tensor]:
    """Train all steps; return the loss of each, averaged over the ranks."""
    comm, losses = Comm(), []
    for step in range(STEPS):
        all_tokens, all_kept = batch(step)
        tokens, kept = (x.chunk(comm.size)[comm.rank] for x in (all_tokens, all_kept))
        (logits, states), (wanted, wanted_states) = engine(tokens), teacher(tokens)
        share = int(all_kept.sum()) / comm.size
        loss = distill.logit_distance(logits, wanted, kept, temperature=TEMPERATURE, denominator=share)
        loss = loss + distill.hidden_distance(states, wanted_states, kept, comm=comm)
        engine.backward(loss)
        engine.step()
        losses.append(comm.all_gather(loss.detach().view(1)).mean())
    return losses


def main(out: Path, backends: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for backend in backends:
        engine, teacher = start(backend)
        losses = train(engine, teacher)
        engine.export(out / backend)
        if dist.get_rank() == 0:
            torch.save(losses, out / f"{backend}.pt")
        engine.close()
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)
