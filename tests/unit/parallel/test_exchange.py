"""The exchange: exact sizes and values, any cut of the pieces, errors on all ranks, published files."""

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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from exchanging import (
    PROPERTY,
    SIGNATURE,
    Model,
    combine,
    expected,
    overwrite,
    publish_all,
    raw,
    read,
    same,
    start,
    take,
)
from fake_meshes import cuts_of
from fake_ranks import Rank, Ranks, item_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.parallel import Exchange, Item, ParallelWorker, Received
from gap_ds.parallel.transport import open_folder
from gap_ds.sharding.shard import Shard


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
        manifest = json.loads((tmp_path / "round_0" / f"worker_{worker}.json").read_text())
        assert manifest["bytes"] == size and manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (manifest["round"], manifest["worker"], manifest["plan"], manifest["workers"]) == (0, worker, "abc", 2)
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
    items = [item_of("shared", (1000,), None, 0, 1000, lambda: value)]
    jobs = [start(folder, worker, 3) for worker in range(3)]
    for job in jobs:
        job.publish(0, items, {})
    (received,) = combine(jobs[1], 0, items, {})
    assert same(received.value, value)


def test_kept_values_do_not_change_in_any_bit(folder: str) -> None:
    weight = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -3.0, 5.0])
    kept = torch.tensor([True] * 6 + [False, False])
    items = [item_of("w", (2, 4), 0, 0, 8, lambda: weight, keep=6)]
    job = start(folder, 0, 1)
    (received,) = combine(job, 0, items, {"w": bitmask.pack(kept)})
    assert same(received.value[:6], weight[:6]) and same(received.value[6:], torch.zeros(2))


def test_pooled_budgets_are_those_of_the_file(folder: str) -> None:
    """With one threshold for a partition, an entry keeps any number of weights, and their sum is fixed."""
    weights = {"a": torch.randn(10), "b": torch.randn(10)}
    kept = {"a": torch.arange(10) < 9, "b": torch.zeros(10, dtype=torch.bool)}

    def items(first: int) -> list[Item]:
        return [
            item_of("a", (10, 1), 0, 0, 10, lambda: weights["a"], keep=first, shared_budget=True),
            item_of("b", (10, 1), 0, 0, 10, lambda: weights["b"], keep=5, shared_budget=True),
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


@PROPERTY
@given(st.data())
def test_any_cut_writes_the_same_file_and_reads_its_pieces(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    writers, readers = (data.draw(st.integers(1, 4), label=label) for label in ("writers", "readers"))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    full: dict[str, tuple[Tensor, Tensor | None]] = {}
    for i, shape in enumerate(shapes):
        seed = data.draw(st.integers(0, 99))
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(math.prod(shape), generator=random)
        density = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        full[f"{i}.entry"] = (weight, torch.rand(weight.numel(), generator=random) < density)
        full[f"{i}.shared"] = (torch.randn(math.prod(shape), generator=random), None)

    def cuts(ranks: int) -> dict[str, list[Box]]:
        return {name: data.draw(cuts_of(shapes[i // 2], ranks)) for i, name in enumerate(full)}

    def items(where: dict[str, list[Box]], rank: int) -> list[Item]:
        made = []
        for i, (name, (tensor, kept)) in enumerate(full.items()):
            box = where[name][rank]
            shard = Shard(name, shapes[i // 2], box, 0, partial(box.cut, tensor))
            home = 0 if kept is not None else (None, 0)[i // 2 % 2]
            made.append(Item(shard, home, None if kept is None else int(kept.sum())))
        return made

    def bits(where: dict[str, list[Box]], rank: int) -> dict[str, Tensor]:
        return {name: bitmask.pack(where[name][rank].cut(kept)) for name, (_, kept) in full.items() if kept is not None}

    def job(rank: Any, where: str) -> Exchange:
        return Exchange(
            ParallelWorker(0, str(folder / where), 60.0, resume=True), 1, SIGNATURE, "abc", "def", rank, rank
        )

    whole = {name: [Box.span(0, len(t), len(t))] for name, (t, _) in full.items()}
    job(Ranks(1).run(lambda rank: rank)[0], "alone").publish(0, items(whole, 0), bits(whole, 0))
    out, back = cuts(writers), cuts(readers)

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
            box = back[name][rank]
            wanted = tensor if kept is None else torch.where(kept, tensor, torch.zeros(()))
            assert same(found[name].value, box.cut(wanted))
            if kept is not None:
                assert torch.equal(found[name].bits, bitmask.pack(box.cut(kept)))


def test_a_rank_reads_the_bytes_of_its_pieces_alone(tmp_path: Path) -> None:
    weight, kept = torch.randn(800), torch.arange(800) % 4 == 0
    counted: dict[int, list[tuple[int, int]]] = {0: [], 1: []}

    def work(rank: Any) -> None:
        lo = 400 * rank.rank
        item = item_of("w", (800, 1), 0, lo, 400, lambda: weight[lo : lo + 400], keep=200)
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


def test_an_error_on_one_rank_is_the_same_on_all(tmp_path: Path) -> None:
    weight = torch.randn(8)

    def work(rank: Any) -> None:
        lo = 4 * rank.rank
        item = item_of("w", (8, 1), 0, lo, 4, lambda: weight[lo : lo + 4], keep=4)
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
        item = item_of("w", (8, 1), 0, 4 * rank.rank, 4, lambda: torch.ones(4), keep=8)
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
        item = item_of("w", (8, 1), 0, 4 * rank.rank, 4, piece, None if part == "whole" else 8)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", rank, rank)
        job.publish(0, [item], {"w": bitmask.pack(torch.ones(4, dtype=torch.bool))})

    monkeypatch.setattr(bitmask, "unpack", unpack_once)
    errors = Ranks(2).run(work)
    assert [type(error) for error in errors] == [ValueError, ValueError] and str(errors[0]) == str(errors[1])
    assert "RuntimeError: [enforce fail" in str(errors[0])
    assert list((tmp_path / "round_0").iterdir()) == []


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
        item = item_of("w", (8, 1), 0, 0, 8, lambda: weight, keep=3)
        job = Exchange(ParallelWorker(0, str(tmp_path), 60.0), 1, SIGNATURE, "abc", "def", world, comm)
        found = combine(job, 0, [item], {"w": bitmask.pack(kept)})
        assert job.bytes_written == (tmp_path / "round_0" / "worker_0.safetensors").stat().st_size
        return found

    for (received,) in Ranks(2).run(work):
        assert same(received.value, torch.where(kept, weight, torch.zeros(())))


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


class Killed(BaseException):
    pass


class Dying:
    """A folder, or a file in it, of a process that is killed at one access; half of what it then writes arrives."""

    def __init__(self, inner: Any, left: list[int]) -> None:
        self.inner, self.left = inner, left

    def __getattr__(self, name: str) -> Any:
        def access(*arguments: Any) -> Any:
            self.left[0] -= 1
            if self.left[0] == 0 and name == "write":
                self.inner.write(arguments[0][: len(arguments[0]) // 2])
            if self.left[0] <= 0:  # and a dead process accesses nothing more
                raise Killed
            found = getattr(self.inner, name)(*arguments)
            return Dying(found, self.left) if name == "stream" else found

        return access


def test_a_worker_killed_at_any_access_of_the_folder_joins_again(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, opened = expected(2), []

    def publish(where: str, worker: int, resume: bool) -> Exchange:
        job, model = start(where, worker, resume=resume), Model(worker)
        job.begin("these")
        job.publish(0, model.items(), model.bits)
        return job

    def dying(left: list[int], url: str) -> Any:
        return Dying(open_folder(url), left)

    for moment in itertools.count(1):
        where, before = f"{folder}/{moment}", [moment]
        with monkeypatch.context() as patch:
            patch.setattr(
                "gap_ds.parallel.exchange.open_folder", lambda url, left=before: Dying(open_folder(url), left)
            )
            try:
                publish(where, 0, resume=False)
            except Killed as killed:
                opened.append(killed)  # keeps what it had open from being tidied up
        jobs = [publish(where, 0, resume=True), publish(where, 1, resume=False)]
        for job in jobs:
            found = {received.name: received.value for received in read(job, Model(job.worker.index).items())}
            assert all(same(found[name], value) for name, value in wanted.items()), moment
        if before[0] > 0:
            break
    assert moment > 15  # two records with their reads, the tensors of a file, its end, a manifest


def test_a_mask_that_is_not_pruned_to_target_is_not_published(folder: str) -> None:
    model, job = Model(0), start(folder, 0)
    model.bits["0.fc1.weight"] = bitmask.pack(torch.ones(21, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"0.fc1.weight: its mask keeps 21 weights instead of 4"):
        job.publish(0, model.items(), model.bits)
