"""Tokens per second of `generate` by a language model on a CPU, dense and sparse, and the sizes of its files.

    OMP_NUM_THREADS=1 python benchmarks/generate.py

Models of 10 M weights with random values (the presets of examples/language, vocabulary 8,000), their matrices in blocks
pruned by magnitude: 2:4 at 50 %, unstructured at 80 and 90 %. Four forms continue the same prompt, greedily, by the
same number of tokens with a cache:

    dense    as transformers loads it
    again    a copy of it: the distance of its ratio from 1 is the noise of the row
    packed   all layers dense in oneDNN's blocked layout: the fastest form without sparsity
    sparse   made by `gap_ds.sparsify_for_inference` for runs of this prompt

One thread, interleaved, CPU time, medians; a ratio is the tokens per second relative to the dense form in the same
round. Values of weights do not affect the speed. The compact file has masks and kept values of the pruned matrices.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "language"))

import decoder

from gap_ds import sparsify_for_inference
from gap_ds.export import compact_file
from gap_ds.method import pattern

PROMPT = 32
KINDS = (("2:4", 0.5), ("unstructured", 0.8), ("unstructured", 0.9))


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=decoder.presets(), default=["gpt2_10m", "llama_10m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=60, help="to choose the layouts of a model in")
    args = parser.parse_args()
    if args.quick:
        args.presets, args.batches, args.tokens, args.rounds, args.seconds = ["llama_tiny"], [1], 2, 2, 1.0
    torch.set_num_threads(1)
    rows = []
    for preset in args.presets:
        for kind, sparsity in KINDS[-1:] if args.quick else KINDS:
            model, pruned = build(preset, kind, sparsity, vocab_size=99 if args.quick else 8000)
            about = {"preset": preset, "pattern": kind, "sparsity": sparsity, **sizes(model, pruned)}
            for batch in args.batches:
                rows.append(about | {"batch": batch, "tokens": args.tokens} | compare(model, batch, args))
                print({key: rows[-1][key] for key in ("preset", "pattern", "sparsity", "batch", "sparse ratio")})
    measure.write("generate", rows, args.out)


def build(preset: str, kind: str, sparsity: float, vocab_size: int) -> tuple[Any, set[str]]:
    """Return a model, and the names of its pruned matrices."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(decoder.MODELS / f"{preset}.json", local_files_only=True)
    config.vocab_size, config.tie_word_embeddings = vocab_size, True
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # every run has all of its tokens
    model = AutoModelForCausalLM.from_config(config).eval()
    the_pattern, pruned = pattern.parse(kind), set[str]()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and (".layers." in name or ".h." in name):
            dims = (1, 0) if config.model_type == "gpt2" else (0, 1)
            keep = the_pattern.budget(weight.shape, round((1 - sparsity) * weight.numel()), dims)
            weight.data.masked_fill_(~the_pattern.mask(weight.detach().abs(), keep, dims), 0.0)
            pruned.add(name)
    return model, pruned


def sizes(model: Any, pruned: set[str]) -> dict[str, float]:
    """Return MB of the weights' file, dense and compact."""
    tensors = {name: weight.detach() for name, weight in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "dense.safetensors")
        files = Path(folder) / "dense.safetensors", compact_file.write(folder, tensors, pruned)
        dense, small = (round(path.stat().st_size / 1e6, 1) for path in files)
    return {"weights": sum(map(torch.numel, tensors.values())), "dense MB": dense, "compact MB": small}


@torch.inference_mode()
def compare(model: Any, batch: int, args: Any) -> dict[str, Any]:
    """Return tokens per second of all forms, and how many of the sparse form's tokens are those of the dense one."""
    shape, generator = (batch, PROMPT), torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, shape, generator=generator)

    def run(form: Any) -> Tensor:
        found: Tensor = form.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=args.tokens,
            max_new_tokens=args.tokens,
        )
        return found[:, PROMPT:]

    forms = {name: copy.deepcopy(model) for name in ("again", "packed", "sparse")}
    sparsify_for_inference(forms["packed"], layout="packed")
    started = time.perf_counter()
    table = sparsify_for_inference(forms["sparse"], run, seconds=args.seconds)
    chosen = time.perf_counter() - started
    runs: dict[str, Callable[[], object]] = {"dense": lambda: run(model)}
    runs |= {name: lambda form=form: run(form) for name, form in forms.items()}
    times = measure.in_turns(runs, args.rounds, timer=_cpu_seconds)
    made = batch * args.tokens
    found: dict[str, Any] = {f"{name} tokens/s": round(made / statistics.median(times[name]), 1) for name in runs}
    for name in ("again", "packed", "sparse"):
        ratios = [dense / other for dense, other in zip(times["dense"], times[name], strict=True)]
        found[f"{name} ratio"] = round(statistics.median(ratios), 3)
        if name == "sparse":
            found["interval"] = [round(bound, 3) for bound in measure.interval(ratios)]
    layouts = Counter[str]()
    for choice in table:
        layouts[choice.layout] += len(choice.names)
    same = run(forms["sparse"]) == run(model)
    return found | {
        "layouts": dict(layouts),
        "equal tokens": math.floor(1000 * float(same.float().mean())) / 1000,
        "choosing s": round(chosen, 1),
    }


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
