"""examples/vision: decoding, crops, batches and accuracy, against references that share no code with them."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classifier
import datasets
import drawings
import images
import numpy as np
import pytest
import scoring
import torch
from common import sampling
from PIL import Image
from torch.nn import functional
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from gap_ds import GaPConfig
from gap_ds.method import plan, schedule

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours: red grows with x, green with y, and blue is noise."""
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width))
    return Image.fromarray(np.stack([across, down, noise], 2).astype(np.uint8)).convert(mode)


def source_of(*pictures: Image.Image, labels: list[int] | None = None) -> images.Source:
    table = np.array(labels or [0] * len(pictures))
    return images.Source(table, ("a", "b", "c"), lambda row: pictures[row], lambda row: f"picture {row}")


# --- one picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, part", [(32, 0.875), (32, 1.0), (24, 0.75)])
def test_evaluation_is_that_of_transformers(size: int, part: float) -> None:
    """Crop geometry, scale, normalisation, order of channels: as the image processor beside an exported model does."""
    reference = ConvNextImageProcessorPil(
        size={"shortest_edge": size}, crop_pct=part, resample=2, image_mean=list(MEAN), image_std=list(DEVIATION)
    )
    for number, (width, height) in enumerate(((96, 128), (131, 50), (40, 40), (32, 32), (33, 71), (20, 25))):
        image = picture(width, height, number)
        wanted = torch.from_numpy(np.asarray(reference(image, return_tensors="np")["pixel_values"]))
        pixels = torch.from_numpy(np.asarray(images.Evaluation(size, part)(image)).copy())[None]
        found = images.normalise(pixels, torch.tensor(MEAN), torch.tensor(DEVIATION))
        assert found.shape == wanted.shape == (1, 3, size, size)
        assert torch.allclose(found, wanted, atol=1e-5), (width, height)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_training_crops_are_resized_as_torch_does_it() -> None:
    """The box, cut out and resized by torch with antialiasing, mirrored or not; by up to one of 255 steps."""
    image, flips = picture(90, 70), 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        left, top, right, bottom = images.random_box(90, 70, 0.1, np.random.default_rng(seed))
        found = np.asarray(images.Training(24, 0.1)(image, random)).astype(int)
        cut = np.asarray(image)[top:bottom, left:right]
        tensor = torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float()
        resized = functional.interpolate(tensor, (24, 24), mode="bilinear", antialias=True)
        wanted = resized[0].permute(1, 2, 0).round().clamp(0, 255).int().numpy()
        mirrored = found[0, 0, 0] > found[0, -1, 0]  # red grows to the right
        flips += int(mirrored)
        assert np.abs(found - (wanted[:, ::-1] if mirrored else wanted)).max() <= 1
    assert 0 < flips < 12


def test_boxes_lie_in_the_picture_and_keep_their_area_and_ratio() -> None:
    random = np.random.default_rng(0)
    for width, height in ((300, 200), (64, 64), (37, 91)):
        areas = []
        for _ in range(200):
            left, top, right, bottom = images.random_box(width, height, 0.25, random)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            areas.append((right - left) * (bottom - top) / (width * height))
            assert 0.7 < (right - left) / (bottom - top) < 1.43  # 3/4 to 4/3, and rounding
        assert min(areas) > 0.23 and max(areas) > 0.5  # a tall picture has no room for large ones
    assert images.random_box(1000, 10, 1.0, random) == (493, 0, 506, 10)  # nothing fits: the middle
    assert images.random_box(1, 1, 0.08, random) == (0, 0, 1, 1)


def test_jitter_changes_colours_alone() -> None:
    image = picture(40, 40)
    plain, jittered = (
        np.asarray(images.Training(20, 0.5, jitter)(image, np.random.default_rng(1))).astype(float)
        for jitter in (0.0, 0.5)
    )
    assert np.abs(plain - jittered).mean() > 2
    assert np.corrcoef(plain[..., 0].ravel(), jittered[..., 0].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    grey = np.asarray(picture(20, 16)).mean(2).astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    found = images.decode(source_of(image), 0)
    assert found.mode == "RGB" and found.size == (20, 16)
    if mode != "1":  # black and white is dithered
        assert np.abs(np.asarray(found).astype(int) - grey[..., None]).max() <= 2


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32", "float32"])
def test_grey_of_more_than_8_bits_is_not_clipped(dtype: str, tmp_path: Path) -> None:
    grey = np.arange(256).reshape(16, 16)
    wide = np.dtype(dtype).itemsize == 2
    Image.fromarray((grey * 256 + 255 if wide else grey).astype(dtype)).save(tmp_path / "grey.tiff")
    found = images.decode(source_of(Image.open(tmp_path / "grey.tiff")), 0)
    assert np.array_equal(np.asarray(found), np.stack([grey] * 3, 2))
    if not wide:
        with pytest.raises(images.Damaged, match="grey values from 1 to 256, must lie in 0 to 255"):
            images.decode(source_of(Image.fromarray((grey + 1).astype(dtype))), 0)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


DAMAGED: dict[str, bytes] = {
    "truncated": jpeg(picture(64, 64))[:900],
    "empty": b"",
    "text": b"<html>not found</html>",
    "png header alone": b"\x89PNG\r\n\x1a\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """ImageNet's layout: two classes of three pictures in train, one of each in val."""
    for split, count in (("train", 3), ("val", 1)):
        for name in ("n01", "n02"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                picture(20, 18, number).save(tmp_path / split / name / f"{number}.JPEG")
    return tmp_path


def test_a_tree_of_folders(tree: Path) -> None:
    train = images.load(str(tree), "train")
    assert train.classes == ("n01", "n02") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.name(4).endswith("train/n02/1.JPEG")
    assert images.decode(train, 4).size == (20, 18)
    assert sorted(images.load(str(tree), "train", limit=4).labels.tolist()) != [0, 0, 0, 1]
    (tree / "train" / "n03").mkdir()
    (tree / "train" / "n03" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"train/n03: has no picture .* each class needs at least one"):
        images.load(str(tree), "train")


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named_or_skipped(kind: str, workers: int, tree: Path) -> None:
    (tree / "train" / "n02" / "1.JPEG").write_bytes(DAMAGED[kind])
    source, keys = images.load(str(tree), "train"), [[(0, row) for row in range(6)]]
    loader = images.Loader(source, images.Evaluation(8), 0, workers, skip=False)
    with pytest.raises(ValueError, match=r"^\S*n02/1.JPEG: cannot be decoded \(.*\)\. Mend or remove it, or set"):
        next(loader(keys))
    loader = images.Loader(source, images.Evaluation(8), 0, workers, skip=True)
    (batch,) = loader(keys)
    assert batch["pictures"].shape == (5, 8, 8, 3) and batch["labels"].tolist() == [0, 0, 0, 1, 1]
    assert len(loader.skipped) == 1 and "n02/1.JPEG" in next(iter(loader.skipped))
    with pytest.raises(ValueError, match=r"So are all 1 pictures of its batch"):
        list(loader([[(0, 4)]]))


def parquet(folder: Path, labels: list[Any], **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    rows = {"image": [{"bytes": jpeg(picture(9, 9)), "path": f"{i}.jpg"} for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict({**rows, **columns}).to_parquet(folder / "train.parquet")
    return str(folder)


def test_parquet_files(tmp_path: Path) -> None:
    source = images.load(parquet(tmp_path / "a", [0, 2, 1]), "train")
    assert source.labels.tolist() == [0, 2, 1] and source.classes == ("0", "1", "2")
    assert images.decode(source, 1).size == (9, 9) and "(1.jpg)" in source.name(1)
    names = datasets.ClassLabel(names=["cat", "dog"])
    rows = datasets.Dataset.from_dict({"image": [{"bytes": jpeg(picture(9, 9)), "path": None}], "label": [1]})
    rows.cast_column("label", names).to_parquet(tmp_path / "train.parquet")
    assert images.load(str(tmp_path / "train.parquet"), "train").classes == ("cat", "dog")
    empty = [{"bytes": jpeg(picture(9, 9)), "path": None}, None, {"bytes": None, "path": None}]
    source = images.load(parquet(tmp_path / "b", [0, 0, 0], image=empty), "train")
    for row in (1, 2):
        with pytest.raises(images.Damaged, match=rf"row {row} .*\(no file name\): .*the row has no picture"):
            images.decode(source, row)


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "negative label": (lambda p: parquet(p / "d", [0, -1]), r"\(1.jpg\): has label -1, must lie in 0 to 0"),
    "text label": (lambda p: parquet(p / "d", ["a", "b"]), "column 'label' holds .* must hold an integer"),
    "missing label": (lambda p: parquet(p / "d", [0, None]), "column 'label' holds .* must hold an integer"),
    "no folder": (lambda p: str(p / "nowhere"), "no such file or folder"),
    "numbers": (lambda p: parquet(p / "d", [0], image=[7]), "column 'image' holds .* instead of pictures"),
    "missing shard": (
        lambda p: str(Path(_write(p / "train-00000-of-00002.parquet", b"PAR1")).parent),
        "split 'train' has 1 of 2 shards",
    ),
    "not parquet": (lambda p: _write(p / "train.parquet", b"PAR1oh no"), "train.parquet cannot be read as parquet"),
    "no classes": (lambda p: str(_folder(p / "t" / "train").parent), "train: has no folders"),
    "empty": (lambda p: str(_folder(p / "t")), "has no split 'train', neither .*it is empty"),
}


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        images.load(make(tmp_path), "train")


def test_labels_and_columns_that_do_not_fit(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "d", [0, 1, 5])
    with pytest.raises(ValueError, match=r"row 2 .*\(2.jpg\): has label 5, must lie in 0 to 2"):
        images.check_labels(images.load(folder, "train"), 3)
    with pytest.raises(ValueError, match=r"has no column 'img', only image, label. Set --image-column"):
        images.load(folder, "train", image_column="img")
    with pytest.raises(ValueError, match=r"has no split 'val', neither .*only train"):
        images.load(folder, "val")
    with pytest.raises(ValueError, match=r"no split 'dev', only train, validation, test"):
        images.load(None, "dev")


# --- drawings ---------------------------------------------------------------------------------------------------------


def test_drawings_are_the_same_everywhere_and_differ() -> None:
    source = images.load(None, "train")
    assert len(source) == 4000 and len(source.classes) == 10 and np.bincount(source.labels).tolist() == [400] * 10
    one = [np.asarray(drawings.draw("train", i)) for i in range(10)]
    assert all(np.array_equal(a, np.asarray(drawings.draw("train", i))) for i, a in enumerate(one))
    assert len({a.tobytes() for a in one} | {np.asarray(drawings.draw("test", i)).tobytes() for i in range(10)}) == 20


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (1, 2), (2, 3)])
def test_steps_are_the_same_for_any_number_of_ranks(world_size: int, accumulation: int) -> None:
    whole = sampling.Batches(50, 12, seed=3)
    assert whole.steps_per_epoch == 4
    steps = [set(keys) for keys in itertools.islice(whole.micro_batches(0), 8)]
    assert len(set().union(*steps[:4])) == 48 and {epoch for keys in steps[4:] for epoch, _ in keys} == {1}
    shared: list[set[sampling.Key]] = [set() for _ in range(8)]
    for rank in range(world_size):
        part = sampling.Batches(50, 12, world_size=world_size, rank=rank, accumulation=accumulation, seed=3)
        for number, keys in enumerate(itertools.islice(part.micro_batches(0), 8 * accumulation)):
            assert not shared[number // accumulation] & set(keys)
            shared[number // accumulation] |= set(keys)
    assert shared == steps
    resumed = [set(keys) for keys in itertools.islice(whole.micro_batches(0, 3), 5)]
    assert resumed == steps[3:]


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"batch_size=12: must be a multiple of 8 \(4 ranks x 2 accumulation steps\)"):
        sampling.Batches(50, 12, world_size=4, accumulation=2)
    with pytest.raises(ValueError, match="batch_size=12: must be at most 11, the rows of training"):
        sampling.Batches(11, 12)


def test_a_picture_depends_on_seed_epoch_and_row_alone() -> None:
    source = source_of(*(picture(30, 30, seed) for seed in range(8)))
    keys = [[(epoch, row) for row in range(4)] for epoch in (0, 1)]

    def pictures(seed: int, workers: int, order: list[list[sampling.Key]]) -> list[torch.Tensor]:
        loader = images.Loader(source, images.Training(16, jitter=0.2), seed, workers, skip=False)
        return [batch["pictures"] for batch in loader(order)]

    first, second = pictures(0, 0, keys)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    other, same = pictures(0, 2, [keys[1], keys[0][::-1]])
    assert torch.equal(torch.get_rng_state(), state)  # of dropout: a resumed run makes its loader anew
    assert torch.equal(other, second) and torch.equal(same.flip(0), first)
    assert not torch.equal(pictures(1, 0, keys)[0], first)


@pytest.mark.parametrize("rows, world_size, batch", [(10, 1, 4), (10, 3, 2), (7, 4, 8), (3, 4, 2)])
def test_accuracy_counts_every_picture_once(rows: int, world_size: int, batch: int) -> None:
    parts = [sampling.evaluation_batches(rows, batch, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    keys = [key for part in parts for batch_ in part for key in batch_]
    assert sorted(row for _, row in keys if row != sampling.PADDING) == list(range(rows))


def test_score_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 10, generator=generator), torch.randint(10, (23,), generator=generator)
    tables = [picture(8, 8) for _ in range(23)]
    source = source_of(*tables, labels=labels.tolist())
    loader, seen = images.Loader(source, images.Evaluation(8), 0, 0, skip=False), iter(logits.split(5))

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        given = next(seen)
        filled = torch.zeros(len(pictures), 10)
        filled[: len(given)] = given
        return filled

    keys = sampling.evaluation_batches(23, 5)
    keys[-1] += [(0, sampling.PADDING)] * 2  # as on a rank that has fewer
    found = scoring.score(forward, loader(keys))
    top1 = sum(int(line.argmax()) == int(label) for line, label in zip(logits, labels, strict=True))
    top5 = sum(int(label) in line.sort().indices[-5:] for line, label in zip(logits, labels, strict=True))
    assert found["pictures"] == 23
    assert found["top1"] == pytest.approx(100 * top1 / 23) and found["top5"] == pytest.approx(100 * top5 / 23)
    wanted = -sum(float(line.log_softmax(0)[label]) for line, label in zip(logits, labels, strict=True)) / 23
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)


# --- models -----------------------------------------------------------------------------------------------------------


def test_presets_are_the_networks_of_the_papers() -> None:
    """Weights, and multiply-adds of one picture, as they are published for 1,000 classes at 224 pixels."""
    names = [str(i) for i in range(1000)]
    with torch.device("meta"):
        for preset, weights, products in (("resnet50", 25_557_032, 4.089e9), ("resnet18", 11_689_512, 1.814e9)):
            model = classifier.build(preset, names)
            assert sum(p.numel() for p in model.parameters()) == weights
            assert classifier.products(model, 224)[1] == pytest.approx(products, rel=1e-3)
        small = classifier.build("resnet20_small", names[:10])
        assert sum(p.numel() for p in small.parameters()) == 272_474
        uses, products_ = classifier.products(small, 32)
        assert uses["resnet.embedder.embedder.convolution.weight"] == 32 * 32 and products_ == pytest.approx(
            40.8e6, rel=0.02
        )
    bottleneck = classifier.build("resnet50_small", names[:2]).resnet.encoder.stages[1].layers[0].layer
    assert [layer.convolution.stride for layer in bottleneck] == [(1, 1), (2, 2), (1, 1)]  # v1.5: in the 3x3


CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "gap").glob("resnet50_*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_those_of_the_paper(path: Path) -> None:
    """Four contiguous partitions, budgets to the weight, and the epochs of the paper's table."""
    config = GaPConfig.load(path)
    with torch.device("meta"):
        model = classifier.build("resnet50", [str(i) for i in range(1000)])
    plan_ = plan.build(model, config)
    names = [entry.name for entry in plan_.entries]
    ends = "embedder.embedder.convolution.weight" in names[0], "classifier.1.weight" in names[-1]
    erk = config.distribution == "erk"
    assert len(names) == (54 if erk else 52) and ends == (erk, erk)
    partitions = [entry.partition for entry in plan_.entries]
    assert partitions == sorted(partitions) and plan_.kappa == (1 if config.method == "rigl" else 4)
    assert plan_.numel == (25_502_912 if erk else 23_445_504)  # all convolutions and the classifier, or those of blocks
    tolerance = 0 if erk else len(names)  # the total is rounded once, or each entry
    assert abs(plan_.keep - round((1 - config.sparsity) * plan_.numel)) <= tolerance
    steps = schedule.build(config, 1000).total_steps
    assert steps == (1_110_000 if config.method == "parallel" else 990_000)


def test_own_batch_norm_is_torchs_and_takes_bf16_weights() -> None:
    torch.manual_seed(0)
    wanted = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    wanted[1].weight.data.uniform_(0.5, 2)
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    own.load_state_dict(wanted.state_dict())
    classifier.use_own_batch_norm(own, everywhere=False)
    assert own.state_dict().keys() == wanted.state_dict().keys()
    for training in (True, False, True):
        x = torch.randn(4, 3, 9, 9)
        assert torch.equal(own.train(training)(x), wanted.train(training)(x))
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), wanted.state_dict().values(), strict=True))
    half = own[1]
    half.weight.data, half.bias.data = half.weight.data.bfloat16(), half.bias.data.bfloat16()
    out = half(torch.randn(4, 6, 5, 5).bfloat16())
    assert out.dtype == torch.bfloat16 and half.running_mean.dtype == torch.float32


def test_recomputed_statistics_are_the_means_over_the_batches() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5))
    model[0].running_mean.fill_(7.0)
    batches = [torch.randn(5, 3, 4, 4) * i + i for i in range(1, 5)]
    scoring.recompute_statistics(model.train(), model, ({"pictures": batch} for batch in batches))
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, means) and torch.allclose(model[0].running_var, variances)
    assert model.training and model[0].training and model[0].momentum == 0.1


def test_messages_have_no_line_breaks() -> None:
    def read(_: int) -> Image.Image:
        raise OSError("one\ntwo")

    source = images.Source(np.array([0]), ("a",), read, lambda row: f"row {row}")
    with pytest.raises(images.Damaged, match=re.escape("row 0: cannot be decoded (OSError: one).")):
        images.decode(source, 0)
    assert math.isclose(images.Evaluation(8).part, 0.875)
