"""What the README shows is true: its snippet runs, its config loads, its tables are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gap_ds import GaPConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Tiny:
        for layer in self.layers:
            x = layer(x)
        self.loss = x.square().mean()
        return self


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, on a plain model: only its optimizer is added, as the README says."""
    (code,) = blocks("python")
    code = code.replace("steps_per_epoch=len(loader))", "optimizer=optimizer, steps_per_epoch=len(loader))")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    model = Tiny()
    scope = {"engine": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(code, scope | {"loader": [{"x": torch.ones(2, 4)}] * 16})
    assert (tmp_path / "sparse-model" / "model.safetensors").exists()


def test_the_config_of_the_readme_is_the_shipped_one() -> None:
    (text,) = blocks("json")
    assert GaPConfig.load(json.loads(text)) == GaPConfig.load(ROOT / "configs" / "gap" / "cyclic_80.json")


def test_tables_come_from_committed_results() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    status = subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, timeout=120, check=False).returncode
    assert status == 0, "run `python benchmarks/tables.py`"


def test_links_lead_somewhere() -> None:
    for document in [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/README.md"),
        ROOT / "CONTRIBUTING.md",
    ]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
