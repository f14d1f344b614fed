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
            **{"performance": summary(), "backends": backends(), "tested": tested()},
        },
        "docs/inference.md": {"inference": inference()},
        "docs/performance.md": {
            **{"no-gpu": no_gpu(), "overhead": overhead(), "performance": performance(), "gpu": gpu()},
            **{"attention": attention(), "startup": startup(), "aims": aims(), "kernel": kernel()},
            **{"profile-step": profile("step"), "profile-boundary": profile("boundary")},
        },
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


Row = dict[str, Any]

#: Weights of the rows that are shown; the other sizes are in the results.
SHOWN = 20_000_000


def _rows(name: str, gpu: bool = False) -> list[Row]:
    """The rows of a result; none where it has not been made."""
    if gpu:
        rows: list[Row] = _gpu_results().get(name, {}).get("rows", [])
        return rows
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def _gpu() -> dict[str, Any]:
    path = RESULTS / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _gpu_results() -> dict[str, Any]:
    found: dict[str, Any] = _gpu().get("results", {})
    return found


def _device() -> str:
    """The GPU of gpu.json; nothing where it has no result."""
    machine = _gpu().get("machine", {})
    return f"{machine['gpu']} (CUDA {machine.get('cuda')}, torch {machine['torch']})" if _gpu_results() else ""


def _table(rows: list[Row]) -> str:
    return measure.table(rows) if rows else ""


def _to(values: Any, form: str = "{:.3f}") -> str:
    return " to ".join(form.format(value) for value in values) if values else ""


# -- what is measured, and whether it is what is aimed at --------------------------------------------------------------


def summary() -> str:
    """The aims that say most, a line each, for the README."""
    rows = [{k: v for k, v in row.items() if k != "main"} for row in _aims() if row["main"]]
    return "\n".join(part for part in (_table(rows), "" if _device() else NO_GPU) if part)


def inference() -> str:
    """How many times as fast as dense translating is, by preset and sparsity; a column for each batch."""
    path = RESULTS / "inference.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["speed"] if path.exists() else []
    batches, presets = sorted({row["batch"] for row in rows}), ("small", "base", "big")
    found: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        kind = (row["dtype"] != "float32", presets.index(row["preset"]), row["tokens"], row["beams"], row["sparsity"])
        times = f"{row['ratio']:.2f} ({row['ratio_to_packed']:.2f})" if row["form"] != "dense" else "dense"
        found.setdefault(kind, {})[row["batch"]] = times
    return _table(
        [
            {"preset": presets[preset], "dtype": "bf16" if is_bf16 else "fp32", "tokens": tokens, "beams": beams}
            | {"pruned": f"{sparsity:.0%}"}
            | {f"batch {batch}": times.get(batch, "") for batch in batches}
            for (is_bf16, preset, tokens, beams, sparsity), times in sorted(found.items())
        ]
    )


NO_GPU = "GPU figures: not measured yet (`make bench-gpu`).\n"


def aims() -> str:
    """Every aim with its figure, met or not."""
    return _table([{k: v for k, v in row.items() if k != "main"} for row in _aims()])


def _aims() -> list[Row]:
    """What, its figure, the aim, and whether it is met; `main` for those that the README has."""
    rows = [*_aims_of_steps(), *_aims_of_masks(), *_aims_of_boundaries(), *_aims_of_memory(), *_aims_of_loops()]
    for row in _rows("startup"):
        if row["what"] == "import torch; import gap_ds, beyond the first":
            seconds = row["ms"] / 1e3
            rows.append(
                _aim("`import gap_ds` beyond `import torch`, s", f"{max(0.0, seconds):.2f}", "0.3", _met(seconds, 0.3))
            )
    return rows


def _aim(what: str, measured: str, aim: str, met: str, main: bool = False) -> Row:
    return {"what": what, "measured": measured, "aim": aim, "met": met, "main": main}


def _met(value: float, limit: float, interval: Any = None) -> str:
    """Of a median with the interval it lies in: yes or no only where all of the interval says so."""
    low, high = interval or (value, value)
    return "yes" if high <= limit else "**no**" if low > limit else "undecided"


def _interval(row: Row) -> Any:
    return row.get("interval") or row["quartiles"]


def _aims_of_steps() -> list[Row]:
    rows = []
    for gpu in (False, True):
        found = _rows("overhead", gpu)
        for preset in dict.fromkeys(row["preset"] for row in found):
            own = sorted((row for row in found if row["preset"] == preset), key=lambda row: float(row["ratio"]))
            low, high = own[0], own[-1]
            measured = f"{low['ratio']:.3f} ({low['backend']})"
            measured += f" to {high['ratio']:.3f} ({high['backend']})" if low is not high else ""
            # All of them must meet it, so the one that is furthest from it decides.
            states = [_met(row["ratio"], 1.01, _interval(row)) for row in own]
            worst = max(states, key=["yes", "undecided", "**no**"].index)
            if worst != "yes" and len(own) > 1:
                worst += f" ({sum(state == 'yes' for state in states)} of {len(own)} yes)"
            where = " on a GPU" if gpu else ""
            rows.append(_aim(f"a step{where}, preset {preset}, times the bare one's", measured, "1.01", worst, True))
            if inside := [row["own_share"] for row in own if row.get("own_share")]:
                measured = _to(dict.fromkeys(_ends(inside)), "{:.1%}")
                what = f"the engine's own calls in a step, preset {preset}, of the step"
                rows.append(_aim(what, measured, "1%", _met(max(inside), 0.01), True))
            if crossed := [row["boundary_steps"] for row in own if row.get("boundary_steps")]:
                big, what = gpu and preset == "big", f"a whole boundary{where}, preset {preset}, in steps"
                met = _met(max(crossed), 2) if big else ""
                rows.append(_aim(what, _to(dict.fromkeys(_ends(crossed)), "{:.2f}"), "2" if big else "", met, big))
    if not _rows("overhead", gpu=True):
        rows.append(_aim("a step on a GPU, times the bare one's", "not measured", "1.01", ""))
        rows.append(_aim("a whole boundary on a GPU, preset big, in steps", "not measured", "2", ""))
    return rows


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _aims_of_masks() -> list[Row]:
    rows = []
    for row in _rows("masks"):
        if "gap_ds" in row["work"]:
            pieces, main = row.get("pieces", 1), row["weights"] == SHOWN and _fp32(row)
            size = f"{row['weights']:,} {row['dtype']} weights" + (f" in {pieces} pieces" if pieces > 1 else "")
            what = f"applying masks to {size}, times a float `mul_`"
            rows.append(_aim(what, f"{row['ratio']:.2f}", "1.3", _met(row["ratio"], 1.3, _interval(row)), main))
    of_gpu = [row for row in _rows("masks", gpu=True) if "gap_ds" in row["work"]]
    for row in of_gpu:
        share, what = 1 / row["times_copy"], f"applying masks to {row['weights']:,} {row['dtype']} weights on a GPU"
        met = _met(-share, -0.8)
        rows.append(_aim(f"{what}, of a copy's bandwidth", f"{share:.0%}", "80%", met, _fp32(row)))
    if not of_gpu:
        rows.append(_aim("applying masks on a GPU, of a copy's bandwidth", "not measured", "80%", ""))
    return rows


def _aims_of_boundaries() -> list[Row]:
    rows = []
    for row in sorted(_rows("boundary"), key=lambda row: (row["weights"], row["ranks"])):
        if row["method"] == "gap_ds" and row["to"] == "topk":
            one, main = row["ranks"] == 1, row["weights"] == SHOWN
            what = f"choosing a tenth of {row['weights']:,} weights on {row['ranks']} rank{'' if one else 's'}"
            met = _met(row["ratio"], 0.5, _interval(row)) if one else ""
            rows.append(_aim(f"{what}, times `topk`", f"{row['ratio']:.2f}", "0.5" if one else "", met, main))
    # What a process has anyway shows in small entries, so that the largest count.
    if extra := [row["extra_bytes_per_weight"] for row in _rows("boundary") if _counts(row)]:
        what = f"choosing from {SHOWN:,} weights or more, extra bytes a weight of the piece (a piece has 4)"
        rows.append(_aim(what, _to(_ends(extra), "{:.2f}"), "4", _met(max(extra), 4)))
    return rows


def _counts(row: Row) -> bool:
    return row["method"] == "gap_ds" and row["weights"] >= SHOWN and row["extra_bytes_per_weight"] is not None


def _aims_of_memory() -> list[Row]:
    rows, found = [], _rows("memory")
    if masks := [row["masks, bits"] for row in found]:
        what = "the masks, bits for each sparse weight that a rank owns"
        rows.append(_aim(what, _to(dict.fromkeys(_ends(masks)), "{:.2f}"), "1", _met(round(max(masks), 2), 1)))
        over = [row["engine over bare, bits"] for row in found]
        what = "memory over the bare run (RSS), bits for each sparse weight that a rank owns"
        rows.append(_aim(what, _to(_ends(over), "{:.1f}"), "1 and a constant", "", True))
    if taken := [(row["a boundary's tensors, MB"], row) for row in found if "a boundary's tensors, MB" in row]:
        parts = [megabytes / row["largest entry's pieces, MB"] for megabytes, row in taken]
        what = "tensors of a boundary, its new masks included, in pieces of the largest entry"
        rows.append(_aim(what, _to(_ends(parts), "{:.2f}"), "1 and the masks", ""))
    return rows


def _aims_of_loops() -> list[Row]:
    rows = []
    for gpu in (False, True):
        found = _rows("throughput", gpu)
        for row in (row for row in found if row["loop"] == "example"):
            other = next(r["loop"] for r in found if r["pair"] == row["pair"] and not r["loop"].startswith("example"))
            what = f"the example's steps{' on a GPU' if gpu else ''}, times those of {_LOOPS.get(other, other)}"
            ratio = row.get("ratio_of_tokens", row["ratio"])
            met = _met(ratio, 1, _interval(row))
            rows.append(_aim(what, f"{ratio:.2f}", "1", met, True))
    return rows


_LOOPS = {"bare DeepSpeed": "a bare DeepSpeed loop", "Seq2SeqTrainer": "transformers' Seq2SeqTrainer"}


# -- tables of docs/performance.md -------------------------------------------------------------------------------------


def overhead() -> str:
    """Time of a step with the engine relative to the step without."""
    return _overhead(_rows("overhead")) or "Not measured yet (`make bench`).\n"


def _overhead(rows: list[Row]) -> str:
    return _table(
        [
            {key: row[key] for key in ("preset", "backend", "ranks", "tokens")}
            | {"bare step, ms": f"{row['bare_ms']:.0f}", "with the engine": f"{row['engine_ms']:.0f}"}
            | {"ratio": f"{row['ratio']:.3f}", "95 %": _to(row.get("interval")), "quartiles": _to(row["quartiles"])}
            | {"of CPU time": f"{row['cpu_ratio']:.3f}" if row.get("cpu_ratio") else None}
            | {"in the engine's own calls": f"{row['own_share']:.2%}" if row.get("own_share") else None}
            | {"a boundary, steps": row.get("boundary_steps")}
            | {"made": row["made"].get("date", "")[:10], "gap_ds": row["made"]["gap_ds"], "torch": row["made"]["torch"]}
            for row in rows
        ]
    )


def performance() -> str:
    """Masks, boundaries, peers, memory, throughput: the rows that say most, from all results that there are."""
    parts = [_masks(), _boundary(), _peers(), _memory(), _throughput()]
    return "\n".join(part for part in parts if part)


def _fp32(row: Row) -> bool:
    return bool(row["dtype"] == "float32")


def _masks(gpu: bool = False) -> str:
    """One size that does not fit the caches, and pieces as a step has them; on a GPU all sizes."""
    rows = _rows("masks", gpu)
    shown = [row for row in rows if _fp32(row) and (gpu or row["weights"] == SHOWN or row.get("pieces", 1) > 1)]
    return _table(
        [
            {"masks on fp32 weights": row["work"], "weights": row["weights"], "pieces": row.get("pieces", 1)}
            | {"ms": f"{row['ms']:.2f}", "times a float mask's mul_": f"{row['ratio']:.2f}"}
            | {"times a copy": row.get("times_copy")}
            for row in shown
        ]
    )


def _boundary(gpu: bool = False) -> str:
    rows = sorted(_rows("boundary", gpu), key=lambda row: (row["weights"], row["ranks"]))
    largest = max((row["weights"] for row in rows), default=0)
    table = _table(
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
    said = [f"{ranks} ranks share {cores} cores" for ranks, cores in crowded]
    text = f"\nHere {', '.join(said)}: gathering and sorting would take less time on a core each.\n" if said else ""
    return table + text


def _peers(gpu: bool = False) -> str:
    rows = _rows("peers", gpu)
    names = {"ms": "step, ms", "ratio": "times bare AdamW", "cpu_ratio": "of CPU time", "interval": "95 %"}
    shown = [{names.get(k, k): v for k, v in row.items() if k != "quartiles" or "interval" not in row} for row in rows]
    text = ""
    for again in (row for row in rows if row["step by"] == "bare again"):
        low, high = again["interval"]
        within = [row["step by"] for row in rows if low <= row.get("ratio", 0) <= high and "bare" not in row["step by"]]
        text = f"\nThe bare step differs from itself by {low:.3f} to {high:.3f}"
        text += f"; within that, and so not to be told from it: {', '.join(within)}.\n" if within else ".\n"
    return _table(shown) + text


def _memory(gpu: bool = False) -> str:
    return _table([{k: v for k, v in row.items() if k not in ("preset", "made")} for row in _rows("memory", gpu)])


def _throughput(gpu: bool = False) -> str:
    names = {"pair": "translation example", "tokens_per_s": "tokens/s", "ms": "median step, ms", "interval": "95 %"}
    names |= {"ratio_of_tokens": "time of all tokens", "ratio": "median of steps", "steps": "in steps"}
    rows = [row for row in _rows("throughput", gpu) if row["loop"] != "loader"]
    return _table([{names.get(key, key): value for key, value in row.items()} for row in rows])


def attention() -> str:
    """Time of a step with plain products, relative to PyTorch's fused attention, by preset and sentence length."""
    rows = [row for row in _rows("attention") if row["attention"] == "eager"]
    lengths = dict.fromkeys(row["length"] for row in rows)
    cells = {(row["preset"], row["length"]): row["ratio"] for row in rows}
    return _table(
        [
            {"plain products, times fused attention": f"preset {preset}"}
            | {f"{length} tokens": f"{cells[preset, length]:.2f}" for length in lengths if (preset, length) in cells}
            for preset in dict.fromkeys(row["preset"] for row in rows)
        ]
    )


def startup() -> str:
    """Imports, and the example until its first step."""
    return _table([{"from a fresh process": row["what"], "s": f"{row['ms'] / 1e3:.2f}"} for row in _rows("startup")])


def profile(path: str) -> str:
    """Parts of a step or a boundary, and the operators with most time of their own."""
    rows = [row for row in _rows("profile_paths") if row["path"] == path]
    if not rows:
        return "Not profiled yet (`make bench`).\n"
    (whole,) = (row for row in rows if row["kind"] == "whole")
    parts = [
        {f"part of a {path} of {whole['ms']:.0f} ms": row["what"], "share": f"{row['share']:.1%}"}
        for row in rows[1:]
        if row["kind"] == "part"
    ]
    names = (f"`{row['what']}` {row['share']:.0%}" for row in rows if row["kind"] == "operator")
    return f"{_table(parts)}\nOperators by their own time: {', '.join(names)}.\n"


# -- a GPU -------------------------------------------------------------------------------------------------------------


def gpu() -> str:
    """All tables of gpu.json."""
    if not _device():
        return NO_GPU
    failed = ", ".join(f"{each['benchmark']} ({each['error']})" for each in _gpu()["failed"])
    parts = [f"On one {_device()}, `{_gpu()['command']}`, {_gpu()['seconds']} s:\n", _overhead(_rows("overhead", True))]
    parts += [_masks(True), _boundary(True), _peers(True), _memory(True), _throughput(True)]
    parts += [f"Left out: {failed}.\n" if failed else ""]
    return "\n".join(part for part in parts if part)


def no_gpu() -> str:
    if _device():
        return f"Figures of a GPU stand in a section of their own, from one {_device()}; all others are of CPUs.\n"
    return (
        "**No figure here is from a GPU.** None has been measured yet; `make bench-gpu` writes "
        "`benchmarks/results/gpu.json`.\n"
    )


def tested() -> str:
    """The README's line on what it was tried on."""
    ran = f"The benchmarks have run on one {_device()}." if _device() else "Nothing has been run on a GPU yet."
    return f"- Tested on CPUs (2 to 4 processes over gloo). {ran}\n"


def kernel() -> str:
    """Whether Triton's kernel has been seen on a GPU."""
    equal = "It equals the PyTorch path in Triton's interpreter (`tests/unit/masks/test_triton.py`)"
    if _rows("masks", gpu=True):
        return f"{equal}; its times on a GPU are in the table above.\n"
    return f"{equal}, and has not run on a GPU yet.\n"


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
    lines.append("| Plain PyTorch | one process (tests/unit/training/test_engine.py) | | CPU |")
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
