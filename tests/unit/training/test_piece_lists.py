"""Lists of pieces that steps work on: kept while nothing changes, and never used when anything has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine import Model
from torch import Tensor, nn

from gap_ds import GaPConfig
from gap_ds.masks import bitmask, same
from gap_ds.method import plan
from gap_ds.sharding.backends import Training, detect
from gap_ds.training.mask_state import MaskState

ENTRIES = [f"layers.{i}.fc.weight" for i in range(4)]


class Case:
    """A model of 4 sparse entries, its optimizers, and the masks."""

    def __init__(self, optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizers = optimizers(self.model)
        config = GaPConfig(method="static", sparsity=0.75, phase_steps=9, rounds=1, finetune_steps=1)
        self.state = MaskState(plan.build(self.model, config), config, detect(self.model, Training(self.optimizers)))
        for number, name in enumerate(ENTRIES):
            self.state.bits[name] = some_bits(number)

    def step(self) -> None:
        """Every weight becomes 1, and each optimizer's are masked."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(1.0)
        masked = [set(self.state.zero_pruned(optimizer)) for optimizer in self.optimizers]
        for name, parameter in self.model.named_parameters():
            held = any(p is parameter for o in self.optimizers for group in o.param_groups for p in group["params"])
            bits = self.state.bits.get(name) if held else None
            expected = (
                torch.ones(parameter.numel()) if bits is None else bitmask.unpack(bits, parameter.numel()).float()
            )
            assert torch.equal(parameter.detach().float().view(-1), expected), name
            assert (name in set().union(*masked)) == (bits is not None), name

    @property
    def kept(self) -> int:
        """Lists that are kept."""
        return len(self.state._lists._steps)


def some_bits(seed: int) -> Tensor:
    return bitmask.pack(torch.rand(36, generator=torch.Generator().manual_seed(seed)) < 0.5)


def one(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    listed = list(model.parameters())
    return [torch.optim.SGD(part, lr=0.1) for part in (listed[:4], listed[4:])]


def replace_data(case: Case) -> None:
    weight = case.model.layers[1].fc.weight
    weight.data = weight.data.clone()


def cast(case: Case) -> None:
    """Twice, so that the memory of the first may be the third's."""
    weight = case.model.layers[1].fc.weight
    weight.data = weight.data.double()
    weight.data = weight.data.bfloat16()


def same_address(case: Case) -> None:
    """Another dtype in the same memory, as an allocator may give it."""
    weight = case.model.layers[1].fc.weight
    weight.data = weight.data.view(torch.bfloat16)[:, :6].contiguous()
    memory = case.held = torch.zeros(36)
    weight.data = memory.view(6, 6)
    case.step()
    weight.data = memory.view(torch.bfloat16)[:36].view(6, 6)


def replace_parameter(case: Case) -> None:
    """A new parameter, also in the optimizer."""
    layer = case.model.layers[1].fc
    old, layer.weight = layer.weight, nn.Parameter(layer.weight.detach().clone())
    for optimizer in case.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [layer.weight if p is old else p for p in group["params"]]


def replace_parameter_alone(case: Case) -> None:
    case.model.layers[1].fc.weight = nn.Parameter(case.model.layers[1].fc.weight.detach().clone())


def swap_owners(case: Case) -> None:
    a, b = case.model.layers[0].fc, case.model.layers[3].fc
    a.weight, b.weight = b.weight, a.weight


def swap_masks(case: Case) -> None:
    bits = case.state.bits
    bits[ENTRIES[0]], bits[ENTRIES[3]] = bits[ENTRIES[3]], bits[ENTRIES[0]]


def replace_mask(case: Case) -> None:
    case.state.bits[ENTRIES[2]] = some_bits(9)


def replace_all_masks(case: Case) -> None:
    case.state.bits = {name: some_bits(9 + i) for i, name in enumerate(ENTRIES[:3])}


def grow(case: Case) -> None:
    del case.state.bits[ENTRIES[2]]


def prune_what_was_dense(case: Case) -> None:
    grow(case)
    case.step()
    case.state.bits[ENTRIES[2]] = some_bits(7)


def leave_the_group(case: Case) -> None:
    weight = case.model.layers[3].fc.weight
    for optimizer in case.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not weight]


def further_group(case: Case) -> None:
    leave_the_group(case)
    case.step()
    case.optimizers[-1].add_param_group({"params": [case.model.layers[3].fc.weight]})


CHANGES = [
    *(replace_data, cast, same_address, replace_parameter, replace_parameter_alone, swap_owners, swap_masks),
    *(replace_mask, replace_all_masks, grow, prune_what_was_dense, leave_the_group, further_group),
]


@pytest.fixture(autouse=True, params=["compiled", "python"])
def always_compiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Comparisons in C and in Python, which large and small models use."""
    monkeypatch.setattr(bitmask, "COMPILED", 1)
    monkeypatch.setattr(same, "COMPILED", 1 if request.param == "compiled" else 10**9)


@pytest.mark.parametrize("optimizers", [one, two])
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(change: Callable[[Case], Any], optimizers: Any) -> None:
    case = Case(optimizers)
    for _ in range(2):
        case.step()
    change(case)
    for _ in range(2):
        case.step()


@pytest.mark.parametrize("optimizers", [one, two])
def test_a_list_is_made_once(optimizers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = Case(optimizers), []
    prepare = bitmask.zero_pruned_later
    monkeypatch.setattr(bitmask, "zero_pruned_later", lambda pieces: made.append(len(pieces)) or prepare(pieces))
    for _ in range(4):
        case.step()
    if bitmask.cpu.library() is None:
        pytest.skip("needs a C compiler")
    assert sum(made) == len(ENTRIES) and case.kept == len(made) == len(case.optimizers)
    case.state.forget_lists()
    assert case.kept == 0


def test_a_list_holds_no_memory_of_weights_that_were_replaced() -> None:
    case = Case(one)
    case.step()
    weight = case.model.layers[1].fc.weight
    storage = weight.untyped_storage()._weak_ref()
    weight.data = torch.zeros(6, 6)
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)


def test_other_sequences_of_the_weights_are_masked_when_they_come_and_when_they_are_replaced() -> None:
    case = Case(lambda model: [torch.optim.ASGD(model.parameters(), lr=0.1)])
    optimizer, weight = case.optimizers[0], case.model.layers[1].fc.weight
    case.step()
    expected = bitmask.unpack(case.state.bits[ENTRIES[1]], 36).float()
    for _ in range(2):
        optimizer.state[weight]["ax"] = torch.ones(6, 6)
        for _ in range(2):
            case.step()
            assert torch.equal(optimizer.state[weight]["ax"].view(-1), expected)
            optimizer.state[weight]["ax"].fill_(1.0)


def test_looks_are_listed_too_and_see_any_change() -> None:
    case = Case(one)
    case.step()
    names = ENTRIES[:3]
    assert not case.state.any_revived(names)
    for change in (replace_data, swap_owners, replace_parameter):
        change(case)
        case.step()
        assert not case.state.any_revived(names)
        with torch.no_grad():
            case.model.get_parameter(ENTRIES[1]).fill_(1.0)
        assert case.state.any_revived(names) and case.state.revived(names) is not None
        case.step()
    case.state.bits[ENTRIES[1]] = torch.zeros(5, dtype=torch.uint8)
    assert case.state.any_revived(names)
