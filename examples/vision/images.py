"""Read pictures and batch them, with the same optimizer steps for any number of ranks.

    load -> Source -> Batches -> DataLoader workers: decode, crop, flip -> uint8 (B, H, W, 3) and labels (B,)

Pillow decodes, resizes and colours pictures. They leave the workers as bytes and are normalised on the model's device.
Augmentation depends on (seed, epoch, row) alone, not on workers, ranks or the step at which a run was resumed.
Shape legend: B pictures of a micro-batch, H and W pixels.
"""

from __future__ import annotations

import io
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import drawings
import numpy as np
import torch
from common import sources
from common.sampling import PADDING, Key
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

IGNORED = -100  # label of a row that only fills a batch, as in torch and transformers
FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")

# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The pictures of a split, not decoded.

    Attributes:
        labels: class of each row, (N,).
        read: returns the picture of a row, in any mode.
        name: returns the name of a row for messages.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], Image.Image]
    name: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)


def load(
    dataset: str | None,
    split: str,
    *,
    config: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    limit: int | None = None,
) -> Source:
    """Return the pictures of one split.

    Args:
        dataset: None (drawn by drawings.py), a folder, a parquet file, or a name on the Hugging Face hub. A folder
            contains `<split>/<class>/<picture>`, like ImageNet's, or `<split>.parquet`, or shards
            `<split>-00000-of-00002.parquet`. Rows of parquet files and of the hub have a picture and an integer label.
        limit: largest number of rows, a fixed random choice, because folders are sorted by class.
    Raises:
        ValueError: no such rows can be read. The message names the file or the argument to change.
    """
    if dataset is None:
        source = _drawn(split)
    elif (folder := Path(dataset).expanduser() / split).is_dir():
        source = _folder(folder)
    else:
        where = f"--dataset {dataset}, split {split!r}"
        source = _rows(_read(dataset, split, config), where, image_column, label_column)
    if len(source) == 0:
        raise ValueError(f"--dataset {dataset}: has no rows in split {split!r}: at least one is needed.")
    return source if limit is None else _some(source, limit)


def _some(source: Source, limit: int) -> Source:
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:limit])
    return Source(
        source.labels[chosen],
        source.classes,
        lambda row: source.read(int(chosen[row])),
        lambda row: source.name(int(chosen[row])),
    )


def _drawn(split: str) -> Source:
    if split not in drawings.SIZES:
        names = ", ".join(drawings.SIZES)
        raise ValueError(f"the drawn pictures have no split {split!r}, only {names}: choose one, or set --dataset.")
    labels = np.array([drawings.label(number) for number in range(drawings.SIZES[split])])
    return Source(
        labels, drawings.CLASSES, lambda row: drawings.draw(split, row), lambda row: f"drawing {row} of {split}"
    )


def _folder(folder: Path) -> Source:
    """Read a tree `<class>/<picture>`: classes and their pictures in alphabetical order."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder}: has no folders: a folder for each class is needed. Set --dataset.")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(entry.path for entry in os.scandir(folder / name) if entry.name.lower().endswith(FILES))
        if not found:
            raise ValueError(
                f"{folder / name}: has no picture ({', '.join(FILES)}): each class needs at least one. Remove the "
                "folder, or fill it."
            )
        paths += found
        labels += [label] * len(found)
    table = np.array(paths)  # one block of memory, shared with the workers
    return Source(np.array(labels), tuple(classes), lambda row: Image.open(table[row]), lambda row: str(table[row]))


def _read(dataset: str, split: str, config: str | None) -> datasets.Dataset:
    path = Path(dataset).expanduser()
    if path.is_dir() and config is None:
        stems = [file.stem for file in path.glob("*.parquet")]
        if not any(stem == split or stem.startswith(f"{split}-") for stem in stems):
            splits = {stem.split("-")[0] for stem in stems} | {entry.name for entry in path.iterdir() if entry.is_dir()}
            raise ValueError(
                f"--dataset {dataset}: has no split {split!r}, neither as a folder of classes nor as {split}.parquet "
                f"({'only ' + ', '.join(sorted(splits)) if splits else 'it is empty'}). Set --dataset or the split."
            )
    return sources.load(dataset, split, config, {".parquet": "parquet"})


def _rows(rows: datasets.Dataset, where: str, image_column: str, label_column: str) -> Source:
    for column, flag in ((image_column, "--image-column"), (label_column, "--label-column")):
        if column not in rows.column_names:
            raise ValueError(f"{where}: has no column {column!r}, only {', '.join(rows.column_names)}. Set {flag}.")
    feature = rows.features[label_column]
    labels = np.asarray(rows.data.column(label_column).to_numpy())
    if labels.dtype.kind not in "iu":  # text, or integers with gaps, which Arrow returns as floats
        raise ValueError(f"{where}: column {label_column!r} holds {feature}, must hold an integer in every row.")
    kind = rows.features[image_column]
    try:
        # Read bytes here, so that `decode`, which knows the file's name, meets a damaged file.
        rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow and datasets raise different errors
        raise ValueError(
            f"{where}: column {image_column!r} holds {kind} instead of pictures. Set --image-column."
        ) from error

    def name(row: int) -> str:
        return f"row {row} of {where} ({found(row)['path'] or 'no file name'})"

    def read(row: int) -> Image.Image:
        content, path = (one := found(row))["bytes"], one["path"]
        if content is None and path is None:
            raise ValueError("the row has no picture")
        return Image.open(path if content is None else io.BytesIO(content))

    def found(row: int) -> dict[str, Any]:
        return rows[row][image_column] or {"bytes": None, "path": None}

    known = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    classes = known or tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))
    source = Source(labels.astype(np.int64), classes, read, name)
    check_labels(source, len(classes))
    return source


def check_labels(source: Source, classes: int) -> None:
    """Raise ValueError, naming the first row's file, if a label is not a class."""
    if len(wrong := np.flatnonzero((source.labels < 0) | (source.labels >= classes))):
        row = int(wrong[0])
        raise ValueError(
            f"{source.name(row)}: has label {source.labels[row]}, must lie in 0 to {classes - 1} ({len(wrong)} such "
            "rows). A split without labels cannot be scored: set another."
        )


# --- one picture ------------------------------------------------------------------------------------------------------


class Damaged(ValueError):
    """A picture that cannot be decoded. The message contains its name."""


def decode(source: Source, row: int) -> Image.Image:
    """Return a row's picture in RGB, from any mode. Transparency is dropped, and so is the low byte of 16 bits.

    Raises:
        Damaged: the file is cut short, is not a picture, exceeds Pillow's limit of pixels, or has values of 32 bits
            outside of 0 to 255.
    """
    try:
        return _eight_bits(source.read(row)).convert("RGB")
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, Image.DecompressionBombError) as error:
        raise Damaged(f"{source.name(row)}: cannot be decoded ({sources.first_line(error)}).") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture in a mode that Pillow converts: of grey in 16 or 32 bits it makes all above 255 white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        lowest, highest = image.getextrema()
        if not 0 <= lowest <= highest <= 255:
            raise ValueError(f"grey values from {lowest:g} to {highest:g}, must lie in 0 to 255")
    return image


@dataclass(frozen=True)
class Training:
    """Random resized crop, mirroring, and jitter of colours.

    Attributes:
        size: pixels of a side.
        smallest: smallest area of a crop, as a fraction of the picture. Its ratio of sides is between 3/4 and 4/3.
        jitter: brightness, contrast and saturation are each multiplied by a random factor in [1 - jitter, 1 + jitter].

    Source of the crop: Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842, section 6.
    """

    size: int
    smallest: float = 0.08
    jitter: float = 0.0

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Return the picture as (size, size)."""
        box = random_box(image.width, image.height, self.smallest, random)
        # Crop first: `resize(box=...)` would blend pixels from outside the box into its edges.
        image = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(random.uniform(1 - self.jitter, 1 + self.jitter))
        return image


@dataclass(frozen=True)
class Evaluation:
    """Resizes the shorter side to size / part and crops the middle (size, size)."""

    size: int
    part: float = 0.875

    def __call__(self, image: Image.Image, random: np.random.Generator | None = None) -> Image.Image:
        """Return the picture as (size, size)."""
        shorter = int(self.size / self.part)
        width, height = image.size
        longer = int(shorter * max(width, height) / min(width, height))
        target = (shorter, longer) if width <= height else (longer, shorter)
        if target != image.size:
            image = image.resize(target, Image.Resampling.BILINEAR)
        left, top = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def random_box(width: int, height: int, smallest: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop in pixels, with random area, ratio of sides and place.

    After ten crops that do not fit, the largest crop in the middle with a ratio of sides between 3/4 and 4/3.
    """
    for _ in range(10):
        area = width * height * random.uniform(smallest, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# --- loading ---------------------------------------------------------------------------------------------------------


class _Pictures(Dataset[Any]):
    """Data set of the workers: a key becomes (picture (H, W, 3) as bytes, label), or a message if it is damaged."""

    def __init__(self, source: Source, change: Training | Evaluation, seed: int) -> None:
        self._source, self._change, self._seed = source, change, seed

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int] | str:
        epoch, row = key
        if row == PADDING:
            return np.zeros((self._change.size, self._change.size, 3), np.uint8), IGNORED
        try:
            image = decode(self._source, row)
        except Damaged as error:
            return str(error)  # raised by the reader: a worker would wrap it in a traceback
        changed = self._change(image, np.random.default_rng((self._seed, 1, epoch, row)))
        return np.asarray(changed), int(self._source.labels[row])


def _collate(found: list[tuple[np.ndarray, int] | str]) -> dict[str, Any]:
    whole = [one for one in found if not isinstance(one, str)]
    return {
        "pictures": torch.from_numpy(np.stack([picture for picture, _ in whole])) if whole else None,
        "labels": torch.tensor([label for _, label in whole]),
        "damaged": [one for one in found if isinstance(one, str)],
    }


def _start_worker(_: int) -> None:
    """Ignore Ctrl-C: the rank handles it, saves, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """Batches of pictures: {"pictures": uint8 (B, H, W, 3), "labels": int64 (B,)}. Worker processes read ahead.

    Args:
        workers: number of processes; 0: read in this one.
        skip: leave out damaged pictures and add their messages to `skipped`, instead of raising at the first.
    """

    def __init__(self, source: Source, change: Training | Evaluation, seed: int, workers: int, skip: bool) -> None:
        self._pictures, self._workers, self._skip = _Pictures(source, change, seed), workers, skip
        self.skipped: set[str] = set()

    def __call__(self, keys: Iterator[list[Key]] | Sequence[list[Key]]) -> Iterator[dict[str, Any]]:
        """Yield the batches of some keys, in their order.

        Raises:
            ValueError: a picture is damaged and `skip` is off, or all pictures of a batch are damaged.
        """
        loader = DataLoader(
            self._pictures,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if self._workers else None,  # the default until Python 3.13
            generator=torch.Generator(),  # without one it draws from torch's global state, which dropout uses
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self._workers else None,
        )
        for batch in loader:
            if damaged := batch.pop("damaged"):
                if not self._skip:
                    raise ValueError(f"{damaged[0]} Mend or remove it, or set --skip-damaged.")
                self.skipped.update(damaged)
                if batch["pictures"] is None:
                    raise ValueError(f"{damaged[0]} So are all {len(damaged)} pictures of its batch: nothing is left.")
            yield batch


def normalise(pictures: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Return bytes (B, H, W, 3) as fp32 (B, 3, H, W), channels last: (x / 255 - mean) / deviation, per channel."""
    return ((pictures.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
