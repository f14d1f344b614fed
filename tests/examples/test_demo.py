"""examples/translation/demo.py with both trainings replaced: its commands and its output."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo
import pytest
import train
from common import run

from gap_ds import GaPConfig

RESULT = {
    "bleu": 61.25,
    "chrf": 70.0,
    "kept": 183_504,
    "numel": 917_504,
    "entry_sparsity": 0.8,
    "model_sparsity": 0.75,
    "train_seconds": 60.4,
    "steps_per_epoch": 100,
}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that the demonstration starts. Each writes RESULT."""
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        started.append(command)
        folder = Path(command[command.index("--output-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(RESULT))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output-dir", str(tmp_path / "out")])
    return started


def test_both_models_are_trained_and_shown(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert demo.main() == 0
    dense, sparse = (train.parse(c[c.index(str(demo.HERE / "train.py")) + 1 :]) for c in commands)
    assert dense.dense and not sparse.dense
    assert run.gap_config(dense).method == "dense" and run.gap_config(sparse).sparsity == 0.8
    assert train.deepspeed_config(sparse) is not None
    shown = capsys.readouterr().out
    for text in ("61.2", "183,504 of 917,504", "80%", "75%", "60 s"):
        assert shown.count(text) >= 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_failed_training_ends_it(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", lambda folder, flags: 130)
    assert demo.main() == 130


def bars(gap: GaPConfig) -> list[str]:
    lines = demo.picture(gap, steps_per_epoch=120).splitlines()
    return [line.split("  ")[-1] for line in lines if line.startswith("  partition")]


def test_the_picture_shows_one_dense_partition_at_a_time() -> None:
    assert bars(GaPConfig(sparsity=0.8, partitions=3, phase_epochs=0.5, rounds=1, finetune_epochs=1.5)) == [
        "█" * 10 + "·" * 50,
        "·" * 10 + "█" * 10 + "·" * 40,
        "·" * 20 + "█" * 10 + "·" * 30,
    ]


def test_the_picture_shows_a_rising_target() -> None:
    found = bars(GaPConfig.load(demo.GAP))
    assert len(found) == 2
    for bar in found:
        # A column is 8 of the 480 steps. All is dense for 60, and fine-tuning takes the last 120.
        assert bar.startswith("█" * 9) and bar.endswith("·" * 15)
        shades = ["█▓▒░·".index(shade) for shade in bar]
        assert set(shades) == {0, 1, 2, 3, 4}
        # A partition that grows by a share gets darker by a shade at most.
        assert all(after - before in (-1, 0, 1) for before, after in itertools.pairwise(shades))
    assert any("░▒" in bar or "·░" in bar for bar in found)
