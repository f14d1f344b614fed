"""`gap-ds export`: what it writes of a checkpoint equals what the engine exported at that step; and the model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")

from gap_ds import GaPEngine, export
from gap_ds.export import compact, compact_file, expand, load_compact
from gap_ds.export.card import write_card

from test_cli_inspect import CONFIGS, CYCLIC  # isort: skip

Run = Callable[..., tuple[int, str, str]]
KINDS = ("cyclic", "global", "ramp", "2of4", "block")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.out(self.fc(x).tanh())


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def train(module: nn.Module, config: dict[str, Any], loss: Callable[[int], torch.Tensor], steps: int) -> GaPEngine:
    engine = GaPEngine(module, config, optimizer=torch.optim.Adam(module.parameters(), lr=0.01))
    for step in range(steps):
        engine.backward(loss(step))
        engine.step()
    return engine


def trained(name: str, steps: int = 7) -> GaPEngine:
    module = toy()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    return train(module, CONFIGS[name], lambda step: module(x + step).square().mean(), steps)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# Step 4 and 7 are in the middle of a phase, with another partition dense; 14 is the end.
@pytest.mark.parametrize(("name", "steps"), [(name, 7) for name in KINDS] + [("cyclic", 4), ("cyclic", 14)])
def test_it_is_what_the_engine_would_have_exported(command_line: Run, name: str, steps: int) -> None:
    engine = trained(name, steps)
    engine.export("model")
    saved = engine.save_checkpoint("checkpoints")
    code, out, err = command_line("export", "checkpoints", "dense", "--format", "dense")
    assert (code, err) == (0, "") and str(saved.name) in out
    assert same(weights("dense"), weights("model"))
    ours, wanted = (json.loads(Path(folder, "gap.json").read_text()) for folder in ("dense", "model"))
    # Of files alone nobody knows which are buffers, and the rest of the products.
    assert wanted.keys() - ours.keys() <= {"training_flops", "planned_training_flops"}
    assert all(ours[key] == wanted[key] for key in ours.keys() - {"model_sparsity", "model_numel", "sha256"})
    Path("compact.work.partial/dense").mkdir(parents=True)  # left by a process that was killed
    assert command_line("export", str(saved), "compact")[0] == 0
    assert same(load_compact("compact"), weights("model")) and not list(Path().glob("*.partial"))
    assert command_line("inspect", "compact")[0] == command_line("inspect", "dense")[0] == 0
    code, _, err = command_line("export", "checkpoints", "bf16", "--format", "dense", "--dtype", "bfloat16")
    assert code == 2 and "without the model buffers are not known. Set --model, or leave --dtype." in err


def test_what_stands_in_the_way_is_said_in_one_sentence(command_line: Run, tmp_path: Path) -> None:
    engine = trained("cyclic")
    engine.export("model")
    saved = engine.save_checkpoint("plain")
    portable = engine.save_checkpoint("portable", portable=True)
    (tmp_path / "empty").mkdir()

    def error(*arguments: str) -> str:
        code, out, err = command_line("export", *arguments)
        assert code != 0 and out == "" and err.count("\n") == 1 and not Path("out").exists()
        assert not list(Path().glob("*.partial")) and not list(Path().glob("out*"))
        return err

    assert "Set --model" in error("portable", "out")  # of biases and buffers nobody knows the shape
    assert "folder with the config.json" in error("plain", "out", "--model", "empty")
    assert "--model and --dtype have no effect" in error("model", "out", "--dtype", "bfloat16")
    assert "there is no such file" in error("empty", "out")
    assert "is not empty" in command_line("export", "plain", "model")[2]
    assert "holds no exported model (gap.json)" in command_line("export", "model", "plain", "--overwrite")[2]
    assert error("model", "out", "--format", "dense").endswith(
        "model: is dense already. Copy it, or choose another --format.\n"
    )
    assert command_line("export", "model", "small")[0] == 0
    assert "small: is compact already." in command_line("export", "small", "smaller")[2]
    (saved / "state" / "__0_0.distcp").write_bytes(b"")
    assert "is damaged" in error(str(saved), "out")
    (portable / "gap" / "masks.safetensors").unlink()
    assert "masks.safetensors" in error(str(portable), "out")


def test_inspect_of_a_compact_folder_counts_its_weights(command_line: Run) -> None:
    trained("cyclic").export("model")
    compact("model", "compact")
    dense, packed = (json.loads(command_line("inspect", folder, "--json")[1]) for folder in ("model", "compact"))
    assert packed["problems"] == [] and any("compact form" in note for note in packed["notes"])
    same_in_both = ("model", "entries", "partitions", "dtypes", "tensors", "bytes", "signature")
    assert all(packed[key] == dense[key] for key in same_in_both)
    info = json.loads(Path("compact/gap.json").read_text())
    info["entries"]["0.fc.weight"]["nonzero"] += 1
    Path("compact/gap.json").write_text(json.dumps(info))
    code, out, _ = command_line("inspect", "compact")
    assert code == 1 and "0.fc.weight" in out
    info["entries"]["0.fc.weight"]["nonzero"] -= 1
    Path("compact/gap.json").write_text(
        json.dumps({**info, "signature": info["signature"].replace("seed:0", "seed:1")})
    )
    code, out, _ = command_line("inspect", "compact")
    assert code == 1 and "has another signature than gap.json: one of them is of another run" in " ".join(out.split())
    data = bytearray(Path("compact", compact_file.FILE).read_bytes())
    data[-1] ^= 1
    Path("compact", compact_file.FILE).write_bytes(data)
    assert command_line("inspect", "compact")[0] == 2


def test_inspect_holds_the_files_against_gap_json(command_line: Run) -> None:
    """A bias that was changed is in no count, but in the file's digest."""
    trained("cyclic").export("model")
    compact("model", "compact")
    expand("compact", "again")

    def problems(folder: str) -> list[str]:
        code, out, _ = command_line("inspect", folder, "--json")
        found: list[str] = json.loads(out)["problems"]
        assert code == bool(found)
        return found

    path = Path("model/gap.json")
    info = json.loads(path.read_text())
    for folder in ("model", "compact", "again"):
        digests = json.loads(Path(folder, "gap.json").read_text())["sha256"]
        assert list(digests) == ["compact.safetensors" if folder == "compact" else "model.safetensors"]
        assert problems(folder) == []
    for change, said in (
        ({"model_sparsity": info["model_sparsity"] + 1e-6}, '"model_sparsity" is'),
        ({"model_numel": info["model_numel"] + 1}, '"model_sparsity" is'),
        ({"model_sparsity": 0.76}, '"model_sparsity" is 0.76, which its counts do not give'),
    ):
        path.write_text(json.dumps({**info, **change}))
        assert said in " ".join(problems("model"))
    path.write_text(json.dumps(info))
    Path("model/compact.safetensors").write_bytes(Path("compact/compact.safetensors").read_bytes())
    notes = json.loads(command_line("inspect", "model", "--json")[1])["notes"]
    assert notes[1:] == ["model.safetensors: checked; compact.safetensors, which is there too, is not"]

    path.write_text(json.dumps(info))
    changed = weights("model")
    changed["0.fc.bias"] += 1
    save_file(changed, "model/model.safetensors")
    assert problems("model") == ["model.safetensors: was changed: gap.json has another SHA-256 of it"]


def test_fairscale_files_are_refused_with_the_way_out(command_line: Run, tmp_path: Path) -> None:
    from gap_ds.checkpoint import foreign

    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rank_0_of_2.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"engine\.export.*portable=True"):
        foreign.weights(tmp_path)
    (tmp_path / "state" / "rank_0_of_2.pt").unlink()
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ZeRO-1, -2 and -3 alone.*portable=True"):
        foreign.weights(tmp_path)


# ------------------------------------------------------------------------------------------------- Hugging Face models


@pytest.fixture
def translator(command_line: Run) -> GaPEngine:
    """A Hugging Face model with tied embeddings in the middle of a phase: exported, saved twice, and its config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.M2M100Config(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, dropout=0.0,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config)
    ids = torch.randint(4, 60, (3, 7))
    engine = train(model, CYCLIC, lambda step: model(input_ids=ids, labels=ids).loss, 7)
    engine.export("model")
    engine.save_checkpoint("plain")
    engine.save_checkpoint("portable", portable=True)
    return engine


@pytest.mark.parametrize("source", ["plain", "portable"])
def test_a_hugging_face_model(translator: GaPEngine, command_line: Run, source: str) -> None:
    import transformers

    Path("config").mkdir()
    translator.module.config.save_pretrained("config")
    Path("config/tokenizer_config.json").write_text("{}")
    arguments = ("--model", "config", "--format")
    assert command_line("export", source, "dense", *arguments, "dense")[0] == 0
    assert same(weights("dense"), weights("model"))
    assert json.loads(Path("dense/gap.json").read_text())["model_sparsity"] == pytest.approx(
        json.loads(Path("model/gap.json").read_text())["model_sparsity"], abs=0
    )
    assert Path("dense/tokenizer_config.json").is_file()
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained("dense")
    assert loaded.dtype == torch.float32
    assert command_line("export", source, "compact", *arguments, "compact")[0] == 0
    packed = load_compact("compact")
    wanted = transformers.AutoModelForSeq2SeqLM.from_pretrained("model").state_dict()
    assert same(loaded.state_dict(), wanted) and same(packed.state_dict(), wanted)


def test_the_card_of_a_hugging_face_model(translator: GaPEngine) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = Path("model")
    text = (folder / "README.md").read_text()
    card = hub.ModelCard(text)  # parses the front matter
    assert card.data.library_name == "transformers" and set(card.data.tags) == {
        "sparse",
        "pruning",
        "gap_ds",
        "m2m_100",
    }
    assert translator.signature in text and "75.00% of them are exactly zero" in text
    assert text.count("layers.N.fc1.weight | 2 |") == 2 and "M2M100ForConditionalGeneration.from_pretrained" in text
    export.add_scores(str(folder), {"bleu": 34.567}, dataset="test | of nothing\n", how="nrefs:1|case:mixed")
    with pytest.raises(ValueError, match="chrf=nan: must be a finite number"):
        export.add_scores(folder, {"bleu": 1.0, "chrf": math.nan}, dataset="test")
    export.add_scores(folder, {"bleu": 34.567}, dataset="test | of nothing\n", how="nrefs:1|case:mixed")
    text = (folder / "README.md").read_text()
    assert text.count("34.57") == 1 and "| bleu | 34.57 | test \\| of nothing | `nrefs:1\\|case:mixed` |" in text
    assert hub.ModelCard(text).data.library_name == "transformers"
    assert json.loads((folder / "gap.json").read_text())["scores"][0]["value"] == 34.567


CHATS = {"default": "{{ messages }}", "tools": "{{ tools }}"}  # the second is a file in a folder of the folder


def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "A", "sentence", "like", "those"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>")
    made.chat_template = CHATS
    return made


@pytest.mark.parametrize("folder", ["model", "compact", "again", "offline", "bare"])
def test_the_snippet_of_the_card_runs(
    translator: GaPEngine, command_line: Run, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """In every folder as it is written, by the engine and by the command, with a tokenizer and without."""
    translator.export("model", tokenizer=tokenizer(), overwrite=True)
    Path("model/README.md").write_text(Path("model/README.md").read_text() + "\n## Of my own\n\n    kept\n")
    translator.export("bare")
    assert command_line("export", "model", "compact")[0] == 0
    assert command_line("export", "compact", "again", "--format", "dense")[0] == 0
    assert command_line("export", "plain", "offline", "--model", "model")[0] == 0
    monkeypatch.chdir(folder)
    assert len(list(Path().glob("*.safetensors"))) == 1
    card = Path("README.md").read_text()
    assert card.count("## Loading") == card.count("```python") == 1
    assert card.endswith("## Of my own\n\n    kept\n") == (folder in ("model", "compact", "again"))
    snippet = card.split("```python\n")[1].split("```")[0]
    assert ("sparsify_for_inference(model, lambda model: model.generate(" in snippet) == (folder != "bare")
    assert ("load_compact" in snippet) == (folder in ("compact", "offline"))
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["model"].generate(torch.tensor([[5, 6, 2]]), max_new_tokens=3).shape[0] == 1
    if folder != "bare":
        assert names["tokenizer"].chat_template == CHATS


def test_a_card_without_a_hugging_face_model(command_line: Run) -> None:
    trained("cyclic").export("model")
    compact("model", "compact")
    for folder, said in (("model", "safetensors.torch.load_file"), ("compact", "gap_ds.load_compact")):
        assert (
            Path(folder, "README.md")
            .read_text()
            .endswith(f"## Loading\n\n`{said}` gives the state dict of `{folder}.safetensors`.\n")
        )


def test_the_card_of_a_model_with_code_of_its_own(translator: GaPEngine) -> None:
    path = Path("model/config.json")
    mapped = {"AutoConfig": "own.Config", "AutoModelForSeq2SeqLM": "own.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": mapped}))
    write_card(Path("model"))
    assert (
        "AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)" in Path("model/README.md").read_text()
    )
    compact("model", "compact")
    card = Path("compact/README.md").read_text()
    assert "build the model with\nAutoModelForSeq2SeqLM, and load" in card and "```" not in card


def test_the_config_of_the_running_model_is_as_it_was(translator: GaPEngine) -> None:
    config = translator.module.config
    before = config.to_dict()
    translator.export("again", dtype=torch.bfloat16)
    assert config.to_dict() == before
    assert json.loads(Path("again/config.json").read_text())["dtype"] == "bfloat16"


def test_weights_that_are_saved_again_get_their_digest(translator: GaPEngine, command_line: Run) -> None:
    with torch.no_grad():
        translator.module.get_parameter("model.encoder.layers.0.fc1.bias").add_(1)
    translator.module.save_pretrained("model")
    assert "model.safetensors: was changed" in " ".join(command_line("inspect", "model")[1].split())
    export.save_pretrained(translator.module, "model")
    assert "was changed" not in command_line("inspect", "model")[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_buffers_keep_their_dtype(command_line: Run, dtype: str) -> None:
    """BatchNorm's variances and its count; the command and the engine write the same bits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    pixels, labels = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 0])
    engine = train(model, CYCLIC, lambda step: model(pixel_values=pixels + step, labels=labels).loss, 4)
    engine.export("model", dtype=getattr(torch, dtype))
    engine.save_checkpoint("checkpoints")
    assert (
        command_line("export", "checkpoints", "out", "--model", "model", "--format", "dense", "--dtype", dtype)[0] == 0
    )
    found = weights("out")
    assert same(found, weights("model"))
    kinds = {name.rpartition(".")[2]: weight.dtype for name, weight in found.items()}
    assert kinds == {
        **{"weight": getattr(torch, dtype), "bias": getattr(torch, dtype), "num_batches_tracked": torch.int64},
        **{"running_mean": torch.float32, "running_var": torch.float32},
    }


def test_what_float16_cannot_hold_is_refused_with_the_count(translator: GaPEngine, command_line: Run) -> None:
    bias = translator.module.get_parameter("model.encoder.layers.0.fc1.bias")
    with torch.no_grad():
        bias[:3] = 70000
    translator.save_checkpoint("large")
    said = "3 of its weights are beyond 65,504, the largest number of torch.float16. Export it as bfloat16 or float32."
    with pytest.raises(ValueError, match=f"^{re.escape(f'model.encoder.layers.0.fc1.bias: {said}')}$"):
        translator.export("out", dtype=torch.float16)
    code, _, err = command_line("export", "large", "out", "--model", "model", "--dtype", "float16")
    assert code == 2 and err.endswith(f"model.encoder.layers.0.fc1.bias: {said}\n")
    assert not list(Path().glob("out*"))
    translator.export("out", dtype=torch.bfloat16)
