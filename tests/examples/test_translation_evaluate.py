"""Translating and scoring: the published scores of real systems, and a small model that knows four sentences."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import model as models
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ROOT.parent / "shared" / "data" / "wmt_systems_en_de"
SCRIPT = ROOT / "examples" / "translation" / "evaluate.py"

PAIRS = {
    "the dog sleeps": "der Hund schläft",
    "the small dog sleeps in the old house": "der kleine Hund schläft in dem alten Haus",
    "a cat sees the dog": "eine Katze sieht den Hund",
    "why does the cat not sleep in the garden today ?": "warum schläft die Katze heute nicht in dem Garten ?",
}


pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------------- published scores


def published() -> list[dict[str, Any]]:
    path = SYSTEMS / "published_scores.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.fixture(scope="module")
def systems() -> dict[str, dict[str, list[str]]]:
    import pyarrow.parquet as pq

    names = {row["testset"] for row in published()}
    return {name: pq.read_table(SYSTEMS / name / "systems.parquet").to_pydict() for name in names}


GROUPS = sorted({(row["testset"], tuple(row["refs"])) for row in published()})


@pytest.mark.skipif(not GROUPS, reason=f"{SYSTEMS} is absent: no published scores to compare with")
@pytest.mark.parametrize(
    ("testset", "refs"),
    [pytest.param(*group, marks=[pytest.mark.full] * (i > 0)) for i, group in enumerate(GROUPS or [("none", ())])],
)
def test_published_scores(testset: str, refs: tuple[str, ...], systems) -> None:
    """Every row of a test set and its references: to the last digit that was published, or to 1e-9."""
    rows = [row for row in published() if (row["testset"], tuple(row["refs"])) == (testset, refs)]
    data = systems[testset]
    scorer = evaluate.Scorer([data[ref] for ref in refs], metrics=sorted({row["metric"] for row in rows}))
    compared = 0
    for system in sorted({row["system"] for row in rows}):
        scores = scorer(data[f"hyp.{system}"]).to_dict()
        for row in (row for row in rows if row["system"] == system):
            value = scores[row["metric"]]
            decimals = row["decimals"]
            assert row["score"] == (pytest.approx(value, abs=1e-9) if decimals is None else round(value, decimals)), row
            compared += 1
    assert compared == len(rows) > 0


@pytest.mark.skipif(not GROUPS, reason=f"{SYSTEMS} is absent: no published scores to compare with")
def test_published_score_by_the_command(tmp_path: Path, systems) -> None:
    data = systems["newstest2021"]
    columns = {"hypotheses": "hyp.Facebook-AI", "a": "ref.A", "c": "ref.C", "d": "ref.D"}
    for name, column in columns.items():
        (tmp_path / name).write_text("\n".join(data[column]) + "\n", encoding="utf-8")
    command = [
        sys.executable,
        str(SCRIPT),
        "--hypotheses",
        "hypotheses",
        "--references",
        "a",
        "c",
        "d",
        "--json",
        "s.json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())
    rows = [r for r in published() if r["system"] == "Facebook-AI" and r["refs"] == ["ref.A", "ref.C", "ref.D"]]
    assert len(rows) == 2
    for row in rows:
        assert scores[row["metric"]] == pytest.approx(row["score"], abs=1e-9)
    assert (
        "nrefs:3|case:mixed" in scores["signatures"]["bleu"]
        and "nrefs:3|case:lc" in scores["signatures"]["bleu_uncased"]
    )
    assert f"{scores['bleu']:.2f}  BLEU|nrefs:3" in done.stdout


# -------------------------------------------------------------------------------------------------------- scoring


def test_score_of_equal_and_of_differently_cased_texts() -> None:
    texts = ["Der kleine Hund schläft heute.", "Eine Katze sieht den alten Hund."]
    perfect = evaluate.score(texts, texts)
    assert (perfect.bleu, perfect.bleu_uncased, perfect.chrf) == pytest.approx((100, 100, 100))
    lower = evaluate.score([text.lower() for text in texts], texts)
    assert lower.bleu_uncased == pytest.approx(100) and lower.bleu is not None and lower.bleu < 70
    assert lower.signatures.keys() == {"bleu", "bleu_uncased", "chrf"}
    assert lower.signatures["chrf"].startswith("chrF2|nrefs:1|case:mixed")
    assert lower.to_dict()["sentences"] == 2
    assert len(str(lower).splitlines()) == 3


def test_one_set_of_references_may_be_given_as_a_list_of_texts() -> None:
    hypotheses, references = ["ein Hund schläft hier"], ["ein Hund schläft dort"]
    assert evaluate.score(hypotheses, references) == evaluate.score(hypotheses, [references])


def test_a_sentence_may_lack_a_reference() -> None:
    hypotheses = ["der kleine Hund schläft heute", "eine Katze sieht den Hund"]
    second = [None, "eine Katze sieht den Hund"]
    scores = evaluate.score(hypotheses, [["der kleine Hund schläft heute", "ein Kater sah einen Hund"], second])
    assert scores.bleu == pytest.approx(100) and "nrefs:var" in scores.signatures["bleu"]


def test_only_the_metrics_asked_for() -> None:
    scores = evaluate.score(["a b c d"], ["a b c d"], metrics=["chrf"])
    assert scores.bleu is None and "bleu" not in scores.to_dict() and list(scores.signatures) == ["chrf"]
    with pytest.raises(ValueError, match=r"ter.*must be of bleu, bleu_uncased, chrf.*--metrics"):
        evaluate.score(["a"], ["a"], metrics=["ter"])


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], ["a", "b"]), (["a"], [["a"], ["a", "b"]]), ([], [])])
def test_unequal_or_empty_texts_are_refused(hypotheses: list[str], references: list) -> None:
    with pytest.raises(ValueError, match=r"lines: must be.*Set --"):
        evaluate.score(hypotheses, references)


def test_exact_zeros_are_counted() -> None:
    model = models.build_model(models.build_config("tiny", vocab_size=50))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1e-30)  # small is not zero
        model.model.encoder.layers[0].fc1.weight[:3] = 0.0
        model.model.decoder.layers[1].encoder_attn.q_proj.weight[0, :5] = -0.0
        model.model.shared.weight[:2] = 0.0
        model.model.encoder.layers[0].fc1.bias[:7] = 0.0
    counts = evaluate.count_zeros(model)
    entries = 3 * 128 + 5
    assert counts["entries"] == {"zeros": entries, "numel": 917_504, "sparsity": entries / 917_504}
    assert counts["model"]["zeros"] == entries + 2 * 128 + 7
    assert counts["model"]["numel"] == sum(weight.numel() for weight in model.parameters())


# ---------------------------------------------------------------------------------------------------- translation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that was fitted to PAIRS until it knows them by heart."""
    backend = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    texts = [*PAIRS, *PAIRS.values()]
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", models.EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )

    torch.manual_seed(0)
    config = models.build_config("tiny", vocab_size=len(tokenizer), dropout=0.0, max_positions=64)
    model = models.build_model(config)
    sources = tokenizer(list(PAIRS), padding=True, return_tensors="pt")
    labels = tokenizer(list(PAIRS.values()), padding=True, return_tensors="pt").input_ids
    labels[labels == models.PAD] = models.IGNORE
    count = (labels != models.IGNORE).sum()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        logits = model(sources.input_ids, attention_mask=sources.attention_mask, labels=labels).logits
        value = models.loss(logits, labels, smoothing=0.0, denominator=count)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert value < 0.05
    path = tmp_path_factory.mktemp("exported")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fitted(folder: Path) -> tuple[PreTrainedModel, Any]:
    return models.load_pretrained(str(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("batch_tokens", [1, 25, 4096])
def test_translations_learnt_by_heart(beams: int, batch_tokens: int, fitted) -> None:
    seen: list[tuple[int, int]] = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    sources = list(PAIRS) * 2
    output = evaluate.translate(*fitted, sources, beams=beams, batch_tokens=batch_tokens, progress=report)
    assert output == list(PAIRS.values()) * 2
    assert seen[-1] == (8, 8) and seen == sorted(seen)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_translations_do_not_depend_on_the_world_size(beams: int, world_size: int, fitted) -> None:
    # Sentences the model does not know, so that its translations hang on small differences.
    words = [word for source in PAIRS for word in source.split()]
    sources = [" ".join(words[2 * i : 2 * i + 1 + (7 * i) % 9]) for i in range(12)]
    whole = evaluate.translate(*fitted, sources, beams=beams, batch_tokens=30)
    shares = [
        evaluate.translate_share(*fitted, sources, beams=beams, batch_tokens=30, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sum(map(len, shares)) == len(sources)
    merged = {position: text for share in shares for position, text in share.items()}
    assert [merged[position] for position in range(len(sources))] == whole


def test_greedy_translations_do_not_depend_on_the_batch(fitted) -> None:
    sources = [text for source in PAIRS for text in (source, source.rsplit(" ", 1)[0])]
    alone = [evaluate.translate(*fitted, [source], beams=1)[0] for source in sources]
    assert evaluate.translate(*fitted, sources, beams=1, batch_tokens=10_000) == alone


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was_and_weights_can_be_trained(training: bool, fitted) -> None:
    model, tokenizer = fitted
    model.train(training)
    evaluate.translate(model, tokenizer, list(PAIRS), beams=2)
    assert model.training is training
    ids = torch.tensor([[5, 6, models.EOS]])
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    model.eval()


def test_long_and_empty_input(fitted) -> None:
    output = evaluate.translate(*fitted, ["the dog " * 200, ""], beams=2)  # 64 positions
    assert len(output) == 2
    assert evaluate.translate(*fitted, []) == []


@pytest.mark.parametrize("beams", [1, 4])
def test_every_sentence_ends_at_its_own_limit(beams: int, fitted) -> None:
    """Also a model that never ends a sentence translates the same text whatever else is in the batch."""
    endless, tokenizer = copy.deepcopy(fitted[0]), fitted[1]
    with torch.no_grad():
        # logits are h @ embedding.T: without its direction, </s> is never the likeliest
        endless.get_input_embeddings().weight[models.EOS] = 0.0
    sources = [*PAIRS, "the dog " * 12]
    together = evaluate.translate(endless, tokenizer, sources, beams=beams, batch_tokens=10_000)
    assert together == [evaluate.translate(endless, tokenizer, [source], beams=beams)[0] for source in sources]
    for source, text in zip(sources, together, strict=True):
        tokens = len(tokenizer(text).input_ids)
        assert tokens <= evaluate.max_new_tokens(len(tokenizer(source).input_ids), 64)


def test_batches_hold_every_sentence_once_and_keep_the_budget() -> None:
    lengths = [(37 * i) % 23 + 1 for i in range(101)] + [70]
    batches = evaluate.batches_by_tokens(lengths, 60)
    assert sorted(i for batch in batches for i in batch) == list(range(102))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60 for batch in batches)


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [{"translation": {"en": source, "de": target}} for source, target in PAIRS.items()]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def check_results(out: Path, printed: str, world_size: int) -> None:
    results = json.loads(out.read_text())
    assert results["bleu"] == pytest.approx(100) and results["sentences"] == 3
    assert results["world_size"] == world_size
    assert results["zeros"]["entries"] == {"zeros": 0, "numel": 917_504, "sparsity": 0.0}
    assert results["beams"] == 4 and results["sentences_per_second"] > 0 and results["dtype"] == "float32"
    assert printed.count("BLEU|nrefs:1|case:mixed") == 1 and "der kleine Hund schläft" in printed


def test_exported_folder(folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    argv = ["--model-dir", folder, "--dataset", dataset, "--out", out, "--threads", 1, "--device", "cpu", "--limit", 3]
    assert evaluate.main([str(part) for part in argv]) == 0
    check_results(out, capsys.readouterr().out, world_size=1)


@pytest.mark.full
def test_exported_folder_by_two_processes(folder: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = ["--model-dir", folder, "--dataset", dataset, "--out", out, "--threads", 1, "--device", "cpu", "--limit", 3]
    command = [sys.executable, *launcher, SCRIPT, *argv]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_results(out, done.stdout, world_size=2)


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert evaluate.main([str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, out = tmp_path / "texts", tmp_path / "deep" / "scores.json"
    texts.write_text("ein Hund schläft heute\n", encoding="utf-8")
    argv = ["--hypotheses", str(texts), "--references", str(texts), "--json", str(out), "--local_rank=0"]
    assert evaluate.main(argv) == 0
    first = out.read_text()
    assert json.loads(first)["bleu"] == pytest.approx(100)
    capsys.readouterr()
    assert "--overwrite" in fails(capsys, *argv)
    assert out.read_text() == first
    assert evaluate.main([*argv, "--overwrite", "--metrics", "chrf"]) == 0
    assert "bleu" not in json.loads(out.read_text())


def test_files_with_different_line_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "h").write_text("a\nb\u2028b\n", encoding="utf-8")  # two lines: U+2028 ends none
    (tmp_path / "r").write_text("a\nb\nc\n", encoding="utf-8")
    message = fails(capsys, "--hypotheses", tmp_path / "h", "--references", tmp_path / "h", tmp_path / "r")
    assert "r has 3 lines: must be 2" in message and "--references" in message
    (tmp_path / "r").write_bytes(b"a\n\xe4\n")
    assert "r: is not UTF-8 (byte 2)" in fails(capsys, "--hypotheses", tmp_path / "h", "--references", tmp_path / "r")
    assert "has no tokenizer" in fails(capsys, "--model-dir", tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "nothing to score: must be --model-dir with or without --dataset, or --hypotheses with --references"),
        (["--hypotheses", "h"], "--hypotheses: must be"),
        (["--dataset", "d"], "--dataset: must be"),
        (["--model-dir", "m", "--hypotheses", "h", "--references", "r"], "--references: must be"),
        (["--model-dir", "nowhere", "--dataset", "d"], "model_dir='nowhere'"),
        (["--model-dir", "nowhere", "--device", "foo"], "--device='foo': is not available here"),
        (["--hypotheses", "nowhere", "--references", "nowhere"], "nowhere"),
    ],
)
def test_settings_that_do_not_fit(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails(capsys, *argv)


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert evaluate.main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--beams", "many"])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "")
