"""Every method, plain and over DDP, ZeRO, FSDP and fairscale: really trained, against a reference of its own.

Plain is one process without a process group; all others are 2 processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_workers
from parity import largest_difference, result
from safetensors.torch import load_file
from table_rows import marked, needed

from gap_ds import GaPConfig
from gap_ds.method import schedule

from reference_methods import SCENARIOS, Scenario  # isort: skip

Row = dict[str, Any]

#: Of each backend: arguments of the worker's build; unused_is_zero and every_micro_batch of the reference; and whether
#: parameters without a gradient have a stale one, so that there must be none (see test_zero).
BACKENDS: dict[str, tuple[Row, bool, bool, bool]] = {
    "plain": ({"kind": "plain"}, False, False, False),
    "ddp": ({"kind": "ddp"}, False, False, False),
    "zero0": ({"stage": 0}, True, False, False),
    "zero1": ({"stage": 1}, True, False, False),
    "zero2": ({"stage": 2}, True, True, False),
    "zero2_offload": ({"stage": 2, "offload": True}, True, True, True),
    "zero3": ({"stage": 3}, True, True, True),
    "zero3_offload": ({"stage": 3, "offload": True}, True, True, True),
    "fsdp2": ({"kind": "fsdp2"}, False, False, False),
    "fsdp2_offload": ({"kind": "fsdp2", "offload": True}, False, False, False),
    "fsdp1": ({"kind": "fsdp1"}, True, False, False),
    "fairscale": ({"kind": "fsdp"}, False, False, False),
    "oss": ({"kind": "oss"}, True, False, False),
}


def row(scenario: str, backend: str, dtype: str = "fp32") -> Row:
    """A run, and in fp32 the reference that it must equal."""
    build, unused, every, stale = BACKENDS[backend]
    run = SCENARIOS[scenario]
    skip = run.skip and not stale
    ranks = 1 if backend == "plain" else 2
    arguments = {"skip": skip, "unused_is_zero": skip and unused, "every_micro_batch": every}
    name = f"{scenario}_{backend}_{dtype}"
    reference = "_".join(map(str, [f"reference{ranks}", scenario, *arguments.values()]))
    return {
        **{"name": name, "scenario": scenario, "gap": run.gap, "optimizer": run.optimizer, "dtype": dtype, **build},
        "ranks": ranks,
        **{"reference_arguments": arguments, **({"reference": reference} if dtype == "fp32" else {})},
    }


ROWS = [row(scenario, backend) for backend in ("plain", "ddp", "zero2", "zero3", "fsdp2") for scenario in SCENARIOS]
ROWS += [row(scenario, "zero2", "bf16") for scenario in ("rigl", "set", "gradual", "cyclic", "rising")]
ROWS += [row(scenario, "zero3", "bf16") for scenario in ("rigl", "dsd", "acdc", "cyclic_global")]
ROWS += [row(scenario, "fsdp1") for scenario in ("rigl", "set", "dsd", "cyclic_global")]
# Where the gradients lie is every backend's own affair.
ROWS += [row("rigl", backend) for backend in ("zero0", "zero1", "zero2_offload", "zero3_offload", "fsdp2_offload")]
ROWS += [row("rigl", backend, "bf16") for backend in ("zero0", "zero1", "zero2_offload", "zero3_offload")]
ROWS += [row("rigl", backend, "bf16") for backend in ("plain", "ddp")]  # a model whose weights are bf16
# Last, because fairscale without a GPU changes torch for good.
ROWS += [row(scenario, "fairscale") for scenario in ("rigl", "cyclic")]
ROWS += [row(scenario, "oss") for scenario in ("rigl", "acdc", "cyclic")]

BY_NAME = {run["name"]: run for run in ROWS}
#: Every method in one process; RigL, whose gradients lie elsewhere on every backend; and cyclic with a ramp.
SHORT = [f"{scenario}_plain_fp32" for scenario in SCENARIOS] + ["rigl_plain_bf16"]
SHORT += [
    f"rigl_{backend}_fp32" for backend in ("ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2", "fairscale", "oss")
]
SHORT += ["rigl_ddp_bf16", "rigl_zero3_bf16", "cyclic_zero2_fp32", "cyclic_oss_fp32"]
SHORT += ["cyclic_grow_zero3_fp32", "cyclic_grow_fsdp2_fp32", "rising_zero2_fp32", "granet_2of4_fsdp2_fp32"]
NAMES = marked(BY_NAME, SHORT)
EXACT = marked([n for n, run in BY_NAME.items() if "reference" in run], [n for n in SHORT if n.endswith("fp32")])


def scenario(name: str) -> Scenario:
    return SCENARIOS[BY_NAME[name]["scenario"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("methods")
    rows = [BY_NAME[name] for name in needed(request, "name")]
    (out / "rows.json").write_text(json.dumps(rows))
    for ranks in sorted({row["ranks"] for row in rows}):
        run_workers("worker_methods.py", ranks, out)
    return out


def same(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == wanted.keys() and all(torch.equal(ours[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in SCENARIOS.items()])
def test_the_tables_of_events_are_the_schedules(run: Scenario) -> None:
    """The events written down by hand, and runs that are saved in the middle of what they are to show."""
    planned = schedule.build(GaPConfig.load(run.gap))
    updates = {step for phase in planned.phases for step in phase.updates}
    boundaries = {phase.first_step for phase in planned.phases}
    assert updates <= run.events.keys() <= updates | boundaries
    assert planned.total_steps == run.steps
    phase = planned.phase_at(run.saved)
    assert phase.first_step < run.saved < phase.end_step
    assert not updates or phase.updates[0] <= run.saved < phase.end_step


@pytest.mark.parametrize("name", NAMES)
def test_invariants_hold_after_every_step(trained: Path, name: str) -> None:
    """Pruned weights are 0 in fp32 and working copies; masks change at events alone, to those of stable sorts."""
    run = scenario(name)
    first = result(trained, name)
    for rank in range(BY_NAME[name]["ranks"]):
        found = result(trained, name, rank)
        assert found["wrong"] == []
        assert found["masks"].keys() == run.events.keys()
        assert all(same(found["masks"][step], first["masks"][step]) for step in run.events)
    assert (first["backend"] == "plain") == (BY_NAME[name]["ranks"] == 1)
    budgets = {entry: run.budget(entry) for entry in run.entries()}
    assert {entry.name: entry.keep for entry in first["plan"].entries} == budgets
    assert first["kept"] == sum(budgets.values())


@pytest.mark.parametrize("name", EXACT)
def test_fp32_equals_the_independent_reference_bit_for_bit(trained: Path, name: str) -> None:
    ours, wanted = result(trained, name), result(trained, BY_NAME[name]["reference"])
    for step, masks in wanted["masks"].items():
        assert same(ours["masks"][step], masks), step
    assert ours["losses"] == wanted["losses"]
    for key, weight in ours["weights"].items():
        assert torch.equal(weight, wanted["weights"][key]), key
    for key, moments in wanted["moments"].items():
        # Nobody reads the moments of pruned weights: they are zeroed when the weights come back.
        active = ours["final"].get(key, torch.ones_like(ours["weights"][key], dtype=torch.bool))
        if scenario(name).gap.get("optimizer_state") == "reset":  # at the end: there are none until the next step
            assert ours["moments"][key] == [] and not any(moment.count_nonzero() for moment in moments), key
            continue
        assert len(ours["moments"][key]) == len(moments) > 0, key
        assert all(torch.equal(a[active], b[active]) for a, b in zip(ours["moments"][key], moments, strict=True)), key


@pytest.mark.parametrize("name", NAMES)
def test_resume_between_two_updates_equals_never_having_stopped(trained: Path, name: str) -> None:
    straight = result(trained, name)
    assert largest_difference(straight["resumed"], straight) == 0
    assert same(straight["resumed"]["final"], straight["final"])
    later = {step: masks for step, masks in straight["masks"].items() if step > scenario(name).saved}
    assert all(same(straight["resumed"]["masks"][step], masks) for step, masks in later.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_export_on_the_way_keeps_exactly_the_target(trained: Path, name: str) -> None:
    """In mid-ramp, too, where masks keep more; that it does not disturb the run, all other tests show."""
    run = scenario(name)
    for when in ("mid", "final"):
        found = load_file(trained / when / name / "model.safetensors")
        info = json.loads((trained / when / name / "gap.json").read_text())
        kept = {entry: int(found[entry].count_nonzero()) for entry in run.entries()}
        budgets = {entry: run.budget(entry) for entry in run.entries()}
        assert {entry: figures["nonzero"] for entry, figures in info["entries"].items()} == kept
        if run.gap.get("distribution") == "global":
            for k in range(run.kappa):
                inside = [entry for entry, partition in run.entries().items() if partition == k]
                assert sum(kept[entry] for entry in inside) == sum(budgets[entry] for entry in inside)
            assert kept != budgets
        elif run.gap["method"] in ("rigl", "set", "granet"):  # a weight that has just come is 0 until its first step
            assert all(kept[entry] <= budgets[entry] for entry in kept)
        else:
            assert kept == budgets
        if when == "mid" and "reference" in BY_NAME[name]:
            assert same({entry: found[entry] for entry in kept}, result(trained, BY_NAME[name]["reference"])["middle"])
        if when == "final":
            assert all(torch.equal(found[n], w) for n, w in result(trained, name)["weights"].items() if n in found)
