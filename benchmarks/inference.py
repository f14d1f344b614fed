"""Speed of translation with other layouts of the weights.

    OMP_NUM_THREADS=1 python benchmarks/inference.py --threads 1 --presets small base big --tokens 8  # the whole table
    python benchmarks/inference.py --quick --out /tmp/inference.json

Four models translate the same sentences in turns:

    dense    as transformers loads it
    again    a copy of it: the distance of its ratio from 1 is the noise of the row
    packed   all layers dense in oneDNN's blocked layout: the fastest form without sparsity
    sparse   made by `gap_ds.sparsify_for_inference`, with runs of this batch, beam and length

Figures are medians over the rounds. Ratios are taken within a round, with their range. With one thread, seconds are CPU
time, so other processes affect them through the caches alone. With more threads they are wall time.

A model of random weights, pruned by magnitude, translates random sentences into a fixed number of tokens; the values of
weights do not affect the speed. Outputs are compared token by token. With random weights many hypotheses are nearly
equal, so rounding may exchange two of them; the largest difference of the logits measures the distance of the forms.
Memory is that of the weights plus that of a translation; with --memory, the peak of a separate process. Files are the
dense export and the compact one. Rows in the output file are not measured again: the table can be made in pieces.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "translation"))

import model as models

from gap_ds import sparsify_for_inference
from gap_ds.cli.presets import VOCAB_SIZE
from gap_ds.export import compact
from gap_ds.export.compact_file import FILE
from gap_ds.inference import timing
from gap_ds.inference.layers import LAYOUTS
from gap_ds.inference.measure import MEASURED
from gap_ds.inference.tuning import Choice

OUT = measure.RESULTS / "inference.json"
VERSION = 2  # of the file; rows of other versions are measured again
SOURCE = 24  # tokens of a source sentence
KEY = ("preset", "sparsity", "dtype", "threads", "batch", "beams", "tokens")
#: Cells of the full table, in fp32.
FULL = list(itertools.product(("small", "base", "big"), (0.8, 0.9, 0.95), (1, 4, 16, 64), (1, 4)))
LONG = 2.0  # seconds; longer runs need no warm-up run
QUICK = [
    "--presets=tiny",
    "--sparsities=0.9",
    "--batches=1",
    "--beams=1",
    "--tokens=3",
    "--rounds=3",
    "--vocab-size=99",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=list(models.PRESETS), default=["base"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each translation")
    parser.add_argument("--rounds", type=int, default=9, help="largest number of timed rounds of all forms")
    parser.add_argument("--seconds", type=float, default=20, help="after which no round begins, once there are three")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--memory", action="store_true", help="peak memory of each form, in separate processes")
    parser.add_argument("--quick", action="store_true", help="one row of preset tiny, for tests")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.quick:
        args = parser.parse_args([*sys.argv[1:], *QUICK])
    torch.set_num_threads(args.threads)
    disable_progress_bar()  # of saving
    results = read(args.out)
    for preset, sparsity in itertools.product(args.presets, args.sparsities):
        if not args.memory and not any(
            (row["preset"], row["sparsity"]) == (preset, sparsity) for row in results["files"]
        ):
            results["files"] += files(preset, sparsity, args.vocab_size)
        for dtype in args.dtypes:
            what = {"preset": preset, "sparsity": sparsity, "dtype": dtype, "threads": args.threads}
            rows = [
                what | {"batch": batch, "beams": beams, "tokens": args.tokens}
                for batch in args.batches
                for beams in args.beams
            ]
            key = "memory" if args.memory else "speed"
            done = [[row[k] for k in KEY] for row in results[key]]
            rows = [row for row in rows if [row[k] for k in KEY] not in done]
            dense = build(preset, sparsity, getattr(torch, dtype), args.vocab_size) if rows else None
            for row in rows:
                found = memory(row, args) if args.memory else compare(dense, row, args)
                results[key].append(row | found)
                # The machine of the last call that added rows; each row has its load.
                results["machine"] = machine(args)
                show(results[key][-1])
                write(args.out, results)


def read(path: Path) -> dict[str, Any]:
    """Return the contents of the file; empty if there is none, or one of another version."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("version") == VERSION else {"version": VERSION, "files": [], "speed": [], "memory": []}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    about = {"command": measure.command(), "vocabulary": args.vocab_size, "source_tokens": SOURCE, "seed": 0}
    return {**about, **measure.machine()}


def build(preset: str, sparsity: float, dtype: torch.dtype, vocab_size: int) -> Any:
    """Return a model in evaluation mode, the smallest weights of each matrix inside its layers set to zero."""
    torch.manual_seed(0)
    model = models.build_model(models.build_config(preset, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for _, weight in entries(model):
            threshold = weight.abs().flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values
            weight.masked_fill_(weight.abs() <= threshold, 0.0)
    return model.to(dtype)


def entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the matrices inside the layers, by name."""
    return [
        (f"{name}.weight", module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".")
    ]


def source(batch: int, vocab_size: int) -> Tensor:
    ids = torch.randint(models.UNK + 1, vocab_size, (batch, SOURCE), generator=torch.Generator().manual_seed(batch))
    ids[:, -1] = models.EOS
    return ids


def translate(model: Any, ids: Tensor, beams: int, tokens: int) -> Tensor:
    """Translate every sentence into `tokens` tokens: the end token is outside the vocabulary."""
    result: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False,
        eos_token_id=model.config.vocab_size, max_new_tokens=tokens, max_length=None,
    )  # fmt: skip
    return result


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits
    return result.float()


def compare(dense: Any, row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Time the same translations in every form, in turns."""
    batch, beams, tokens = row["batch"], row["beams"], row["tokens"]
    ids = source(batch, dense.config.vocab_size)

    def run(model: Any) -> Tensor:
        return translate(model, ids, beams, tokens)

    begin = time.perf_counter()
    outputs = {"dense": run(dense)}
    once = time.perf_counter() - begin
    MEASURED.clear()  # measured under the load of another row
    sparse, begin = copy.deepcopy(dense), time.perf_counter()
    table = sparsify_for_inference(sparse, run, seconds=max(60.0, 10 * once))
    choosing = time.perf_counter() - begin
    packed = copy.deepcopy(dense)
    sparsify_for_inference(packed, batch * beams, layout="packed")
    forms = {"dense": dense, "again": copy.deepcopy(dense), "packed": packed, "sparse": sparse}
    needs: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {name: [] for name in forms}

    def timed(name: str) -> None:
        seconds[name].append(timing.seconds(lambda model: outputs.update({name: run(model)}), forms[name], ids.device))

    if once < LONG:
        for name in forms:
            needs[name] = measure.peak_bytes(lambda name=name: timed(name))  # type: ignore[misc]
            seconds[name].clear()
    begin = time.perf_counter()
    for turn in range(args.rounds):
        if turn >= 3 and time.perf_counter() - begin > args.seconds:
            break
        for name in list(forms)[:: 1 if turn % 2 == 0 else -1]:
            if name in needs:
                timed(name)
            else:
                needs[name] = measure.peak_bytes(lambda name=name: timed(name))  # type: ignore[misc]
    few = ids[:4]
    return {
        **{f"{name}_sentences_per_second": round(batch / statistics.median(seconds[name]), 3) for name in forms},
        **ratio("ratio", seconds["dense"], seconds["sparse"]),
        **ratio("noise", seconds["dense"], seconds["again"]),
        **ratio("ratio_to_packed", seconds["packed"], seconds["sparse"]),
        "rounds": len(seconds["dense"]),
        "clock": "process" if args.threads == 1 else "wall",
        "form": in_words(table),
        "confirmed": next((round(choice.run, 3) for choice in table if choice.run), None),
        "equal_outputs": int((outputs["dense"] == outputs["sparse"]).all(dim=1).sum()),
        "largest_logit_difference": float((logits(dense, few) - logits(sparse, few)).abs().max()),
        "largest_logit": float(logits(dense, few).abs().max()),
        **{f"{name}_mib": mib(held(forms[name]), needs[name]) for name in ("dense", "packed", "sparse")},
        "choosing_seconds": round(choosing, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "choices": [{**choice.row(), "names": len(choice.names)} for choice in table],
    }


def ratio(name: str, old: list[float], new: list[float]) -> dict[str, Any]:
    """Return the speed of `new` relative to `old`: median over the rounds, and range."""
    ratios = sorted(a / b for a, b in zip(old, new, strict=True))
    return {name: round(statistics.median(ratios), 3), f"{name}_range": [round(ratios[0], 3), round(ratios[-1], 3)]}


def in_words(table: list[Choice]) -> str:
    """Count the layers by layout, in words; "dense" if none was changed."""
    count = Counter(name for choice in table for name in [choice.layout] * len(choice.names))
    return (
        "dense" if set(count) == {"dense"} else ", ".join(f"{form} {count[form]}" for form in LAYOUTS if form in count)
    )


def held(model: nn.Module) -> int:
    """Return the bytes of all tensors of the modules. Shared storage counts once."""
    found: dict[int, int] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in (t for t in own if isinstance(t, Tensor)):
            parts = [tensor]
            if tensor.layout == torch.sparse_csr:
                parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
            for part in parts:
                if part.is_mkldnn:  # has no storage
                    found[id(part)] = part.numel() * part.element_size()
                else:
                    found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(found.values())


def mib(held: int, need: int | None) -> int | None:
    return None if need is None else (held + need) >> 20


def files(preset: str, sparsity: float, vocab_size: int) -> list[dict[str, Any]]:
    """Return the sizes of the weights' file, dense and compact."""
    found = []
    for name in ("float32", "bfloat16"):
        model = build(preset, sparsity, getattr(torch, name), vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            dense, small = Path(folder) / "dense", Path(folder) / "compact"
            save_dense(model, dense)
            compact(dense, small)
            sizes = [path.stat().st_size for path in (dense / "model.safetensors", small / FILE)]
        what = {"preset": preset, "sparsity": sparsity, "dtype": name}
        found.append(what | {"dense MB": round(sizes[0] / 1e6, 1), "compact MB": round(sizes[1] / 1e6, 1)})
    return found


def save_dense(model: Any, folder: Path) -> None:
    """Write a dense export: the weights in one file, and their entries."""
    model.save_pretrained(folder, max_shard_size="100GB")
    info = {"signature": "benchmark", "entries": {name: {} for name, _ in entries(model)}}
    (folder / "gap.json").write_text(json.dumps(info))


def memory(row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the peak resident memory of one translation in each form, each in a fresh process."""
    found = {form: measure.on_ranks(1, peak, form, row, args.vocab_size)[0] for form in ("dense", "packed", "sparse")}
    return {f"{form}_{key}": value for form, figures in found.items() for key, value in figures.items()}


def peak(form: str, row: dict[str, Any], vocab_size: int) -> list[dict[str, int]]:
    """Return MiB of this process: peak of the translation, and peak of making the form before it."""
    torch.set_num_threads(row["threads"])
    model = build(row["preset"], row["sparsity"], getattr(torch, row["dtype"]), vocab_size)
    ids, beams, tokens = source(row["batch"], vocab_size), row["beams"], row["tokens"]
    if form == "packed":
        sparsify_for_inference(model, row["batch"] * beams, layout="packed")
    elif form == "sparse":
        sparsify_for_inference(model, lambda model: translate(model, ids, beams, tokens), seconds=600)
    most = measure.status("VmHWM")
    measure.reset_peak()
    translate(model, ids, beams, tokens)
    return [{"translating_mib": measure.status("VmHWM") >> 20, "choosing_mib": most >> 20}]


def show(row: dict[str, Any]) -> None:
    print(json.dumps({key: value for key, value in row.items() if key != "choices"}), flush=True)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the JSON, and the same as a table."""
    measure.save_json(path, results)
    measure.save(path.with_suffix(".md"), table(results))


COLUMNS = {
    **{key: key for key in KEY},
    "dense_sentences_per_second": "dense /s",
    "packed_sentences_per_second": "packed /s",
    "sparse_sentences_per_second": "sparse /s",
    "ratio": "sparse : dense",
    "noise": "dense : dense",
    "ratio_to_packed": "sparse : packed",
    "rounds": "rounds",
    "form": "form",
    "equal_outputs": "equal outputs",
    "largest_logit_difference": "logits differ by",
    "dense_mib": "dense MiB",
    "packed_mib": "packed MiB",
    "sparse_mib": "sparse MiB",
    "choosing_seconds": "choosing s",
    "load_average": "load",
}


def table(results: dict[str, Any]) -> str:
    machine = ", ".join(
        f"{key} {value}" for key, value in results["machine"].items() if key != "command" and value is not None
    )
    parts = ["# inference", f"`{results['machine']['command']}`", machine, note(results["speed"])]
    rows = sorted(
        results["speed"], key=lambda row: [list(models.PRESETS).index(row["preset"]), *(row[k] for k in KEY[1:])]
    )
    parts.append(measure.table([{name: cell(row, key) for key, name in COLUMNS.items()} for row in rows]))
    parts += [measure.table(results[key]) for key in ("files", "memory") if results[key]]
    return "\n\n".join(parts)


def cell(row: dict[str, Any], key: str) -> Any:
    value = row[key]
    if f"{key}_range" in row:
        low, high = row[f"{key}_range"]
        return f"{value} ({low} to {high})"
    return f"{value:.1e}" if key == "largest_logit_difference" else value


def note(rows: list[dict[str, Any]]) -> str:
    """Return the number of rows below the aim, and the missing cells of the full table."""
    slow = [row for row in rows if row["ratio"] < 0.95]
    least = min((row["ratio"] for row in rows), default=None)
    have = {(row["preset"], row["sparsity"], row["batch"], row["beams"]) for row in rows if row["dtype"] == "float32"}
    missing: dict[tuple[str, float], list[str]] = {}
    for preset, sparsity, batch, beams in FULL:
        if (preset, sparsity, batch, beams) not in have:
            missing.setdefault((preset, sparsity), []).append(f"{batch}/{beams}")
    text = [f"{len(rows)} rows; the least ratio is {least}, {len(slow)} are below 0.95."]
    if missing:
        cells = "; ".join(
            f"{preset} {sparsity:.0%}: {', '.join(names)}" for (preset, sparsity), names in missing.items()
        )
        text.append(f"Missing of the {len(FULL)} cells in fp32, as batch/beams: {cells}.")
    else:
        text.append(f"None of the {len(FULL)} cells is missing.")
    return " ".join(text)


if __name__ == "__main__":
    main()
