"""The demonstration around its two trainings, which are replaced: what is started, and what is shown at the end."""

from __future__ import annotations

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

from gap_ds import GaPConfig, schedule

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
    """The commands that the demonstration starts, each of which leaves RESULT."""
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
    assert run.gap_config(dense, False).method == "dense" and run.gap_config(sparse, False).sparsity == 0.8
    assert train.deepspeed_config(sparse) is not None
    shown = capsys.readouterr().out
    for text in ("61.2", "183,504 of 917,504", "80%", "75%", "60 s"):
        assert shown.count(text) >= 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_failed_training_ends_it(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", lambda folder, flags: 130)
    assert demo.main() == 130


def test_the_picture_shows_one_dense_partition_at_a_time() -> None:
    gap = GaPConfig.load(demo.GAP)
    phases = schedule.build(gap, 100).phases
    lines = demo.picture(gap, steps_per_epoch=100).splitlines()
    bars = [line.split("  ")[-1] for line in lines if line.startswith("  partition")]
    assert len(bars) == gap.kappa and {len(bar) for bar in bars} == {60}
    dense = ["".join(column).count("█") for column in zip(*bars, strict=True)]
    finetune = round(60 * phases[-1].steps / phases[-1].end_step)
    assert dense == [1] * (60 - finetune) + [0] * finetune
