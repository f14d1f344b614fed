"""What the device of this process computes, compared with the CPU; and the speed of 2:4 products there.

    python benchmarks/device.py

Masks, counts, selections and short runs must be equal bit for bit: their gradients are given, and the optimizer is SGD
with a power of two as its learning rate, so that a step rounds once. Steps of `gap_ds.optim.AdamW` may differ by
rounding; the largest difference is shown. A row that is not equal ends the benchmark with an error, after all rows are
written. Without a GPU the device is the CPU, and "packed" takes the place of 2:4. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, nn

from gap_ds import GaPEngine, optim, sparsify_for_inference
from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box
from gap_ds.masks.groups import Grouped, select_groups
from gap_ds.method.pattern import parse

CPU = torch.device("cpu")
PATTERNS = ("2:4", "4:8", "block:4x4", "block:1x2")
PHASES: dict[str, Any] = {"sparsity": 0.75, "finetune_steps": 2}
CYCLIC = PHASES | {"phase_steps": 2, "rounds": 1, "partitions": 2}
METHODS = {
    "cyclic": CYCLIC,
    "cyclic, 2:4": CYCLIC | {"sparsity": 0.5, "pattern": "2:4"},
    "cyclic, last values": CYCLIC | {"regrow": "last_value"},
    "rigl": PHASES | {"method": "rigl", "phase_steps": 6, "update_steps": 2},
    "set": PHASES | {"method": "set", "phase_steps": 6, "update_steps": 2},
}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the matrices")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.quick:
        args.side, args.rounds = 64, 2
    device = measure.device()
    rows = [*parity(device, min(args.side, 1024)), kept_state(device, args.side), *products(device, args)]
    measure.write("device", rows, args.out, f"{device.type} against cpu")
    if different := [row["what"] for row in rows if row.get("equal") is False]:
        sys.exit(f"different from the CPU: {', '.join(different)}")


def parity(device: torch.device, side: int) -> list[dict[str, Any]]:
    """Compare masks, counts, selections and runs, bit for bit."""
    works: dict[str, Callable[[torch.device], list[Tensor]]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        works[f"masks of {dtype}"] = lambda place, dtype=dtype: masked(place, side, dtype)
    works["selection"] = lambda place: select(place, side, magnitudes=True)
    works["selection by hashes"] = lambda place: select(place, side, magnitudes=False)
    for text in PATTERNS:
        works[f"selection, {text}"] = lambda place, text=text: select_pattern(place, side, text)
    for name, config in METHODS.items():
        works[f"run, {name}"] = lambda place, config=config: trained(place, config)
    rows = []
    for name, work in works.items():
        found, expected = work(device), work(CPU)
        equal = all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        rows.append({"what": name, "equal": equal})
    return rows


def weights(place: torch.device, side: int, ties: bool = True) -> Tensor:
    """Return weights (side * side,) with many equal magnitudes if `ties`, the same on every device."""
    found = torch.randn(side * side, generator=torch.Generator().manual_seed(0))
    return (found.round(decimals=1) if ties else found).to(place)


def masked(place: torch.device, side: int, dtype: torch.dtype) -> list[Tensor]:
    piece = weights(place, side).to(dtype)
    piece[::97] = float("inf")
    bits = bitmask.pack(weights(place, side, ties=False) > 0)
    before = bitmask.count_revived(piece, bits)
    bitmask.zero_pruned_all_([(piece, bits)])
    counts = torch.tensor([before, bitmask.count_revived(piece, bits), bitmask.count(bits)])
    return [piece.view(torch.int32 if dtype.itemsize == 4 else torch.int16), bits, counts]


def select(place: torch.device, side: int, magnitudes: bool) -> list[Tensor]:
    piece, box = weights(place, side), Box.span(0, side * side, side * side)
    keys = selection.magnitude_keys(piece) if magnitudes else selection.random_keys(0, "entry", box, place)
    pieces = [selection.Piece("entry", box, keys, 0)]
    return selection.select_largest(pieces, [side * side // 10], selection.Single())


def select_pattern(place: torch.device, side: int, text: str) -> list[Tensor]:
    pattern, shape, box = parse(text), (side, side), Box.span(0, side * side, side * side)
    keep = pattern.budget(shape, side * side // 5, (0, 1))
    piece = selection.Piece("entry", box, selection.magnitude_keys(weights(place, side)), 0)
    return select_groups(pattern, [Grouped(piece, shape, (0, 1), keep, [box], True)], selection.Single())


class Blocks(nn.Module):
    """Layers as the plan finds them; they are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(4))


def trained(place: torch.device, config: dict[str, Any]) -> list[Tensor]:
    """Train with given gradients to the end; return all weights and masks."""
    torch.manual_seed(0)
    model = Blocks().to(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-4)
    engine = GaPEngine(model, config | {"include": [r".*\.weight"]}, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    while not engine.finished:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(place)
        engine.watch(torch.ones((), device=place))
        engine.step()
    engine.check_weights()
    return [*(p.detach() for p in model.parameters()), *engine.mask_state.bits.values()]


def kept_state(device: torch.device, side: int) -> dict[str, Any]:
    """Step gap_ds.optim.AdamW and torch's with masks, on the same device; return the largest difference."""
    first, bits = weights(device, side, ties=False), bitmask.pack(weights(device, side) > 1)
    bitmask.zero_pruned_(first, bits)
    whole, packed = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    plain, kept = torch.optim.AdamW([whole], lr=1e-3), optim.AdamW([packed], lr=1e-3)
    kept.divide(packed, [(0, packed.numel())])
    kept.change_mask(packed, 0, bits)
    for step in range(5):
        whole.grad = packed.grad = torch.randn(first.shape, generator=torch.Generator().manual_seed(step)).to(device)
        plain.step()
        bitmask.zero_pruned_(whole.detach(), bits)
        kept.step()
    difference = float((whole - packed).detach().abs().max())
    return {"what": "gap_ds.optim.AdamW and masks", "equal": difference < 1e-5, "largest difference": difference}


def products(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a layer whose weights follow 2:4, dense and in the layout for it."""
    gpu = device.type == "cuda"
    layout, dtype = ("2:4", torch.float16) if gpu else ("packed", torch.float32)
    torch.manual_seed(0)
    layer = nn.Linear(args.side, args.side).to(device, dtype).requires_grad_(False)
    layer.weight.view(-1, 4)[:, [1, 3]] = 0
    made = nn.Sequential(copy.deepcopy(layer))
    sparsify_for_inference(made, *([] if gpu else [1]), layout=layout)
    rows, calls = [], 2 if args.quick else 20
    for batch in (16, 256, args.side):
        x = torch.randn(batch, args.side, device=device, dtype=dtype)
        with torch.inference_mode():
            works = {"dense": lambda x=x: layer(x), layout: lambda x=x: made(x)}
            times = measure.in_turns(works, args.rounds, timer=lambda work: measure.device_seconds(work, calls))
            close = torch.allclose(made(x).float(), layer(x).float(), rtol=1e-2, atol=1e-2)
        row = measure.compared(times, "dense")[layout]
        rows.append({"what": f"product, {layout}, batch {batch}", "equal": close, **row})
    return rows


if __name__ == "__main__":
    main()
