"""Losses around boundaries: against those of the training loop, and over resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gap_ds import GaPEngine
from gap_ds.training import boundary_losses

#: Boundaries before steps 30 and 60: the windows of 50 steps overlap.
CONFIG = {"sparsity": 0.75, "partitions": 2, "phase_steps": 30, "rounds": 1, "finetune_steps": 40}


def build(folder: Path, accumulation: int = 1) -> GaPEngine:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.ModuleList([nn.Linear(6, 6)]) for _ in range(4)))
    for block in model:
        block.forward = block[0].forward  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = folder / "gap_history.jsonl"
    return GaPEngine(model, CONFIG, optimizer=optimizer, history=history, gradient_accumulation_steps=accumulation)


def train(engine: GaPEngine, steps: int, accumulation: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        generator, several = torch.Generator().manual_seed(engine.applied_steps), []
        for _ in range(accumulation):
            loss = engine(torch.randn(8, 6, generator=generator)).square().mean()
            several.append(loss.item())
            engine.backward(loss)
            engine.step()
        losses.append(sum(several) / accumulation)
    return losses


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / boundary_losses.NAME).read_text().splitlines()]


def same(found: list[float | None], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and all(
        math.isclose(a or 0, b, rel_tol=1e-6) for a, b in zip(found, wanted, strict=True)
    )


def test_the_losses_of_the_loop_are_recorded(tmp_path: Path) -> None:
    engine = build(tmp_path, accumulation=2)
    losses = train(engine, 100, accumulation=2)
    engine.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [30, 60]
    assert same(found[0]["before"], losses[:30]) and same(found[0]["after"], losses[30:80])
    assert same(found[1]["before"], losses[10:60]) and same(found[1]["after"], losses[60:100])


def test_a_resumed_run_records_the_same_lines(tmp_path: Path) -> None:
    straight = build(tmp_path / "straight")
    train(straight, 100)
    straight.close()

    first = build(tmp_path / "resumed")
    train(first, 70)  # inside both windows
    first.save_checkpoint(tmp_path / "checkpoints")
    train(first, 25)  # these steps are lost: one window is complete then
    first.close()
    second = build(tmp_path / "resumed")
    second.load_checkpoint(tmp_path / "checkpoints")
    train(second, 30)
    second.close()
    assert lines(tmp_path / "resumed") == lines(tmp_path / "straight")


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    for steps in (100, 90):
        engine = build(tmp_path)
        train(engine, steps)
        engine.close()
    assert [(line["step"], len(line["after"])) for line in lines(tmp_path)] == [(30, 50), (60, 30)]
