"""What other forms of the weights gain on this machine: the same translations in each form, in turns.

    python benchmarks/inference.py --presets base --sparsities 0.8 0.9 0.95 --batches 1 4 16 64 --beams 1 4

Three models take turns, so that whatever else the machine does falls on all alike; reported are medians:

    dense    as transformers loads it
    packed   all layers dense in oneDNN's blocked layout: the fastest form without sparsity
    sparse   what `gap_ds.sparsify_for_inference` makes of it, measured with the shapes of this batch

A model of random weights, its matrices pruned by magnitude, translates random sentences into a fixed number of tokens;
what the weights say has no influence on how fast they are multiplied. Outputs are compared token by token: with random
weights many hypotheses are nearly equal, so a rounding may exchange two of them; the logits' largest difference says
how far the forms are apart. Rows that the output file has are not measured again: the table can be made in pieces.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "translation"))

import model as models

from gap_ds import inference, sparsify_for_inference
from gap_ds.presets import VOCAB_SIZE

OUT = measure.RESULTS / "inference.json"
SOURCE = 24  # tokens of a source sentence
KEY = ("preset", "sparsity", "dtype", "threads", "batch", "beams", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=list(models.PRESETS), default=["base"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each translation")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of all forms")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--memory", action="store_true", help="peak memory of each form, in processes of their own")
    parser.add_argument("--one-form", choices=("dense", "packed", "sparse"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_form:
        print(json.dumps(peak(args)))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"machine": machine(args), "speed": []}
    for preset in args.presets:
        for sparsity in args.sparsities:
            for dtype in args.dtypes:
                what = {"preset": preset, "sparsity": sparsity, "dtype": dtype, "threads": args.threads}
                rows = [
                    what | {"batch": batch, "beams": beams, "tokens": args.tokens}
                    for batch in args.batches
                    for beams in args.beams
                ]
                key = "memory" if args.memory else "speed"
                done = [[row[k] for k in KEY] for row in results.setdefault(key, [])]
                rows = [row for row in rows if [row[k] for k in KEY] not in done]
                # Of the last call that added to the table; the load of each row is in the row.
                results["machine"] = machine(args)
                dense = build(preset, sparsity, getattr(torch, dtype), args.vocab_size) if rows else None
                for row in rows:
                    found = memory(row, args) if args.memory else compare(dense, row, args.rounds)
                    results[key].append(row | found)
                    show(results[key][-1])
                    write(args.out, results)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    about = {"command": measure.command(), "vocabulary": args.vocab_size, "source_tokens": SOURCE, "seed": 0}
    return {**about, **measure.machine()}


def build(preset: str, sparsity: float, dtype: torch.dtype, vocab_size: int) -> Any:
    """A model in evaluation mode; of each matrix inside its layers the smallest weights are zero."""
    torch.manual_seed(0)
    model = models.build_model(models.build_config(preset, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for _, weight in entries(model):
            threshold = weight.abs().flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values
            weight.masked_fill_(weight.abs() <= threshold, 0.0)
    return model.to(dtype)


def entries(model: nn.Module) -> list[tuple[str, Tensor]]:
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
    """All sentences get that many tokens: the token that would end them is one that the vocabulary does not have."""
    result: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False,
        eos_token_id=model.config.vocab_size, max_new_tokens=tokens, max_length=None,
    )  # fmt: skip
    return result


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits
    return result.float()


def compare(dense: Any, row: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The same translations in every form, in turns."""
    batch, beams, tokens = row["batch"], row["beams"], row["tokens"]
    ids = source(batch, dense.config.vocab_size)
    begin = time.perf_counter()
    sparse = copy.deepcopy(dense)
    table = sparsify_for_inference(sparse, lambda model: translate(model, ids, beams, 4))
    choosing = time.perf_counter() - begin
    packed = copy.deepcopy(dense)
    sparsify_for_inference(packed, batch * beams, form="packed")
    forms = {"dense": dense, "packed": packed, "sparse": sparse}
    outputs = {name: translate(model, ids, beams, tokens) for name, model in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds):
        for name in list(forms)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            translate(forms[name], ids, beams, tokens)
            seconds[name].append(time.perf_counter() - begin)
    ratios = {
        name: sorted(a / b for a, b in zip(seconds[name], seconds["sparse"], strict=True))
        for name in ("dense", "packed")
    }
    few = ids[:4]
    return {
        **{
            f"{name}_sentences_per_second": round(batch / statistics.median(times), 3)
            for name, times in seconds.items()
        },
        "ratio": round(statistics.median(ratios["dense"]), 3),
        "ratio_range": [round(ratios["dense"][0], 3), round(ratios["dense"][-1], 3)],
        "ratio_to_packed": round(statistics.median(ratios["packed"]), 3),
        "rounds": rounds,
        "forms": {
            form: sum(len(choice.names) for choice in table if choice.form == form)
            for form in inference.FORMS
            if any(choice.form == form for choice in table)
        },
        "equal_outputs": int((outputs["dense"] == outputs["sparse"]).all(dim=1).sum()),
        "largest_logit_difference": float((logits(dense, few) - logits(sparse, few)).abs().max()),
        "largest_logit": float(logits(dense, few).abs().max()),
        "choosing_seconds": round(choosing, 2),
        "load_average": round(os.getloadavg()[0], 2),
        "choices": [{**choice.row(), "names": len(choice.names)} for choice in table],
    }


def memory(row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of one translation in each form, of a process that has done nothing else."""
    found = {}
    for form in ("dense", "packed", "sparse"):
        options = [f"--{name}={row[key]}" for name, key in MEMORY_OPTIONS.items()]
        command = [sys.executable, __file__, "--one-form", form, f"--vocab-size={args.vocab_size}", *options]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[form] = json.loads(printed.splitlines()[-1])
    return {f"{form}_{key}": value for form, figures in found.items() for key, value in figures.items()}


MEMORY_OPTIONS = {
    "presets": "preset",
    "sparsities": "sparsity",
    "dtypes": "dtype",
    "threads": "threads",
    "batches": "batch",
    "beams": "beams",
    "tokens": "tokens",
}


def peak(args: argparse.Namespace) -> dict[str, int]:
    """MiB of this process after the form was made, and at the most from then on; making it may take more."""
    model = build(args.presets[0], args.sparsities[0], getattr(torch, args.dtypes[0]), args.vocab_size)
    ids = source(args.batches[0], args.vocab_size)
    beams, tokens = args.beams[0], args.tokens
    if args.one_form == "packed":
        sparsify_for_inference(model, args.batches[0] * beams, form="packed")
    elif args.one_form == "sparse":
        sparsify_for_inference(model, lambda model: translate(model, ids, beams, 4))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    translate(model, ids, beams, tokens)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"translating_mib": int(status["VmHWM"].split()[0]) >> 10, "choosing_mib": most}


def show(row: dict[str, Any]) -> None:
    print(json.dumps({key: value for key, value in row.items() if key != "choices"}), flush=True)


def write(path: Path, results: dict[str, Any]) -> None:
    """The JSON, and the same as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
    path.with_suffix(".md").write_text(table(results))


COLUMNS = {
    "preset": "preset",
    "sparsity": "sparsity",
    "dtype": "dtype",
    "threads": "threads",
    "batch": "batch",
    "beams": "beams",
    "tokens": "tokens",
    "dense_sentences_per_second": "dense /s",
    "packed_sentences_per_second": "packed /s",
    "sparse_sentences_per_second": "sparse /s",
    "ratio": "sparse : dense",
    "ratio_to_packed": "sparse : packed",
    "equal_outputs": "equal outputs",
    "load_average": "load",
}


def table(results: dict[str, Any]) -> str:
    lines = ["# inference", "", f"`{results['machine']['command']}`", "", json.dumps(results["machine"]), ""]
    lines += [results["note"], ""] if "note" in results else []
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in sorted(results["speed"], key=lambda row: [row[k] for k in KEY]):
        lines.append("| " + " | ".join(str(row[key]) for key in COLUMNS) + " |")
    if results.get("memory"):
        names = [k for k in results["memory"][0] if k not in ("tokens", "dtype")]
        lines += ["", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(str(row[k]) for k in names) + " |" for row in results["memory"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
