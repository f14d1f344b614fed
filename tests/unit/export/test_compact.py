"""The compact form: what goes in comes out bit for bit, and what was damaged on its way is refused."""

from __future__ import annotations

import functools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gap_ds.export import compact, compact_file, expand, load_compact
from gap_ds.export.load import _can_be_filled
from gap_ds.masks import codec
from gap_ds.storage.atomic import replacing_folder
from gap_ds.storage.safetensors import DTYPES

SPECIAL = [float("nan"), float("inf"), float("-inf"), -0.0, 1.0, -1.5]


def raw(tensor: Tensor) -> bytes:
    return codec.words(tensor).numpy().tobytes()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) >= density, 0.0).to(dtype)


# -------------------------------------------------------------------------------------------------- round trip


@settings(deadline=None, max_examples=80)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 19), max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_of_any_bits(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], density: float, seed: int
) -> None:
    """Random bytes hold every NaN, denormal and negative zero that there is."""
    generator = torch.Generator().manual_seed(seed)
    kind = DTYPES[dtype]
    high = 2 if kind == torch.bool else 256
    size = (*shape, kind.itemsize)
    data = torch.randint(0, high, size, generator=generator, dtype=torch.uint8)
    data[torch.rand(tuple(shape), generator=generator) >= density] = 0
    weight = data.view(kind).view(shape) if data.numel() else torch.zeros(shape, dtype=kind)
    folder = tmp_path_factory.mktemp("compact")
    compact_file.write(folder, {"w": weight, "whole": weight}, {"w"}, "signature")
    back = dict(compact_file.read(folder))
    assert list(back) == ["w", "whole"] and all(same(back[name], weight) for name in back)
    found = compact_file.read_contents(folder)
    assert found.signature == "signature" and found.tensors[1].kept is None
    assert found.tensors[0].stored_bytes <= found.tensors[0].dense_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_special_values_are_kept_by_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.zeros(200, dtype=dtype)
    weight[[3, 5, 8, 64, 65, 199]] = torch.tensor(SPECIAL, dtype=dtype)
    compact_file.write(tmp_path, {"w": weight}, {"w"})
    assert compact_file.read_contents(tmp_path).tensors[0].kept == len(SPECIAL)
    assert same(dict(compact_file.read(tmp_path))["w"], weight)


def test_size_at_ninety_percent(tmp_path: Path) -> None:
    weight = torch.zeros(1000, 512, dtype=torch.bfloat16)
    weight.view(-1)[torch.randperm(weight.numel())[: weight.numel() // 10]] = 1.5
    compact_file.write(tmp_path, {"w": weight}, {"w"})
    assert (tmp_path / compact_file.FILE).stat().st_size <= 0.17 * 2 * weight.numel()


def test_what_would_not_get_smaller_is_stored_whole(tmp_path: Path) -> None:
    weights = {"full": torch.ones(64), "empty": torch.zeros(64), "none": torch.zeros(0, 7), "scalar": torch.zeros(())}
    compact_file.write(tmp_path, weights, set(weights))
    kept = {tensor.name: tensor.kept for tensor in compact_file.read_contents(tmp_path).tensors}
    assert kept == {"full": None, "empty": 0, "none": None, "scalar": 0}
    assert all(same(value, weights[name]) for name, value in compact_file.read(tmp_path))


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    weight = sparse((12, 8), 0.2).t()
    compact_file.write(tmp_path, {"w": weight}, {"w"})
    assert same(dict(compact_file.read(tmp_path))["w"], weight)


def test_any_reader_of_safetensors_can_read_it(tmp_path: Path) -> None:
    weight = sparse((40, 30), 0.1, torch.bfloat16)
    path = compact_file.write(tmp_path, {"w": weight, "b": torch.arange(5)}, {"w"})
    tensors = load_file(path)
    assert tensors.keys() == {"w.mask", "w.values", "b"}
    bits = ((tensors["w.mask"][:, None] >> torch.arange(8)) & 1).view(-1)[:1200].bool()
    assert torch.equal(tensors["w.values"], weight.view(-1)[bits])


def test_no_more_than_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    import gc
    import weakref

    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    class Lazy(dict[str, Any]):
        def __getitem__(self, name: str) -> Tensor:
            gc.collect()
            assert len(alive) <= 1
            tensor = sparse((50, 50), 0.1)
            alive.add(tensor)
            return tensor

    compact_file.write(tmp_path, Lazy.fromkeys(["a", "b", "c"]), {"a", "b"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.zeros(8), "w.mask": torch.zeros(8)}, "two tensors"),
        ({"__metadata__": torch.zeros(8)}, "two tensors"),
        ({"w": torch.zeros(8, dtype=torch.complex128)}, "safetensors has no torch.complex128"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compact_file.write(tmp_path, tensors, {"w"})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    compact_file.write(folder, {"w": sparse((9, 7), 0.3), "b": torch.arange(3)}, {"w"}, "gap|v:1")
    return folder


def refused(folder: Path, data: bytes) -> str:
    (folder / compact_file.FILE).write_bytes(data)
    with pytest.raises(ValueError) as error:
        list(compact_file.read(folder))
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(folder)) and len(message) < 700
    return message


def test_truncated_at_every_offset(small: Path, tmp_path: Path) -> None:
    data = (small / compact_file.FILE).read_bytes()
    for end in range(len(data)):
        refused(tmp_path, data[:end])
    refused(tmp_path, data + b"\0")


def test_every_flipped_bit(small: Path, tmp_path: Path) -> None:
    data = (small / compact_file.FILE).read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        refused(tmp_path, bytes(changed))


def rewritten(folder: Path, change: Any) -> bytes:
    """The file with another header, whose digest is right."""
    import hashlib

    data = (folder / compact_file.FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table["__metadata__"]["sha256"] = "0" * 64
    listed = json.loads(table["__metadata__"]["tensors"])
    change(table, listed)
    table["__metadata__"]["tensors"] = json.dumps(listed)
    text = json.dumps(table).encode()
    table["__metadata__"]["sha256"] = hashlib.sha256(text).hexdigest()
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_a_header_that_only_looks_right(small: Path, tmp_path: Path) -> None:
    def shape(value: Any) -> Any:
        return lambda table, listed: listed["w"].update(shape=value)

    def kept(value: Any) -> Any:
        return lambda table, listed: listed["w"].update(kept=value)

    def other(key: str, value: str) -> Any:
        return lambda table, listed: table["__metadata__"].update({key: value})

    assert "another SHA-256" not in refused(tmp_path, rewritten(small, shape([2**40, 2**40])))
    cases = {
        "contradicts itself": [shape([9, 8]), kept(5), lambda t, n: t.update(x=t["b"]), lambda t, n: t.pop("b")],
        "shape of w": [shape([2**47, 2**47]), shape([0, 2**47, 2**47]), kept(64)],
        "unknown field": [shape([-1]), shape(["9", 7]), shape("97"), kept(-1), kept(2.0), kept(2**60)],
        "has version": [other("version", "2")],
        "format": [other("format", "pt")],
    }
    for message, changes in cases.items():
        for change in changes:
            assert message in refused(tmp_path, rewritten(small, change))
    # Nothing but the weights' bytes is left to differ, and the header's own digest cannot be left out.
    (tmp_path / compact_file.FILE).write_bytes(rewritten(small, lambda t, n: None))
    assert len(list(compact_file.read(tmp_path))) == 2
    assert "lacks a digest" in refused(
        tmp_path,
        rewritten(
            small,
            lambda t, n: t.update(
                __metadata__={key: value for key, value in t["__metadata__"].items() if key != "signature"}
            ),
        ),
    )


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / compact_file.FILE).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no disk
    with pytest.raises(ValueError, match="longer than"):
        compact_file.read_contents(tmp_path)


def test_a_mask_that_keeps_another_number(tmp_path: Path) -> None:
    """Bits after the last weight, with a digest that is right."""
    path = compact_file.write(tmp_path, {"w": sparse((9, 7), 0.3)}, {"w"})
    data = bytearray(path.read_bytes())
    data[-1] |= 0x80
    found = compact_file.read_contents(tmp_path)
    import hashlib

    (length,) = struct.unpack("<Q", data[:8])
    area = bytes(data[8 + length :])
    digest = hashlib.sha256(area[-8:] + area[:-8]).hexdigest()
    changed = rewritten(tmp_path, lambda table, listed: listed["w"].update(sha256=digest))
    assert found.tensors[0].sha256 != digest
    assert "does not keep" in refused(tmp_path, changed[: -len(area)] + area)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        load_compact(tmp_path)


# -------------------------------------------------------------------------------------------------- whole folders


def export(folder: Path, weights: dict[str, Tensor], entries: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "gap.json").write_text(json.dumps({"signature": "gap|x", "entries": {name: {} for name in entries}}))


def test_any_other_model_becomes_a_state_dict(tmp_path: Path) -> None:
    weights = {"a": sparse((30, 20), 0.1), "b": torch.randn(20)}
    export(tmp_path / "dense", weights, ["a"])
    figures = compact(tmp_path / "dense", tmp_path / "out")
    assert (figures["tensors"], figures["packed"], figures["signature"]) == (2, 1, "gap|x")
    back = load_compact(tmp_path / "out")
    assert back.keys() == weights.keys() and all(same(back[name], weights[name]) for name in weights)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compact.safetensors", "gap.json"]
    expand(tmp_path / "out", tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["gap.json", "model.safetensors"]
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys() and all(same(again[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match="is not empty"):
        expand(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_compact(tmp_path / "out", dtype=torch.bfloat16)


def test_entries_under_other_names_are_not_taken_for_dense_weights(tmp_path: Path) -> None:
    export(tmp_path / "dense", {"query": torch.ones(4)}, ["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj and all other entries of gap\.json are in no file\. Export it again"):
        compact(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hugging_face_model_equals_its_dense_export(tmp_path: Path, dtype: torch.dtype, shards: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.M2M100Config(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config).to(dtype)
    entries = [f"{name}.weight" for name, m in model.named_modules() if "layers" in name and hasattr(m, "in_features")]
    with torch.no_grad():
        for name in entries:
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) < 0.9, 0.0)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path / "dense", max_shard_size=shards)
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists() == (shards == "20KB")
    (tmp_path / "dense" / "gap.json").write_text(
        json.dumps({"signature": "gap|x", "entries": {name: {} for name in entries}})
    )
    told: list[Any] = []
    figures = compact(tmp_path / "dense", tmp_path / "out", progress=lambda *args: told.append(args))
    assert figures["packed"] == len(entries) and told[-1][1] == told[-1][2] == figures["dense_bytes"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"compact.safetensors", "gap.json", "config.json", "generation_config.json"}

    dense = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense")
    loaded = load_compact(tmp_path / "out")
    assert type(loaded) is type(dense) and loaded.dtype == dense.dtype == dtype and not loaded.training
    assert loaded.generation_config.num_beams == 3
    wanted, found = dense.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys() and all(same(wanted[name], found[name]) for name in wanted)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert load_compact(tmp_path / "out", dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match=r"subfolder: has no effect here"):
        load_compact(tmp_path / "out", subfolder="other")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(expand(tmp_path / "out", tmp_path / "again"))
    assert all(same(wanted[name], value) for name, value in again.state_dict().items())


# ------------------------------------------------------------------------------------- loading Hugging Face models


@pytest.fixture
def translator(tmp_path: Path) -> Path:
    """A small translation model as it is exported, in `dense` and `out`, the latter compact."""
    transformers = pytest.importorskip("transformers")
    config = transformers.M2M100Config(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config)
    entry = "model.encoder.layers.0.fc1.weight"
    with torch.no_grad():
        model.get_parameter(entry)[1:] = 0
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "gap.json").write_text(json.dumps({"signature": "gap|x", "entries": {entry: {}}}))
    compact(tmp_path / "dense", tmp_path / "out")
    return tmp_path / "out"


def sentence(folder: Path, error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert type(error.value) is ValueError and "\n" not in message and message.startswith(str(folder))
    assert message.endswith(".") and len(message) < 700
    return message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder_layers": 2}, "do not fit config.json (first: model.encoder.layers.1."),
        ({"encoder_layers": 0}, "do not fit config.json (first: model.encoder.layers.0."),
        ({"d_model": 16}, "layer_norm.bias has the shape (32,), by the config (16,))"),
        ({"d_model": 2**24}, "layer_norm.bias has the shape (32,), by the config (16777216,))"),
        ({"d_model": "x"}, "config.json: transformers cannot use it ("),
        ({"d_model": 33}, "config.json: transformers cannot use it ("),
        ({"architectures": ["os"]}, "names the architecture 'os'"),
        ({"architectures": ["PreTrainedModel"]}, "config.json: transformers cannot use it ("),
        ({"model_type": "unheard"}, "config.json: transformers cannot use it ("),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_one_sentence(translator: Path, change: dict[str, Any], said: str) -> None:
    path = translator / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        load_compact(translator)
    assert said in sentence(translator, error)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_beams": ', "\xff"])
def test_a_damaged_config_is_one_sentence(translator: Path, name: str, text: str) -> None:
    (translator / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        load_compact(translator)
    assert f"{name}: transformers cannot use it (" in sentence(translator, error)


HOSTILE = "import pathlib, sys; pathlib.Path(__file__).with_name('run').touch()"
LOADED = """
import sys
from gap_ds import load_compact
try:
    load_compact(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_code_of_a_folder_is_not_run_whoever_says_yes(translator: Path) -> None:
    """Nor is anybody asked."""
    for module in ("configuration_own", "modeling_own"):
        (translator / f"{module}.py").write_text(HOSTILE)
    path = translator / "config.json"
    mapped = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": mapped}))
    command = [sys.executable, "-c", LOADED, str(translator)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(
        command, input="y\n" * 9, capture_output=True, text=True, timeout=200, check=True, env=environment
    )
    assert done.stdout.count("\n") == 1 and "code from its folder, which is never run" in done.stdout, done.stdout
    assert not list(translator.rglob("run"))


def test_other_names_and_tied_weights_are_left_to_transformers(translator: Path, tmp_path: Path) -> None:
    """Names without the prefix of the whole model, and a weight that is there under two names."""
    transformers = pytest.importorskip("transformers")
    wanted = transformers.AutoModelForSeq2SeqLM.from_pretrained(translator.parent / "dense").state_dict()
    weights = dict(compact_file.read(translator))
    tied = next(name for name in weights if name.endswith("shared.weight"))
    for changed in (
        {name.removeprefix("model."): weight for name, weight in weights.items()},
        {**weights, "model.encoder.embed_tokens.weight": weights[tied].clone()},
    ):
        compact_file.write(translator, changed, set())
        found = load_compact(translator).state_dict()
        assert found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)


def test_what_takes_the_values_as_they_are_stored() -> None:
    stored = [
        compact_file.CompactTensor("a", (2, 3), torch.float32, None),
        compact_file.CompactTensor("b", (2, 3), torch.float32, None),
    ]
    right, other = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)
    assert _can_be_filled({"a": right, "b": other, "c": other}, stored)
    for wrong in (right, torch.zeros(0), torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, dtype=torch.int8)):
        assert not _can_be_filled({"a": right, "b": wrong}, stored)
    assert not _can_be_filled({"a": right}, stored)


PEAK = """
import resource, sys, torch, transformers
from gap_ds import load_compact
torch.set_num_threads(1)
load_compact(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_compact(sys.argv[1], dtype=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float32, "bfloat16"), (torch.float32, "float32")])
def test_loading_takes_the_memory_of_the_model_and_one_weight(tmp_path: Path, dtype: torch.dtype, wanted: str) -> None:
    transformers = pytest.importorskip("transformers")
    made = functools.cache(lambda shape: sparse(shape, 0.1, dtype))
    for name, width in (("small", 8), ("large", 1024)):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=6, num_attention_heads=2,
            dtype=dtype,
        )  # fmt: skip
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / name)
        with torch.device("meta"):
            shapes = {key: weight.shape for key, weight in transformers.LlamaForCausalLM(config).state_dict().items()}

        class Weights(dict[str, Any]):
            def __getitem__(self, key: str) -> Tensor:
                return made(super().__getitem__(key))

        compact_file.write(tmp_path / name, Weights(shapes), set(shapes))
    size = sum(shape.numel() for shape in shapes.values()) * getattr(torch, wanted).itemsize
    assert size > 130e6
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small"), wanted]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, env=environment)
    assert int(done.stdout) * 1024 < 1.4 * size


# ----------------------------------------------------------------------------------------------------- conversion


def test_conversion_refuses_with_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    with pytest.raises(ValueError, match="no exported model"):
        compact(dense, out)
    export(dense, {"a": sparse((30, 20), 0.1)}, ["a"])
    for place in (dense, tmp_path):
        with pytest.raises(ValueError, match="own folder"):
            compact(dense, place, overwrite=True)
    out.mkdir()
    compact(dense, out)
    (out / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        compact(dense, out)
    compact(dense, out, overwrite=True)
    assert not (out / "mine").exists()
    data = (out / compact_file.FILE).read_bytes()
    (out / compact_file.FILE).write_bytes(data[:-1])
    for place in (tmp_path / "new", out):
        with pytest.raises(ValueError, match=r"follow the header|own folder"):
            expand(out, place, overwrite=True)

    data = (dense / "model.safetensors").read_bytes()
    for end in (0, 7, 8, 20, len(data) - 1):
        (dense / "model.safetensors").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors: the file is truncated or damaged [^\n]*$"):
            compact(dense, tmp_path / "new")
    (dense / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither"):
        compact(dense, tmp_path / "new")
    index = dense / "model.safetensors.index.json"
    for text, message in (
        ("{", "is damaged"),
        ('{"weight_map": {"a": 3}}', "is damaged"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not in its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not in its folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "no such file"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            compact(dense, tmp_path / "new")
    (dense / "x.safetensors").write_bytes(data)
    index.write_text('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}')
    with pytest.raises(ValueError, match="lacks b"):
        compact(dense, tmp_path / "new")
    (dense / "gap.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        compact(dense, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def test_both_ways_tell_how_far_they_are(tmp_path: Path) -> None:
    export(tmp_path / "dense", {"a": sparse((30, 20), 0.1), "b": torch.randn(20)}, ["a"])
    told: list[tuple[str, int, int]] = []
    compact(tmp_path / "dense", tmp_path / "out", progress=lambda *args: told.append(args))
    expand(tmp_path / "out", tmp_path / "again", progress=lambda *args: told.append(args))
    assert told == 2 * [("a", 2400, 2480), ("b", 2480, 2480)]


# ------------------------------------------------------------------------------------------- what may be overwritten


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export in `model` of the current folder, and a compact one, which holds a file of another's besides."""
    monkeypatch.chdir(tmp_path)
    export(tmp_path / "model", {"a": sparse((30, 20), 0.1)}, ["a"])
    compact("model", "out")
    Path("out/old").touch()
    return tmp_path


def files(folder: str | Path = ".") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("home", "home: holds no exported model (gap.json), so it is not overwritten. Choose another folder, or"),
        ("project", "project: holds no exported model (gap.json), so it is not overwritten."),
        ("file", "file: is a file, and no folder. Choose another folder."),
        ("file/below", "file: is a file, and no folder."),
        ("link", "link: is a symbolic link. Choose another folder"),
        ("nowhere", "nowhere: is a symbolic link."),
        ("..", ": is the current folder, or holds it."),
        ("model", "model: is the model's own folder, or holds it."),
    ],
)
def test_overwriting_replaces_exports_alone(
    exported: Path, monkeypatch: pytest.MonkeyPatch, out: str, said: str
) -> None:
    Path("home/.ssh").mkdir(parents=True)
    Path("project").mkdir()
    Path("project/gap.json").write_text('{"sparsity": 0.8, "partitions": 2}')  # a config, which may have that name
    Path("file").touch()
    Path("link").symlink_to("out")
    Path("nowhere").symlink_to("absent")
    Path("current/below").mkdir(parents=True)
    before = files()
    if out == "..":
        monkeypatch.chdir("current/below")
    with pytest.raises(ValueError) as error:
        compact(exported / "model", out, overwrite=True)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert files(exported) == before


def test_a_failed_overwrite_leaves_what_was_there(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(ValueError, match=r"^out: cannot be written \(\[Errno 28\] No space left on device\)\.$"):
            compact("model", "out", overwrite=True)
    assert files() == before
    compact("model", "out", overwrite=True)
    assert files() == [name for name in before if name != "out/old"]


def test_the_old_export_is_kept_where_another_folder_took_its_place(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def first(path: Path, target: Path) -> Path:
        if path.name == "new":
            Path("out/others").mkdir(parents=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", first)
    with pytest.raises(ValueError, match=r"^out: cannot be written \(\[Errno 39\] Directory not empty: "):
        compact("model", "out", overwrite=True)
    assert files("out.partial") == ["old", *(f"old/{name}" for name in ("compact.safetensors", "gap.json", "old"))]
    assert files("out") == ["others"]


@pytest.mark.parametrize("renamed", [False, True])
def test_what_a_killed_process_has_left_is_used_or_cleared(exported: Path, renamed: bool) -> None:
    """Killed while it wrote, or between the two renames: then the old export is in the folder aside."""
    before = files()
    Path("out.partial/new").mkdir(parents=True)
    Path("out.partial/new/model.safetensors").touch()
    if renamed:
        Path("out").rename("out.partial/old")
        with pytest.raises(RuntimeError), replacing_folder(Path("out")):
            raise RuntimeError("something else is wrong")
        assert files() == before
        Path("out.partial").mkdir()
        Path("out").rename("out.partial/old")
    compact("model", "out", overwrite=True)
    assert files() == [name for name in before if name != "out/old"]


def test_two_processes_do_not_write_one_folder(exported: Path) -> None:
    holder = (
        "import gap_ds.storage.atomic as a, pathlib\n"
        "with a.replacing_folder(pathlib.Path('out')): print(1, flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", holder], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(ValueError, match=r"^out\.partial: another process is writing there\."):
            compact("model", "out", overwrite=True)
        assert Path("out.partial/new").is_dir()
        other.kill()
    compact("model", "out", overwrite=True)
    assert not Path("out.partial").exists()
