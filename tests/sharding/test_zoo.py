"""Models of many kinds, sharded by ZeRO-3 and by FSDP2 over 2 processes: right entries, and the invariants hold.

Under ZeRO-3 they train in bf16, where working copies are others than the fp32 weights; under FSDP2 in fp32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import run_workers
from parity import result
from table_rows import marked, needed

MODELS = "t5 bart m2m100 marian whisper gpt2 llama qwen2 mistral mixtral opt bert roberta vit resnet".split()
BACKENDS = ("zero3", "fsdp2")
#: Every model once, on the two backends by turns.
SHORT = [f"{next(iter(MODELS))}_{BACKENDS[0]}"]
ROWS = marked([f"{model}_{backend}" for model in MODELS for backend in BACKENDS], SHORT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("zoo")
    run_workers("worker_zoo.py", 2, out, *needed(request, "row"))
    return out


@pytest.mark.parametrize("row", ROWS)
def test_a_run_over_two_boundaries(trained: Path, row: str) -> None:
    """Blocks and entries are those of a list by hand; masks are those of a stable sort of whole weights with the exact
    budgets; after every step pruned weights are 0 in fp32 and working copies, on both ranks."""
    for rank in (0, 1):
        found = result(trained, row, rank)
        assert found["wrong"] == []
        assert found["boundaries"] == 2
        assert found["sparse"] == found["entries"] and len(found["entries"]) >= 7
