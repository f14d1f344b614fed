"""Read data sets from files and from the Hugging Face hub, with a one-line error for any failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets


def from_files(files: Sequence[Path], builder: str, dataset: str) -> datasets.Dataset:
    """Return the rows of files of one kind.

    Args:
        builder: kind of the files, such as "parquet" or "json".
        dataset: value of --dataset, for messages.
    Raises:
        ValueError: a file cannot be read.
    """
    try:
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train")
    except Exception as error:  # pyarrow, pandas and datasets raise different errors for a damaged file
        raise ValueError(
            f"--dataset {dataset}: {files[0].name} cannot be read as {builder} ({first_line(error)}). Set --dataset."
        ) from error


def from_hub(dataset: str, split: str, config: str | None, endings: tuple[str, ...]) -> datasets.Dataset:
    """Return one split of a data set on the hub.

    Args:
        endings: endings of local files; a missing path with one of them is not looked up on the hub.
    Raises:
        ValueError: the name is that of a missing local path, or the hub has no such split.
    """
    local = dataset == "" or dataset.startswith((".", "/", "~")) or dataset.endswith(("/", *endings))
    if local or dataset.count("/") > 1 or "\\" in dataset:  # a hub name has at most one slash
        raise ValueError(f"--dataset {dataset}: no such file or folder (looked in {Path.cwd()}). Set --dataset.")
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # network, name, configuration and split have separate errors
        wanted = dataset + (f", --dataset-config {config}" if config else "")
        raise ValueError(
            f"--dataset {wanted}: neither a local file or folder, nor could split {split!r} be loaded from the hub "
            f"({first_line(error)}). Set --dataset or --dataset-config."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its deepest cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
