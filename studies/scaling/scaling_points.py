"""Measurements that fit and check the model of `scaling.py`: the code that training runs, on this machine.

Work of a rank is timed as CPU time of one thread. Other processes affect it through the caches alone.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from scaling_model import Fitted, Model, Work, layout, tie_sums
from torch import Tensor, nn

from gap_ds import GaPEngine
from gap_ds.cli import plan as forecast
from gap_ds.masks import bitmask, selection
from gap_ds.masks.box import Box
from gap_ds.method import rules
from gap_ds.parallel import Item
from gap_ds.parallel.exchange import spread_over_ranks
from gap_ds.sharding.comm import Comm
from gap_ds.training import consistency

Point = dict[str, Any]


def least(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients that minimize the squared relative error, none below zero.

    >>> [round(c, 6) for c in least([[1, 1], [2, 1], [4, 1]], [3, 5, 9])]
    [2.0, 1.0]
    """
    table, times = np.array(rows, dtype=float), np.array(seconds)
    used = list(range(table.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(table[:, used] / times[:, None], np.ones(len(times)), rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    values = np.zeros(table.shape[1])
    values[used] = found
    return [float(value) for value in values]


def medians(works: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """Median of the seconds that each work returns; works take turns, and the first turn does not count."""
    found: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(rounds + 1):
        for key, work in works.items():
            found[key].append(work())
    return {key: statistics.median(times[1:]) for key, times in found.items()}


def thread_seconds(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


# -- own work ----------------------------------------------------------------------------------------------------------


def drawn(entries: int, size: int, steps: int = 1024) -> Tensor:
    """Weights (entries, size) rounded to `steps` steps per standard deviation: a selection has ties to break."""
    return (torch.randn(entries, size, generator=torch.Generator().manual_seed(0)) * steps).round_()


def select(pieces: Sequence[tuple[int, Tensor]], keep: int, group: selection.Reduce) -> list[Tensor]:
    """Masks of this rank's (start, weights) of each entry, with `keep` weights kept in every entry."""
    own = [
        selection.Piece(f"entry{e}", span(start, piece), selection.magnitude_keys(piece), e)
        for e, (start, piece) in enumerate(pieces)
    ]
    return selection.select_largest(own, [keep] * len(own), group)


def span(start: int, piece: Tensor) -> Box:
    """The place of a piece in an entry of 2^31 weights."""
    return Box.span(start, piece.numel(), 1 << 31)


class Alike:
    """R ranks with equal pieces. Counts the bytes that they send."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.sent = ranks, 0

    def sum(self, counts: Tensor) -> Tensor:
        self.sent += counts.nbytes
        return counts * self.ranks


def selections(sizes: Sequence[tuple[int, int, int]], rounds: int) -> list[Point]:
    """Time selections of (total weights, pieces, entries) on one rank; the other entries belong to another rank."""

    def work(weights: Tensor, entries: int) -> float:
        empty = [(0, weights.new_empty(0))] * (entries - len(weights))
        pieces = [*((0, row) for row in weights), *empty]
        # The other rank keeps the weights of those entries; this rank keeps none.
        keep = [weights.shape[1] // 5] * len(weights) + [0] * len(empty)
        own = [
            selection.Piece(f"entry{e}", span(start, piece), selection.magnitude_keys(piece), e)
            for e, (start, piece) in enumerate(pieces)
        ]
        return thread_seconds(lambda: selection.select_largest(own, keep, selection.Single()))

    works = {(n, p, e): partial(work, drawn(p, n // p), e) for n, p, e in sizes}
    return [
        {"weights": n, "pieces": p, "entries": e, "measured_s": seconds}
        for (n, p, e), seconds in medians(works, rounds).items()
    ]


class Blocks(nn.Module):
    """Equal matrices for three partitions of `entries` entries, each in a separate block."""

    def __init__(self, entries: int, rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(rows, rows, bias=False)) for _ in range(3 * entries))

    def forward(self, x: Tensor) -> Tensor:
        return x


def boundaries(sizes: Sequence[tuple[int, int]], rounds: int) -> list[Point]:
    """Time the masks of a step and a whole change of masks in the engine's code.

    sizes: (rows of a square matrix, entries of a partition). Three partitions, AdamW.
    """

    def engine_of(rows: int, entries: int) -> tuple[GaPEngine, torch.optim.Optimizer]:
        model = Blocks(entries, rows)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        config = {"sparsity": 0.8, "partitions": 3, "phase_steps": 10, "rounds": 1, "finetune_steps": 1}
        engine = GaPEngine(model, config, optimizer=optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        return engine, optimizer

    def step(engine: GaPEngine, optimizer: torch.optim.Optimizer) -> float:
        return thread_seconds(lambda: engine.mask_state.zero_pruned(optimizer))

    def change(engine: GaPEngine) -> float:
        """Prune the dense partition and grow the next one."""
        left = next(e.partition for e in engine.plan.entries if e.name not in engine.mask_state.bits)
        updates: dict[Any, rules.Update] = {e: rules.Keep() for e in engine.plan.entries}
        for entry in engine.plan.entries:
            if entry.partition == left:
                weight = engine.mask_state.shards[entry.name].weight()
                weight.copy_(drawn(1, weight.numel())[0])
                updates[entry] = rules.PruneByMagnitude(entry.keep)
            elif entry.partition == (left + 1) % 3:
                updates[entry] = rules.Grow()
        return thread_seconds(lambda: engine.mask_state.apply(updates, 0))

    found = []
    for rows, entries in sizes:
        engine, optimizer = engine_of(rows, entries)
        times = medians({"step": partial(step, engine, optimizer), "change": partial(change, engine)}, rounds)
        for what, seconds in times.items():
            found.append({"what": what, "rows": rows, "entries": entries, "measured_s": seconds})
        engine.close()
    return found


class Stub(Comm):
    """A group of R ranks whose collectives do nothing: what remains is the work around them."""

    def __init__(self, ranks: int) -> None:
        super().__init__(single=True)
        self.size = ranks

    @staticmethod
    def silent() -> Any:
        return mock.patch.multiple("torch.distributed", all_gather=mock.DEFAULT, all_gather_into_tensor=mock.DEFAULT)


def around_ranks(ranks: Sequence[int], rounds: int) -> list[Point]:
    """Time work that grows with the ranks: the all-gather of a position, and locating the pieces of 8 entries."""

    def gather(comm: Comm) -> float:
        with Stub.silent():
            return thread_seconds(lambda: comm.all_gather(torch.zeros(4, dtype=torch.int64)))

    def spread(comm: Comm) -> float:
        items = [Item(f"e{e}", (8,), None, 0, 8, lambda: torch.zeros(8)) for e in range(8)]
        with Stub.silent():
            whole = thread_seconds(lambda: spread_over_ranks(items, {}, comm))
            return whole - thread_seconds(lambda: comm.all_gather(torch.zeros(8, 3, dtype=torch.int64)))

    works = {(what, r): partial(work, Stub(r)) for r in ranks for what, work in (("row", gather), ("spread", spread))}
    return [{"what": what, "ranks": r, "measured_s": s} for (what, r), s in medians(works, rounds).items()]


def per_byte(rounds: int) -> dict[str, float]:
    """Seconds per byte of a checksum (as in `consistency.check_masks`) and of a SHA-256."""
    size = 1 << 24
    bits, data = torch.zeros(size, dtype=torch.uint8), bytes(size)
    works = {
        "crc": lambda: thread_seconds(lambda: consistency._digest(bits, 0)),
        "sha": lambda: thread_seconds(lambda: hashlib.sha256(data).digest()),
    }
    return {what: seconds / size for what, seconds in medians(works, rounds).items()}


def fit(points: Mapping[str, Any]) -> Fitted:
    """Fit the model's coefficients to the points of this file."""
    chosen = points["selections"]
    select_ = least([[p["weights"], p["pieces"], p["entries"], 1] for p in chosen], [p["measured_s"] for p in chosen])
    steps = [p for p in points["boundaries"] if p["what"] == "step"]
    zero = least(
        [[2 * p["entries"] * p["rows"] ** 2, 2 * p["entries"]] for p in steps], [p["measured_s"] for p in steps]
    )
    around = {
        what: [(p["ranks"], p["measured_s"]) for p in points["around_ranks"] if p["what"] == what]
        for what in ("row", "spread")
    }
    row, spread = (least([[r, 1] for r, _ in found], [s for _, s in found])[0] for found in around.values())
    return Fitted(
        core=Work(*select_, *zero),
        crc_byte=points["per_byte"]["crc"],
        sha_byte=points["per_byte"]["sha"],
        row=row,
        spread=spread / 8,
    )


# -- checks of own work ------------------------------------------------------------------------------------------------


def modelled(points: Mapping[str, Any], fitted: Fitted) -> list[Point]:
    """Points of a rank's work with their modelled times. Whole changes of masks are not in the fit."""
    core = fitted.core
    rows = [
        {"point": "selection", "in the fit": "yes", "weights": p["weights"], "pieces": p["pieces"]}
        | {"entries": p["entries"], "measured_s": p["measured_s"]}
        | {"modelled_s": core.select_s(p["weights"], p["pieces"], p["entries"])}
        for p in points["selections"]
    ]
    for p in points["boundaries"]:
        n, e = p["entries"] * p["rows"] ** 2, p["entries"]
        step = p["what"] == "step"
        found = core.zero_s(2 * n, 2 * e) if step else core.select_s(n, e, e) + core.zero_s(3 * n, 3 * e)
        rows.append(
            {"point": "masks of a step" if step else "change of masks", "in the fit": "yes" if step else "no"}
            | {"weights": 2 * n if step else n, "pieces": 2 * e if step else e, "entries": e}
            | {"measured_s": p["measured_s"], "modelled_s": found}
        )
    return [{**row, "measured / modelled": row["measured_s"] / row["modelled_s"]} for row in rows]


def by_ranks(ranks: Sequence[int], n: int, entries: int, rounds: int) -> list[Point]:
    """Time the selection on one of R ranks with n weights each and ties in all entries.

    Also time the division of ties by the former method: gather the counts of all ranks and loop over the entries.
    """
    weights = drawn(entries, n // entries)
    pieces, four = [(1 << 30, row) for row in weights], torch.ones(4)

    def whole(r: int) -> float:
        return thread_seconds(lambda: select(pieces, r * (n // entries // 5), Alike(r)))

    def divide(r: int) -> float:
        own = [selection.Piece("", span(1 << 30, four), selection.magnitude_keys(four), e) for e in range(entries)]
        at = torch.full((entries,), int(selection.magnitude_keys(four)(0, 1)), dtype=torch.int64)
        return thread_seconds(lambda: selection._tie_ends(own, at, torch.full_like(at, 4 * r - 2), Alike(r)))

    def gathered(r: int) -> float:
        with Stub.silent():
            return thread_seconds(lambda: divided_by_gathering(entries, Stub(r)))

    works = {
        (what, r): partial(work, r)
        for r in ranks
        for what, work in (("whole", whole), ("divide", divide), ("gathered", gathered))
    }
    times = medians(works, rounds)
    return [
        {"ranks": r, "weights": n, "entries": entries, "selection_s": times["whole", r]}
        | {"ties_s": times["divide", r], "ties_by_gathering_s": times["gathered", r]}
        | {"ties_by_gathering_MB": 16 * entries * r / 1e6}
        for r in ranks
    ]


def divided_by_gathering(entries: int, comm: Comm) -> list[int]:
    """Divide ties by the former method: two numbers of each entry from every rank, then a loop over the entries."""
    own = torch.zeros(entries, dtype=torch.int64)
    ties, starts = comm.all_gather(own), comm.all_gather(own)
    left, quota = own.clone(), []
    for e in range(entries):
        before = int(ties[starts[:, e] < 0, e].sum())
        quota.append(max(0, min(0, int(left[e]) - before)))
        left[e] = max(0, int(left[e]) - int(ties[:, e].sum()))
    return quota


class Together:
    """Ranks as threads that take turns. Each sum over the ranks is computed once, for all of them."""

    def __init__(self, ranks: int) -> None:
        self.turn, self.barrier = threading.Lock(), threading.Barrier(ranks, self._complete, timeout=600)
        self._adding: Tensor | None = None
        self._sum = torch.empty(0)

    def _complete(self) -> None:
        assert self._adding is not None
        self._sum, self._adding = self._adding, None

    def sum(self, counts: Tensor) -> Tensor:
        """Add this rank's counts. The caller holds the turn, and holds it again on return."""
        self._adding = counts.clone() if self._adding is None else self._adding.add_(counts)
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return self._sum


class Counted:
    """One rank of `Together`: counts the bytes that it sends and the CPU time of sending."""

    def __init__(self, group: Together) -> None:
        self._group, self.sent, self.seconds = group, 0, 0.0

    def sum(self, counts: Tensor) -> Tensor:
        self.sent += counts.nbytes
        started = time.thread_time()
        result = self._group.sum(counts)
        self.seconds += time.thread_time() - started
        return result


def cuts(backend: str, ranks: int, n: int, entries: int) -> Iterator[list[tuple[int, int]]]:
    """Yield for each rank the (begin, end) of its piece of each entry.

    An even share of every entry; for zero2 of one flat buffer, whose first third these entries are.
    """
    size = n // entries
    for rank in range(ranks):
        if backend == "zero2":
            lo, hi = 3 * n * rank // ranks, 3 * n * (rank + 1) // ranks
            yield [(min(max(lo - e * size, 0), size), min(max(hi - e * size, 0), size)) for e in range(entries)]
        else:
            yield [(size * rank // ranks, size * (rank + 1) // ranks)] * entries


def simulate(backend: str, ranks: int, n: int, entries: int, fitted: Fitted) -> Point:
    """Run the selection on ranks as threads; compare masks with one rank's, bytes and CPU time with the model's."""
    size = n // entries
    # Few distinct values: every entry has ties to break.
    weights, places, group = drawn(entries, size, 64), list(cuts(backend, ranks, n, entries)), Together(ranks)
    results: list[Any] = [None] * ranks

    def work(rank: int) -> None:
        own = Counted(group)
        pieces = [(lo if hi > lo else 0, row[lo:hi]) for row, (lo, hi) in zip(weights, places[rank], strict=True)]
        with group.turn:
            try:
                started = time.thread_time()
                found = select(pieces, size // 5, own)
                results[rank] = found, own.sent, time.thread_time() - started - own.seconds
            except BaseException as error:
                results[rank] = error
                group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors := [result for result in results if isinstance(result, BaseException)]:
        raise errors[0]
    alone = select([(0, row) for row in weights], size // 5, selection.Single())
    for e in range(entries):
        parts = [bitmask.unpack(found[e], places[r][e][1] - places[r][e][0]) for r, (found, _, _) in enumerate(results)]
        ordered = torch.cat(parts)
        assert torch.equal(ordered, bitmask.unpack(alone[e], size)), f"entry {e}: the masks differ"
    like = Model("", 3 * n, 3 * entries, rows=ranks, tokens=1, matrices=1)
    longest = max(lo for place in places for lo, hi in place if hi > lo).bit_length()
    ties = [8 * (entries + 64)] + [8 * entries << selection._START_BITS] * -(-longest // selection._START_BITS)
    assert {sent for _, sent, _ in results} == {forecast.selection_bytes(entries) + sum(ties)}, "bytes differ"
    assert sum(ties) <= sum(tie_sums(like))
    where = layout(backend, like, ranks)
    # Shares are even, or (flat buffer) the largest is up to K times an even one.
    most = max(sum(hi - lo for lo, hi in place) for place in places)
    busiest = [s for (_, _, s), place in zip(results, places, strict=True) if sum(hi - lo for lo, hi in place) >= most]
    found = {
        **{"backend": backend, "ranks": ranks, "weights": n, "entries": entries, "masks": "equal to one rank's"},
        **{"sent_kB": results[0][1] / 1e3, "imbalance": most * ranks / n},
        "measured_s": statistics.median(busiest),
        "modelled_s": fitted.core.select_s(where.pruned, where.pieces, entries),
    }
    return {**found, "measured / modelled": found["measured_s"] / found["modelled_s"]}
