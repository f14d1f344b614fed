"""Choosing the largest weights of an entry that is spread over ranks: time, memory and bytes sent, four ways.

    python benchmarks/boundary.py

    gap_ds    exact radix selection; only counts travel
    topk      every rank gathers the entry and takes torch.topk
    kthvalue  every rank gathers the entry and takes all weights from the k-th on (ties are all kept: not exact)
    sort      every rank gathers the entry and sorts it stably

Each ends with this rank's mask. All take turns on the same weights; a time is that of the slowest rank. The memory is
the rise above what was there before, on rank 0, in a call that is not timed. Bytes are those that a rank receives if an
all-reduce is a ring. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import Tensor

from gap_ds import masks, selection
from gap_ds.comm import Comm

MILLION = 1_000_000
NOTE = "ratio: to torch.topk in the same round; one thread on each rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--weights", type=int, nargs="+", default=[MILLION, 5 * MILLION, 20 * MILLION, 50 * MILLION])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="boundary", help="of the result")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.weights, args.rounds = [2], [200_003], 2
    rows = []
    for ranks in args.ranks:
        rows += measure.on_ranks(ranks, compare, ranks, args.weights, args.density, args.rounds, args.peers)
        measure.write(args.name, rows, args.out, NOTE)


def compare(ranks: int, sizes: list[int], density: float, rounds: int, peers: list[str]) -> list[dict[str, Any]]:
    """Runs on every rank."""
    rows: list[dict[str, Any]] = []
    for n in sizes:
        group, keep = Counted(ranks), int(density * n)
        device = measure.device() if torch.cuda.device_count() >= ranks else torch.device("cpu")
        per_rank = -(-n // ranks)
        start, numel = min(n, group.rank * per_rank), max(0, min(per_rank, n - group.rank * per_rank))
        # Drawn on every rank alike and cut, so that the weights do not depend on the number of ranks.
        generator = torch.Generator().manual_seed(0)
        piece = torch.randn(n, generator=generator)[start : start + numel].clone().to(device)
        works = {
            "gap_ds": lambda piece=piece, start=start, keep=keep, group=group: exact(piece, start, keep, group),
            **{
                name: lambda choose=PEERS[name], piece=piece, start=start, keep=keep, n=n, group=group: choose(
                    group.gather(piece, n), keep
                )[start : start + len(piece)].clone()
                for name in peers
            },
        }
        memory, received, found = {}, {}, {}
        for name, work in works.items():
            work()  # libraries are loaded and the allocator has its arenas
            group.received = 0
            memory[name] = measure.peak_bytes(lambda name=name, work=work, found=found: found.update({name: work()}))
            received[name] = group.received
        # A stable sort gives ties to the lowest index, as gap_ds does; torch.topk says nothing of them.
        kept = masks.unpack(found["gap_ds"], numel)
        assert "sort" not in found or torch.equal(kept, found["sort"]), "the masks differ"
        assert int(group.sum(kept.count_nonzero()[None])) == keep, "another number of weights is kept"
        found.clear()
        times = measure.in_turns(works, rounds, before=group.barrier)
        times = {name: group.slowest(values) for name, values in times.items()}
        for name, figures in measure.compared(times, "topk").items():
            extra = memory[name]
            rows.append(
                {"weights": n, "ranks": ranks, "method": name, **figures}
                | {"extra_bytes_per_weight": None if extra is None else round(extra / max(1, numel), 2)}
                | {"received_MB": round(received[name] / 1e6, 3)}
            )
    return rows


class Counted(Comm):
    """The ranks of this benchmark; counts the bytes that this one receives."""

    def __init__(self, ranks: int) -> None:
        super().__init__(single=ranks == 1)
        self.received = 0

    def sum(self, counts: Tensor) -> Tensor:
        self.received += 2 * (self.size - 1) * counts.nbytes // self.size
        return super().sum(counts)

    def all_gather(self, row: Tensor) -> Tensor:
        self.received += (self.size - 1) * row.nbytes
        return super().all_gather(row)

    def gather(self, piece: Tensor, total: int) -> Tensor:
        """The whole tensor (total,) on every rank."""
        if self.size == 1:
            return piece
        self.received += 4 * (total - piece.numel())
        padded = torch.zeros(-(-total // self.size), device=piece.device)
        padded[: piece.numel()] = piece
        whole = torch.empty(self.size * padded.numel(), device=piece.device)
        dist.all_gather(list(whole.chunk(self.size)), padded)
        return whole[:total]

    def slowest(self, times: list[float]) -> list[float]:
        return super().all_gather(torch.tensor(times)).amax(0).tolist()


def exact(piece: Tensor, start: int, keep: int, group: Comm) -> Tensor:
    entry = selection.Piece("entry", start, piece.numel(), selection.magnitude_keys(piece), 0)
    return selection.select_largest([entry], [keep], group)[0]


def by_topk(whole: Tensor, keep: int) -> Tensor:
    kept = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
    kept[torch.topk(whole.abs(), keep, sorted=False).indices] = True
    return kept


def by_kthvalue(whole: Tensor, keep: int) -> Tensor:
    magnitude = whole.abs()
    return magnitude >= magnitude.kthvalue(whole.numel() - keep + 1).values


def by_sort(whole: Tensor, keep: int) -> Tensor:
    kept = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
    kept[torch.sort(whole.abs(), descending=True, stable=True).indices[:keep]] = True
    return kept


PEERS = {"topk": by_topk, "kthvalue": by_kthvalue, "sort": by_sort}

if __name__ == "__main__":
    main()
