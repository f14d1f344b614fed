"""The choice of entries: stacks, routers, convolutions, experts, tables, parametrized weights, adapters."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from gap_ds.method.config import GaPConfig
from gap_ds.method.plan import Plan, build

WIDTH = 16


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        for name, part in parts.items():
            self.add_module(name, part)


class OtherBlock(Block):
    pass


class Single(nn.Module):
    """A block of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)


class Pass(nn.Module):
    """Has no submodule and no parameter."""


class Bare(nn.Module):
    """Parameters without modules of their own."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


def model(**parts: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, part in parts.items():
        root.add_module(name, part)
    return root


def layers(make: Callable[[], nn.Module], n: int = 2) -> nn.Module:
    with torch.device("meta"):
        return model(layers=nn.ModuleList(make() for _ in range(n)))


def plan(root: nn.Module, **changes: Any) -> Plan:
    base = {"sparsity": 0.5, "partitions": 2, "phase_steps": 1, "rounds": 1, "finetune_steps": 1}
    return build(root, GaPConfig.load(base | changes))


def first(found: Plan) -> set[str]:
    """Names of the entries of the first block, without its name."""
    return {e.name.removeprefix("layers.0.") for e in found.entries if e.name.startswith("layers.0.")}


def reasons(found: Plan) -> dict[str, str]:
    return {
        row.name.removeprefix("layers.0."): row.reason for row in found.dense if not row.name.startswith("layers.1")
    }


# -- stacks --------------------------------------------------------------------------------------------------------


def names(prefix: str, numbers: Iterable[int]) -> list[str]:
    return [f"{prefix}.{i}" for i in numbers]


SHARED = Block()
STACKS: dict[str, tuple[nn.Module, list[str]]] = {
    "an empty member": (model(h=nn.ModuleList([Block(), Pass(), Block()])), names("h", (0, 2))),
    "an identity": (model(h=nn.Sequential(Block(), nn.Identity(), Block())), names("h", (0, 2))),
    "None": (model(h=nn.ModuleList([Block(), None, Block()])), names("h", (0, 2))),  # type: ignore[list-item]
    "a norm at the end": (model(h=nn.ModuleList([Block(), Block(), nn.LayerNorm(4)])), names("h", (0, 1))),
    "a norm in a Sequential": (model(h=nn.Sequential(Block(), Block(), nn.LayerNorm(4))), names("h", (0, 1))),
    "two classes": (model(h=nn.ModuleList([Block(), OtherBlock()])), names("h", (0, 1))),
    "two classes in turn": (model(h=nn.Sequential(*[Block(), OtherBlock()] * 2)), names("h", (0, 1))),
    "two classes in a Sequential": (model(h=nn.Sequential(Block(), OtherBlock(), Block())), names("h", (0, 1, 2))),
    "stem and head in a Sequential": (model(h=nn.Sequential(Single(), Block(), Block(), Single())), names("h", (1, 2))),
    "the same module twice": (model(h=nn.ModuleList([SHARED] * 3), g=nn.ModuleList([Block()])), ["h.0", "g.0"]),
    "one member": (model(a=nn.ModuleList([Block()] * 1), b=nn.ModuleList([OtherBlock()])), ["a.0", "b.0"]),
    "one in a Sequential": (model(a=nn.Sequential(Block(), Block()), b=nn.Sequential(Block())), ["a.0", "a.1", "b.0"]),
    "stages of one and two": (
        model(stages=nn.ModuleList(nn.Sequential(*[Block() for _ in range(n)]) for n in (1, 2))),
        ["stages.0.0", "stages.1.0", "stages.1.1"],
    ),
    "lists side by side in a block": (
        model(h=nn.ModuleList(Block(a=nn.ModuleList([Single(), Single()])) for _ in range(2))),
        names("h", (0, 1)),
    ),
    "numbered keys": (model(h=nn.ModuleDict({"0": Block(), "1": Block()})), names("h", (0, 1))),
    "numbered attributes": (model(stem=nn.Linear(3, 3), layer1=Block(), layer2=Block()), ["layer1", "layer2"]),
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacks(kind: str) -> None:
    root, blocks = STACKS[kind]
    if kind == "two classes in turn":  # the same two modules
        root = model(h=nn.Sequential(Block(), OtherBlock(), Block(), OtherBlock()))
        blocks = names("h", range(4))
    found = plan(root)
    assert list(found.blocks) == blocks
    linear = {f"{name}.weight" for name, m in root.named_modules() if isinstance(m, nn.Linear)}
    assert {e.name for e in found.entries} == {n for n in linear if n.startswith(tuple(f"{b}." for b in blocks))}


def test_one_block_has_no_two_partitions() -> None:
    root = model(h=nn.ModuleList([SHARED] * 6))
    with pytest.raises(ValueError, match=r"the model has 1 block with entries.*lists of name patterns"):
        plan(root)
    assert len(plan(root, partitions=[["fc1"], ["fc2"]]).entries) == 2


# -- routers, convolutions, tables ---------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Experts, a gate beside them, and a shared expert as wide as there are experts."""

    def __init__(self, gate: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts, self.shared = gate, experts, nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH))


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8)),
    "dict": lambda: nn.ModuleDict({f"expert_{i}": nn.Linear(WIDTH, WIDTH) for i in range(8)}),
    "one tensor": lambda: Bare(up=(8, 24, WIDTH), down=(8, WIDTH, 24)),
}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("gate", ["gate", "gate.wg", "gate.weight"])
def test_a_matrix_with_an_output_for_each_expert_is_a_router(kind: str, gate: str) -> None:
    def make() -> nn.Module:
        router: nn.Module = nn.Linear(WIDTH, 8, bias=False)
        if gate == "gate.wg":
            router = model(wg=router)
        elif gate == "gate.weight":
            router = Bare(weight=(8, WIDTH))
        return Block(mlp=Mixture(router, EXPERTS[kind]()))

    found = plan(layers(make))
    assert [reason for name, reason in reasons(found).items() if "gate" in name] == ["router"]
    assert {"mlp.shared.0.weight", "mlp.shared.1.weight"} < first(found)
    assert sum(name.startswith("mlp.experts.") for name in first(found)) == (2 if kind == "one tensor" else 8)


def test_a_layer_whose_experts_hold_nearly_all_weights_is_a_block() -> None:
    def make() -> nn.Module:
        experts = nn.ModuleList(Block() for _ in range(8))
        return model(attention=nn.Linear(WIDTH, WIDTH), router=nn.Linear(WIDTH, 8), experts=experts)

    found = plan(layers(make))
    assert list(found.blocks) == names("layers", (0, 1)) and reasons(found) == {"router.weight": "router"}
    assert "attention.weight" in first(found)


def test_as_many_outputs_without_experts_is_no_router() -> None:
    assert "gate.weight" in first(plan(layers(lambda: Block(gate=nn.Linear(WIDTH, 8)))))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (lambda: nn.Linear(WIDTH, 1), None),  # a vector
        (lambda: nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH), "depthwise"),
        (lambda: nn.Conv2d(WIDTH, 2 * WIDTH, 3, groups=WIDTH), "depthwise"),
        (lambda: nn.ConvTranspose2d(WIDTH, 2 * WIDTH, 3, groups=WIDTH), "depthwise"),
        (lambda: Bare(weight=(WIDTH, 1, 4)), "depthwise"),
        (lambda: nn.Linear(2, WIDTH), "thin"),
        (lambda: Bare(weight=(2, WIDTH)), "thin"),
        (lambda: nn.Embedding(32, WIDTH), "embedding"),
        (lambda: Bare(A_log=(2 * WIDTH, WIDTH)), "table"),
        (lambda: Bare(relative_position_bias_table=(WIDTH, WIDTH)), "table"),
        (lambda: Bare(seg_embed=(2, WIDTH, WIDTH)), "table"),
        (lambda: Bare(queries=(5, WIDTH)), "table"),
        (lambda: nn.Sequential(nn.LayerNorm((3, WIDTH))), None),
    ],
)
def test_what_is_no_matrix(part: Callable[[], nn.Module], reason: str | None) -> None:
    found = plan(layers(lambda: Block(part=part())))
    assert first(found) == {"fc1.weight", "fc2.weight"}
    assert list(reasons(found).values()) == ([reason] if reason else [])


def test_what_is_a_matrix() -> None:
    parts = {
        "grouped": nn.Conv1d(WIDTH, WIDTH, 4, groups=4),
        "rnn": nn.LSTM(WIDTH, WIDTH),
        "heads": Bare(q=(WIDTH, 2, 8), o=(WIDTH, WIDTH)),
    }
    wanted = {
        "grouped.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "heads.q",
        "heads.o",
        "fc1.weight",
        "fc2.weight",
    }
    assert first(plan(layers(lambda: Block(**parts), 1), partitions=[["fc1"], ["fc2|grouped|rnn|heads"]])) == wanted


# -- experts in one tensor -----------------------------------------------------------------------------------------


class Sized(Bare):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(weight=(4, outputs, inputs))
        self.input_size, self.output_size = inputs, outputs


class Flat(Bare):
    def __init__(self) -> None:
        super().__init__(w1=(4 * 8, WIDTH), v1=(4 * 8, WIDTH), w2=(4 * 8, WIDTH))
        self.moe_num_experts = 4


OUT, IN = (1, 2), (2, 1)
STACKED: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    "(E, out, in)": (lambda: Bare(gate_up=(4, 16, WIDTH), down=(4, WIDTH, 8)), {"gate_up": OUT, "down": OUT}),
    "(E, in, out)": (lambda: Bare(gate_up=(4, WIDTH, 16), down=(4, 8, WIDTH)), {"gate_up": IN, "down": IN}),
    "down first": (lambda: Bare(down=(4, 8, WIDTH), up=(4, WIDTH, 16)), {"down": IN, "up": IN}),
    "three": (
        lambda: Bare(w1=(4, 8, WIDTH), w2=(4, WIDTH, 8), w3=(4, 8, WIDTH)),
        {"w1": OUT, "w2": OUT, "w3": OUT},
    ),
    "three (E, in, out)": (
        lambda: Bare(w1=(4, WIDTH, 8), w2=(4, 8, WIDTH), w3=(4, WIDTH, 8)),
        {"w1": IN, "w2": IN, "w3": IN},
    ),
    "by bias": (lambda: Bare(up=(4, WIDTH, 8), up_bias=(4, 8)), {"up": IN}),
    "by the sizes, and by another of the class": (
        lambda: model(a=Sized(8, WIDTH), b=Sized(WIDTH, WIDTH)),
        {"a.weight": OUT, "b.weight": OUT},
    ),
    "rows of experts": (Flat, {"w1": (0, 1), "v1": (0, 1), "w2": (1, 0)}),
}


@pytest.mark.parametrize("kind", STACKED)
def test_the_input_dimension_of_experts(kind: str) -> None:
    make, dims = STACKED[kind]
    found = plan(layers(lambda: Block(experts=make())), pattern="2:4")
    of_experts = {e.name.removeprefix("layers.0.experts."): e.dims for e in found.entries if "0.experts." in e.name}
    assert of_experts == dims


@pytest.mark.parametrize("pattern", ["2:4", "block:1x4"])
def test_a_bare_matrix_of_unknown_direction(pattern: str) -> None:
    root = layers(lambda: Block(attention=Bare(qkvo=(4, WIDTH, WIDTH))))
    assert "attention.qkvo" in first(plan(root))
    message = rf'pattern="{pattern}": layers\.0\.attention\.qkvo .* nothing shows which dimension .* "exclude"'
    with pytest.raises(ValueError, match=message):
        plan(root, pattern=pattern)
    assert "attention.qkvo" not in first(plan(root, pattern=pattern, exclude=["qkvo"]))


def test_groups_do_not_reach_from_one_expert_into_the_next() -> None:
    class Odd(Bare):
        def __init__(self) -> None:
            super().__init__(w1=(4 * 6, WIDTH), w2=(4 * 6, WIDTH))
            self.num_experts = 4

    with pytest.raises(ValueError, match=r"experts\.w2 .*input dimension is 6, which is no multiple of 4"):
        plan(layers(lambda: Block(experts=Odd())), pattern="2:4")


# -- weights that are computed from others -------------------------------------------------------------------------


def reparametrize(module: nn.Linear, how: str) -> None:
    if how == "prune":
        prune.l1_unstructured(module, "weight", 0.5)
    elif how.startswith("old "):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(nn.utils, how.removeprefix("old "))(module)
    else:
        getattr(parametrizations, how)(module)


@pytest.mark.parametrize(
    "how", ["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm", "prune"]
)
def test_a_computed_weight_is_refused(how: str) -> None:
    root = model(layers=nn.ModuleList([Block(), Block()]))
    reparametrize(root.layers[0].fc1, how)
    for changes in ({"include": ["fc1"]}, {}):
        with pytest.raises(ValueError, match=r"^layers\.0\.fc1\.weight is computed from layers\.0\.fc1\.") as error:
            plan(root, **changes)
    assert (listed := re.search(r'or list (\S+) in "exclude"\.$', str(error.value)))
    assert first(plan(root, exclude=[listed[1]])) == {"fc2.weight"}
    assert first(plan(root, exclude=[r"0\.fc1"])) == {"fc2.weight"}


def test_a_computed_weight_outside_the_blocks_does_not_matter() -> None:
    root = model(stem=parametrizations.weight_norm(nn.Linear(4, 4)), layers=nn.ModuleList([Block(), Block()]))
    assert len(plan(root).entries) == 4


# -- frozen weights and adapters -----------------------------------------------------------------------------------


def adapted() -> nn.Module:
    """A frozen base with a low-rank pair beside each matrix."""
    blocks = [Block() for _ in range(2)]
    for block in blocks:
        block.requires_grad_(False)
        block.adapter = model(A=nn.Linear(WIDTH, 4, bias=False), B=nn.Linear(4, WIDTH, bias=False))
    return model(layers=nn.ModuleList(blocks))


def test_adapters_over_a_frozen_base() -> None:
    with pytest.raises(
        ValueError, match=r"only 4 small matrices .* look like adapters over a frozen base.*\"include\""
    ):
        plan(adapted())
    assert first(plan(adapted(), include=["adapter"])) == {"adapter.A.weight", "adapter.B.weight"}
    # A whole matrix that is trained beside frozen ones is no adapter.
    root = model(layers=nn.ModuleList([Block(), Block()]))
    for block in root.layers:
        block.fc2.requires_grad_(False)
    assert first(plan(root)) == {"fc1.weight"}


def test_adapters_beside_a_base_that_is_trained() -> None:
    """As peft lays them out, and as the message for a frozen base advises: the base is pruned, not what is added."""

    def lora() -> nn.Module:
        pair = {"lora_A": nn.Linear(WIDTH, 8, bias=False), "lora_B": nn.Linear(8, WIDTH, bias=False)}
        layers = [model(q=model(base_layer=nn.Linear(WIDTH, WIDTH), **copy.deepcopy(pair))) for _ in range(2)]
        for layer in layers:
            layer.q.adapter_layer_names = ("lora_A", "lora_B")
        return model(layers=nn.ModuleList(layers))

    assert first(plan(lora())) == first(plan(lora(), exclude=["lora_[AB]"])) == {"q.base_layer.weight"}
    assert [row.reason for row in plan(lora()).dense] == ["adapter"] * 4
    assert first(plan(lora(), include=["lora_A"])) == {"q.base_layer.weight", "q.lora_A.weight"}


def test_a_sparse_base_under_adapters_is_held() -> None:
    root = adapted()
    names = {"fc1.weight", "fc2.weight"}
    kept = {name: p.numel() // 2 for name, p in root.named_parameters()}
    held = GaPConfig(method="static", mask_init="from_weights", phase_steps=1, rounds=0, finetune_steps=1)
    found = build(root, held, kept=kept)
    assert first(found) == names
    assert found.held == {entry.name for entry in found.entries} and len(found.entries) == 4
    assert plan(adapted(), include=["adapter"]).held == frozenset()


def test_adapters_too_narrow_to_be_entries() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 64).requires_grad_(False)
            self.A, self.B = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)

    with pytest.raises(ValueError, match=r"no entry found: only 4 small .* look like adapters over a frozen base"):
        plan(model(layers=nn.ModuleList([Narrow(), Narrow()])))


def test_everything_frozen() -> None:
    with pytest.raises(ValueError, match=r"no entry found.* All matrices of the blocks are frozen or excluded\."):
        plan(model(layers=nn.ModuleList([Block(), Block()])).requires_grad_(False))


def test_layers_unfrozen_later() -> None:
    root = model(layers=nn.ModuleList(Block() for _ in range(3)), head=nn.Linear(4, 4))
    root.layers[0].requires_grad_(False)
    root.head.requires_grad_(False)
    found = plan(root)

    def trained() -> set[str]:
        return {name for name, p in root.named_parameters() if p.requires_grad}

    assert found.became_trainable(trained()) == []
    root.head.requires_grad_(True)  # would have been no entry anyway
    assert found.became_trainable(trained()) == []
    root.layers[0].requires_grad_(True)
    assert found.became_trainable(trained()) == ["layers.0.fc1.weight", "layers.0.fc2.weight"]
    assert plan(root, exclude=[r"layers\.0"]).became_trainable(trained()) == []


# -- the summary ---------------------------------------------------------------------------------------------------


def test_summary() -> None:
    root = model(
        embed=nn.Embedding(10, WIDTH), layers=nn.ModuleList(Block() for _ in range(3)), head=nn.Linear(WIDTH, 9)
    )
    root.layers[2].requires_grad_(False)
    found = plan(root, exclude=[r"1\.fc2"])
    total = 160 + 6 * 384 + 144
    dense = [
        "layers.*.fc2.weight (excluded) 14.7%",
        "layers.*.fc1.weight (frozen) 14.7%",
        "layers.*.fc2.weight (frozen) 14.7%",
        "embed.weight (embedding) 6.1%",
        "head.weight (outside the blocks) 5.5%",
    ]
    of_entries = f"3 entries hold {3 * 384 / total:.1%} of {total:,} matrix weights."
    assert found.summary() == f"{of_entries} Dense: {', '.join(dense)}."
    assert found.numel + sum(row.numel for row in found.dense) == total


def test_summary_without_dense_weights() -> None:
    assert (
        plan(model(h=nn.ModuleList([Block(), Block()]))).summary() == "4 entries hold 100.0% of 1,536 matrix weights."
    )
