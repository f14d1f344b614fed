"""Loss of LoRA adapters over a sparse base, trained and merged with and without the mask.

    python benchmarks/adapters.py --steps 200

A small Llama learns one part of Python's documentation (the language topics), is pruned to 80 % by magnitude and
trained on with fixed masks. Adapters of rank 8 on all of its matrices then learn the other part (the docstrings of
modules), with the plain product and with the masked one. Losses are those of held-out documents of the second part, in
nats per token. `--quick` is a size for tests. Needs peft, which the development extra brings.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "language"))

import decoder
import documents
import perplexity
from common import bpe, cross_entropy
from packing import Packed

from gap_ds import GaPEngine
from gap_ds.hf import mask_adapters, merge

SPARSITY, RANK, CONTEXT, ROWS = 0.8, 8, 64, 8


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each of the three trainings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.steps = 2
    torch.manual_seed(args.seed)
    first, second, held_out, tokenizer = parts()
    model = decoder.build("llama_tiny", tokenizer, context=CONTEXT)
    held = prune(model, first, args.steps, args.seed)
    row = {"base": "llama_tiny", "sparsity": SPARSITY, "rank": RANK, "steps": args.steps, "seed": args.seed}
    row["base loss"] = loss(model, held_out)
    rows = [{**row, **adapt(copy.deepcopy(model), way, second, held_out, args, held)} for way in ("plain", "masked")]
    measure.write("adapters", rows, args.out)


def parts() -> tuple[Packed, Packed, Packed, Any]:
    """Return the text of the base, that of the adapters and its held-out tenth, packed, and the tokenizer."""
    texts = documents.python_documentation()
    topics = [text for text in texts if len(text) > 2_500]
    others = [text for text in texts if len(text) <= 2_500]
    tokenizer = bpe.train(texts, 1_000, end=False)
    rows = documents.datasets.Dataset.from_dict

    def packed(some: list[str]) -> Packed:
        return Packed.of(documents.encode(rows({"text": some}), tokenizer), CONTEXT)

    return packed(topics), packed([t for i, t in enumerate(others) if i % 10]), packed(others[::10]), tokenizer


def step(model: Any, text: Packed, random: np.random.Generator) -> Tensor:
    """Return the loss of a random batch."""
    batch = text.rows(random.choice(len(text), ROWS, replace=False).tolist())
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    denominator = int((labels != cross_entropy.IGNORE).sum())
    return cross_entropy.loss(logits, labels, smoothing=0.0, denominator=denominator)


def prune(model: nn.Module, text: Packed, steps: int, seed: int) -> dict[str, Tensor]:
    """Train the base, half of the steps dense and half with fixed masks; return its zeros."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    config = {
        "method": "one_shot",
        "sparsity": SPARSITY,
        "phase_steps": steps // 2,
        "finetune_steps": steps - steps // 2,
    }
    engine, random = GaPEngine(model, config, optimizer=optimizer), np.random.default_rng(seed)
    while not engine.finished:
        engine.backward(step(engine, text, random))
        engine.step()
    engine.close()
    return {entry.name: model.get_parameter(entry.name).detach() == 0 for entry in engine.plan.entries}


def adapt(
    model: nn.Module, way: str, text: Packed, held_out: Packed, args: Any, held: dict[str, Tensor]
) -> dict[str, Any]:
    """Train adapters, merge them, and return the losses before and after, and the zeros that are left."""
    import peft

    torch.manual_seed(args.seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    if way == "masked":
        mask_adapters(adapted)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer, random = torch.optim.AdamW(trained, lr=2e-3), np.random.default_rng(args.seed)
    adapted.train()
    for _ in range(args.steps):
        step(adapted, text, random).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = loss(adapted, held_out)
    merged = merge(adapted)
    revived = sum(int(merged.model.get_parameter(name)[zero].count_nonzero()) for name, zero in held.items())
    return {
        "product": way,
        "loss of the adapters": before,
        "loss after the merge": loss(merged.model, held_out),
        "update lost": round(merged.lost, 4),
        "zeros": sum(int(zero.sum()) for zero in held.values()),
        "zeros revived": revived,
    }


def loss(model: nn.Module, text: Packed) -> float:
    """Return the cross entropy in nats per token."""
    model.eval()
    found = perplexity.score(lambda batch: model(**batch, use_cache=False).logits, text, ROWS)
    return round(found["loss"], 5)


if __name__ == "__main__":
    main()
