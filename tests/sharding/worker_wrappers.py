"""The toy inside wrappers that gap_ds does not know: written here, and those of Lightning's Fabric and Trainer."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import observe
import torch
import torch.distributed as dist
import toy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from gap_ds import GaPEngine
from gap_ds.sharding.backends import held_by

warnings.filterwarnings("ignore")

# First masks by magnitude: random ones depend on names, to which a LightningModule adds.
GAP = {"sparsity": 0.8, "partitions": 2, "phase_steps": 2, "rounds": 1, "finetune_steps": 3, "mask_init": "magnitude"}
STEPS = 7


class Twice(nn.Module):
    """Holds a model as it is, and wrapped, as Fabric does."""

    def __init__(self, plain: nn.Module, wrapped: nn.Module) -> None:
        super().__init__()
        self.original, self.wrapped = plain, wrapped

    def forward(self, *args: Any) -> Any:
        return self.wrapped(*args)


class Once(nn.Module):
    """Holds a wrapped model only."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.strategy_model = wrapped

    def forward(self, *args: Any) -> Any:
        return self.strategy_model(*args)


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(toy.Block() for _ in range(toy.BLOCKS)))


def batch(step: int) -> Tensor:
    """This rank's rows."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, toy.WIDTH, generator=generator).chunk(2)[dist.get_rank()]


def loss_of(out: Tensor) -> Tensor:
    return (out - 1).square().mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def fsdp2(model: nn.Module, compiled: bool = False) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(torch.compile(model, backend="eager") if compiled else model)


def fsdp1(model: nn.Module) -> nn.Module:
    cut = ModuleWrapPolicy({toy.Block})
    return FullyShardedDataParallel(model, auto_wrap_policy=cut, use_orig_params=True, device_id=torch.device("cpu"))


def wrapped(name: str) -> nn.Module:
    """The module to pass to the engine and to call."""
    model = build()
    how: dict[str, Callable[[], nn.Module]] = {
        "ddp": lambda: DistributedDataParallel(model),
        "once_ddp": lambda: Once(DistributedDataParallel(model)),
        "twice_ddp": lambda: Twice(model, DistributedDataParallel(model)),
        "nested_ddp": lambda: Once(Once(DistributedDataParallel(model))),
        "compiled_ddp": lambda: Once(torch.compile(DistributedDataParallel(model), backend="eager")),
        "once_fsdp2": lambda: Once(fsdp2(model)),
        "compiled_fsdp2": lambda: fsdp2(model, compiled=True),
        "once_fsdp1": lambda: Once(fsdp1(model)),
    }
    return how[name]()


def by_hand(name: str, out: Path) -> GaPEngine:
    model = wrapped(name)
    engine = GaPEngine(model, GAP, optimizer=adam(model))
    for step in range(STEPS):
        engine.backward(loss_of(engine(batch(step))))
        engine.step()
    return engine


def by_fabric(out: Path) -> GaPEngine:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    plain = build()
    model, optimizer = fabric.setup(plain, adam(plain))
    engine = GaPEngine(model, GAP, optimizer=optimizer.optimizer)
    for step in range(STEPS):
        fabric.backward(loss_of(model(batch(step))))
        optimizer.step()
        optimizer.zero_grad()
        engine.after_step()
    return engine


def by_trainer(out: Path) -> GaPEngine:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, rows: Tensor, _: int) -> Tensor:
            return loss_of(self.model(rows))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

    class Sparse(lightning.Callback):
        def on_train_start(self, trainer: Any, _: Any) -> None:
            self.engine = GaPEngine(trainer.model, GAP, optimizer=trainer.optimizers[0])

        def on_train_batch_end(self, *_: Any) -> None:
            self.engine.after_step()

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return (batch(step) for step in range(STEPS))

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callback = Sparse()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS, callbacks=[callback], **quiet
    )
    trainer.fit(Task(), torch.utils.data.DataLoader(Rows(), batch_size=None))
    return callback.engine


def run(name: str, out: Path) -> dict[str, Any]:
    clients = {"fabric": by_fabric, "lightning": by_trainer}
    engine = clients.get(name, functools.partial(by_hand, name))(out)
    result = {"masks": observe.full_masks(engine), "backend": engine.run.backend.name, "steps": engine.applied_steps}
    engine.export(out / f"export_{name}")
    engine.close()
    return result


def beside(out: Path) -> dict[str, Any]:
    """A wrapped part, and parameters that no wrapper holds."""
    model = Once(nn.Sequential(DistributedDataParallel(build()), nn.Linear(toy.WIDTH, 2)))
    try:
        GaPEngine(model, GAP, optimizer=adam(model))
    except ValueError as error:
        return {"refused": str(error)}
    return {}


class Tied(nn.Module):
    """A wrapped body with an embedding, and a head with the embedding's weight: all parameters are in the body."""

    def __init__(self) -> None:
        super().__init__()
        embedding = nn.Embedding(5, toy.WIDTH)
        self.body = DistributedDataParallel(nn.Sequential(embedding, build()))
        self.head = nn.Linear(toy.WIDTH, 5, bias=False)
        self.head.weight = embedding.weight


def tied(out: Path) -> dict[str, Any]:
    model = Tied()
    assert {id(p) for p in model.body.parameters()} == {id(p) for p in model.parameters()}
    result: dict[str, Any] = {"itself": held_by(model) is model, "body": held_by(Once(model.body)) is model.body}
    try:
        GaPEngine(model, GAP, optimizer=adam(model))
    except ValueError as error:
        result["refused"] = str(error)
    return result


def main(out: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    works: dict[str, Any] = {name: functools.partial(run, name, out) for name in names}
    works |= {name: functools.partial(refuse, out) for name, refuse in (("beside", beside), ("tied", tied))}
    observe.work_through(out, works)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
