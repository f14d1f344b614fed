"""Cost of a boundary, of a step's masks and of an exchange on many ranks: a model with fitted coefficients.

    python studies/scaling/scaling.py            measure, fit, simulate; write results, picture and README.md
    python studies/scaling/scaling.py --again    reuse the fit in scaling_fit.json, measure nothing
    python studies/scaling/scaling.py --check    exit 1 if `--again` would change a figure or a table

`scaling_model.py` is the model. `scaling_points.py` measures the points that fit it and check it. Writes scaling.json
and scaling.md (all rows), scaling_fit.json (points, fit, checks) and scaling.png. README.md changes only with the
committed results. `--quick` is a size for tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measure
import scaling_model as model
import scaling_network
import scaling_points
import torch
from scaling_model import Assumed, Fitted, Work

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "README.md"
MILLION = 10**6

#: (weights, pieces, entries) of selections on one rank; (rows, entries) of changes of masks; (backend, ranks, weights,
#: entries) of simulations; bytes of collectives.
FULL: dict[str, Any] = {
    "selections": [
        *((MILLION * m, e, e) for m in (1, 5, 20) for e in (1, 8, 64)),
        *((MILLION, 8, 64), (MILLION, 8, 294), (5 * MILLION, 1, 98)),
    ],
    "boundaries": [(512, 4), (512, 16), (128, 40), (1024, 6)],
    "ranks": [8, 64, 512, 4096, 16384],
    "by_ranks": (294_000, 294),
    "simulations": [
        *(("fsdp2", ranks, 20 * MILLION, entries) for ranks in (8, 64, 512) for entries in (8, 64)),
        *(("zero2", ranks, 20 * MILLION, 8) for ranks in (8, 64)),
    ],
    "groups": [2, 4],
    "bytes": [1 << power for power in (9, 12, 15, 18, 20, 22)],
}
QUICK: dict[str, Any] = {
    "selections": [(100_000, 1, 1), (100_000, 8, 8), (400_000, 1, 8), (400_000, 8, 16), (100_000, 2, 16)],
    "boundaries": [(64, 1), (64, 2), (32, 3)],
    "ranks": [8, 64],
    "by_ranks": (8_000, 8),
    "simulations": [("fsdp2", 4, 100_000, 3), ("zero2", 8, 100_000, 3)],
    "groups": [2],
    "bytes": [512, 4096, 32768],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.check:
        return check()
    torch.set_num_threads(1)
    path = args.out / "scaling_fit.json"
    if not args.again:
        about = measured(QUICK if args.quick else FULL, 1 if args.quick else args.rounds)
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    about = json.loads(path.read_text(encoding="utf-8"))
    found = rows(about)
    if args.again:
        # Nothing was measured: keep the machine and the time of the measurement.
        result = json.loads((args.out / "scaling.json").read_text(encoding="utf-8"))
        (args.out / "scaling.json").write_text(json.dumps({**result, "rows": found}, indent=1) + "\n", encoding="utf-8")
    else:
        measure.write("scaling", found, args.out, NOTE)
    plot(found, args.out / "scaling.png")
    if args.out == RESULTS:
        PAGE.write_text(page(about, found), encoding="utf-8")
    return 0


NOTE = (
    f"own work is fitted to one core of this machine; all else in seconds is assumed: {dataclasses.asdict(Assumed())}"
)


def check() -> int:
    """Return 1 if the committed fit and this code make other rows or another page than the committed ones."""
    about = json.loads((RESULTS / "scaling_fit.json").read_text(encoding="utf-8"))
    found = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))["rows"]
    return int(found != rows(about) or PAGE.read_text(encoding="utf-8") != page(about, found))


def measured(size: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measured points, coefficients fitted to them, and the model's error on points outside the fit."""
    points = {
        "selections": scaling_points.selections(size["selections"], rounds),
        "boundaries": scaling_points.boundaries(size["boundaries"], rounds),
        "around_ranks": scaling_points.around_ranks(size["ranks"], rounds),
        "per_byte": scaling_points.per_byte(rounds),
    }
    collectives = [
        point
        for ranks in size["groups"]
        for point in measure.on_ranks(ranks, scaling_network.collectives, size["bytes"], 3 * rounds)
    ]
    fitted = scaling_points.fit(points)
    network, gloo = scaling_network.fit_network(collectives)
    about = {
        "machine": measure.machine(),
        "fitted": dataclasses.asdict(fitted),
        "gloo": dataclasses.asdict(network),
        "points": points,
        "checks": {
            "own": scaling_points.modelled(points, fitted),
            "by_ranks": scaling_points.by_ranks(size["ranks"], *size["by_ranks"], rounds),
            "simulated": [scaling_points.simulate(*each, fitted) for each in size["simulations"]],
            "gloo": gloo,
            "boundary": scaling_network.committed(fitted, network, measure.machine()["cores"]),
        },
    }
    return rounded(about)


def rounded(value: Any, digits: int = 4) -> Any:
    """Round all floats of plain data to `digits` significant digits.

    >>> rounded({"a": [1.23456, 7]})
    {'a': [1.235, 7]}
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    return [rounded(each, digits) for each in value] if isinstance(value, list | tuple) else value


def rows(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the model under a fit, without those that exceed the memory."""
    fitted = Fitted(**{**about["fitted"], "core": Work(**about["fitted"]["core"])})
    found = model.rows(fitted, Assumed())
    return [{key: value for key, value in row.items() if key != "fits"} for row in rounded(found) if row["fits"]]


# -- the page ----------------------------------------------------------------------------------------------------------


def page(about: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    from tables import fill

    of_fit = {"fitted": fitted_table, "simulated": simulated, "ties": ties, "own": own, "gloo": gloo}
    of_rows = {"backends": backends, "boundary": boundary, "exchange": exchange, "limits": limits}
    sections = {name: partial(make, about) for name, make in of_fit.items()}
    sections |= {name: partial(make, found) for name, make in of_rows.items()}
    return fill(PAGE.read_text(encoding="utf-8"), {**sections, "assumed": assumed})


def _short(value: float) -> str:
    """Format a number with two or three digits, without an exponent for ordinary sizes.

    >>> [_short(x) for x in (0.0, 0.01234, 5.93, 81.2, 1234.5, 2.5e-8)]
    ['0', '0.012', '5.9', '81', '1,234', '2.5e-08']
    """
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _span(points: Iterable[dict[str, Any]]) -> str:
    ratios = sorted(point["measured / modelled"] for point in points)
    return f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"


def assumed() -> str:
    return measure.table(
        [
            {"assumed": f.metadata["reason"], "value": f"{getattr(Assumed(), f.name):g}"}
            for f in dataclasses.fields(Assumed)
        ]
        + [{"assumed": f"tokens of a step, {m.name}", "value": f"{m.tokens:,}"} for m in model.MODELS]
    )


def fitted_table(about: dict[str, Any]) -> str:
    core, rest = about["fitted"]["core"], about["fitted"]
    lines = [
        ("selection, for each weight of the pruned partition that a rank has", core["select_weight"]),
        ("selection, for each entry of which it has a piece", core["select_piece"]),
        ("selection, for each entry", core["select_entry"]),
        ("masking of fp32 weights or moments, for each of them", core["zero_weight"]),
        ("masking, for each piece", core["zero_piece"]),
        ("checksum of masks, for each byte", rest["crc_byte"]),
        ("SHA-256, for each byte", rest["sha_byte"]),
        ("an all-gather's rows, for each rank (`Comm.all_gather`)", rest["row"]),
        ("places of an entry's pieces, for each rank (an exchange alone)", rest["spread"]),
    ]
    return measure.table([{"work of one core": what, "µs": f"{1e6 * s:.2g}"} for what, s in lines])


def own(about: dict[str, Any]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in about["checks"]["own"]:
        groups.setdefault((point["point"], point["in the fit"]), []).append(point)
    return measure.table(
        [
            {"own work on one rank": what, "in the fit": used, "points": len(points)}
            | {"measured / modelled": _span(points)}
            for (what, used), points in groups.items()
        ]
    )


def simulated(about: dict[str, Any]) -> str:
    return measure.table(
        [
            {"laid out as": p["backend"], "ranks": p["ranks"], "entries": p["entries"], "imbalance": p["imbalance"]}
            | {"own work, ms": _short(1e3 * p["measured_s"]), "modelled, ms": _short(1e3 * p["modelled_s"])}
            | {"measured / modelled": _span([p])}
            for p in rounded(about["checks"]["simulated"], 3)
        ]
    )


def ties(about: dict[str, Any]) -> str:
    points = about["checks"]["by_ranks"]
    times = [point["selection_s"] for point in points]
    slope, _ = scaling_points.least([[p["ranks"] * p["entries"], 1] for p in points], times)
    most = points[-1]["ranks"] * points[-1]["entries"]
    text = (
        f"\nFitted to this, a selection takes {1e9 * slope:.2g} ns more for each rank and entry: "
        f"{1e3 * slope * most:.2g} of {1e3 * times[-1]:.0f} ms in the last row.\n"
    )
    table = measure.table(
        [
            {"ranks": p["ranks"], "entries": p["entries"], "whole selection, ms": _short(1e3 * p["selection_s"])}
            | {"dividing ties, ms": _short(1e3 * p["ties_s"])}
            | {"by gathering counts, ms": _short(1e3 * p["ties_by_gathering_s"])}
            | {"counts gathered, MB": _short(p["ties_by_gathering_MB"])}
            for p in points
        ]
    )
    return table + text


def gloo(about: dict[str, Any]) -> str:
    network, checks = about["gloo"], about["checks"]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for p in checks["gloo"]:
        groups.setdefault((f"collectives: {p['kind']}", p["ranks"], p["in the fit"]), []).append(p)
    for p in checks["boundary"]["rows"]:
        groups.setdefault((f"boundary.py: {p['method']}", p["ranks"], p["in the fit"]), []).append(p)
    table = measure.table(
        [
            {"over gloo": what, "ranks": ranks, "in the fit": used, "points": len(points)}
            | {"measured / modelled": _span(points)}
            for (what, ranks, used), points in groups.items()
        ]
    )
    text = (
        f"Fitted: {1e6 * network['latency']:.0f} µs a message and {network['bandwidth'] / 1e6:,.0f} MB/s for the "
        f"collectives, {checks['boundary']['gathering_bytes_per_s'] / 1e6:,.0f} MB/s for gathering weights in "
        "boundary.py, where the new memory's first use is in the time. Load of the machine meanwhile: "
        f"{about['machine']['load_average'][0]:g}.\n\n"
    )
    return text + table


_TERMS = {"own_accelerator_s": "own work", "counts_s": "counts", "ties_s": "ties"} | {
    "checks_s": "checks",
    "publish_s": "publishing",
}


def boundary(found: Sequence[dict[str, Any]]) -> str:
    return measure.table(
        [
            {"weights": row["weights"], "ranks": row["ranks"], "tokens a rank": row["tokens_per_rank"]}
            | {"step, s": _short(row["step_s"]), "own work, s, core": _short(row["own_core_s"])}
            | {"accelerator": _short(row["own_accelerator_s"])}
            | {name: _short(row[key]) for key, name in list(_TERMS.items())[1:4]}
            | {"boundary in steps": _short(row["boundary_steps"])}
            | {"masks, MB": _short(row["mask_MB"]), "scratch, MB": _short(row["boundary_scratch_MB"])}
            | {"counts and ties, MB": _short(row["counts_MB"] + row["ties_MB"])}
            | {"gathering instead, MB": _short(row["gather_instead_MB"])}
            for row in found
            if row["backend"] == "fsdp2"
        ]
    )


def backends(found: Sequence[dict[str, Any]], ranks: int = 512) -> str:
    return measure.table(
        [
            {"weights": row["weights"], "backend": row["backend"], "shard group": row["shard_group"]}
            | {"imbalance": _short(row["imbalance"])}
            | {"masks of a step, of it": f"{row['masks_share']:.1%}", "on a core, s": _short(row["masks_core_s"])}
            | {f"{name}, s": _short(row[key]) for key, name in _TERMS.items()}
            | {"published, MB": _short(row["publish_MB"]), "boundary in steps": _short(row["boundary_steps"])}
            for row in found
            if row["ranks"] == ranks and row["weights"] in ("1B", "7B")
        ]
    )


_EXCHANGE = {"exchange_gather_s": "to rank 0", "exchange_hash_s": "hashing", "exchange_files_s": "files"} | {
    "exchange_meetings_s": "meetings",
    "exchange_publish_s": "publishing",
}


def exchange(found: Sequence[dict[str, Any]]) -> str:
    return measure.table(
        [
            {"weights": row["weights"], "ranks of a worker": row["ranks"]}
            | {"a worker's file, MB": _short(row["exchange_file_MB"])}
            | {f"{name}, s": _short(row[key]) for key, name in list(_EXCHANGE.items())[:4]}
            | {"in all, s": _short(row["exchange_s"]), "in steps": _short(row["exchange_steps"])}
            for row in found
            if row["backend"] == "fsdp2" and row["ranks"] in (64, 512, 4096)
        ]
    )


#: Limits of "negligible": share of a step for its masks, steps for a boundary, steps for an exchange. With 100 steps
#: between boundaries and 1,000 between exchanges, each limit is 1 % of a run.
MOST = {"masks_share": 0.01, "boundary_steps": 1.0, "exchange_steps": 10.0}


def limits(found: Sequence[dict[str, Any]]) -> str:
    """First number of ranks above each limit of MOST, with its largest term there, by backend and model."""
    terms = {"masks_share": {}, "boundary_steps": _TERMS, "exchange_steps": _EXCHANGE}
    titles = {"masks_share": "masks above 1 % of a step", "boundary_steps": "boundary above 1 step"}
    titles["exchange_steps"] = "exchange above 10 steps"
    lines = []
    for backend in model.BACKENDS:
        for name in (m.name for m in model.MODELS):
            own = [row for row in found if (row["backend"], row["weights"]) == (backend, name)]
            if not own:
                continue
            line = {"backend": backend, "weights": name, "fits": f"{own[0]['ranks']:,} ranks or more"}
            for key, most in MOST.items():
                above = [row for row in own if row[key] > most]
                line[titles[key]] = _from(own, above, terms[key]) if above else "never"
            lines.append(line)
    return measure.table(lines)


def _from(own: Sequence[dict[str, Any]], above: Sequence[dict[str, Any]], terms: dict[str, str]) -> str:
    first = above[0]
    where = "always" if len(above) == len(own) else f"from {first['ranks']:,}"
    largest = max(terms, key=lambda key: first[key], default=None)
    return where if largest is None else f"{where}: {terms[largest]}"


# -- the picture -------------------------------------------------------------------------------------------------------


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot a boundary, the masks of a step and an exchange against ranks, each relative to a step's arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    panels = {
        "boundary_steps": ("a boundary, in steps", "fsdp2", "zero2"),
        "masks_share": ("masks of a step, share of the step", "fsdp2", "ddp"),
        "exchange_steps": ("an exchange of parallel GaP, in steps", "fsdp2", "zero2"),
    }
    for axis, (key, (title, solid, dashed)) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(m.name for m in model.MODELS):
            for backend, style in ((solid, "o-"), (dashed, "s--")):
                own = [row for row in found if (row["weights"], row["backend"]) == (name, backend)]
                label = name if backend == solid else None
                axis.loglog([r["ranks"] for r in own], [r[key] for r in own], style, color=f"C{i}", label=label)
        axis.axhline(MOST[key], color="0.5", lw=1)
        axis.set(xlabel="ranks", title=f"{title}\nsolid {solid}, dashed {dashed}, grey: 1 % of a run")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
