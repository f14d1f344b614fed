"""Which weights are entries, in which partition: on Hugging Face models of many kinds, and on small ones by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gap_ds.method.config import GaPConfig
from gap_ds.method.entries import find_blocks
from gap_ds.method.partitions import balanced_cut
from gap_ds.method.plan import Entry, Plan, build, clean_name

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def config(**changes: Any) -> GaPConfig:
    base = {"sparsity": 0.8, "partitions": 2, "phase_steps": 1, "rounds": 1, "finetune_steps": 1}
    return GaPConfig.load({key: value for key, value in (base | changes).items() if value is not None})


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def blocks_of(model: nn.Module) -> list[str]:
    return find_blocks(dict(model.named_modules()), shapes_of(model))


def groups(plan: Plan) -> list[list[str]]:
    """Names of the entries of each partition."""
    return [[entry.name for entry in plan.entries if entry.partition == k] for k in range(plan.kappa)]


# -- Hugging Face --------------------------------------------------------------------------------------------------

ONE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "pad_token_id": 0,
}
GROUPED = ONE | {"num_key_value_heads": 2}
TWO = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}

ENCODER_DECODER = ["model.encoder.layers.{}"] * 2 + ["model.decoder.layers.{}"] * 3
# d * d is 1024: an encoder layer has 4 + 2 * 2 of it, a decoder layer 4 + 4 + 2 * 2; a tied head 50 * 32 weights.
SEQ2SEQ = (42, (2 * 8 + 3 * 12) * 1024)
LLAMA = (21, 3 * (2 * 1024 + 2 * 512 + 3 * 2048))
ENCODER = (18, 3 * (4 * 1024 + 2 * 2048))

#: class, config, block names, (entries, weights in them), dense matrices
MODELS: dict[str, tuple[str, dict[str, Any], list[str], tuple[int, int], int]] = {
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3}
        | {"num_heads": 4},
        ["encoder.block.{}"] * 2 + ["decoder.block.{}"] * 3,
        SEQ2SEQ,
        1600,
    ),
    "Bart": ("BartForConditionalGeneration", TWO, ENCODER_DECODER, SEQ2SEQ, 1600),
    "M2M100": ("M2M100ForConditionalGeneration", TWO, ENCODER_DECODER, SEQ2SEQ, 1600),
    "Marian": ("MarianMTModel", TWO, ENCODER_DECODER, SEQ2SEQ, 1600),
    # two convolutions in front of the encoder: 32 * 80 * 3 and 32 * 32 * 3
    "Whisper": (
        "WhisperForConditionalGeneration",
        TWO | {"begin_suppress_tokens": None},
        ENCODER_DECODER,
        SEQ2SEQ,
        1600 + 32 * 80 * 3 + 32 * 32 * 3,
    ),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        ["transformer.h.{}"] * 3,
        (12, 3 * 12 * 1024),
        1600,
    ),
    "Llama": ("LlamaForCausalLM", GROUPED, ["model.layers.{}"] * 3, LLAMA, 1600),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, ["model.layers.{}"] * 3, LLAMA, 1600),
    "Mistral": ("MistralForCausalLM", GROUPED, ["model.layers.{}"] * 3, LLAMA, 1600),
    # of each expert three matrices, two of them in one tensor; routers (4 * 32 in each layer) stay dense
    "Mixtral": (
        "MixtralForCausalLM",
        GROUPED | {"num_local_experts": 4},
        ["model.layers.{}"] * 3,
        (18, 3 * (3 * 1024 + 4 * 3 * 2048)),
        1600 + 3 * 4 * 32,
    ),
    "OPT": (
        "OPTForCausalLM",
        {"vocab_size": 50, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "ffn_dim": 64},
        ["model.decoder.layers.{}"] * 3,
        ENCODER,
        1600,
    ),
    "Bert": ("BertForMaskedLM", ONE, ["bert.encoder.layer.{}"] * 3, ENCODER, 1600 + 1024),
    "Roberta": ("RobertaForMaskedLM", ONE, ["roberta.encoder.layer.{}"] * 3, ENCODER, 1600 + 1024),
    # patches 32 * 3 * 8 * 8 and a classifier of 2 * 32
    "ViT": (
        "ViTForImageClassification",
        IMAGES | {"image_size": 32, "patch_size": 8},
        ["vit.layers.{}"] * 3,
        ENCODER,
        32 * 192 + 64,
    ),
    # Stages of 2 blocks with 16 and 32 channels; patches 16 * 3 * 4 * 4, a merge of 32 * 64 and the classifier.
    "Swin": (
        "SwinForImageClassification",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
        ["swin.encoder.layers.0.blocks.{}"] * 2 + ["swin.encoder.layers.1.blocks.{}"] * 2,
        (24, 2 * (4 + 8) * (16 * 16 + 32 * 32)),
        768 + 2048 + 64,
    ),
    # ResNet-50: everything but the first convolution and the classifier (of 2 classes)
    "ResNet": (
        "ResNetForImageClassification",
        {},
        [f"resnet.encoder.stages.{stage}.layers.{{}}" for stage, n in enumerate((3, 4, 6, 3)) for _ in range(n)],
        (52, 25_502_912 - 64 * 3 * 49 - 1000 * 2048),
        64 * 3 * 49 + 2 * 2048,
    ),
}


def hugging_face(kind: str, cls: str, settings: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, f"{kind}Config")(**settings))
    assert isinstance(model, nn.Module)
    return model


def numbered(templates: list[str]) -> list[str]:
    """The templates with the running number of each kind."""
    seen: dict[str, int] = {}
    names = []
    for template in templates:
        names.append(template.format(seen.setdefault(template, 0)))
        seen[template] += 1
    return names


UNWANTED = re.compile(r"embed|wte|wpe|norm|bias|lm_head|classifier|router|mlp\.gate\.|shared|position|downsample")


@pytest.mark.parametrize("kind", MODELS)
def test_hugging_face(kind: str) -> None:
    cls, settings, templates, (entries, numel), dense = MODELS[kind]
    model = hugging_face(kind, cls, settings)
    blocks = numbered(templates)
    assert blocks_of(model) == blocks
    plan = build(model, config())
    assert (len(plan.entries), plan.numel, plan.dense_matmul) == (entries, numel, dense)
    assert plan.total == sum(p.numel() for p in model.parameters())
    shapes = shapes_of(model)
    for entry in plan.entries:
        assert not UNWANTED.search(entry.name.removesuffix(".weight")), entry.name
        assert entry.shape == shapes[entry.name]
        assert entry.name.startswith(tuple(f"{block}." for block in blocks))
    # A block lies in one partition, and partitions follow the order of the model.
    of_block = [{e.partition for e in plan.entries if e.name.startswith(f"{block}.")} for block in blocks]
    assert all(len(partitions) == 1 for partitions in of_block)
    order = [partitions.pop() for partitions in of_block]
    assert order == sorted(order) and set(order) == {0, 1}
    assert len(groups(build(model, config(partitions=len(blocks))))) == len(blocks)
    # A block of experts can be cut: into attention, and each of its experts.
    experts = max((e.experts.number for e in plan.entries if e.experts), default=0)
    parts = (1 + experts) * len(blocks)
    assert bool(experts) == (kind == "Mixtral")
    with pytest.raises(ValueError, match=rf"partitions={parts + 1}: the model has {len(blocks)} blocks"):
        build(model, config(partitions=parts + 1))


def test_transformer_big() -> None:
    """The paper's model: 176.2 M weights in the entries; 34.5 M in the embedding, which is the head too."""
    settings = {
        "vocab_size": 33712,
        "d_model": 1024,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
    }
    model = hugging_face("M2M100", "M2M100ForConditionalGeneration", settings)
    plan = build(model, config(partitions=3))
    assert (plan.numel, plan.dense_matmul, len(plan.entries)) == (176_160_768, 34_521_088, 96)
    # Encoder layers have 12 * 1024^2 weights, decoder layers 16 * 1024^2: 60, 60 and 48 is the most even cut.
    layers = [sorted({".".join(name.split(".")[1:4:2]) for name in names}) for names in groups(plan)]
    assert layers == [
        [f"encoder.{i}" for i in range(5)],
        ["decoder.0", "decoder.1", "decoder.2", "encoder.5"],
        [f"decoder.{i}" for i in range(3, 6)],
    ]
    assert plan.per_partition()[1] == [60 << 20, 60 << 20, 48 << 20]
    assert plan.training_flops(1.0) == 1.0
    assert plan.training_flops(0.0) == pytest.approx(34_521_088 / (34_521_088 + 176_160_768), abs=1e-15)
    # Six partitions of one layer pair each, written out as in the paper.
    pairs = [
        [rf"{stack}\.layers\.{i}", rf"{stack}\.layers\.{i + 1}"] for stack in ("encoder", "decoder") for i in (0, 2, 4)
    ]
    written = build(model, config(partitions=pairs))
    assert written.per_partition()[1] == [25_165_824] * 3 + [33_554_432] * 3
    assert {len(names) for names in groups(written)} == {12, 20}


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    """Six for each weight and token: products forward, and with the gradient, for weights and for activations."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            layers = (nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(2))
            self.layers = nn.ModuleList(layers)
            self.head = nn.Linear(16, 50, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.embedding(tokens)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x).square().mean()

    with torch.device("meta"):
        model, tokens = Model(), torch.zeros(3, 7, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens).backward()
    plan = build(model, config())
    assert counter.get_total_flops() == 6 * 21 * (plan.numel + plan.dense_matmul)
    dense = 50 * 16 / (50 * 16 + 4 * 16 * 32)
    assert plan.training_flops(0.25) == pytest.approx(dense + 0.25 * (1 - dense))


# -- a small model, by hand ----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)


class Toy(nn.Module):
    """An embedding, a stem, `n` blocks of 64 prunable weights each, and a head tied to the embedding."""

    def __init__(self, n: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(n))
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_entries_of_the_toy() -> None:
    plan = build(Toy(2), config())
    assert plan.entries == (
        Entry("layers.0.fc1.weight", (8, 4), 0, 6),
        Entry("layers.0.fc2.weight", (4, 8), 0, 6),
        Entry("layers.1.fc1.weight", (8, 4), 1, 6),
        Entry("layers.1.fc2.weight", (4, 8), 1, 6),
    )
    assert (plan.numel, plan.keep, plan.per_partition()) == (128, 24, ([12, 12], [64, 64]))
    assert plan.dense_matmul == 16 + 40  # the stem, and the tied head once
    assert build(Toy(2, tied=False), config()).dense_matmul == 16 + 40
    assert plan.total == sum(p.numel() for p in Toy(2).parameters())


def test_a_partition_of_its_own_for_dsd_and_distribution() -> None:
    assert {e.partition for e in build(Toy(), config(method="dsd", partitions=None)).entries} == {0}
    erk = build(Toy(), config(distribution="erk"))
    assert [e.keep for e in erk.entries] == [7] * 3 + [6] * 5 and erk.keep == 51  # 51.2 of 256


def test_assignments() -> None:
    def layers(**changes: Any) -> list[list[int]]:
        plan = build(Toy(6), config(partitions=3, **changes))
        return [sorted({int(name.split(".")[1]) for name in names}) for names in groups(plan)]

    assert layers() == layers(partition_assignment="contiguous") == [[0, 1], [2, 3], [4, 5]]
    assert layers(partition_assignment="interleaved") == [[0, 3], [1, 4], [2, 5]]
    dealt = layers(partition_assignment="random", seed=1)
    assert sorted(itertools.chain(*dealt)) == list(range(6)) and [len(k) for k in dealt] == [2, 2, 2]
    assert dealt == layers(partition_assignment="random", seed=1)
    assert len({str(layers(partition_assignment="random", seed=seed)) for seed in range(5)}) > 2


def test_include_and_exclude() -> None:
    names = [e.name for e in build(Toy(2), config(include=["stem"], exclude=[r"layers\.1\.fc2"])).entries]
    assert names == ["stem.weight", "layers.0.fc1.weight", "layers.0.fc2.weight", "layers.1.fc1.weight"]
    # What lies outside the blocks goes with the block before it, and what lies before all of them with the first.
    plan = build(Toy(2, tied=False), config(include=["stem", "head"]))
    assert groups(plan)[0][0] == "stem.weight" and groups(plan)[1][-1] == "head.weight"
    # A tied embedding is pruned only if asked for by name; then its head is no dense matrix any more.
    plan = build(Toy(2), config(include=["embed"]))
    assert plan.entries[0].name == "embed.weight" and plan.dense_matmul == 16


def test_a_pattern_matches_whole_components() -> None:
    model = Toy(12)
    plan = build(model, config(exclude=[r"layers\.1"]))
    left = {name.split(".")[1] for names in groups(plan) for name in names}
    assert left == {str(i) for i in range(12)} - {"1"}
    assert len(build(model, config(exclude=["fc1"])).entries) == 12
    assert len(build(model, config(exclude=[r"layers\.[0-9]\.fc2\.weight"])).entries) == 14
    assert len(build(model, config(exclude=[r"1\.fc1", r"layers\.1[01]"])).entries) == 19
    with pytest.raises(ValueError, match="matches none"):
        build(model, config(exclude=["fc"]))


def test_written_partitions() -> None:
    plan = build(Toy(4), config(partitions=[[r"layers\.[03]"], [r"layers\.1", "2.fc1", "2.fc2"]]))
    assert [sorted({name.split(".")[1] for name in names}) for names in groups(plan)] == [["0", "3"], ["1", "2"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partitions": 5}, r'partitions=5: the model has 4 blocks .* Lower "partitions" to 4 or less\.'),
        ({"include": ["stm"]}, r'include: pattern "stm" matches none of \d+ weights\. Near matches: stem'),
        ({"exclude": ["layer.0"]}, r'exclude: pattern "layer\.0" matches none of 8 weights\. Near matches: layers\.0'),
        ({"exclude": ["stem"]}, r'exclude: pattern "stem" matches none of 8 weights'),
        ({"exclude": ["("]}, r'pattern "\(" is not a regular expression: .* at position 0\.$'),
        ({"exclude": ["*"]}, r'pattern "\*" is not a regular expression: .* at position 0\. Any text is "\.\*", '),
        ({"exclude": ["layers"]}, "no entry found"),
        (
            {"partitions": [[r"layers\.[01]"], ["layers.2", "layer.3"]]},
            r'partitions\[1\]: pattern "layer\.3" matches none of 8 weights\. Near matches: .*layers\.3',
        ),
        (
            {"partitions": [[r"layers\.[012]"], [r"layers\.[23]"]]},
            r"partitions: layers\.2\.fc1\.weight matches partitions 0 and 1 \(by .*\)\. Each entry must belong to exac",
        ),
        (
            {"partitions": [[r"layers\.0"], [r"layers\.[23]"]]},
            r'partitions: 2 entries belong to none, for example layers\.1\.fc1\.weight\. .* "exclude"',
        ),
    ],
    ids=str,
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Toy(4), config(**changes))


def test_a_model_without_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r'no entry found: .* Name the weights to prune by "include"'):
        build(model, config())
    plan = build(model, config(include=["0", "2"]))
    assert groups(plan) == [["0.weight"], ["2.weight"]] and plan.dense_matmul == 8
    assert groups(build(model, config(partitions=[["0", "4"], ["2"]]))) == [["0.weight", "4.weight"], ["2.weight"]]
    root = nn.Linear(4, 4)
    alone = build(root, config(method="dsd", partitions=None, include=["weight"]))
    assert (alone.entries, alone.dense_matmul) == ((Entry("weight", (4, 4), 0, 3),), 0)


def test_frozen_weights_are_no_entries() -> None:
    model = Toy(3)
    model.layers[1].requires_grad_(False)
    plan = build(model, config())
    assert {name.split(".")[1] for names in groups(plan) for name in names} == {"0", "2"}
    assert plan.dense_matmul == 16 + 40 + 64
    assert plan == build(model, config(), shapes_of(model), {"layers.1.fc1.weight", "layers.1.fc2.weight"})


def test_norms_over_several_dimensions_are_no_entries() -> None:
    model = Toy(2)
    model.layers[0].norm = nn.LayerNorm((3, 4))
    plan = build(model, config())
    assert plan.entries == build(Toy(2), config()).entries and plan.dense_matmul == 16 + 40


def test_a_tied_embedding_is_no_entry_under_its_other_name() -> None:
    """A tied parameter is listed under the name that comes first, which may be that of a Linear in a block."""
    model = Toy(2)
    model.layers[0].out = model.head
    first = nn.ModuleDict({"layers": model.layers, "embed": model.embed})
    assert "layers.0.out.weight" in shapes_of(first)
    plan = build(first, config())
    assert plan.entries == build(Toy(2), config()).entries and plan.dense_matmul == 40
    flat = nn.ModuleDict({"head": model.head, "embed": model.embed, "fc": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r'partitions\[0\]: pattern "head" matches none'):
        build(flat, config(partitions=[["head"], ["fc"]]))


def test_experts_are_entries_and_routers_are_not() -> None:
    class ToyRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4))

    class ToyExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(3, 4, 8))
            self.scale = nn.Parameter(torch.zeros(3, 8))

    model = Toy(2)
    for layer in model.layers:
        layer.gate, layer.experts = ToyRouter(), ToyExperts()
    plan = build(model, config())
    assert [e.name for e in plan.entries if e.partition == 0] == [
        "layers.0.fc1.weight",
        "layers.0.fc2.weight",
        "layers.0.experts.up",
    ]
    assert plan.dense_matmul == 16 + 40 + 2 * 12


# -- the same plan for every backend -------------------------------------------------------------------------------


@PROPERTY
@given(st.randoms(use_true_random=False), st.sampled_from(["contiguous", "interleaved", "random"]))
def test_the_order_of_the_parameters_does_not_matter(rng: random.Random, assign: str) -> None:
    model, settings = Toy(5), config(partition_assignment=assign, partitions=3, include=["stem"])
    rows = list(shapes_of(model).items())
    rng.shuffle(rows)
    plan = build(model, settings, dict(rows))
    assert plan == build(model, settings)
    assert plan.fingerprint == build(model, settings).fingerprint


def test_sharded_parameters_may_be_empty() -> None:
    """A backend says the full shapes; a tied parameter is listed under one of its names only."""
    model, expected = Toy(3), build(Toy(3), config())
    shapes = shapes_of(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert build(model, config(), shapes) == expected


def test_names_of_wrapped_models() -> None:
    assert clean_name("layers.0.fc1.weight") == "layers.0.fc1.weight"
    assert clean_name("_orig_mod.a._fsdp_wrapped_module.b._checkpoint_wrapped_module") == "a.b"
    assert clean_name("_orig_mod") == ""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    wrapped = Toy(3)
    wrapped.layers[1] = Wrapper(wrapped.layers[1])
    assert build(Wrapper(wrapped), config()) == build(Toy(3), config())


def test_fingerprint() -> None:
    model = Toy(4)
    same = build(model, config()).fingerprint
    assert same == build(Toy(4), config(seed=3, phase_steps=7)).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", same)
    others = [
        config(sparsity=0.9),
        config(partitions=3),
        config(partition_assignment="interleaved"),
        config(distribution="erk"),
        config(exclude=["1.fc1"]),
        config(sparsity=0.5),
        config(sparsity=0.5, pattern="2:4"),
        config(sparsity=0.5, pattern="block:2x2"),
        config(distribution="global"),
        config(distribution={"fc1": 0.5}),
    ]
    assert len({same, *(build(model, other).fingerprint for other in others)}) == 11


# -- distributions that need the names -----------------------------------------------------------------------------


def test_sparsity_by_name_pattern() -> None:
    """Entries of 32 weights; what no pattern matches has the sparsity of the whole."""
    plan = build(Toy(3), config(distribution={"fc1": 0.5, r"layers\.2\.fc2": 0}))
    assert [entry.keep for entry in plan.entries] == [16, 6, 16, 6, 16, 32]
    assert not plan.shared_budget
    # Included weights have names too; ratios are rounded as everywhere.
    plan = build(Toy(2), config(include=["stem"], distribution={"stem": 0.9, "layers": 0.75}))
    assert {entry.name: entry.keep for entry in plan.entries}["stem.weight"] == 2  # 1.6
    assert [entry.keep for entry in plan.entries[1:]] == [8] * 4
    # That every entry has the same sparsity by its name or by the whole makes the same plan.
    assert build(Toy(2), config(distribution={"layers": 0.8})) == build(Toy(2), config())
    # With blocks, every budget is a whole number of them.
    blocks = build(Toy(2), config(pattern="block:2x2", distribution={"fc1": 0.5, "fc2": 0.6}))
    assert [entry.keep for entry in blocks.entries] == [16, 12, 16, 12]  # 12.8 of 32 are 3.2 blocks


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (
            {"fc1": 0.5, r"layers\.2": 0.9},
            'distribution: layers.2.fc1.weight matches "fc1" and "layers\\.2". Each entry must match one at most.',
        ),
        (  # even where both say the same
            {"layers": 0.5, r"0\.fc2": 0.5},
            'distribution: layers.0.fc2.weight matches "layers" and "0\\.fc2". Each entry must match one at most.',
        ),
        (
            {"layer.2": 0.5},
            'distribution: pattern "layer.2" matches none of 6 weights. Near matches: layers.2, layers.1, layers.0.',
        ),
        (
            {"layers.1": 0.9, "fc3": 0.5},
            'distribution: pattern "fc3" matches none of 6 weights. Near matches: layers.0.fc1.weight, '
            "layers.0.fc2.weight, layers.1.fc1.weight.",
        ),
        (  # no entry, though the model has it
            {"stem": 0.5},
            'distribution: pattern "stem" matches none of 6 weights. Near matches: layers.0.fc1.weight, '
            "layers.0.fc2.weight, layers.1.fc1.weight.",
        ),
    ],
    ids=str,
)
def test_mistakes_in_a_distribution_by_name(distribution: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(Toy(3), config(distribution=distribution))
    assert str(error.value) == message


def test_a_distribution_by_a_broken_pattern() -> None:
    with pytest.raises(ValueError, match=r'pattern "\(" is not a regular expression: '):
        build(Toy(3), config(distribution={"(": 0.5}))


def test_global_shares_the_uniform_budgets() -> None:
    uniform, pooled = build(Toy(4), config()), build(Toy(4), config(distribution="global"))
    assert pooled.shared_budget and not uniform.shared_budget
    assert pooled == replace(uniform, shared_budget=True)
    assert pooled.fingerprint != uniform.fingerprint
    assert pooled.per_partition() == uniform.per_partition() == ([24, 24], [128, 128])


# -- what goes with which partition --------------------------------------------------------------------------------


def homes(model: nn.Module, plan: Plan) -> dict[str, int | None]:
    """The home of every parameter and buffer."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return {name: plan.partition_of(name) for name in names}


def test_a_block_goes_with_its_entries() -> None:
    model = Toy(3)
    model.final = nn.BatchNorm1d(4)
    model.layers[1].batch_norm = nn.BatchNorm1d(4)
    model.scale = nn.Parameter(torch.ones(1))
    found = homes(model, build(model, config(partitions=3)))
    for name, home in found.items():
        assert home == (int(name.split(".")[1]) if name.startswith("layers.") else None), name
    assert {"layers.1.batch_norm.running_mean", "layers.1.norm.weight", "layers.2.fc1.bias"} < found.keys()
    assert {"embed.weight", "stem.bias", "final.running_var", "final.num_batches_tracked", "scale"} < found.keys()


def test_layer_10_is_not_in_layer_1() -> None:
    found = homes(Toy(12), build(Toy(12), config(partitions=12)))
    assert [found[f"layers.{i}.norm.bias"] for i in range(12)] == list(range(12))


def test_what_stands_beside_an_entry_outside_the_blocks_goes_with_it() -> None:
    model = Toy(3, tied=False)
    plan = build(model, config(partitions=3, include=["stem", "head"]))
    found = homes(model, plan)
    assert (found["stem.weight"], found["stem.bias"], found["head.weight"], found["embed.weight"]) == (0, 0, 2, None)


def test_a_block_without_entries_goes_with_nobody() -> None:
    model = Toy(3)
    found = homes(model, build(model, config(exclude=[r"layers\.1"])))
    assert {home for name, home in found.items() if name.startswith("layers.1.")} == {None}
    assert found["layers.0.norm.weight"] == 0 and found["layers.2.norm.weight"] == 1


def test_a_block_that_is_cut_apart() -> None:
    """What lies nearer to the entries of one partition goes with it, and what lies between two with none."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
            self.scale = nn.Parameter(torch.ones(1))

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp, self.norm = Parts(), Parts(), nn.LayerNorm(4)
            self.gamma = nn.Parameter(torch.ones(1))

    model = nn.ModuleDict({"layers": nn.ModuleList([Cut(), Cut()])})
    plan = build(model, config(partitions=[["attention.q", r"layers\.1"], [r"0\.attention\.v", r"0\.mlp"]]))
    found = homes(model, plan)
    assert {home for name, home in found.items() if name.startswith("layers.1.")} == {0}
    cut = {name.removeprefix("layers.0."): home for name, home in found.items() if name.startswith("layers.0.")}
    assert {name for name, home in cut.items() if home == 0} == {"attention.q.weight", "attention.q.bias"}
    assert {name for name, home in cut.items() if home is None} == {
        *("attention.norm.weight", "attention.norm.bias", "attention.scale", "norm.weight", "norm.bias", "gamma")
    }
    assert {name.split(".")[0] for name, home in cut.items() if home == 1} == {"attention", "mlp"}
    assert cut["mlp.norm.weight"] == cut["mlp.scale"] == cut["attention.v.bias"] == 1


def test_without_blocks_a_module_goes_with_its_entries() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    found = homes(model, build(model, config(include=["0", "2"])))
    assert found == {
        **{"0.weight": 0, "0.bias": 0, "1.weight": None, "1.bias": None},
        **{"2.weight": 1, "2.bias": 1, "3.weight": None, "3.bias": None},
    }


def test_parameters_of_the_root_go_with_its_entries() -> None:
    root = nn.Linear(4, 4)
    plan = build(root, config(method="dsd", partitions=None, include=["weight"]))
    assert homes(root, plan) == {"weight": 0, "bias": 0}


@pytest.mark.parametrize("kind", ["T5", "Mixtral", "Swin", "ResNet"])
def test_homes_in_hugging_face_models(kind: str) -> None:
    """Every weight of a block goes where the block's entries go, everything else nowhere; entries go where they are."""
    cls, settings, templates, _, _ = MODELS[kind]
    model = hugging_face(kind, cls, settings)
    blocks = numbered(templates)
    plan = build(model, config(partitions=len(blocks)))
    assert plan.blocks == tuple(blocks)
    found = homes(model, plan)
    assert len(set(found.values())) == len(blocks) + 1
    for name, home in found.items():
        inside: list[int | None] = [k for k, block in enumerate(blocks) if name.startswith(f"{block}.")]
        assert [home] == (inside or [None]), name
    assert all(found[entry.name] == entry.partition for entry in plan.entries)


# -- the balanced cut ----------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.data())
def test_balanced_cut_is_the_best_of_all(sizes: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(sizes)))
    cut = balanced_cut(sizes, parts)
    assert cut == sorted(cut) and set(cut) == set(range(parts))

    def cost(edges: tuple[int, ...]) -> int:
        ends = (0, *edges, len(sizes))
        return sum(sum(sizes[a:b]) ** 2 for a, b in itertools.pairwise(ends))

    best = min(cost(edges) for edges in itertools.combinations(range(1, len(sizes)), parts - 1))
    totals = [sum(n for n, k in zip(sizes, cut, strict=True) if k == part) for part in range(parts)]
    assert sum(total**2 for total in totals) == best
    assert math.isclose(sum(totals), sum(sizes))


def test_the_include_of_a_refusal_works() -> None:
    """A VGG has no repeated blocks: the message says an `include` that takes all but the classifier."""
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    model.add_module("hidden", nn.Linear(8, 8))
    model.add_module("head", nn.Linear(8, 5))
    times = {"phase_steps": 1, "rounds": 1, "finetune_steps": 1}
    config = {"sparsity": 0.5, "partitions": 3, **times}
    with pytest.raises(ValueError, match="no entry found") as refused:
        build(model, GaPConfig.load(config))
    example = json.loads(str(refused.value).partition("for example ")[2].removesuffix("."))
    found = build(model, GaPConfig.load({**config, "include": example}))
    assert [entry.name for entry in found.entries] == ["features.0.weight", "features.2.weight", "hidden.weight"]


def test_a_large_stage_is_cut_into_its_members_and_one_that_cannot_be_is_told() -> None:
    """Stages of few and of many blocks in four partitions; and one wide matrix beside narrow ones."""

    class Stage(nn.Module):
        def __init__(self, width: int, blocks: int) -> None:
            super().__init__()
            self.down = nn.Linear(width // 2, width)
            two = (nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(blocks))
            self.blocks = nn.Sequential(*two)

    times = {"phase_steps": 1, "rounds": 1, "finetune_steps": 1}
    config = GaPConfig.load({"sparsity": 0.5, "partitions": 4, "include": ["down"], **times})
    stages = nn.ModuleDict({"stages": nn.ModuleList([Stage(8, 1), Stage(16, 1), Stage(16, 1), Stage(64, 9)])})
    found = build(stages, config)
    _, sizes = found.per_partition()
    assert max(sizes) < 2 * sum(sizes) / 4 and "over twice the mean" not in found.summary()
    uneven = nn.ModuleList([*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)), nn.Sequential(nn.Linear(64, 64))])
    found = build(nn.ModuleDict({"layers": uneven}), GaPConfig.load({"sparsity": 0.5, "partitions": 3, **times}))
    assert "over twice the mean: lower" in found.summary()
