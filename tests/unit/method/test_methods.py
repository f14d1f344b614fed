"""A method of a user: the record of CONTRIBUTING.md, passed by value, trains as the shipped `set` does."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gap_ds import GaPConfig, GaPEngine
from gap_ds.method.methods import METHODS
from gap_ds.method.rules import Method
from gap_ds.method.schedule import build

PAGE = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"
RUN = {"sparsity": 0.75, "phase_steps": 6, "update_steps": 2, "finetune_steps": 3, "drop_fraction": 0.5}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def record() -> Method:
    """The record that CONTRIBUTING.md shows."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    model = Model()
    names: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(compile(code, str(PAGE), "exec"), names)
    assert isinstance(names["engine"], GaPEngine) and names["engine"].config.record is names["SET"]
    found = names["SET"]
    assert isinstance(found, Method)
    return found


def trained(method: Method | str) -> tuple[list[torch.Tensor], list[set[int]]]:
    """The weights after every step of a whole run, and the kept positions of the first entry."""
    network = Model()
    config: dict[str, Any] = {"method": method, **RUN}
    engine = GaPEngine(network, config, optimizer=torch.optim.Adam(network.parameters(), lr=0.01))
    weights, kept = [], []
    for step in range(9):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x))
        engine.step()
        entry = engine.plan.entries[0]
        weight = dict(network.named_parameters())[entry.name].detach()
        assert int(weight.count_nonzero()) <= entry.keep == 16
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        kept.append(set(weight.flatten().nonzero().flatten().tolist()))
    assert engine.finished
    return weights, kept


def test_the_record_of_contributing_trains_as_the_shipped_one() -> None:
    found, shipped = trained(record()), trained("set")
    assert all(torch.equal(a, b) for a, b in zip(found[0], shipped[0], strict=True))
    # The updates before steps 2 and 4 drop weights; what they grow is not zero after the next step.
    assert [bool(now - before) for before, now in itertools.pairwise(found[1])] == [i in (1, 3) for i in range(8)]


def test_a_record_is_a_value_of_the_config() -> None:
    mine = replace(METHODS["set"], name="mine")
    config = GaPConfig.load({"method": mine, **RUN})
    assert (config.method, config.record) == ("mine", mine)
    assert config == GaPConfig(method=mine, **RUN) != GaPConfig.load({"method": "set", **RUN})  # type: ignore[arg-type]
    assert config.signature("1") == GaPConfig.load({"method": "set", **RUN}).signature("1").replace("set", "mine", 1)
    assert config.as_dense().method == "dense"
    assert pickle.loads(pickle.dumps(config)).record == copy.deepcopy(config).record == mine
    assert GaPConfig.load(config) is config


def test_a_stored_config_is_read_again_without_the_functions_of_its_record() -> None:
    config = GaPConfig.load({"method": replace(METHODS["set"], name="mine"), **RUN})
    for stored in (json.loads(config.model_dump_json(exclude_unset=True)), config.model_dump(exclude_unset=True)):
        again = GaPConfig.load(stored)
        assert again.signature("1") == config.signature("1") and again.exploring == 1
        assert again.model_dump(exclude_unset=True) == config.model_dump(exclude_unset=True)
        with pytest.raises(
            ValueError, match=r"method='mine': its functions are in no file. Pass its record as \"method\""
        ):
            build(again)
    with pytest.raises(
        ValueError, match=r'^method: is neither a name nor a record, because "reads" is missing or wrong'
    ):
        GaPConfig.load({**RUN, "method": {"name": "mine", "summary": "", "source": ""}})


def test_a_run_with_a_record_is_resumed(tmp_path: Path) -> None:
    def engine() -> GaPEngine:
        model = Model()
        config = {"method": replace(METHODS["set"], name="mine"), **RUN}
        return GaPEngine(model, config, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))

    def train(engine: GaPEngine, steps: int) -> None:
        for _ in range(steps):
            engine.backward(engine(torch.ones(2, 8) * engine.applied_steps))
            engine.step()

    whole, first, second = engine(), engine(), engine()
    train(whole, 9)
    train(first, 3)
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    train(second, 6)
    for one, other in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (replace(METHODS["set"], updates=False), {}, "is the name of a shipped method: give your record another one"),
        (
            replace(METHODS["set"], name="mine", reads=frozenset({"drop_fractions"})),
            {},
            'its record reads "drop_fractions", which is no setting',
        ),
        (
            replace(METHODS["set"], name="mine", reads=frozenset({"drop_fraction"})),
            {},
            'its record has updates=True, so its reads must contain "update"',
        ),
        (replace(METHODS["set"], name="mine"), {"rounds": 2}, "\"rounds\" has no effect with method='mine': remove it"),
        (replace(METHODS["set"], name="mine"), {"distribution": "global"}, "its budgets are fixed before there are"),
        (replace(METHODS["dsd"], name="mine"), {}, "\"drop_fraction\" has no effect with method='mine': remove it"),
    ],
)
def test_mistakes_with_a_record(method: Method, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GaPConfig.load({"method": method, **RUN, **changes})


def test_a_name_alone_does_not_find_a_record() -> None:
    with pytest.raises(ValueError, match=r"method='mine': input should be 'cyclic', .*Set \"method\""):
        GaPConfig.load({"method": "mine", **RUN})
