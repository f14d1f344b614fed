"""Time between ranks: collectives over gloo measured and fitted, and the committed rows of boundary.py predicted."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import measure
import torch
from scaling_model import Fitted, Network
from scaling_points import Point, least

from gap_ds.cli import plan as forecast
from gap_ds.sharding.comm import Comm


def collectives(sizes: Sequence[int], rounds: int) -> list[Point]:
    """Time a sum and an all-gather of each size (bytes), on every rank: wall seconds, the slowest rank's median."""
    comm, rows = Comm(), []
    for size in sizes:
        row = torch.zeros(size // 8, dtype=torch.int64)
        for kind, work in (("sum", comm.sum), ("all_gather", comm.all_gather)):
            times = []
            for _ in range(rounds + 3):
                comm.barrier()
                times.append(measure.seconds(partial(work, row.clone())))
            slowest = float(comm.all_gather(torch.tensor([statistics.median(times[3:])])).max())
            rows.append({"kind": kind, "bytes": size, "ranks": comm.size, "measured_s": slowest})
    return rows


def _network_s(network: Network, point: Point) -> float:
    call = network.reduce_s if point["kind"] == "sum" else network.gather_s
    return call(point["bytes"], point["ranks"])


def fit_network(found: Sequence[Point]) -> tuple[Network, list[Point]]:
    """Fit latency and bandwidth to every other size on two ranks, and predict all points."""
    small = [p for p in found if p["ranks"] == 2]
    sizes = sorted({p["bytes"] for p in small})[::2]
    used = [p for p in small if p["bytes"] in sizes]
    # On two ranks a sum is a ring of two steps with half of the bytes each; an all-gather is one step with all bytes.
    latency, inverse = least(
        [[2 if p["kind"] == "sum" else 1, p["bytes"]] for p in used], [p["measured_s"] for p in used]
    )
    network = Network(latency, 1 / inverse if inverse else float("inf"))
    rows = [{**p, "modelled_s": _network_s(network, p), "in the fit": "yes" if p in used else "no"} for p in found]
    return network, [{**row, "measured / modelled": row["measured_s"] / row["modelled_s"]} for row in rows]


def committed(fitted: Fitted, network: Network, cores: int) -> dict[str, Any]:
    """Predict the committed rows of benchmarks/boundary.py on 2 and 4 ranks.

    No row of gap_ds enters a fit. The other methods gather the weights: their time on one rank comes from the rows with
    one rank, and the bandwidth of gathering is fitted to the rows with two ranks.
    """
    path = measure.RESULTS / "boundary.json"
    made = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {ranks: [row for row in made if row["ranks"] == ranks] for ranks in (1, 2, 4)}
    alone = {(row["method"], row["weights"]): row["ms"] / 1e3 for row in rows[1]}
    points = [
        {"method": row["method"], "ranks": r, "weights": row["weights"], "measured_s": row["ms"] / 1e3}
        for r in (2, 4)
        for row in rows[r]
        if (row["method"], row["weights"]) in alone
    ]
    # With fewer cores than ranks the ranks take turns.
    share = {r: max(1.0, r / cores) for r in (2, 4)}
    gathering = [p for p in points if p["method"] != "gap_ds"]
    used = [p for p in gathering if p["ranks"] == 2]
    spent = [(p, p["measured_s"] - alone[p["method"], p["weights"]] * share[2]) for p in used]
    # Rows that are as fast as on one rank do not depend on the bandwidth.
    rates = [4 * p["weights"] / 2 / seconds for p, seconds in spent if seconds > 0]
    bandwidth = statistics.median(rates) if rates else network.bandwidth
    found = []
    for p in points:
        n, r = p["weights"], p["ranks"]
        if p["method"] == "gap_ds":
            counts = forecast.selection_bytes(1)
            sent = 3 * network.reduce_s(counts / 3, r)
            modelled = fitted.core.select_s(n / r, 1, 1) * share[r] + sent
        else:
            modelled = alone[p["method"], n] * share[r] + 4 * n * (r - 1) / r / bandwidth
        found.append({**p, "in the fit": "yes" if p in used else "no", "modelled_s": modelled})
    found = [{**row, "measured / modelled": row["measured_s"] / row["modelled_s"]} for row in found]
    return {"gathering_bytes_per_s": bandwidth, "rows": found}
