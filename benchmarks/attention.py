"""Time of a training step with the attention implementations of transformers, on the translation example's models.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

Forward and backward of the same model and batch under bf16 autocast, in turns. `models.choose_attention` selects the
implementation that the example trains with. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from typing import Any

import measure
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(measure.ROOT / "examples" / "translation"))
import model as models

IMPLEMENTATIONS = ("sdpa", "eager")
VOCABULARY = 6000


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["tiny", "base"], choices=models.PRESETS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 24, 48, 128, 512], help="tokens of a sentence")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, on each side")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    if args.quick:
        args.presets, args.lengths, args.tokens, args.rounds = ["tiny"], [12], 48, 2
    rows = [row for preset in args.presets for length in args.lengths for row in compare(args, preset, length)]
    measure.write("attention", rows, args.out, "ratio: to sdpa, PyTorch's fused attention, in the same round")


def compare(args: argparse.Namespace, preset: str, length: int) -> list[dict[str, Any]]:
    """Return one row per implementation."""
    device = measure.device()
    torch.manual_seed(0)
    model = models.build_model(models.build_config(preset, vocab_size=VOCABULARY, dropout=0.0)).to(device)
    shape = (max(1, args.tokens // length), length)
    sources, labels = (torch.randint(4, VOCABULARY, shape, device=device) for _ in range(2))
    works = {}
    for name in IMPLEMENTATIONS:
        one = copy.deepcopy(model)
        one.set_attn_implementation(name)
        works[name] = functools.partial(step, one, sources, labels)
    times = measure.in_turns(works, args.rounds)
    return [
        {"preset": preset, "length": length, "attention": name, **figures}
        for name, figures in measure.compared(times, IMPLEMENTATIONS[0]).items()
    ]


def step(model: PreTrainedModel, sources: torch.Tensor, labels: torch.Tensor) -> None:
    """Run forward and backward as in the example."""
    model.zero_grad()
    with torch.autocast(sources.device.type, torch.bfloat16):
        logits = model(input_ids=sources, decoder_input_ids=labels).logits
    models.loss(logits, labels, smoothing=0.1, denominator=labels.numel()).backward()


if __name__ == "__main__":
    main()
