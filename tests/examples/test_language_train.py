"""The language example end to end: a run in this process, resuming, a pretrained model with a teacher, mistakes."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import runtime
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "sharding")]
import language  # noqa: E402
import launch  # noqa: E402
from language import SCRIPT, STEPS, arguments  # noqa: E402

train = language.load(SCRIPT, "language_train")
evaluate = language.load(SCRIPT.with_name("evaluate.py"), "language_evaluate")

Run = Callable[..., Path]
STEPS_OF_ONE_SHOT = {"phase_steps": 1, "finetune_steps": 3}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    language.write_data(folder)
    language.write_gap(folder)
    return folder


@pytest.fixture
def run(alone: None, here: Path, tmp_path: Path) -> Run:
    """Train as plain `python train.py` does; return the folder."""

    def start(*more: str, out: Path = tmp_path / "out", status: int = 0, gap: str | None = None) -> Path:
        assert train.main(train.parse(arguments(here, out, gap or str(here / "gap.json"), *more))) == status
        return out

    return start


@pytest.fixture
def plain(here: Path, run: Run) -> Path:
    return here / "plain" if (here / "plain").exists() else run("--checkpointing", out=here / "plain")


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_complete(plain: Path, here: Path, tmp_path: Path, alone: None) -> None:
    found = results(plain)
    assert found["applied_steps"] == STEPS and found["dense"] is False and len(found["entries"]) == 16
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"])) and found["steps_per_epoch"] == 5
    model, tokenizer = (kind.from_pretrained(plain / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for name, entry in found["entries"].items():
        assert int(model.get_parameter(name).count_nonzero()) == entry["keep"] == round(0.2 * entry["numel"])
    texts = [json.loads(line)["text"] for line in (here / "test.jsonl").read_text().splitlines()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert found["tokens"] == sum(len(one) + 1 for one in ids)  # every token, and the end of each document
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / sum(map(len, texts)))
    assert [row["step"] for row in rows(plain, "validation")] == [5, 7]
    card = (plain / "model" / "README.md").read_text()
    assert f"| perplexity | {found['perplexity']:.2f}"[:20] in card

    scores = tmp_path / "scores.json"
    argv = ["--model-dir", str(plain / "model"), "--dataset", str(here), "--threads", "1", "--json", str(scores)]
    assert evaluate.main(evaluate.parse(argv)) == 0
    again = json.loads(scores.read_text())
    assert again["context"] == 32 and again["tokens"] == found["tokens"]
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_checkpointing_changes_nothing_and_clipping_does(plain: Path, run: Run, tmp_path: Path) -> None:
    assert same(run("--gradient-clipping", "1e6"), plain)
    assert not same(run("--gradient-clipping", "1e-3", out=tmp_path / "clipped"), plain)


def test_resuming_is_exact(plain: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Monitor, "step", language.stop_at(4, signal.SIGTERM))
        out = run("--checkpointing", status=128 + signal.SIGTERM)
    run("--checkpointing", "--resume", out=out)
    assert same(out, plain) and results(out)["perplexity"] == results(plain)["perplexity"]
    with pytest.raises(ValueError, match="holds a finished run"):
        run("--resume", out=out)


def test_a_pretrained_model_with_a_teacher_and_a_pattern(plain: Path, run: Run, tmp_path: Path) -> None:
    """2:4 along the inputs of a Llama, from its dense checkpoint, with logits and hidden states of that as targets."""
    small = ("--preset", "llama_tiny", "--accumulation", "2", "--hidden-distillation", "0.1")
    dense = run(*small, "--dense", out=tmp_path / "dense")
    assert results(dense)["dense"] is True and results(dense)["model_sparsity"] == 0
    gap = tmp_path / "gap.json"
    gap.write_text(json.dumps({"method": "one_shot", "pattern": "2:4", "sparsity": 0.5, **STEPS_OF_ONE_SHOT}))
    taught = ("--model-name", str(dense / "model"), "--teacher", str(dense / "model"), "--across-documents")
    out = run(*small, *taught, "--distillation", "0.9", gap=str(gap))
    found = weights(out)
    for name in results(out)["entries"]:
        assert int((found[name].unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2, name
    assert "lm_head.weight" not in found or torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"has another vocabulary than the student. Set --teacher"):
        run("--vocab-size", "280", "--teacher", str(plain / "model"), out=tmp_path / "other")


def test_mistakes(plain: Path, run: Run, here: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"preset='gpt3': must be one of gpt2_10m.*Set --preset"):
        run("--preset", "gpt3")
    with pytest.raises(ValueError, match=r"context=64: the model has 32 positions. Set --context"):
        run("--model-name", str(plain / "model"), "--context", "64", "--overwrite")
    with pytest.raises(ValueError, match=r"model '.*absent': must be a folder or hub name|has no tokenizer"):
        run("--model-name", str(here / "absent"), "--overwrite")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    argv = ["--model-dir", str(plain / "model"), "--tasks", "hellaswag"]
    with pytest.raises(ValueError, match=r"--tasks: needs lm-eval, and lm_eval is not installed. Run pip install"):
        evaluate.main(evaluate.parse(argv))


@pytest.mark.full
def test_tasks_of_lm_eval(plain: Path, here: Path, tmp_path: Path, alone: None) -> None:
    """Of a folder, so that nothing is downloaded: a word that documents have, or one that none has."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[clients]'")
    texts = [json.loads(line)["text"] for line in (here / "train.jsonl").read_text().splitlines()][:8]
    docs = [{"text": text, "choices": [" sails", " qqqq"], "answer": 0} for text in texts]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"data_files": {"test": str(tmp_path / "docs.jsonl")}}
    task = {"task": "endings", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    task |= {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    task |= {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    (tmp_path / "endings.yaml").write_text(json.dumps(task))  # JSON is YAML
    argv = ["--model-dir", str(plain / "model"), "--tasks", "endings", "--task-folder", str(tmp_path), "--threads", "1"]
    assert evaluate.main(evaluate.parse([*argv, "--json", str(tmp_path / "scores.json")])) == 0
    assert 0 <= json.loads((tmp_path / "scores.json").read_text())["endings"]["acc,none"] <= 1
    argv[3] = "absent"
    with pytest.raises(ValueError, match="--tasks absent: lm-eval has no such task"):
        evaluate.main(evaluate.parse(argv))


@pytest.mark.full
def test_two_ranks(plain: Path, here: Path, tmp_path: Path) -> None:
    """FSDP2 and ZeRO-2 end near the run of one process, and a perplexity is exact over ranks."""
    launch.run_workers(str(Path(__file__).with_name("worker_language.py")), 2, tmp_path, str(here), timeout=900)
    alone = weights(plain)
    for backend in ("fsdp2", "zero2"):
        found, figures = weights(tmp_path / backend), results(tmp_path / backend)
        assert figures["tokens"] == results(plain)["tokens"] and figures["ranks"] == 2
        assert figures["perplexity"] == pytest.approx(results(plain)["perplexity"], rel=1e-3)
        for name in figures["entries"]:
            kept, wanted = found[name] != 0, alone[name] != 0
            assert kept.sum() == wanted.sum() and (kept != wanted).float().mean() < 2e-3, name
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["tokens"] == results(plain)["tokens"]
    assert scores["loss"] == pytest.approx(results(plain)["loss"], rel=1e-6)
