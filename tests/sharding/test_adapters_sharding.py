"""LoRA adapters over a sparse base, trained on 2 processes and merged on one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from launch import run_workers
from parity import result

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed; `make env` does"),
]
NAMES = ["ddp", "zero2", "zero3", "fsdp2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters")
    run_workers("worker_adapters.py", 2, out, *NAMES)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_masked_adapters_are_merged_without_loss(trained: Path, name: str) -> None:
    import peft
    import worker_adapters as worker

    from gap_ds.hf import mask_adapters, merge

    found, base = result(trained, name), worker.base()
    # Three layers in each of 4 blocks have adapters, one of them over a dense weight.
    assert len(found["masked"]) == 11 and len(found["entries"]) == 28
    frozen = {entry: found["weights"][entry] for entry in found["entries"]}
    names = {entry: entry.removeprefix("base_model.model.").replace(".base_layer", "") for entry in frozen}
    for entry, weight in frozen.items():
        assert torch.equal(weight, base.get_parameter(names[entry])), entry

    model = peft.PeftModel.from_pretrained(worker.base(), trained / name / "adapters").eval()
    mask_adapters(model)
    assert worker.loss(model) == pytest.approx(found["loss"], rel=1e-5)
    merged = merge(model)
    assert merged.lost == 0
    moved = 0
    for entry in names.values():
        zeros = base.get_parameter(entry) == 0
        assert not merged.model.get_parameter(entry)[zeros].any(), entry
        moved += not torch.equal(merged.model.get_parameter(entry), base.get_parameter(entry))
    assert moved == 12
    assert worker.loss(merged.model) == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sharding_changes_nothing(trained: Path, name: str) -> None:
    import worker_adapters as worker

    loss = result(trained, name)["loss"]
    assert loss == pytest.approx(result(trained, "ddp")["loss"], rel=1e-5)
    assert loss < worker.loss(worker.base().eval()) - 0.02
