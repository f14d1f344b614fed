"""Entries of the model classes of transformers, on the meta device with their default configs.

`tests/data/zoo.json` holds the summary of each class's plan, looked at by eye once, and the version of transformers.
The short run covers the classes that are built fastest, the full run all. `UPDATE_ZOO=1` with `-m full` writes the file
anew: read the difference then.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import plans
import pytest
import torch

transformers = pytest.importorskip("transformers")

FILE = Path(__file__).resolve().parents[2] / "data" / "zoo.json"
ZOO = json.loads(FILE.read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(
    transformers.__version__ != ZOO["transformers"], reason="the plans are of another version of transformers"
)


def summary(name: str) -> str:
    """Summary of the plan of a class, or the message with which it is refused."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    return plans.summary(name, model)


def test_the_short_run_has_a_hundred_classes() -> None:
    assert len(ZOO["short"]) >= 100 and len(ZOO["full"]) > 250
    assert not ZOO["short"].keys() & ZOO["full"].keys()


@pytest.mark.parametrize("name", ZOO["short"])
def test_short(name: str) -> None:
    assert summary(name) == ZOO["short"][name]


@pytest.mark.full
@pytest.mark.parametrize("name", ZOO["full"])
def test_full(name: str) -> None:
    assert summary(name) == ZOO["full"][name]


@pytest.mark.full
@pytest.mark.skipif("UPDATE_ZOO" not in os.environ, reason="writes tests/data/zoo.json")
def test_write() -> None:
    rows = {part: {name: summary(name) for name in ZOO[part]} for part in ("short", "full")}
    FILE.write_text(json.dumps({"transformers": transformers.__version__, **rows}, indent=1) + "\n", encoding="utf-8")
