"""Mixtures of experts of transformers: exact counts in every tensor, N:M along the inputs that their modules multiply,
and partitions that cut a block between its experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gap_ds import GaPConfig, GaPEngine
from gap_ds.method.plan import Plan, build

transformers = pytest.importorskip("transformers")
models = transformers.models

#: Gate and up projection are square, so that their shapes do not show which dimension is the input.
HIDDEN, INNER, EXPERTS, LAYERS = 16, 8, 4, 2
SIZES = {"vocab_size": 30, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": INNER, "num_local_experts": EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
}
RUNS = {
    "cyclic": {"method": "cyclic", "partitions": 2, "phase_steps": 1, "rounds": 1, "sparsity": 0.7},
    "rigl": {"method": "rigl", "phase_steps": 3, "update_steps": 1, "sparsity": 0.7},
    "2:4": {"method": "cyclic", "partitions": 2, "phase_steps": 1, "rounds": 1, "sparsity": 0.5, "pattern": "2:4"},
}


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(1)
    name, settings = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
    config._experts_implementation = "eager"
    built: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return built.train()


def trained(kind: str, run: str) -> tuple[nn.Module, GaPEngine]:
    """A model after a whole run, and its engine."""
    model = mixture(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = GaPEngine(model, RUNS[run] | {"finetune_steps": 1}, optimizer=optimizer)
    tokens = torch.arange(16).view(2, 8)
    while not engine.finished:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return model, engine


class OneHot(TorchFunctionMode):
    """Inside, every product with weights is one of one-hot rows, so that the columns of the weights come out of it."""

    def __init__(self) -> None:
        super().__init__()
        #: (outputs, inputs) of each product.
        self.found: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return function(*args, **(kwargs or {}))
        rows, width = args[0].shape
        columns = function(torch.eye(rows, width), *args[1:], **(kwargs or {}))
        self.found.append(columns[:width].T)
        return columns


def multiplied(experts: nn.Module, expert: int) -> list[Tensor]:
    """The matrices (outputs, inputs) of an expert in the order in which its module multiplies with them."""
    tokens = 2 * max(HIDDEN, INNER)
    with torch.no_grad(), OneHot() as products:
        experts(torch.zeros(tokens, HIDDEN), torch.full((tokens, 1), expert), torch.ones(tokens, 1))
    return products.found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_a_sparse_mixture(kind: str, run: str) -> None:
    model, engine = trained(kind, run)
    nonzero = {name: int(p.count_nonzero()) for name, p in model.named_parameters()}
    sizes = {"gate_up_proj": EXPERTS * HIDDEN * 2 * INNER, "down_proj": EXPERTS * HIDDEN * INNER}
    density = 0.5 if run == "2:4" else 0.3
    for layer in range(LAYERS):
        for leaf, size in sizes.items():
            assert nonzero[f"model.layers.{layer}.mlp.experts.{leaf}"] == int(density * size + 0.5)
    routers = [name for name in nonzero if "gate.weight" in name or "router.weight" in name]
    assert len(routers) == LAYERS and all(nonzero[name] == EXPERTS * HIDDEN for name in routers)
    assert len(engine.plan.entries) == LAYERS * (4 + 2)
    if run == "2:4":
        for layer in model.model.layers:
            for expert in range(EXPERTS):
                up, down = multiplied(layer.mlp.experts, expert)
                assert (up.shape, down.shape) == ((2 * INNER, HIDDEN), (HIDDEN, INNER))
                for matrix in (up, down):
                    assert ((matrix != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()


# -- every layout that transformers has ----------------------------------------------------------------------------


def config(**settings: Any) -> Any:
    return transformers.MixtralConfig(hidden_size=HIDDEN, **settings)


def jetmoe() -> nn.Module:
    experts = models.jetmoe.modeling_jetmoe.JetMoeParallelExperts
    return nn.ModuleDict({"up": experts(4, HIDDEN, 2 * INNER), "down": experts(4, INNER, HIDDEN)})


#: Experts and the (output, input) dimension of each tensor, as their forward multiplies them.
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]]]] = {
    "no attribute, inputs first": (
        lambda: models.llama4.modeling_llama4.Llama4TextExperts(config(num_local_experts=4, intermediate_size=INNER)),
        [(2, 1), (2, 1)],
    ),
    "sizes as attributes": (jetmoe, [(1, 2), (1, 2)]),
    "all in the rows of one matrix": (
        lambda: models.dbrx.modeling_dbrx.DbrxExpertGLU(
            transformers.DbrxConfig().ffn_config.__class__(ffn_hidden_size=INNER, hidden_size=HIDDEN, moe_num_experts=4)
        ),
        [(0, 1), (0, 1), (1, 0)],
    ),
    "empty places for experts without weights": (
        lambda: models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts(
            config(expert_ffn_hidden_size=INNER, n_routed_experts=4, zero_expert_num=2)
        ),
        [(1, 2), (1, 2)],
    ),
}


def in_blocks(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(HIDDEN, HIDDEN), "experts": make()}) for _ in range(2))


def plan(model: nn.Module, **changes: Any) -> Plan:
    base = {"sparsity": 0.5, "partitions": 2, "phase_steps": 1, "rounds": 1, "finetune_steps": 1}
    return build(model, GaPConfig.load({**base, **changes}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimensions(layout: str) -> None:
    make, dims = LAYOUTS[layout]
    found = plan(in_blocks(make), pattern="2:4")
    assert [e.dims for e in found.entries if e.name.startswith("0.experts.")] == dims


# -- partitions inside a block -------------------------------------------------------------------------------------


def switch() -> nn.Module:
    """Two encoder and two decoder blocks; the second of each has four experts of two matrices, in modules."""
    settings = {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "vocab_size": 30, "num_experts": 4}
    with torch.device("meta"):
        built: nn.Module = transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**settings, **sizes)
        )
    return built


def partitions_of_experts(found: Plan, block: str) -> list[int]:
    """The partition of each expert of a block, in their order."""
    of_expert: dict[str, set[int]] = {}
    for entry in found.entries:
        if entry.name.startswith(block) and entry.experts:
            assert (entry.experts.number, entry.experts.module) == (4, entry.name[: entry.name.index(".expert_")])
            of_expert.setdefault(entry.experts.expert, set()).add(entry.partition)
    assert list(of_expert) == [f"expert_{i}" for i in range(4)]
    return [partitions.pop() for partitions in of_expert.values() if len(partitions) == 1]


def test_partitions_between_experts() -> None:
    """More partitions than blocks: groups of experts in their order. Both matrices of an expert stay together."""
    whole = plan(switch(), partitions=4)
    assert partitions_of_experts(whole, "encoder.block.1.") == [1] * 4
    cut = plan(switch(), partitions=6)
    # In weights: 1536, 1024 + 4 * 512, 2560, 2048 + 4 * 512, cut into 1536, 1536, 1536, 2560, 2048 and 2048.
    assert cut.per_partition()[1] == [1536, 1536, 1536, 2560, 2048, 2048]
    assert partitions_of_experts(cut, "encoder.block.1.") == [1, 2, 2, 2]
    assert partitions_of_experts(cut, "decoder.block.1.") == [5] * 4
    assert {e.partition for e in cut.entries if e.name.startswith("decoder.block.1.") and not e.experts} == {4}
    # What belongs to no matrix goes with the nearest.
    assert cut.partition_of("encoder.block.1.layer.1.mlp.experts.expert_2.bias") == 2
    assert plan(switch(), partitions=12).kappa == 12
    with pytest.raises(
        ValueError, match=r'partitions=13: the model has 4 blocks of 12 parts .* Lower "partitions" to 12'
    ):
        plan(switch(), partitions=13)


def stacked(found: Plan) -> dict[str, tuple[int, str]]:
    """The partition and the experts of each entry of a tensor that holds all experts of its block."""
    experts = {e.name.removeprefix("model.layers."): (e.partition, e.experts) for e in found.entries if e.experts}
    return {name: (k, mixture.expert) for name, (k, mixture) in experts.items()}


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return mixture(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_one_tensor_are_cut_by_rows(kind: str) -> None:
    """More partitions than blocks: groups of experts, of which both matrices stay together, as with modules."""
    assert set(stacked(plan(on_meta(kind), partitions=2)).values()) == {(0, ""), (1, "")}
    found = plan(on_meta(kind), partitions=4)
    # In weights a block has attention (768, with biases the same) and 4 experts of 384.
    assert stacked(found) == {
        f"{layer}.mlp.experts.{leaf}[{experts}]": (2 * layer + k, experts)
        for layer in range(LAYERS)
        for leaf in ("down_proj", "gate_up_proj")
        for k, experts in enumerate(("0:1", "1:4"))
    }
    assert found.per_partition()[1] == [1152] * 4
    for leaf in ("gate_up_proj", "down_proj"):
        shape = tuple(on_meta(kind).get_parameter(f"model.layers.0.mlp.experts.{leaf}").shape)
        assert found.parameters()[f"model.layers.0.mlp.experts.{leaf}"] == shape
        own = [e for e in found.entries if e.parameter == f"model.layers.0.mlp.experts.{leaf}"]
        assert [e.shape for e in own] == [(1, *shape[1:]), (3, *shape[1:])]
    # What lies beside experts of several partitions goes with none of them.
    assert found.partition_of("model.layers.0.mlp.experts.gate_up_proj_bias") is None


@pytest.mark.parametrize("distribution", ["uniform", "erk", {"experts": 0.9}])
def test_the_budget_of_a_tensor_does_not_depend_on_how_it_is_cut(distribution: Any) -> None:
    whole, cut = (
        plan(on_meta("mixtral"), partitions=k, distribution=distribution, partition_assignment="interleaved")
        for k in (2, 5)
    )
    kept: dict[str, int] = {}
    for entry in cut.entries:
        kept[entry.parameter] = kept.get(entry.parameter, 0) + entry.keep
    assert len(cut.entries) > len(whole.entries) and kept == {e.name: e.keep for e in whole.entries}


def test_experts_in_the_rows_of_one_matrix_are_cut_between_experts() -> None:
    model = in_blocks(LAYOUTS["all in the rows of one matrix"][0])
    found = plan(model, partitions=4, pattern="block:4x4")
    assert stacked(found)["0.experts.v1[16:32]"] == (1, "2:4")
    assert all(e.shape[0] % INNER == 0 for e in found.entries if e.experts)


SLICES = [[r"layers\.\d+\.self_attn", r"layers\.0\.mlp\.experts[:3]"], ["experts[3:]", r"layers\.1\.mlp\.experts[0:3]"]]


def test_written_partitions_of_groups_of_experts() -> None:
    found = plan(on_meta("mixtral"), partitions=SLICES)
    cut = {f"0.mlp.experts.{leaf}[{rows}]" for leaf in ("down_proj", "gate_up_proj") for rows in ("0:3", "3:4")}
    assert {name for name in stacked(found) if name.startswith("0.")} == cut
    # All rows of a tensor in one partition are the tensor.
    assert stacked(found)["1.mlp.experts.down_proj"] == (1, "")
    rest = [r".*Attention", r"block\.0\..*DenseReluDense", r".*\.mlp\.w[io]", "experts[:1]"]
    modules = plan(switch(), partitions=[rest[:1] + rest[3:], ["experts[1:]"]], exclude=[r"block\.0\.layer\.[12]\.mlp"])
    assert partitions_of_experts(modules, "encoder.block.1.") == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("partitions", "sentence"),
    [
        ([["experts[0:9]"], ["self_attn"]], r'partitions\[0\]: "experts\[0:9\]" is no slice of the 4 experts of model'),
        ([["self_attn[0:2]"], ["experts"]], r'partitions\[0\]: pattern "self_attn\[0:2\]" matches none of'),
        (
            [["self_attn", "experts[0:3]"], ["experts"]],
            r"down_proj\[0:1\] matches partitions 0 and 1",
        ),
        ([["self_attn"], ["experts[0:3]"]], r"partitions: 4 entries belong to none, for example .*down_proj\[3:4\]"),
    ],
)
def test_slices_that_cannot_be(partitions: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(on_meta("mixtral"), partitions=partitions)


def test_a_name_that_means_rows_is_refused() -> None:
    model = nn.ModuleList(nn.ParameterDict({"weight[0:2]": torch.ones(8, 8)}) for _ in range(2))
    with pytest.raises(ValueError, match=r"0\.weight\[0:2\]: a parameter's name that ends in \[lo:hi\]"):
        plan(model, include=["0", "1"])
