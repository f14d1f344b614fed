"""`gap-ds export`: what it writes of a checkpoint equals what the engine exported at that step; and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")

from gap_ds import GaPEngine, compact, export

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
    assert wanted.keys() - ours.keys() <= {"training_flops"}
    assert all(ours[key] == wanted[key] for key in ours if key != "model_sparsity")
    assert command_line("export", str(saved), "compact")[0] == 0
    assert same(compact.load_compact("compact"), weights("model"))
    assert command_line("inspect", "compact")[0] == command_line("inspect", "dense")[0] == 0
    assert command_line("export", "checkpoints", "bf16", "--format", "dense", "--dtype", "bfloat16")[0] == 0
    assert same(weights("bf16"), {n: w.bfloat16() for n, w in weights("model").items()})


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
    (saved / "state" / "__0_0.distcp").write_bytes(b"")
    assert "is damaged" in error(str(saved), "out")
    (portable / "gap" / "masks.safetensors").unlink()
    assert "masks.safetensors" in error(str(portable), "out")


def test_inspect_of_a_compact_folder_counts_its_weights(command_line: Run) -> None:
    trained("cyclic").export("model")
    compact.compact("model", "compact")
    dense, packed = (json.loads(command_line("inspect", folder, "--json")[1]) for folder in ("model", "compact"))
    assert packed["problems"] == [] and any("compact form" in note for note in packed["notes"])
    same_in_both = ("model", "entries", "partitions", "dtypes", "tensors", "bytes", "signature")
    assert all(packed[key] == dense[key] for key in same_in_both)
    info = json.loads(Path("compact/gap.json").read_text())
    info["entries"]["0.fc.weight"]["nonzero"] += 1
    Path("compact/gap.json").write_text(json.dumps(info))
    code, out, _ = command_line("inspect", "compact")
    assert code == 1 and "0.fc.weight" in out
    data = bytearray(Path("compact", compact.FILE).read_bytes())
    data[-1] ^= 1
    Path("compact", compact.FILE).write_bytes(data)
    assert command_line("inspect", "compact")[0] == 2


def test_fairscale_files_are_refused_with_the_way_out(command_line: Run, tmp_path: Path) -> None:
    from gap_ds.backends import files

    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rank_0_of_2.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"engine\.export.*portable=True"):
        files.weights(tmp_path)
    (tmp_path / "state" / "rank_0_of_2.pt").unlink()
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ZeRO-1, -2 and -3 alone.*portable=True"):
        files.weights(tmp_path)


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
    packed = compact.load_compact("compact")
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
    export.add_scores(folder, {"bleu": 34.567}, dataset="test | of nothing\n", how="nrefs:1|case:mixed")
    export.add_scores(folder, {"bleu": 34.567}, dataset="test | of nothing\n", how="nrefs:1|case:mixed")
    text = (folder / "README.md").read_text()
    assert text.count("34.57") == 1 and "| bleu | 34.57 | test \\| of nothing | `nrefs:1\\|case:mixed` |" in text
    assert hub.ModelCard(text).data.library_name == "transformers"
    assert json.loads((folder / "gap.json").read_text())["scores"][0]["value"] == 34.567


def test_the_snippet_of_the_card_runs(translator: GaPEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the tokenizer, which this model does not have."""
    compact.compact("model", "compact")
    Path("compact/model.safetensors").write_bytes(Path("model/model.safetensors").read_bytes())
    snippet = Path("compact/README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = [line for line in snippet.splitlines() if "AutoTokenizer.from_pretrained" not in line]
    monkeypatch.chdir("compact")
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert names["model"].generate(torch.tensor([[5, 6, 2]]), max_new_tokens=3).shape[0] == 1
