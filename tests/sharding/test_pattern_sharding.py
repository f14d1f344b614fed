"""N:M and block patterns over shards: legal, exact, and the same for every backend and number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from parity import largest_difference, result
from safetensors.torch import load_file
from table_rows import marked, needed

import toy  # isort: skip

Row = dict[str, Any]

#: Pattern, sparsity, width of the toy's blocks, and the budget of each of its matrices.
PATTERNS: list[tuple[str, float, int, int]] = [
    ("2:4", 0.5, 36, 16 * 36 // 2),
    ("4:16", 0.75, 48, 16 * 48 // 4),
    ("block:4x4", 0.8, 36, 7 * 16),  # 36 blocks, of which 115 weights are 7.2
]
ARGUMENTS = {
    None: {"unused_is_zero": False, "skip": True, "every_micro_batch": False},
    1: {"unused_is_zero": True, "skip": True, "every_micro_batch": False},
    3: {"unused_is_zero": True, "skip": False, "every_micro_batch": True},
}


def trained_row(pattern: tuple[str, float, int, int], stage: int | None, dtype: str = "fp32") -> Row:
    """A run, and the reference that it must equal (see test_zero for what differs between the stages)."""
    text, sparsity, hidden, keep = pattern
    plain = text.replace(":", "_")
    backend = "ddp" if stage is None else f"zero{stage}"
    return {
        "name": f"{backend}_{dtype}_{plain}",
        **{"pattern": text, "sparsity": sparsity, "hidden": hidden, "keep": keep, "stage": stage, "dtype": dtype},
        **{"reference": f"reference_{plain}_{stage}", "reference_arguments": ARGUMENTS[stage]},
    }


ROWS = [trained_row(pattern, stage) for pattern in PATTERNS for stage in (None, 1, 3)]
ROWS += [trained_row(PATTERNS[0], stage, "bf16") for stage in (1, 3)]
BY_NAME = {row["name"]: row for row in ROWS}
#: Each pattern once, on backends whose pieces cut its groups where there are such.
SHORT = ["zero1_fp32_4_16", "zero3_fp32_block_4x4", "ddp_fp32_2_4", "zero3_bf16_2_4"]
NAMES = marked(BY_NAME, SHORT)
EXACT = marked([name for name in BY_NAME if "fp32" in name], [name for name in SHORT if "fp32" in name])
CUTTING = {"zero1_fp32_4_16", "zero1_fp32_block_4x4", "zero3_fp32_block_4x4"}

#: Widths such that 3 ranks cut groups under ZeRO-3 as well: 28 * 16 weights in pieces of 150.
STARTS = [
    {
        "name": f"start{stage}_{text.replace(':', '_')}",
        **{"pattern": text, "sparsity": sparsity, "hidden": hidden, "keep": keep, "stage": stage, "dtype": "fp32"},
    }
    for text, sparsity, hidden, keep in (("2:4", 0.5, 28, 224), ("4:16", 0.75, 16, 64), ("block:4x4", 0.8, 28, 96))
    for stage in (1, 3)
]
#: Rows in which a piece begins in the middle of a group, without which they would show little; by the number of ranks.
CUT = {
    1: set(),
    2: {"start1_4_16", "start1_block_4x4", "start3_block_4x4"},
    3: {"start1_4_16", "start1_block_4x4", "start3_2_4", "start3_4_16", "start3_block_4x4"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("patterns")
    (out / "rows.json").write_text(json.dumps([BY_NAME[name] for name in needed(request, "name")] + STARTS))
    run_workers("worker_pattern.py", 2, out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_invariants_hold_after_every_step(trained: Path, name: str) -> None:
    """Pruned weights are 0 in fp32 and working copies, budgets exact, masks those of the brute force; ranks agree."""
    first = result(trained, name)
    for rank in (0, 1):
        found = result(trained, name, rank)
        assert found["wrong"] == []
        assert len(found["masks"]) == 5
        for a, b in zip(first["masks"], found["masks"], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", EXACT)
def test_fp32_equals_the_independent_reference_bit_for_bit(trained: Path, name: str) -> None:
    ours, wanted = result(trained, name), result(trained, BY_NAME[name]["reference"])
    for got, mask in zip(ours["masks"], wanted["masks"], strict=True):
        assert got.keys() == mask.keys() and all(torch.equal(got[n], mask[n]) for n in mask)
    assert ours["losses"] == wanted["losses"]
    assert largest_difference(ours, wanted) == 0


@pytest.mark.parametrize("name", NAMES)
def test_resume_in_mid_phase_equals_never_having_stopped(trained: Path, name: str) -> None:
    straight = result(trained, name)
    assert largest_difference(straight["resumed"], straight) == 0
    assert all(torch.equal(straight["resumed"]["masks"][n], mask) for n, mask in straight["masks"][-1].items())


@pytest.mark.parametrize("name", NAMES)
def test_exports_have_the_budgets(trained: Path, name: str) -> None:
    keep = BY_NAME[name]["keep"]
    final = load_file(trained / "final" / name / "model.safetensors")
    for entry, mask in result(trained, name)["masks"][-1].items():
        assert torch.equal(final[entry] != 0, mask) and int(mask.sum()) == keep
    middle = load_file(trained / "mid" / name / "model.safetensors")
    for block in range(toy.BLOCKS):
        for matrix in ("fc1", "fc2"):
            assert int(middle[f"layers.{block}.{matrix}.weight"].count_nonzero()) == keep


@pytest.mark.parametrize("name", NAMES)
def test_a_boundary_assembles_no_entry(trained: Path, name: str) -> None:
    """Groups that lie on one rank cost nothing: what travels are scores of cut groups, and counts of blocks."""
    group = {"2:4": 4, "4:16": 16}.get(BY_NAME[name]["pattern"])
    for sums, other in result(trained, name)["traffic"]:
        assert not [call for call in other if call.startswith("assemble")]
        # A number of each entry, and the scores of at most one cut group.
        assert group is None or all(math.prod(shape) <= max(2 * toy.BLOCKS, group) for shape in sums), sums


@pytest.mark.parametrize("name", NAMES)
def test_shard_boundaries_cut_groups(trained: Path, name: str) -> None:
    """Otherwise the rows would show nothing."""
    assert any(result(trained, name, rank)["cut"] for rank in (0, 1)) == (name in CUTTING)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_masks_do_not_depend_on_the_number_of_ranks(ranks: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Random and magnitude masks for equal weights are those of the brute force, and so the same."""
    out = request.getfixturevalue("trained") if ranks == 2 else tmp_path
    if ranks != 2:
        (out / "rows.json").write_text(json.dumps(STARTS))
        run_workers("worker_pattern.py", ranks, out)
    cut = set()
    for row in STARTS:
        for rank in range(ranks):
            found = result(out, row["name"], rank)
            assert found["wrong"] == []
            assert len(found["masks"]) == 8 or rank > 0
            cut |= {row["name"]} if found["cut"] else set()
    assert cut == CUT[ranks]
