"""Models of many kinds, sharded by ZeRO-3 and by FSDP2 over 2 processes: right entries, and the invariants hold.

Under ZeRO-3 they train in bf16, where working copies are others than the fp32 weights; under FSDP2 in fp32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import run_workers
from parity import result

MODELS = "t5 bart m2m100 marian whisper gpt2 llama qwen2 mistral mixtral opt bert roberta vit resnet".split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zoo")
    run_workers("worker_zoo.py", 2, out)
    return out


@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
@pytest.mark.parametrize("model", MODELS)
def test_a_run_over_two_boundaries(trained: Path, model: str, backend: str) -> None:
    """Blocks and entries are those of a list by hand; masks are those of a stable sort of whole weights with the exact
    budgets; after every step pruned weights are 0 in fp32 and working copies, on both ranks."""
    for rank in (0, 1):
        found = result(trained, f"{model}_{backend}", rank)
        assert found["wrong"] == []
        assert found["boundaries"] == 2
        assert found["sparse"] == found["entries"] and len(found["entries"]) >= 7
