"""Runs of a table, and their results, one JSON line each.

The key of a result is (row, sparsity, seed, set-up). The set-up is a line with everything else that changes a result:

    quality|data:wmt16_multi30k|epochs:8|preset:tiny|...|gap:1f3a90c2

where `gap` is a hash of the row's config without sparsity and seed. Results of other set-ups stay in the file and are
not mixed with this one's.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import json
import operator
import os
import platform
import runpy
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from presets import Preset
from rows import ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMMON = "examples/common/arguments.py"  # arguments of all examples

Record = dict[str, Any]
Key = tuple[str, float, int, str]


@dataclass(frozen=True)
class Run:
    """One training run of a table."""

    preset: Preset
    row: Row
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.row.name}_s{self.sparsity:g}_seed{self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        """GaP config of the run."""
        more = self.preset.settings.get(self.row.name, {})
        return {**self.row.config(self.sparsity, self.preset.epochs, self.seed), **more}

    @property
    def setup(self) -> str:
        """Everything that changes a result except row, sparsity and seed, in one line."""
        config = {key: value for key, value in self.config.items() if key not in ("sparsity", "seed")}
        with_dense = [word for word in ("taught", "pretrained") if getattr(self.row, word)]
        text = json.dumps([config, self.row.workers, *with_dense], sort_keys=True)
        return f"{task(self.preset)}|gap:{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def key(self) -> Key:
        """Key of the run's result."""
        return (self.row.name, self.sparsity, self.seed, self.setup)

    def dense(self, out: Path) -> Path:
        """Return the folder of the dense model of the run's seed, which others learn from or start with."""
        row = next(row for row in ROWS if row.dense)
        return out / Run(self.preset, row, 0.0, self.seed).name / "model"

    def command(self, data: Path, out: Path, python: str = "python") -> list[str]:
        """Return the command line, for the root of the repository, with the example's `--resume`."""
        preset, folder = self.preset, out / self.name
        words = ["--gap-config", str(folder / "gap.json"), "--backend", "none"]
        if preset.parts:
            words += ["--dataset", str(dataset(preset, data, out))]
        for name, value in preset.arguments.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        words += ["--also-score", *preset.also_score] if preset.also_score else []
        words += ["--teacher", str(self.dense(out))] if self.row.taught else []
        words += ["--model-name", str(self.dense(out))] if self.row.pretrained else []
        if preset.threads:
            words += ["--threads", str(preset.threads)]
        words += ["--seed", str(self.seed), "--resume", "--output-dir", str(folder)]
        if self.row.workers == 1:
            return [python, preset.example.script, *words]
        parallel = ["-m", "gap_ds.cli", "parallel", "--workers", str(self.row.workers), "--ranks-per-worker", "1", "--"]
        return [python, *parallel, preset.example.script, *words]

    def folders(self, out: Path) -> list[Path]:
        """Return the output folders of the example, one per worker. The first has the final model."""
        folder = out / self.name
        return [folder] if self.row.workers == 1 else [folder / f"worker_{i}" for i in range(self.row.workers)]


def key(record: Record) -> Key:
    """Return the key of a result."""
    return (record["row"], record["sparsity"], record["seed"], record["setup"])


def dataset(preset: Preset, data: Path, out: Path) -> Path:
    """Return the folder of the data: one of DATA, or that in OUT where `joined` merges several."""
    return data / preset.parts[0] if len(preset.parts) == 1 else out / "data" / preset.dataset


@functools.cache
def defaults(script: str) -> dict[str, Any]:
    """Return the defaults of an example's arguments, read from its source: importing it takes seconds."""
    found = {}
    for path, name in ((COMMON, "RunArguments"), (script, "Arguments")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        arguments = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        lines = (node for node in arguments.body if isinstance(node, ast.AnnAssign))
        for line in lines:
            if isinstance(line.target, ast.Name) and isinstance(line.value, ast.Call):
                given = {keyword.arg: keyword.value for keyword in line.value.keywords}
                if "default" in given:
                    found[line.target.id] = ast.literal_eval(given["default"])
    return found


def expected(preset: Preset) -> dict[str, Any]:
    """Return the arguments of the example that change a result, for all runs of a preset."""
    values = {**defaults(preset.example.script), **preset.arguments}
    return {name: values[name] for name in preset.example.matter}


@functools.cache
def version() -> str:
    """Return the version of gap_ds, without importing torch."""
    return str(runpy.run_path(str(ROOT / "gap_ds" / "_version.py"))["__version__"])


@functools.cache
def commit() -> str | None:
    """Return the commit of this working tree, with `-dirty` if files differ; None outside a repository."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return None


def task(preset: Preset) -> str:
    """Return the part of the set-up that all rows of a table share."""
    parts = {"data": preset.dataset, "epochs": f"{preset.epochs:g}", **expected(preset)}
    return "|".join(["quality", *(f"{name}:{value}" for name, value in parts.items())])


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    """Return all results of a file, oldest first; none if there is no file. ValueError names a damaged line."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path.name}: line {number} is no JSON. Remove it.") from None
    return found


def append(path: Path, record: Record) -> bool:
    """Add a result in one write, unless the file has its key. Returns True if added.

    Several processes may append at once. A line cut short by a kill is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        if any(key(json.loads(line)) == key(record) for line in content[:whole].splitlines()):
            return False
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return True


# --- a finished run ---------------------------------------------------------------------------------------------------


def check_folder(run: Run, out: Path) -> None:
    """Raise ValueError if a run's folder contains another run, which must not be continued.

    A run started by hand is accepted if gap.json has the same config; `collect` checks the rest.
    """
    folder = out / run.name
    if not folder.exists() or not any(folder.iterdir()):
        return
    setup, config = folder / "setup.txt", folder / "gap.json"
    if setup.exists():
        same = setup.read_text(encoding="utf-8").strip() == run.setup
    else:
        same = config.exists() and _filled(json.loads(config.read_text(encoding="utf-8"))) == _filled(run.config)
    if not same:
        raise ValueError(f"--out: {folder} holds a run of another set-up. Delete it, or set another --out.")


def _filled(config: Record) -> Record:
    """Return a config with the defaults that are often omitted. Compared by value, so 1 equals 1.0."""
    return {"method": "cyclic", "lr_restart": False, "distribution": "uniform", "seed": 0, **config}


def finished(run: Run, out: Path) -> bool:
    """Return True if a run has all its results."""
    return all((folder / "results.json").exists() for folder in run.folders(out))


def collect(run: Run, out: Path) -> Record:
    """Return the result of a finished run, without paths of this machine.

    With several workers, scores and losses are those of worker 0, whose model is exported. `training_flops` and
    `train_seconds` are sums over all workers, relative to ONE dense run of the same epochs: parallel work counts.

    Raises:
        ValueError: the run has other arguments than its folder's name and set-up.
    """
    folders = run.folders(out)
    found = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    lines = [_lines(folder / "metrics.jsonl") for folder in folders]
    first, arguments = found[0], found[0]["arguments"]
    used = {**arguments, "dataset": Path(arguments["dataset"] or "generated").name, "dense": first["dense"]}
    for name, value in {
        **expected(run.preset),
        "dataset": run.preset.dataset,
        "seed": run.seed,
        "dense": False,
    }.items():
        if used[name] != value:
            raise ValueError(f"{run.name}: was run with {name}={used[name]!r}, not {value!r}.")
    command = run.command(Path("DATA"), Path("OUT"))
    budget = run.preset.epochs * first["steps_per_epoch"]
    also = first.get("also_scored", {})
    return {
        "row": run.row.name,
        "sparsity": run.sparsity,
        "seed": run.seed,
        **scores(run, first),
        **({"also_scored": {split: scores(run, found) for split, found in also.items()}} if also else {}),
        "epochs": round(first["applied_steps"] / first["steps_per_epoch"], 4),
        "training_flops": round(sum(one["training_flops"] * one["applied_steps"] for one in found) / budget, 5),
        "mean_density": round(first["mean_density"], 5),
        "entry_sparsity": round(first["entry_sparsity"], 5),
        "model_sparsity": round(first["model_sparsity"], 5),
        "train_seconds": round(sum(map(_train_seconds, found, lines)), 1),
        **{name: functools.reduce(operator.getitem, keys, first) for name, keys in run.preset.example.figures.items()},
        "validation_loss": [round(line["loss"], 4) for line in lines[0] if line["kind"] == "validation"],
        "applied_steps": first["applied_steps"],
        "steps_per_epoch": first["steps_per_epoch"],
        "signature": first["signature"],
        "gap_ds": version(),
        "commit": commit(),
        "setup": run.setup,
        "config": run.config,
        "workers": run.row.workers,
        "command": shlex.join(command),
        "torch": first["torch"],
        "threads": arguments["threads"],
        "cores": len(os.sched_getaffinity(0)),
        "machine": machine(first["device"]),
    }


def scores(run: Run, results: Record) -> dict[str, float]:
    """Return the scores of a record."""
    return {name: round(results[name], 3) for name in run.preset.example.scores}


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _train_seconds(results: Record, lines: Sequence[Record]) -> float:
    """Return the training seconds of all parts of a run. The example reports those after the last `--resume`."""
    if not results["trained_from_step"]:
        return float(results["train_seconds"])
    total = last = 0.0
    for line in lines:
        total += line["seconds"] - last if line["seconds"] >= last else line["seconds"]
        last = line["seconds"]
    return total


@functools.cache
def machine(device: str) -> str:
    """Return the kind of the processor, or the GPU's name."""
    if device != "cuda":
        return f"{platform.machine()} CPU"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []
    return names[0].strip() if names else "CUDA GPU"


# --- joint data -------------------------------------------------------------------------------------------------------


def joined(preset: Preset, data: Path, out: Path) -> Path:
    """Return the folder of a preset's data. Several parts are merged in OUT first.

    A split for the loss or a score is that of the last part that has it.

    Raises:
        ValueError: a file is missing.
    """
    folder = dataset(preset, data, out)
    splits = [expected(preset)[f"{name}_split"] for name in ("validation", "test")]
    splits += preset.also_score
    parts = [data / part for part in preset.parts]
    files = [part / "train.parquet" for part in parts]
    held_out = {split: _held_out(parts, split) for split in splits if split}
    for path in (*files, *held_out.values()):
        if not path.exists():
            raise ValueError(f"{path}: no such file; preset {preset.name!r} needs it. Set --data.")
    if len(preset.parts) == 1:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in {"train": files, **{split: [path] for split, path in held_out.items()}}.items():
        _join(parts, folder / f"{name}.parquet")
    return folder


def _held_out(parts: Sequence[Path], split: str) -> Path:
    paths = [part / f"{split}.parquet" for part in reversed(parts)]
    return next(filter(Path.exists, paths), paths[0])


def _join(parts: Sequence[Path], whole: Path) -> None:
    """Merge the translations of several parquet files. The result is whole or absent."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    if whole.exists() and pq.read_metadata(whole).num_rows == sum(pq.read_metadata(part).num_rows for part in parts):
        return
    tables = []
    for part in parts:
        pairs = pq.read_table(part, columns=["translation"]).column("translation")
        # Rebuilt field by field: files may have another order of fields, or large strings.
        texts = {name: pc.struct_field(pairs, name).cast(pa.string()) for name in ("en", "de")}
        pair = pa.Table.from_arrays(list(texts.values()), names=list(texts)).to_struct_array()
        tables.append(pa.table({"translation": pair}))
    partial = whole.with_suffix(".partial")
    pq.write_table(pa.concat_tables(tables), partial)
    partial.replace(whole)
