"""Trains on a device that is not the CPU and keeps its tensors in host memory: see test_standin.py.

    python placed.py BUILD

Every operation there refuses tensors of another device. After every step bits, moments and remembered values must be
where the weights are. The extension is built in the folder BUILD.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

from gap_ds import GaPEngine, optim
from gap_ds.masks import selection
from gap_ds.masks.box import Box

SIZE, PHASES = 8, {"sparsity": 0.75, "phase_steps": 3, "finetune_steps": 2}
CYCLIC = PHASES | {"partitions": 2, "rounds": 1}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stream:
    """The one stream of a device whose work is done when it is launched."""

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Transfers(TorchDispatchMode):
    """Counts reads of the device by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        sources = [t for t in args if isinstance(t, Tensor) and t.device.type == "standin"]
        to_host = isinstance(found, Tensor) and found.device.type == "cpu"
        if sources and (to_host or name in ("_local_scalar_dense", "nonzero")):
            self.reads[name] += 1
        return found


def device() -> torch.device:
    """Builds and registers the device."""
    source = Path(__file__).with_name("standin.cpp")
    cpp_extension.load("gap_ds_standin", [str(source)], extra_cflags=["-O0"], build_directory=sys.argv[1])
    torch.utils.rename_privateuse1_backend("standin")
    module = ModuleType("torch.standin")
    vars(module).update(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.zeros(0, dtype=torch.uint8),
        set_rng_state=lambda state, device=None: None,
        synchronize=lambda device=None: None,
        current_stream=lambda device=None: Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    torch._register_device_module("standin", module)
    return torch.device("standin", 0)


def build(config: dict[str, Any], place: torch.device, kind: Any = torch.optim.Adam, **options: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model().to(place)
    return GaPEngine(model, config, optimizer=kind(model.parameters(), lr=0.01, foreach=False), **options)


def train(engine: GaPEngine, place: torch.device, steps: int) -> None:
    for _ in range(steps):
        # Gradients are given: backward passes need streams and events, which the device does not have.
        generator = torch.Generator().manual_seed(engine.applied_steps)
        for parameter in engine.module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(place)
        engine.watch(torch.ones((), device=place))
        engine.step()
        check_places(engine, place)


def check_places(engine: GaPEngine, place: torch.device) -> None:
    """What belongs to a weight is where it is."""
    state = engine.mask_state
    tensors = {**state.bits, **state.last.packed, **state._gradients}
    tensors |= {f"{name}, young": bits for name, (bits, _) in state.young.grown.items()}
    for shard in state.shards.values():
        tensors |= {f"{shard.name}, {k}": v for k, v in engine.run.backend.optimizers.per_weight(shard).items()}
        tensors[f"{shard.name}, weight"] = shard.weight()
    assert all(tensor.device == place for tensor in tensors.values()), {k: v.device for k, v in tensors.items()}
    assert state.revived() is None


def passes(place: torch.device) -> None:
    """A selection reads the device once a pass, however many pieces there are."""
    generator = torch.Generator().manual_seed(0)
    for pieces in (1, 7):
        weights = [torch.randn(300, generator=generator).round(decimals=1) for _ in range(pieces)]
        with Transfers() as transfers:
            found = select([weight.to(place) for weight in weights])
        on_host = select(weights)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, on_host, strict=True))
        # Three passes over the keys, one for the ties, and one over their indices of 9 bits.
        assert sum(transfers.reads.values()) == 5, transfers.reads


def select(weights: list[Tensor]) -> list[Tensor]:
    pieces = [
        selection.Piece(str(e), Box.span(0, len(w), len(w)), selection.magnitude_keys(w), e)
        for e, w in enumerate(weights)
    ]
    return selection.select_largest(pieces, [60] * len(weights), selection.Single())


def main() -> None:
    place = device()
    passes(place)
    print("passes", flush=True)
    train(build(CYCLIC, place), place, 4)  # over the first boundary
    print("cyclic", flush=True)
    engine = build(CYCLIC | {"regrow": "last_value"}, place, optim.AdamW)
    train(engine, place, 4)
    print("packed state", engine.stats()["optimizer_bytes"], flush=True)


if __name__ == "__main__":
    main()
