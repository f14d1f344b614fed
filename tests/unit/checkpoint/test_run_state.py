"""state.json and rng_R.json: a run's record survives the file, and belongs to one run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import refused

from gap_ds.checkpoint.run_state import RandomState, State
from gap_ds.method import schedule
from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Entry, Plan
from gap_ds.storage.json import read_json, write_json

STEPS = {"phase_steps": 3, "rounds": 2, "finetune_steps": 2}
CYCLIC = {"sparsity": 0.75, "partitions": 2, **STEPS}
EPOCHS = {"phase_epochs": 0.3, "rounds": 3, "finetune_epochs": 1}
CONFIGS: list[dict[str, Any]] = [
    CYCLIC,
    {**CYCLIC, "distribution": "global"},
    {**CYCLIC, "prune_ramp": 0.7, "update_steps": 1},
    {**CYCLIC, "sparsity": 0.5, "pattern": "2:4"},
    {**CYCLIC, "partitions": [["a|s:0.5", "b"], [r"c\.\d+"]], "include": ["x'|seed:1"], "exclude": ['"']},
    {**CYCLIC, "distribution": {"layers": 0.5, "he|k:ad": 0.25}, "seed": 3, "partition_order": "random"},
    {"method": "rigl", "sparsity": 0.9, "phase_epochs": 6, "finetune_epochs": 2, "update_epochs": 0.1},
    {"method": "parallel", "sparsity": 0.8, "partitions": 3, "unpartitioned": "first", **EPOCHS},
    {"method": "acdc", "sparsity": 0.8, "dense_epochs": 1, **EPOCHS},
    {"method": "one_shot", "sparsity": 0.8, "phase_steps": 3, "finetune_steps": 1},
    {"method": "static", "mask_init": "from_file", "mask_file": "m.safetensors", **STEPS},
]
ENTRIES = (Entry("a", (4, 6), 0, 6, (0, 1)), Entry("b", (6, 4), 1, 6, (1, 0)))


def state_of(settings: dict[str, Any], worker: int | None = None, **changes: Any) -> State:
    config = GaPConfig.load(settings)
    steps = 247 if config.in_epochs else None
    plan = Plan(ENTRIES, config.kappa, 48, 0)
    found = schedule.build(config, steps, worker or 0)
    fields: dict[str, Any] = {
        "applied_steps": 4,
        "signature": config.signature("0"),
        "config": config,
        "steps_per_epoch": steps,
        "plan": plan.fingerprint,
        "entries": [(e.name, list(e.shape), e.partition, e.keep, list(e.dims)) for e in plan.entries],
        "first_steps": [phase.first_step for phase in found.phases],
        "ranks": 1,
        "backend": "plain",
        "worker": worker,
    }
    return State(**{**fields, **changes})


@pytest.mark.parametrize("settings", CONFIGS)
def test_a_state_gives_its_config_schedule_and_plan_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    state = state_of(settings, 1 if settings.get("method") == "parallel" else None, client_state={"epoch": 1})
    write_json(tmp_path / "state.json", state)
    found = read_json(tmp_path / "state.json", State)
    assert found == state and found.config.model_fields_set == state.config.model_fields_set
    assert found.schedule() == schedule.build(state.config, state.steps_per_epoch, state.worker or 0)
    assert found.restore_plan().entries == ENTRIES
    found.check(tmp_path, state)


def test_a_schedule_that_is_not_of_the_config_is_refused() -> None:
    assert "not those of the config" in refused(state_of(CYCLIC, first_steps=[0, 3, 7, 9, 12]).schedule)
    assert "must make at most" in refused(state_of(CYCLIC, config=GaPConfig.load({**CYCLIC, "rounds": 10**9})).schedule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "0" * 16}, "another plan"),
        ({"config": GaPConfig.load({**CYCLIC, "seed": 1})}, "written with seed=0 (now 1)"),
        ({"worker": 1}, "written by worker None, and this is worker 1"),
        ({"first_steps": [0, 4, 8, 12, 16]}, "an epoch had another number of steps"),
        ({"lr_scheduler": [{"x": 1}]}, "another learning-rate scheduler"),
    ],
)
def test_a_state_of_another_run_is_refused(changes: dict[str, Any], message: str) -> None:
    before, now = (state_of(CYCLIC, lr_scheduler=[{"last_epoch": 1}], **more) for more in ({}, {}))
    now = now.model_copy(update=changes)
    assert message in refused(lambda: before.check(Path("x"), now))


def test_random_state_survives_json() -> None:
    before = RandomState.now()
    try:
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        random.gauss(0, 1), np.random.standard_normal()  # both keep a second number for the next call
        state = RandomState.model_validate_json(json.dumps(RandomState.now().model_dump()))

        def drawn() -> list[float]:
            numbers = [random.gauss(0, 1), random.random(), *np.random.standard_normal(2).tolist()]
            return [*numbers, *torch.randn(3).tolist(), *torch.randperm(5).tolist()]

        expected = drawn()
        assert drawn() != expected
        state.restore()
        assert drawn() == expected
        assert all(math.isfinite(number) for number in expected)
    finally:
        before.restore()
