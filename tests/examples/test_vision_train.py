"""The vision example end to end: a run in this process, runs on two ranks, resuming, moving averages, and mistakes."""

from __future__ import annotations

import doctest
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import run as common
from common import runtime
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gap_ds.export import compact, load_compact

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "sharding")]
import launch  # noqa: E402
import vision  # noqa: E402
from vision import GAP, STEPS, arguments  # noqa: E402

train = vision.load(vision.SCRIPT, "vision_train")
evaluate = vision.load(vision.SCRIPT.with_name("evaluate.py"), "vision_evaluate")


@pytest.fixture
def run(alone: None) -> Callable[[list[str]], int]:
    """`train.main` on a command line, as plain `python train.py` calls it."""
    return lambda argv: train.main(train.parse(argv))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    (folder / "gap.json").write_text(json.dumps(GAP))
    return folder


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def figures(out: Path, kind: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "pictures_per_s")} for row in rows(out, kind)]


# -- one process -------------------------------------------------------------------------------------------------------

EVERYTHING = ["--ema", "0.8", "--accumulation", "2", "--jitter", "0.3", "--channels-last", "--bf16"]


@pytest.fixture
def plain(here: Path, run: Callable[[list[str]], int]) -> Path:
    if not (here / "plain").exists():
        assert run(arguments(here / "plain", str(here / "gap.json"), *EVERYTHING)) == 0
    return here / "plain"


def test_a_run_is_complete(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(plain)
    assert found["signature"].startswith("gap|method:cyclic|k:3|T:2st|rounds:1|ft:3st|s:0.8|dist:erk|")
    assert found["applied_steps"] == STEPS and found["pictures"] == 64 and found["skipped"] == []
    assert 0 <= found["top1"] <= found["top5"] <= 100
    # The average of many steps keeps what any mask kept; what is exported keeps what the last one does.
    model = AutoModelForImageClassification.from_pretrained(plain / "model")
    own = dict(model.named_parameters())
    assert len(found["entries"]) == 22
    for name, entry in found["entries"].items():
        assert entry["keep"] >= entry["nonzero"] == int(own[name].count_nonzero()) >= 0.98 * entry["keep"]
    total = sum(entry["numel"] for entry in found["entries"].values())
    assert found["kept"] == round(0.2 * total) and model.config.id2label[3] == "triangle, striped"
    assert [row["phase"] for row in rows(plain)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    validation = rows(plain, "validation")
    assert [row["step"] for row in validation] == [4, 8, 9]
    assert all("top1_running_statistics" in row for row in validation)  # a prune in each of these epochs

    scores = tmp_path / "scores.json"
    monkeypatch.setenv("WORLD_SIZE", "1")
    argv = ["--model-dir", str(plain / "model"), "--limit", "64", "--json", str(scores), "--threads", "1", "--bf16"]
    assert evaluate.main(evaluate.parse(argv)) == 0
    assert json.loads(scores.read_text())["top1"] == pytest.approx(found["top1"], abs=100 / 64)
    processor = AutoImageProcessor.from_pretrained(plain / "model")
    assert processor(Image.new("RGB", (30, 20)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


def test_flops_are_those_of_a_count_by_hand(plain: Path) -> None:
    """Products of a picture of 16 x 16: a weight of stage s is used (16 / 2^s)^2 times, and the classifier's once."""
    found = results(plain)
    dense = kept = 0
    for name, entry in found["entries"].items():
        stage = int(name.partition("stages.")[2][:1] or 0)
        uses = 1 if "classifier" in name else (16 >> stage) ** 2
        dense += uses * entry["numel"]
        kept += uses * entry["keep"]
    assert found["dense_inference_gflops"] == pytest.approx(2 * dense / 1e9)
    assert found["inference_flops"] == pytest.approx(kept / dense)
    assert found["inference_flops"] < found["training_flops"] < 1


def test_exported_statistics_are_those_of_whole_training_pictures(
    here: Path, run: Callable[[list[str]], int], tmp_path: Path
) -> None:
    """Also where no accuracy is measured in training: of the two batches of the last epoch, by plain products."""
    assert run(arguments(tmp_path / "out", str(here / "gap.json"), "--validate-every", "0")) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    source = train.images.load(None, "train", limit=64)
    order = train.np.random.default_rng((0, (STEPS - 1) // 4)).permutation(64)
    stem = model.resnet.embedder.embedder
    outputs = []
    for numbers in (order[:16], order[16:32]):
        pictures = [source.read(int(row)).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR) for row in numbers]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        outputs.append(stem.convolution(pixels).detach().transpose(0, 1).flatten(1))
    torch.testing.assert_close(stem.normalization.running_mean, torch.stack([x.mean(1) for x in outputs]).mean(0))
    torch.testing.assert_close(stem.normalization.running_var, torch.stack([x.var(1) for x in outputs]).mean(0))


def test_resuming_is_exact(
    here: Path, plain: Path, run: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside an epoch, after a boundary of that epoch: weights, averages, statistics and every figure."""
    out = here / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Monitor, "step", vision.stop_at(7, signal.SIGTERM))
        assert run(arguments(out, str(here / "gap.json"), *EVERYTHING)) == 128 + signal.SIGTERM
    assert run(arguments(out, str(here / "gap.json"), *EVERYTHING, "--resume")) == 0
    assert results(out)["trained_from_step"] == 7
    assert same(out, plain)
    assert all(figures(out, kind) == figures(plain, kind) for kind in ("train", "validation"))


def test_a_pretrained_vit_gets_a_head_of_its_own(here: Path, run: Callable[[list[str]], int], tmp_path: Path) -> None:
    """A Transformer instead of a convolutional network, with 5 classes where 10 are trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)).save_pretrained(
        tmp_path / "vit"
    )
    gap = tmp_path / "gap.json"
    gap.write_text(json.dumps({key: value for key, value in GAP.items() if key not in ("distribution", "include")}))
    assert run(arguments(tmp_path / "run", str(gap), "--model-name", str(tmp_path / "vit"))) == 0
    found = results(tmp_path / "run")
    assert len(found["entries"]) == 3 * 6 and {entry["partition"] for entry in found["entries"].values()} == {0, 1, 2}
    assert "init:magnitude" in found["signature"] and found["kept"] == sum(
        int(weights(tmp_path / "run")[name].count_nonzero()) for name in found["entries"]
    )
    # transformers has other names for these weights in files of earlier versions; ours are the module's.
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_labels == 10 and model.classifier.out_features == 10
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(model.state_dict()[name], weight), name
    compact(tmp_path / "run" / "model", tmp_path / "compact")
    for name, weight in load_compact(tmp_path / "compact").state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_code_that_comes_with_a_model_is_run_to_the_end(
    here: Path, run: Callable[[list[str]], int], tmp_path: Path
) -> None:
    """As the student and as the teacher, with the flag; the exported model has the code, too."""
    torch.manual_seed(0)
    folder, flag = tmp_path / "own", "--trust-remote-code"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).save_pretrained(folder)
    (folder / "own_resnet.py").write_text(
        "from transformers import ResNetConfig, ResNetForImageClassification\n"
        "class OwnConfig(ResNetConfig):\n    model_type = 'own_resnet'\n"
        "class OwnResNet(ResNetForImageClassification):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "OwnConfig", "AutoModelForImageClassification": "OwnResNet"}
    auto_map = {name: f"own_resnet.{own}" for name, own in classes.items()}
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "model_type": "own_resnet", "auto_map": auto_map}))
    gap = here / "one_shot.json"
    gap.write_text(json.dumps({"method": "one_shot", "sparsity": 0.5, "phase_steps": 1, "finetune_steps": 1}))
    own = ["--model-name", str(folder), "--teacher", str(folder), flag]
    assert run(arguments(tmp_path / "run", str(gap), *own)) == 0
    assert (tmp_path / "run" / "model" / "own_resnet.py").exists()


@pytest.mark.full
def test_a_teacher_teaches_the_phases_that_are_given(
    plain: Path, here: Path, run: Callable[[list[str]], int], tmp_path: Path
) -> None:
    teacher = ["--teacher", str(plain / "model"), "--distillation", "0", "--hidden-distillation", "1"]
    taught = [*EVERYTHING, *teacher, "--teacher-phases", "finetune"]
    assert run(arguments(tmp_path / "taught", str(here / "gap.json"), *taught)) == 0
    fine_tuning = max(row["phase"] for row in rows(plain))
    pairs = list(zip(rows(tmp_path / "taught"), rows(plain), strict=True))
    assert all(one["loss"] == other["loss"] for one, other in pairs if other["phase"] < fine_tuning)
    first = next((one, other) for one, other in pairs if other["phase"] == fine_tuning)
    assert first[0]["loss"] > first[1]["loss"]  # equal weights, and the distance of the hidden states


@pytest.mark.full
def test_parallel_gap_of_two_workers(here: Path, tmp_path: Path) -> None:
    """Both end with one model, whose masks keep the budget of each entry."""
    gap = tmp_path / "gap.json"
    gap.write_text(json.dumps(GAP | {"method": "parallel", "partitions": 2, "rounds": 2}))
    command = [sys.executable, "-m", "gap_ds.cli", "parallel", "--workers", "2", "--ranks-per-worker", "1", "--"]
    command += [str(vision.SCRIPT), *arguments(tmp_path / "run", str(gap))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = results(tmp_path / "run" / "worker_0")
    assert found["applied_steps"] == 7 and found["signature"].startswith("gap|method:parallel|k:2|T:2st|rounds:2|")
    own = weights(tmp_path / "run" / "worker_0")
    assert {n: int(own[n].count_nonzero()) for n in found["entries"]} == {
        n: entry["keep"] for n, entry in found["entries"].items()
    }


def test_the_average_is_that_of_the_masked_weights(here: Path) -> None:
    """Followed by hand on a model of two layers, over a prune and a growth."""
    import average

    from gap_ds import GaPEngine

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gap = {"sparsity": 0.5, "partitions": [["0"], ["1"]], "phase_steps": 2, "rounds": 1, "finetune_steps": 2}
    engine = GaPEngine(model, gap, optimizer=optimizer, optimizer_state=average.STATE)
    averages = average.MovingAverage(engine.optimizer, 0.75)
    wanted: torch.Tensor | None = None
    weight = model[1].weight
    for step in range(6):
        engine.backward(engine(torch.randn(4, 6)).square().mean())
        engine.run.backend.step()  # the boundary comes afterwards: the average is of the weights before it
        wanted = weight.detach().clone() if wanted is None else 0.75 * wanted + 0.25 * weight.detach()
        engine.after_step()
        if (mask := engine.mask("1.weight")) is not None:
            wanted *= mask.view(6, 6)  # averages are pruned like the weights
        assert torch.allclose(optimizer.state[weight]["average"], wanted), step
    current = weight.detach().clone()
    with averages.in_place_of_weights():
        assert torch.allclose(weight, wanted)
    assert torch.equal(weight, current)


# -- two ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(here: Path) -> Path:
    """The runs of worker_vision.py."""
    out = here / "pair"
    out.mkdir()
    launch.run_workers(str(Path(__file__).with_name("worker_vision.py")), 2, out, timeout=300)
    return out


@pytest.mark.full
def test_batch_norm_over_all_ranks_is_that_of_one(pair: Path) -> None:
    """Gradients of a network, and the running statistics, against torch's BatchNorm on the whole batch."""
    far = json.loads((pair / "synchronised.json").read_text())
    assert sum("running" in name for name in far) == 2 * 21
    assert max(far.values()) < 1e-5, max(far, key=lambda name: far[name])


@pytest.mark.full
def test_zero1_keeps_budgets_and_resumes_exactly(pair: Path) -> None:
    found = results(pair / "zero1")
    assert found["ranks"] == 2 and found["trained_from_step"] == 5
    own = weights(pair / "zero1")
    assert all(int(own[n].count_nonzero()) <= e["keep"] for n, e in found["entries"].items())
    assert found["kept"] == sum(e["keep"] for e in found["entries"].values()) and found["density_at_end"] < 0.2001
    assert same(pair / "zero1", pair / "zero1 undisturbed")
    assert figures(pair / "zero1", "validation") == figures(pair / "zero1 undisturbed", "validation")


@pytest.mark.full
def test_a_run_moves_to_another_number_of_ranks(
    pair: Path, here: Path, run: Callable[[list[str]], int], tmp_path: Path
) -> None:
    """Two ranks go on as one with two micro-batches: the same pictures in the same micro-batches."""
    gap, more = str(here / "gap.json"), ["--portable"]
    with pytest.raises(ValueError, match=r"was written with accumulation x ranks=2 \(now 1\)"):
        run(arguments(pair / "moved", gap, *more, "--resume"))
    with pytest.warns(UserWarning, match="saved by 2 ranks: the random state is not restored"):
        assert run(arguments(pair / "moved", gap, *more, "--resume", "--accumulation", "2")) == 0
    assert results(pair / "moved")["trained_from_step"] == 5 and results(pair / "moved")["ranks"] == 1
    assert run(arguments(tmp_path / "alone", gap, *more, "--accumulation", "2")) == 0
    for (name, a), b in zip(weights(pair / "moved").items(), weights(tmp_path / "alone").values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-4), name


def test_random_states_of_moved_ranks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        applied_steps = 5

        def load_checkpoint(self, _: Path) -> dict[str, Any]:
            return {"batches": 5, "ranks": 2, "run": {}}

    drawn = set()
    for ranks, rank, seed in ((4, 0, 0), (4, 1, 0), (4, 0, 1), (3, 0, 0)):
        monkeypatch.setattr(runtime, "rank", lambda rank=rank: rank)
        state = common.resume(Engine(), Path(), {"batches": 0, "ranks": ranks, "run": {}}, seed)  # type: ignore[arg-type]
        assert state == {"batches": 5, "ranks": ranks, "run": {}}
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 4


# -- mistakes ----------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "ranks": (["--batch-size", "15", "--accumulation", "2"], "batch_size=15: must be a multiple of 2"),
    "batch": (["--batch-size", "100"], "batch_size=100: must be at most 64"),
    "crop": (["--crop-part", "0"], r"crop_part=0.0: must lie in \(0, 1\]. Set --crop-part"),
    "jitter": (["--jitter", "1"], r"jitter=1.0: must lie in \[0, 1\). Set --jitter"),
    "momentum": (["--momentum", "1"], r"momentum=1.0: must lie in \[0, 1\). Set --momentum"),
    "preset": (["--preset", "resnet34"], "invalid choice: 'resnet34'"),
    "split": (["--validation-split", "dev"], "no split 'dev', only train, validation, test"),
    "data": (["--dataset", "./nowhere"], "--dataset ./nowhere: no such file or folder"),
    "model": (["--model-name", "./nowhere"], r"model './nowhere': must be a folder or hub name of an image classifier"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case: str, here: Path, tmp_path: Path, run: Callable[[list[str]], int]) -> None:
    given, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        run(arguments(tmp_path / "out", str(here / "gap.json"), *given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_average_that_would_be_cleared_is_refused(here: Path, run: Callable[[list[str]], int]) -> None:
    gap = here / "reset.json"
    gap.write_text(json.dumps({**GAP, "optimizer_state": "reset"}))
    with pytest.raises(ValueError, match=r"--ema: lies in the optimizer's state, which optimizer_state=\"reset\""):
        run(arguments(here / "reset", str(gap), "--ema", "0.9"))


def test_classes_of_the_splits_must_agree(tmp_path: Path, here: Path, run: Callable[[list[str]], int]) -> None:
    for split, names in (("train", "ab"), ("validation", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ValueError, match=r"validation/a/0.png: its split has a class 'c' that the training split does"):
        run(arguments(here / "classes", str(here / "gap.json"), "--dataset", str(tmp_path), "--batch-size", "2"))


def test_a_model_without_a_size_is_refused_in_a_line(plain: Path, tmp_path: Path, alone: None) -> None:
    shutil.copytree(plain / "model", tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"longest_edge": 16}}))
    with pytest.raises(ValueError, match=r"has no image processor with a size, mean and deviation \(.*\). Set --model"):
        evaluate.main(evaluate.parse(["--model-dir", str(tmp_path / "model"), "--limit", "8", "--threads", "1"]))


def test_classes_are_scored_under_the_models_numbers(tmp_path: Path) -> None:
    """Also in a split that lacks one of them; names that the model does not have are taken in order."""
    for name in "ac":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "0.png")
    source = evaluate.images.load(str(tmp_path), "test")
    assert evaluate.numbered_as(source, {0: "a", 1: "b", 2: "c"}).labels.tolist() == [0, 2]
    assert evaluate.numbered_as(source, {0: "tench", 1: "a"}).labels.tolist() == [0, 1]


@pytest.mark.parametrize("module", [train, common], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
