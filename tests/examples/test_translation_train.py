"""The translation example end to end: whole runs under every launcher, interrupted ones, and every kind of bad input.

A corpus of four sentence pairs, learned by heart within thirty steps, keeps a run down to the imports around it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
import train
from common import runtime
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "examples" / "translation" / "train.py")
ZERO2 = str(ROOT / "configs" / "ds" / "zero2.json")
LIMIT = 240  # seconds for any process group; a run takes 10 to 20 on an idle machine

PAIRS = (
    ("a small dog runs in the park", "ein kleiner Hund rennt im Park"),
    ("two men are sitting on a bench", "zwei Männer sitzen auf einer Bank"),
    ("a woman reads a book at home", "eine Frau liest zu Hause ein Buch"),
    ("the children play with a red ball", "die Kinder spielen mit einem roten Ball"),
)
GAP = {"sparsity": 0.5, "partitions": 2, "phase_steps": 10, "rounds": 1, "finetune_steps": 10}
STEPS = 30  # of that schedule; 4 or 5 make an epoch of the corpus


def write_json(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def write_corpus(folder: Path, languages: tuple[str, str] = ("en", "de"), **rows: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in ({"train": 160, "validation": 8, "test": 8} | rows).items():
        lines = [{"translation": dict(zip(languages, PAIRS[i % len(PAIRS)], strict=True))} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus in `data` and the GaP config in `gap.json`."""
    folder = tmp_path_factory.mktemp("translation")
    write_corpus(folder / "data")
    write_json(folder / "gap.json", GAP)
    return folder


def arguments(here: Path, out: Path, *more: str, gap: str | None = None, dataset: str | None = None) -> list[str]:
    """The command line of a short run; of an option given twice the last one counts.

    One thread everywhere: sums over threads have another order, and runs in and beside this process are compared.
    """
    fixed = "--vocab-size 400 --batch-tokens 256 --warmup-steps 5 --lr 3e-3 --log-every 1 --beams 2 --samples 1"
    fixed += " --threads 1"
    paths = ["--gap-config", gap or str(here / "gap.json"), "--dataset", dataset or str(here / "data")]
    return [*fixed.split(), "--save-every", "4", *paths, "--output-dir", str(out), *more]


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- real processes ----------------------------------------------------------------------------------------------------


class Job:
    """A running command and all it starts: one process group that is ended when the `with` ends."""

    def __init__(self, *command: str, **environment: str) -> None:
        home = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        home |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if not torch.cuda.is_available():
            home["DS_ACCELERATOR"] = "cpu"
        self.process = subprocess.Popen(
            command,
            env={**inherited, **home},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        assert self.process.stdout is not None
        # Read all the while: a full pipe would stop the processes, and its end means that all of them have ended.
        self._reader = threading.Thread(target=self._lines.extend, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # torchrun puts its workers into sessions of their own: it ends them itself
        if self._reader.is_alive():
            self._reader.join(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        """The exit status, once every process of the job has ended."""
        self._reader.join(LIMIT)
        if self._reader.is_alive():
            os.killpg(self.process.pid, signal.SIGABRT)  # each process says where it is
            self._reader.join(10)
            raise AssertionError(f"still running after {LIMIT} s:\n{self.text[-8000:]}")
        return self.process.wait()

    @property
    def text(self) -> str:
        """All output so far, without the launchers' own lines."""
        return "".join(line for line in self._lines if "launch.py" not in line and "runner.py" not in line)

    def wait_for_step(self, out: Path, step: int) -> None:
        """Returns once `metrics.jsonl` has a line of the step."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            assert self.process.poll() is None, self.text[-4000:]
            if (out / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(out)):
                return
            time.sleep(0.02)
        raise AssertionError(f"no step {step}:\n{self.text[-4000:]}")

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in order."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
                if SCRIPT in (folder / "cmdline").read_text() and os.getsid(int(folder.name)) == self.process.pid:
                    found[int(variables["RANK"])] = int(folder.name)
            except (OSError, KeyError):
                continue
        return [found[rank] for rank in sorted(found)]


PORTS: list[str] = []


def free_port() -> str:
    """A free port below those that systems hand out by themselves: nobody takes it before rank 0 has started."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(12_000, 29_000)))
            PORTS.append(str(probe.getsockname()[1]))
            return PORTS[-1]


@pytest.fixture(scope="module", autouse=True)
def shared_memory() -> Iterator[None]:
    """DeepSpeed leaves 66 MiB of it for every rank and port, for good."""
    yield
    for port in PORTS:
        for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
            path.unlink(missing_ok=True)


def deepspeed(*script_arguments: str) -> Job:
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", free_port())
    return Job(sys.executable, *launcher, SCRIPT, "--deepspeed_config", ZERO2, *script_arguments)


def torchrun(*script_arguments: str) -> Job:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    return Job(sys.executable, *launcher, SCRIPT, *script_arguments)


@pytest.fixture(scope="module")
def zero2(here: Path) -> Path:
    """An undisturbed run under the deepspeed launcher."""
    with deepspeed(*arguments(here, here / "zero2")) as job:
        assert job.wait() == 0, job.text[-4000:]
    return here / "zero2"


@pytest.mark.full
def test_deepspeed_run_is_complete(zero2: Path) -> None:
    found = results(zero2)
    assert found["bleu"] > 50 and found["signatures"]["bleu"].startswith("BLEU|nrefs:1|case:mixed")
    assert found["signature"].startswith("gap|method:cyclic|k:2|T:10st|rounds:1|ft:10st|s:0.5|")
    assert found["ranks"] == 2 and found["applied_steps"] == STEPS and found["trained_from_step"] == 0
    assert found["train_seconds"] > 0 and found["tokens_per_second"] > 0 and found["dense"] is False

    model = AutoModelForSeq2SeqLM.from_pretrained(zero2 / "model")
    weights = dict(model.named_parameters())
    assert len(found["entries"]) == 32
    for name, entry in found["entries"].items():
        assert entry["keep"] == entry["nonzero"] == int(weights[name].count_nonzero()) == entry["numel"] // 2
    kept, numel = (sum(entry[key] for entry in found["entries"].values()) for key in ("keep", "numel"))
    assert (found["kept"], found["numel"]) == (kept, numel)
    assert found["entry_sparsity"] == 1 - kept / numel
    assert found["model_sparsity"] == (numel - kept) / sum(weight.numel() for weight in weights.values())
    assert found["density_at_end"] == kept / numel

    steps = rows(zero2)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["phase"] for row in steps] == [0] * 10 + [1] * 10 + [2] * 10
    assert len({row["density"] for row in steps[:10]}) == 1 and steps[-1]["density"] == 0.5
    assert rows(zero2, "validation")[-1]["step"] == STEPS


@pytest.mark.full
def test_exported_folder_scores_alike(zero2: Path, here: Path) -> None:
    scores = str(here / "scores.json")
    tokenizer = AutoTokenizer.from_pretrained(zero2 / "model")
    assert tokenizer.decode(tokenizer(PAIRS[0][1])["input_ids"], skip_special_tokens=True) == PAIRS[0][1]
    corpus = ["--model-dir", str(zero2 / "model"), "--dataset", str(here / "data"), "--split", "test"]
    assert not evaluate.main([*corpus, "--beams", "2", "--samples", "0", "--out", scores])
    found = json.loads(Path(scores).read_text(encoding="utf-8"))
    for key in ("bleu", "bleu_uncased", "chrf", "signatures"):
        assert found[key] == results(zero2)[key]


@pytest.fixture(scope="module")
def killed(here: Path, zero2: Path) -> Path:
    """A run that Ctrl-C stopped in mid-epoch, and that lost rank 1 to `kill -9` after it went on."""
    out = here / "killed"
    with deepspeed(*arguments(here, out)) as job:
        job.wait_for_step(out, 6)
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does it: to the launcher and to every rank
        assert job.wait() != 0
        assert job.text.count("and saved. Go on with the same command and --resume.") == 1
        assert "train.py" not in job.text.partition("Traceback")[2]  # the launcher's own is not ours to mend
    stopped = rows(out)[-1]["step"]
    # The newest checkpoint, and the one before it.
    saved = {path.name for path in (out / "checkpoints").glob("step_*")}
    assert 6 <= stopped < STEPS and f"step_{stopped}" in saved and len(saved) == 2

    with deepspeed(*arguments(here, out, "--resume")) as job:
        job.wait_for_step(out, stopped + 5)  # at least one checkpoint later
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.wait() not in (0, None)
        assert "because another rank has" in job.text and "Traceback" not in job.text
    assert not (out / "results.json").exists()
    return out


@pytest.mark.full
def test_resumed_run_equals_an_undisturbed_one(here: Path, zero2: Path, killed: Path) -> None:
    out = here / "resumed"
    shutil.copytree(killed, out)
    newest = int((out / "checkpoints" / "latest").read_text().removeprefix("step_"))
    with torchrun("--deepspeed_config", ZERO2, *arguments(here, out, "--resume")) as job:
        assert job.wait() == 0, job.text[-4000:]
    assert 6 < results(out)["trained_from_step"] == newest < STEPS
    assert same_weights(out, zero2)
    timing = {"seconds", "tokens_per_s"}
    for kind in ("train", "validation"):  # every step once, with the very same loss
        one, other = (
            [{k: v for k, v in row.items() if k not in timing} for row in rows(f, kind)] for f in (out, zero2)
        )
        assert one == other


@pytest.mark.full
def test_all_ranks_pass_over_what_one_rank_s_file_has_damaged(here: Path, killed: Path, zero2: Path) -> None:
    out = here / "damaged"
    shutil.copytree(killed, out)
    newest = (out / "checkpoints" / "latest").read_text()
    (damaged,) = (out / "checkpoints" / newest).glob("*zero_pp_rank_1_*")
    os.truncate(damaged, 1000)
    with torchrun("--deepspeed_config", ZERO2, *arguments(here, out, "--resume")) as job:
        assert job.wait() == 0, job.text[-4000:]
        assert (
            f"{damaged.name}: has 1000 bytes" in job.text and "this checkpoint is damaged and passed over" in job.text
        )
    assert results(out)["trained_from_step"] < int(newest.removeprefix("step_"))
    assert same_weights(out, zero2)


@pytest.mark.full
def test_error_of_all_ranks_is_said_once(here: Path) -> None:
    gap = write_json(here / "many.json", {**GAP, "partitions": 5})
    with deepspeed(*arguments(here, here / "many", gap=gap)) as job:
        assert job.wait() == 2
    assert job.text.count("error") == job.text.count("error: partitions=5: the model has 4 blocks") == 1
    assert "Traceback" not in job.text and not (here / "many" / "checkpoints").exists()


@pytest.mark.full
def test_torchrun_ddp_dense_with_restarts_and_accumulation(here: Path) -> None:
    gap = write_json(here / "restart.json", {**GAP, "lr_restart": True})
    with torchrun(*arguments(here, here / "ddp", "--dense", "--accumulation", "2", gap=gap)) as job:
        assert job.wait() == 0, job.text[-4000:]
    found = results(here / "ddp")
    assert found["dense"] and found["ranks"] == 2 and found["model_sparsity"] == 0 and found["kept"] == found["numel"]
    assert found["signature"].startswith("gap|method:dense|") and found["bleu"] > 50
    lr = [row["lr"] for row in rows(here / "ddp")]
    assert lr[:10] == lr[10:20] == lr[20:] and max(lr) == pytest.approx(3e-3) and lr[0] == pytest.approx(3e-3 / 5)


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(alone: None) -> Callable[..., int]:
    """`train.main` on a command line, as plain `python train.py` calls it."""
    return lambda argv: train.main(train.parse(argv))


@pytest.fixture(scope="module")
def plain(here: Path) -> Path:
    """An undisturbed run of plain python, in bf16, with a TensorBoard."""
    more = ("--bf16", "--tensorboard", "--also-score", "validation")
    with Job(sys.executable, SCRIPT, *arguments(here, here / "plain", *more)) as job:
        assert job.wait() == 0, job.text[-4000:]
        assert "Traceback" not in job.text and "Warning" not in job.text, job.text
    return here / "plain"


def test_plain_run(plain: Path) -> None:
    found = results(plain)
    assert found["bleu"] > 50 and found["ranks"] == 1
    assert list(found["also_scored"]) == ["validation"] and found["also_scored"]["validation"]["bleu"] > 50
    assert list((plain / "tensorboard").glob("events.*"))


def test_signals_save_and_resuming_is_exact(
    here: Path,
    plain: Path,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped twice: inside an epoch by SIGTERM, then by SIGINT, which comes after the last step but one."""
    out, command = here / "stopped", arguments(here, here / "stopped", "--bf16")
    for at, number, more in ((7, signal.SIGTERM, []), (STEPS - 1, signal.SIGINT, ["--resume"])):
        step = runtime.Monitor.step

        def interrupted(
            self: Any, done: int, step: Any = step, at: int = at, number: int = number, **figures: Any
        ) -> None:
            step(self, done, **figures)
            if done == at:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(runtime.Monitor, "step", interrupted)
            assert run([*command, *more]) == 128 + number
        assert f"stopped at step {at} and saved. Go on with the same command and --resume." in capsys.readouterr().err
        assert (out / "checkpoints" / "latest").read_text() == f"step_{at}"
    with pytest.raises(
        ValueError, match=r"holds an unfinished run. Go on with --resume, start afresh with --overwrite"
    ):
        run(command)
    assert run([*command, "--resume"]) == 0
    assert same_weights(out, plain)
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(plain)]


def test_signal_after_training_is_not_lost(
    here: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the model is scored: ends at once, and --resume scores again without training again."""
    gap = write_json(here / "short.json", {**GAP, "phase_steps": 2, "finetune_steps": 2})
    command = arguments(here, here / "scoring", gap=gap)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "translate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        run(command)
    assert not (here / "scoring" / "results.json").exists()
    assert run([*command, "--resume"]) == 0
    assert results(here / "scoring")["trained_from_step"] == 6 and len(rows(here / "scoring")) == 6


def test_signal_before_the_first_question_is_acted_on_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt), runtime.Interrupt():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def finished(here: Path, run: Callable[..., int], tmp_path: Path) -> Path:
    """A copy of a finished run of 6 steps, in bf16 under plain python."""
    made = here / "finished"
    if not made.exists():
        gap = write_json(here / "short.json", {**GAP, "phase_steps": 2, "finetune_steps": 2})
        assert run(arguments(here, made, gap=gap)) == 0
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def test_a_finished_run_is_safe(here: Path, finished: Path, run: Callable[..., int]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    short = str(here / "short.json")
    for more in ([], ["--resume"]):
        with pytest.raises(ValueError, match=r"holds a finished run. Start afresh with --overwrite, or set another"):
            run(arguments(here, finished, *more, gap=short))
    with pytest.raises(ValueError, match="--resume and --overwrite"):
        run(arguments(here, finished, "--resume", "--overwrite", gap=short))
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    (finished / "notes.txt").write_text("mine")
    assert run(arguments(here, finished, "--overwrite", "--seed", "1", gap=short)) == 0
    assert results(finished)["arguments"]["seed"] == 1 and len(rows(finished)) == 6
    assert (finished / "notes.txt").read_text() == "mine"


def test_resume_where_nothing_was_saved_starts(here: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    """So a job that is queued again and again may always say --resume. A tokenizer of a failed start is not used."""
    gap = write_json(tmp_path / "gap.json", {**GAP, "phase_steps": 1, "finetune_steps": 1})
    with pytest.raises(ValueError, match="partitions=9"):
        many = write_json(tmp_path / "many.json", {**GAP, "partitions": 9})
        run(arguments(here, tmp_path / "out", gap=many))
    (tmp_path / "out" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"ki')
    assert run(arguments(here, tmp_path / "out", "--resume", "--vocab-size", "300", gap=gap)) == 0
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == 300


def test_the_learning_rate_restarts(here: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    gap = write_json(tmp_path / "gap.json", {**GAP, "phase_steps": 4, "finetune_steps": 4, "lr_restart": True})
    assert run(arguments(here, tmp_path / "out", "--lr-schedule", "inverse_sqrt", "--warmup-steps", "2", gap=gap)) == 0
    lr = [row["lr"] / 3e-3 for row in rows(tmp_path / "out")]
    assert lr == pytest.approx([0.5, 1, math.sqrt(2 / 3), math.sqrt(2 / 4)] * 3)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_GAP = {
    "unknown key": ({**GAP, "sparsty": 0.5}, r'unknown setting "sparsty" in .*: did you mean "sparsity"\?'),
    "type": ({**GAP, "rounds": "two"}, r"rounds='two': .*valid integer.* Set \"rounds\" in"),
    "sparsity": ({**GAP, "sparsity": 1.2}, r"sparsity=1.2: .*less than 1.* Set \"sparsity\" in"),
    "phase of no steps": ({**GAP, "phase_steps": 0}, r"phase_steps=0: .*greater than 0.* Set \"phase_steps\" in"),
    "phase of no epochs": (
        {"sparsity": 0.5, "partitions": 2, "phase_epochs": 0.01, "rounds": 1, "finetune_epochs": 1},
        r"phase_epochs=0.01: with \d+ steps in an epoch a phase has no step. Raise \"phase_epochs\"",
    ),
    "partitions": ({**GAP, "partitions": 9}, r'partitions=9: the model has 4 blocks.*Lower "partitions" to 4'),
    "pattern": ({**GAP, "exclude": ["decoder.*fc3"]}, r"fc3.*matches no"),
    "not an object": ([GAP], "gap.json"),
}


@pytest.mark.parametrize("case", BAD_GAP)
def test_bad_gap_config(case: str, here: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    config, message = BAD_GAP[case]
    with pytest.raises(ValueError, match=message):
        run(arguments(here, tmp_path / "out", gap=write_json(tmp_path / "gap.json", config)))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


BAD_ARGUMENTS = {
    "missing gap config": (["--gap-config", "no/gap.json"], "no/gap.json: cannot be read as a GaP config"),
    "unknown argument": (["--sparsity", "0.5"], "sparsity"),
    "preset": (["--preset", "huge"], "invalid choice: 'huge'.*tiny"),
    "not a number": (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    "lr": (["--lr", "0"], "lr=0.0: must be above 0. Set --lr"),
    "accumulation": (["--accumulation", "0"], "accumulation=0: must be at least 1. Set --accumulation"),
    "log_every": (["--log-every", "0"], "log_every=0: must be at least 1. Set --log-every"),
    "beams": (["--beams", "0"], "beams=0: must be at least 1. Set --beams"),
    "smoothing": (["--label-smoothing", "1"], r"label_smoothing=1.0: must lie in \[0, 1\). Set --label-smoothing"),
    "vocabulary": (["--vocab-size", "10"], "a vocabulary of 10: must have at least 260 entries. Set --vocab-size"),
    "no such language": (["--target-lang", "fr"], "no language 'fr', only de, en: set --target-lang"),
    "no such split": (["--test-split", "test_2016"], "no split 'test_2016', only test, train, validation"),
    "missing data": (["--dataset", "./nowhere"], "--dataset ./nowhere: no such file or folder"),
    "more ranks than rows": (["--accumulation", "500"], "160 rows for 1 ranks x 500 accumulation steps"),
    "long sentences": (["--max-length", "2"], "all 160 pairs are longer than 2 tokens: set --max-length"),
    "missing model": (["--model-name", "./nowhere"], r"model './nowhere'.*Set --model-name"),
    "missing DeepSpeed config": (
        ["--deepspeed_config", "no.json"],
        "--deepspeed_config no.json: cannot be read as JSON",
    ),
    "bf16 twice": (["--bf16", "--deepspeed_config", ZERO2], "--bf16: has no effect with --deepspeed_config"),
    "clipping twice": (["--gradient-clipping", "1", "--deepspeed_config", ZERO2], "--gradient-clipping: has no"),
    "clipping": (["--gradient-clipping", "-1"], "gradient_clipping=-1.0: must be at least 0"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case: str, here: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    given, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        run(arguments(here, tmp_path / "out", *given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_empty_split_and_output_that_is_a_file(here: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    with pytest.raises(ValueError, match=r"test.jsonl is empty: at least one row is needed. Set --dataset"):
        run(arguments(here, tmp_path / "out", dataset=write_corpus(tmp_path / "data", test=0)))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file, must be a folder. Set --output-dir"):
        run(arguments(here, tmp_path / "file"))


BAD_DEEPSPEED = {
    "broken": ('{"bf16": ', "cannot be read as JSON"),
    "not an object": ("[]", "holds a list, must hold an object"),
    "optimizer": ('{"optimizer": {"type": "Adam"}}', '"optimizer" would have no effect. Remove it, and set --lr'),
    "batch size": ('{"train_batch_size": 8}', '"train_batch_size" would have no effect.* set --batch-tokens'),
    "accumulation": ('{"gradient_accumulation_steps": 4}', "=4, but --accumulation 1: set both alike"),
    "auto": ('{"zero_optimization": {"stage": "auto"}}', 'zero_optimization.stage="auto" is for the Trainer'),
}


@pytest.mark.parametrize("case", BAD_DEEPSPEED)
def test_bad_deepspeed_file(case: str, here: Path, tmp_path: Path) -> None:
    text, message = BAD_DEEPSPEED[case]
    (tmp_path / "ds.json").write_text(text)
    argv = arguments(here, tmp_path / "out", "--deepspeed_config", str(tmp_path / "ds.json"))
    with pytest.raises(ValueError, match=message):
        train.deepspeed_config(train.parse(argv))


REFUSED_BY_THE_ENGINE = {
    "round robin": ({"round_robin_gradients": True}, "zero_optimization.round_robin_gradients=True is not supported"),
    "NVMe": ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device='nvme' is not supported"),
    "unknown key": ({"stag": 2}, "DeepSpeed config, DeepSpeedZeroConfig: stag=2: Extra inputs are not permitted"),
}


@pytest.mark.full
def test_deepspeed_config_that_is_refused(here: Path, tmp_path: Path) -> None:
    """All in one process of their own: DeepSpeed is set up once in a process, and never taken down."""
    config = json.loads(Path(ZERO2).read_text(encoding="utf-8"))
    lines = ["import sys", f"sys.path.insert(0, {str(Path(SCRIPT).parent)!r})", "import train"]
    for name, (zero, _) in REFUSED_BY_THE_ENGINE.items():
        changed = {**config, "zero_optimization": {**config["zero_optimization"], **zero}}
        path = write_json(tmp_path / f"{name}.json", changed)
        argv = arguments(here, tmp_path / "out", "--deepspeed_config", path)
        lines += ["try:", f"    train.main(train.parse({argv!r}))", "except ValueError as error:", "    print(error)"]
    with Job(sys.executable, "-c", "\n".join(lines)) as job:
        assert job.wait() == 0, job.text[-4000:]
    for _, message in REFUSED_BY_THE_ENGINE.values():
        assert job.text.count(message) == 1, job.text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def _truncate(pattern: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        (path,) = out.glob(f"checkpoints/step_6/{pattern}")
        os.truncate(path, path.stat().st_size // 2)

    return damage


CANNOT_RESUME: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "sparsity": ({"sparsity": 0.6}, [], "was written for another plan .* start in a new folder"),
    "model": ({}, ["--preset", "small"], "was written for another plan"),
    "schedule": ({"finetune_steps": 3}, [], r"was written with finetune_steps=2 \(now 3\)"),
    "dense": ({}, ["--dense"], "was written for another plan"),
    "lr": ({}, ["--lr", "1e-3"], r"was written with lr=0.003 \(now 0.001\)"),
    "micro-batches": ({}, ["--accumulation", "2"], r"was written with accumulation x ranks=1 \(now 2\)"),
    "batches": ({}, ["--batch-tokens", "512"], r"was written with batch_tokens=256 \(now 512\)"),
    "rows": ({}, ["--limit", "100"], r"was written with rows=160 \(now 100\)"),
}


@pytest.mark.parametrize("case", CANNOT_RESUME)
def test_cannot_resume(case: str, here: Path, finished: Path, run: Callable[..., int], tmp_path: Path) -> None:
    changes, more, message = CANNOT_RESUME[case]
    (finished / "results.json").unlink()
    gap = write_json(tmp_path / "gap.json", {**GAP, "phase_steps": 2, "finetune_steps": 2, **changes})
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(ValueError, match=message):
        run(arguments(here, finished, "--resume", *more, gap=gap))
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


#: What is done to the newest checkpoint, of step 6, and the step that is gone on from.
DAMAGES: dict[str, tuple[Callable[[Path], None], int]] = {
    "masks": (_truncate("gap/masks.safetensors"), 4),
    "state": (_truncate("gap/state.json"), 4),
    "random state": (_truncate("gap/rng_0.json"), 4),
    "weights": (_truncate("state/__0_0.distcp"), 4),
    "no files of ours": (lambda out: shutil.rmtree(out / "checkpoints" / "step_6" / "gap"), 4),
    "latest": (lambda out: (out / "checkpoints" / "latest").unlink(), 6),
}


@pytest.mark.filterwarnings("ignore:.*this checkpoint is damaged and passed over")
@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    case: str, here: Path, finished: Path, run: Callable[..., int], tmp_path: Path
) -> None:
    damage, step = DAMAGES[case]
    shutil.copytree(finished, tmp_path / "undisturbed")
    (finished / "results.json").unlink()
    damage(finished)
    assert run(arguments(here, finished, "--resume", gap=str(here / "short.json"))) == 0
    assert results(finished)["trained_from_step"] == step
    assert same_weights(finished, tmp_path / "undisturbed")


@pytest.mark.filterwarnings("ignore:.*this checkpoint is damaged and passed over")
def test_only_damaged_checkpoints(here: Path, finished: Path, run: Callable[..., int]) -> None:
    (finished / "results.json").unlink()
    for path in finished.glob("checkpoints/*/gap/state.json"):
        os.truncate(path, 10)
    with pytest.raises(
        ValueError, match=r"step_6.gap.state.json: has 10 bytes, and was saved with .* damaged. Use another one"
    ):
        run(arguments(here, finished, "--resume", gap=str(here / "short.json")))


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ValueError("lr=0: must be above 0"), 2, "error: lr=0: must be above 0\n"),
        (KeyboardInterrupt(), 130, "interrupted; earlier checkpoints are unchanged.\n"),
        (RuntimeError("Connection closed by peer [127.0.0.1]"), 1, "ended because another rank has"),
    ],
)
def test_the_end_of_a_process(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    for rank, text in (("0", said), ("1", "error on rank 1: lr=0: must be above 0\n" if status == 2 else "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        with pytest.raises(SystemExit) as end:
            runtime.run(main)
        assert end.value.code == status
        err = capsys.readouterr().err
        assert err.startswith(text) and len(err.splitlines()) == bool(text)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        runtime.run(lambda: (_ for _ in ()).throw(RuntimeError("shapes")))
