"""Write the tables of README.md and docs/ from `benchmarks/results/`, between their markers.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aims
import figures
from figures import NO_GPU, SHOWN, Row, as_table, device, is_fp32, read_rows, span
from measure import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs="+", type=Path, default=[])
    parser.add_argument("--note", default="", help="how the runs were made, for readers of the results")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.note)
    changed = 0
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        before = page.read_text(encoding="utf-8")
        after = fill(before, SECTIONS | {"performance": aims.summary} if page.name == "README.md" else SECTIONS)
        changed += before != after
        if not args.check and before != after:
            page.write_text(after, encoding="utf-8")
    return int(args.check and changed > 0)


def fill(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->` by the section of that name.

    >>> fill("<!-- a -->\\nold\\n<!-- /a -->", {"a": lambda: "new\\n"})
    '<!-- a -->\\nnew\\n<!-- /a -->'
    """
    pattern = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + sections[match[2]]() + match[3], text)


# -- runs of the examples ----------------------------------------------------------------------------------------------

TRANSLATION = "translation_multi30k.json"


def translation_runs() -> list[Row]:
    """Return the collected runs of the translation example."""
    path = figures.RESULTS / TRANSLATION
    runs: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return runs


def collect(runs: list[Path], note: str) -> None:
    """Add the results of finished runs, with the command that repeats each."""
    rows = translation_runs()
    for run in runs:
        found = json.loads((run / "results.json").read_text(encoding="utf-8"))
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found.pop("entries")
        found |= {"name": run.name, "command": command(found), "note": note, "cores": len(os.sched_getaffinity(0))}
        found["machine"] = f"{platform.machine()} {found['device']}"
        found["validation_loss"] = [round(row["loss"], 4) for row in losses if row["kind"] == "validation"]
        found["arguments"]["dataset"] = Path(found["arguments"]["dataset"] or "generated").name
        found["arguments"].pop("output_dir")
        rows = [row for row in rows if row["name"] != run.name] + [found]
    (figures.RESULTS / TRANSLATION).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command(result: dict[str, Any]) -> str:
    """Return the command line of a run: every argument that is not the default."""
    sys.path.insert(0, str(ROOT / "examples" / "translation"))
    from train import Arguments

    arguments = result["arguments"]
    arguments = arguments | {"dataset": arguments["dataset"] and f"DATA/{Path(arguments['dataset']).name}"}
    words = ["deepspeed", "--num_accelerators", str(result["ranks"]), "examples/translation/train.py"]
    for field in dataclasses.fields(Arguments):
        usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = arguments.get(field.name, usual)
        if field.name in ("local_rank", "output_dir", "resume", "overwrite") or value == usual:
            continue
        flag = "--deepspeed_config" if field.name == "deepspeed_config" else "--" + field.name.replace("_", "-")
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--output-dir", "OUT"])


def translation() -> str:
    """Return BLEU of dense and sparse runs, side by side."""
    lines = [
        "| preset | run | epochs | entries pruned | whole model pruned | training FLOPs | BLEU | uncased | chrF |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in translation_runs():
        method = "dense" if row["dense"] else "C-GaP"
        epochs = row["applied_steps"] / row["steps_per_epoch"]
        lines.append(
            f"| {row['arguments']['preset']} | {method} | {epochs:g} | {row['entry_sparsity']:.0%} | "
            f"{row['model_sparsity']:.0%} | {row['training_flops']:.2f} | {row['bleu']:.1f} | "
            f"{row['bleu_uncased']:.1f} | {row['chrf']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def methods(preset: str, only: Collection[str] = (), sparsities: Sequence[float] = ()) -> str:
    """Return a table of benchmarks/quality: columns for each sparsity, the best method of the highest one first.

    only, sparsities: rows and sparsities to show; default: all.
    """
    sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))
    import records
    import report

    results = report.latest(records.read(figures.RESULTS / f"quality_{preset}.jsonl"))
    sparsities = sparsities or results.sparsities
    cells = {(cell.row, cell.sparsity): cell for cell in results.cells}
    rows = dict.fromkeys(cell.row for s in (*sparsities[::-1], 0.0) for cell in results.cells if cell.sparsity == s)
    dense = [row for row in rows if (row, 0.0) in cells]
    score = results.example.scores[results.example.score]
    names = ("loss", score, *(f"{score} on {split}" for split in results.also), "FLOPs")
    columns = [f"{name} at {s:.0%}" for name in names for s in sparsities]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in (*dense, *(row for row in rows if row not in dense)):
        if only and row not in only:
            continue
        found = [cells.get((row, s)) or cells.get((row, 0.0)) for s in sparsities]
        losses = [_bold(cell.loss.text(3), results.leads(cell)) if cell else "" for cell in found]
        scores = [
            figure.text(results.example.digits) if figure else ""
            for figure in (
                *(cell and cell.score for cell in found),
                *(cell and cell.also[split] for split in results.also for cell in found),
            )
        ]
        flops = [f"{cell.flops:.2f}" if cell else "" for cell in found]
        title = next(cell for cell in found if cell).title
        lines.append(f"| {title} | {' | '.join([*losses, *scores, *flops])} |")
    return "\n".join(lines) + "\n"


def rates(presets: Sequence[str], sparsity: float) -> str:
    """Return the loss and the score of seed 0 by learning rate: a row for each method of the last preset."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))
    import records
    import report
    from presets import PRESETS

    tables = {}
    for preset in presets:
        rate = records.expected(PRESETS[preset])["lr"]
        results = report.latest(records.read(figures.RESULTS / f"quality_{preset}.jsonl"))
        tables[rate] = {cell.row: cell for cell in results.cells if cell.sparsity in (0.0, sparsity)}
    score = results.example.scores[results.example.score]
    lines = []
    for row, last in tables[rate].items():
        cells = {rate: table.get(row) for rate, table in tables.items()}
        losses = {f"loss at {rate:g}": f"{cell.losses[0]:.3f}" if cell else "" for rate, cell in cells.items()}
        scores = {f"{score} at {rate:g}": f"{cell.scores[0]:.1f}" if cell else "" for rate, cell in cells.items()}
        lines.append({"method": last.title} | losses | scores)
    return as_table(lines)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def inference() -> str:
    """Return the speed of translating relative to dense, by preset and sparsity; a column for each batch size."""
    measured = figures.read("inference", "speed")
    batches, presets = sorted({row["batch"] for row in measured}), ("small", "base", "big")
    found: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in measured:
        kind = (not is_fp32(row), presets.index(row["preset"]), row["tokens"], row["beams"], row["sparsity"])
        times = f"{row['ratio']:.2f} ({row['ratio_to_packed']:.2f})" if row["form"] != "dense" else "dense"
        found.setdefault(kind, {})[row["batch"]] = times
    return as_table(
        [
            {"preset": presets[preset], "dtype": "bf16" if is_bf16 else "fp32", "tokens": tokens, "beams": beams}
            | {"pruned": f"{sparsity:.0%}"}
            | {f"batch {batch}": times.get(batch, "") for batch in batches}
            for (is_bf16, preset, tokens, beams, sparsity), times in sorted(found.items())
        ]
    )


# -- performance -------------------------------------------------------------------------------------------------------


def overhead() -> str:
    """Return the time of a step with the engine, relative to the step without."""
    return _overhead(read_rows("overhead")) or "Not measured yet (`make bench`).\n"


def _overhead(rows: list[Row]) -> str:
    return as_table(
        [
            {key: row[key] for key in ("preset", "backend", "ranks", "tokens")}
            | {"bare step, ms": f"{row['bare_ms']:.0f}", "with the engine": f"{row['engine_ms']:.0f}"}
            | {"ratio": f"{row['ratio']:.3f}", "95 %": span(row.get("interval")), "quartiles": span(row["quartiles"])}
            | {"of CPU time": _of_cpu_time(row)}
            | {"in the engine's own calls": f"{row['own_share']:.2%}" if row.get("own_share") else None}
            | {"a boundary, steps": row.get("boundary_steps")}
            | {"made": row["made"].get("date", "")[:10], "gap_ds": row["made"]["gap_ds"], "torch": row["made"]["torch"]}
            for row in rows
        ]
    )


def _of_cpu_time(row: Row) -> str | None:
    """Return the ratio, and its interval where it is one over builds of the models."""
    if not row.get("cpu_ratio"):
        return None
    return f"{row['cpu_ratio']:.3f}" + (f" ({span(row['cpu_interval'])})" if row.get("builds") else "")


def performance() -> str:
    """Return the most important rows on masks, boundaries, peers, memory and throughput."""
    parts = [_masks(), _boundary(), _peers(), _memory(), _throughput()]
    return "\n".join(part for part in parts if part)


def _masks(gpu: bool = False) -> str:
    """Return a size beyond the caches, and pieces as in a step; all sizes on a GPU."""
    rows = read_rows("masks", gpu)
    shown = [row for row in rows if is_fp32(row) and (gpu or row["weights"] == SHOWN or row.get("pieces", 1) > 1)]
    return as_table(
        [
            {"masks on fp32 weights": row["work"], "weights": row["weights"], "pieces": row.get("pieces", 1)}
            | {"ms": f"{row['ms']:.2f}", "times a float mask's mul_": f"{row['ratio']:.2f}"}
            | {"times a copy": row.get("times_copy")}
            for row in shown
        ]
    )


def _boundary(gpu: bool = False) -> str:
    rows = sorted(read_rows("boundary", gpu), key=lambda row: (row["weights"], row["ranks"]))
    largest = max((row["weights"] for row in rows), default=0)
    table = as_table(
        [
            {"choosing the largest tenth": row["method"], "ranks": row["ranks"], "weights": row["weights"]}
            | {"ms": f"{row['ms']:.0f}" if row["ms"] >= 10 else row["ms"]}
            | {"times topk": f"{row['ratio']:.2f}" if row["to"] == "topk" else None}
            | {"extra bytes a weight": row["extra_bytes_per_weight"], "extra MB a rank": row["extra_MB"]}
            | {"MB received": row["received_MB"]}
            for row in rows
            if row["weights"] in (SHOWN, largest) and row["method"] in ("gap_ds", "topk", "kthvalue")
        ]
    )
    crowded = sorted({(row["ranks"], row["made"]["cores"]) for row in rows if row["ranks"] > row["made"]["cores"]})
    shared = [f"{ranks} ranks share {cores} cores" for ranks, cores in crowded]
    text = f"\nHere {', '.join(shared)}: gathering and sorting would take less time on a core each.\n" if shared else ""
    return table + text


def _peers(gpu: bool = False) -> str:
    rows = read_rows("peers", gpu)
    names = {"ms": "step, ms", "ratio": "times bare AdamW", "cpu_ratio": "of CPU time", "interval": "95 %"}
    shown = [{names.get(k, k): v for k, v in row.items() if k != "quartiles" or "interval" not in row} for row in rows]
    text = ""
    for again in (row for row in rows if row["step by"] == "bare again"):
        low, high = again["interval"]
        within = [row["step by"] for row in rows if low <= row.get("ratio", 0) <= high and "bare" not in row["step by"]]
        text = f"\nThe bare step differs from itself by {low:.3f} to {high:.3f}"
        text += f"; equal to it within this noise: {'; '.join(within)}.\n" if within else ".\n"
    return as_table(shown) + text


def _memory(gpu: bool = False) -> str:
    return as_table([{k: v for k, v in row.items() if k not in ("preset", "made")} for row in read_rows("memory", gpu)])


def kept_memory() -> str:
    """Return optimizer state for kept weights: a row for each model, backend and sparsity, with torch's beside it."""
    rows = sorted(read_rows("kept_state"), key=lambda row: (row["model"], row["backend"], row["sparsity"]))
    torchs = {(row["model"], row["backend"]): row for row in rows if row["optimizer"] == "torch"}
    titles = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
    table = []
    for row in rows:
        if row["optimizer"] == "torch":
            continue
        beside = torchs.get((row["model"], row["backend"]))
        resident = {"resident, MB": "RSS in fine-tuning, MB", "peak, MB": "peak RSS, MB"}
        name = f"Llama, {row['weights'] / 1e6:.0f} M" if row["model"] == "llama" else f"preset {row['model']}"
        table.append(
            {"model": name, "backend": titles[row["backend"]], "pruned": f"{row['sparsity']:.0%}"}
            | {"on average": f"{row['run']:.2f}", "in the fine-tuning": f"{row['in fine-tuning']:.2f}"}
            | {"of dense": f"{row['run, of dense']:.2f}, {row['fine-tuning, of dense']:.2f}"}
            | {title: f"{row[key]:,}" + (f" ({beside[key]:,})" if beside else "") for title, key in resident.items()}
        )
    return as_table(table)


def kept_time() -> str:
    """Return the time of a step over kept weights: a row for each size and sparsity."""
    rows = read_rows("kept_state_time")
    cells = {(row["weights"], row["sparsity"], row["way"]): row for row in rows}
    table = []
    for weights, sparsity in dict.fromkeys((row["weights"], row["sparsity"]) for row in rows):
        found = {way: cells[weights, sparsity, way] for way in ("kept", "AdamW and masks", "passes")}
        table.append(
            {"weights": f"{weights / 1e6:.0f} M", "pruned": f"{sparsity:.0%}"}
            | {"gap_ds.optim.AdamW": f"{found['kept']['ratio']:.2f} ({span(found['kept']['interval'], '{:.2f}')})"}
            | {"the passes alone": f"{found['passes']['ratio']:.2f}"}
            | {"AdamW (foreach) and masks": f"{found['AdamW and masks']['ratio']:.2f}"}
        )
    return as_table(table)


def generate() -> str:
    """Return tokens per second of language models: a row for each model, pattern and batch."""
    table = []
    for row in read_rows("generate"):
        ratios = {"sparse": row["sparse ratio"], "packed": row["packed ratio"], "a copy": row["again ratio"]}
        kind = "" if row["pattern"] == "unstructured" else f", {row['pattern']}"
        table.append(
            {"model": row["preset"], "pruned": f"{row['sparsity']:.0%}{kind}", "batch": row["batch"]}
            | {"dense, tokens/s": f"{row['dense tokens/s']:.0f}"}
            | {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
            | {"95 %": span(row["interval"], "{:.2f}")}
            | {"layouts": ", ".join(f"{count} {layout}" for layout, count in row["layouts"].items())}
            | {"file, MB": f"{row['dense MB']}, {row['compact MB']}"}
        )
    return as_table(table)


def _throughput(gpu: bool = False) -> str:
    names = {"pair": "translation example", "tokens_per_s": "tokens/s", "ms": "median step, ms", "interval": "95 %"}
    names |= {"ratio_of_tokens": "time of all tokens", "ratio": "median of steps", "steps": "in steps"}
    rows = [row for row in read_rows("throughput", gpu) if row["loop"] != "loader"]
    return as_table([{names.get(key, key): value for key, value in row.items()} for row in rows])


def hook() -> str:
    """Return the host's work for each number of entries, with that of the commit it was compared with in brackets."""
    rows = {(row["backend"], row["entries"], row["code"]): row for row in read_rows("hook")}
    names = {"hook": "masking", "warm": "again at once", "rest": "rest of the hooks", "boundary": "a boundary"}
    backends = ("plain", "fsdp2", "zero3", "zero3, 100 sub-groups")
    table = []
    for backend in backends:
        for entries in sorted(entries for name, entries, code in rows if (name, code) == (backend, "now")):
            now, before = rows[backend, entries, "now"], rows.get((backend, entries, "before"))
            then = {part: f" ({before[part]:.1f})" if before else "" for part in names}
            cells = {f"{title}, ms": f"{now[part]:.2f}{then[part]}" for part, title in names.items()}
            table.append({"backend": backend, "entries": entries} | cells)
    return as_table(table)


def attention() -> str:
    """Return the time of a step with plain products, relative to fused attention, by preset and sentence length."""
    rows = [row for row in read_rows("attention") if row["attention"] == "eager"]
    lengths = dict.fromkeys(row["length"] for row in rows)
    cells = {(row["preset"], row["length"]): row["ratio"] for row in rows}
    return as_table(
        [
            {"plain products, times fused attention": f"preset {preset}"}
            | {f"{length} tokens": f"{cells[preset, length]:.2f}" for length in lengths if (preset, length) in cells}
            for preset in dict.fromkeys(row["preset"] for row in rows)
        ]
    )


def startup() -> str:
    """Return the times of the imports, and of the example until its first step."""
    return as_table(
        [{"from a fresh process": row["what"], "s": f"{row['ms'] / 1e3:.2f}"} for row in read_rows("startup")]
    )


def profile(path: str) -> str:
    """Return the parts of a step or a boundary, and the operators that take most time."""
    rows = [row for row in read_rows("profile_paths") if row["path"] == path]
    if not rows:
        return "Not profiled yet (`make bench`).\n"
    (whole,) = (row for row in rows if row["kind"] == "whole")
    parts = [
        {f"part of a {path} of {whole['ms']:.0f} ms": row["what"], "share": f"{row['share']:.1%}"}
        for row in rows[1:]
        if row["kind"] == "part"
    ]
    names = (f"`{row['what']}` {row['share']:.0%}" for row in rows if row["kind"] == "operator")
    return f"{as_table(parts)}\nOperators by their own time: {', '.join(names)}.\n"


# -- a GPU -------------------------------------------------------------------------------------------------------------


def gpu() -> str:
    """Return all tables of gpu.json."""
    if not device():
        return NO_GPU
    failed = ", ".join(f"{each['benchmark']} ({each['error']})" for each in figures.gpu()["failed"])
    parts = [
        f"On one {device()}, `{figures.gpu()['command']}`, {figures.gpu()['seconds']} s:\n",
        _overhead(read_rows("overhead", True)),
    ]
    parts += [_masks(True), _boundary(True), _peers(True), _memory(True), _throughput(True)]
    for name in ("device", "hook", "kept_state_time", "short_quality"):
        parts.append(as_table([{k: v for k, v in row.items() if k != "made"} for row in read_rows(name, True)]))
    parts += [f"Left out: {failed}.\n" if failed else ""]
    return "\n".join(part for part in parts if part)


def no_gpu() -> str:
    if device():
        return f"A separate section has figures from one {device()}; all others are from CPUs.\n"
    return (
        "**No figure here is from a GPU.** None has been measured yet; `make bench-gpu` writes "
        "`benchmarks/results/gpu.json`.\n"
    )


def tested() -> str:
    """Return the README's line on tested hardware."""
    ran = f"The benchmarks have run on one {device()}." if device() else "Nothing has been run on a GPU yet."
    return f"- Tested on CPUs (2 to 4 processes over gloo). {ran}\n"


def kernel() -> str:
    """Return the sentence on Triton's kernel: run on a GPU or not."""
    equal = "It equals the PyTorch path in Triton's interpreter (`tests/unit/test_triton.py`)"
    if read_rows("masks", gpu=True):
        return f"{equal}; its times on a GPU are in the table above.\n"
    return f"{equal}, and has not run on a GPU yet.\n"


#: (backend, test file, prefix of its rows' names, exactness in fp32)
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
    """Return the backends with the variants that the tests train, from the tables of rows in the tests."""
    sys.path.insert(0, str(ROOT / "tests" / "sharding"))
    lines = ["| backend | variants trained by the tests | equal to the reference | tested where |", "|---|---|---|---|"]
    lines.append("| Plain PyTorch | one process (tests/unit/training/test_engine.py) | | CPU |")
    for backend, file, prefix, exactness in BACKENDS:
        tests = importlib.import_module(file)
        rows = [row["name"] for row in (*tests.ROWS, *getattr(tests, "ROWS_4", ()), *getattr(tests, "FP16", ()))]
        variants = dict.fromkeys(name.removeprefix(prefix).strip("_") for name in rows if name.startswith(prefix))
        assert variants, f"{file} has no rows of {backend}"
        words = ", ".join(name.replace("_", " ") for name in variants)
        lines.append(f"| {backend} | {words} | {exactness} | CPU, over gloo |")
    return "\n".join(lines) + "\n"


#: Rows of the table in README.md.
SHORT = ("dense", "cyclic_2_rising_scaled", "gradual_scaled", "gradual", "granet", "cyclic_3", "parallel_3")

#: The sections of the pages, by the name of their markers. In README.md "performance" is the summary.
SECTIONS: dict[str, Callable[[], str]] = {
    "translation": translation,
    "quality": partial(methods, "cpu"),
    "quality-short": partial(methods, "cpu", only=SHORT, sparsities=(0.9,)),
    "rates": partial(rates, ("cpu_low_lr", "cpu", "cpu_high_lr"), 0.9),
    "vision": partial(methods, "vision_cpu"),
    "tatoeba": partial(methods, "tatoeba"),
    "language": partial(methods, "language_cpu"),
    "summary": aims.summary,
    "backends": backends,
    "kept-memory": kept_memory,
    "kept-time": kept_time,
    "tested": tested,
    "inference": inference,
    "generate": generate,
    "no-gpu": no_gpu,
    "overhead": overhead,
    "hook": hook,
    "performance": performance,
    "gpu": gpu,
    "attention": attention,
    "startup": startup,
    "aims": aims.aims,
    "kernel": kernel,
    "profile-step": partial(profile, "step"),
    "profile-boundary": partial(profile, "boundary"),
}

if __name__ == "__main__":
    sys.exit(main())
