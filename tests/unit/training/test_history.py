"""The history of masks: against counts taken from the masks themselves, and over kills and resumes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gap_ds import GaPEngine
from gap_ds.training import history

CYCLIC = {"sparsity": 0.75, "partitions": 2, "phase_steps": 3, "rounds": 2, "finetune_steps": 2}
RAMP = {**CYCLIC, "prune_ramp": 0.7, "update_steps": 1}
RIGL = {"method": "rigl", "sparsity": 0.75, "phase_steps": 9, "update_steps": 2, "finetune_steps": 2}
COLUMNS = ("kept", "came", "went", "active")


def build(config: dict[str, Any], path: Path | None) -> GaPEngine:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.ModuleList([nn.Linear(6, 6)]) for _ in range(4)))
    for block in model:
        block.forward = block[0].forward  # type: ignore[method-assign]
    return GaPEngine(model, config, optimizer=torch.optim.Adam(model.parameters(), lr=0.05), history=path)


def train(engine: GaPEngine, steps: int, seen: Any = None) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(engine.applied_steps)
        engine.backward(engine(torch.randn(8, 6, generator=generator)).square().mean())
        engine.step()
        if seen:
            seen()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("config", [CYCLIC, RAMP, RIGL], ids=["cyclic", "ramp", "rigl"])
def test_the_history_counts_what_masks_do(tmp_path: Path, config: dict[str, Any]) -> None:
    engine = build(config, tmp_path / "run" / "history.jsonl")
    names = [entry.name for entry in engine.plan.entries]
    ever: dict[str, torch.Tensor] = {}
    last: dict[str, torch.Tensor] = {}
    expected: dict[int, dict[str, list[int | None]]] = {}

    def look() -> None:
        row: dict[str, list[int | None]] = {column: [] for column in COLUMNS}
        for name in names:
            found = engine.mask(name)
            mask = torch.ones(36, dtype=torch.bool) if found is None else found
            ever[name] = ever.get(name, torch.zeros(36, dtype=torch.bool)) | mask
            old = last.get(name)
            row["kept"].append(int(mask.sum()))
            row["active"].append(int(ever[name].sum()))
            known = found is not None and old is not None
            row["came"].append(int((mask & ~old).sum()) if known and old is not None else None)
            row["went"].append(int((old & ~mask).sum()) if known and old is not None else None)
            if found is not None:
                last[name] = found
        expected[engine.applied_steps] = row

    look()
    train(engine, 14, look)
    engine.close()
    header, *rows = lines(tmp_path / "run" / "history.jsonl")
    assert (header["format"], header["version"]) == (history.FORMAT, history.VERSION)
    assert header["entries"] == [[e.name, 36, e.partition] for e in engine.plan.entries]
    assert [row["step"] for row in rows] == sorted(
        {phase.first_step for phase in engine.schedule.phases} | {s for p in engine.schedule.phases for s in p.updates}
    )
    for row in rows:
        wanted = expected[row["step"]]
        assert row["kept"] == wanted["kept"] and row["active"] == wanted["active"]
        for column in ("came", "went"):
            # A null may stand where no new mask was put on: then nothing has changed.
            assert [n or 0 for n in row[column]] == [n or 0 for n in wanted[column]]
    assert any(n for row in rows for n in row["came"])
    assert (rows[-1]["active"] == [36] * 4) == (config is not RIGL)


@pytest.mark.parametrize("config", [CYCLIC, RIGL], ids=["cyclic", "rigl"])
def test_a_resumed_run_has_the_history_of_one_that_never_stopped(tmp_path: Path, config: dict[str, Any]) -> None:
    whole = build(config, tmp_path / "whole.jsonl")
    train(whole, 11)
    whole.close()
    for step in (1, 4, 6):
        path = tmp_path / f"cut_{step}.jsonl"
        first = build(config, path)
        train(first, step)
        first.save_checkpoint(tmp_path / str(step))
        train(first, 4)  # what follows the checkpoint is lost with the kill, and must not stay in the file
        again = build(config, path)
        again.load_checkpoint(tmp_path / str(step))
        train(again, 11 - step)
        again.close()
        assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_line_that_a_kill_has_cut_short_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = build(CYCLIC, path)
    train(first, 7)
    first.save_checkpoint(tmp_path / "run")
    with path.open("a") as file:
        file.write('{"step": 9, "pha')
    second = build(CYCLIC, path)
    second.load_checkpoint(tmp_path / "run")
    train(second, 7)
    second.close()
    assert [row["step"] for row in lines(path)[1:]] == [0, 3, 6, 9, 12]
    with pytest.warns(UserWarning, match=r"moved.jsonl: there is no such file to go on with: a history begins at step"):
        build(CYCLIC, tmp_path / "moved.jsonl").load_checkpoint(tmp_path / "run")


def test_a_history_begins_where_none_was_recorded(tmp_path: Path) -> None:
    first = build(CYCLIC, None)
    train(first, 4)
    first.save_checkpoint(tmp_path / "run")
    second = build(CYCLIC, tmp_path / "late.jsonl")
    second.load_checkpoint(tmp_path / "run")
    train(second, 10)
    second.close()
    _, *rows = lines(tmp_path / "late.jsonl")
    assert [row["step"] for row in rows] == [4, 6, 9, 12]
    assert rows[0]["came"] == [None] * 4


def test_a_disk_that_refuses_the_history_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = build(CYCLIC, tmp_path / "file" / "history.jsonl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(engine, 14)
    assert engine.finished and "history of the masks is not complete" in str(caught[0].message)


def test_going_back_without_training_on_leaves_the_file(tmp_path: Path) -> None:
    """As a Trainer does that loads its best model at the end."""
    engine = build(CYCLIC, tmp_path / "history.jsonl")
    train(engine, 4)
    engine.save_masks(tmp_path / "best")
    best = {name: value.clone() for name, value in engine.module.state_dict().items()}
    train(engine, 10)
    written = (tmp_path / "history.jsonl").read_text()
    engine.module.load_state_dict(best)
    engine.load_masks(tmp_path / "best")
    engine.close()
    assert (tmp_path / "history.jsonl").read_text() == written
