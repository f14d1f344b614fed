"""The documents are true: links lead somewhere, snippets run, commands exist, figures are those of the results.

Fences: ```json and ```yaml hold a GaP config. ```python is compiled, and its imports and calls of gap_ds are compared
with the code; ```python run is run, with the names of `scope`. The README's first code and its commands are executed.
Elsewhere commands are checked: wherever a line begins with one, its options and files exist.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("transformers")

import typer

from gap_ds import GaPConfig, GaPEngine
from gap_ds.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("examples/*/README.md"),
]
README = ROOT / "README.md"
PROGRAMS = ("gap-ds", "make", "python", "deepspeed", "torchrun", "srun", "pip", ".")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "docs" / "build_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split(page: Path) -> tuple[str, list[tuple[str, str]]]:
    """(text without its fences, [(kind of a fence, the text after its backticks; its content)])."""
    text, fences, inside = [], [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = (line[3:].strip(), [])
            else:
                fences.append((inside[0], "\n".join(inside[1])))
                inside = None
        elif inside is not None:
            inside[1].append(line)
        else:
            text.append(line)
    assert inside is None, f"{name(page)}: a fence is not closed"
    return "\n".join(text), fences


def snippets(*kinds: str) -> list[Any]:
    """All fences of some kinds, each with its page and number as id."""
    return [
        pytest.param(page, text, id=f"{name(page)}-{i}")
        for page in PAGES
        for i, (kind, text) in enumerate(split(page)[1])
        if kind in kinds
    ]


# -- links -------------------------------------------------------------------------------------------------------------


@cache
def anchors(page: Path) -> set[str]:
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", split(page)[0], re.MULTILINE):
        anchor = reference().anchor(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        found.append(f"{anchor}-{same}" if (same := found.count(anchor)) else anchor)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", split(page)[0]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(other), f"{name(page)}: {target} has no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_reference_is_up_to_date() -> None:
    built = reference()
    assert doctest.testmod(built).failed == 0
    assert built.PAGE.read_text(encoding="utf-8") == built.build(), "run `python docs/build_reference.py`"


# -- snippets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "text"), snippets("json", "yaml"))
def test_configs_are_valid(page: Path, text: str) -> None:
    """Files of other programs are fenced as yml, unless they hold ours under `gap`, as axolotl's do."""
    config = yaml.safe_load(text)
    GaPConfig.load(config.get("gap", config))


def check_calls(tree: ast.AST, names: dict[str, Any]) -> None:
    """Calls of names imported from gap_ds, and of methods of `engine`, fit their signatures."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        found, given = None, list(node.args)
        if isinstance(node.func, ast.Name):
            found = names.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            owner = GaPEngine if node.func.value.id == "engine" else names.get(node.func.value.id)
            found = getattr(owner, node.func.attr, None)
            given = [owner, *given] if inspect.isfunction(found) and inspect.isclass(owner) else given
        if callable(found):
            named = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
            inspect.signature(found).bind_partial(*given, **named)


@pytest.mark.parametrize(("page", "text"), snippets("python", "python run"))
def test_python_snippets_compile_and_call_what_exists(page: Path, text: str) -> None:
    tree, names = ast.parse(text), dict[str, Any]()
    compile(tree, name(page), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gap_ds":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module of the package, which nothing has imported yet
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
    check_calls(tree, names)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return SimpleNamespace(loss=states[-1].square().mean(), logits=states[-1], hidden_states=states)


def scope(folder: Path) -> dict[str, Any]:
    """Names for a snippet: a model, its optimizer, batches, and in `engine` another model in training."""
    model, other = Tiny(), Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gap = {"sparsity": 0.8, "partitions": 3, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}
    engine = GaPEngine(other, gap, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    loader = [{"x": torch.ones(2, 5)}] * 4
    return {"model": model, "optimizer": optimizer, "loader": loader, "engine": engine, "folder": str(folder / "saved")}


@pytest.mark.parametrize(("page", "text"), snippets("python run"))
def test_snippets_run(page: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, name(page), "exec"), scope(tmp_path))
    wanted = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
    assert printed.getvalue().split("\n")[:-1] == wanted


#: Commands of the README that the test does not execute, and the reason.
README_EXCEPTIONS = {
    "pip install": "the package job of .github/workflows/ci.yml installs the wheel",
    "make": "installs an environment; tests/examples/test_demo.py runs the demonstration",
    "gap-ds doctor": "tests/unit/cli runs it; its output depends on the machine",
}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 140


def test_the_readme_runs(tmp_path: Path, command_line: Callable[..., tuple[int, str, str]]) -> None:
    """The first code as it stands, then each command, in one empty folder."""
    kind, code = next(fence for fence in split(README)[1] if fence[0].startswith("python"))
    assert kind == "python" and len(commands(README)) >= 4
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    # DeepSpeed may print when transformers imports it.
    assert "0.200 of the weights in the pruned matrices are kept" in printed.getvalue().splitlines()
    assert (tmp_path / "sparse-model" / "model.safetensors").exists()
    skipped = set()
    for words in commands(README):
        if reason := next((start for start in README_EXCEPTIONS if " ".join(words).startswith(start)), None):
            skipped.add(reason)
            continue
        assert words[0] == "gap-ds", f"{words}: execute it here, or give a reason in README_EXCEPTIONS"
        status, out, error = command_line(*words[1:])
        assert status == 0 and out, f"{words}: {error}"
    assert skipped == set(README_EXCEPTIONS)


def rows_of(page: Path) -> dict[str, dict[str, str]]:
    """The first row of each method in the tables whose first column is `method`: {method: {column: cell}}."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells
        elif columns[0] == "method" and not cells[0].startswith("---"):
            found.setdefault(cells[0], dict(zip(columns[1:], cells[1:], strict=True)))
    return found


def test_the_small_table_of_the_readme_has_the_figures_of_the_large_one() -> None:
    small, large = rows_of(README), rows_of(ROOT / "docs" / "recipes.md")
    assert {"dense", "gradual magnitude pruning", "C-GaP, 3 partitions"} <= set(small)
    for method, cells in small.items():
        assert cells.items() <= large[method].items(), method


def printed_texts() -> list[str]:
    """All texts of gap_ds, with `…` in the place of values."""
    texts = []
    for path in ROOT.glob("gap_ds/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_sentences_of_what_can_go_wrong_are_printed() -> None:
    text = (ROOT / "docs" / "what-can-go-wrong.md").read_text(encoding="utf-8")
    cells = [line.strip("|").split(" | ")[2].strip() for line in text.splitlines() if line.count(" | ") == 3]
    sentences = [cell.strip("`") for cell in cells if cell.startswith("`")]
    assert len(sentences) > 20
    texts = printed_texts()
    for sentence in sentences:
        assert any(sentence in text for text in texts), f"docs/what-can-go-wrong.md: {sentence} is printed nowhere"


def test_tables_come_from_committed_results() -> None:
    status, _ = run_script(ROOT / "benchmarks" / "tables.py", "--check")
    assert not status, "run `python benchmarks/tables.py`"


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The words of every command line: lines of shell fences, indented lines and spans of code that begin with one."""
    text, fences = split(page)
    shell = [body for kind, body in fences if kind in ("", "bash", "console")]
    indented = ["\n".join(re.findall(r"^ {4,}(.*)$", text, re.MULTILINE))]
    spans = re.findall(r"`([^`\n]+)`", text)
    lines = [line for block in (*shell, *indented, *spans) for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        line = re.sub(r"^\s*(\$ )?", "", line)
        if line.partition(" ")[0] in PROGRAMS and " " in line:
            found.append(shlex.split(line, comments=True))
    return found


def run_script(script: Path, *argv: str) -> tuple[Any, str]:
    """A script of the repository, run in this process, which has the large libraries already: (status, its output)."""
    modules, path, before = set(sys.modules), list(sys.path), list(sys.argv)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.path[:], sys.argv = path, before
        for module in set(sys.modules) - modules:  # modules of two scripts may have one name
            if str(getattr(sys.modules[module], "__file__", None)).startswith(
                (f"{ROOT}/examples", f"{ROOT}/benchmarks")
            ):
                del sys.modules[module]
    return exit_.value.code, printed.getvalue()


@cache
def options_of(script: Path) -> frozenset[str]:
    return frozenset(re.findall(r"--[\w-]+", run_script(script, "--help")[1]))


def check_gap_ds(words: list[str], where: str) -> None:
    known = getattr(typer.main.get_command(app), "commands", {})
    command, *rest = words
    if command.startswith("-"):
        rest, options = words, {"--help", "-h", "--version", "--install-completion", "--show-completion"}
    else:
        if not re.fullmatch(r"[a-z]+", command):
            return  # `gap-ds COMMAND`
        assert command in known, f"{where}: there is no gap-ds {command}"
        options = {option for parameter in known[command].params for option in parameter.opts} | {"--help", "-h"}
    for word in rest:
        assert not word.startswith("-") or word == "--" or word.partition("=")[0] in options, f"{where}: {word}"


@pytest.mark.parametrize("words", ["plam -m tiny", "plan --modle tiny", "report run --jsn", "--versoin"])
def test_mistakes_in_commands_are_found(words: str) -> None:
    with pytest.raises(AssertionError):
        check_gap_ds(words.split(), "here")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(page):
        where = f"{name(page)}: {' '.join(words)}"
        for word in words:
            assert not re.fullmatch(r"(configs|examples|benchmarks|docs)/[\w./-]*\w", word) or (ROOT / word).exists(), (
                where
            )
        if words[0] == "make":
            assert set(words[1:2]) <= set(targets), where
        scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(examples|benchmarks)/[\w/]+\.py", word)]
        before, after = (words[: scripts[0]], words[scripts[0] + 1 :]) if scripts else (words, [])
        if before[0] == "gap-ds" and len(before) > 1:
            check_gap_ds(before[1:], where)
        for word in after:
            if word.startswith("--"):
                assert word.partition("=")[0] in options_of(ROOT / words[scripts[0]]), f"{where}: {word}"
