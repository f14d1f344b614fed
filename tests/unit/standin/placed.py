"""Trains on a device that is not the CPU and keeps its tensors in host memory: see test_standin.py.

    python placed.py BUILD [CASE...]

Every operation there refuses tensors of another device. After every step bits, moments and remembered values must be
where the weights are. Every run ends with the weights of the same run on the CPU. The extension is built in the folder
BUILD.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import gap_ds.optim
from gap_ds import GaPEngine
from gap_ds.masks import selection
from gap_ds.masks.box import Box
from gap_ds.masks.groups import Grouped, select_groups
from gap_ds.method import pattern as patterns
from gap_ds.sharding.comm import Comm
from gap_ds.training.consistency import drifted_weights

SIZE, PHASES = 8, {"sparsity": 0.75, "phase_steps": 3, "finetune_steps": 2}
CYCLIC = PHASES | {"partitions": 2, "rounds": 1}
MOVING = PHASES | {"phase_steps": 6, "update_steps": 2}


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


class Copies:
    """Two ranks, each with a copy of the model."""

    size = 2

    def all_gather(self, row: Tensor) -> Tensor:
        return torch.stack([row, row])


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
        device_count=lambda: 2,
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


def build(config: dict[str, Any], place: torch.device, optimizer: type[torch.optim.Optimizer]) -> GaPEngine:
    torch.manual_seed(0)
    model = Model().to(place)
    return GaPEngine(model, config, optimizer=optimizer(model.parameters(), **ADAM))


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


def several(place: torch.device) -> None:
    """Parts of a model may be on several devices of one process."""

    def ended(places: list[torch.device]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Model()
        for layer, here in zip(model.layers, places, strict=True):
            layer.to(here)
        engine = GaPEngine(model, CYCLIC, optimizer=torch.optim.Adam(model.parameters(), **ADAM))
        while not engine.finished:
            generator = torch.Generator().manual_seed(engine.applied_steps)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            engine.step()
        assert engine.stats()["kept"] == sum(engine.mask_state.kept())
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, portable=True)
            engine.load_checkpoint(folder)
            engine.export(f"{folder}/model")
        copies: Any = Copies()
        assert drifted_weights(engine.plan, engine.mask_state.shards, Comm(single=True), copies) is None
        return [parameter.detach().cpu() for parameter in model.parameters()]

    other, host = torch.device(place.type, 1), torch.device("cpu")
    expected = ended([host] * 4)
    for places in ([place, place, other, other], [host, place, other, place]):
        assert all(map(torch.equal, ended(places), expected)), places


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
        # One for weights that are NaN; with blocks six passes over sums of 8 bytes, and one for the ties.
        for pattern, reads in ((patterns.NofM(2, 4), 1), (patterns.Block(2, 2), 8)):
            with Transfers() as transfers:
                found = by_groups(pattern, [weight.to(place) for weight in weights])
            assert all(map(torch.equal, (bits.cpu() for bits in found), by_groups(pattern, weights)))
            assert sum(transfers.reads.values()) == reads, (pattern, transfers.reads)


def select(weights: list[Tensor]) -> list[Tensor]:
    pieces = [
        selection.Piece(str(e), Box.span(0, len(w), len(w)), selection.magnitude_keys(w), e)
        for e, w in enumerate(weights)
    ]
    return selection.select_largest(pieces, [60] * len(weights), selection.Single())


def by_groups(pattern: patterns.NofM | patterns.Block, weights: list[Tensor]) -> list[Tensor]:
    shape, keep = ((10, 30), 60) if isinstance(pattern, patterns.Block) else ((15, 20), 150)
    pieces = [
        selection.Piece(str(e), Box.span(0, 300, 300), selection.magnitude_keys(w), 0) for e, w in enumerate(weights)
    ]
    entries = [Grouped(piece, shape, (0, 1), keep, [piece.box], True) for piece in pieces]
    return select_groups(pattern, entries, selection.Single())


#: Runs by name: config, and the optimizer.
ADAM: dict[str, Any] = {"lr": 0.01, "foreach": False}
RUNS: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer]]] = {
    "cyclic": (CYCLIC, torch.optim.Adam),
    "last values": (CYCLIC | {"regrow": "last_value"}, torch.optim.Adam),
    "warm-up": (CYCLIC | {"regrow_warmup_steps": 3}, torch.optim.Adam),
    "mean moments": (CYCLIC | {"regrow_moments": "mean_second"}, torch.optim.Adam),
    "2:4": (CYCLIC | {"sparsity": 0.5, "pattern": "2:4"}, torch.optim.Adam),
    "blocks": (CYCLIC | {"pattern": "block:2x2"}, torch.optim.Adam),
    "large blocks": (CYCLIC | {"pattern": "block:4x4"}, torch.optim.Adam),
    "global": (CYCLIC | {"distribution": "global"}, torch.optim.Adam),
    "rigl": (MOVING | {"method": "rigl"}, torch.optim.Adam),
    "set": (MOVING | {"method": "set"}, torch.optim.Adam),
    "granet": (MOVING | {"method": "granet"}, torch.optim.Adam),
    "AdamW with kept state": (CYCLIC, gap_ds.optim.AdamW),
    "AdamW with kept state, last values": (CYCLIC | {"regrow": "last_value"}, gap_ds.optim.AdamW),
    "AdamW with kept state, rigl": (MOVING | {"method": "rigl"}, gap_ds.optim.AdamW),
}


def run(name: str, place: torch.device) -> None:
    """Trains to the end, with a checkpoint in the middle; then copies and exports the model."""
    config, optimizer = RUNS[name]
    ends = {}
    for here in (place, torch.device("cpu")):
        engine = build(config, here, optimizer)
        train(engine, here, 4)
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, portable=True)
            train(engine, here, 2)
            resumed = build(config, here, optimizer)
            resumed.load_checkpoint(folder)
        check_places(resumed, here)
        train(resumed, here, 2)
        pairs = zip(engine.module.parameters(), resumed.module.parameters(), strict=True)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs), f"{name}: the resumed run differs"
        train(engine, here, 2)
        average = copy.deepcopy(engine.module)
        engine.apply_to(average)
        assert engine.stats()["kept"] == sum(engine.mask_state.kept())
        with tempfile.TemporaryDirectory() as folder:
            engine.export(f"{folder}/model")
            engine.save_masks(f"{folder}/masks")
            engine.load_masks(f"{folder}/masks")
            exported = safetensors.torch.load_file(f"{folder}/model/model.safetensors")
        check_places(engine, here)
        parameters = {f"average {k}": v.detach().cpu() for k, v in average.named_parameters()}
        ends[here.type] = exported | parameters
    assert ends["cpu"].keys() == ends["standin"].keys()
    different = [key for key, value in ends["cpu"].items() if not torch.equal(value, ends["standin"][key])]
    assert not different, f"{name}: {different} differ from those of the CPU"


CASES = {"passes": passes, "several devices": several}


def main() -> None:
    place = device()
    if failed := [name for name in sys.argv[2:] or [*CASES, *RUNS] if not works(name, place)]:
        sys.exit(f"failed: {', '.join(failed)}")


def works(name: str, place: torch.device) -> bool:
    """Runs a case and prints its name, or its error."""
    try:
        CASES[name](place) if name in CASES else run(name, place)
    except Exception:
        traceback.print_exc()
        return False
    print("passed:", name, flush=True)
    return True


if __name__ == "__main__":
    main()
