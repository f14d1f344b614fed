"""Exports of sharded runs: what rank 0 needs for them, what all ranks say when it fails, and a Hugging Face model."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import toy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gap_ds import GaPEngine, export
from gap_ds.export import weights
from gap_ds.masks.box import Box
from gap_ds.sharding.comm import Comm

warnings.filterwarnings("ignore")

#: starts and lengths of the pieces of four ranks: uneven, some empty, not in the order of the ranks.
CUTS: list[tuple[list[int], list[int]]] = [
    ([0, 250, 500, 750], [250, 250, 250, 250]),
    ([0, 0, 0, 0], [0, 0, 0, 1000]),
    ([0, 3, 3, 990], [3, 0, 987, 10]),
    ([990, 3, 3, 0], [10, 0, 987, 3]),
    ([0, 1000, 1000, 1000], [1000, 0, 0, 0]),
    ([0, 0, 0, 0], [0, 0, 0, 0]),
]
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)


def assemble(out: Path) -> None:
    """Pieces of all kinds, in several parts; then a parameter that lies in the last rank alone, as under ZeRO-1."""
    comm = Comm()
    wrong = []
    with mock.patch("gap_ds.sharding.comm._PART", 99):
        for starts, numels in CUTS:
            for dtype in DTYPES:
                whole = (torch.arange(sum(numels)) % 251).to(dtype)
                piece = whole[starts[comm.rank] :][: numels[comm.rank]].clone()
                boxes = [Box.span(start, n, len(whole)) for start, n in zip(starts, numels, strict=True)]
                found = comm.assemble(piece, boxes, len(whole))
                if (found is None) if comm.rank == 0 else (found is not None):
                    wrong.append(f"{starts} {dtype}: the wrong rank has it")
                elif found is not None and not torch.equal(found, whole):
                    wrong.append(f"{starts} {dtype}: it is another tensor")
    numel, last = 2**25, comm.size - 1
    piece = torch.ones(numel if comm.rank == last else 0)
    comm.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what there is now
    before = resident("VmRSS")
    whole_ = comm.assemble(piece, [Box.span(0, n, numel) for n in [0] * last + [numel]], numel)
    grown = resident("VmHWM") - before
    assert whole_ is None or bool(whole_.eq(1).all())
    found_ = {"wrong": wrong, "share": grown / (4 * numel)}
    (out / f"assemble.{comm.rank}").write_text(json.dumps(found_))


def resident(key: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or has held at the most (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


# -- faults --------------------------------------------------------------------------------------------------------


def build() -> GaPEngine:
    model: Any = toy.build()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return GaPEngine(model, toy.GAP, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))


def train(engine: GaPEngine, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(*toy.batch(engine.applied_steps, 0, dist.get_rank())))
        engine.step()


class Tokenizer:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        if self.error is not None:
            raise self.error
        (folder / "tokenizer.json").write_text("{}")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def change_one(self: weights.ModelFiles, name: str, tensor: Tensor) -> None:
    """A disk that changes weights on their way."""
    self._writers[name].write(name, torch.ones_like(tensor))


def no_rename(path: Path, target: Path) -> None:
    raise OSError(errno.EACCES, "Permission denied", str(target))


def faults(out: Path) -> None:
    """Rank 0 cannot write: every rank must hear of it, before weights are gathered where that can be known."""
    rank = dist.get_rank()
    engine = build()
    train(engine, 4)
    model, file = out / "model", out / "file"
    if rank == 0:
        file.touch()
        (out / "home" / "work").mkdir(parents=True)
    engine.export(model, tokenizer=Tokenizer())
    gathered: list[int] = []
    gather = export.full_weights

    def counting(*arguments: Any) -> export.Stream:
        gathered.append(1)
        return gather(*arguments)

    odd = Tokenizer(TypeError("Object of type set is not JSON serializable"))
    cases: dict[str, tuple[Callable[[], object], Any]] = {
        "not_empty": (lambda: engine.export(model), None),
        "file": (lambda: engine.export(file, overwrite=True), None),
        "home": (lambda: engine.export(out / "home", overwrite=True), None),
        "current": (lambda: engine.export(".", overwrite=True), None),
        "integers": (lambda: engine.export(model, overwrite=True, dtype=torch.int8), None),
        "tokenizer": (lambda: engine.export(model, overwrite=True, tokenizer=odd), None),
        "full_disk": (
            lambda: engine.export(model, overwrite=True),
            mock.patch("gap_ds.storage.safetensors.memoryview", full_disk, create=True),
        ),
        "changed": (
            lambda: engine.export(model, overwrite=True),
            mock.patch.object(weights.ModelFiles, "write", change_one),
        ),
        "no_rename": (lambda: engine.export(model, overwrite=True), mock.patch("pathlib.Path.rename", no_rename)),
    }
    found = {}
    with mock.patch("gap_ds.export.full_weights", counting):
        for name, (work, broken) in cases.items():
            gathered.clear()
            said = "nothing"
            if rank == 0 and broken is not None:
                broken.start()
            try:
                work()
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            if rank == 0 and broken is not None:
                broken.stop()
            dist.barrier()
            left = sorted(path.name for path in out.iterdir() if path.suffix != ".log")
            found[name] = {"said": said, "gathered": len(gathered), "left": left}
            dist.barrier()
    found["inside"] = sorted(path.name for path in model.iterdir())
    train(engine, 1)
    engine.export(model, overwrite=True)
    type(engine.module).save_pretrained = lambda module, folder: save_file(
        module.state_dict(), folder / "own.safetensors"
    )
    engine.export(out / "model" / "own")
    (out / f"faults.{rank}").write_text(json.dumps(found))


# -- a Hugging Face model ------------------------------------------------------------------------------------------


def hugging_face(out: Path) -> None:
    """In the middle of a phase: a checkpoint, and the engine's own exports at that step."""
    import transformers

    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 25, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **shape, tie_word_embeddings=False))
    layers: Any = model.model.layers
    for layer in layers:
        fully_shard(layer)
    sharded: nn.Module = fully_shard(model)
    engine = GaPEngine(sharded, toy.GAP, optimizer=torch.optim.AdamW(sharded.parameters(), lr=0.01))
    for step in range(4):
        ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(out / "checkpoints")
    for dtype in (torch.float32, torch.bfloat16):
        engine.export(out / str(dtype).removeprefix("torch."), dtype=dtype)


def main(out: Path, what: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    os.chdir(out / "home" / "work" if (out / "home").is_dir() else out)
    {"assemble": assemble, "faults": faults, "hugging_face": hugging_face}[what](out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
