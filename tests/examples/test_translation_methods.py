"""What the example adds around the methods: parallel GaP's workers, learning-rate restarts, a teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import run as common
from test_translation_train import (  # noqa: F401
    GAP,
    SCRIPT,
    Job,
    arguments,
    finished,
    here,
    results,
    rows,
    run,
    write_json,
)

from gap_ds import GaPConfig, schedule

PARALLEL = {**GAP, "method": "parallel", "phase_steps": 4, "rounds": 2, "finetune_steps": 4}


def test_workers_meet_and_worker_0_is_scored(here: Path) -> None:  # noqa: F811
    gap, out = write_json(here / "parallel.json", PARALLEL), here / "parallel"
    command = [sys.executable, "-m", "gap_ds.cli", "parallel", "--workers", "2", "--", SCRIPT]
    command += arguments(here, out, "--resume", gap=gap)
    with Job(*command) as job:
        assert job.wait() == 0, job.text[-4000:]
        assert "worker 1: done after 8 steps." in job.text
    first, second = results(out / "worker_0"), results(out / "worker_1")
    assert first["kept"] * 2 == first["numel"] and "bleu" in first and first["applied_steps"] == 12
    assert second["worker"] == 1 and second["applied_steps"] == 8 and "bleu" not in second
    assert len(list((out / "exchange").glob("round_*/worker_*.safetensors"))) == 4
    # Both have one learning rate, although worker 0 goes on for longer.
    assert [row["lr"] for row in rows(out / "worker_1")] == [row["lr"] for row in rows(out / "worker_0")][:8]
    with Job(*command) as again:
        assert again.wait() == 0, again.text[-4000:]
        assert "worker 0: was done before." in again.text and "worker 1: was done before." in again.text


@pytest.mark.parametrize(
    ("gap", "more", "message"),
    [
        (GAP, ["--gap-worker", "0"], r'--gap-worker: has no effect with method="cyclic". Remove it.'),
        (GAP, ["--exchange", "x"], r'--exchange: has no effect with method="cyclic". Remove it.'),
        (PARALLEL, [], r"every worker is a job of its own. Start all by gap-ds parallel --workers 2 -- "),
        (PARALLEL, ["--gap-worker", "2"], r"--gap-worker 2: must be below 2, the number of partitions."),
        (PARALLEL, ["--gap-worker", "-1"], r"gap_worker=-1: must be at least 0. Set --gap-worker."),
        (GAP, ["--teacher", "nowhere", "--distillation", "1"], r"distillation=1.0: must lie in \[0, 1\)"),
        (GAP, ["--teacher", "nowhere"], r"model 'nowhere': must be a folder or hub name"),
    ],
)
def test_mistakes(
    here: Path,  # noqa: F811
    run: Callable[..., int],  # noqa: F811
    tmp_path: Path,
    gap: dict[str, Any],
    more: list[str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(arguments(here, tmp_path / "out", *more, gap=write_json(tmp_path / "gap.json", gap)))


def test_a_teacher_changes_the_fine_tuning_alone(
    here: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    run: Callable[..., int],  # noqa: F811
    tmp_path: Path,
) -> None:
    gap = str(here / "short.json")  # 4 steps with masks that change, 2 of fine-tuning
    assert run(arguments(here, tmp_path / "taught", "--teacher", str(finished / "model"), gap=gap)) == 0
    taught, alone = ([row["loss"] for row in rows(out)] for out in (tmp_path / "taught", finished))
    assert taught[:4] == alone[:4] and taught[4] != alone[4]


@pytest.mark.parametrize("lr", ["continuous", "restart"])
def test_learning_rate(lr: str) -> None:
    """Linear to zero, over the run or over each phase, whatever its length."""
    gap = GaPConfig.load({**GAP, "phase_steps": 10, "finetune_steps": 40, "lr": lr})
    now: list[Any] = [None]
    relative = common.learning_rate(gap, 5, 0, common.linear, lambda: now[0])
    if lr == "continuous":
        assert [relative(step) for step in (0, 30, 60)] == [1.0, 0.5, 0.0]
        return
    for phase in schedule.build(gap).phases:
        now[0] = phase
        assert relative(0) == 1.0 and relative(phase.steps // 2) == 0.5 and relative(phase.steps) == 0.0
