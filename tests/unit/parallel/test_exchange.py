"""The exchange of parallel GaP: exact sizes, any cut of the pieces, foreign folders, late workers, damaged files."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fake_ranks import Rank, Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gap_ds import GaPEngine
from gap_ds.masks import bitmask
from gap_ds.method import plan
from gap_ds.method.config import GaPConfig
from gap_ds.parallel import Exchange, Item, ParallelWorker, Received, identity, items_of
from gap_ds.parallel import items as file
from gap_ds.parallel.records import MAX_JSON
from gap_ds.parallel.transport import open_folder, without_secrets
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard
from gap_ds.storage import safetensors as tensorfile

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SIGNATURE = "gap|method:parallel|k:2|s:0.8|v:0.1.0"
ALONE = Comm(single=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage does not get time to pass."""
    monkeypatch.setattr("gap_ds.parallel.records._SETTLE", 0.0)
    monkeypatch.setattr("gap_ds.parallel.reading._AGAIN", 0.0)
    monkeypatch.setattr("gap_ds.parallel.records._POLL", 0.001)


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "exchange")
        return
    url = f"memory://{tmp_path.name}/exchange"
    yield url
    system = fsspec.filesystem("memory")
    with contextlib.suppress(FileNotFoundError):
        system.rm(f"/{tmp_path.name}", recursive=True)


def raw(folder: str, name: str) -> bytes:
    with fsspec.open(f"{folder}/{name}", "rb") as file:
        return bytes(file.read())


def overwrite(folder: str, name: str, data: bytes) -> None:
    with fsspec.open(f"{folder}/{name}", "wb") as file:
        file.write(data)


class Model:
    """The tensors of one worker: two entries in each of K partitions, and what is exchanged beside them."""

    SHAPES = (("fc1.weight", (3, 7)), ("fc2.weight", (5, 5)))

    def __init__(self, worker: int, workers: int = 2, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(1000 * seed + worker)
        self.workers = workers
        self.tensors: dict[str, tuple[Tensor, int | None, int | None]] = {}
        self.bits: dict[str, Tensor] = {}
        for k in range(workers):
            for n, (leaf, shape) in enumerate(self.SHAPES):
                weight = torch.randn(shape, generator=random)
                keep = 4 + n
                if k == worker:
                    kept = torch.zeros(math.prod(shape), dtype=torch.bool)
                    kept[torch.randperm(kept.numel(), generator=random)[:keep]] = True
                    weight.view(-1)[~kept] = 0.0
                    self.bits[f"{k}.{leaf}"] = bitmask.pack(kept)
                self.tensors[f"{k}.{leaf}"] = (weight, k, keep)
            self.tensors[f"{k}.norm.bias"] = (torch.randn(7, generator=random), k, None)
            self.tensors[f"{k}.norm.steps"] = (torch.tensor(10 * worker + k), k, None)
        self.tensors["embedding"] = (torch.randn(4, 3, generator=random), None, None)
        self.tensors["mean"] = (torch.randn(2, generator=random).double(), None, None)
        self.tensors["count"] = (torch.tensor(worker + 5), None, None)
        self.tensors["flags"] = (torch.tensor([True, False, worker > 0]), None, None)

    def items(self) -> list[Item]:
        return [
            Item(name, tuple(t.shape), where, 0, t.numel(), lambda t=t: t.reshape(-1), keep, dtype=t.dtype)
            for name, (t, where, keep) in self.tensors.items()
        ]


def start(folder: str, worker: int, workers: int = 2, **changes: Any) -> Exchange:
    """A job of a worker, which may have published before."""
    arguments = {"signature": SIGNATURE, "fingerprint": "abc", "tensors": "def"} | changes
    told = {"timeout": 60.0, "run": "", "resume": True}
    told |= {name: arguments.pop(name) for name in told.keys() & arguments.keys()}
    return Exchange(ParallelWorker(worker, folder, **told), workers, world=ALONE, comm=ALONE, **arguments)


def publish_all(folder: str, workers: int = 2, round: int = 0) -> list[Exchange]:
    jobs = [start(folder, worker, workers) for worker in range(workers)]
    for worker, job in enumerate(jobs):
        model = Model(worker, workers)
        job.publish(round, model.items(), model.bits)
    return jobs


def combine(job: Exchange, round: int, items: list[Item], bits: dict[str, Tensor]) -> list[Received]:
    found: list[Received] = []
    job.combine(round, items, bits, found.append)
    return found


def read(job: Exchange, items: list[Item], round: int = 0) -> list[Received]:
    """What a job receives once all have published."""
    found: list[Received] = []
    job.read(round, items, job.wait(round), found.append)
    return found


def take(job: Exchange, round: int = 0) -> dict[str, Received]:
    model = Model(job.worker.index, job.workers)
    return {received.name: received for received in combine(job, round, model.items(), model.bits)}


def expected(workers: int, shared: str = "average") -> dict[str, Tensor]:
    """What every worker must end up with, written without the code under test."""
    models = [Model(worker, workers) for worker in range(workers)]
    result = {}
    for name, (tensor, where, _) in models[0].tensors.items():
        every = [model.tensors[name][0] for model in models]
        if where is not None:
            result[name] = every[where]
        elif shared == "first" or not tensor.is_floating_point():
            result[name] = every[0]
        else:
            result[name] = (sum(t.double() for t in every) / workers).to(tensor.dtype)
    return result


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, signs of zeros included."""
    a, b = a.reshape(-1), b.reshape(-1)
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


# -- round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_worker_takes_each_partition_from_its_own_worker(folder: str, workers: int) -> None:
    wanted = expected(workers)
    for job in publish_all(folder, workers):
        found = take(job)
        assert found.keys() == wanted.keys()
        for name, received in found.items():
            assert same(received.value, wanted[name]), name
            where = Model(0, workers).tensors[name][1]
            if Model(0, workers).tensors[name][2] is None:
                assert received.bits is None
            else:
                assert where is not None and torch.equal(received.bits, Model(where, workers).bits[name])


def test_first_takes_the_shared_tensors_from_worker_0(folder: str) -> None:
    jobs = [start(folder, worker, unpartitioned="first") for worker in (0, 1)]
    for job in jobs:
        model = Model(job.worker.index)
        job.publish(0, model.items(), model.bits)
    wanted = expected(2, "first")
    for job in jobs:
        assert all(same(received.value, wanted[name]) for name, received in take(job).items())
    with safe_open_of(folder, 1) as names:
        assert "embedding" not in names and "1.norm.bias" in names


@contextlib.contextmanager
def safe_open_of(folder: str, worker: int, round: int = 0) -> Iterator[set[str]]:
    if folder.startswith("memory"):
        data = raw(folder, f"round_{round}/worker_{worker}.safetensors")
        length = struct.unpack("<Q", data[:8])[0]
        yield set(json.loads(data[8 : 8 + length]))
        return
    with safe_open(f"{folder}/round_{round}/worker_{worker}.safetensors", framework="pt") as file:
        yield set(file.keys())


def test_the_file_is_a_safetensors_file_of_exactly_the_compact_form(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for worker in (0, 1):
        job, model = start(folder, worker), Model(worker)
        job.publish(0, model.items(), model.bits)
        path = tmp_path / "round_0" / f"worker_{worker}.safetensors"
        tensors = load_file(path)
        header = struct.unpack("<Q", path.read_bytes()[:8])[0]
        size = 8 + header
        for name, (tensor, where, keep) in model.tensors.items():
            if where == worker and keep is not None:
                size += math.ceil(tensor.numel() / 8) + 4 * keep
                kept = bitmask.unpack(tensors.pop(f"{name}.mask"), tensor.numel())
                assert torch.equal(kept, bitmask.unpack(model.bits[name], tensor.numel()))
                assert torch.equal(tensors.pop(f"{name}.values"), tensor.view(-1)[kept])
            elif where == worker or (where is None and (worker == 0 or tensor.is_floating_point())):
                size += tensor.numel() * tensor.element_size()
                assert same(tensors[name], tensor) and tensors.pop(name).shape == tensor.shape
        assert not tensors
        assert job.bytes_written == path.stat().st_size == size
        said = json.loads((tmp_path / "round_0" / f"worker_{worker}.json").read_text())
        assert said["bytes"] == size and said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (said["round"], said["worker"], said["plan"], said["workers"]) == (0, worker, "abc", 2)
        assert sorted(os.listdir(path.parent)) == sorted(
            f"worker_{w}.{kind}" for w in range(worker + 1) for kind in ("json", "safetensors")
        )


def test_the_bytes_are_logged_and_counted(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    jobs = publish_all(folder)
    size = jobs[0].bytes_written
    sizes = [len(raw(folder, f"round_0/worker_{worker}.safetensors")) for worker in (0, 1)]
    with caplog.at_level(logging.INFO, "gap_ds"):
        manifests = jobs[0].wait(0)
        assert [manifest.bytes for manifest in manifests] == sizes and size == sizes[0]
        jobs[0].read(0, Model(0).items(), manifests, lambda _: None)
        # One rank reads every file twice, to check it and piece by piece; the headers only once.
        headers = [8 + struct.unpack("<Q", raw(folder, f"round_0/worker_{w}.safetensors")[:8])[0] for w in (0, 1)]
        assert jobs[0].bytes_read == 2 * sum(sizes) - sum(headers)
        take(jobs[1])
    assert f"round 0: worker 1 wrote 0 bytes and read {jobs[1].bytes_read} bytes, checks included" in caplog.text
    assert f"its file has {sizes[1]} bytes, and the files of all 2 workers have {sum(sizes)};" in caplog.text


def test_equal_shared_values_stay_as_they_are(folder: str) -> None:
    """(a + a + a) / 3 in fp32 need not be a."""
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e3
    items = [Item("shared", (1000,), None, 0, 1000, lambda: value)]
    jobs = [start(folder, worker, 3) for worker in range(3)]
    for job in jobs:
        job.publish(0, items, {})
    (received,) = combine(jobs[1], 0, items, {})
    assert same(received.value, value)


def test_kept_values_do_not_change_in_any_bit(folder: str) -> None:
    weight = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -3.0, 5.0])
    kept = torch.tensor([True] * 6 + [False, False])
    items = [Item("w", (2, 4), 0, 0, 8, lambda: weight, keep=6)]
    job = start(folder, 0, 1)
    (received,) = combine(job, 0, items, {"w": bitmask.pack(kept)})
    assert same(received.value[:6], weight[:6]) and same(received.value[6:], torch.zeros(2))


def test_pooled_budgets_are_those_of_the_file(folder: str) -> None:
    """With one threshold for a partition, an entry keeps any number of weights, and their sum is fixed."""
    weights = {"a": torch.randn(10), "b": torch.randn(10)}
    kept = {"a": torch.arange(10) < 9, "b": torch.zeros(10, dtype=torch.bool)}

    def items(first: int) -> list[Item]:
        return [
            Item("a", (10, 1), 0, 0, 10, lambda: weights["a"], keep=first, shared_budget=True),
            Item("b", (10, 1), 0, 0, 10, lambda: weights["b"], keep=5, shared_budget=True),
        ]

    bits = {name: bitmask.pack(mask) for name, mask in kept.items()}
    job = start(folder, 0, 1)
    found = {received.name: received for received in combine(job, 0, items(4), bits)}
    for name, weight in weights.items():
        assert same(found[name].value, torch.where(kept[name], weight, torch.zeros(10)))
    with pytest.raises(ValueError, match="keep 9 weights instead of 12"):
        job.publish(1, items(7), bits)
    with pytest.raises(ValueError, match="keep 9 weights instead of 12"):
        read(job, items(7))


def test_items_of_a_model() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 8),
        nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)),
        nn.LayerNorm(8),
    )
    model[2].bias.requires_grad_(False)
    model.register_buffer("scales", torch.ones(3, dtype=torch.bfloat16))
    made = plan.build(
        model, GaPConfig(method="parallel", sparsity=0.5, partitions=2, phase_steps=1, rounds=1, finetune_steps=1)
    )
    shards = [
        Shard(name, tuple(p.shape), 0, p.numel(), 0, lambda p=p: p, p.requires_grad)
        for name, p in model.named_parameters()
    ]
    items = {item.name: item for item in items_of(made, shards, dict(model.named_buffers()))}
    assert items.keys() == {*dict(model.named_parameters()), *dict(model.named_buffers())} - {"2.bias"}
    assert items["1.0.0.weight"].keep == 32 and items["1.0.0.weight"].partition == 0
    assert items["1.3.0.bias"].keep is None and items["1.3.0.bias"].partition == 1
    assert items["1.3.1.running_mean"].partition == 1
    assert items["1.3.1.num_batches_tracked"].dtype == torch.int64 and items["1.3.1.num_batches_tracked"].shape == ()
    assert items["0.weight"].partition is None and items["scales"].dtype == torch.float32
    model.register_buffer("phases", torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"phases: a buffer of torch.complex64 cannot be exchanged"):
        items_of(made, shards, dict(model.named_buffers()))


# -- any cut of the pieces -----------------------------------------------------------------------------------------


def cut(tensor: Tensor, edges: list[int], rank: int) -> tuple[int, int]:
    """(start, numel) of a rank's piece; edges are points in [0, numel], in order."""
    points = [0, *edges, tensor.numel()]
    return points[rank], points[rank + 1] - points[rank]


@PROPERTY
@given(st.data())
def test_any_cut_writes_the_same_file_and_reads_its_pieces(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    writers, readers = (data.draw(st.integers(1, 3), label=label) for label in ("writers", "readers"))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    full: dict[str, tuple[Tensor, Tensor | None]] = {}
    for i, shape in enumerate(shapes):
        seed = data.draw(st.integers(0, 99))
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(math.prod(shape), generator=random)
        density = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        full[f"{i}.entry"] = (weight, torch.rand(weight.numel(), generator=random) < density)
        full[f"{i}.shared"] = (torch.randn(math.prod(shape), generator=random), None)

    def edges(ranks: int) -> dict[str, list[int]]:
        return {
            name: sorted(data.draw(st.lists(st.integers(0, t.numel()), min_size=ranks - 1, max_size=ranks - 1)))
            for name, (t, _) in full.items()
        }

    def items(where: dict[str, list[int]], rank: int) -> list[Item]:
        made = []
        for i, (name, (tensor, kept)) in enumerate(full.items()):
            lo, n = cut(tensor, where[name], rank)
            keep = None if kept is None else int(kept.sum())
            piece = lambda tensor=tensor, lo=lo, n=n: tensor[lo : lo + n] if n else torch.empty(0)  # noqa: E731
            home = 0 if kept is not None else (None, 0)[i // 2 % 2]
            made.append(Item(name, shapes[i // 2], home, lo, n, piece, keep))
        return made

    def bits(where: dict[str, list[int]], rank: int) -> dict[str, Tensor]:
        return {
            name: bitmask.pack(kept[(p := cut(t, where[name], rank))[0] : p[0] + p[1]])
            for name, (t, kept) in full.items()
            if kept is not None
        }

    def job(rank: Any, where: str) -> Exchange:
        return Exchange(
            ParallelWorker(0, str(folder / where), 60.0, resume=True), 1, SIGNATURE, "abc", "def", rank, rank
        )

    whole = {name: [] for name in full}
    job(Ranks(1).run(lambda rank: rank)[0], "alone").publish(0, items(whole, 0), bits(whole, 0))
    out, back = edges(writers), edges(readers)

    def write(rank: Any) -> int:
        writer = job(rank, "cut")
        writer.publish(0, items(out, rank.rank), bits(out, rank.rank))
        return writer.bytes_written

    sizes = Ranks(writers).run(write)
    files = [(folder / where / "round_0" / "worker_0.safetensors").read_bytes() for where in ("alone", "cut")]
    assert files[0] == files[1]
    assert sizes == [len(files[1])] * writers

    def read(rank: Any) -> dict[str, Received]:
        reader = job(rank, "cut")
        return {r.name: r for r in combine(reader, 0, items(back, rank.rank), bits(back, rank.rank))}

    results = Ranks(readers).run(read)
    for rank, found in enumerate(results):
        assert not isinstance(found, Exception), found
        for name, (tensor, kept) in full.items():
            lo, n = cut(tensor, back[name], rank)
            wanted = tensor if kept is None else torch.where(kept, tensor, torch.zeros(()))
            assert same(found[name].value, wanted[lo : lo + n])
            if kept is not None:
                assert torch.equal(found[name].bits, bitmask.pack(kept[lo : lo + n]))


def test_a_rank_reads_the_bytes_of_its_pieces_alone(tmp_path: Path) -> None:
    weight, kept = torch.randn(800), torch.arange(800) % 4 == 0
    counted: dict[int, list[tuple[int, int]]] = {0: [], 1: []}

    def work(rank: Any) -> None:
        lo = 400 * rank.rank
        item = Item("w", (800, 1), 0, lo, 400, lambda: weight[lo : lo + 400], keep=200)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", rank, rank)
        read = job._folder.read

        def counting(name: str, begin: int, end: int) -> bytes:
            counted[rank.rank].append((begin, end))
            return read(name, begin, end)

        job.publish(0, [item], {"w": bitmask.pack(kept[lo : lo + 400])})
        manifests = job.wait(0)
        job._folder.read = counting
        job.read(0, [item], manifests, lambda _: None)

    assert Ranks(2).run(work) == [None, None]
    size = (tmp_path / "round_0" / "worker_0.safetensors").stat().st_size
    start_of_data = size - 800 - 100
    assert counted[1] == [
        (start_of_data + 800 + 50, start_of_data + 800 + 100),
        (start_of_data + 400, start_of_data + 800),
    ]


# -- errors are raised on all ranks alike --------------------------------------------------------------------------


def test_an_error_on_one_rank_is_the_same_on_all(tmp_path: Path) -> None:
    weight = torch.randn(8)

    def work(rank: Any) -> None:
        lo = 4 * rank.rank
        item = Item("w", (8, 1), 0, lo, 4, lambda: weight[lo : lo + 4], keep=4)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", rank, rank)
        if rank.rank == 1:

            def broken(name: str, begin: int, end: int) -> bytes:
                raise OSError("the disk is gone")

            job._folder.read = broken
        combine(job, 0, [item], {"w": bitmask.pack(torch.tensor([True, False, True, False]))})

    errors = Ranks(2).run(work)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).endswith("worker_0.safetensors: cannot be read (OSError: the disk is gone)")


def test_a_full_disk_on_the_writing_rank_stops_all(tmp_path: Path) -> None:
    def work(rank: Any) -> None:
        item = Item("w", (8, 1), 0, 4 * rank.rank, 4, lambda: torch.ones(4), keep=8)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", rank, rank)
        stream = job._folder.stream

        def full(name: str) -> Any:
            file = stream(name)
            write = file.write
            file.write = lambda data: write(data) if len(data) > 40 else (_ for _ in ()).throw(OSError(28, "full"))
            return file

        job._folder.stream = full
        job.publish(0, [item], {"w": bitmask.pack(torch.ones(4, dtype=torch.bool))})

    errors = Ranks(2).run(work)
    assert [str(error) for error in errors] == ["the exchange folder cannot be used (OSError: [Errno 28] full)"] * 2
    assert list((tmp_path / "round_0").iterdir()) == []


@pytest.mark.parametrize("part", ["values", "mask", "whole"])
def test_a_rank_without_memory_for_its_piece_stops_all(tmp_path: Path, monkeypatch: Any, part: str) -> None:
    """Before they meet to put the tensor together: there the others would wait for a rank that has left."""
    left, unpack = threading.local(), bitmask.unpack

    def unpack_once(bits: Tensor, numel: int) -> Tensor:
        """Once for the values, which come first, and not again for the mask."""
        left.calls = getattr(left, "calls", 2) - 1
        return unpack(bits, numel) if left.calls else torch.empty(1 << 60)

    def work(rank: Any) -> None:
        piece = (lambda: torch.empty(1 << 60)) if rank.rank and part != "mask" else (lambda: torch.ones(4))
        left.calls = 2 if rank.rank and part == "mask" else 1000
        item = Item("w", (8, 1), 0, 4 * rank.rank, 4, piece, None if part == "whole" else 8)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", rank, rank)
        job.publish(0, [item], {"w": bitmask.pack(torch.ones(4, dtype=torch.bool))})

    monkeypatch.setattr(bitmask, "unpack", unpack_once)
    errors = Ranks(2).run(work)
    assert [type(error) for error in errors] == [ValueError, ValueError] and str(errors[0]) == str(errors[1])
    assert "RuntimeError: [enforce fail" in str(errors[0])
    assert list((tmp_path / "round_0").iterdir()) == []


def test_a_second_job_of_one_worker_does_not_publish_what_the_first_has_half_written(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    first, second = (folder.stream("round_0/worker_0.safetensors") for _ in range(2))
    first.write(b"half")
    second.write(b"whole")
    second.close()
    assert (tmp_path / "round_0" / "worker_0.safetensors").read_bytes() == b"whole"
    with pytest.raises(OSError, match="another process has published in the meantime"):
        first.close()
    assert [path.read_bytes() for path in (tmp_path / "round_0").iterdir()] == [b"whole"]


def test_a_manifest_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    job, model = start(str(tmp_path), 0), Model(0)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if ".json." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "full")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="full"):
        job.publish(0, model.items(), model.bits)
    assert os.listdir(tmp_path / "round_0") == ["worker_0.safetensors"]


def test_a_wrong_folder_is_refused_on_all_ranks(tmp_path: Path) -> None:
    start(str(tmp_path), 0)

    def work(rank: Any) -> None:
        Exchange(ParallelWorker(0, str(tmp_path), 60.0), 2, SIGNATURE, "other", "def", rank, rank)

    errors = Ranks(2).run(work)
    assert str(errors[0]) == str(errors[1]) and "plan abc (here other)" in str(errors[0])


def test_groups_that_hold_the_same_pieces_keep_step_with_the_one_that_writes(tmp_path: Path) -> None:
    """HSDP: two groups of one rank each; only the first may put parameters together."""

    class Other(Rank):
        writes = False
        assemble = None

    weight, kept = torch.randn(8), torch.arange(8) < 3

    def work(world: Any) -> list[Received]:
        comm = Rank(Ranks(1), 0) if world.rank == 0 else Other(Ranks(1), 0)
        item = Item("w", (8, 1), 0, 0, 8, lambda: weight, keep=3)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", world, comm)
        found = combine(job, 0, [item], {"w": bitmask.pack(kept)})
        assert job.bytes_written == (tmp_path / "round_0" / "worker_0.safetensors").stat().st_size
        return found

    for (received,) in Ranks(2).run(work):
        assert same(received.value, torch.where(kept, weight, torch.zeros(())))


# -- whose folder --------------------------------------------------------------------------------------------------


def test_the_version_at_the_end_of_the_signature_may_differ(folder: str) -> None:
    start(folder, 0)
    start(folder, 1, signature=SIGNATURE.replace("v:0.1.0", "v:0.2.0"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"signature": SIGNATURE.replace("0.8", "0.9")}, r"another run: s:0\.8 \(here s:0\.9\)\. Give this run"),
        ({"signature": "gap|v:1"}, r"method:parallel \(here nothing\)"),
        ({"fingerprint": "def"}, r"plan abc \(here def\), so the model, the sparsity"),
        ({"fingerprint": "def", "tensors": "x"}, r"another run: plan abc \(here def\), so [^()]* differ\. Give"),
        ({"tensors": "x"}, r"tensors def \(here x\), so a vocabulary, a norm, a bias or a buffer differs"),
        ({"workers": 3}, r"2 workers \(here 3\)"),
        ({"signature": SIGNATURE.replace("|v:", "|shared:first|v:")}, r"nothing \(here shared:first\)"),
        ({"run": "data:b"}, r'run "" \(here "data:b"\), so what the training script'),
    ],
)
def test_a_folder_of_another_run_is_refused(folder: str, change: dict[str, Any], sentence: str) -> None:
    start(folder, 0)
    with pytest.raises(ValueError, match=sentence):
        start(folder, 1, **change)


def test_what_the_training_script_says_of_the_run_must_be_equal(folder: str) -> None:
    start(folder, 0, run="lr:0.1")
    start(folder, 1, run="lr:0.1")
    with pytest.raises(
        ValueError, match=r'another run: run "lr:0.1" \(here "lr:0.2"\), so .*\. Give this run a separate folder'
    ):
        start(folder, 1, run="lr:0.2")
    assert json.loads(raw(folder, "run.json"))["run"] == "lr:0.1"


def test_of_what_the_training_script_says_the_parts_that_differ_are_told(folder: str) -> None:
    start(folder, 0, run="batch:8|lr:0.1|precision:bf16")
    with pytest.raises(ValueError, match=r'run "lr:0.1\|precision:bf16" \(here "lr:0.2\|precision:fp32"\), so what'):
        start(folder, 1, run="batch:8|lr:0.2|precision:fp32")


def test_files_of_another_run_are_refused_where_run_json_was_deleted(tmp_path: Path) -> None:
    publish_all(str(tmp_path))
    (tmp_path / "run.json").unlink()
    job = start(str(tmp_path), 0, fingerprint="def")
    with pytest.raises(ValueError, match=r"round_0/worker_0.json: belongs to another run: plan abc \(here def\)"):
        job.publish(0, Model(0).items(), Model(0).bits)
    with pytest.raises(ValueError, match=r"worker_0.json: belongs to another run"):
        job.wait(0)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r'worker_0.json: belongs to another run: run "" \(here "other"\)'):
        start(str(tmp_path), 0, run="other").wait(0)


def tensors_of(*items: Item) -> str:
    return identity.of_tensors(items)


def test_the_tensors_fingerprint_knows_what_the_plan_does_not() -> None:
    item = Item("embedding", (8, 4), None, 0, 32, lambda: torch.ones(32))
    norm = Item("norm.steps", (), 1, 0, 1, lambda: torch.ones(1))
    same_ones = [item, norm]
    assert tensors_of(*same_ones) == tensors_of(norm, replace(item, start=8, numel=8))
    others = [
        [replace(item, shape=(9, 4)), norm],
        [item, replace(norm, dtype=torch.int64)],
        [item, replace(norm, partition=None)],
        [item, replace(norm, name="norm.count")],
        [item],
        [item, norm, replace(norm, name="x")],
    ]
    assert len({tensors_of(*items) for items in [same_ones, *others]}) == 7


@PROPERTY
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_weights_fingerprint_is_that_of_any_cut(sizes: list[int], ranks: int, random: Any) -> None:
    full = {f"w{i}": torch.randn(n) for i, n in enumerate(sizes)}
    frozen = Shard("frozen", (1,), 0, 1, 0, lambda: torch.rand(1), trainable=False)

    def shards(rank: int, tensors: dict[str, Tensor]) -> list[Shard]:
        found = [frozen]
        for name, tensor in tensors.items():
            lo, n = cut(tensor, edges[name], rank) if ranks > 1 else (0, tensor.numel())
            found.append(Shard(name, tuple(tensor.shape), lo, n, 0, lambda t=tensor, lo=lo, n=n: t[lo : lo + n]))
        return found

    edges = {n: sorted(random.randint(0, t.numel()) for _ in range(ranks - 1)) for n, t in full.items()}
    found = Ranks(ranks).run(lambda rank: identity.of_weights(shards(rank.rank, full), rank))
    whole = [Shard(n, tuple(t.shape), 0, t.numel(), 0, lambda t=t: t) for n, t in full.items()]
    assert found == [identity.of_weights(whole, ALONE)] * ranks
    name = random.choice(sorted(full))
    place = random.randrange(full[name].numel())
    other = full[name].clone()
    other[place] = torch.nextafter(other[place], torch.tensor(9.0))
    changed = [replace(shard, owner=lambda: other) if shard.name == name else shard for shard in whole]
    assert identity.of_weights(changed, ALONE) != found[0]


def test_the_weights_fingerprint_goes_through_a_piece_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1000)
    shard = Shard("w", (1000,), 0, 1000, 0, lambda: weight)
    whole = identity.of_weights([shard], ALONE)
    monkeypatch.setattr(identity, "_CHUNK", 7)
    assert identity.of_weights([shard], ALONE) == whole


def test_all_workers_begin_with_the_same_weights(folder: str) -> None:
    start(folder, 0).begin("these")
    start(folder, 1).begin("these")
    with pytest.raises(ValueError, match=r"start.json: worker 0 began at 20.* with other weights than worker 1 now: "):
        start(folder, 1).begin("others")
    start(folder, 0).begin("these")


def test_a_new_run_in_the_folder_of_another_one_is_refused(folder: str) -> None:
    for job in publish_all(folder):
        job.begin("these")
    told = r"round_0/worker_0.json: worker 0 published round 0 at 20.*, and this job began at step 0\. A new run needs"
    before = raw(folder, "round_0/worker_0.json")
    with pytest.raises(ValueError, match=told):
        start(folder, 0, resume=False).begin("these")
    with pytest.raises(ValueError, match="with other weights than worker 0 now"):
        start(folder, 0).begin("others")
    with pytest.raises(ValueError, match=told):
        start(folder, 0, resume=False).publish(0, Model(0).items(), Model(0).bits)
    assert raw(folder, "round_0/worker_0.json") == before


@pytest.mark.parametrize("published", [False, True])
def test_a_job_that_was_killed_in_its_first_round_joins_again(folder: str, published: bool) -> None:
    jobs = [start(folder, worker, resume=False) for worker in (0, 1)]
    for worker, job in enumerate(jobs):
        job.begin("these")
        if worker or published:
            job.publish(0, Model(worker).items(), Model(worker).bits)
    again = start(folder, 0, resume=published)  # before it has published, it need not be told
    again.begin("these")
    found = take(again)
    assert all(same(found[name].value, wanted) for name, wanted in expected(2).items())


def test_a_folder_without_a_start_is_given_one(folder: str) -> None:
    """Jobs that go on from a checkpoint do not say what their run began with."""
    (job, _) = publish_all(folder)
    job.begin("these")
    assert json.loads(raw(folder, "start.json"))["weights"] == "these"
    system, root = fsspec.core.url_to_fs(folder)
    assert {"run.json", "start.json"} <= {path.rpartition("/")[2] for path in system.ls(root, detail=False)}


def test_whether_a_worker_has_published(folder: str, tmp_path: Path) -> None:
    told = ParallelWorker(0, folder)
    assert not told.has_published()
    jobs = [start(folder, worker) for worker in (0, 1)]
    jobs[1].publish(0, Model(1).items(), Model(1).bits)
    assert not told.has_published() and ParallelWorker(1, folder).has_published()
    (tmp_path / "file").write_text("")
    assert not ParallelWorker(0, str(tmp_path / "file")).has_published()


# -- jobs of a run, each an engine ---------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two blocks, one for each partition, between an embedding and a norm."""

    def __init__(self, vocabulary: int = 5, norm: type[nn.Module] = nn.LayerNorm, counter: torch.dtype = torch.int64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))
        self.norm = norm(6)
        self.register_buffer("counter", torch.ones((), dtype=counter))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.norm(x).square().mean()


PARALLEL = {"method": "parallel", "sparsity": 0.5, "phase_steps": 3, "rounds": 2, "partitions": 2, "finetune_steps": 1}


def engine(folder: Path, worker: int, seed: int = 0, resume: bool = False, **built: Any) -> GaPEngine:
    torch.manual_seed(seed)
    model = Layers(**built)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = ParallelWorker(worker, str(folder), timeout=30.0, resume=resume)
    return GaPEngine(model, PARALLEL, optimizer=optimizer, worker=told)


def train(job: GaPEngine, last: int | None = None) -> GaPEngine:
    """To the step before `last`, or to the end."""
    while not job.finished and job.applied_steps != last:
        random = torch.Generator().manual_seed(10 * job.applied_steps + job.worker.index)
        job.backward(job(torch.randint(5, (4,), generator=random)))
        job.step()
    return job


def both(*jobs: GaPEngine) -> list[dict[str, Tensor]]:
    """What two workers end with that train to their end at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return [dict(job.module.state_dict()) for job in pool.map(train, jobs)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return both(engine(folder, 0), engine(folder, 1))


def equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> bool:
    return all(same(a[name], b[name]) for a, b in zip(found, wanted, strict=True) for name in b)


def test_a_second_run_in_the_same_folder_is_refused_in_its_first_step(tmp_path: Path) -> None:
    both(engine(tmp_path, 0), engine(tmp_path, 1))
    for worker in (0, 1):
        job = engine(tmp_path, worker)
        with pytest.raises(ValueError, match=rf"worker_{worker}.json: worker {worker} published round 0 at 20.*, and "):
            train(job)
        assert job.applied_steps == 0
        for resume in (False, True):  # another initial model is none of this run, whatever is said
            job = engine(tmp_path, worker, seed=1, resume=resume)
            with pytest.raises(ValueError, match="published round 0 at" if not resume else "began at 20.* with other"):
                train(job)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_worker_that_is_killed_before_it_has_published_joins_again(
    tmp_path: Path, undisturbed: list[dict[str, Tensor]], steps: int
) -> None:
    train(engine(tmp_path, 0), last=steps)
    assert equal(both(engine(tmp_path, 0), engine(tmp_path, 1)), undisturbed)


@pytest.mark.parametrize("way", ["told", "checkpoint"])
def test_a_worker_that_is_killed_after_it_has_published_joins_again(
    tmp_path: Path, undisturbed: list[dict[str, Tensor]], way: str
) -> None:
    """Without a checkpoint it must be told that it goes on: from the same weights, it does what it has done."""
    folder, saved = tmp_path / "exchange", tmp_path / "saved"
    first = train(engine(folder, 0), last=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        first.save_checkpoint(saved)
    second = engine(folder, 1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, second)
        train(first, last=3)  # has published round 0, and is lost
        again = engine(folder, 0, seed=0 if way == "told" else 1, resume=way == "told")
        if way == "checkpoint":
            again.load_checkpoint(saved)
        train(again)
        running.result()
    assert equal([dict(job.module.state_dict()) for job in (again, second)], undisturbed)


def test_a_job_can_go_back_to_a_checkpoint_before_a_round_it_has_published(
    tmp_path: Path, undisturbed: list[dict[str, Tensor]]
) -> None:
    jobs = [engine(tmp_path / "exchange", worker) for worker in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(jobs[0], last=2).save_checkpoint(tmp_path / "saved")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, jobs[1])
        train(jobs[0], last=4).load_checkpoint(tmp_path / "saved")
        train(jobs[0])
        running.result()
    assert equal([dict(job.module.state_dict()) for job in jobs], undisturbed)


@pytest.mark.parametrize("built", [{"vocabulary": 7}, {"norm": nn.BatchNorm1d}, {"counter": torch.int32}])
def test_a_model_that_differs_beside_its_entries_is_refused_at_the_start(tmp_path: Path, built: dict[str, Any]) -> None:
    engine(tmp_path, 0)
    with pytest.raises(ValueError, match=r"another run: tensors \w+ \(here \w+\), so a vocabulary, a norm, a bias or"):
        engine(tmp_path, 1, **built)


@pytest.mark.parametrize("started", ["3", "1", "two"])
def test_another_number_of_workers_than_partitions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str
) -> None:
    monkeypatch.setenv("GAP_DS_WORKERS", started)
    with pytest.raises(ValueError) as caught:
        engine(tmp_path, 0)
    assert str(caught.value) == (
        f"GAP_DS_WORKERS={started}: as many workers were started, and there are 2 partitions, one for each worker. "
        'Start 2 (gap-ds parallel --workers 2), or change "partitions".'
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("started", ["2", ""])
def test_as_many_workers_as_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    monkeypatch.setenv("GAP_DS_WORKERS", started)
    engine(tmp_path, 0)
    monkeypatch.setenv("GAP_DS_WORKERS", "5")  # no matter of other methods
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GaPEngine(model, {**PARALLEL, "method": "cyclic"}, optimizer=optimizer)


def test_workers_that_start_together_agree_on_one_record(folder: str) -> None:
    for attempt in range(5):
        results: list[Any] = [None] * 4
        here = f"{folder}/{attempt}"

        def work(i: int, here: str = here, results: list[Any] = results) -> None:
            try:
                results[i] = start(here, i % 2, fingerprint=f"plan {i // 2}")
            except ValueError as error:
                results[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = json.loads(raw(here, "run.json"))["plan"]
        if not folder.startswith("memory"):  # its exclusive creation looks first and writes then
            assert [isinstance(r, Exchange) for r in results] == [f"plan {i // 2}" == won for i in range(4)]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    start(str(tmp_path), 0)
    start(str(tmp_path), 1)
    with pytest.raises(ValueError, match="another run"):
        start(str(tmp_path), 1, fingerprint="def")
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is no JSON table"),
        (b'{"format": "other"}', 'has not the format "gap_ds.exchange"'),
        (b'{"format": "gap_ds.exchange", "version": 1}', "version '1', and this gap_ds reads version 2"),
        (b'{"format": "gap_ds.exchange", "version": 2.0}', "wrong, missing or unknown field version"),
        (b'{"format": "gap_ds.exchange", "version": 2, "version": 2}', "a name comes twice"),
        (b" " * (MAX_JSON + 1), "is longer than"),
    ],
)
def test_a_damaged_record_is_refused(folder: str, content: bytes, sentence: str) -> None:
    start(folder, 0)
    overwrite(folder, "run.json", content)
    with pytest.raises(ValueError, match=sentence):
        start(folder, 1)


def test_every_field_of_a_manifest_is_checked(tmp_path: Path) -> None:
    (job, _) = publish_all(str(tmp_path))
    path = tmp_path / "round_0" / "worker_1.json"
    said = json.loads(path.read_text())
    wrong = {"bytes": "7", "sha256": 7, "round": 1, "worker": 0, "workers": 5, "published": None, "plan": 3, "run": 1}
    wrong |= {"tensors": None}
    for key, value in wrong.items():
        path.write_text(json.dumps(said | {key: value}))
        with pytest.raises(ValueError, match=r"worker_1\.json"):
            job.wait(0)
        path.write_text(json.dumps({k: v for k, v in said.items() if k != key}))
        with pytest.raises(ValueError, match=f"worker_1.json: has a wrong, missing or unknown field {key}"):
            job.wait(0)
    path.write_text(json.dumps(said | {"more": 1}))
    with pytest.raises(ValueError, match="unknown field more"):
        job.wait(0)


@pytest.mark.parametrize(
    ("worker", "sentence"),
    [
        (ParallelWorker(2, "x"), r"worker index=2: must be a whole number from 0 to 1"),
        (ParallelWorker(-1, "x"), r"index=-1"),
        (ParallelWorker(True, "x"), r"index=True"),
        (ParallelWorker("../../etc", "x"), r"index='../../etc'"),  # type: ignore[arg-type]
        (ParallelWorker(0, ""), r"exchange='': must name the folder"),
        (ParallelWorker(0, "x", 0.0), r"timeout=0.0: must be a number of seconds above 0"),
        (ParallelWorker(0, "x", math.inf), r"timeout=inf"),
        (ParallelWorker(0, "x", run=7), r"run='7': must be a text"),  # type: ignore[arg-type]
        (ParallelWorker(0, "x", run="x" * 1001), r"at most 1000 characters, such as a hash"),
        (ParallelWorker(0, "nosuch://x"), r"exchange='nosuch://x': cannot be opened \(ValueError: Protocol not known"),
        (ParallelWorker(0, "nosuch://me:secret@x?sig=secret"), r"exchange='nosuch://x'"),
    ],
)
def test_impossible_workers_are_refused(worker: ParallelWorker, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Exchange(worker, 2, SIGNATURE, "abc", "def", ALONE, ALONE)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("sftp://me:secret@host/run", "sftp://host/run"),
        ("https://me@host/run?sig=secret&x=1", "https://host/run"),
        ("simplecache::https://host/run?sig=secret", "simplecache::https://host/run"),
        ("GET https://a:b@host/run?sig=secret failed (403)", "GET https://host/run failed (403)"),
        ("runs/a@b/what?/exchange", "runs/a@b/what?/exchange"),
    ],
)
def test_what_is_secret_in_a_url_is_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown == ParallelWorker(0, url).shown


def test_an_error_of_a_remote_folder_does_not_tell_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    job = start("memory://secrets/exchange", 0)

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("403 Forbidden: https://host/run.json?sig=secret")

    monkeypatch.setattr(type(job._folder._system), "cat_file", refused)
    with pytest.raises(ValueError, match=r"RuntimeError: 403 Forbidden: https://host/run.json\)") as caught:
        start("memory://secrets/exchange", 1)
    assert "secret)" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used as exchange folder"):
        start(str(tmp_path / "file"), 0)
    with pytest.raises(ValueError, match="cannot be used as exchange folder"):
        start(str(tmp_path / "file" / "below"), 0)


# -- waiting and restarting ----------------------------------------------------------------------------------------


def test_a_missing_worker_is_named(folder: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("gap_ds.parallel.records._PROGRESS", 0.05)
    monkeypatch.setattr("gap_ds.parallel.records._POLL_MOST", 0.02)
    jobs = [start(folder, worker, 4, timeout=0.3) for worker in range(4)]
    for worker in (0, 2):
        model = Model(worker, 4)
        jobs[worker].publish(3, model.items(), model.bits)
    with caplog.at_level(logging.INFO, "gap_ds"), pytest.raises(TimeoutError) as caught:
        jobs[0].wait(3)
    assert str(caught.value).startswith(f"round 3: workers 1, 3 of 4 did not publish in {folder} within 0.3 s. Check ")
    lines = [r.message for r in caplog.records if "waiting" in r.message]
    assert 2 <= len(lines) <= 6 and all(f"round 3: waiting for workers 1, 3, 0 of 0.3 s, {folder}" == m for m in lines)


def test_a_worker_that_comes_late_is_waited_for(folder: str) -> None:
    jobs = [start(folder, worker) for worker in (0, 1)]
    results: list[Any] = [None, None]

    def work(i: int) -> None:
        if i == 1:
            threading.Event().wait(0.3)
        results[i] = take(jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(results[0][name].value, results[1][name].value) for name in expected(2))


def test_the_ranks_meet_while_they_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective that waits for an hour would be ended by the process group."""
    monkeypatch.setattr("gap_ds.parallel.ranks._MEET", 0.02)
    monkeypatch.setattr("gap_ds.parallel.records._POLL_MOST", 0.01)
    meetings = []

    def work(rank: Any) -> None:
        job = Exchange(ParallelWorker(0, str(tmp_path), 0.3), 2, SIGNATURE, "abc", "def", rank, rank)
        from_first = rank.broadcast_object
        rank.broadcast_object = lambda value: (meetings.append(rank.rank), from_first(value))[1]
        job.wait(0)

    errors = Ranks(2).run(work)
    assert [type(error) for error in errors] == [TimeoutError] * 2 and str(errors[0]) == str(errors[1])
    assert meetings.count(0) == meetings.count(1) >= 5


def test_what_is_published_is_not_written_again(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    publish_all(folder)
    before = raw(folder, "round_0/worker_0.safetensors")
    again, other = start(folder, 0), Model(0, seed=7)
    with caplog.at_level(logging.WARNING, "gap_ds"):
        found = {received.name: received for received in combine(again, 0, other.items(), other.bits)}
    assert again.bytes_written == 0 and raw(folder, "round_0/worker_0.safetensors") == before
    assert "round 0: worker 0 has published at 20" in caplog.text
    assert all(same(found[name].value, wanted) for name, wanted in expected(2).items())


def test_a_worker_killed_while_it_wrote_writes_again(folder: str) -> None:
    """Without its manifest a file does not count, whatever is there."""
    jobs = [start(folder, worker) for worker in (0, 1)]
    system, root = fsspec.core.url_to_fs(folder)
    system.makedirs(f"{root}/round_0", exist_ok=True)
    overwrite(folder, "round_0/worker_0.safetensors", b"the beginning")
    left = [f"round_0/worker_0.{name}.0123456789abcdef.partial" for name in ("safetensors", "json")]
    for name in left:
        overwrite(folder, name, b"the beginning")
    for job in jobs:
        model = Model(job.worker.index)
        job.publish(0, model.items(), model.bits)
        assert job.bytes_written > 0
    if not folder.startswith("memory"):  # there, files are written in their place
        assert not any(system.exists(f"{root}/{name}") for name in left)
    assert all(same(take(jobs[1])[name].value, wanted) for name, wanted in expected(2).items())


def test_a_mask_that_is_not_pruned_to_target_is_not_published(folder: str) -> None:
    model, job = Model(0), start(folder, 0)
    model.bits["0.fc1.weight"] = bitmask.pack(torch.ones(21, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"0.fc1.weight: its mask keeps 21 weights instead of 4"):
        job.publish(0, model.items(), model.bits)


def test_names_and_partitions_that_the_file_could_not_hold(folder: str) -> None:
    job = start(folder, 0, 1)
    entry = Item("w", (8, 1), 0, 0, 8, lambda: torch.ones(8), keep=8)
    bias = Item("b", (2,), 0, 0, 2, lambda: torch.ones(2))
    for items, sentence in (
        ([entry, replace(bias, name="w.mask")], "w.mask: two tensors"),
        ([bias, bias], "b: two tensors"),
        ([replace(bias, name="__metadata__")], "__metadata__: two tensors"),
        ([replace(bias, partition=1)], "b: is in partition 1, and there are 1 workers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            job.publish(0, items, {"w": bitmask.pack(torch.ones(8, dtype=torch.bool))})
    # Legal, if unusual: names that look like parts or like paths.
    odd = [replace(bias, name=name) for name in ("b.mask", "b", "b.values", "../../x", "ü\n")]
    assert [received.name for received in combine(job, 0, odd, {})] == [item.name for item in odd]


# -- damaged and hostile files -------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Exchange, Path, Callable[[], list[Received]]]:
    """One worker's folder with a small file in it."""
    weight, kept = torch.arange(1.0, 13.0), torch.arange(12) % 3 == 0
    items = [
        Item("w", (3, 4), 0, 0, 12, lambda: weight, keep=4),
        Item("b", (2,), None, 0, 2, lambda: torch.tensor([0.5, 1.5])),
    ]
    job = start(str(tmp_path), 0, 1)
    job.publish(0, items, {"w": bitmask.pack(kept)})
    return job, tmp_path / "round_0", lambda: read(job, items)


def values_of(received: list[Received]) -> list[list[float]]:
    return [r.value.tolist() for r in received]


def resign(folder: Path, data: bytes) -> None:
    """Writes a file and a manifest that goes with it."""
    (folder / "worker_0.safetensors").write_bytes(data)
    said = json.loads((folder / "worker_0.json").read_text())
    said |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "worker_0.json").write_text(json.dumps(said))


def test_a_file_truncated_anywhere_is_refused(small: Any) -> None:
    _, folder, read = small
    path = folder / "worker_0.safetensors"
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"worker_0.safetensors: has \d+ bytes instead of the \d+ of its manifest"):
            read()
        resign(folder, data[:length])
        with pytest.raises(ValueError, match=r"worker_0.safetensors: .*delete its manifest \(worker_0.json\)"):
            read()
        resign(folder, data)
    assert len(read()) == 2


def test_a_flipped_bit_anywhere_is_refused(small: Any) -> None:
    _, folder, read = small
    path = folder / "worker_0.safetensors"
    data = path.read_bytes()
    for position, bit in itertools.product(range(len(data)), (0, 3, 7)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"worker_0.safetensors: "):
            read()


def test_a_manifest_truncated_anywhere_is_refused(small: Any) -> None:
    _, folder, read = small
    path = folder / "worker_0.json"
    text = path.read_bytes()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match=r"worker_0.json: is no JSON"):
            read()


def test_a_file_that_is_whole_on_the_second_look_is_read(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    job, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    original, seen = job._folder.read, []

    def first_wrong(name: str, begin: int, end: int) -> bytes:
        found = original(name, begin, end)
        if name.endswith(".safetensors") and begin > 8 and not seen:
            seen.append(name)
            return b"\0" * len(found)
        return found

    job._folder.read = first_wrong
    with caplog.at_level(logging.WARNING, "gap_ds"):
        assert len(read()) == 2
    assert "SHA-256" in caplog.text and "reading it once more" in caplog.text and len(data) > 0


def test_a_file_that_vanished_is_refused(small: Any) -> None:
    _, folder, read = small
    (folder / "worker_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"worker_0.safetensors: FileNotFoundError"):
        read()


def forged(data: bytes, change: Callable[[dict[str, Any]], Any], area: bytes | None = None) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (data[8 + length :] if area is None else area)


def sized(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: b"{", "is no JSON"),
        (lambda h: b"[" * 2000, "is no JSON"),
        (lambda h: b'{"a": {}, "a": {}}', "a name comes twice"),
        (lambda h: h.pop("b") and None, "lacks b"),
        (lambda h: h.update(c=h.pop("b")), "lacks b"),
        (
            lambda h: h.update({"../../c": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            "holds ../../c, which",
        ),
        (
            lambda h: h.update({"\ud800\x1b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            r"holds \\ud800\\x1b, which",
        ),
        (
            sized("b", dtype="I32"),
            r'b is {"dtype": "I32", "shape": \[2\], .*} instead of {"dtype": "F32", "shape": \[2\]',
        ),
        (sized("b", dtype=["F32"]), "b is"),
        (sized("b", shape=[1, 2]), "b is"),
        (sized("b", shape=2), "b is"),
        (sized("b", shape=[1 << 64]), "b is"),
        (lambda h: b'{"a": 1' + b"0" * 5000 + b"}", "is no JSON"),
        (sized("b", data_offsets=[0, 1 << 62]), "b is"),
        (sized("b", more=1), "b is"),
        (sized("b", more="\x1b" * 1000), "b is"),
        (lambda h: h.update(b=[]), r"b is \[\] instead of"),
        (sized("w.values", data_offsets=[0, 16]), "w.values is"),
        (lambda h: h["__metadata__"].update(round="1"), '"round": "1".* instead of .*"round": "0"'),
        (lambda h: h["__metadata__"].update(more=1), "__metadata__ is"),
        (lambda h: h.pop("__metadata__") and None, "lacks __metadata__"),
    ],
)
def test_a_forged_header_is_refused(small: Any, change: Any, sentence: str) -> None:
    """With a manifest that goes with the file, so that its checksum is right."""
    _, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    resign(folder, forged(data, change))
    with pytest.raises(ValueError, match=sentence) as caught:
        read()
    str(caught.value).encode()


@pytest.mark.parametrize("area", [b"", b"\0" * 1000])
def test_a_file_with_more_or_fewer_bytes_than_its_header_says_is_refused(small: Any, area: bytes) -> None:
    _, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    resign(folder, forged(data, lambda header: None, area))
    with pytest.raises(ValueError, match=rf"its tensors have 26 bytes, and {len(area)} follow the header"):
        read()


def test_a_huge_header_is_not_read(small: Any) -> None:
    _, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    resign(folder, struct.pack("<Q", 1 << 62) + data[8:])
    with pytest.raises(ValueError, match="does not fit into"):
        read()
    with (folder / "worker_0.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(95_000_000)
    said = json.loads((folder / "worker_0.json").read_text())
    (folder / "worker_0.json").write_text(json.dumps(said | {"bytes": 95_000_000}))
    with pytest.raises(ValueError, match="header of 90000000 bytes is longer than"):
        read()


def test_a_forged_mask_does_not_move_weights(small: Any) -> None:
    """A mask with another number of bits than there are values, under a right checksum."""
    _, folder, read = small
    data = bytearray((folder / "worker_0.safetensors").read_bytes())
    data[-2] ^= 1 << 1
    resign(folder, bytes(data))
    with pytest.raises(ValueError, match="the mask of w keeps 5 weights, and there are 4"):
        read()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["worker_0.safetensors", "worker_0.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_regular_file_is_refused(small: Any, name: str, kind: str, tmp_path: Path) -> None:
    """A named pipe would be waited for without end; a link may lead to a device."""
    _, folder, read = small
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name}: is (no regular file|a link)"):
        read()


def test_links_do_not_lead_writes_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "exchange", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    job, model = start(str(inside), 0), Model(0)
    (inside / "round_0").symlink_to(outside)
    with pytest.raises(ValueError, match="round_0 is a link, and must be a folder"):
        job.publish(0, model.items(), model.bits)
    assert os.listdir(outside) == ["precious"]
    (inside / "round_1").mkdir()
    for name in ("worker_0.safetensors.a.partial", "worker_0.json.b.partial", "worker_0.safetensors"):
        (inside / "round_1" / name).symlink_to(outside / "precious")
    job.publish(1, model.items(), model.bits)
    assert (outside / "precious").read_text() == "precious"
    assert not (inside / "round_1" / "worker_0.safetensors").is_symlink()


ENTRIES = [Item(name, (3, 3), 0, 0, 9, torch.Tensor, keep=4, shared_budget=True) for name in "ab"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@PROPERTY
@given(st.binary(max_size=200), st.integers(0, 64))
def test_anything_but_a_header_is_a_value_error(text: bytes, area: int) -> None:
    with pytest.raises(ValueError):
        file.accept(text, area, ENTRIES, {})
    with contextlib.suppress(ValueError):
        tensorfile.header_length(text[:8], area, area)


@PROPERTY
@given(st.dictionaries(st.sampled_from(["a.values", "b.values", "a.mask", "__metadata__"]), JSON, min_size=1))
def test_a_header_with_any_other_part_is_a_value_error(changes: dict[str, Any]) -> None:
    good = file.header(file.layout(ENTRIES, {"a": 4, "b": 4}), {})
    if good | changes != good:
        with pytest.raises(ValueError):
            file.accept(json.dumps(good | changes).encode(), 36, ENTRIES, {})


@PROPERTY
@given(st.integers(-2, 12) | st.booleans(), st.integers(-2, 12))
def test_shared_budgets_that_a_header_may_say(first: Any, second: int) -> None:
    slots = file.layout(ENTRIES, {"a": first, "b": second})
    text, area = json.dumps(file.header(slots, {})).encode(), slots[-1].end
    if first + second == 8 and max(first, second) <= 9 and min(first, second) >= 0:
        assert file.accept(text, area, ENTRIES, {}) == slots
    else:
        with pytest.raises(ValueError):
            file.accept(text, area, ENTRIES, {})


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.booleans()), max_size=5))
def test_our_own_headers_are_accepted(shapes: list[tuple[int, int, bool]]) -> None:
    items = [
        Item(f"t{i}", (a, b), 0, 0, a * b, torch.Tensor, keep=a * b // 2 if entry else None)
        for i, (a, b, entry) in enumerate(shapes)
    ]
    slots = file.layout(items, file.budgets(items))
    data = tensorfile.header_bytes(file.header(slots, {"a": "b"}))
    ends = [0, *(slot.end for slot in slots)]
    assert tensorfile.header_length(data[:8], len(data) + ends[-1], len(data)) == len(data) - 8 and len(data) % 8 == 0
    assert file.accept(data[8:], ends[-1], items, {"a": "b"}) == slots
    assert [slot.begin for slot in slots] == ends[:-1]
    for slot in slots:
        assert (
            slot.begin % slot.dtype.itemsize == 0
            and slot.end - slot.begin == math.prod(slot.shape) * slot.dtype.itemsize
        )


@pytest.mark.parametrize("dtype", file.DTYPES)
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 2], [3, 0, 1]]).to(dtype)
    assert same(tensorfile.decode(tensorfile.encode(values).tobytes(), dtype), values)
    assert tensorfile.decode(tensorfile.encode(torch.empty(0, dtype=dtype)).tobytes(), dtype).dtype == dtype
