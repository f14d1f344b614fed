"""Files from strangers: every file that gap_ds reads, changed at random. Each input works or ends in a ValueError.

Used by test_fuzz.py (a few hundred inputs of each kind) and benchmarks/fuzz.py (as many as one likes).
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gap_ds import GaPConfig, GaPEngine, ParallelWorker, checkpoint, export
from gap_ds.checkpoint import portable
from gap_ds.checkpoint.folder import MANIFEST
from gap_ds.cli.inspect import inspect
from gap_ds.export import compact, compact_file
from gap_ds.method import plan, schedule
from gap_ds.parallel import items as exchange_items
from gap_ds.parallel import reading, records
from gap_ds.report import runs as report_runs
from gap_ds.sharding.comm import Comm
from gap_ds.training.exchanging import Exchanging

ROOT = Path(__file__).resolve().parents[2]

#: What a number, a string or a value of JSON is replaced by.
NUMBERS = [b"0", b"-1", b"1", b"2.5", b"1e400", b"NaN", b"9223372036854775808", b"18446744073709551615", b"1" * 400]
VALUES = [b"null", b"true", b"[]", b"{}", b'""', b'"../../x"', b'"\\u0000"', b"[" * 3000, b'{"a":' * 3000, *NUMBERS]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes, numbers, values, or of the length."""
    for _ in range(rng.randint(1, 3)):
        kind, at = rng.randrange(8), rng.randrange(len(data) + 1)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + rng.randint(1, 40) :]
        elif kind == 4:
            end = at + rng.randint(1, 40)
            data = data[:end] + data[at:end] + data[end:]
        else:
            head = data[: 1 << 16]  # of a large file the header
            pattern = rb"-?\d+(?:\.\d+)?" if kind < 7 else rb'"[^"\n]*"|\d+|true|false|null'
            if found := list(re.finditer(pattern, head)):
                start, end = rng.choice(found).span()
                data = data[:start] + rng.choice(NUMBERS if kind < 7 else VALUES) + data[end:]
    return data


@dataclass
class Target:
    """A kind of input: the file that is changed, and what reads it."""

    path: Path
    read: Callable[[], Any]
    #: Called with the changed bytes in place, so that a checksum does not keep them from being looked at.
    seal: Callable[[], None] = lambda: None
    original: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.path.read_bytes()

    def run(self, data: bytes) -> bool:
        """Whether an input was taken; False if it was refused as it should be. All else is raised."""
        self.path.write_bytes(data)
        self.seal()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.read()
        except (ValueError, TimeoutError):
            return False
        return True


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    inputs: int = 0
    taken: int = 0
    refused: int = 0
    slowest_s: float = 0.0


def fuzz(target: Target, inputs: int, seed: int) -> Tally:
    """Changed inputs, one after the other. The first that ends in another error is written beside the file."""
    tally, rng = Tally(), random.Random(seed)
    loggers = [logging.getLogger(name) for name in ("gap_ds", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:  # what is damaged is logged again and again
            logger.setLevel(logging.CRITICAL)
        for _ in range(inputs):
            data, started = mutate(target.original, rng), time.perf_counter()
            try:
                taken = target.run(data)
            except BaseException:
                target.path.with_name("found.bin").write_bytes(data)
                raise
            tally.slowest_s = max(tally.slowest_s, time.perf_counter() - started)
            tally.inputs += 1
            tally.taken += taken
            tally.refused += not taken
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        target.path.write_bytes(target.original)
        target.seal()
    return tally


# -- the files -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(6, 6)]) for _ in range(4))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for (layer,) in self.layers:
            x = layer(x) * self.scale
        return x


CONFIG = {
    **{"sparsity": 0.75, "partitions": 2, "phase_steps": 3, "rounds": 1, "finetune_steps": 2},
    **{"regrow": "last_value", "prune_ramp": 0.7, "update_steps": 1},
}


def trained(steps: int, config: dict[str, Any], **options: Any) -> GaPEngine:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    engine = GaPEngine(model, config, optimizer=optimizer, lr_scheduler=scheduler, **options)
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 6)).square().mean())
        engine.step()
    return engine


def targets(folder: Path) -> dict[str, Target]:
    """All kinds of input, with files in a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return {
            **_configs(folder),
            **_checkpoints(folder),
            **_exports(folder),
            **_runs(folder),
            **_exchange(folder),
            **_rows(folder),
        }


def _configs(folder: Path) -> dict[str, Target]:
    import yaml

    written, model = folder / "config.json", Model()
    written.write_text(
        json.dumps({**CONFIG, "distribution": {"layers.0": 0.5}, "exclude": ["layers.3"], "lr_restart": True})
    )
    as_yaml = written.with_suffix(".yaml")
    as_yaml.write_text(yaml.safe_dump(json.loads(written.read_text())))

    def read(path: Path) -> None:
        config = GaPConfig.load(path)
        schedule.build(config, 7)
        plan.build(model, config)

    return {f"config{path.suffix}": Target(path, lambda path=path: read(path)) for path in (written, as_yaml)}


def _checkpoints(folder: Path) -> dict[str, Target]:
    engine = trained(5, CONFIG, history=folder / "gap_history.jsonl")
    path = engine.save_checkpoint(folder / "saved", "t", {"epoch": 1}, portable=True)
    engine.save_masks(folder / "masks")
    world = Comm(single=True)
    buffers = dict(export.buffers(engine.module))
    result = {
        f"masks/{name}": Target(folder / "masks" / name, lambda: engine.load_masks(folder / "masks"))
        for name in ("masks.safetensors", "pruned.safetensors", "seen.safetensors", "before.safetensors", "state.json")
    }
    result["manifest"] = Target(path / MANIFEST, lambda: checkpoint.find_whole(folder / "saved", "t", world))
    result["portable"] = Target(
        path / "gap" / "portable_0.safetensors",
        lambda: portable.read(path / "gap", engine.run.backend, buffers, world),
    )
    for name in ("state.json", "rng_0.json"):
        file = path / "gap" / name
        result[f"sealed/{name}"] = Target(
            file, lambda: engine.load_checkpoint(folder / "saved", "t"), lambda file=file: _seal(path, file)
        )
    result["inspect"] = Target(path / "gap" / "masks.safetensors", lambda: inspect(path, lambda *_: None))
    return result


def _seal(path: Path, file: Path) -> None:
    """Makes the manifest say what a file is now."""
    manifest = json.loads((path / MANIFEST).read_text())
    data = file.read_bytes()
    manifest["files"][str(file.relative_to(path))] = [len(data), sha256(data).hexdigest()]
    (path / MANIFEST).write_text(json.dumps(manifest))


def _exports(folder: Path) -> dict[str, Target]:
    engine = trained(8, CONFIG)
    dense, small = folder / "dense", folder / "small"
    engine.export(dense)
    compact(dense, small)
    return {
        "compact": Target(small / compact_file.FILE, lambda: list(compact_file.read(small))),
        "export/gap.json": Target(dense / export.INFO, lambda: inspect(dense, lambda *_: None)),
        "export/weights": Target(dense / "model.safetensors", lambda: inspect(dense, lambda *_: None)),
    }


def _runs(folder: Path) -> dict[str, Target]:
    run = folder / "run"
    run.mkdir()
    (run / "gap_history.jsonl").write_bytes((folder / "gap_history.jsonl").read_bytes())
    signature = json.loads((run / "gap_history.jsonl").read_text().splitlines()[0])["signature"]
    lines = [{"kind": "train", "step": i, "epoch": 0, "loss": 2.5, "density": 0.5} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"bleu": 1.0, "signature": signature, "config": CONFIG, "applied_steps": 8}
    (run / "results.json").write_text(json.dumps(results))
    names = ("gap_history.jsonl", "metrics.jsonl", "results.json")
    return {f"run/{name}": Target(run / name, lambda: report_runs.load(run, "run")) for name in names}


def _exchange(folder: Path) -> dict[str, Target]:
    records._SETTLE = reading._AGAIN = 0.0  # damage does not get time to pass
    records._POLL = 0.001
    config = {
        "method": "parallel",
        "sparsity": 0.75,
        "partitions": 2,
        "phase_steps": 2,
        "rounds": 2,
        "finetune_steps": 1,
    }
    where = str(folder / "exchange")
    engines = [trained(1, config, worker=ParallelWorker(i, where, timeout=0.05)) for i in (0, 1)]

    def exchange_of(engine: GaPEngine) -> Any:
        return next(o.exchange for o in engine.run.observers if isinstance(o, Exchanging))

    def items(engine: GaPEngine) -> list[Any]:
        buffers = dict(export.buffers(engine.module))
        return exchange_items.items_of(engine.plan, engine.run.backend.shards(), buffers)

    for engine in engines:
        engine.finish()  # its partition is pruned, as at the end of a round
        exchange_of(engine).publish(0, items(engine), engine.mask_state.bits)
    reader = exchange_of(engines[0])

    def read() -> None:
        reader.read(0, items(engines[0]), reader.wait(0), lambda _: None)

    files = sorted(path for path in Path(where).rglob("*") if path.is_file() and "1" in path.name)
    result: dict[str, Target] = {}
    for path in files:
        manifest = path.with_suffix(".json")

        def seal(path: Path = path, manifest: Path = manifest) -> None:
            if path.suffix == ".safetensors":
                table = json.loads(manifest.read_text())
                data = path.read_bytes()
                manifest.write_text(json.dumps({**table, "bytes": len(data), "sha256": sha256(data).hexdigest()}))

        result[f"exchange/{path.suffix.removeprefix('.')}"] = Target(path, read, seal)
    return result


def _rows(folder: Path) -> dict[str, Target]:
    import datasets

    sys.path.insert(0, str(ROOT / "examples" / "translation"))
    import data

    cache = folder / "cache"
    datasets.config.HF_DATASETS_CACHE = str(cache)
    datasets.disable_progress_bars()
    rows = [{"translation": {"en": f"sentence {i}", "de": f"Satz {i}"}} for i in range(4)]
    written = folder / "rows.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")

    def read(path: Path) -> None:
        try:
            list(data.load_rows(str(path), "train", "en", "de"))
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    paths = [written, folder / "rows.parquet"]
    return {path.name: Target(path, lambda path=path: read(path)) for path in paths}
