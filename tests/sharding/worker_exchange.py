"""Workers of parallel GaP on real ranks: each publishes, or publishes and reads, with pieces cut as its row sets it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.parallel import Exchange, Item, ParallelWorker, Received
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard

SIGNATURE = "gap|method:parallel|k:2|v:0.1.0"
#: name -> (shape, partition, whether it is an entry); partitions 0 and 1.
TENSORS = {
    "a.fc.weight": ((9, 11), 0, True),
    "a.out.weight": ((1, 3), 0, True),
    "a.norm": ((13,), 0, False),
    "b.fc.weight": ((16, 5), 1, True),
    "b.norm": ((2,), 1, False),
    "embedding": ((7, 3), None, False),
}


def tensors(worker: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(values, masks) of a worker; every worker has the masks of one partition, pruned to a third."""
    random = torch.Generator().manual_seed(worker)
    values = {name: torch.randn(shape, generator=random).view(-1) for name, (shape, _, _) in TENSORS.items()}
    kept = {}
    for name, (_, partition, is_entry) in TENSORS.items():
        order = torch.randperm(values[name].numel(), generator=random)
        if is_entry and partition == worker:
            kept[name] = torch.zeros(order.numel(), dtype=torch.bool)
            kept[name][order[: order.numel() // 3]] = True
    return values, kept


def piece(numel: int, cut: str, rank: int, ranks: int) -> tuple[int, int]:
    """(start, numel) of a rank's piece: even, everything on the last rank, or whole on all."""
    if cut == "last":
        return (0, numel) if rank == ranks - 1 else (0, 0)
    width = -(-numel // ranks)
    start = min(rank * width, numel)
    return start, min(width, numel - start)


def run(row: dict[str, Any], world: Comm, out: Path) -> dict[str, Any]:
    """Return the result of this rank after the exchange of one job. `broken`: the rank without memory for a piece."""
    worker, cut = row["worker"], row["cut"]
    comm = Comm(single=True, within=world) if cut == "whole" else world
    values, kept = tensors(worker)
    items, bits = [], {}
    for name, (shape, partition, is_entry) in TENSORS.items():
        full = values[name]
        start, numel = piece(full.numel(), cut, comm.rank, comm.size)
        own = full[start : start + numel].clone()
        give = (lambda: torch.empty(1 << 60)) if row.get("broken") == world.rank else (lambda own=own: own)
        keep = full.numel() // 3 if is_entry else None
        items.append(Item(Shard.of_range(name, shape, start, numel, 0, give), partition, keep))
        if name in kept:
            bits[name] = bitmask.pack(kept[name][start : start + numel])
    steps = torch.tensor(100 + worker)
    items.append(Item(Shard.of_range("steps", (), 0, 1, 0, lambda: steps.view(-1)), None, dtype=torch.int64))

    found: dict[str, Any] = {
        "pieces": {},
        "bits": {},
        "where": {item.name: (item.box.start, item.box.numel) for item in items},
    }

    def receive(received: Received) -> None:
        found["pieces"][received.name] = received.value
        found["bits"][received.name] = received.bits

    try:
        where = row["folder"] if "://" in row["folder"] else str(out / row["folder"])
        me = ParallelWorker(worker, where, row["timeout"], resume=True)
        exchange = Exchange(me, 2, SIGNATURE, "abc", "def", world, comm)
        if row["publish_only"]:
            exchange.publish(0, items, bits)
        else:
            exchange.combine(0, items, bits, receive)
        found["written"], found["read"] = exchange.bytes_written, exchange.bytes_read
    except (ValueError, TimeoutError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


class Shared(DirFileSystem):
    """The file system of shared://: a local folder, set by an environment variable for all processes."""

    protocol = "shared"

    def __init__(self, **_: Any) -> None:
        super().__init__(path=os.environ["SHARED_ROOT"], fs=LocalFileSystem())


class Dying(Shared):
    """Kills its process in the middle of the first tensor of a file."""

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super().open(path, mode, **options)
        if mode == "rb" or not path.endswith(".safetensors"):
            return file
        write, written = file.write, []

        def dying(data: bytes) -> None:
            written.append(data)
            write(data if len(written) == 1 else data[: len(data) // 2])
            if len(written) == 2:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        file.write = dying
        return file


def alone(row: dict[str, Any], out: Path, dies: bool) -> None:
    """A job of one rank in a separate process. Its workers meet at shared://."""
    fsspec.register_implementation("shared", Dying if dies else Shared, clobber=True)
    torch.set_num_threads(1)
    torch.save(run(row, Comm(single=True), out), out / f"alone.{row['worker']}.pt")


def main(out: Path, name: str) -> None:
    """Plays the jobs of a table one after the other, each on the first ranks of this group."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    groups = [dist.new_group(list(range(n))) for n in range(1, dist.get_world_size() + 1)]
    found = {}
    for row in json.loads((out / f"{name}.json").read_text()):
        if dist.get_rank() < row["ranks"]:
            found[row["name"]] = run(row, Comm(groups[row["ranks"] - 1]), out)
        dist.barrier()
    torch.save(found, out / f"{name}.{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
