"""Time of applying a packed mask, compared with float and boolean masks, a copy, and an optimizer step.

    OMP_NUM_THREADS=1 python benchmarks/masks.py

All work on the same weights, in turns: one piece repeatedly, which stays in the caches if it fits, and 24 pieces one
after the other, as in a step, whose weights and masks come from memory. Bytes moved are weights, masks and results,
each read or written once. On a GPU a time is the mean of 50 calls. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor

from gap_ds.masks import bitmask

MILLION = 1_000_000
NOTE = (
    "ratio: to the float multiplication in the same round; times_copy: to the copy; weights are those of all pieces; "
    "fused AdamW is fp32"
)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--weights", type=int, nargs="+", default=[MILLION, 20 * MILLION], help="of one piece")
    parser.add_argument("--pieces", type=int, default=24, help="of a million weights, one after the other; 0: none")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    sizes = [(1, n) for n in args.weights] + [(args.pieces, MILLION)] * bool(args.pieces)
    if args.quick:
        sizes, args.rounds = [(1, 100_003), (3, 50_001)], 3
    rows = [row for size in sizes for dtype in args.dtypes for row in compare(args, *size, getattr(torch, dtype))]
    measure.write("masks", rows, args.out, NOTE)


def compare(args: argparse.Namespace, pieces: int, n: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return one row for each way to mask `pieces` pieces of n weights."""
    device = measure.device()
    torch.manual_seed(0)
    kept = [torch.rand(n, device=device) < args.density for _ in range(pieces)]
    weights = [torch.randn(n, device=device, dtype=dtype) for _ in kept]
    factors, bits, pruned = [k.to(dtype) for k in kept], [bitmask.pack(k) for k in kept], [~k for k in kept]
    copies, size = [torch.empty_like(w) for w in weights], weights[0].element_size()

    def each(work: Callable[..., object], *operands: list[Tensor]) -> Callable[[], object]:
        def run() -> None:
            for tensors in zip(*operands, strict=True):
                work(*tensors)

        return run

    words = [weight.view({2: torch.int16, 4: torch.int32}[size]) for weight in weights]
    by_numpy = each(bitmask._by_numpy, words, bits)  # the path without a compiler
    work: dict[str, tuple[Callable[[], object], float]] = {
        "packed, in place (gap_ds)": (
            lambda: bitmask.zero_pruned_all_(zip(weights, bits, strict=True)),
            2 * size + 1 / 8,
        ),
        **({} if device.type == "cuda" else {"packed, by NumPy alone": (by_numpy, 2 * size + 1 / 8)}),
        "float mask, mul_": (each(Tensor.mul_, weights, factors), 3 * size),
        "boolean mask, mul_": (each(Tensor.mul_, weights, kept), 2 * size + 1),
        "boolean mask, masked_fill_": (each(lambda w, p: w.masked_fill_(p, 0.0), weights, pruned), 2 * size + 1),
        "copy": (each(Tensor.copy_, copies, weights), 2 * size),
    }
    if dtype == torch.float32:
        work["fused AdamW step"] = (optimizer_step(pieces, n, device), 7 * size)
    timer = measure.device_seconds if device.type == "cuda" else measure.seconds
    times = measure.in_turns({name: run for name, (run, _) in work.items()}, args.rounds, timer=timer)
    to_copy = measure.compared(times, "copy")
    return [
        {"pieces": pieces, "weights": pieces * n, "dtype": str(dtype).removeprefix("torch."), "work": name, **figures}
        | {"times_copy": to_copy[name]["ratio"]}
        | {"GB_per_s": round(pieces * n * work[name][1] / (1e6 * figures["ms"]), 1)}
        for name, figures in measure.compared(times, "float mask, mul_").items()
    ]


def optimizer_step(pieces: int, n: int, device: torch.device) -> Callable[[], object]:
    parameters = [torch.nn.Parameter(torch.zeros(n, device=device)) for _ in range(pieces)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    return torch.optim.AdamW(parameters, fused=True).step


if __name__ == "__main__":
    main()
