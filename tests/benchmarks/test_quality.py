"""The tables of benchmarks/quality: rows, plan of the runs, results, and pages."""

from __future__ import annotations

import doctest
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quality_runs import ROOT, SMALL, leave_results, record, small_run

pytest.importorskip("rich")

import compare
import presets
import records
import report
import rows
import run as runner
from common import arguments
from common import run as common

from gap_ds import GaPConfig
from gap_ds.method import schedule

# --- rows -------------------------------------------------------------------------------------------------------------


def sparsity(row: rows.Row, usual: float = 0.9) -> float:
    return 0.0 if row.dense else (row.sparsities or [usual])[0]


@pytest.mark.parametrize("epochs", (8, 4, 6, 20))
@pytest.mark.parametrize("row", [row for row in rows.ROWS if not row.after_dense], ids=lambda row: row.name)
def test_every_row_is_a_config_of_exactly_the_budget(row: rows.Row, epochs: int) -> None:
    config = row.config(sparsity(row), epochs, seed=1)
    assert rows.total_epochs(config) == epochs
    plan = schedule.build(GaPConfig.load(config), steps_per_epoch=247)
    assert plan.total_steps == epochs * 247
    assert GaPConfig.load(config).seed == 1


#: Shipped configs that say to be a row of the table; all others are of other tasks.
SHIPPED = {
    "acdc_90": "acdc",
    "cyclic_80": "cyclic_2_rising_scaled",
    "cyclic_80_paper": "cyclic_3",
    "cyclic_90": "cyclic_2_rising_scaled",
    "cyclic_90_paper": "cyclic_3",
    "cyclic_95": "cyclic_2_rising_scaled",
    "cyclic_90_dense_first": "cyclic_3_dense_first",
    "cyclic_80_erk": "cyclic_2_rising_scaled_erk",
    "cyclic_90_erk": "cyclic_2_rising_scaled_erk",
    "cyclic_90_random_order": "cyclic_3_random_order",
    "cyclic_90_restart": "cyclic_3_restart",
    "dsd_90": "dsd",
    "gradual_90": "gradual",
    "one_shot_90": "one_shot",
    "parallel_80": "parallel_3",
    "parallel_90": "parallel_3",
    "rigl_90": "rigl",
    "rigl_90_erk": "rigl_erk",
    "cyclic_2of4": "cyclic_2_rising_scaled_2of4",
    "language_pretrained_80": "cyclic_2_rising_scaled_pretrained",
    "language_pretrained_90": "cyclic_2_rising_scaled_pretrained",
    "language_pretrained_2of4": "cyclic_2_rising_scaled_2of4_pretrained",
    "set_90": "set",
    "static_90": "static",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_the_row_that_was_measured(name: str) -> None:
    shipped = GaPConfig.load(ROOT / "configs" / "gap" / f"{name}.json")
    epochs = 3 if "pretrained" in name else presets.CPU.epochs
    config = rows.BY_NAME[SHIPPED[name]].make(epochs)  # lengths before they are chosen for equal FLOPs
    config = {key: round(value, 9) if isinstance(value, float) else value for key, value in config.items()}
    assert shipped == GaPConfig.load({**config, "sparsity": shipped.sparsity, "seed": shipped.seed})


def test_rows_differ() -> None:
    configs = [
        json.dumps([row.config(sparsity(row, 0.8), 8), row.workers, row.taught, row.pretrained]) for row in rows.ROWS
    ]
    assert len(set(configs)) == len(configs)
    assert len(rows.BY_NAME) == len(rows.ROWS) == len({row.title for row in rows.ROWS})


@pytest.mark.parametrize("module", (rows, runner, report, compare), ids=lambda module: module.__name__)
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


EQUALISED = ["cyclic_3", *(row.name for row in rows.ROWS if row.equal_flops and not row.after_dense)]


@pytest.mark.parametrize("epochs", (8, 1))
@pytest.mark.parametrize("name", EQUALISED)
def test_lengths_give_the_flops_of_gradual_pruning(name: str, epochs: int) -> None:
    row = replace(rows.BY_NAME[name], equal_flops=True)
    planned = []
    for given in (row, rows.BY_NAME["gradual"]):
        config = GaPConfig.load(given.config(sparsity(given), epochs))
        plan = schedule.build(config, steps_per_epoch=247)
        kept = round(10 * (1 - config.sparsity))
        # FLOPs are linear in the sparsity: both as if at 90 %.
        density = plan.mean_density([kept] * config.kappa, [10] * config.kappa)
        planned.append(1 - 0.9 * (1 - density) / config.sparsity)
        assert plan.total_steps == epochs * 247
    assert planned[0] == pytest.approx(planned[1], abs=0.01)


def test_equal_flops_that_no_length_gives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "extra.json"
    # Half of the weights are dense for the whole exploration, which is nearly the whole run.
    config = {"partitions": 2, "phase_epochs": 3.75, "rounds": 1, "finetune_epochs": 0.5, "equal_flops": True}
    path.write_text(json.dumps({"long": config}))
    (row,) = rows.extra_rows(path, 8)
    with pytest.raises(ValueError, match="no dense_epochs makes them equal"):
        row.config(0.9, 8)


# --- planning ---------------------------------------------------------------------------------------------------------


def planned(*arguments: str) -> list[str]:
    args = runner.parser().parse_args(["--preset", "cpu", *arguments])
    return [run.name for run in runner.plan(presets.CPU, args)]


def test_language_models_begin_with_and_learn_from_the_dense_run_of_their_seed(tmp_path: Path) -> None:
    preset = presets.LANGUAGE_CPU
    args = runner.parser().parse_args(["--preset", "language_cpu"])
    runs = runner.plan(preset, args)
    assert runs[0].row.dense and len(runs) == 2 * 21 == len({run.key for run in runs})
    assert {run.sparsity for run in runs if "2of4" in run.name} == {0.5}
    assert {run.sparsity for run in runs if run.row.name == "cyclic_2_rising_scaled_taught"} == {0.8, 0.9}
    for flag, wants in {"--teacher": "taught", "--model-name": "pretrained"}.items():
        run = next(run for run in runs if getattr(run.row, wants) and run.seed == 1)
        words = run.command(tmp_path, tmp_path)
        assert words[words.index(flag) + 1] == str(tmp_path / "dense_s0_seed1" / "model")
        assert flag not in runs[0].command(tmp_path, tmp_path)
        with pytest.raises(ValueError, match="the dense model is not there"):
            runner.start(run, tmp_path, tmp_path)
        assert not (tmp_path / run.name).exists()
    arguments = records.expected(preset)
    assert arguments["context"] == 128 and arguments["lr"] == 1e-3 and arguments["label_smoothing"] == 0.0


def test_seed_0_of_all_rows_comes_first_and_dense_is_run_once() -> None:
    names = planned()
    assert names[0] == "dense_s0_seed0"
    assert sorted(names, key=lambda name: name[-1]) == names
    chosen = [rows.BY_NAME[name] for name in presets.CPU.rows]
    assert len(set(names)) == len(names) == 4 + 3 * sum(len(row.seeds) for row in chosen if not row.dense)
    assert [name for name in names if name.startswith("dense")] == [f"dense_s0_seed{seed}" for seed in range(4)]


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


@pytest.mark.full
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


def test_a_finished_run_becomes_a_record(tmp_path: Path) -> None:
    run = small_run()
    assert not records.finished(run, tmp_path)
    leave_results(run, tmp_path, also_scored={"news": {"bleu": 9.1234, "bleu_uncased": 9.5, "chrf": 30.0}})
    assert records.finished(run, tmp_path)
    found = records.collect(run, tmp_path)
    assert records.key(found) == run.key
    assert found["also_scored"] == {"news": {"bleu": 9.123, "bleu_uncased": 9.5, "chrf": 30.0}}
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
    shutil.copy(tmp_path / "one" / "test.parquet", tmp_path / "one" / "news.parquet")
    both = replace(SMALL, parts=("one", "two"), also_score=("news",))
    folder = records.joined(both, tmp_path, tmp_path / "out")
    assert folder == records.dataset(both, tmp_path, tmp_path / "out")
    found = {path.stem: pq.read_table(path).to_pylist() for path in sorted(folder.iterdir())}
    assert [row["translation"]["en"] for row in found["train"]] == ["en one train", "en two train"]
    assert [row["translation"]["de"] for row in found["train"]] == ["de one train", "de two train"]
    held_out = {split: found[split][0]["translation"]["en"] for split in ("validation", "test", "news")}
    assert held_out == {"validation": "en two validation", "test": "en two test", "news": "en one test"}
    with pytest.raises(ValueError, match="Set --data"):
        records.joined(replace(both, parts=("one", "three")), tmp_path, tmp_path / "out")


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


def page_rows(results: Path) -> list[list[str]]:
    """Return the figures of the rows of a page without epochs, density and minutes, and the page's head."""
    assert report.main(["--results", str(results.parent), "--no-plot"]) == 0
    lines = results.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    return [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]


def test_the_table(results: Path) -> None:
    head, *found = page_rows(results)
    columns = ("method", "sparsity", "seeds", "validation loss", "BLEU", "training FLOPs", "of gradual's")
    assert [[row[head.index(column)] for column in columns] for row in found] == [
        ["dense", "0%", "1", "1.500", "35.0", "0.60", ""],
        ["C-GaP, 3 partitions", "80%", "2", "**1.750 ± 0.050**", "32.5 ± 0.5", "0.60", "1.00"],
        # Two standard errors of the difference: 2 x 0.071 x sqrt(1/1 + 1/2) = 0.173.
        ["gradual magnitude pruning", "80%", "1", "**1.840**", "31.6", "0.60", "1.00"],
        ["fixed random mask, learning-rate restarts", "80%", "1", "2.000", "30.0", "0.60", "1.00"],
        ["fixed random mask, learning-rate restarts", "90%", "1", "**2.100**", "29.0", "0.60", ""],
    ]
    page = results.with_suffix(".md").read_text(encoding="utf-8")
    assert "0.071 at 80% (pooled" in page and "no run was faster" in page and "Left out" not in page


def test_differences_are_paired_by_seed(results: Path) -> None:
    for seed, bleu in ((1, 33.6), (2, 30.0)):
        records.append(results, record(small_run("gradual", seed=seed), bleu))
    records.append(results, record(small_run("static", seed=7), 30.0))  # no seed of gradual pruning
    head, *found = page_rows(results)
    loss, score = (i for i, column in enumerate(head) if column == "to gradual")
    by_row = {(row[0], row[1]): (row[loss], row[score]) for row in found}
    # C-GaP less gradual pruning: 33.0 - 31.6 and 32.0 - 33.6, of which t = -0.1 / 1.5 and p = 1 - 2/pi arctan(1/15)
    assert by_row["C-GaP, 3 partitions", "80%"] == ("+0.010 ± 0.150, p 0.96", "-0.1 ± 1.5, p 0.96")
    assert by_row["fixed random mask, learning-rate restarts", "80%"] == ("+0.160", "-1.6")
    assert by_row["gradual magnitude pruning", "80%"] == ("", "")
    assert by_row["dense", "0%"] == ("", "")


def test_scores_of_other_splits_have_columns(tmp_path: Path) -> None:
    for seed in (0, 1):
        news = {"test_news": {"bleu": 8.0 + seed, "chrf": 30.0}}
        records.append(tmp_path / "quality_smoke.jsonl", record(small_run(seed=seed), also_scored=news))
    head, found = page_rows(tmp_path / "quality_smoke.jsonl")
    assert found[head.index("BLEU on test_news")] == "8.5 ± 0.5"


def test_extra_rows_are_compared_with_the_table(results: Path) -> None:
    extra = results.with_name("quality_smoke_extra.jsonl")
    run = replace(small_run("cyclic_3"), row=rows.Row("mine", "mine", rows.BY_NAME["cyclic_3"].make))
    records.append(extra, record(run, 32.6))
    head, mine = page_rows(extra)
    assert mine[head.index("to gradual")] == "-0.100"


def test_the_paired_test_is_that_of_a_table() -> None:
    """Quantiles of Student's t at 95 and 99 %, from a printed table."""
    for t, freedom, p in ((4.303, 2, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01), (1.96, 100_000, 0.05)):
        assert compare.two_sided_p(t, freedom) == pytest.approx(p, rel=1e-3)
    assert compare.paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}) == compare.Difference(0.5, 0.0, 2, 0.0)
    assert compare.paired({0: 1.0}, {1: 1.0}) is None


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
        assert preset.parts or preset in (presets.SMOKE, presets.GPU_SHORT)
