"""A model inside a wrapper of another library trains as without it, under the names that it has there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import worker_wrappers as worker
from launch import run_workers
from parity import result
from safetensors.torch import load_file
from table_rows import marked, needed

LIGHTNING = ("fabric", "lightning")
OWN = ("once_ddp", "twice_ddp", "nested_ddp", "compiled_ddp", "once_fsdp2", "compiled_fsdp2", "once_fsdp1")
NAMES = marked([*OWN, *LIGHTNING], ["twice_ddp", "once_fsdp2", "compiled_fsdp2"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("wrappers")
    installed = importlib.util.find_spec("lightning") is not None
    names = [name for name in needed(request, "name") if installed or name not in LIGHTNING]
    run_workers("worker_wrappers.py", 2, out, "ddp", *names)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_without_the_wrapper(trained: Path, name: str) -> None:
    if name in LIGHTNING:
        pytest.importorskip("lightning", reason="lightning is not installed; `make env` does")
    found, wanted = result(trained, name), result(trained, "ddp")
    assert found["steps"] == worker.STEPS
    prefix = "model." if name == "lightning" else ""  # the name that the LightningModule gives the model
    assert found["masks"].keys() == {prefix + entry for entry in wanted["masks"]}
    for entry, mask in wanted["masks"].items():
        assert torch.equal(found["masks"][prefix + entry], mask), entry
    weights, expected = (load_file(trained / f"export_{one}" / "model.safetensors") for one in (name, "ddp"))
    worker.build().load_state_dict({key.removeprefix(prefix): weight for key, weight in weights.items()})
    for key, weight in expected.items():
        assert torch.allclose(weights[prefix + key], weight, rtol=0, atol=1e-6), key


def test_what_it_does_not_wrap_is_named(trained: Path) -> None:
    assert "in its attribute strategy_model.0, and parameters beside it" in result(trained, "beside")["refused"]


def test_a_wrapped_body_with_a_tied_head_beside_it_is_no_wrapper(trained: Path) -> None:
    """Its body has all parameters, and its forward pass is more than the body's."""
    found = result(trained, "tied")
    assert found["itself"] and found["body"] and "in its attribute body" in found["refused"]
