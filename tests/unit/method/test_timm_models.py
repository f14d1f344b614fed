"""Entries of timm's models, on the meta device: the first and the last model of each family, by name.

`tests/data/timm.json` holds the summary of each plan, looked at by eye once, and the version of timm. The short run has
a handful, the full run all. `UPDATE_ZOO=1` with `-m full` writes the file anew: read the difference then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import plans
import pytest

FILE = Path(__file__).resolve().parents[2] / "data" / "timm.json"
ZOO = json.loads(FILE.read_text(encoding="utf-8"))
FOUND = [about.version for about in distributions(name="timm", path=[str(plans.TIMM), *sys.path])]

pytestmark = pytest.mark.skipif(
    ZOO["timm"] not in FOUND[:1], reason=f"timm {ZOO['timm']} is not installed; `make env` does"
)


def summaries(names: list[str]) -> dict[str, str]:
    result = subprocess.run([sys.executable, plans.__file__, *names], capture_output=True, text=True, timeout=1000)
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout)
    return found


def test_short() -> None:
    assert summaries(list(ZOO["short"])) == ZOO["short"]


@pytest.mark.full
def test_full() -> None:
    """All families, so that a new one is noticed, too."""
    found = summaries([])
    if "UPDATE_ZOO" in os.environ:  # then the next run passes
        rows = {
            "short": {n: found[n] for n in ZOO["short"]},
            "full": {n: s for n, s in found.items() if n not in ZOO["short"]},
        }
        FILE.write_text(json.dumps({"timm": FOUND[0], **rows}, indent=1) + "\n", encoding="utf-8")
    assert found == ZOO["short"] | ZOO["full"]
