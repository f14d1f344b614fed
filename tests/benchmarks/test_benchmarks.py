"""Every benchmark runs at its size for tests and writes the results that the tables read. No test checks a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

#: Runs the main functions one after the other in one process: importing torch takes longer than most of them.
ALL = """
import importlib, sys
folder, out, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    sys.argv = [f"{folder}/{name}.py", "--quick", "--out", out]
    importlib.import_module(name).main()
"""

#: Lets the scripts only parse command lines; then gpu.py runs two of them, one with a mistake.
PARSE = """
import argparse, importlib, json, sys
from pathlib import Path
folder, out, lines = sys.argv[1:]
sys.path.insert(0, folder)
import gpu

class Parsed(Exception): pass

real = argparse.ArgumentParser.parse_args

def parse(self, *given):
    real(self, *given)
    raise Parsed

for script, words in [*gpu.RUNS, *json.loads(lines)]:
    main = importlib.import_module(script).main
    sys.argv = [f"{folder}/{script}.py", *words, "--out", out]
    argparse.ArgumentParser.parse_args = parse
    try:
        main()
    except Parsed:
        pass
    else:
        raise AssertionError(f"{script} reads no command line")
argparse.ArgumentParser.parse_args = real
assert gpu.run([("masks", ["--quick"]), ("masks", ["--quick", "--no-such-option"])], 300, Path(out)) == 1
"""

#: The tables of a folder of results.
TABLES = """
import sys
from pathlib import Path
folder, results = sys.argv[1:]
sys.path.insert(0, folder)
import figures, tables
figures.RESULTS = Path(results)
of_quality = {"quality", "quality-short", "vision", "tatoeba", "language", "rates"}
for name in sorted(tables.SECTIONS.keys() - {"backends"} - of_quality):
    print(tables.SECTIONS[name]())
"""


def python(*words: str, timeout: int = 600, **variables: str) -> str:
    """Return the output of a script, which must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    result = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run(out: Path, *names: str) -> dict[str, dict[str, Any]]:
    python("-c", ALL, str(BENCHMARKS), str(out), *names)
    return {name: read(out / f"{name}.json") for name in names}


def check(name: str, result: dict[str, Any]) -> None:
    assert result["benchmark"] == name
    assert result["command"] == f"python benchmarks/{name}.py --quick"
    assert {"cpu", "cores", "threads", "load_average", "torch", "gap_ds", "date"} <= set(result["machine"])
    assert result["rows"]


def tables(folder: Path) -> str:
    return python("-c", TABLES, str(BENCHMARKS), str(folder))


@pytest.mark.full
def test_the_quick_ones(tmp_path: Path) -> None:
    """boundary and cuts compare their masks with those of the whole matrix."""
    names = ("device", "masks", "boundary", "looks", "hook", "peers", "kept_state", "generate")
    for name, result in run(tmp_path, *names).items():
        check(name, result)
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}\n")
    made = [row["made"]["command"] for row in read(tmp_path / "boundary.json")["rows"]]
    assert all(command.startswith("python benchmarks/boundary.py --ranks 2 --weights 200003 ") for command in made)
    assert "torch_prune" in tables(tmp_path)
    # Packages need not be installed, but a row that has no figures says why.
    peers = {row["step by"]: row for row in read(tmp_path / "peers.json")["rows"] if "bare" not in row["step by"]}
    for row in (peers[name] for name in ("gap_ds", "gap_ds, 2:4", "torch_prune")):
        assert row["resume"] == "exact"
        assert row["density of the forward pass"] == pytest.approx([row["target density"]] * 2, abs=1e-4)
    assert all("not installed" in row["package"] or "resume" in row for row in peers.values())


@pytest.mark.full
def test_command_lines_and_a_gpus_run_without_one(tmp_path: Path) -> None:
    """The scripts accept the runs of gpu.py and `make bench`. gpu.json names failures and keeps the other results."""
    (names,) = re.findall(r"^BENCHES := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [(name, ["--quick"]) for name in names.split()]
    python("-c", PARSE, str(BENCHMARKS), str(tmp_path), json.dumps(lines))
    found = read(tmp_path / "gpu.json")
    assert list(found["results"]) == ["masks"] and "--no-such-option" in found["failed"][0]["error"]
    text = tables(tmp_path)
    assert "not measured yet" not in text and "No figure here is from a GPU" not in text
    assert "of a copy's bandwidth" in text and "--no-such-option" in text


@pytest.mark.slow
def test_all_of_a_gpus_run_at_its_size_for_tests(tmp_path: Path) -> None:
    """The same scripts with the same options, on the device that there is."""
    python(str(BENCHMARKS / "gpu.py"), "--quick", "--limit", "1500", "--out", str(tmp_path), timeout=1600)
    found = read(tmp_path / "gpu.json")
    assert not found["failed"]
    names = {"device", "masks", "overhead", "boundary", "peers", "hook", "memory", "throughput", "short_quality"}
    assert names <= found["results"].keys()
    assert "gap_ds.optim.AdamW and masks" in tables(tmp_path)


@pytest.mark.full
def test_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run(tmp_path, "adapters")["adapters"]
    check("adapters", result)
    plain, masked = result["rows"]
    assert plain["zeros revived"] == masked["zeros revived"] == 0 and plain["update lost"] > masked["update lost"] == 0
    assert masked["loss after the merge"] == pytest.approx(masked["loss of the adapters"], abs=1e-4)


def test_a_collected_run_is_repeated_by_its_command() -> None:
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import tables; "
    code += "print(tables.command(json.loads(sys.argv[2])))"
    arguments = {"gap_config": "g", "dataset": "/data/multi30k", "also_score": ["a", "b"], "output_dir": "x"}
    same = {"teacher_phases": ["finetune"], "lr": 2e-3, "dense": False}
    printed = python("-c", code, str(BENCHMARKS), json.dumps({"ranks": 2, "arguments": arguments | same}))
    wanted = "train.py --gap-config g --dataset DATA/multi30k --also-score a b --output-dir OUT\n"
    assert printed.endswith(wanted)


def test_tables_of_no_results_at_all(tmp_path: Path) -> None:
    assert "**No figure here is from a GPU.**" in tables(tmp_path)


def test_the_guard_is_collected_and_asks_for_a_baseline(tmp_path: Path) -> None:
    collected = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(BENCHMARKS / "guard.py"))
    for name in ("test_masks_to_mul", "test_engine_to_bare", "test_selection_to_topk", "test_boundary", "test_import"):
        assert name in collected
    words = ["make", "-s", "-o", "env", "bench-guard", f"GUARD={tmp_path}"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode and "no baseline to compare with" in result.stderr


@pytest.mark.slow
def test_the_others(tmp_path: Path) -> None:
    names = ("attention", "compact", "engines", "gathering", "memory", "profile_paths", "startup", "throughput")
    for name, result in run(tmp_path, *names).items():
        check(name, result)
    text = tables(tmp_path)
    assert "histograms of the keys" in text and "3 boundaries" in text


@pytest.mark.slow
@pytest.mark.parametrize("backend", "plain ddp fsdp1 fsdp2 fairscale zero0 zero1 zero2 zero3".split())
def test_the_overhead_and_memory_of_every_backend(tmp_path: Path, backend: str) -> None:
    for script in ("overhead", "memory"):
        python(str(BENCHMARKS / f"{script}.py"), "--quick", "--backends", backend, "--out", str(tmp_path))
    (row,) = read(tmp_path / "overhead.json")["rows"]
    assert row["backend"] == backend and row["ratio"] > 0 and row["boundary_ms"] > 0
    assert 0 < row["own_share"] < 1
    assert row["ranks"] == (1 if backend == "plain" else 2)
    (row,) = read(tmp_path / "memory.json")["rows"]
    assert row["backend"] == backend and row["masks, bits"] == pytest.approx(1, abs=0.01)
    assert row["a boundary's tensors, MB"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_sharding_libraries_on_one_rank(tmp_path: Path, backend: str) -> None:
    """The same ranks as in gpu.py."""
    words = ["--quick", "--ranks", "1", "--backends", backend, "--out", str(tmp_path)]
    python(str(BENCHMARKS / "overhead.py"), *words)
    (row,) = read(tmp_path / "overhead.json")["rows"]
    assert row["ranks"] == 1 and row["boundary_steps"] > 0


@pytest.mark.slow
def test_a_ratio_is_decided_over_builds(tmp_path: Path) -> None:
    words = ["--quick", "--backends", "ddp", "--decide", "--seconds", "1", "--out", str(tmp_path)]
    python(str(BENCHMARKS / "overhead.py"), *words)
    (row,) = read(tmp_path / "overhead.json")["rows"]
    low, high = row["cpu_interval"]
    assert row["builds"] == 6 and row["pairs"] == 18 and low < row["cpu_ratio"] < high
    assert row["decided"] == ("yes" if high <= 1.01 else "no" if low > 1.01 else "undecided")
