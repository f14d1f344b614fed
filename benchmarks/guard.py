"""Guards the hot paths on one machine: `make bench-guard-baseline` once, `make bench-guard` after every change.

Two kinds of checks, both of CPU time in one thread, of the fastest of many calls:

- Times, compared with the baseline. A time 25 % above it fails, and fails again in the next run: only
  `make bench-guard-baseline` writes a baseline. It is valid on the same idle machine with the same versions: processes
  that share the memory slow large masks by up to a third, also in CPU time.
- Ratios of two works in turns within one run, compared with limits in this file, and seconds of the import. They are
  valid on any machine.

Not part of the tests, because they take minutes. benchmarks/results/guard.md shows what they find when code is slower.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import measure
import overhead
import pytest
import torch

from gap_ds.masks import bitmask, cpu, selection
from gap_ds.masks.box import Box

MILLION = 1_000_000
CPU = torch.device("cpu")
#: Limits of ratios: a step with the engine to one without, packed masks to a float mul_, a selection to torch.topk.
STEP = 1.08
MASKS, SELECTION = (1.0, 0.45) if cpu.library() else (1.6, 0.65)
#: Limit of CPU seconds beyond `import torch`.
IMPORT = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# -- times against the baseline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [MILLION // 4, MILLION])  # for larger sizes, other load on the caches matters
def test_apply_masks(benchmark: Any, n: int, dtype: torch.dtype) -> None:
    weights, bits = torch.randn(n).to(dtype), bitmask.pack(torch.rand(n) < 0.1)
    benchmark.pedantic(bitmask.zero_pruned_, (weights, bits), rounds=200, warmup_rounds=3)


@pytest.mark.parametrize("entries", [1, 64])
def test_select(benchmark: Any, entries: int) -> None:
    benchmark.pedantic(select, (torch.randn(entries, 10 * MILLION // entries),), rounds=60, warmup_rounds=1)


def test_first_masks(benchmark: Any) -> None:
    box = Box.span(0, 5 * MILLION, 5 * MILLION)
    pieces = [selection.Piece("entry", box, selection.random_keys(0, "entry", box, CPU), 0)]
    given = (pieces, [MILLION // 2], selection.Single())
    benchmark.pedantic(selection.select_largest, given, rounds=30, warmup_rounds=1)


def test_boundary(benchmark: Any) -> None:
    """Time whole boundaries of a cyclic run, one after every step: select, mask, moments, publish, agree."""
    rounds = 12
    step, engine = overhead.build(args(), CPU, sparse=True, phase_steps=1, rounds=rounds)
    batch, cross = overhead.tokens(args(), CPU), engine.after_step
    engine.after_step = lambda: None

    def update() -> None:
        step(batch)

    benchmark.pedantic(cross, setup=update, rounds=3 * rounds - 2, warmup_rounds=2)
    assert engine.applied_steps == 3 * rounds


# -- ratios inside one run ---------------------------------------------------------------------------------------------


def test_masks_to_mul() -> None:
    weights, kept = torch.randn(10 * MILLION), torch.rand(10 * MILLION) < 0.1
    bits, factors = bitmask.pack(kept), kept.float()
    check(MASKS, lambda: bitmask.zero_pruned_(weights, bits), lambda: weights.mul_(factors), rounds=40)


def test_engine_to_bare() -> None:
    batch = overhead.tokens(args(), CPU)
    engine, bare = (overhead.build(args(), CPU, sparse=sparse)[0] for sparse in (True, False))
    check(STEP, lambda: engine(batch), lambda: bare(batch), rounds=40)


def test_selection_to_topk() -> None:
    weights = torch.randn(1, 10 * MILLION)
    check(SELECTION, lambda: select(weights), lambda: weights[0].abs().topk(MILLION, sorted=False), rounds=8)


def test_import() -> None:
    spent: dict[str, list[float]] = {"import torch": [], "import torch; import gap_ds": []}
    for _ in range(4):
        for code, seconds in spent.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    torch_alone, both = (min(seconds) for seconds in spent.values())
    assert both - torch_alone <= IMPORT, f"import gap_ds: {both - torch_alone:.2f} s beyond import torch"


def check(limit: float, work: Callable[[], object], base: Callable[[], object], rounds: int) -> None:
    """Assert that the work takes at most `limit` times the CPU time of the base, in the fastest or the median round."""
    times = measure.in_turns({"work": work, "base": base}, rounds, timer=lambda work: measure.both_seconds(work)[1])
    fastest = min(times["work"]) / min(times["base"])
    median = statistics.median(a / b for a, b in zip(times["work"], times["base"], strict=True))
    print(f"ratio {fastest:.3f} of the fastest, {median:.3f} in the median; at most {limit}")
    assert min(fastest, median) <= limit, f"{fastest:.3f} (median {median:.3f}), must be at most {limit}"


def select(weights: torch.Tensor) -> list[torch.Tensor]:
    """Select a tenth of each row of (entries, N)."""
    pieces = [
        selection.Piece(f"entry{e}", Box.span(0, len(row), len(row)), selection.magnitude_keys(row), e)
        for e, row in enumerate(weights)
    ]
    return selection.select_largest(pieces, [weights.shape[1] // 10] * len(weights), selection.Single())


def args() -> argparse.Namespace:
    return argparse.Namespace(preset="small", backend="plain", sparsity=0.9, tokens=256, dtype="bf16")
