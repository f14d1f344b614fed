"""The tables of benchmarks/quality: rows, plan of the runs, results, runs, and pages."""

from __future__ import annotations

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parents[2]
QUALITY = ROOT / "benchmarks" / "quality"
sys.path[:0] = [str(QUALITY), str(ROOT / "examples")]

import presets  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
import run as runner  # noqa: E402
from common import arguments  # noqa: E402
from common import run as common  # noqa: E402

from gap_ds import GaPConfig  # noqa: E402
from gap_ds.method import schedule  # noqa: E402

SMALL = replace(presets.SMOKE, rows=("dense", "static", "cyclic_3"))


def small_run(name: str = "static", seed: int = 0, preset: presets.Preset = SMALL) -> records.Run:
    row = rows.BY_NAME[name]
    return records.Run(preset, row, 0.0 if row.dense else 0.8, seed)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", (8, 4, 6, 20))
@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.name)
def test_every_row_is_a_config_of_exactly_the_budget(row: rows.Row, epochs: int) -> None:
    config = row.config(0.0 if row.dense else 0.9, epochs, seed=1)
    assert rows.total_epochs(config) == epochs
    plan = schedule.build(GaPConfig.load(config), steps_per_epoch=247)
    assert plan.total_steps == epochs * 247
    assert GaPConfig.load(config).seed == 1


#: Shipped configs that say to be a row of the table; all others are of other tasks.
SHIPPED = {
    "acdc_90": "acdc",
    "cyclic_80": "cyclic_3",
    "cyclic_90": "cyclic_3",
    "cyclic_90_dense_first": "cyclic_3_dense_first",
    "cyclic_90_erk": "cyclic_3_erk",
    "cyclic_90_random_order": "cyclic_3_random_order",
    "cyclic_90_restart": "cyclic_3_restart",
    "dsd_90": "dsd",
    "gradual_90": "gradual",
    "one_shot_90": "one_shot",
    "parallel_80": "parallel_3",
    "parallel_90": "parallel_3",
    "rigl_90": "rigl",
    "rigl_90_erk": "rigl_erk",
    "set_90": "set",
    "static_90": "static",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_the_row_that_was_measured(name: str) -> None:
    shipped = GaPConfig.load(ROOT / "configs" / "gap" / f"{name}.json")
    measured = GaPConfig.load(rows.BY_NAME[SHIPPED[name]].config(shipped.sparsity, presets.CPU.epochs))
    assert shipped == measured


def test_rows_differ() -> None:
    configs = [json.dumps([row.config(0.0 if row.dense else 0.8, 8), row.workers]) for row in rows.ROWS]
    assert len(set(configs)) == len(configs)
    assert len(rows.BY_NAME) == len(rows.ROWS) == len({row.title for row in rows.ROWS})


@pytest.mark.parametrize("module", (rows, runner, report), ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


EXTRA: dict[str, tuple[Any, str]] = {
    "length": (
        {"mine": {"method": "dsd", "rounds": 1, "phase_epochs": 2, "finetune_epochs": 2}},
        "lasts 6 epochs",
    ),
    "taken": ({"rigl": {}}, "is the name of a row"),
    "name": ({"a/b": {}}, "a name must be of letters"),
    "sparsity": ({"mine": {"sparsity": 0.5}}, '"sparsity" is set by the table'),
    "steps": ({"mine": {"phase_steps": 5}}, "must be in epochs"),
    "dense": ({"mine": {"method": "dense", "rounds": 1, "phase_epochs": 8}}, "is a row of the table already"),
    "list": ([1], "must hold an object"),
}


@pytest.mark.parametrize("mistake", EXTRA)
def test_a_mistake_in_extra_rows_is_named(mistake: str, tmp_path: Path) -> None:
    content, message = EXTRA[mistake]
    (tmp_path / "extra.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        rows.extra_rows(tmp_path / "extra.json", 8)


def test_extra_rows_are_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "extra.json"
    path.write_text(json.dumps({"ramped": {"partitions": 3, "phase_epochs": 1, "rounds": 2, "finetune_epochs": 2}}))
    (row,) = rows.extra_rows(path, 8)
    assert row.config(0.9, 8, 1)["sparsity"] == 0.9 and row.workers == 1
    assert runner.main(["--preset", "smoke", "--extra", str(path), "--results", str(tmp_path), "--list"]) == 0
    assert capsys.readouterr().out.split() == ["ramped_s0.8_seed0", "to", "run"]


# --- planning ---------------------------------------------------------------------------------------------------------


def planned(*arguments: str) -> list[str]:
    args = runner.parser().parse_args(["--preset", "cpu", *arguments])
    return [run.name for run in runner.plan(presets.CPU, args)]


def test_seed_0_of_all_rows_comes_first_and_dense_is_run_once() -> None:
    names = planned()
    assert names[0] == "dense_s0_seed0"
    assert sorted(names, key=lambda name: name[-1]) == names
    assert len(set(names)) == len(names) == 2 + 2 * (6 * 2 + 5)
    assert [name for name in names if name.startswith("dense")] == ["dense_s0_seed0", "dense_s0_seed1"]


def test_rows_sparsities_and_seeds_can_be_chosen() -> None:
    chosen = planned("--rows", "set", "dense", "--sparsities", "0.5", "--seeds", "3", "4")
    assert chosen == ["dense_s0_seed3", "set_s0.5_seed3", "dense_s0_seed4", "set_s0.5_seed4"]
    assert planned("--rows", "parallel_3", "--sparsities", "0.8") == ["parallel_3_s0.8_seed0"]


@pytest.mark.parametrize(
    "arguments",
    (["--rows", "nothing"], ["--sparsities", "0"], ["--sparsities", "1"], ["--jobs", "0"], ["--out", "x"], []),
    ids=" ".join,
)
def test_a_mistake_in_the_command_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["--preset", "cpu", "--results", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")


def test_a_command_holds_no_path_of_this_machine_and_is_understood_by_the_example() -> None:
    command = small_run("rigl", preset=presets.CPU).command(Path("DATA"), Path("OUT"))
    assert command == (
        "python examples/translation/train.py --gap-config OUT/rigl_s0.8_seed0/gap.json --backend none "
        "--dataset DATA/wmt16_multi30k --preset tiny --test-split test_2016_flickr --dropout 0.0 --bf16 --threads 1 "
        "--seed 0 --resume --output-dir OUT/rigl_s0.8_seed0"
    ).split(" ")


def test_a_row_of_several_workers_has_another_command() -> None:
    run = small_run("parallel_3")
    words = run.command(Path("DATA"), Path("OUT"))
    assert " ".join(words).startswith(
        "python -m gap_ds.cli parallel --workers 3 --ranks-per-worker 1 -- examples/translation/train.py --gap-config "
    )
    # `folders` are the output folders of the example's workers.
    given = arguments.RunArguments(gap_config=words[-1], output_dir=words[words.index("--output-dir") + 1])
    for index, folder in enumerate(run.folders(Path("OUT"))):
        of_worker, worker = common.gap_worker(replace(given, gap_worker=index), GaPConfig(**run.config), (), "train.py")
        assert Path(of_worker.output_dir) == folder
        assert worker is not None and worker.exchange == "OUT/parallel_3_s0.8_seed0/exchange"


def test_a_set_up_is_what_changes_a_result() -> None:
    run = small_run()
    assert "|warmup_steps:20|label_smoothing:0.1|" in run.setup  # given, and the example's default
    assert run.setup == small_run(seed=1).setup
    assert run.setup != small_run("cyclic_3").setup
    assert run.setup != replace(run, preset=replace(SMALL, arguments={**SMALL.arguments, "dropout": 0.3})).setup
    assert run.setup == replace(run, preset=replace(SMALL, jobs=7, threads=3, about="")).setup


@pytest.mark.parametrize("example", presets.EXAMPLES, ids=lambda example: Path(example.script).parent.name)
def test_defaults_are_those_of_the_example(example: presets.Example) -> None:
    """Read in a separate process: the scripts of all examples are called `train`."""
    pytest.importorskip("transformers")
    script = ROOT / example.script
    code = "import json, sys, train; print(json.dumps(vars(train.Arguments(gap_config='', output_dir=''))))"
    result = subprocess.run([sys.executable, "-c", code], cwd=script.parent, capture_output=True, text=True, check=True)
    values = json.loads(result.stdout.splitlines()[-1])
    assert {name: records.defaults(example.script)[name] for name in example.matter} == {
        name: values[name] for name in example.matter
    }


# --- results ----------------------------------------------------------------------------------------------------------


def record(run: records.Run, bleu: float = 30.0, **others: Any) -> records.Record:
    """A record like those of `collect`, with made-up figures."""
    figures = {"bleu": bleu, "chrf": 55.0, "epochs": 8.0, "training_flops": 0.6, "mean_density": 0.4}
    figures |= {"train_seconds": 90.0}
    machine = {"machine": "x86_64 CPU", "cores": 2, "torch": "2.13.0", "gap_ds": "0.1.0"}
    known = {
        "row": run.row.name,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "setup": run.setup,
        "workers": run.row.workers,
    }
    return {**known, **figures, **machine, **others}


def test_a_result_is_appended_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "quality_x.jsonl"
    assert records.read(path) == []
    assert records.append(path, record(small_run()))
    assert records.append(path, record(small_run(seed=1)))
    assert not records.append(path, record(small_run(), bleu=99.0))
    assert [(found["seed"], found["bleu"]) for found in records.read(path)] == [(0, 30.0), (1, 30.0)]


def test_what_a_kill_has_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "quality_x.jsonl"
    records.append(path, record(small_run()))
    path.write_bytes(path.read_bytes() + b'{"row": "sta')
    with pytest.raises(ValueError, match="line 2"):
        records.read(path)
    records.append(path, record(small_run(seed=1)))
    assert [found["seed"] for found in records.read(path)] == [0, 1]


def leave_results(run: records.Run, out: Path, **others: Any) -> None:
    """Write the files of a finished run, like the example."""
    for number, folder in enumerate(run.folders(out)):
        folder.mkdir(parents=True)
        arguments = {**records.expected(run.preset), "seed": run.seed, "threads": 1, "dataset": None}
        results = {
            **{"bleu": 30.12345, "bleu_uncased": 31.0, "chrf": 55.0, "signatures": {"bleu": "BLEU|..."}},
            **{"signature": "gap|...", "applied_steps": 80, "steps_per_epoch": 10, "dense": False, "device": "cpu"},
            **{"training_flops": 0.5 + number, "mean_density": 0.4, "entry_sparsity": 0.8, "model_sparsity": 0.7},
            **{"train_seconds": 4.0, "trained_from_step": 0, "score_seconds": 1.0, "torch": "2.13.0"},
            **{"arguments": {**arguments, **others.pop("arguments", {})}, **others},
        }
        (folder / "results.json").write_text(json.dumps(results))
        lines = [
            {"kind": "train", "step": 10, "seconds": 7.0, "loss": 3.0},
            {"kind": "validation", "step": 10, "seconds": 8.0, "loss": 2.00006},
            {"kind": "validation", "step": 20, "seconds": 4.0, "loss": 1.5},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_finished_run_becomes_a_record(tmp_path: Path) -> None:
    run = small_run()
    assert not records.finished(run, tmp_path)
    leave_results(run, tmp_path)
    assert records.finished(run, tmp_path)
    found = records.collect(run, tmp_path)
    assert records.key(found) == run.key
    assert (found["bleu"], found["epochs"], found["training_flops"], found["train_seconds"]) == (30.123, 8.0, 0.5, 4.0)
    assert found["validation_loss"] == [2.0001, 1.5]
    assert found["config"] == run.config
    assert str(tmp_path) not in json.dumps(found)


def test_seconds_of_a_run_that_went_on_are_those_of_all_its_parts(tmp_path: Path) -> None:
    leave_results(small_run(), tmp_path, trained_from_step=10)
    assert records.collect(small_run(), tmp_path)["train_seconds"] == 12.0


def test_workers_are_added_up(tmp_path: Path) -> None:
    run = small_run("parallel_3")
    leave_results(run, tmp_path)
    found = records.collect(run, tmp_path)
    assert (found["training_flops"], found["train_seconds"], found["workers"]) == (0.5 + 1.5 + 2.5, 12.0, 3)


@pytest.mark.parametrize("wrong", ({"lr": 1.0}, {"seed": 5}, {"dataset": "elsewhere/other"}), ids=str)
def test_a_run_that_was_another_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    leave_results(small_run(), tmp_path, arguments=wrong)
    with pytest.raises(ValueError, match=f"was run with {next(iter(wrong))}="):
        records.collect(small_run(), tmp_path)


def test_a_folder_of_another_set_up_is_refused(tmp_path: Path) -> None:
    run = small_run()
    records.check_folder(run, tmp_path)
    folder = tmp_path / run.name
    folder.mkdir()
    (folder / "gap.json").write_text(json.dumps({**run.config, "phase_epochs": 1}))  # 1 for 1.0, and made by hand
    records.check_folder(run, tmp_path)
    (folder / "setup.txt").write_text(run.setup + "\n")
    records.check_folder(run, tmp_path)
    for name, content in (("setup.txt", "quality|other\n"), ("gap.json", json.dumps({"method": "rigl"}))):
        (folder / "setup.txt").unlink(missing_ok=True)
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="another set-up"):
            records.check_folder(run, tmp_path)


def test_sets_are_joined(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part, order in (("one", ("en", "de")), ("two", ("de", "en"))):
        (tmp_path / part).mkdir()
        for split in ("train", "validation", "test"):
            pair = {language: f"{language} {part} {split}" for language in order}
            kind = pa.struct([(language, pa.string() if part == "one" else pa.large_string()) for language in order])
            pairs = pa.array([pair], type=kind)
            pq.write_table(pa.table({"other": [1], "translation": pairs}), tmp_path / part / f"{split}.parquet")
    both = replace(SMALL, parts=("one", "two"))
    folder = records.joined(both, tmp_path, tmp_path / "out")
    assert folder == records.dataset(both, tmp_path, tmp_path / "out")
    found = {path.stem: pq.read_table(path).to_pylist() for path in sorted(folder.iterdir())}
    assert [row["translation"]["en"] for row in found["train"]] == ["en one train", "en two train"]
    assert [row["translation"]["de"] for row in found["train"]] == ["de one train", "de two train"]
    assert [found[split][0]["translation"]["en"] for split in ("validation", "test")] == [
        "en two validation",
        "en two test",
    ]
    with pytest.raises(ValueError, match="Set --data"):
        records.joined(replace(both, parts=("one", "three")), tmp_path, tmp_path / "out")


# --- running, with a script in place of the example -------------------------------------------------------------------

SCRIPT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
print("step 3/4", flush=True)
{body}
(folder / "results.json").write_text((folder / "prepared.json").read_text())
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], list[str]]:
    """Set the scripts of the runs, by name; return the arguments of `main`."""

    def prepare(bodies: dict[str, str]) -> list[str]:
        def command(run: records.Run, data: Path, out: Path, python: str = "python") -> list[str]:
            folder = out / run.name
            if not (folder / "prepared.json").exists() and python != "python":
                leave_results(run, tmp_path / "prepared")
                source = tmp_path / "prepared" / run.name
                (source / "results.json").rename(folder / "prepared.json")
                (source / "metrics.jsonl").rename(folder / "metrics.jsonl")
            return [python, "-c", SCRIPT.format(body=bodies.get(run.row.name, "")), str(folder)]

        monkeypatch.setattr(records.Run, "command", command)
        rows = ["--rows", "dense", "static", "cyclic_3"]
        return ["--preset", "smoke", *rows, "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]

    return prepare


def stored(tmp_path: Path) -> list[str]:
    return [found["row"] for found in records.read(tmp_path / "results" / "quality_smoke.jsonl")]


def test_a_run_that_fails_does_not_stop_the_others_and_is_run_again(
    scripted: Callable[[dict[str, str]], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = scripted({"static": "sys.exit('the reason')"})
    assert runner.main([*arguments, "--jobs", "2"]) == 1
    shown = capsys.readouterr().out
    assert "static_s0.8_seed0: FAILED, ended with status 1" in shown and "the reason" in shown
    assert sorted(stored(tmp_path)) == ["cyclic_3", "dense"]
    arguments = scripted({"dense": "sys.exit('must not be run again')"})
    assert runner.main([*arguments, "--list"]) == 0
    listed = re.findall(r"seed0 +(.*)", capsys.readouterr().out)
    assert listed == ["finished", "to go on", "finished"]
    assert runner.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 runs are finished already" in shown and "FAILED" not in shown
    assert stored(tmp_path)[-1] == "static"


def test_a_finished_run_is_collected_without_being_run(
    scripted: Callable[[dict[str, str]], list[str]], tmp_path: Path
) -> None:
    arguments = scripted({})
    assert runner.main(arguments) == 0
    (tmp_path / "results" / "quality_smoke.jsonl").unlink()
    assert runner.main(scripted(dict.fromkeys(("dense", "static", "cyclic_3"), "sys.exit(1)"))) == 0
    assert stored(tmp_path) == ["dense", "static", "cyclic_3"]


def test_an_interrupt_ends_the_children(
    scripted: Callable[[dict[str, str]], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "saved"
    waits = f"try:\n    time.sleep(60)\nfinally:\n    pathlib.Path({str(marker)!r}).touch()"
    arguments = scripted({"dense": waits})
    seen: list[runner.Job] = []

    def update(table: runner.Table, jobs: list[runner.Job], waiting: int) -> None:
        if "step 3/4" in jobs[0].log.read_text():  # the child is inside its `try`, or about to enter it
            seen.append(jobs[0])
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.Table, "update", update)
    before = signal.getsignal(signal.SIGTERM)
    assert runner.main([*arguments, "--jobs", "1"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert marker.exists() and seen[0].process.returncode
    assert not (tmp_path / "results").exists()


def test_a_run_is_not_started_twice(tmp_path: Path, scripted: Callable[[dict[str, str]], list[str]]) -> None:
    scripted({"static": "time.sleep(60)"})
    run = small_run()
    job = runner.start(run, tmp_path, tmp_path / "out")
    try:
        with pytest.raises(runner.Busy, match="another process"):
            runner.start(run, tmp_path, tmp_path / "out")
    finally:
        runner.stop([job], grace=20)
    assert job.process.returncode


def test_progress_is_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert runner.fraction(log, 0) == 0.0
    log.write_text("step 50/200  loss 3\nsomething\nstep 100/200  loss 2\nmore\n")
    assert runner.fraction(log, 0) == 0.5
    assert runner.fraction(log, log.stat().st_size) == 0.0
    log.write_text("[worker 1] step 9/10\n[worker 0] step 1/10  loss 3\n")
    assert runner.fraction(log, 0) == 0.1


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "quality_smoke.jsonl"
    for bleu, run in (
        (35.0, small_run("dense")),
        (33.0, small_run("cyclic_3")),
        (32.0, small_run("cyclic_3", seed=1)),
        (30.0, small_run("static")),
        (31.6, small_run("gradual")),
        (29.0, replace(small_run("static"), sparsity=0.9)),
    ):
        records.append(path, record(run, bleu))
    return path


def test_the_table(results: Path) -> None:
    assert report.main(["--results", str(results.parent), "--no-plot"]) == 0
    page = results.with_suffix(".md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("|")][2:] == [
        "| dense | 0% | 35.0 | 35.0 | 55.0 | 8 | 0.60 | 0.40 | 1.5 |",
        "| C-GaP, 3 partitions | 80% | **32.5** | 33.0, 32.0 | 55.0 | 8 | 0.60 | 0.40 | 1.5 |",
        # no further behind than two seeds of one method differ
        "| gradual magnitude pruning | 80% | **31.6** | 31.6 | 55.0 | 8 | 0.60 | 0.40 | 1.5 |",
        "| fixed random mask, learning-rate restarts | 80% | 30.0 | 30.0 | 55.0 | 8 | 0.60 | 0.40 | 1.5 |",
        "| fixed random mask, learning-rate restarts | 90% | **29.0** | 29.0 | 55.0 | 8 | 0.60 | 0.40 | 1.5 |",
    ]
    assert "up to 1.0 BLEU at 80%;" in page and "no run was faster" in page and "Left out" not in page


def test_results_of_another_set_up_are_left_out(results: Path) -> None:
    changed = replace(SMALL, arguments={**SMALL.arguments, "dropout": 0.3})
    before = report.latest(records.read(results))
    records.append(results, {**record(small_run("static", seed=1)), "setup": before.task + "|gap:00000000"})
    page = report.markdown("smoke", report.latest(records.read(results)))
    assert "Left out: 2 results" in page  # the two of `static` with the config that it had before
    records.append(results, record(small_run("static", preset=changed), 10.0))
    found = report.latest(records.read(results))
    assert ([one["bleu"] for one in found.kept], found.left_out) == ([10.0], 7)


def test_the_plot(results: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main(["--results", str(results.parent), "--preset", "smoke"]) == 0
    png = results.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_no_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(tmp_path), "--preset", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: no results of 'cpu'")


def test_presets_name_rows_that_exist() -> None:
    for preset in presets.PRESETS.values():
        assert set(preset.rows) <= set(rows.BY_NAME)
        assert set(preset.arguments) <= set(preset.example.matter)
        assert set(preset.settings) <= set(preset.rows)
        assert preset.parts or preset is presets.SMOKE


# --- a whole table ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smoke_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(QUALITY / "run.py"), "--preset", "smoke", "--out", str(tmp_path / "runs")]
    command += ["--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["row"]: line for line in records.read(tmp_path / "quality_smoke.jsonl")}
    assert tuple(found) == presets.SMOKE.rows
    assert all(line["epochs"] == 8 and len(line["validation_loss"]) == 8 for line in found.values())
    assert found["dense"]["training_flops"] == 1 > found["cyclic_3"]["training_flops"] > found["rigl"]["training_flops"]
    assert str(tmp_path) not in (tmp_path / "quality_smoke.jsonl").read_text()
    assert report.main(["--results", str(tmp_path), "--no-plot"]) == 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "4 of 4 runs are finished already" in again.stdout
