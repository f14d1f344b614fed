"""Files of masks and of pruned weights' values: written and read for any sharding, and damage that is noticed."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_meshes import cuts_of
from fake_ranks import Ranks
from folders import replace_header
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gap_ds import checkpoint
from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.method.plan import Entry, Plan
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard

DATA = Path(__file__).resolve().parents[2] / "data"
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)


def no_owner() -> Tensor:
    raise AssertionError("masks are written and read without touching a weight")


def piece(entry: Entry, start: int, numel: int) -> Shard:
    return Shard.of_range(entry.name, entry.shape, start, numel, 0, no_owner)


def plan_of(full: dict[str, Tensor], shapes: dict[str, tuple[int, ...]] | None = None) -> Plan:
    entries = [
        Entry(name, (shapes or {}).get(name, (mask.numel(), 1)), 0, int(mask.sum())) for name, mask in full.items()
    ]
    return Plan(tuple(entries), 1, sum(entry.numel for entry in entries), 0)


def whole_shards(plan: Plan) -> dict[str, Shard]:
    return {entry.name: piece(entry, 0, entry.numel) for entry in plan.entries}


def write(path: Path, plan: Plan, full: dict[str, Tensor]) -> None:
    bits = {name: bitmask.pack(mask) for name, mask in full.items()}
    checkpoint.write_masks(path, plan, whole_shards(plan), bits, Comm(single=True))


def read(path: Path, plan: Plan, sparse: set[str]) -> dict[str, list[bool]]:
    found = checkpoint.read_masks(path, plan, sparse, whole_shards(plan), Comm(single=True))
    return {
        entry.name: bitmask.unpack(found[entry.name], entry.numel).tolist()
        for entry in plan.entries
        if entry.name in found
    }


FULL = {"a.weight": torch.arange(15) % 4 == 0, "b.weight": torch.arange(16) % 8 == 0}
PLAN = plan_of(FULL, {"a.weight": (3, 5), "b.weight": (4, 4)})
NAMES = set(FULL)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "masks.safetensors"
    write(path, PLAN, FULL)
    return path


# -- masks ---------------------------------------------------------------------------------------------------------


def test_the_file_is_a_safetensors_file_of_bits(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        assert json.loads(metadata.pop("kept")) == {"a.weight": 4, "b.weight": 2}
        assert metadata == {"format": "gap_ds.masks", "version": "2", "plan": PLAN.fingerprint}
        assert set(opened.keys()) == NAMES
        for name, mask in FULL.items():
            stored = opened.get_tensor(name).numpy()
            expected = np.packbits(mask.numpy(), bitorder="little")
            assert stored.dtype == np.uint8 and stored.tolist() == expected.tolist()
    assert read(file, PLAN, NAMES) == {name: mask.tolist() for name, mask in FULL.items()}


def test_dense_entries_are_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    bits = {"b.weight": bitmask.pack(FULL["b.weight"])}
    checkpoint.write_masks(path, PLAN, whole_shards(PLAN), bits, Comm(single=True))
    assert read(path, PLAN, {"b.weight"}) == {"b.weight": FULL["b.weight"].tolist()}
    checkpoint.write_masks(path, PLAN, whole_shards(PLAN), {}, Comm(single=True))
    assert read(path, PLAN, set()) == {}


def cut(data: st.DataObject, n: int, ranks: int) -> list[tuple[int, int]]:
    edges = [0, *sorted(data.draw(st.integers(0, n)) for _ in range(ranks - 1)), n]
    pieces = [(lo, hi - lo) for lo, hi in itertools.pairwise(edges)]
    return [(start if numel else data.draw(st.sampled_from([0, start])), numel) for start, numel in pieces]


@PROPERTY
@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_written_by_some_ranks_and_read_by_others(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], writers: int, data: st.DataObject
) -> None:
    """Ranges of flattened weights, and boxes of meshes."""
    full = {
        f"w{i}": torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        for i, n in enumerate(map(math.prod, shapes))
    }
    plan = plan_of(full, {f"w{i}": shape for i, shape in enumerate(shapes)})
    folder = tmp_path_factory.mktemp("masks")
    sharded, alone = folder / "sharded", folder / "alone"
    write(alone, plan, full)

    def cuts_over(ranks: int) -> dict[str, list[Box]]:
        return {entry.name: data.draw(cuts_of(entry.shape, ranks)) for entry in plan.entries}

    def shards(rank: int, cuts: dict[str, list[Box]]) -> dict[str, Shard]:
        return {
            entry.name: Shard(entry.name, entry.shape, cuts[entry.name][rank], 0, no_owner) for entry in plan.entries
        }

    def bits(rank: int, cuts: dict[str, list[Box]]) -> dict[str, Tensor]:
        return {name: bitmask.pack(boxes[rank].cut(full[name])) for name, boxes in cuts.items()}

    cuts = cuts_over(writers)
    errors = Ranks(writers).run(
        lambda rank: checkpoint.write_masks(sharded, plan, shards(rank.rank, cuts), bits(rank.rank, cuts), rank)
    )
    assert errors == [None] * writers
    assert sharded.read_bytes() == alone.read_bytes()

    readers = data.draw(st.integers(1, 4))
    others = cuts_over(readers)
    found = Ranks(readers).run(
        lambda rank: checkpoint.read_masks(sharded, plan, set(full), shards(rank.rank, others), rank)
    )
    for rank, result in enumerate(found):
        assert not isinstance(result, Exception), result
        assert {name: b.tolist() for name, b in result.items()} == {
            name: b.tolist() for name, b in bits(rank, others).items()
        }


def halves(rank: int) -> dict[str, Shard]:
    """The first 8 weights of each entry on rank 0, the rest on rank 1."""
    return {entry.name: piece(entry, 8 * rank, entry.numel - 8 if rank else 8) for entry in PLAN.entries}


def test_a_mask_with_another_count_is_refused_on_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    write(path, PLAN, FULL | {"b.weight": torch.arange(16) % 8 == 1})  # other bits, and as many
    for result in Ranks(2).run(lambda r: checkpoint.read_masks(path, PLAN, NAMES, halves(r.rank), r)):
        assert not isinstance(result, Exception), result
    content = path.read_bytes()
    assert content.endswith(bytes([0b10, 0b10]))  # the mask of b.weight is the last of the file
    for damaged in ([0b10, 0b111], [0b1011, 0b10]):  # on either rank's side of it: 4 weights instead of 2
        path.write_bytes(content[:-2] + bytes(damaged))
        for result in Ranks(2).run(lambda r: checkpoint.read_masks(path, PLAN, NAMES, halves(r.rank), r)):
            assert isinstance(result, ValueError)
            assert str(result) == f"{path}: the mask of b.weight keeps 4 weights instead of 2: it is damaged"


def test_inside_a_ramp_a_mask_keeps_more_than_its_budget(tmp_path: Path) -> None:
    """The header counts what is written, whatever the plan's budgets say of the end."""
    path = tmp_path / "masks.safetensors"
    full = FULL | {"b.weight": torch.arange(16) % 2 == 0}
    for rank in Ranks(2).run(
        lambda r: checkpoint.write_masks(
            path,
            PLAN,
            halves(r.rank),
            {name: bitmask.pack(mask[8:] if r.rank else mask[:8]) for name, mask in full.items()},
            r,
        )
    ):
        assert rank is None
    with safe_open(path, framework="pt") as opened:
        assert json.loads(opened.metadata()["kept"]) == {"a.weight": 4, "b.weight": 8}
    assert read(path, PLAN, NAMES) == {name: mask.tolist() for name, mask in full.items()}


KEPT = "header does not record how many weights each mask keeps: it is damaged"


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, KEPT),
        ("", KEPT),
        ("4, 2", KEPT),
        ("[4, 2]", KEPT),
        ("null", KEPT),
        ('{"a.weight": null, "b.weight": 2}', KEPT),
        ('{"a.weight": "four", "b.weight": 2}', KEPT),
        ('{"a.weight": NaN, "b.weight": 2}', KEPT),
        ('{"a.weight": Infinity, "b.weight": 2}', KEPT),
        ('{"a.weight": 4}', "the mask of b.weight keeps 2 weights instead of None: it is damaged"),
        ('{"a.weight": 4, "b.weight": 3}', "the mask of b.weight keeps 2 weights instead of 3: it is damaged"),
        ('{"a.weight": -4, "b.weight": 2}', "the mask of a.weight keeps 4 weights instead of -4: it is damaged"),
    ],
)
def test_counts_in_the_header(file: Path, kept: str | None, message: str) -> None:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"].pop("kept")
        if kept is not None:
            header["__metadata__"]["kept"] = kept

    replace_header(file, change)
    with pytest.raises(ValueError) as error:
        read(file, PLAN, NAMES)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)


# -- damage --------------------------------------------------------------------------------------------------------


def test_truncated_anywhere(file: Path) -> None:
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            read(file, PLAN, NAMES)
    file.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        read(file, PLAN, NAMES)


def test_every_bit_flipped(file: Path) -> None:
    """A flipped bit is refused, unless it does not matter: one beyond the end of a mask."""
    content, expected, unharmed = file.read_bytes(), read(file, PLAN, NAMES), 0
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        file.write_bytes(bytes(damaged))
        try:
            assert read(file, PLAN, NAMES) == expected
            unharmed += 1
        except ValueError as error:
            assert str(file) in str(error)
    assert unharmed == 1  # bit 15 of the 15 weights of a.weight


def test_random_damage(file: Path) -> None:
    content, rng = file.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(2, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            kept = read(file, PLAN, NAMES)
        except ValueError:
            continue
        assert {name: sum(mask) for name, mask in kept.items()} == {e.name: e.keep for e in PLAN.entries}


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        read(tmp_path / "masks.safetensors", PLAN, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), r"no file of the kind gap_ds\.masks$"),
        (lambda header: header["__metadata__"].update(format="pt"), r"no file of the kind gap_ds\.masks$"),
        (
            lambda header: header["__metadata__"].update(format="gap_ds.pruned"),
            r"no file of the kind gap_ds\.masks$",
        ),
        (
            lambda header: header["__metadata__"].update(version="1"),
            r"gap_ds\.masks of version 1; this version of gap_ds reads version 2$",
        ),
        (lambda header: header["__metadata__"].update(version="3"), r"gap_ds\.masks of version 3; .* reads version 2$"),
        (lambda header: header["__metadata__"].pop("version"), r"gap_ds\.masks of version None; .* reads version 2$"),
        (lambda header: header["__metadata__"].update(plan="0" * 16), "was written for another plan"),
        (lambda header: header["a.weight"].update(dtype="I8"), "mask of a.weight does not have the size of its entry"),
        (lambda header: header["b.weight"].update(shape=[1, 2]), "mask of b.weight does not have the size"),
        (lambda header: header.update(c=header.pop("b.weight")), "holds an entry that .* or lacks one: b.weight"),
    ],
)
def test_another_header(file: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    replace_header(file, change)
    with pytest.raises(ValueError, match=message):
        read(file, PLAN, NAMES)


def test_another_plan_and_another_phase(file: Path) -> None:
    other = Plan(tuple(Entry(e.name, e.shape, 0, e.keep + 1) for e in PLAN.entries), 1, 31, 0)
    with pytest.raises(ValueError, match=f"another plan .{PLAN.fingerprint}, now {other.fingerprint}"):
        read(file, other, NAMES)
    with pytest.raises(ValueError, match=r"holds an entry that is dense by the schedule, or lacks one: a\.weight"):
        read(file, PLAN, {"b.weight"})


# -- values that pruned weights had --------------------------------------------------------------------------------

VALUES = {
    "a.weight": torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 2.0**-149, *range(8)]),
    "b.weight": torch.arange(16) / 3,
}


def read_values(path: Path, plan: Plan = PLAN, sparse: set[str] = NAMES) -> dict[str, Tensor]:
    return dict(checkpoint.read_values(path, plan, sparse, whole_shards(plan)))


def write_values(path: Path, plan: Plan, values: dict[str, Tensor]) -> None:
    checkpoint.write_values(path, plan, whole_shards(plan), set(values), values.__getitem__, Comm(single=True))


def words(tensor: Tensor) -> list[int]:
    """The bits of fp32 values: NaN and the sign of zero count."""
    assert tensor.dtype == torch.float32
    return tensor.contiguous().view(torch.int32).tolist()


@pytest.fixture
def values(tmp_path: Path) -> Path:
    path = tmp_path / "pruned.safetensors"
    write_values(path, PLAN, VALUES)
    return path


def test_the_file_of_values_is_a_safetensors_file(values: Path) -> None:
    with safe_open(values, framework="pt") as opened:
        assert opened.metadata() == {"format": "gap_ds.pruned", "version": "2", "plan": PLAN.fingerprint}
        assert {name: words(opened.get_tensor(name)) for name in opened.keys()} == {  # noqa: SIM118
            name: words(tensor) for name, tensor in VALUES.items()
        }
    found = read_values(values)
    assert {name: words(tensor) for name, tensor in found.items()} == {n: words(t) for n, t in VALUES.items()}


def test_values_of_sparse_entries_alone(tmp_path: Path) -> None:
    path, one = tmp_path / "pruned.safetensors", {"b.weight": VALUES["b.weight"].bfloat16()}
    write_values(path, PLAN, one)
    found = read_values(path, sparse={"b.weight"})
    assert found.keys() == one.keys() and words(found["b.weight"]) == words(one["b.weight"].float())
    with pytest.raises(ValueError, match=r"holds an entry that is dense by the schedule, or lacks one: a\.weight"):
        read_values(path)
    write_values(path, PLAN, {})
    assert read_values(path, sparse=set()) == {}


@PROPERTY
@given(
    st.lists(st.lists(st.floats(width=32), min_size=1, max_size=30), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.data(),
)
def test_values_written_by_some_ranks_and_read_by_others(
    tmp_path_factory: pytest.TempPathFactory, lists: list[list[float]], writers: int, readers: int, data: st.DataObject
) -> None:
    full = {f"w{i}": torch.tensor(numbers, dtype=torch.float32) for i, numbers in enumerate(lists)}
    plan = plan_of({name: torch.ones(len(tensor), dtype=torch.bool) for name, tensor in full.items()})
    folder = tmp_path_factory.mktemp("values")
    sharded, alone = folder / "sharded", folder / "alone"
    write_values(alone, plan, full)

    def shards(rank: int, cuts: dict[str, list[tuple[int, int]]]) -> dict[str, Shard]:
        return {entry.name: piece(entry, *cuts[entry.name][rank]) for entry in plan.entries}

    def parts(rank: int, cuts: dict[str, list[tuple[int, int]]]) -> dict[str, Tensor]:
        return {name: full[name][lo : lo + n] for name, pieces in cuts.items() for lo, n in [pieces[rank]]}

    cuts = {name: cut(data, tensor.numel(), writers) for name, tensor in full.items()}
    errors = Ranks(writers).run(
        lambda rank: checkpoint.write_values(
            sharded, plan, shards(rank.rank, cuts), set(full), parts(rank.rank, cuts).__getitem__, rank
        )
    )
    assert errors == [None] * writers
    assert sharded.read_bytes() == alone.read_bytes()

    others = {name: cut(data, tensor.numel(), readers) for name, tensor in full.items()}
    found = Ranks(readers).run(
        lambda rank: dict(checkpoint.read_values(sharded, plan, set(full), shards(rank.rank, others)))
    )
    for rank, result in enumerate(found):
        assert not isinstance(result, Exception), result
        expected = parts(rank, others)
        assert {name: words(tensor) for name, tensor in result.items()} == {n: words(t) for n, t in expected.items()}


def test_truncated_values(values: Path) -> None:
    content = values.read_bytes()
    for length in range(len(content)):
        values.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"pruned\.safetensors: the file is truncated or damaged"):
            read_values(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header: header["__metadata__"].update(format="gap_ds.masks"),
            r"no file of the kind gap_ds\.pruned$",
        ),
        (lambda header: header["__metadata__"].update(version="1"), r"gap_ds\.pruned of version 1; .* version 2$"),
        (lambda header: header["__metadata__"].update(plan="0" * 16), "was written for another plan"),
        (lambda header: header["a.weight"].update(dtype="I32"), "values of a.weight do not have the size of their"),
        (lambda header: header["b.weight"].update(shape=[4, 4]), "values of b.weight do not have the size of their"),
        (lambda header: header.update(c=header.pop("b.weight")), "holds an entry that .* or lacks one: b.weight"),
    ],
)
def test_another_header_of_values(values: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    replace_header(values, change)
    with pytest.raises(ValueError, match=message):
        read_values(values)


def test_masks_are_not_values_and_values_are_not_masks(file: Path, values: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file of the kind gap_ds\.pruned"):
        read_values(file)
    with pytest.raises(ValueError, match=r"is no file of the kind gap_ds\.masks"):
        read(values, PLAN, NAMES)


# -- files of earlier versions -----------------------------------------------------------------------------------------


def test_masks_of_version_2_without_metadata_of_the_run_are_read() -> None:
    assert read(DATA / "masks_version_2.safetensors", PLAN, NAMES) == {n: mask.tolist() for n, mask in FULL.items()}


def make_sample() -> None:
    """How the sample was made: the masks of FULL."""
    bits = {name: bitmask.pack(mask) for name, mask in FULL.items()}
    kept = json.dumps({name: int(mask.sum()) for name, mask in FULL.items()})
    metadata = {"format": "gap_ds.masks", "version": "2", "plan": PLAN.fingerprint, "kept": kept}
    save_file(bits, DATA / "masks_version_2.safetensors", metadata)
