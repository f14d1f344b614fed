"""Translating a file: the same text from a dense and a compact export, sparse and dense, in the order of the input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import model as models
import pytest
import torch
import translate
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from gap_ds.export import compact, compact_file
from gap_ds.inference import measure, timing, tuning

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "translation" / "translate.py"
LINES = ["the dog sleeps", "", "the small dog sleeps in the old house", "a cat sees\u2028the dog", "the dog"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that was not trained, 80 % of the weights of its matrices pruned: dense and compact."""
    backend = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(LINES, BpeTrainer(vocab_size=80, special_tokens=specials, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", models.EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(1)
    model = models.build_model(models.build_config("tiny", vocab_size=len(tokenizer), max_positions=64)).eval()
    names = [name for name, weight in model.named_parameters() if ".layers." in name and weight.dim() == 2]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand_like(weight) < 0.8, 0.0)
    root = tmp_path_factory.mktemp("models")
    model.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    info = {"signature": "gap|x", "entries": {name: {} for name in names}}
    (root / "dense" / "gap.json").write_text(json.dumps(info))
    assert compact(root / "dense", root / "compact")["packed"] == len(names) == 32
    return {"dense": root / "dense", "compact": root / "compact"}


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    measure.MEASURED.clear()
    monkeypatch.setattr(
        measure, "measure_layers", lambda layers, rows: {name: 1.0 if name == "csr" else 2.0 for name in layers}
    )
    monkeypatch.setattr(tuning, "_gain", lambda *arguments: (True, 1.5))
    monkeypatch.setattr(timing, "seconds", lambda *arguments: 100.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "input").write_text("".join(line + "\n" for line in LINES), encoding="utf-8")
    return tmp_path / "input"


@pytest.mark.parametrize("beams", ["1", "4"])
def test_every_way_gives_the_same_text(folders, source: Path, tmp_path: Path, beams: str, capsys) -> None:
    texts = []
    for kind in ("dense", "compact"):
        for form in ("--sparse", "--dense"):
            out = tmp_path / f"{kind}{form}"
            argv = [str(folders[kind]), "--input", str(source), "--output", str(out), "--beams", beams, form]
            assert translate.main([*argv, "--batch-tokens", "16", "--table"]) == 0
            texts.append(out.read_text(encoding="utf-8"))
            printed = capsys.readouterr()
            assert printed.out == "" and "4 sentences in" in printed.err and "sentences/s" in printed.err
            told = (
                "csr (measured alone, csr is 2.00 times as fast; whole runs confirm it; whole run: 1.50 times as fast)"
            )
            assert (told in printed.err) == ("choosing the layouts took" in printed.err) == (form == "--sparse")
    assert len(set(texts)) == 1
    model, tokenizer = translate.load(folders["dense"], torch.float32)
    wanted = evaluate.translate(model, tokenizer, [line for line in LINES if line], beams=int(beams), batch_tokens=16)
    assert texts[0].split("\n") == [wanted[0], "", *wanted[1:], ""]


def test_standard_input_and_output(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, data: bytes) -> None:
            self.buffer = io.BytesIO(data)
            self.flush = lambda: None

    out = Stream(b"")
    monkeypatch.setattr(sys, "stdin", Stream("\ufeffthe dog\n\na cat\u2028sees".encode()))
    assert translate.read_lines(None) == ["the dog", "", "a cat\u2028sees"]
    sys.stdin.buffer.seek(0)
    monkeypatch.setattr(sys, "stdout", out)
    assert translate.main([str(folders["compact"]), "--beams", "1", "--dtype", "bfloat16"]) == 0
    lines = out.buffer.getvalue().decode().split("\n")
    assert len(lines) == 4 and lines[1] == lines[3] == ""


@pytest.mark.parametrize("data", ["", "\n", "\n\n"])
def test_input_without_a_sentence(folders, tmp_path: Path, data: str, capsys) -> None:
    (tmp_path / "in").write_text(data)
    assert translate.main([str(folders["dense"]), "--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out"]) == 0
    assert (tmp_path / "out").read_text() == data and "0 sentences" in capsys.readouterr().err


def test_what_did_not_gain_is_told_as_it_is(folders, source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "_gain", lambda *arguments: (False, 0.98))
    argv = [str(folders["dense"]), "--input", str(source), "--output", str(tmp_path / "out"), "--table"]
    assert translate.main(argv) == 0
    told = capsys.readouterr().err
    assert "dense (measured alone, csr is 2.00 times as fast; whole runs did not gain; whole run: 0.98 times" in told
    assert ": csr (" not in told


def test_a_translation_is_one_line(folders, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "translate", lambda *arguments, **options: ["a\nb", "c\r\n\nd\u2028e", "\n", "f"])
    argv = [str(folders["dense"]), "--input", str(source), "--output", str(tmp_path / "out"), "--dense"]
    assert translate.main(argv) == 0
    assert (tmp_path / "out").read_text(encoding="utf-8").split("\n") == ["a b", "", "c d\u2028e", "", "f", ""]


def test_the_output_is_written_whole_or_not_at_all(folders, source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "out").write_text("before")

    def fails(path: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fails)
    argv = [str(folders["dense"]), "--input", str(source), "--output", str(tmp_path / "out"), "--dense"]
    assert translate.main(argv) == 2 and "no space left" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "before" and {p.name for p in tmp_path.iterdir()} == {"input", "out"}


def copied(source: Path, target: Path, leave_out: str = "") -> Path:
    target.mkdir()
    for path in source.iterdir():
        if not (leave_out and path.name.startswith(leave_out)):
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_mistakes_are_named_in_one_sentence(folders, tmp_path: Path, capsys) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    (tmp_path / "in").write_bytes(b"the dog\n")
    damaged = copied(folders["compact"], tmp_path / "damaged")
    (damaged / compact_file.FILE).write_bytes((damaged / compact_file.FILE).read_bytes()[:-1])
    cut = copied(folders["dense"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    mute = copied(folders["dense"], tmp_path / "mute", leave_out="tokenizer")
    dense, text = folders["dense"], ["--input", tmp_path / "in"]
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "none"], "must be a folder"),
        ([tmp_path], "must be a folder or hub name"),
        ([damaged, *text], "follow the header"),
        ([cut, *text], "the weights are damaged"),
        ([mute, *text], "tokenizer"),
        ([dense, "--beams", 0], "--beams=0: must be at least 1"),
        ([dense, "--threads", 0], "--threads=0: must be at least 1"),
        ([dense, "--choose", 0], "--choose=0.0: must be above 0"),
        ([dense, "--device", "foo"], "--device='foo': is not available here"),
        ([dense, "--device", "meta"], "--device='meta'"),
        ([dense, "--output", tmp_path / "none" / "out"], "must be a file in a folder that exists"),
        ([dense, "--output", tmp_path], "must be a file in a folder that exists"),
        ([dense, "--input", tmp_path / "latin"], "is not UTF-8"),
        ([dense, "--input", tmp_path / "none"], "No such file"),
    ]
    if not torch.cuda.is_available():
        cases.append(([dense, "--device", "cuda"], "--device='cuda': is not available here"))
    for argv, message in cases:
        assert translate.main([str(arg) for arg in argv]) == 2, argv
        printed = capsys.readouterr().err
        assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1, printed


@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_code_of_a_model_is_not_run_whatever_the_text_says(folders, tmp_path: Path, kind: str) -> None:
    """transformers asks on stdin whether it may: the first line of the text would be the answer."""
    folder = copied(folders[kind], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForSeq2SeqLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    command = [sys.executable, str(SCRIPT), str(folder), "--threads", "1", "--beams", "1"]
    result = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "error: " in result.stderr and result.stdout == ""
    assert not (tmp_path / "ran").exists()


def test_the_script_from_a_shell(folders) -> None:
    command = [sys.executable, str(SCRIPT), str(folders["compact"]), "--threads", "1", "--beams", "1"]
    result = subprocess.run(command, input="the dog\na cat\n", capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.count("\n") == 2 and "2 sentences in" in result.stderr
