"""What every row of a sharding backend must show; shared by the tests of the backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file

import toy  # isort: skip
from gap_ds import GaPConfig
from gap_ds.cli.export import export
from gap_ds.method import plan

Row = dict[str, Any]


def result(out: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What a row has handed over."""
    path = out / f"{name}.{rank}.pt"
    if not path.exists():
        pytest.fail(f"{name}: not reached, an earlier row failed")
    found: dict[str, Any] = torch.load(path, weights_only=False)
    assert "error" not in found, found["error"]
    return found


def largest_difference(ours: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Over all weights and moments."""
    assert ours["weights"].keys() <= wanted["weights"].keys()
    pairs = [(ours["weights"][n], wanted["weights"][n]) for n in ours["weights"]]
    for name, moments in wanted["moments"].items():
        assert len(ours["moments"][name]) == len(moments), name
        pairs += zip(ours["moments"][name], moments, strict=True)
    return max(float((a - b.view(a.shape)).abs().max()) for a, b in pairs)


def of_kept(found: dict[str, Any]) -> dict[str, Any]:
    """A reference whose moments are 0 where weights are pruned at the end, as those are of which none is held."""
    last = found["masks"][-1]
    moments = {name: [m * last[name] if name in last else m for m in own] for name, own in found["moments"].items()}
    return {**found, "moments": moments}


def check_invariants(out: Path, row: Row, ranks: int) -> None:
    """Pruned weights are 0 in fp32 and working copies, budgets exact, masks by a stable sort; all ranks agree."""
    first = result(out, row["name"])
    for rank in range(ranks):
        found = result(out, row["name"], rank)
        assert found["wrong"] == []
        assert len(found["masks"]) == 5
        for a, b in zip(first["masks"], found["masks"], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def check_plan(out: Path, row: Row) -> None:
    """The plan is that of the unsharded model, whatever the wrapper has left of the module tree."""
    assert result(out, row["name"])["plan"] == plan.build(toy.build(), GaPConfig.load(toy.GAP))


def check_reference(out: Path, row: Row, *, unused_is_zero: bool, tolerance: float) -> None:
    """Masks are those of the independent reference; weights, moments and losses too, up to a tolerance (0: bitwise)."""
    ours = result(out, row["name"])
    name = f"reference_{row['optimizer']}_{bool(row.get('flat'))}_{row.get('clip', 0.0)}_{unused_is_zero}"
    wanted = result(out, name)
    for got, mask in zip(ours["masks"], wanted["masks"], strict=True):
        assert got.keys() == mask.keys() and all(torch.equal(got[n], mask[n]) for n in mask)
    if row.get("packed"):
        wanted = of_kept(wanted)
    assert largest_difference(ours, wanted) <= tolerance
    assert ours["losses"] == (wanted["losses"] if tolerance == 0 else pytest.approx(wanted["losses"], abs=1e-5))


def check_resume(out: Path, row: Row) -> None:
    """A second engine that went on from the checkpoint in mid-phase ended in the same bits."""
    straight = result(out, row["name"])
    resumed = straight["resumed"]
    assert largest_difference(resumed, straight) == 0
    assert all(torch.equal(resumed["masks"][n], mask) for n, mask in straight["masks"][-1].items())


def halved(row: Row) -> bool:
    """True if the module's own weights are bf16, and not copies of fp32 ones."""
    return row["kind"] == "oss" and bool(row.get("bf16"))


def check_export(out: Path, row: Row) -> None:
    """The export holds the final weights under the unsharded model's names, and loads there."""
    ours = result(out, row["name"])
    for name, weight in ours["weights"].items():
        assert torch.equal(ours["reloaded"][name], weight.view(ours["reloaded"][name].shape)), name
    frozen = toy.build().frozen.weight
    assert torch.equal(ours["reloaded"]["frozen.weight"], frozen.bfloat16().float() if halved(row) else frozen)
    info = json.loads((out / "final" / row["name"] / "gap.json").read_text())
    assert all(entry["nonzero"] == reference.KEEP for entry in info["entries"].values())
    # In the middle of a phase the dense partition is pruned in the copy; the run is not disturbed, as the rest shows.
    middle = load_file(out / "mid" / row["name"] / "model.safetensors")
    assert all(int(middle[name].count_nonzero()) == reference.KEEP for name in reference.entries())


def check_early(out: Path, row: Row, ranks: int) -> None:
    """Saving before the first step, and going on from there, is the same as nothing at all."""
    for rank in range(ranks):
        found = result(out, row["name"], rank)
        assert found["wrong"] == []
        for name in ("saved", "resumed", "back"):
            assert largest_difference(found[name], found["plain"]) == 0, name


def export_offline(out: Path, name: str) -> str | None:
    """Exports a row's checkpoint in this process, without its ranks, and compares it with the engine's export then.

    Returns why it could not be exported; None if it could.
    """
    offline = out / "offline" / name
    try:
        export(out / "checkpoints" / name, offline, "dense", None, "float32", False, lambda *_: None)
    except ValueError as error:
        return str(error)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (offline, out / "mid" / name))
    # A weight that is tied has several names in a library's own files.
    assert wanted.keys() <= found.keys(), name
    for key, weight in wanted.items():
        assert torch.equal(found[key], weight), (name, key)
    return None
