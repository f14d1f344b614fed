"""Writes the tables of README.md and docs/performance.md from `benchmarks/results/`, between their markers.

python benchmarks/tables.py            rewrite them
python benchmarks/tables.py --check    exit 1 if one would change
python benchmarks/tables.py --collect RUN... --note "..."   first add finished runs of the translation example
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRANSLATION = RESULTS / "translation_multi30k.json"
OVERHEAD = RESULTS / "overhead.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs="+", type=Path, default=[])
    parser.add_argument("--note", default="", help="what a reader must know of how the runs were made")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.note)
    changed = 0
    for page, sections in {
        "README.md": {
            **{"translation": translation(), "quality": methods("cpu"), "vision": methods("vision_cpu")},
            **{"performance": summary(), "backends": backends()},
        },
        "docs/performance.md": {"overhead": overhead(), "performance": performance()},
    }.items():
        before = (ROOT / page).read_text(encoding="utf-8")
        after = fill(page, before, sections)
        changed += before != after
        if not args.check:
            (ROOT / page).write_text(after, encoding="utf-8")
    return int(bool(args.check and changed))


def fill(page: str, text: str, sections: dict[str, str]) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- /NAME -->` replaced."""
    for name, content in sections.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"{page} has no section {name}"
        text = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)
    return text


def collect(runs: list[Path], note: str) -> None:
    """Adds the results of finished runs, with the command that repeats each."""
    rows = json.loads(TRANSLATION.read_text(encoding="utf-8")) if TRANSLATION.exists() else []
    for run in runs:
        found = json.loads((run / "results.json").read_text(encoding="utf-8"))
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found.pop("entries")
        found |= {"name": run.name, "command": command(found), "note": note, "cores": len(os.sched_getaffinity(0))}
        found["machine"] = f"{platform.machine()} {found['device']}"
        found["validation_loss"] = [round(row["loss"], 4) for row in losses if row["kind"] == "validation"]
        found["arguments"]["dataset"] = Path(found["arguments"]["dataset"]).name
        found["arguments"].pop("output_dir")
        rows = [row for row in rows if row["name"] != run.name] + [found]
    TRANSLATION.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command(result: dict[str, Any]) -> str:
    """The command line of a run: every argument that is not the default."""
    sys.path.insert(0, str(ROOT / "examples" / "translation"))
    from train import Arguments

    arguments = {**result["arguments"], "dataset": f"DATA/{Path(result['arguments']['dataset']).name}"}
    words = ["deepspeed", "--num_accelerators", str(result["ranks"]), "examples/translation/train.py"]
    for field in dataclasses.fields(Arguments):
        value = arguments.get(field.name, field.default)
        if field.name in ("local_rank", "output_dir", "resume", "overwrite") or value == field.default:
            continue
        flag = "--deepspeed_config" if field.name == "deepspeed_config" else "--" + field.name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join([*words, "--output-dir", "OUT"])


def translation() -> str:
    """BLEU of dense and sparse runs side by side."""
    lines = [
        "| preset | run | epochs | entries pruned | whole model pruned | training FLOPs | BLEU | uncased | chrF |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(TRANSLATION.read_text(encoding="utf-8")) if TRANSLATION.exists() else []:
        method = "dense" if row["dense"] else "C-GaP"
        epochs = row["applied_steps"] / row["steps_per_epoch"]
        lines.append(
            f"| {row['arguments']['preset']} | {method} | {epochs:g} | {row['entry_sparsity']:.0%} | "
            f"{row['model_sparsity']:.0%} | {row['training_flops']:.2f} | {row['bleu']:.1f} | "
            f"{row['bleu_uncased']:.1f} | {row['chrf']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def methods(preset: str) -> str:
    """A table of benchmarks/quality with a column for each sparsity, the best method of the highest one first."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))
    import records
    import report

    results = report.latest(records.read(RESULTS / f"quality_{preset}.jsonl"))
    sparsities = results.sparsities
    cells = {(cell.row, cell.sparsity): cell for cell in results.cells}
    rows = dict.fromkeys(cell.row for s in (*sparsities[::-1], 0.0) for cell in results.cells if cell.sparsity == s)
    dense = [row for row in rows if (row, 0.0) in cells]
    score = results.example.scores[results.example.score]
    columns = [f"{name} at {s:.0%}" for name in (score, "FLOPs") for s in sparsities]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in (*dense, *(row for row in rows if row not in dense)):
        found = [cells.get((row, s)) or cells.get((row, 0.0)) for s in sparsities]
        scores = [_score(cell, bold=results.leads(cell)) if cell else "" for cell in found]
        flops = [f"{cell.flops:.2f}" if cell else "" for cell in found]
        title = next(cell for cell in found if cell).title
        lines.append(f"| {title} | {' | '.join([*scores, *flops])} |")
    return "\n".join(lines) + "\n"


def _score(cell: Any, bold: bool) -> str:
    """Mean, and the range over the seeds where there are several."""
    mean = f"**{cell.mean:.1f}**" if bold else f"{cell.mean:.1f}"
    return mean if len(cell.scores) == 1 else f"{mean} ({min(cell.scores):.1f} to {max(cell.scores):.1f})"


def overhead() -> str:
    """Time of a step with the engine relative to the step without."""
    lines = [
        "| preset | backend | ranks | bare step | with the engine | ratio of medians | median ratio | quartiles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(OVERHEAD.read_text(encoding="utf-8")) if OVERHEAD.exists() else []:
        low, *_, high = row["quartiles_of_ratios"]
        times = f"{row['bare_ms']:.0f} ms | {row['engine_ms']:.0f} ms"
        ratios = f"{row['ratio_of_medians']:.3f} | {row['median_of_ratios']:.3f} | {low:.3f} to {high:.3f}"
        lines.append(f"| {row['preset']} | {row['backend']} | {row['ranks']} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


#: Weights of the rows that are shown; the other sizes are in the results.
SHOWN = 20_000_000


def summary() -> str:
    """What the figures of `performance` and `overhead` come to, a line each."""
    steps = [row["ratio_of_medians"] for row in json.loads(OVERHEAD.read_text(encoding="utf-8"))]
    (mask,) = (row for row in _rows("masks") if row["weights"] == SHOWN and "gap_ds" in row["work"] and _fp32(row))
    chosen = {row["ranks"]: row for row in _boundaries() if row["method"] == "gap_ds"}
    memory = [row["engine over bare, bits per weight"] for row in _memories()]
    loops = {row["pair"]: row["ratio"] for row in _rows("throughput") if row["loop"] == "example"}
    ratios = ", ".join(f"{row['ratio']:.2f}" for row in chosen.values())
    ranks = ", ".join(map(str, chosen))
    rows = [
        ("a training step, times that of the bare engine", f"{min(steps):.2f} to {max(steps):.2f}", "1.01"),
        (f"applying the masks of {SHOWN:,} weights, times a float `mul_`", f"{mask['ratio']:.2f}", "1.3"),
        (f"choosing {SHOWN // 10:,} of them, times `torch.topk`, on {ranks} ranks", ratios, "0.5 on one"),
        (
            "memory over the bare run, bits for each sparse weight that a rank owns",
            f"{min(memory):.1f} to {max(memory):.1f}",
            "1 and a constant",
        ),
        ("the translation example, times a bare DeepSpeed loop", f"{loops['zero2']:.2f}", "1"),
        ("the translation example, times transformers' Seq2SeqTrainer", f"{loops['plain']:.2f}", "1"),
    ]
    table = measure.table([{"what": what, "measured": found, "aim": aim} for what, found, aim in rows])
    return "\n".join(part for part in (table, _gpu()) if part)


def performance() -> str:
    """Masks, boundaries, peers, memory, throughput: the rows that say most, from all results that there are."""
    parts = [_masks(), _boundary(), _peers(), _memory(), _throughput(), _gpu()]
    return "\n".join(part for part in parts if part)


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def _fp32(row: dict[str, Any]) -> bool:
    return bool(row["dtype"] == "float32")


def _masks() -> str:
    rows = [row for row in _rows("masks") if _fp32(row) and row["weights"] == SHOWN]
    return (
        measure.table(
            [
                {"masks on fp32 weights": row["work"], "weights": row["weights"]}
                | {"ms": f"{row['ms']:.2f}", "times a float mask's mul_": f"{row['ratio']:.2f}"}
                for row in rows
            ]
        )
        if rows
        else ""
    )


def _boundaries() -> list[dict[str, Any]]:
    rows = [row for path in RESULTS.glob("boundary_*.json") for row in _rows(path.stem)]
    return sorted((row for row in rows if row["weights"] == SHOWN), key=lambda row: int(row["ranks"]))


def _boundary() -> str:
    rows = [row for row in _boundaries() if row["method"] in ("gap_ds", "topk")]
    return (
        measure.table(
            [
                {"choosing the largest tenth": row["method"], "ranks": row["ranks"], "weights": row["weights"]}
                | {"ms": f"{row['ms']:.0f}", "times topk": f"{row['ratio']:.2f}"}
                | {"extra bytes a weight": row["extra_bytes_per_weight"], "MB received": row["received_MB"]}
                for row in rows
            ]
        )
        if rows
        else ""
    )


def _peers() -> str:
    names = {"ms": "step, ms", "ratio": "times bare AdamW", "quartiles": "quartiles"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in _rows("peers")]
    return measure.table(rows) if rows else ""


def _memories() -> list[dict[str, Any]]:
    return [row for path in sorted(RESULTS.glob("memory*.json")) for row in _rows(path.stem)]


def _memory() -> str:
    rows = _memories()
    return measure.table(rows) if rows else ""


def _throughput() -> str:
    rows = [row for row in _rows("throughput") if row["loop"] != "loader"]
    names = {"pair": "translation example", "tokens_per_s": "tokens/s", "ms": "median step, ms"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    return measure.table(rows) if rows else ""


def _gpu() -> str:
    there = (RESULTS / "gpu.json").exists()
    return "" if there else "GPU figures: not measured yet (`make bench-gpu`).\n"


#: (backend, test file, how its rows' names begin, what holds of fp32)
BACKENDS = (
    ("DistributedDataParallel", "test_zero", "ddp_", "bit for bit"),
    ("DeepSpeed ZeRO-0", "test_zero", "zero0_", "bit for bit"),
    ("DeepSpeed ZeRO-1", "test_zero", "zero1_", "bit for bit"),
    ("DeepSpeed ZeRO-2", "test_zero", "zero2_", "bit for bit"),
    ("DeepSpeed ZeRO-3", "test_zero", "zero3_", "bit for bit"),
    ("FSDP1 (`use_orig_params` both ways)", "test_fsdp", "fsdp1", "bit for bit; to 1e-6 with clipping"),
    ("FSDP2 (`fully_shard`)", "test_fsdp", "fsdp2", "bit for bit; to 1e-6 with clipping or 4 ranks"),
    ("Hybrid sharding, 2 x 2", "test_fsdp", "hsdp", "to 1e-6: sums of 4 ranks have another order"),
    ("fairscale FSDP (historical)", "test_fairscale", "fsdp", "bit for bit; to 1e-6 with clipping"),
    ("fairscale OSS (historical)", "test_fairscale", "oss", "bit for bit; to 1e-6 with clipping"),
)


def backends() -> str:
    """The backends with the variants that the tests really train, from the tests' own tables of rows."""
    sys.path.insert(0, str(ROOT / "tests" / "sharding"))
    lines = ["| backend | variants trained by the tests | equal to the reference | tested where |", "|---|---|---|---|"]
    lines.append("| Plain PyTorch | one process (tests/test_engine.py) | | CPU |")
    for backend, file, prefix, exactness in BACKENDS:
        tests = importlib.import_module(file)
        rows = [row["name"] for row in (*tests.ROWS, *getattr(tests, "ROWS_4", ()), *getattr(tests, "FP16", ()))]
        variants = dict.fromkeys(name.removeprefix(prefix).strip("_") for name in rows if name.startswith(prefix))
        assert variants, f"{file} has no rows of {backend}"
        words = ", ".join(name.replace("_", " ") for name in variants)
        lines.append(f"| {backend} | {words} | {exactness} | CPU, over gloo |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
