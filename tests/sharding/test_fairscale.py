"""fairscale's FullyShardedDataParallel and OSS with ShardedDataParallel, really trained by 2 processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parity
import pytest
from launch import run_workers
from parity import Row
from table_rows import marked, needed

pytest.importorskip("fairscale")

ROWS: list[Row] = [
    {"name": f"{name}_{optimizer}", "optimizer": optimizer, **row}
    for optimizer in ("adamw", "sgd")
    for name, row in {
        "fsdp": {"kind": "fsdp"},
        "fsdp_flat": {"kind": "fsdp", "flat": True},
        "oss": {"kind": "oss"},
    }.items()
]
ROWS += [
    {"name": name, "optimizer": "adamw", **row}
    for name, row in {
        "fsdp_evaluate": {"kind": "fsdp", "evaluate": True},
        "fsdp_flat_evaluate": {"kind": "fsdp", "flat": True, "evaluate": True},
        "fsdp_bf16": {"kind": "fsdp", "bf16": True},
        "fsdp_flat_bf16": {"kind": "fsdp", "flat": True, "bf16": True},
        "fsdp_flat_clip": {"kind": "fsdp", "flat": True, "clip": 0.5},
        "oss_clip": {"kind": "oss", "clip": 0.5},
        "oss_bf16": {"kind": "oss", "bf16": True},
        "oss_no_buckets": {"kind": "oss", "buffer": 0},
    }.items()
]
EARLY: list[Row] = [{"name": "oss_early", "what": "early", "kind": "oss", "optimizer": "adamw"}]
REFUSED: Row = {"name": "refused", "what": "refused", "optimizer": "sgd"}

SHORT = [f"{kind}_{row}" for kind in ("fsdp", "fsdp_flat", "oss") for row in ("adamw", "bf16")]


def table(rows: list[Row]) -> list[Any]:
    names = {row["name"] for row in rows}
    return marked(rows, [name for name in SHORT if name in names], lambda row: row["name"])


ALL = table(ROWS)
EXACT = table([row for row in ROWS if not row.get("bf16")])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("fairscale")
    (out / "rows.json").write_text(json.dumps([*needed(request, "row"), REFUSED]))
    run_workers("worker_fairscale.py", 2, out, timeout=400)
    return out


@pytest.mark.parametrize("row", ALL)
def test_invariants_hold_after_every_step(trained: Path, row: Row) -> None:
    parity.check_invariants(trained, row, ranks=2)


@pytest.mark.parametrize("row", ALL)
def test_the_plan_is_that_of_the_unsharded_model(trained: Path, row: Row) -> None:
    parity.check_plan(trained, row)


@pytest.mark.parametrize("row", EXACT)
def test_fp32_equals_the_independent_reference(trained: Path, row: Row) -> None:
    # Bitwise, but for the norm that clipping computes: its sum over pieces is taken in another order.
    tolerance = 1e-6 if row.get("clip") else 0.0
    # Flat parameters and OSS's buckets have a gradient of 0 for an unused parameter; single parameters have none.
    zero = bool(row.get("flat")) or (row["kind"] == "oss" and row["name"] != "oss_no_buckets")
    parity.check_reference(trained, row, unused_is_zero=zero, tolerance=tolerance)


@pytest.mark.parametrize("row", ALL)
def test_resume_in_mid_phase_equals_never_having_stopped(trained: Path, row: Row) -> None:
    parity.check_resume(trained, row)


@pytest.mark.parametrize("row", ALL)
def test_export_is_the_sparse_model_and_reloads(trained: Path, row: Row) -> None:
    parity.check_export(trained, row)


@pytest.mark.parametrize("row", table(EARLY))
def test_a_checkpoint_before_the_first_step_changes_nothing(trained: Path, row: Row) -> None:
    parity.check_early(trained, row, ranks=2)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("root_not_wrapped", "Wrap the outermost module too"),
        ("compiled", "Do not compile"),
        ("another_optimizer", "must be the one OSS that the model was wrapped with"),
        ("oss_with_ddp", "shards the optimizer of an unsharded model"),
        ("optimizer_too_early", "Build the optimizer from the wrapped model"),
        ("two_groups", "one group for all is needed"),
    ],
)
def test_what_is_not_supported_is_refused(trained: Path, case: str, message: str) -> None:
    for rank in (0, 1):
        assert message in parity.result(trained, "refused", rank)[case]
