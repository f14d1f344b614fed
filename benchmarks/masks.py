"""Applying a packed mask, against a multiplication by a float mask, by a boolean mask, a copy, and an optimizer step.

    OMP_NUM_THREADS=1 python benchmarks/masks.py

All work on the same weights, in turns. A bytes-moved column counts what has to be read and written: weights, masks and
results once. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

from gap_ds import masks

MILLION = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, nargs="+", default=[MILLION, 20 * MILLION])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.weights, args.rounds = [100_003], 3
    rows = [row for n in args.weights for dtype in args.dtypes for row in compare(args, n, getattr(torch, dtype))]
    measure.write("masks", rows, args.out, "ratio: to the float multiplication in the same round; fused AdamW is fp32")


def compare(args: argparse.Namespace, n: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    device = measure.device()
    torch.manual_seed(0)
    weights = torch.randn(n, device=device, dtype=dtype)
    kept = torch.rand(n, device=device) < args.density
    size = weights.element_size()
    float_mask, bits, copied = kept.to(dtype), masks.pack(kept), torch.empty_like(weights)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "packed, in place (gap_ds)": (lambda: masks.zero_pruned_(weights, bits), 2 * size + 1 / 8),
        "float mask, mul_": (lambda: weights.mul_(float_mask), 3 * size),
        "boolean mask, mul_": (lambda: weights.mul_(kept), 2 * size + 1),
        "boolean mask, masked_fill_": (lambda: weights.masked_fill_(kept, 0.0), 2 * size + 1),
        "copy": (lambda: copied.copy_(weights), 2 * size),
    }
    if dtype == torch.float32:
        work["fused AdamW step"] = (optimizer_step(n, device), 7 * size)
    times = measure.in_turns({name: run for name, (run, _) in work.items()}, args.rounds)
    return [
        {"weights": n, "dtype": str(dtype).removeprefix("torch."), "work": name, **figures}
        | {"GB_per_s": round(n * work[name][1] / (1e6 * figures["ms"]), 1)}
        for name, figures in measure.compared(times, "float mask, mul_").items()
    ]


def optimizer_step(n: int, device: torch.device) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.zeros(n, device=device))
    parameter.grad = Tensor.new_full(parameter.detach(), (n,), 1e-3)
    return torch.optim.AdamW([parameter], fused=True).step


if __name__ == "__main__":
    main()
