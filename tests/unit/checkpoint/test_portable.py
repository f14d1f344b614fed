"""Checkpoints of a whole run: verified, passed over when damaged, kept in number, and movable; nothing in between."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_folder import ALONE, FULL, NAMES, PLAN, content_of, read, replace_header, writer
from torch import Tensor, nn

from gap_ds import GaPEngine, checkpoint
from gap_ds.checkpoint import portable
from gap_ds.masks import bitmask
from gap_ds.sharding.backends import Backend, Training, detect

DATA = Path(__file__).resolve().parents[2] / "data"
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _without_a_process_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        work()
    return str(error.value)


# -- manifest ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", "step_1", ALONE, writer("one"))


def test_the_manifest_lists_every_file(saved: Path) -> None:
    manifest = json.loads((saved / "gap" / "manifest.json").read_text())
    assert manifest["format"] == "gap_ds.manifest" and (manifest["version"], manifest["number"]) == (1, 1)
    assert manifest["files"].keys() == {"weights", "gap/state.json"}
    size, digest = manifest["files"]["weights"]
    assert size == 3 and digest == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert checkpoint.damage(saved, ALONE) is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_files_and_agree(saved: Path, tmp_path: Path, ranks: int) -> None:
    def write(folder: Path) -> None:
        for i in range(7):
            (folder / f"part_{i}").write_bytes(bytes([i]) * (1000 * i))
        checkpoint.write_json(folder / "gap" / "state.json", {})

    found = Ranks(ranks).run(
        lambda rank: checkpoint.save(tmp_path / "many", "t", rank, write if rank.rank == 0 else lambda _: None)
    )
    assert found == [tmp_path / "many" / "t"] * ranks
    alone = checkpoint.save(tmp_path / "alone", "t", ALONE, write)
    manifests = [(path / "gap" / "manifest.json").read_bytes() for path in (found[0], alone)]
    assert manifests[0] == manifests[1]
    assert Ranks(ranks).run(lambda rank: checkpoint.damage(alone, rank)) == [None] * ranks
    for i in range(1, 7):
        path = alone / f"part_{i}"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\xff")
        reason = f"{path}: does not have the checksum it was saved with"
        assert Ranks(ranks).run(lambda rank: checkpoint.damage(alone, rank)) == [reason] * ranks
        path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_balanced(ranks: int) -> None:
    rng = random.Random(ranks)
    sizes = {f"f{i}": rng.randrange(1000) for i in range(50)}
    shares = Ranks(ranks).run(lambda rank: checkpoint._share(sizes, rank))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 1000


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path / "weights").unlink(), "weights: cannot be read (FileNotFoundError"),
    "shorter": (lambda path: (path / "weights").write_text("on"), "weights: has 2 bytes, and was saved with 3"),
    "longer": (lambda path: (path / "weights").write_text("one "), "weights: has 4 bytes, and was saved with 3"),
    "changed": (lambda path: (path / "weights").write_text("onf"), "weights: does not have the checksum"),
    "no manifest": (lambda path: (path / "gap/manifest.json").unlink(), "manifest.json: cannot be read"),
    "no state": (lambda path: (path / "gap/state.json").unlink(), "state.json: cannot be read"),
    "torn": (lambda path: os.truncate(path / "gap/manifest.json", 30), "manifest.json: cannot be read"),
    "a folder": (lambda path: ((path / "weights").unlink(), (path / "weights").mkdir()), "weights: has "),
}


def write_state(folder: Path) -> None:
    (folder / "weights").write_text("one")
    checkpoint.write_json(folder / "gap" / "state.json", {"content": "one", "manifest": True})


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_a_tag_and_passed_over_without(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    for tag in ("step_1", "step_2", "step_3"):
        newest = checkpoint.save(tmp_path, tag, ALONE, write_state)
    damage(newest)
    assert reason in refused(lambda: checkpoint.find_whole(tmp_path, "step_3", ALONE))
    for ranks in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = Ranks(ranks).run(lambda rank: checkpoint.find_whole(tmp_path, None, rank))
        assert found == [tmp_path / "step_2"] * ranks
        assert [str(w.message) for w in caught if reason in str(w.message)] and len(caught) == 1
    for tag in ("step_1", "step_2"):
        damage(tmp_path / tag)
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        assert reason in refused(lambda: checkpoint.find_whole(tmp_path, None, ALONE))


def test_the_newest_is_the_last_written_whatever_its_name_and_time(tmp_path: Path) -> None:
    for tag in ("step_9", "b", "step_1"):
        path = checkpoint.save(tmp_path, tag, ALONE, write_state)
    os.utime(path / "gap" / "state.json", (0, 0))
    (tmp_path / "latest").write_text("b")  # a kill may have come between the two
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step_1", "b", "step_9"]
    checkpoint.save(tmp_path, "b", ALONE, write_state)
    assert checkpoint.find_whole(tmp_path, None, ALONE).name == "b"


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"number": 0},
        {"number": float("inf")},
        {"files": []},
        {"files": {}},
        {"files": {"gap/state.json": [1]}},
        {"files": {"gap/state.json": ["x", "y"]}},
        {"files": {"../weights": [1, "y"], "gap/state.json": [1, "y"]}},
        {"files": {"/etc/passwd": [1, "y"], "gap/state.json": [1, "y"]}},
        {"files": {"a\0b": [1, "y"], "gap/state.json": [1, "y"]}},
    ],
)
def test_a_manifest_that_says_something_else(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "gap" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reason = checkpoint.damage(saved, ALONE)
    assert reason is not None and str(saved) in reason


def test_a_manifest_damaged_anywhere(saved: Path) -> None:
    """Truncated at every byte, and with every bit flipped: named, or without effect on what is loaded."""
    path = saved / "gap" / "manifest.json"
    content, harmless = path.read_bytes(), 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert checkpoint.damage(saved, ALONE) is not None or content[length:].isspace()
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        harmless += checkpoint.damage(saved, ALONE) is None
        assert position % 8 or checkpoint.candidates(saved.parent) == [saved]
    assert harmless < 30  # in the number of the checkpoint, and in white space


# -- how many are kept ---------------------------------------------------------------------------------------------


def tags(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_keep_leaves_the_newest_that_are_complete(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_0" / "gap").mkdir(parents=True)  # looks like one of ours, and is none
    (tmp_path / "step_7.partial" / "gap").mkdir(parents=True)  # what a killed save leaves
    for i in range(1, 5):
        checkpoint.save(tmp_path, f"step_{i}", ALONE, write_state)
    (tmp_path / "step_3" / "weights").unlink()  # damaged: not counted, and left to be looked at
    checkpoint.save(tmp_path, "step_5", ALONE, write_state, keep=3)
    assert tags(tmp_path) == ["notes", "step_0", "step_2", "step_3", "step_4", "step_5"]
    checkpoint.save(tmp_path, "step_6", ALONE, write_state, keep=1)
    assert tags(tmp_path) == ["notes", "step_0", "step_3", "step_6"]
    checkpoint.save(tmp_path, "step_6", ALONE, write_state, keep=1)
    assert tags(tmp_path) == ["notes", "step_0", "step_3", "step_6"]
    assert "keep=0: must be at least 1" in refused(lambda: checkpoint.save(tmp_path, "x", ALONE, write_state, keep=0))


def test_nothing_is_deleted_before_the_new_one_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "step_1", ALONE, write_state)
    rmtree, seen = shutil.rmtree, []

    def watched(path: Path, **arguments: Any) -> None:
        if Path(path).exists():
            seen.append((Path(path).name, (tmp_path / "step_2" / "gap" / "manifest.json").exists()))
        rmtree(path, **arguments)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoint.save(tmp_path, "step_2", ALONE, write_state, keep=1)
    assert seen == [("step_1.partial", True)] and tags(tmp_path) == ["step_2"]


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "/tmp/a", "a.partial", "a.old"])
def test_a_tag_is_the_name_of_a_folder(tmp_path: Path, tag: str) -> None:
    assert "must be the name of a folder" in refused(lambda: checkpoint.save(tmp_path, tag, ALONE, write_state))


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["step_1", "step_2"])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank(tmp_path: Path, tag: str, full: int) -> None:
    checkpoint.save(tmp_path, "step_1", ALONE, writer("one"))

    def save(rank: Any) -> Path:
        def write(folder: Path) -> None:
            def part() -> None:
                (folder / f"part_{rank.rank}").write_text("x")
                if rank.rank == full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "part"))

            checkpoint.raise_on_all_ranks(rank, part)

        return checkpoint.save(tmp_path, tag, rank, write)

    for error in Ranks(2).run(save):
        assert isinstance(error, ValueError) and "No space left on device" in str(error)
        assert "was not saved, and older checkpoints are as they were" in str(error)
    assert tags(tmp_path) == ["step_1"] and content_of(checkpoint.find_whole(tmp_path, None, ALONE)) == "one"


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
    for moment in range(200):
        folder, engine = tmp_path / str(moment), build()
        engine.save_checkpoint(folder, "old")
        failing = Failing(moment)
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "write_bytes")):
                patch.setattr(owner, name, failing.at(getattr(owner, name)))
            try:
                engine.save_checkpoint(folder, "new", portable=True)
            except ValueError as error:
                assert "No space left on device" in str(error)
                assert checkpoint.find_whole(folder, "old", ALONE) == folder / "old"
                assert not list(folder.glob("new.partial"))
                engine.load_checkpoint(folder)
                continue
        engine.load_checkpoint(folder, "new")  # also where something failed after it was visible
        if failing.calls <= moment:
            assert moment > 10
            return
    raise AssertionError("a save writes fewer files than that")


# -- a real run in this process ------------------------------------------------------------------------------------

CYCLIC = {"sparsity": 0.5, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 2, "include": ["weight"]}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(2, 2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu())


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
    checkpoint._write_manifest(path.parent, path, ALONE)


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
    assert sum(tensor.numel() for key, tensor in found.items() if not key.startswith("buffer:")) == 3 * (12 + 4 + 8 + 2)
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


@pytest.mark.parametrize("backend", ["zero2", "ddp"])
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
            backend.optimizer.step()
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
            assert not backend.optimizer.state
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["__metadata__"].update(version="2"), "is no file of the kind gap_ds.portable, version 1"),
        (lambda h: h["__metadata__"].update(files="2"), "holds 1 of 2 portable files"),
        (lambda h: h["__metadata__"].pop("pieces"), "its header is damaged"),
        (lambda h: h["__metadata__"].update(pieces='{"0.weight": [0, 3], "0.bias": [0, 1]}'), "is damaged"),
        (lambda h: h["__metadata__"].update(pieces='{"0.weight": [1, 2], "0.bias": [0, 1]}'), "do not hold 0.weight"),
        (lambda h: h["__metadata__"].update(pieces='{"0.bias": [0, 1]}'), "0.weight does not have the size"),
        (lambda h: h["__metadata__"].update(groups="[]"), "0 parameter groups"),
        (lambda h: h.update(x=h.pop("buffer:buffer")), "x does not have the size"),
    ],
)
def test_headers_that_do_not_fit(small: Portable, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    replace_header(small.path, change)
    backend, buffers = small.fresh()
    assert said in refused(lambda: portable.read(small.folder, backend, buffers, ALONE))


# -- older formats -------------------------------------------------------------------------------------------------


def test_masks_of_version_1_are_refused_by_name() -> None:
    path = DATA / "masks_version_1.safetensors"
    assert refused(lambda: read(path, PLAN, NAMES)) == (
        f"{path}: gap_ds.masks.bitmask of version 1; this version of gap_ds reads version 2"
    )


def test_masks_of_version_2_without_what_the_header_says_now_are_read() -> None:
    assert read(DATA / "masks_version_2.safetensors", PLAN, NAMES) == {n: mask.tolist() for n, mask in FULL.items()}


def test_a_checkpoint_from_before_manifests_is_read_and_said_to_be_unverified(tmp_path: Path) -> None:
    engine = build()
    train(engine, 2)
    path = engine.save_checkpoint(tmp_path)
    state = json.loads((path / "gap" / "state.json").read_text())
    del state["manifest"], state["counters"]
    (path / "gap" / "state.json").write_text(json.dumps(state))
    (path / "gap" / "manifest.json").unlink()
    other = build()
    with pytest.warns(UserWarning, match="was saved before checkpoints had checksums: not verified"):
        other.load_checkpoint(tmp_path)
    assert same(everything(other), everything(engine))
    other.save_checkpoint(tmp_path, "step_3", keep=1)
    assert tags(tmp_path) == ["step_3"]


def make_samples() -> None:
    """How the samples were made: the masks of FULL, as the formats have them."""
    bits = {name: bitmask.pack(mask) for name, mask in FULL.items()}
    one = {"format": "gap_ds.masks", "version": "1", "plan": PLAN.fingerprint}
    save_file(bits, DATA / "masks_version_1.safetensors", one)
    kept = json.dumps({name: int(mask.sum()) for name, mask in FULL.items()})
    save_file(bits, DATA / "masks_version_2.safetensors", one | {"version": "2", "kept": kept})
