"""Select the largest weights of an entry spread over ranks, by four methods: time, memory and bytes received.

    python benchmarks/boundary.py

    gap_ds    exact radix selection; only counts travel
    topk      every rank gathers the entry and takes torch.topk
    kthvalue  every rank gathers the entry and takes all weights from the k-th on (ties are all kept: not exact)
    sort      every rank gathers the entry and sorts it stably

Each method ends with this rank's mask. All take turns on the same weights; times are those of the slowest rank. Memory
is the rise during an untimed call, on rank 0. Bytes are those that a rank receives if an all-reduce is a ring. With
more ranks than cores, ranks wait for each other: gathering and sorting on 4 ranks and 2 cores takes twice as long as on
4 cores, and the ratios favour gap_ds. Methods that would take minutes are left out above a size (MOST). `--quick` is a
size for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import torch
import torch.distributed as dist
from torch import Tensor

from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box
from gap_ds.sharding.comm import Comm
from gap_ds.sharding.shard import Shard

MILLION = 1_000_000
NOTE = (
    'ratio: to the method "to" in the same round; one thread on each rank, and where there are more ranks than cores '
    "the gathering methods take longer than they would on a core each"
)
KEY = ("weights", "ranks", "method")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--weights", type=int, nargs="+", default=[m * MILLION for m in (1, 5, 20, 50, 200)])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7, help="fewer above 10 million weights, 2 at least")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.weights, args.rounds = [2], [200_003], 2
    for n in args.weights:
        for ranks in args.ranks:
            peers = [name for name in args.peers if n <= MOST[name] // ranks]
            rounds = max(2, min(args.rounds, args.rounds * 10 * MILLION // n))
            rows = measure.on_ranks(ranks, compare, ranks, n, args.density, rounds, peers)
            words = f"--ranks {ranks} --weights {n} --density {args.density} --rounds {args.rounds} --peers"
            made = " ".join(["python benchmarks/boundary.py", words, *args.peers])
            measure.add("boundary", rows, args.out, NOTE, KEY, made)


def compare(ranks: int, n: int, density: float, rounds: int, peers: list[str]) -> list[dict[str, Any]]:
    """Run all methods on every rank; return their rows."""
    group, keep = Counted(ranks), int(density * n)
    device = measure.device() if torch.cuda.device_count() >= ranks else torch.device("cpu")
    per_rank = -(-n // ranks)
    start, numel = min(n, group.rank * per_rank), max(0, min(per_rank, n - group.rank * per_rank))
    # All ranks draw the same weights and cut them: they do not depend on the number of ranks.
    generator = torch.Generator().manual_seed(0)
    piece = torch.randn(n, generator=generator)[start : start + numel].clone().to(device)

    def gathered(choose: Callable[[Tensor, int], Tensor]) -> Callable[[], Tensor]:
        return lambda: choose(group.gather(piece, n), keep)[start : start + numel].clone()

    works = {"gap_ds": lambda: exact(piece, Box.span(start, numel, n), keep, group)} | {
        name: gathered(PEERS[name]) for name in peers
    }
    memory, received, found = {}, {}, {}
    for name, work in works.items():
        work()  # loads libraries and fills the allocator's arenas
        group.received = 0
        memory[name] = measure.peak_bytes(lambda name=name, work=work: found.update({name: work()}))
        received[name] = group.received
    # A stable sort breaks ties by the lowest index, like gap_ds; torch.topk leaves their order undefined.
    kept = bitmask.unpack(found["gap_ds"], numel)
    assert "sort" not in found or torch.equal(kept, found["sort"]), "the masks differ"
    assert int(group.sum(kept.count_nonzero()[None])) == keep, "another number of weights is kept"
    found.clear()
    times = measure.in_turns(works, rounds, before=group.barrier)
    slowest = {name: group.slowest(values) for name, values in times.items()}
    to = next((name for name in ("topk", *peers) if name in works), "gap_ds")
    rows: list[dict[str, Any]] = []
    for name, figures in measure.compared(slowest, to).items():
        extra = memory[name]
        rows.append(
            {"weights": n, "ranks": ranks, "method": name, **figures, "to": to}
            | {"extra_bytes_per_weight": None if extra is None else round(extra / max(1, numel), 2)}
            | {"extra_MB": None if extra is None else round(extra / 1e6, 1)}
            | {"received_MB": round(received[name] / 1e6, 3)}
        )
    return rows


class Counted(Comm):
    """Communication that counts the bytes received by this rank."""

    def __init__(self, ranks: int) -> None:
        super().__init__(single=ranks == 1)
        self.received = 0

    def sum(self, counts: Tensor) -> Tensor:
        self.received += 2 * (self.size - 1) * counts.nbytes // self.size
        return super().sum(counts)

    def all_gather(self, row: Tensor) -> Tensor:
        self.received += (self.size - 1) * row.nbytes
        return super().all_gather(row)

    def assemble_everywhere(self, piece: Tensor, shard: Shard) -> Tensor:
        self.received += 2 * (self.size - 1) * piece.element_size() * shard.full_numel // self.size
        return super().assemble_everywhere(piece, shard)

    def gather(self, piece: Tensor, total: int) -> Tensor:
        """Return the whole tensor (total,) on every rank."""
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


def exact(piece: Tensor, box: Box, keep: int, group: Comm) -> Tensor:
    entry = selection.Piece("entry", box, selection.magnitude_keys(piece), 0)
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
#: Largest entries times ranks for each peer: larger ones take minutes and gigabytes.
MOST = {"topk": 400 * MILLION, "kthvalue": 200 * MILLION, "sort": 20 * MILLION}

if __name__ == "__main__":
    main()
