"""Fingerprints, and folders of other runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from exchanging import ALONE, PROPERTY, SIGNATURE, cut, raw, start
from fake_ranks import Ranks, item_of, renamed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gap_ds.parallel import Item, identity
from gap_ds.sharding.shard import Shard


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
        ({"run": "data:b"}, r'run "" \(here "data:b"\), so settings of the training script'),
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
    with pytest.raises(
        ValueError, match=r'run "lr:0.1\|precision:bf16" \(here "lr:0.2\|precision:fp32"\), so settings'
    ):
        start(folder, 1, run="batch:8|lr:0.2|precision:fp32")


def tensors_of(*items: Item) -> str:
    return identity.of_tensors(items)


def test_the_tensors_fingerprint_knows_what_the_plan_does_not() -> None:
    item = item_of("embedding", (8, 4), None, 0, 32, lambda: torch.ones(32))
    norm = item_of("norm.steps", (), 1, 0, 1, lambda: torch.ones(1))
    same_ones = [item, norm]
    assert tensors_of(*same_ones) == tensors_of(norm, item_of("embedding", (8, 4), None, 8, 8, lambda: torch.ones(8)))
    others = [
        [item_of("embedding", (9, 4), None, 0, 32, lambda: torch.ones(32)), norm],
        [item, replace(norm, dtype=torch.int64)],
        [item, replace(norm, partition=None)],
        [item, renamed(norm, "norm.count")],
        [item],
        [item, norm, renamed(norm, "x")],
    ]
    assert len({tensors_of(*items) for items in [same_ones, *others]}) == 7


@PROPERTY
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_weights_fingerprint_is_that_of_any_cut(sizes: list[int], ranks: int, random: Any) -> None:
    full = {f"w{i}": torch.randn(n) for i, n in enumerate(sizes)}

    def shards(rank: int, tensors: dict[str, Tensor]) -> list[Shard]:
        found = [Shard.of_frozen("frozen", torch.ones(1), rank)]
        for name, tensor in tensors.items():
            lo, n = cut(tensor, edges[name], rank) if ranks > 1 else (0, tensor.numel())
            found.append(
                Shard.of_range(name, tuple(tensor.shape), lo, n, 0, lambda t=tensor, lo=lo, n=n: t[lo : lo + n])
            )
        return found

    edges = {n: sorted(random.randint(0, t.numel()) for _ in range(ranks - 1)) for n, t in full.items()}
    found = Ranks(ranks).run(lambda rank: identity.of_weights(shards(rank.rank, full), rank))
    whole = [Shard.of_range(n, tuple(t.shape), 0, t.numel(), 0, lambda t=t: t) for n, t in full.items()]
    whole.append(Shard.of_frozen("frozen", torch.ones(1), 0))
    assert found == [identity.of_weights(whole, ALONE)] * ranks
    assert identity.of_weights(whole[:-1], ALONE) != found[0]
    name = random.choice(sorted(full))
    place = random.randrange(full[name].numel())
    other = full[name].clone()
    other[place] = torch.nextafter(other[place], torch.tensor(9.0))
    changed = [replace(shard, owner=lambda: other) if shard.name == name else shard for shard in whole]
    assert identity.of_weights(changed, ALONE) != found[0]


def test_the_weights_fingerprint_goes_through_a_piece_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1000)
    shard = Shard.of_range("w", (1000,), 0, 1000, 0, lambda: weight)
    whole = identity.of_weights([shard], ALONE)
    monkeypatch.setattr(identity, "_CHUNK", 7)
    assert identity.of_weights([shard], ALONE) == whole
