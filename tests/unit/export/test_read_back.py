"""The files of an export hold what gap.json records, whatever the model's own save_pretrained writes."""

from __future__ import annotations

import json
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gap_ds import GaPConfig, GaPEngine
from gap_ds.export import compact, expand, from_checkpoint, load_compact, weights
from gap_ds.export import folder as folders
from gap_ds.export.weights import Counted, write_weights
from gap_ds.export.writing import Stream
from gap_ds.sharding.comm import Comm

STEPS = {"phase_steps": 3, "rounds": 2, "finetune_steps": 2}
GAP = {"sparsity": 0.75, "partitions": 2, **STEPS}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).tanh()


class Net(nn.Module):
    """Tied by a parameter, by a buffer and by a whole module."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.first = self.layers[0]
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("again", self.scale)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Swallows(Net):
    def save_pretrained(self, folder: Path, state_dict: Any = None) -> None:
        torch.save(nn.Module.state_dict(self), folder / "pytorch_model.bin")
        (folder / "config.json").write_text('{"width": 8}')


class LikeDiffusers(Net):
    def save_pretrained(self, folder: Path, **_: Any) -> None:
        save_file({name: t.clone() for name, t in self.state_dict().items()}, folder / "diffusion.safetensors")
        (folder / "config.json").write_text('{"width": 8, "_class_name": "Net"}')


class Transposes(Net):
    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        weights = {name: (t.t() if t.dim() > 1 else t).clone().contiguous() for name, t in state_dict.items()}
        save_file(weights, folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text("{}")
        (folder / "config.json").write_text('{"width": 8}')


class OfParts(Net):
    def save_pretrained(self, folder: Path) -> None:
        save_file({f"x.{name}": t for name, t in self.layers.state_dict().items()}, folder / "other.safetensors")
        (folder / "config.json").write_text('{"width": 8}')


def of_the_hub() -> nn.Module:
    hub = pytest.importorskip("huggingface_hub")
    return type("OfTheHub", (Net, hub.PyTorchModelHubMixin), {})(8)  # type: ignore[no-any-return]


def train(module: nn.Module, steps: int, config: dict[str, Any] = GAP) -> GaPEngine:
    engine = GaPEngine(module, config, optimizer=torch.optim.Adam(module.parameters(), lr=0.01))
    train_on(engine, steps)
    return engine


def train_on(engine: GaPEngine, steps: int) -> None:
    for _ in range(steps):
        x = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(engine.applied_steps))
        engine.backward(nn.functional.cross_entropy(engine(x).flatten(0, 1), x.flatten()))
        engine.step()


def checked(folder: Path) -> dict[str, Tensor]:
    weights, info = load_file(folder / "model.safetensors"), json.loads((folder / "gap.json").read_text())
    for name, row in info["entries"].items():
        assert row["shape"] == list(weights[name].shape)
        assert row["nonzero"] == int(weights[name].count_nonzero()) <= row["keep"] == 16
    Net().load_state_dict(weights, strict=True)
    return weights


@pytest.mark.parametrize("kind", [Net, Swallows, LikeDiffusers, Transposes, OfParts, of_the_hub])
def test_whatever_the_model_saves_the_file_is_the_export(tmp_path: Path, kind: Any) -> None:
    module = kind()
    engine = train(module, 7)  # in a phase with a dense partition, which is pruned in the copy alone
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    out = engine.export(tmp_path / "out")
    weights = checked(out)
    assert weights.keys() == before.keys()
    files = {path.name for path in out.iterdir()} - {"README.md", "gap.json", "model.safetensors"}
    also = {Net: set(), LikeDiffusers: {"config.json", "diffusion.safetensors"}}
    assert files == also.get(kind, {"config.json"})
    if kind is LikeDiffusers:
        theirs = load_file(out / "diffusion.safetensors")
        assert all(torch.equal(theirs[name], weights[name]) for name in weights)
    if kind is not Net:
        assert json.loads((out / "config.json").read_text())["width"] == 8
        assert "transformers" not in (out / "README.md").read_text()
    if kind is of_the_hub:
        loaded = type(module).from_pretrained(out)
        assert torch.equal(loaded.layers[0].fc.weight, weights["layers.0.fc.weight"])
    # The module is as it was: its own state_dict, with the weights of the dense partition.
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    compact(out, tmp_path / "small")
    small = load_compact(tmp_path / "small")
    again = checked(expand(tmp_path / "small", tmp_path / "again"))
    assert all(torch.equal(small[n], weights[n]) and torch.equal(again[n], weights[n]) for n in weights)


def test_a_compiled_model_has_all_names(tmp_path: Path) -> None:
    engine = train(torch.compile(Net(), backend="eager"), 4)  # type: ignore[arg-type]
    checked(engine.export(tmp_path / "out"))


def test_transformers_models_that_drop_the_weights_or_are_tied_by_hand(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Drops(transformers.LlamaForCausalLM):  # type: ignore[name-defined, misc]
        def save_pretrained(self, folder: Path, state_dict: Any = None, **options: Any) -> None:
            super().save_pretrained(folder, state_dict=nn.Module.state_dict(self), **options)

    def build(kind: Any) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        return kind(config)

    for kind, by_hand in ((Drops, False), (transformers.LlamaForCausalLM, True)):
        module = build(kind)
        if by_hand:
            module.model.layers[1].input_layernorm.weight = module.model.layers[0].input_layernorm.weight
        engine = GaPEngine(module, GAP, optimizer=torch.optim.Adam(module.parameters(), lr=0.01))
        ids = torch.arange(9)[None]
        engine.backward(module(input_ids=ids, labels=ids).loss)
        engine.step()
        out = engine.export(tmp_path / kind.__name__)
        loaded, found = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        info = json.loads((out / "gap.json").read_text())
        state = loaded.state_dict()
        assert all(int(state[n].count_nonzero()) == row["keep"] for n, row in info["entries"].items())
        norms = [layer.input_layernorm.weight for layer in loaded.model.layers]
        assert torch.equal(*norms) or not by_hand


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    built: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **sizes))
    return built


def test_a_weight_is_let_go_before_the_next_one_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    assemble, write = Comm.assemble, weights.ModelFiles.write

    def assembling(self: Comm, piece: Tensor, *rest: Any) -> Tensor | None:
        assert all(ref() is None for ref in held)
        held.append(weakref.ref(piece))
        return assemble(self, piece, *rest)

    def writing(self: weights.ModelFiles, name: str, tensor: Tensor) -> None:
        held.append(weakref.ref(tensor))
        write(self, name, tensor)

    monkeypatch.setattr(Comm, "assemble", assembling)
    monkeypatch.setattr(weights.ModelFiles, "write", writing)
    train(Net(), 4).export(tmp_path / "out")
    assert len(held) == 2 * 9 + len({"scale", "again"}) + len({"head.weight", "first.fc.weight", "first.fc.bias"})


def test_a_large_model_has_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, listed and loaded as those of transformers; also from a checkpoint, and as the source of a compact one."""
    transformers = pytest.importorskip("transformers")
    module = llama()
    engine = GaPEngine(module, GAP, optimizer=torch.optim.Adam(module.parameters(), lr=0.01))
    one = load_file(engine.export(tmp_path / "one") / "model.safetensors")
    saved = engine.save_checkpoint(tmp_path / "checkpoints")
    monkeypatch.setattr(weights, "MOST_BYTES", 1000)
    out = engine.export(tmp_path / "out", overwrite=True)
    module.save_pretrained(tmp_path / "theirs", max_shard_size=1000)
    files = {folder: sorted(p.name for p in folder.glob("model*")) for folder in (out, tmp_path / "theirs")}
    assert files[out] == files[tmp_path / "theirs"] and len(files[out]) > 4
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in one.values())
    loaded, found = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert all(torch.equal(weight, one[name]) for name, weight in loaded.state_dict().items())
    compact(out, tmp_path / "small")
    from_checkpoint.export_checkpoint(saved, tmp_path / "again", progress=lambda *_: None)
    assert sorted(p.name for p in (tmp_path / "again").glob("model*")) == files[out]
    monkeypatch.undo()
    back = load_file(expand(tmp_path / "small", tmp_path / "back") / "model.safetensors")
    assert back.keys() == one.keys() and all(torch.equal(back[name], one[name]) for name in one)


# -- a difference is found before anything is shown --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update({"layers.0.fc.weight": torch.ones(8, 8)}), "fc.weight has 64 weights that are not zero"),
        (
            lambda w: w.update({"layers.0.fc.weight": torch.ones(4, 16)}),
            "fc.weight has the shape (4, 16) and not (8, 8)",
        ),
        (lambda w: w.pop("layers.3.fc.bias"), "layers.3.fc.bias is in no file"),
        (lambda w: w.update({"more": torch.ones(1)}), "more is no tensor of the model"),
    ],
)
def test_a_difference_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str) -> None:
    engine = train(Net(), 4)
    write = folders.write_stream

    def changed(aside: Path, *rest: Any) -> Any:
        counted = write(aside, *rest)
        weights = load_file(aside / "model.safetensors")
        change(weights)
        save_file(weights, aside / "model.safetensors")
        return counted

    monkeypatch.setattr(folders, "write_stream", changed)
    with pytest.raises(ValueError, match=r"out: was not written: read back, the files differ from gap\.json") as error:
        engine.export(tmp_path / "out")
    assert said in str(error.value) and not list(tmp_path.iterdir())


def test_an_export_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = train(Net(), 7).save_checkpoint(tmp_path / "checkpoints")
    from_checkpoint.export_checkpoint(saved, tmp_path / "out", progress=lambda *_: None)
    checked(tmp_path / "out")
    monkeypatch.setattr(
        from_checkpoint,
        "write_weights",
        lambda path, tensors, *_: (
            write_weights(path, {name: tensors[name] for name in tensors if name != "layers.1.fc.weight"})
            | {"layers.1.fc.weight": Counted((8, 8), 16)}
        ),
    )
    with pytest.raises(ValueError, match=r"again: was not written: .*: layers\.1\.fc\.weight is in no file"):
        from_checkpoint.export_checkpoint(saved, tmp_path / "again", progress=lambda *_: None)
    assert not list(tmp_path.glob("again*"))


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_a_conversion_is_held_against_gap_json(tmp_path: Path, form: str) -> None:
    source = train(Net(), 4).export(tmp_path / "model")
    if form == "dense":
        compact(source, tmp_path / "small")
        source = tmp_path / "small"
    info = json.loads((source / "gap.json").read_text())
    info["entries"]["layers.2.fc.weight"]["nonzero"] -= 1
    (source / "gap.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"layers\.2\.fc\.weight has 16 weights that are not zero, and not 15"):
        (compact if form == "compact" else expand)(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_weights_that_were_changed_are_not_converted(tmp_path: Path) -> None:
    """The new gap.json would have the digests of what was changed."""
    source = train(Net(), 4).export(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "layers.2.fc.bias": weights["layers.2.fc.bias"] + 1}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: was changed: gap\.json has another SHA-256 of it"):
        compact(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# -- how far the schedule was trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GAP, {**GAP, "prune_ramp": 0.7, "update_steps": 1}])
@pytest.mark.parametrize("steps", [0, 2, 3, 7, 13, 14, 17])
def test_figures_are_of_the_steps_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any], steps: int
) -> None:
    engine = train(Net(), steps, config)
    with caplog.at_level(logging.WARNING, "gap_ds"):
        info = json.loads((engine.export(tmp_path / "out") / "gap.json").read_text())
    budgets = engine.plan.per_partition()
    taken = [engine.schedule.density_at(step, *budgets) for step in range(max(1, steps))]
    assert info["mean_density"] == pytest.approx(sum(taken) / len(taken), abs=1e-12)
    assert info["planned_mean_density"] == engine.schedule.mean_density(*budgets)
    assert info["training_flops"] == engine.plan.training_flops(info["mean_density"])
    assert info["planned_training_flops"] == engine.plan.training_flops(info["planned_mean_density"])
    assert (info["finished"], info["total_steps"]) == (steps >= 14, 14)
    assert info["pruned_in_copy"] == sorted(engine.phase.dense) and info["phase"] == str(engine.phase)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("the schedule is not finished" in card) == ("the schedule is not finished" in caplog.text) == (steps < 14)


def test_a_schedule_that_was_ended_early(tmp_path: Path) -> None:
    engine = train(Net(), 4)
    engine.finish()
    train_on(engine, 2)
    saved = engine.save_checkpoint(tmp_path / "checkpoints")
    engine.export(tmp_path / "out")
    from_checkpoint.export_checkpoint(saved, tmp_path / "again", progress=lambda *_: None)
    budgets = engine.plan.per_partition()
    taken = [*(engine.schedule.density_at(step, *budgets) for step in range(4)), 0.25, 0.25]
    for folder in (tmp_path / "out", tmp_path / "again"):
        info = json.loads((folder / "gap.json").read_text())
        assert (info["finished"], info["ended_at"], info["pruned_in_copy"]) == (True, 4, [])
        assert info["mean_density"] == pytest.approx(sum(taken) / 6, abs=1e-12)
        card = (folder / "README.md").read_text()
        assert "Exported after 6 of 14 optimizer steps: the schedule was ended early, at step 4." in card


# -- byte order marks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    source = train(Net(), 4).export(tmp_path / "model")
    text = (source / "gap.json").read_text(encoding="utf-8")
    (source / "gap.json").write_text(text, encoding=encoding)
    compact(source, tmp_path / "small")
    (tmp_path / "config.json").write_text(json.dumps(GAP), encoding=encoding)
    if encoding == "utf-8-sig":
        assert GaPConfig.load(tmp_path / "config.json") == GaPConfig.load(GAP)
    else:
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            GaPConfig.load(tmp_path / "config.json")


# -- several ranks -----------------------------------------------------------------------------------------------------


def test_no_rank_waits_in_one_collective_until_all_weights_are_written(tmp_path: Path) -> None:
    """The process group would end a rank that does, after 10 minutes with NCCL."""
    model, overtaken, found = nn.Linear(2, 2), threading.Event(), list[bool]()
    layout = {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}

    def stop(counts: Any) -> Any:
        raise ValueError(f"after {sorted(counts)}")

    def run(rank: Any) -> None:
        def tensors() -> Any:
            for name, p in model.named_parameters():
                if rank.rank == 1 and name == "bias":
                    overtaken.set()
                if rank.rank == 0 and name == "weight":
                    found.append(overtaken.wait(0.3))
                yield name, p.detach() if rank.rank == 0 else None

        def gather() -> Stream:
            return Stream(layout, tensors())

        folders.save(tmp_path / "out", model, gather, stop, rank, tokenizer=None, dtype=torch.float32, overwrite=False)

    assert [str(error) for error in Ranks(2).run(run)] == ["after ['bias', 'weight']"] * 2
    assert found == [False] and not list(tmp_path.iterdir())
