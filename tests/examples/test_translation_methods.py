"""What the example adds around the methods: parallel GaP's workers, learning-rate restarts, a teacher."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train
from common import run as common
from test_translation_train import (  # noqa: F401
    GAP,
    SCRIPT,
    ZERO2,
    Job,
    arguments,
    finished,
    here,
    results,
    rows,
    run,
    write_json,
)

from gap_ds import GaPConfig, ParallelWorker
from gap_ds.method import schedule
from gap_ds.parallel import Exchange
from gap_ds.sharding.comm import Comm

PARALLEL = {**GAP, "method": "parallel", "phase_steps": 4, "rounds": 2, "finetune_steps": 4}


@pytest.mark.full
def test_workers_meet_and_worker_0_is_scored(here: Path) -> None:  # noqa: F811
    gap, out = write_json(here / "parallel.json", PARALLEL), here / "parallel"
    launcher = [sys.executable, "-m", "gap_ds.cli", "parallel", "--workers", "2", "--", SCRIPT]
    command = [*launcher, *arguments(here, out, "--resume", gap=gap)]
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
    with Job(*launcher, *arguments(here, out, "--overwrite", gap=gap)) as anew:
        assert anew.wait() == 2
        assert re.search(rf"exchange='{out / 'exchange'}': worker [01] has published there, in a run", anew.text)
    assert (out / "worker_0" / "results.json").exists()  # refused before anything was deleted


def worker_of(folder: Path, out: Path, *more: str) -> ParallelWorker:
    """What the arguments of a command line make of worker 0."""
    gap = write_json(folder / "parallel.json", PARALLEL)
    args = train.parse(arguments(folder, out, "--gap-worker", "0", *more, gap=gap))
    worker = common.gap_worker(args, GaPConfig.load(PARALLEL), train.FIXED, SCRIPT)[1]
    assert worker is not None
    return worker


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_exchange_folder_of_a_run_before_is_refused(here: Path, tmp_path: Path, more: list[str]) -> None:  # noqa: F811
    published = tmp_path / "exchange" / "round_0"
    published.mkdir(parents=True)
    (published / "worker_1.json").touch()
    assert not worker_of(here, tmp_path, *more).resume
    (published / "worker_0.json").touch()
    with pytest.raises(ValueError, match=r"worker 0 has published there, .* --resume; or start afresh in another --o"):
        worker_of(here, tmp_path, *more)
    assert worker_of(here, tmp_path, "--resume").resume


def test_workers_of_another_precision_or_cut_are_refused(
    here: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bf16 = json.loads(Path(ZERO2).read_text(encoding="utf-8"))
    fp32 = {**bf16, "bf16": {"enabled": False}}
    config = {
        name: write_json(tmp_path / f"{name}.json", value)
        for name, value in {
            "bf16": bf16,
            "fp32": fp32,
            "fp16": fp32 | {"fp16": {"enabled": True}},
            "clipped": fp32 | {"gradient_clipping": 1.0},
            "zero3": fp32 | {"zero_optimization": {"stage": 3}},
        }.items()
    }

    def meet(*more: str) -> None:
        Exchange(worker_of(here, tmp_path, *more), 2, "gap|v:1", "abc", "def", Comm(single=True), Comm(single=True))

    meet()
    meet("--deepspeed_config", config["fp32"])  # the backend is each worker's own matter
    meet("--deepspeed_config", config["zero3"])
    meet("--backend", "fsdp2")
    for more, was, now in (
        (["--deepspeed_config", config["bf16"]], "precision:fp32", "precision:bf16"),
        (["--deepspeed_config", config["fp16"]], "precision:fp32", "precision:fp16"),
        (["--bf16"], "bf16:False", "bf16:True"),
        (["--deepspeed_config", config["clipped"]], "gradient_clipping:0.0", "gradient_clipping:1.0"),
        (["--accumulation", "2"], "accumulation x ranks:1", "accumulation x ranks:2"),
        (["--seed", "1"], "seed:0", "seed:1"),
    ):
        with pytest.raises(ValueError, match=rf'run "{was}" \(here "{now}"\), so settings of the training script'):
            meet(*more)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accumulation x ranks:2"):
        meet()


def test_what_is_too_long_to_be_told_is_told_as_a_hash(here: Path, tmp_path: Path) -> None:  # noqa: F811
    long, longer = (worker_of(here, tmp_path, "--model-name", n * "x").run for n in (1000, 1001))
    assert len(long) == len(longer) == 64 and long != longer


@pytest.mark.parametrize(
    ("gap", "more", "message"),
    [
        (GAP, ["--gap-worker", "0"], r'--gap-worker: has no effect with method="cyclic". Remove it.'),
        (GAP, ["--exchange", "x"], r'--exchange: has no effect with method="cyclic". Remove it.'),
        (PARALLEL, [], r"every worker is a separate job. Start all by gap-ds parallel --workers 2 -- "),
        (PARALLEL, ["--gap-worker", "2"], r"--gap-worker 2: must be below 2, the number of partitions."),
        (PARALLEL, ["--gap-worker", "-1"], r"gap_worker=-1: must be at least 0. Set --gap-worker."),
        (GAP, ["--teacher", "nowhere", "--distillation", "1"], r"distillation=1.0: must lie in \[0, 1\)"),
        (GAP, ["--teacher", "nowhere"], r"model 'nowhere': must be a folder or hub name"),
        (GAP, ["--temperature", "0"], r"temperature=0.0: must be above 0. Set --temperature."),
        (GAP, ["--teacher-phases", "first"], r"teacher_phases='first': must be of dense, explore, finetune."),
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
    """Or the phases that are given, here the first four steps; hidden states add to the loss."""
    gap = str(here / "short.json")  # 4 steps with masks that change, 2 of fine-tuning
    teacher = ["--teacher", str(finished / "model")]
    states = ["--teacher-phases", "explore", "--distillation", "0", "--hidden-distillation", "0.1"]
    for name, more in {"taught": [], "hidden": states}.items():
        assert run(arguments(here, tmp_path / name, *teacher, *more, gap=gap)) == 0
    taught, hidden, alone = (
        [row["loss"] for row in rows(out)] for out in (tmp_path / "taught", tmp_path / "hidden", finished)
    )
    assert taught[:4] == alone[:4] and taught[4] != alone[4]
    assert all(more > loss + 0.01 for more, loss in zip(hidden[:4], alone[:4], strict=True))


@pytest.mark.parametrize("restart", [False, True])
def test_learning_rate(restart: bool) -> None:
    """Linear to zero, over the run or over each phase, whatever its length."""
    gap = GaPConfig.load({**GAP, "phase_steps": 10, "finetune_steps": 40, "lr_restart": restart})
    now: list[Any] = [None]
    relative = common.learning_rate(gap, 5, 0, common.linear, lambda: now[0])
    if not restart:
        assert [relative(step) for step in (0, 30, 60)] == [1.0, 0.5, 0.0]
        return
    for phase in schedule.build(gap).phases:
        now[0] = phase
        assert relative(0) == 1.0 and relative(phase.steps // 2) == 0.5 and relative(phase.steps) == 0.0
