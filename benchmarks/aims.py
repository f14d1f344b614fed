"""Compare the measured figures with the aims of this project."""

from __future__ import annotations

from typing import Any

from figures import NO_GPU, SHOWN, Row, as_table, device, is_fp32, read_rows, span


def summary() -> str:
    """Return the most important aims, a line each, for the README."""
    rows = [{k: v for k, v in row.items() if k != "main"} for row in _aims() if row["main"]]
    return "\n".join(part for part in (as_table(rows), "" if device() else NO_GPU) if part)


def aims() -> str:
    """Return every aim with its figure, met or not."""
    return as_table([{k: v for k, v in row.items() if k != "main"} for row in _aims()])


def _aims() -> list[Row]:
    """Return the aims as rows: what, figure, aim, met; `main` marks those of the README."""
    rows = [*_aims_of_steps(), *_aims_of_masks(), *_aims_of_boundaries(), *_aims_of_memory(), *_aims_of_loops()]
    for row in read_rows("startup"):
        if row["what"] == "import torch; import gap_ds, beyond the first":
            seconds = row["ms"] / 1e3
            rows.append(
                _aim("`import gap_ds` beyond `import torch`, s", f"{max(0.0, seconds):.2f}", "0.3", _met(seconds, 0.3))
            )
    return rows


def _aim(what: str, measured: str, aim: str, met: str, main: bool = False) -> Row:
    return {"what": what, "measured": measured, "aim": aim, "met": met, "main": main}


def _met(value: float, limit: float, interval: Any = None) -> str:
    """Compare a median with a limit: "yes" or "no" only if its whole interval lies on one side."""
    low, high = interval or (value, value)
    return "yes" if high <= limit else "**no**" if low > limit else "undecided"


def _interval(row: Row) -> Any:
    return row["cpu_interval"] if "decided" in row else row.get("interval") or row["quartiles"]


def _ratio(row: Row) -> float:
    """Return the ratio of a step: of CPU time where this was to decide."""
    return float(row["cpu_ratio"] if "decided" in row else row["ratio"])


def _aims_of_steps() -> list[Row]:
    rows = []
    for gpu in (False, True):
        found = read_rows("overhead", gpu)
        for preset in dict.fromkeys(row["preset"] for row in found):
            own = sorted((row for row in found if row["preset"] == preset), key=_ratio)
            low, high = own[0], own[-1]
            measured = f"{_ratio(low):.3f} ({low['backend']})"
            measured += f" to {_ratio(high):.3f} ({high['backend']})" if low is not high else ""
            measured += ", of CPU time" if "decided" in low else ""
            # All backends must meet the aim: the worst one decides.
            states = [_met(_ratio(row), 1.01, _interval(row)) for row in own]
            worst = max(states, key=["yes", "undecided", "**no**"].index)
            if worst != "yes" and len(own) > 1:
                worst += f" ({sum(state == 'yes' for state in states)} of {len(own)} yes)"
            where = " on a GPU" if gpu else ""
            rows.append(_aim(f"a step{where}, preset {preset}, times the bare one's", measured, "1.01", worst, True))
            if inside := [row["own_share"] for row in own if row.get("own_share")]:
                measured = span(dict.fromkeys(_ends(inside)), "{:.1%}")
                what = f"the engine's own calls in a step, preset {preset}, of the step"
                rows.append(_aim(what, measured, "1%", _met(max(inside), 0.01), True))
            if crossed := [row["boundary_steps"] for row in own if row.get("boundary_steps")]:
                big, what = gpu and preset == "big", f"a whole boundary{where}, preset {preset}, in steps"
                met = _met(max(crossed), 2) if big else ""
                rows.append(_aim(what, span(dict.fromkeys(_ends(crossed)), "{:.2f}"), "2" if big else "", met, big))
    if not read_rows("overhead", gpu=True):
        rows.append(_aim("a step on a GPU, times the bare one's", "not measured", "1.01", ""))
        rows.append(_aim("a whole boundary on a GPU, preset big, in steps", "not measured", "2", ""))
    return rows


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _aims_of_masks() -> list[Row]:
    rows = []
    for row in read_rows("masks"):
        if "gap_ds" in row["work"]:
            pieces, main = row.get("pieces", 1), row["weights"] == SHOWN and is_fp32(row)
            size = f"{row['weights']:,} {row['dtype']} weights" + (f" in {pieces} pieces" if pieces > 1 else "")
            what = f"applying masks to {size}, times a float `mul_`"
            rows.append(_aim(what, f"{row['ratio']:.2f}", "1.3", _met(row["ratio"], 1.3, _interval(row)), main))
    of_gpu = [row for row in read_rows("masks", gpu=True) if "gap_ds" in row["work"]]
    for row in of_gpu:
        share, what = 1 / row["times_copy"], f"applying masks to {row['weights']:,} {row['dtype']} weights on a GPU"
        met = _met(-share, -0.8)
        rows.append(_aim(f"{what}, of a copy's bandwidth", f"{share:.0%}", "80%", met, is_fp32(row)))
    if not of_gpu:
        rows.append(_aim("applying masks on a GPU, of a copy's bandwidth", "not measured", "80%", ""))
    return rows


def _aims_of_boundaries() -> list[Row]:
    rows = []
    for row in sorted(read_rows("boundary"), key=lambda row: (row["weights"], row["ranks"])):
        if row["method"] == "gap_ds" and row["to"] == "topk":
            one, main = row["ranks"] == 1, row["weights"] == SHOWN
            what = f"choosing a tenth of {row['weights']:,} weights on {row['ranks']} rank{'' if one else 's'}"
            met = _met(row["ratio"], 0.5, _interval(row)) if one else ""
            rows.append(_aim(f"{what}, times `topk`", f"{row['ratio']:.2f}", "0.5" if one else "", met, main))
    # In small entries the fixed memory of a process dominates: use large ones.
    if extra := [row["extra_bytes_per_weight"] for row in read_rows("boundary") if _counts(row)]:
        what = f"choosing from {SHOWN:,} weights or more, extra bytes a weight of the piece (a piece has 4)"
        rows.append(_aim(what, span(_ends(extra), "{:.2f}"), "4", _met(max(extra), 4)))
    return rows


def _counts(row: Row) -> bool:
    return row["method"] == "gap_ds" and row["weights"] >= SHOWN and row["extra_bytes_per_weight"] is not None


def _aims_of_memory() -> list[Row]:
    rows, found = [], read_rows("memory")
    if masks := [row["masks, bits"] for row in found]:
        what = "the masks, bits for each sparse weight that a rank owns"
        rows.append(_aim(what, span(dict.fromkeys(_ends(masks)), "{:.2f}"), "1", _met(round(max(masks), 2), 1)))
        over = [row["engine over bare, bits"] for row in found]
        what = "memory over the bare run (RSS), bits for each sparse weight that a rank owns"
        rows.append(_aim(what, span(_ends(over), "{:.1f}"), "1 and a constant", "", True))
    if taken := [(row["a boundary's tensors, MB"], row) for row in found if "a boundary's tensors, MB" in row]:
        parts = [megabytes / row["largest entry's pieces, MB"] for megabytes, row in taken]
        what = "tensors of a boundary, its new masks included, in pieces of the largest entry"
        rows.append(_aim(what, span(_ends(parts), "{:.2f}"), "1 and the masks", ""))
    return rows


def _aims_of_loops() -> list[Row]:
    rows = []
    for gpu in (False, True):
        found = read_rows("throughput", gpu)
        for row in (row for row in found if row["loop"] == "example"):
            other = next(r["loop"] for r in found if r["pair"] == row["pair"] and not r["loop"].startswith("example"))
            what = f"the example's steps{' on a GPU' if gpu else ''}, times those of {_LOOPS.get(other, other)}"
            ratio = row.get("ratio_of_tokens", row["ratio"])
            met = _met(ratio, 1, _interval(row))
            rows.append(_aim(what, f"{ratio:.2f}", "1", met, True))
    return rows


_LOOPS = {"bare DeepSpeed": "a bare DeepSpeed loop", "Seq2SeqTrainer": "transformers' Seq2SeqTrainer"}
