"""The tensors of an exchange, and the header of a file: ours is accepted, any other is a ValueError."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanging import PROPERTY, SIGNATURE, combine, same, start
from fake_ranks import Ranks, item_of, renamed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gap_ds.masks import bitmask
from gap_ds.masks.box import Box
from gap_ds.method import plan
from gap_ds.method.config import GaPConfig
from gap_ds.parallel import Exchange, ParallelWorker, items, items_of
from gap_ds.sharding.shard import Shard
from gap_ds.storage import safetensors


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
        Shard.of_range(name, tuple(p.shape), 0, p.numel(), 0, lambda p=p: p, p.requires_grad)
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


def test_groups_of_experts_come_from_their_workers(tmp_path: Path) -> None:
    """Of a tensor of experts each worker publishes its rows, whatever boxes the ranks have of it."""

    def block() -> nn.Module:
        experts = nn.Module()
        experts.up = nn.Parameter(torch.ones(4, 8, 8))
        return nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False), "experts": experts})

    config = {"method": "parallel", "sparsity": 0.5, "partitions": 4, "phase_steps": 1, "rounds": 1}
    made = plan.build(nn.ModuleList([block(), block()]), GaPConfig.load(config | {"finetune_steps": 1}))
    leaves = {"experts.up": (4, 8, 8), "fc.weight": (8, 8)}
    shapes = {f"{i}.{leaf}": shape for i in range(2) for leaf, shape in leaves.items()}
    cut = {entry.name: entry.partition for entry in made.entries}
    assert len(set(cut.values())) == 4 and any("[" in name for name in cut)

    def weights(worker: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(worker)
        found = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        for entry in made.entries:
            rows(found, entry.name)[rows(found, entry.name).abs() < 0.6] = 0.0
        return found

    def shards_of(found: dict[str, torch.Tensor], rank: int) -> list[Shard]:
        boxes = {n: Box.of(s, (0, 4 * rank, 0)[-len(s) :], (4, 4, 8)[-len(s) :]) for n, s in shapes.items()}
        boxes |= {n: Box.of(s, (4 * rank, 0), (4, 8)) for n, s in shapes.items() if len(s) == 2}
        pieces = {name: boxes[name].cut(found[name].flatten()).clone() for name in shapes}
        return [Shard(n, s, boxes[n], 0, partial(pieces.__getitem__, n)) for n, s in shapes.items()]

    def rows(found: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        parameter, _, part = name.rstrip("]").partition("[")
        return found[parameter][slice(*map(int, part.split(":")))] if part else found[parameter]

    def items_and_bits(worker: int, rank: int) -> tuple[Any, Any]:
        found = weights(worker)
        kept = {e.name: int(rows(found, e.name).count_nonzero()) for e in made.entries}
        entries = tuple(replace(e, keep=kept[e.name]) for e in made.entries)
        own = items_of(replace(made, entries=entries), shards_of(found, rank), {})
        return own, {item.name: bitmask.pack(item.shard.weight() != 0) for item in own if item.partition == worker}

    def job(worker: int, rank: Any) -> Exchange:
        return Exchange(ParallelWorker(worker, str(tmp_path), 60.0), 4, SIGNATURE, "abc", "def", rank, rank)

    for worker in range(4):
        wrong = Ranks(2).run(
            lambda rank, worker=worker: job(worker, rank).publish(0, *items_and_bits(worker, rank.rank))
        )
        assert wrong == [None, None]

    def read(rank: Any) -> dict[str, Any]:
        reader, found = job(0, rank), dict[str, Any]()
        own, _ = items_and_bits(0, rank.rank)
        keep = {e.name: int(rows(weights(e.partition), e.name).count_nonzero()) for e in made.entries}
        own = [replace(item, keep=keep.get(item.name)) for item in own]
        reader.read(0, own, reader.wait(0), lambda received: found.update({received.name: received}))
        return {item.name: (item.box, found[item.name]) for item in own}

    for found in Ranks(2).run(read):
        assert not isinstance(found, Exception), found
        for entry in made.entries:
            box, received = found[entry.name]
            assert same(received.value, box.cut(rows(weights(entry.partition), entry.name).flatten()))


def test_names_and_partitions_that_the_file_could_not_hold(folder: str) -> None:
    job = start(folder, 0, 1)
    entry = item_of("w", (8, 1), 0, 0, 8, lambda: torch.ones(8), keep=8)
    bias = item_of("b", (2,), 0, 0, 2, lambda: torch.ones(2))
    for own, sentence in (
        ([entry, renamed(bias, "w.mask")], "w.mask: two tensors"),
        ([bias, bias], "b: two tensors"),
        ([renamed(bias, "__metadata__")], "__metadata__: two tensors"),
        ([replace(bias, partition=1)], "b: is in partition 1, and there are 1 workers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            job.publish(0, own, {"w": bitmask.pack(torch.ones(8, dtype=torch.bool))})
    # Legal, if unusual: names that look like parts or like paths.
    odd = [renamed(bias, name) for name in ("b.mask", "b", "b.values", "../../x", "ü\n")]
    assert [received.name for received in combine(job, 0, odd, {})] == [item.name for item in odd]


ENTRIES = [item_of(name, (3, 3), 0, 0, 9, torch.Tensor, keep=4, shared_budget=True) for name in "ab"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@PROPERTY
@given(st.binary(max_size=200), st.integers(0, 64))
def test_anything_but_a_header_is_a_value_error(text: bytes, area: int) -> None:
    with pytest.raises(ValueError):
        items.accept(text, area, ENTRIES, {})
    with contextlib.suppress(ValueError):
        safetensors.header_length(text[:8], area, area)


@PROPERTY
@given(st.dictionaries(st.sampled_from(["a.values", "b.values", "a.mask", "__metadata__"]), JSON, min_size=1))
def test_a_header_with_any_other_part_is_a_value_error(changes: dict[str, Any]) -> None:
    good = safetensors.header_table(items.layout(ENTRIES, {"a": 4, "b": 4}), {})
    if good | changes != good:
        with pytest.raises(ValueError):
            items.accept(json.dumps(good | changes).encode(), 36, ENTRIES, {})


@PROPERTY
@given(st.integers(-2, 12) | st.booleans(), st.integers(-2, 12))
def test_shared_budgets_that_a_header_may_say(first: Any, second: int) -> None:
    layout = items.layout(ENTRIES, {"a": first, "b": second})
    table = {"__metadata__": {}}
    for name, (begin, end) in safetensors.offsets(layout).items():
        dtype, shape = layout[name]
        table[name] = {"dtype": safetensors.NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text, area = json.dumps(table).encode(), end
    if first + second == 8 and max(first, second) <= 9 and min(first, second) >= 0:
        assert items.accept(text, area, ENTRIES, {}) == layout
    else:
        with pytest.raises(ValueError):
            items.accept(text, area, ENTRIES, {})


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.booleans()), max_size=5))
def test_our_own_headers_are_accepted(shapes: list[tuple[int, int, bool]]) -> None:
    own = [
        item_of(f"t{i}", (a, b), 0, 0, a * b, torch.Tensor, keep=a * b // 2 if entry else None)
        for i, (a, b, entry) in enumerate(shapes)
    ]
    layout = items.layout(own, items.budgets(own))
    data = safetensors.header_bytes(safetensors.header_table(layout, {"a": "b"}))
    where = safetensors.offsets(layout)
    size = max((end for _, end in where.values()), default=0)
    assert safetensors.header_length(data[:8], len(data) + size, len(data)) == len(data) - 8 and len(data) % 8 == 0
    assert list(items.accept(data[8:], size, own, {"a": "b"}).items()) == list(layout.items())
    for name, (begin, _) in where.items():
        assert begin % layout[name][0].itemsize == 0


@pytest.mark.parametrize("dtype", items.DTYPES)
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 2], [3, 0, 1]]).to(dtype)
    assert same(safetensors.decode(safetensors.encode(values).tobytes(), dtype), values)
    assert safetensors.decode(safetensors.encode(torch.empty(0, dtype=dtype)).tobytes(), dtype).dtype == dtype
