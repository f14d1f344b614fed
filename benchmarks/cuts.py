"""Select masks of a matrix that is cut in different ways, unstructured and by patterns: time, memory, bytes received.

    python benchmarks/cuts.py

    range      a contiguous range of the flattened matrix on each rank, as ZeRO and FSDP2 cut it
    mesh       a box of rows and columns on each rank, as FSDP2 x TP cuts it
    assembled  every rank assembles the scores of the whole matrix and decides alike: what patterns need without gap_ds

All masks are compared with that of the whole matrix. Times are CPU seconds of the slowest rank, memory is the rise
during an untimed call on rank 0, bytes are those that a rank receives if an all-reduce is a ring. `--quick` is a size
for tests.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import measure
import torch
from boundary import Counted
from torch import Tensor

from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box
from gap_ds.masks.groups import Grouped, select_groups
from gap_ds.method.pattern import Unstructured, parse
from gap_ds.sharding.shard import Shard

NOTE = "ms: CPU time of the slowest rank, one thread on each; ratio: to the range of the same pattern in the same round"
KEY = ("rows", "columns", "ranks", "pattern", "cut")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4", "block:4x4"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.shape, args.rounds = 2, [64, 64], 2
    for pattern in args.patterns:
        rows = measure.on_ranks(args.ranks, compare, args.ranks, tuple(args.shape), pattern, args.rounds)
        words = f"--ranks {args.ranks} --shape {args.shape[0]} {args.shape[1]} --rounds {args.rounds}"
        measure.add("cuts", rows, args.out, NOTE, KEY, f"python benchmarks/cuts.py {words} --patterns {pattern}")


def cut(shape: tuple[int, int], ranks: int, mesh: bool) -> list[Box]:
    """Each rank's box: a range that cuts rows and groups, or a box of a mesh (ranks / 2, 2)."""
    total = math.prod(shape)
    if not mesh:
        edges = [(total * rank // ranks) + (rank % ranks and 1) for rank in range(ranks)] + [total]
        return [Box.span(lo, hi - lo, total) for lo, hi in itertools.pairwise(edges)]
    height, width = shape[0] * 2 // ranks, shape[1] // 2
    return [Box.of(shape, (rank // 2 * height, rank % 2 * width), (height, width)) for rank in range(ranks)]


def compare(ranks: int, shape: tuple[int, int], text: str, rounds: int) -> list[dict[str, Any]]:
    """Run all ways on every rank; return their rows."""
    group, pattern, total = Counted(ranks), parse(text), math.prod(shape)
    keep = pattern.budget(shape, total // 5, (0, 1))
    weights = torch.randn(total, generator=torch.Generator().manual_seed(0))
    boxes = {name: cut(shape, ranks, name == "mesh") for name in ("range", "mesh")}
    pieces = {name: cuts[group.rank].cut(weights).clone() for name, cuts in boxes.items()}

    def select(name: str) -> Tensor:
        piece = selection.Piece("entry", boxes[name][group.rank], selection.magnitude_keys(pieces[name]), 0)
        if isinstance(pattern, Unstructured):
            return selection.select_largest([piece], [keep], group)[0]
        return select_groups(pattern, [Grouped(piece, shape, (0, 1), keep, boxes[name], True)], group)[0]

    def assemble() -> Tensor:
        box, keys = boxes["range"][group.rank], selection.magnitude_keys(pieces["range"])
        whole = group.assemble_everywhere(keys(0, box.numel), Shard("entry", shape, box, 0, torch.Tensor))
        return bitmask.pack(box.cut(pattern.mask(whole.view(torch.float32).view(shape), keep, (0, 1)).flatten()))

    works = {"range": lambda: select("range"), "mesh": lambda: select("mesh")}
    works |= {} if isinstance(pattern, Unstructured) else {"assembled": assemble}
    expected = pattern.mask(weights.abs().view(shape), keep, (0, 1)).flatten()
    memory, received = {}, {}
    for name, work in works.items():
        box = boxes.get(name, boxes["range"])[group.rank]
        assert torch.equal(bitmask.unpack(work(), box.numel), box.cut(expected)), f"{name}: another mask"
        group.received = 0
        memory[name] = measure.peak_bytes(work)
        received[name] = group.received
    times = measure.in_turns(works, rounds, before=group.barrier, timer=lambda work: measure.both_seconds(work)[1])
    slowest = {name: group.slowest(values) for name, values in times.items()}
    return [
        {"rows": shape[0], "columns": shape[1], "ranks": ranks, "pattern": text, "cut": name, **figures}
        | {"extra_bytes_per_own_weight": None if memory[name] is None else round(memory[name] * ranks / total, 2)}
        | {"extra_MB": None if memory[name] is None else round(memory[name] / 1e6, 1)}
        | {"received_MB": round(received[name] / 1e6, 3)}
        for name, figures in measure.compared(slowest, "range").items()
    ]


if __name__ == "__main__":
    main()
