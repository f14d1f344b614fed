"""Checkpoints of a whole run: damage passed over, a full disk survived, and files that other ranks can read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ALONE, refused, replace_header
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gap_ds import GaPEngine, checkpoint
from gap_ds.checkpoint import portable
from gap_ds.checkpoint.folder import _write_manifest
from gap_ds.sharding.backends import Backend, Training, detect

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _without_a_process_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class Failing:
    """Methods of which the n-th call of all together finds the disk full."""

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    def at(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return method(*arguments, **keywords)

        return call


def test_a_full_disk_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opening of a file for writing, flush and change of a name fails in turn, on a real engine."""
    folder, engine = tmp_path / "run", build()
    engine.save_checkpoint(folder, "old")
    for moment in range(200):
        failing = Failing(moment)
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "open")):
                patch.setattr(owner, name, failing.at(getattr(owner, name)))
            try:
                engine.save_checkpoint(folder, "new", portable=True)
            except ValueError as error:
                assert "No space left on device" in str(error)
                assert checkpoint.find_whole(folder, None, ALONE) == folder / "old"
                assert not list(folder.glob("new.partial"))
                continue
        engine.load_checkpoint(folder, "new")  # also where something failed after it was visible
        if failing.calls <= moment:
            assert moment > 10
            return
        shutil.rmtree(folder / "new")
    raise AssertionError("a save writes fewer files than that")


# -- a real run in this process ------------------------------------------------------------------------------------

CYCLIC = {"sparsity": 0.5, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 2, "include": ["weight"]}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))  # no dimensions, another dtype
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(2, 2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu()) * self.scale


def build(optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Small()
    return GaPEngine(model, CYCLIC, optimizer=optimizer(model.parameters(), lr=0.1, **arguments))


def train(engine: GaPEngine, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(engine.applied_steps))
        engine.backward(engine(x).square().mean())
        engine.step()


def everything(engine: GaPEngine) -> dict[str, Tensor]:
    found = dict(engine.module.state_dict())
    for name, parameter in engine.module.named_parameters():
        found |= {f"{name} {key}": torch.as_tensor(v) for key, v in engine.optimizer.state[parameter].items()}
        if (mask := engine.mask(name)) is not None:
            found[f"{name} mask"] = mask
    return {name: tensor.clone() for name, tensor in found.items()}


def same(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def from_elsewhere(path: Path, **changes: Any) -> None:
    """Makes a checkpoint look as if other ranks had saved it, so that its portable files are read."""
    state = path / "gap" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"ranks": 2} | changes))
    relist(path)


def relist(path: Path) -> None:
    """A manifest of the files as they are now: what a checksum cannot find wrong."""
    (path / "gap" / "manifest.json").unlink()
    _write_manifest(path.parent, path, ALONE)


OPTIMIZERS: dict[str, Callable[[], GaPEngine]] = {
    "adamw": build,
    "fused": lambda: build(fused=True),
    "amsgrad": lambda: build(amsgrad=True),
    "sgd": lambda: build(torch.optim.SGD),
    "momentum": lambda: build(torch.optim.SGD, momentum=0.9),
    "adagrad": lambda: build(torch.optim.Adagrad),
    "rmsprop": lambda: build(torch.optim.RMSprop, centered=True),
}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_portable_files_hold_everything(tmp_path: Path, name: str, steps: int) -> None:
    first, second = OPTIMIZERS[name](), OPTIMIZERS[name]()
    train(first, steps)
    first.module.count.fill_(7), first.module.mean.fill_(1.5)
    path = first.save_checkpoint(tmp_path, portable=True)
    from_elsewhere(path)
    with pytest.warns(UserWarning, match="the random state is not restored"):
        second.load_checkpoint(tmp_path)
    assert same(everything(second), everything(first)) and int(second.module.count) == 7
    train(first, 4), train(second, 4)
    assert same(everything(second), everything(first))


def test_the_portable_file_and_the_header_of_the_masks(tmp_path: Path) -> None:
    engine = build()
    train(engine, 2)
    path = engine.save_checkpoint(tmp_path, portable=True) / "gap"
    found = load_file(path / "portable_0.safetensors")
    weights = {f"weight:{n}": p.detach().flatten() for n, p in engine.module.named_parameters()}
    assert all(torch.equal(found[key], weight) for key, weight in weights.items())
    total = sum(tensor.numel() for key, tensor in found.items() if not key.startswith("buffer:"))
    assert total == 3 * (12 + 4 + 8 + 2 + 1)
    assert found["buffer:mean"].dtype == torch.bfloat16 and found["buffer:count"].dtype == torch.int64
    with safe_open(path / "masks.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["signature"] == engine.signature and metadata["applied_steps"] == "2" and metadata["phase"] == "0"
    assert metadata["gap_ds"] == engine.signature.rpartition("|v:")[2]


def test_settings_of_parameter_groups_come_back(tmp_path: Path) -> None:
    first, second = build(), build(betas=(0.5, 0.6))
    first.optimizer.param_groups[0]["lr"] = 0.025
    from_elsewhere(first.save_checkpoint(tmp_path, portable=True))
    with pytest.warns(UserWarning, match="random state"):
        second.load_checkpoint(tmp_path)
    group = second.optimizer.param_groups[0]
    assert group["lr"] == 0.025 and group["betas"] == (0.9, 0.999) and group["amsgrad"] is False


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    engine = build(torch.optim.Adafactor)
    train(engine, 1)
    said = refused(lambda: engine.save_checkpoint(tmp_path, portable=True))
    assert "Adafactor keeps" in said and "neither one value per weight nor one number" in said
    engine.save_checkpoint(tmp_path)


@pytest.mark.parametrize("backend", ["zero2", "fsdp1"])
def test_a_checkpoint_of_another_backend_must_be_portable(tmp_path: Path, backend: str) -> None:
    engine = build()
    from_elsewhere(engine.save_checkpoint(tmp_path), backend=backend)
    before = everything(engine)
    assert "that takes a checkpoint saved with portable=True" in refused(lambda: engine.load_checkpoint(tmp_path))
    assert same(everything(engine), before)


def test_a_checkpoint_of_another_model_or_optimizer_changes_nothing(tmp_path: Path) -> None:
    path = build().save_checkpoint(tmp_path, portable=True)
    from_elsewhere(path)
    engine = build()
    engine.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    before = engine.module.state_dict()
    assert "1 parameter groups, and the optimizer now has 2" in refused(lambda: engine.load_checkpoint(tmp_path))
    assert same(engine.module.state_dict(), before)


def test_damaged_checkpoints_of_a_run_are_passed_over(tmp_path: Path) -> None:
    engine = build()
    for _ in range(3):
        train(engine, 1)
        engine.save_checkpoint(tmp_path, portable=True)
    wanted = {}
    for step in (1, 2, 3):
        engine.load_checkpoint(tmp_path, f"step_{step}")
        wanted[step] = everything(engine)
    victim = next(path for path in (tmp_path / "step_3" / "state").iterdir() if path.suffix == ".distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(bytes(content))
    before = everything(engine)
    said = refused(lambda: engine.load_checkpoint(tmp_path, "step_3"))
    assert said.startswith(f"{victim}: does not have the checksum") and same(everything(engine), before)
    with pytest.warns(UserWarning, match=f"{victim}: does not have the checksum .* passed over"):
        engine.load_checkpoint(tmp_path)
    assert engine.applied_steps == 2 and same(everything(engine), wanted[2])


# -- damage to portable files that no checksum was there to find ---------------------------------------------------


class Portable:
    """A plain model's portable file, and a fresh model to read it into."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "portable_0.safetensors"
        backend, buffers = self.fresh()
        for step in (1, 2):
            for parameter in backend.module.parameters():
                parameter.grad = torch.full_like(parameter, step)
            backend.optimizers[0].step()
        portable.write(folder, backend, buffers, ALONE)
        self.content = self.path.read_bytes()

    def fresh(self) -> tuple[Backend, dict[str, Tensor]]:
        model = nn.Sequential(nn.Linear(2, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return detect(model, Training(optimizer)), {"buffer": torch.zeros(2)}

    def read(self) -> bool:
        """Whether it was read; ValueError alone may come, and then nothing was changed."""
        backend, buffers = self.fresh()
        before = {name: p.detach().clone() for name, p in backend.module.named_parameters()}
        try:
            portable.read(self.folder, backend, buffers, ALONE)
        except ValueError:
            assert all(torch.equal(p, before[name]) for name, p in backend.module.named_parameters())
            assert not backend.optimizers[0].state
            return False
        return True


@pytest.fixture
def small(tmp_path: Path) -> Portable:
    return Portable(tmp_path)


def test_a_portable_file_truncated_or_flipped_anywhere(small: Portable) -> None:
    assert small.read()
    for length in range(len(small.content)):
        small.path.write_bytes(small.content[:length])
        assert not small.read()
    for position in range(len(small.content)):
        damaged = bytearray(small.content)
        damaged[position] ^= 1 << (position * 5 % 8)
        small.path.write_bytes(bytes(damaged))
        small.read()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0.weight", "step", "lr"]), inner),
    max_leaves=6,
)


@PROPERTY
@given(st.sampled_from(["pieces", "numbers", "groups", "files", "format", "version"]), JSON | st.text(max_size=9))
def test_any_header(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    small = Portable(tmp_path_factory.mktemp("portable"))
    text = value if isinstance(value, str) else json.dumps(value)

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"][key] = text

    replace_header(small.path, change)
    small.read()


def pieces(offset: list[int], size: list[int]) -> str:
    return json.dumps({"0.weight": [[3], offset, size], "0.bias": [[1], [0], [1]]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda h: h["__metadata__"].update(version="9"),
            "gap_ds.portable of version 9; this",
        ),
        (lambda h: h["__metadata__"].update(files="2"), "holds 1 of 2 portable files"),
        (lambda h: h["__metadata__"].pop("pieces"), "its header is damaged"),
        (
            lambda h: h["__metadata__"].update(pieces=pieces([0], [3])),
            "is damaged",
        ),
        (
            lambda h: h["__metadata__"].update(pieces=pieces([1], [2])),
            "do not hold 0.weight",
        ),
        (lambda h: h["__metadata__"].update(pieces='{"0.bias": [[1], [0], [1]]}'), "0.weight does not have the size"),
        (lambda h: h["__metadata__"].update(groups="[]"), "0 parameter groups"),
        (lambda h: h.update(x=h.pop("buffer:buffer")), "x does not have the size"),
    ],
)
def test_headers_that_do_not_fit(small: Portable, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    replace_header(small.path, change)
    backend, buffers = small.fresh()
    assert said in refused(lambda: portable.read(small.folder, backend, buffers, ALONE))
