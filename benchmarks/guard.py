"""Times of the hot paths, kept from run to run on one machine: `make bench-guard` fails where a median rose by 20 %.

Not part of the tests: what a time means depends on the machine and on what else it does. The first run has nothing to
compare with and saves its times in .benchmarks.
"""

from __future__ import annotations

import argparse
from typing import Any

import overhead
import pytest
import torch

from gap_ds import masks, selection

MILLION = 1_000_000


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [MILLION // 4, 10 * MILLION])
def test_apply_masks(benchmark: Any, n: int, dtype: torch.dtype) -> None:
    weights, bits = torch.randn(n).to(dtype), masks.pack(torch.rand(n) < 0.1)
    benchmark(masks.zero_pruned_, weights, bits)


@pytest.mark.parametrize("entries", [1, 64])
def test_select(benchmark: Any, entries: int) -> None:
    weights = torch.randn(entries, 10 * MILLION // entries)
    pieces = [
        selection.Piece(f"entry{e}", 0, row.numel(), selection.magnitude_keys(row), e) for e, row in enumerate(weights)
    ]
    benchmark(selection.select_largest, pieces, [weights.shape[1] // 10] * entries, selection.Single())


def test_first_masks(benchmark: Any) -> None:
    keys = selection.random_keys(0, "entry", 0, torch.device("cpu"))
    pieces = [selection.Piece("entry", 0, 5 * MILLION, keys, 0)]
    benchmark(selection.select_largest, pieces, [MILLION // 2], selection.Single())


@pytest.mark.parametrize("kind", ["bare", "engine"])
def test_step(benchmark: Any, kind: str) -> None:
    args = argparse.Namespace(preset="small", backend="plain", sparsity=0.9, tokens=256, dtype="bf16")
    step, _ = overhead.build(args, torch.device("cpu"), sparse=kind == "engine")
    benchmark(step, overhead.tokens(args, torch.device("cpu")))
