"""Tensors that hold all experts of a block, cut by partitions: training, files, exports and masks taken over."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gap_ds import GaPEngine, load_compact, optim
from gap_ds.checkpoint import portable
from gap_ds.checkpoint.inspect import inspect as inspect_checkpoint
from gap_ds.export import compact, expand
from gap_ds.export.from_checkpoint import export_checkpoint
from gap_ds.export.inspect import inspect as inspect_export

EXPERTS, HIDDEN, INNER = 4, 8, 4
CUT = {"sparsity": 0.7, "partitions": 4, "phase_steps": 2, "rounds": 1, "finetune_steps": 2}
STATIC = {"method": "static", "phase_steps": 1, "rounds": 0, "finetune_steps": 4}


class Block(nn.Module):
    """Experts in two tensors, of which every token takes all; and a matrix beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(HIDDEN, HIDDEN)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 3)
        self.experts.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->ebo", self.fc(x), self.experts.up).relu()
        return x + torch.einsum("ebi,eoi->bo", hidden, self.experts.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def build(config: Any, model: nn.Module | None = None, **options: Any) -> GaPEngine:
    model = Mixture() if model is None else model
    return GaPEngine(model, config, optimizer=torch.optim.AdamW(model.parameters(), lr=0.02), **options)


def train(engine: GaPEngine, until: int) -> None:
    while engine.applied_steps < until:
        x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(engine.applied_steps))
        engine.backward(engine(x))
        engine.step()


def rows(engine: GaPEngine, name: str) -> Tensor:
    """The weights of an entry, taken from the module by its name."""
    parameter, _, cut = name.partition("[")
    weight = engine.module.get_parameter(parameter).detach()
    return weight[slice(*map(int, cut.rstrip("]").split(":")))] if cut else weight


def state(engine: GaPEngine) -> dict[str, Tensor]:
    found = {f"weight {name}": p.detach().clone() for name, p in engine.module.named_parameters()}
    for entry in engine.plan.entries:
        mask = engine.mask(entry.name)
        found[f"mask {entry.name}"] = torch.ones(0, dtype=torch.bool) if mask is None else mask
    for name, p in engine.module.named_parameters():
        found |= {f"{key} {name}": value.clone() for key, value in engine.optimizer.state[p].items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"partition_assignment": "interleaved", "regrow": "last_value"},
        {"pattern": "2:4", "sparsity": 0.5},
        {"distribution": "global", "regrow_moments": "mean_second"},
        {"method": "cyclic", "grow": "gradient", "grow_share": 0.5},
    ],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_a_group_of_experts_is_dense_while_the_others_are_sparse(tmp_path: Path, changes: dict[str, Any]) -> None:
    engine = build(CUT | changes)
    cut = [entry for entry in engine.plan.entries if entry.name != entry.parameter]
    assert len({entry.partition for entry in cut}) == 4 and len(cut) >= 8
    total = engine.schedule.total_steps
    while not engine.finished:
        phase = engine.phase
        train(engine, engine.applied_steps + 1)
        for entry in engine.plan.entries:
            mask, weight = engine.mask(entry.name), rows(engine, entry.name)
            assert (mask is None) == (entry.partition in engine.phase.dense) or "grow" in changes
            assert mask is None or not weight.flatten()[~mask].count_nonzero()
            if mask is not None and not changes.keys() & {"distribution", "grow"}:
                assert int(mask.sum()) == entry.keep
        if engine.applied_steps == 3:
            engine.save_checkpoint(tmp_path / "run", "middle", portable=True)
            engine.export(tmp_path / "early")
            assert engine.phase is phase
    resumed = build(CUT | changes)
    resumed.load_checkpoint(tmp_path / "run", "middle")
    train(resumed, total)
    assert same(state(engine), state(resumed))
    assert inspect_checkpoint(tmp_path / "run" / "middle", lambda *_: None)["problems"] == []
    # Written from the files of the checkpoint alone, the export is the same.
    export_checkpoint(tmp_path / "run" / "middle", tmp_path / "again", module=Mixture(), progress=lambda *_: None)
    a, b = (load_file(tmp_path / which / "model.safetensors") for which in ("early", "again"))
    assert same(a, b)


def test_portable_files_of_packed_state(tmp_path: Path) -> None:
    """A parameter has its moments in several ranges of the optimizer's, one for each group of experts."""
    model = Mixture()
    engine = GaPEngine(model, CUT, optimizer=optim.AdamW(model.parameters(), lr=0.02))
    train(engine, 3)
    portable.write(tmp_path, engine.run.backend, {}, engine.run.world)
    found, whole = load_file(tmp_path / "portable_0.safetensors"), engine.optimizer.state_dict()["state"]
    for i, (name, _) in enumerate(model.named_parameters()):
        assert all(torch.equal(found[f"{key}:{name}"], whole[i][key].flatten()) for key in ("exp_avg", "exp_avg_sq"))


def test_an_export_has_the_parameters_and_its_record_the_entries(tmp_path: Path) -> None:
    engine = build(CUT)
    train(engine, engine.schedule.total_steps)
    engine.export(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    assert same(weights, {name: p.detach() for name, p in engine.module.named_parameters()})
    compact(tmp_path / "dense", tmp_path / "compact")
    assert same(dict(load_compact(tmp_path / "compact")), weights)
    expand(tmp_path / "compact", tmp_path / "expanded")
    for folder in ("dense", "compact", "expanded"):
        found = inspect_export(tmp_path / folder, lambda *_: None)
        assert found["problems"] == []
        assert {name: row["nonzero"] for name, row in found["entries"].items()} == {
            entry.name: entry.keep for entry in engine.plan.entries
        }
    # What is wrong with one group of experts is found there.
    path = tmp_path / "dense" / "gap.json"
    info, name = json.loads(path.read_text()), next(e.name for e in engine.plan.entries if e.name != e.parameter)
    info["entries"][name]["nonzero"] -= 1
    path.write_text(json.dumps(info))
    problems = inspect_export(tmp_path / "dense", lambda *_: None)["problems"]
    assert len(problems) == 1 and problems[0].startswith(f"{name}: has ")


def test_masks_are_taken_over_by_a_run_that_cuts_them_in_another_way(tmp_path: Path) -> None:
    first = build(CUT)
    train(first, first.schedule.total_steps)
    first.save_checkpoint(tmp_path, "cut")
    masks: dict[str, Tensor] = {}
    for name, p in first.module.named_parameters():
        masks[name] = p.detach() != 0
    file = {"mask_file": str(tmp_path / "cut" / "gap" / "masks.safetensors")}
    whole = build(STATIC | {"mask_init": "from_file", **file}, copy.deepcopy(first.module))
    assert all(entry.name == entry.parameter for entry in whole.plan.entries)
    for entry in whole.plan.entries:
        mask = whole.mask(entry.name)
        assert mask is not None and torch.equal(mask.view(entry.shape), masks[entry.name])
    whole.save_checkpoint(tmp_path, "whole")
    file = {"mask_file": str(tmp_path / "whole" / "gap" / "masks.safetensors")}
    for init in ({"mask_init": "from_file", **file}, {"mask_init": "from_weights"}):
        other = build(STATIC | {"partitions": 5} | init, copy.deepcopy(first.module))
        assert any(entry.name != entry.parameter for entry in other.plan.entries)
        for entry in other.plan.entries:
            mask = other.mask(entry.name)
            assert mask is not None and int(mask.sum()) == entry.keep
            assert torch.equal(mask, rows(other, entry.name).flatten() != 0)


def test_masks_on_a_copy(tmp_path: Path) -> None:
    engine = build(CUT)
    train(engine, 3)
    averaged = torch.optim.swa_utils.AveragedModel(engine.module)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.fill_(1.0)
    engine.apply_to(averaged)
    for entry in engine.plan.entries:
        parameter, mask = averaged.module.get_parameter(entry.parameter).detach(), engine.mask(entry.name)
        cut = entry.name.removeprefix(entry.parameter).strip("[]")
        own = parameter[slice(*map(int, cut.split(":")))] if cut else parameter
        wanted = torch.ones(entry.numel) if mask is None else mask.float()
        assert torch.equal(own.flatten(), wanted)
