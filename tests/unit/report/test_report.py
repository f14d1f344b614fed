"""`gap-ds report`: golden text, a page that stands alone, figures by hand, and runs that are unfinished or damaged.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/unit/report/test_report.py, and read the difference.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from PIL import Image

from gap_ds import GaPConfig
from gap_ds.method.schedule import build
from gap_ds.report import build as report
from gap_ds.report import drawing, plots
from gap_ds.report import page as report_page
from gap_ds.report import runs as report_runs

ROOT = Path(__file__).resolve().parents[3]

Run = Callable[..., tuple[int, str, str]]
Golden = Callable[[str, str], None]

CYCLIC = {"sparsity": 0.75, "partitions": 2, "phase_epochs": 1, "rounds": 2, "finetune_epochs": 2}
RIGL = {"method": "rigl", "sparsity": 0.75, "phase_epochs": 4, "finetune_epochs": 2, "update_epochs": 0.5}
PER_EPOCH = 10
ENTRIES = {f"model.layers.{i}.fc.weight": i // 2 for i in range(4)}  # name: partition
NUMEL = 64


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.setattr(report_page, "__version__", "0.0.0")
    return command_line


def make_run(folder: Path, config: dict[str, Any], *, finished: bool = True, bleu: bool = False, history: bool = False):
    """A folder such as examples/translation leaves, with figures made up."""
    settings = GaPConfig.model_validate(config)
    signature, schedule = settings.signature("0.0.0"), build(settings, PER_EPOCH)
    folder.mkdir(parents=True)
    keep = NUMEL // 4
    total = schedule.total_steps if finished else PER_EPOCH * 2
    rows = []
    for step in range(1, total + 1):
        rows.append({"kind": "train", "step": step, "loss": 6 / step**0.3, "lr": 0.1, "density": 0.25})
        if step % PER_EPOCH == 0:
            row = {"kind": "validation", "step": step, "epoch": step // PER_EPOCH - 1, "loss": 5 / step**0.3}
            rows.append({**row, **({"bleu": step / 2.0} if bleu else {})})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    kappa = settings.kappa
    entries = {
        name: {"keep": keep, "nonzero": keep, "numel": NUMEL, "partition": k if kappa > 1 else 0}
        for name, k in ENTRIES.items()
    }
    info = {"signature": signature, "config": config, "applied_steps": total, "entry_sparsity": 0.75}
    info |= {"model_sparsity": 0.5, "kept": 4 * keep, "numel": 4 * NUMEL, "model_numel": 6 * NUMEL}
    info |= {"mean_density": 0.5, "training_flops": 0.6, "entries": entries}
    if history:
        lines: list[Any] = [{"format": "gap_ds.history", "version": 1, "signature": signature}]
        lines[0]["entries"] = [[name, NUMEL, entry["partition"]] for name, entry in entries.items()]
        for phase in schedule.phases:
            dense = [entry["partition"] in phase.dense for entry in entries.values()]
            came = [None if d or phase.index < 2 else 4 for d in dense]
            lines.append({"step": phase.first_step, "phase": phase.index, "came": came, "went": came})
            lines[-1] |= {"kept": [NUMEL if d else keep for d in dense], "active": [NUMEL if d else 32 for d in dense]}
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "gap_history.jsonl").write_text(text, encoding="utf-8")
    if not finished:
        (folder / "gap.json").write_text(json.dumps(config), encoding="utf-8")
        return
    results = {**info, "bleu": 31.25, "chrf": 55.5, "density_at_end": 0.25, "train_seconds": 300.4}
    results |= {"steps_per_epoch": PER_EPOCH, "arguments": {"seed": 0}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "model").mkdir()
    (folder / "model" / "gap.json").write_text(json.dumps(info), encoding="utf-8")
    weights = {name: torch.zeros(8, 8) for name in entries}
    for weight in weights.values():
        weight.view(-1)[:keep] = torch.linspace(0.01, 1, keep)
    save_file(weights, folder / "model" / "model.safetensors")


class Page(HTMLParser):
    """Checks that tags match; collects images and everything that could load something."""

    VOID = ("meta", "img", "link", "br", "hr", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name != "srcset"
            if name in ("src", "href", "data", "action", "poster"):
                self.links.append(value or "")
        if tag == "img":
            of = dict(attrs)
            assert of["alt"]
            start, _, data = (of["src"] or "").partition(",")
            assert start == "data:image/png;base64"
            self.images.append(base64.b64decode(data, validate=True))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data


def check_page(path: Path, pictures: list[str]) -> Page:
    """The page stands alone, and its pictures are those beside it."""
    page = Page(path)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert sorted(page.images) == sorted(Path(picture).read_bytes() for picture in pictures)
    for data in page.images:
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.width == 1300 and image.height >= 200
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 20  # something is drawn
    return page


# -- golden text, and the page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("report_one.txt", "report cyclic -o report.html"),
        ("report_three.txt", "report cyclic rigl going"),
        ("report_three.json", "report cyclic rigl going -o out/all.html --json"),
    ],
)
def test_golden(run: Run, golden: Golden, name: str, argv: str) -> None:
    make_run(Path("cyclic"), CYCLIC, bleu=True, history=True)
    make_run(Path("rigl"), RIGL)
    make_run(Path("going"), CYCLIC, finished=False)
    code, out, err = run(*argv.split())
    assert (code, err) == (0, "")
    golden(name, out)
    if name.endswith(".txt"):
        assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    if name.endswith(".json"):
        page = check_page(Path("out/all.html"), json.loads(out)["pictures"])
        assert all(word in page.text for word in ("cyclic", "rigl", "going", "31.25", "5 min", "so far", "gap|method"))


def test_a_report_of_one_run_has_all_its_pictures(run: Run) -> None:
    make_run(Path("a"), CYCLIC, bleu=True, history=True)
    figures = json.loads(run("report", "a", "--json")[1])
    names = ["schedule", "density", "layers_over_time", "exploration", "magnitudes"]
    assert figures["pictures"] == [f"report-a-{name}.png" for name in names]
    assert figures["runs"][0]["missing"] == []
    page = check_page(Path("report.html"), figures["pictures"])
    assert "Every entry ends with density 0.250." in page.text


def test_masks_that_a_run_never_had_are_not_drawn(run: Run) -> None:
    config = {"method": "dense", "sparsity": 0.0, "phase_epochs": 1, "rounds": 2, "finetune_epochs": 1}
    make_run(Path("a"), config, history=True)
    names = ["schedule", "density", "magnitudes"]
    assert json.loads(run("report", "a", "--json")[1])["pictures"] == [f"report-a-{name}.png" for name in names]
    active = [drawing.Curve("partition 0", [(0, 0.1), (5, 1.0)])]
    one, two = (plots.exploration([drawing.Curve("partition 0", points)], active, 9) for points in ([], [(5, 0.3)]))
    assert (len(one.axes), len(two.axes)) == (1, 2)


def test_losses_around_boundaries_are_drawn(run: Run) -> None:
    make_run(Path("a"), CYCLIC)
    lines = [{"step": s, "before": [4.0, 3.0], "after": [3.5, None, 3.0]} for s in (10, 20)]
    lines.append({"step": 30, "before": [3.0], "after": []})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    Path("a", "gap_losses.jsonl").write_text(text + "{damaged", encoding="utf-8")
    code, out, _ = run("report", "a", "--json")
    figures = json.loads(out)
    assert code == 0 and any("losses_around_boundaries" in picture for picture in figures["pictures"])
    assert "1 damaged line of gap_losses.jsonl" in figures["runs"][0]["missing"]
    (one, two) = report._losses_around(report_runs.load(Path("a"), "a"))
    assert one.points == two.points == [(-2.0, 4.0), (-1.0, 3.0), (0.0, 3.5), (2.0, 3.0)]


def test_layers_are_drawn_where_they_differ(run: Run) -> None:
    make_run(Path("a"), CYCLIC)
    path = Path("a/results.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    results["entries"]["model.layers.0.fc.weight"]["nonzero"] = 40
    path.write_text(json.dumps(results), encoding="utf-8")
    assert "report-a-layers.png" in json.loads(run("report", "a", "--json")[1])["pictures"]


def test_the_same_run_gives_the_same_page(run: Run) -> None:
    make_run(Path("a"), CYCLIC, history=True)
    pages = []
    for _ in range(2):
        assert run("report", "a")[0] == 0
        pages.append(Path("report.html").read_bytes())
    assert pages[0] == pages[1]


def test_workers_of_parallel_gap_are_runs(run: Run) -> None:
    for worker in range(2):
        make_run(Path(f"p/worker_{worker}"), {**CYCLIC, "method": "parallel"})
    figures = json.loads(run("report", "p", "p/worker_0", "--json")[1])
    assert [row["name"] for row in figures["runs"]] == ["p/worker_0", "p/worker_1"]


# -- figures by hand ---------------------------------------------------------------------------------------------------


def test_exploration_by_hand(run: Run) -> None:
    make_run(Path("a"), CYCLIC, history=True)
    history = report_runs.load(Path("a"), "a").history
    assert history is not None
    # Partition 0 is sparse in phases 1, 3 and 4; from phase 2 on masks are compared: 4 of 16 kept weights are new.
    assert report._fresh(history, 0) == [(30.0, 0.25), (40.0, 0.25)]
    assert report._active(history, 0) == [(0.0, 1.0), (10.0, 0.5), (20.0, 1.0), (30.0, 0.5), (40.0, 0.5)]


def test_the_schedule_of_a_run_without_results_or_checkpoints(run: Run) -> None:
    """From its gap.json, and the steps at which its epochs end."""
    make_run(Path("a"), CYCLIC, finished=False)
    found = report_runs.load(Path("a"), "a")
    assert found.schedule == build(GaPConfig.model_validate(CYCLIC), PER_EPOCH)
    assert found.steps == 20 and not found.figures()["finished"]


@pytest.mark.parametrize(("kappa", "phases"), [(1, 1), (2, 3), (48, 200)])
def test_schedules_of_any_size(kappa: int, phases: int) -> None:
    marks = list(range(phases + 1))
    density = [[float(k == p % kappa) for p in range(phases)] for k in range(kappa)]
    points = [(float(step), 1.0) for step in marks]
    image = Image.open(io.BytesIO(drawing.png(plots.schedule(marks, density, marks[:-1], [(0, "$r")], points, [], []))))
    assert image.width == 1300


def test_many_points_and_long_names() -> None:
    points = [(float(step), 1.0 / (1 + step)) for step in range(100_000)]
    curves = [drawing.Curve(f"$run_{i}^{'x' * 200}", points[i::10], i) for i in range(30)]
    assert drawing.png(plots.compare_losses(curves, curves))
    names = [f"model.layers.{i}.{'y' * 80}.weight" for i in range(700)]
    assert drawing.png(plots.layers(drawing.shorten(names), [i // 100 for i in range(700)], [0.1] * 700))


# -- unfinished, damaged and hostile -----------------------------------------------------------------------------------


def append(file: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / file).open("a", encoding="utf-8") as out:
            out.write(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (append("metrics.jsonl", '{"kind": "train", "ste'), "1 damaged line of metrics.jsonl"),
        (append("metrics.jsonl", "[1]\n" + "[" * 100_000 + "\n\0\n"), "3 damaged lines of metrics.jsonl"),
        (append("metrics.jsonl", '{"kind": "train", "step": 70, "loss": "x"}\n'), "1 damaged line of metrics.jsonl"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "losses: metrics.jsonl is missing or empty"),
        (append("gap_history.jsonl", '{"step": 9'), "what follows line 6 of gap_history.jsonl, which is damaged"),
        (
            lambda folder: (folder / "gap_history.jsonl").write_text("{}\n"),
            "gap_history.jsonl is damaged or of",
        ),
        (
            lambda folder: (folder / "gap_history.jsonl").unlink(),
            "this run recorded none (it has no gap_history",
        ),
    ],
)
def test_what_is_damaged_is_left_out_and_told(run: Run, damage: Callable[[Path], None], message: str) -> None:
    make_run(Path("a"), CYCLIC, history=True)
    damage(Path("a"))
    code, out, _ = run("report", "a", "--json")
    figures = json.loads(out)
    assert code == 0 and len(figures["runs"][0]["missing"]) == 1 and message in figures["runs"][0]["missing"][0]
    assert message in check_page(Path("report.html"), figures["pictures"]).text


def test_a_loss_that_is_not_finite_is_a_gap(run: Run) -> None:
    make_run(Path("a"), CYCLIC)
    append("metrics.jsonl", '{"kind": "train", "step": 70, "loss": NaN}\n')(Path("a"))
    append("metrics.jsonl", '{"kind": "validation", "step": 70, "epoch": 6, "loss": Infinity}\n')(Path("a"))
    code, out, _ = run("report", "a", "--json")
    assert code == 0 and "NaN" not in out


@pytest.mark.parametrize("last", [math.nan, -1e308])  # a difference of numbers like the latter is infinite
def test_the_last_loss_of_a_trainer_is_not_an_earlier_one(tmp_path: Path, last: float) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "loss": last}]
    log = {"global_step": 4, "log_history": [*rows, {"step": 4, "eval_loss": math.inf}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(log))
    figures = report_runs.load(tmp_path, "a").figures()
    assert (figures["steps"], figures["training_loss"], figures["validation_loss"]) == (4, None, None)


def test_hostile_names_stay_text(run: Run) -> None:
    name = "<img src=x onerror=alert(1)>$_{\x1b[2J"
    make_run(Path(name), CYCLIC, bleu=True, history=True)
    make_run(Path("b"), RIGL)
    path = Path(name) / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["signature"] = "</code><script>alert(1)</script>"
    entry = results["entries"].pop("model.layers.0.fc.weight")
    results["entries"]["</p>$\\frac{"] = {**entry, "nonzero": 60}
    path.write_text(json.dumps(results), encoding="utf-8")
    code, out, _ = run("report", name, "b", "--json")
    page = check_page(Path("report.html"), json.loads(out)["pictures"])
    assert code == 0 and "<script>alert(1)</script>" in page.text and "<img src=x onerror=alert(1)>" in page.text
    assert "\x1b" not in run("report", name, "b")[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("absent", "absent: there is no such folder."),
        (
            "empty",
            "empty: is no folder of a run, it has neither metrics.jsonl nor results.json, nor a Trainer's "
            "trainer_state.json.",
        ),
        ("bad", "bad/results.json: is damaged or of another kind ("),
        ("a -o a/results.json/x.html", "--output a/results.json/x.html: cannot be written ("),
        ("a -o .", "--output .: is a folder. Give the page a name, such as report.html."),
        ("a -o empty", "--output empty: is a folder. Give the page a name, such as empty/report.html."),
        ("", "Missing argument"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run: Run, argv: str, message: str) -> None:
    make_run(Path("a"), CYCLIC)
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/results.json").write_text("{", encoding="utf-8")
    code, out, err = run("report", *argv.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"gap-ds: {message}") and err.count("\n") == 1, err


def process(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=200, env=env)


def test_without_the_extra() -> None:
    done = process("import sys; sys.modules['matplotlib'] = None; from gap_ds.cli import main; main()", "report", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        'gap-ds: matplotlib is not installed: the report needs it. Run pip install "gap_ds[plots]".\n'
    )


def test_no_other_command_imports_matplotlib() -> None:
    done = process("import sys, gap_ds, gap_ds.cli.app; assert 'matplotlib' not in sys.modules")
    assert done.returncode == 0, done.stderr
