"""What a boundary costs on many ranks: a model of it, fitted to measured points, checked by 64 ranks in one process.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

The bytes are those of `gap-ds plan` (gap_ds/cli/forecast.py). The time of a rank's own work is fitted to selections
here, on one core; that of the network is not measured but assumed (`Network`), and said so wherever it is used. Writes
scaling.json and scaling.png. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor

from gap_ds import masks, selection
from gap_ds.cli import forecast

sys.path.insert(0, str(measure.ROOT / "tests"))

MILLION = 1_000_000
RANKS = [8, 64, 512, 4096, 16384]


@dataclass(frozen=True)
class Model:
    """A decoder of `layers` blocks with `matrices` prunable matrices each; `weights` in all of them."""

    name: str
    weights: int
    layers: int
    matrices: int = 7
    partitions: int = 3

    @property
    def entries(self) -> int:
        """Entries of one partition: those that a boundary prunes."""
        return -(-self.layers * self.matrices // self.partitions)

    @property
    def pruned(self) -> int:
        """Weights of one partition."""
        return self.weights // self.partitions


#: Layers as in published models of these sizes (Llama 3.2 1B, 3.1 70B and 405B, Llama 2 7B); weights rounded.
MODELS = [
    Model("1B", 10**9, 16),
    Model("7B", 7 * 10**9, 32),
    Model("70B", 70 * 10**9, 80),
    Model("405B", 405 * 10**9, 126),
]


@dataclass(frozen=True)
class Network:
    """Assumed, not measured: seconds of one message, and bytes a second that one rank sends."""

    latency: float = 20e-6
    bandwidth: float = 25e9


@dataclass(frozen=True)
class Cost:
    """Seconds of a rank's own selection: per weight, per entry, and once. From `fit`."""

    per_weight: float
    per_entry: float
    once: float

    def seconds(self, weights: float, entries: int) -> float:
        return self.once + self.per_weight * weights + self.per_entry * entries


def ring(size: float, ranks: int, network: Network) -> float:
    """Seconds of a ring all-reduce of so many bytes."""
    return 2 * (ranks - 1) * (network.latency + size / ranks / network.bandwidth)


def tree(size: float, ranks: int, network: Network) -> float:
    """Seconds of a tree all-reduce: up and down again, each step with the whole message."""
    return 2 * math.ceil(math.log2(ranks)) * (network.latency + size / network.bandwidth)


def gathered(size: float, ranks: int, network: Network) -> float:
    """Seconds of an all-gather of so many bytes from every rank, by recursive doubling."""
    return math.ceil(math.log2(ranks)) * network.latency + (ranks - 1) * size / network.bandwidth


def boundary(model: Model, ranks: int, cost: Cost, network: Network) -> dict[str, Any]:
    """One boundary of C-GaP on one of R ranks, the weights spread evenly, ties to be broken in some entry.

    Bytes are exact for this geometry; `own_s` is fitted on a CPU core; `network_s` is assumed.
    """
    passes = len(selection._PASSES)
    counts = forecast.selection_bytes(model.entries)
    # Ties: each rank gathers two numbers per entry from every rank (gap_ds.selection._tie_quota).
    ties = 2 * 8 * model.entries
    reduce = passes * min(ring(counts / passes, ranks, network), tree(counts / passes, ranks, network))
    sparse = model.weights - model.pruned
    return {
        "weights": model.name,
        "ranks": ranks,
        # A rank that owns a stretch of a flat buffer has a last byte for each entry it touches.
        "mask_MB": (masks.nbytes(-(-sparse // ranks)) + model.layers * model.matrices) / 1e6,
        "reduced_MB": counts / 1e6,
        "ties_MB": ties * (ranks - 1) / 1e6,
        "gather_instead_MB": 4 * model.pruned * (ranks - 1) / ranks / 1e6,
        "own_s": cost.seconds(model.pruned / ranks, model.entries),
        "network_s": reduce + gathered(ties, ranks, network),
        "gather_instead_s": gathered(4 * model.pruned / ranks, ranks, network),
        # What training sends anyway in one step: gradients reduced and weights gathered, both in 16 bits.
        "step_network_s": 2 * 2 * model.weights / network.bandwidth,
        "exchange_MB": (masks.nbytes(model.pruned) + 4 * model.pruned / 5) / 1e6,
    }


# -- measured ----------------------------------------------------------------------------------------------------------


def select(
    weights: Sequence[Tensor], cuts: Sequence[tuple[int, int]], keep: int, group: selection.Reduce
) -> list[Tensor]:
    """This rank's masks of entries that lie one after the other; each is cut at the given places."""
    pieces = [
        selection.Piece(f"entry{e}", start, piece.numel(), selection.magnitude_keys(piece), e)
        for e, (piece, (start, _)) in enumerate(zip(weights, cuts, strict=True))
    ]
    return selection.select_largest(pieces, [keep] * len(pieces), group)


def points(sizes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Selections on one rank: (weights in all, entries) against processor seconds, medians of turns."""
    found: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    for _ in range(rounds + 1):
        for n, entries in sizes:
            weights = torch.randn(entries, n // entries, generator=torch.Generator().manual_seed(0))
            started = time.thread_time()
            select(weights.unbind(), [(0, n // entries)] * entries, n // entries // 5, selection.Single())
            found[n, entries].append(time.thread_time() - started)
    return [
        {"weights": n, "entries": entries, "measured_s": round(statistics.median(times[1:]), 5)}
        for (n, entries), times in found.items()
    ]


def fit(measured: Sequence[dict[str, Any]]) -> Cost:
    """Least squares of the relative error; no coefficient below zero."""
    rows = np.array([[p["weights"], p["entries"], 1.0] for p in measured])
    seconds = np.array([p["measured_s"] for p in measured])
    used = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(rows[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    values = np.zeros(3)
    values[used] = found
    return Cost(*map(float, values))


class Counted:
    """A rank of the simulation that counts what it hands to collectives, and the CPU time that these take here."""

    def __init__(self, inner: Any) -> None:
        self.rank, self._inner = inner.rank, inner
        self.reduced = self.gathered = 0
        self.seconds = 0.0

    def sum(self, counts: Tensor) -> Tensor:
        self.reduced += counts.nbytes
        return self._timed(self._inner.sum, counts)

    def all_gather(self, row: Tensor) -> Tensor:
        self.gathered += row.nbytes
        return self._timed(self._inner.all_gather, row)

    def _timed(self, collective: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        started = time.thread_time()
        result = collective(value)
        self.seconds += time.thread_time() - started
        return result


def simulate(ranks: int, n: int, entries: int, cost: Cost) -> dict[str, Any]:
    """The real selection on ranks that are threads, against one rank, and its cost against the model's."""
    from fake_ranks import Ranks

    size = n // entries
    # Few distinct values: ties have to be broken, so that every collective is met.
    weights = (torch.randn(entries, size, generator=torch.Generator().manual_seed(0)) * 64).round()
    edges = [size * rank // ranks for rank in range(ranks + 1)]
    cuts = [(edges[rank], edges[rank + 1]) for rank in range(ranks)]
    counted: list[Counted] = []

    own_seconds: list[float] = []

    def work(rank: Any) -> list[Tensor]:
        counted.append(own := Counted(rank))
        lo, hi = cuts[rank.rank]
        started = time.thread_time()
        found = select(weights[:, lo:hi].unbind(), [(lo, hi)] * entries, size // 5, own)
        own_seconds.append(time.thread_time() - started - own.seconds)
        return found

    results = Ranks(ranks).run(work)
    alone = select(weights.unbind(), [(0, size)] * entries, size // 5, selection.Single())
    for e in range(entries):
        parts = [masks.unpack(results[rank][e], cuts[rank][1] - cuts[rank][0]) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), masks.unpack(alone[e], size)), f"entry {e}: the masks differ"
    wanted = forecast.selection_bytes(entries)
    assert {c.reduced for c in counted} == {wanted}, "the forecast of the bytes is wrong"
    assert {c.gathered for c in counted} == {2 * 8 * entries}, "the forecast of the ties is wrong"
    return {
        "ranks": ranks,
        "weights": n,
        "entries": entries,
        "masks": "equal to one rank's",
        "reduced_bytes": wanted,
        "gathered_bytes": 2 * 8 * entries,
        "own_cpu_s": round(statistics.median(own_seconds), 4),
        "modelled_s": round(cost.seconds(n / ranks, entries), 4),
    }


# -- result ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=64, help="of the simulation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    sizes = [(MILLION * m, e) for m in (1, 5, 20) for e in (1, 8, 64)]
    simulated = [(20 * MILLION, 8), (20 * MILLION, 64)]
    if args.quick:
        args.ranks, args.rounds = 4, 1
        sizes, simulated = [(100_000, 1), (100_000, 8), (400_000, 1), (400_000, 8)], [(100_000, 3)]
    measured = points(sizes, args.rounds)
    cost = fit(measured)
    for point in measured:
        point["modelled_s"] = round(cost.seconds(point["weights"], point["entries"]), 4)
    checks = [simulate(args.ranks, n, entries, cost) for n, entries in simulated]
    rows = [boundary(model, ranks, cost, Network()) for model in MODELS for ranks in RANKS]
    about = {"fit": vars(cost), "assumed_network": vars(Network()), "points": measured, "simulation": checks}
    rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    note = f"own_s is fitted to one CPU core of this machine; *network_s are assumed: {vars(Network())}"
    measure.write("scaling", rounded, args.out, note)
    (args.out / "scaling_fit.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(measure.table(measured), measure.table(checks), sep="\n")
    plot(rows, args.out / "scaling.png")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Network time and bytes of one boundary by ranks, with what a training step sends anyway."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, model in enumerate(MODELS):
        own = [row for row in rows if row["weights"] == model.name]
        ranks, color = [row["ranks"] for row in own], f"C{i}"
        left.loglog(ranks, [row["own_s"] + row["network_s"] for row in own], "o-", color=color, label=model.name)
        left.loglog(ranks, [row["step_network_s"] for row in own], ":", color=color)
        right.loglog(ranks, [row["reduced_MB"] + row["ties_MB"] for row in own], "o-", color=color, label=model.name)
        right.loglog(ranks, [row["gather_instead_MB"] for row in own], "--", color=color)
    left.set(
        xlabel="ranks",
        ylabel="s",
        title="a boundary (own work on a CPU core + network assumed)\ndotted: sending of one training step",
    )
    right.set(
        xlabel="ranks",
        ylabel="MB received by a rank",
        title="a boundary: counts and ties\ndashed: gathering the partition instead",
    )
    right.legend(loc="center left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
