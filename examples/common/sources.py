"""Read data sets from files and from the Hugging Face hub, with a one-line error for any failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

#: Options of builders of datasets. A text file's documents are its paragraphs, which empty lines separate.
OPTIONS = {"text": {"sample_by": "paragraph"}}


def load(dataset: str, split: str, config: str | None, builders: Mapping[str, str]) -> datasets.Dataset:
    """Return the rows of one split.

    Args:
        dataset: a folder, a file, or a name on the Hugging Face hub. A folder contains `<split>.parquet` (or another
            ending of `builders`) or shards `<split>-00000-of-00002.parquet`. A file is read for any split.
        config: configuration of a hub data set, or the folder of that name in a local one.
        builders: ending of a file -> kind of its content, as in `from_files`.
    Raises:
        ValueError: no such rows can be read. The message names the flag to change.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _read_files(_split_files(path, split, config, builders), dataset, builders)
    if path.is_file():
        if path.suffix not in builders:
            raise ValueError(
                f"--dataset {dataset}: a file must end in {', '.join(builders)}, not {path.suffix!r}. Set --dataset."
            )
        return _read_files([path], dataset, builders)
    return from_hub(dataset, split, config, endings=tuple(builders))


def _split_files(folder: Path, split: str, config: str | None, builders: Mapping[str, str]) -> list[Path]:
    """Return the files of a split in a folder: one, or all shards."""
    if config is not None:
        if not (folder / config).is_dir():
            raise ValueError(
                f"--dataset {folder} has no folder {config!r}: leave --dataset-config away for a folder of split files."
            )
        folder = folder / config
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in builders)
    found = [file for file in files if file.stem == split or file.stem.startswith(f"{split}-")]
    if not found:
        raise ValueError(_no_split(folder, split, files, builders))
    if len({(file.stem == split, file.suffix) for file in found}) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"--dataset {folder}: split {split!r} may be any of {names}: keep one kind, or set --dataset to a file."
        )
    total = found[0].stem.rpartition("-of-")[2]
    if found[0].stem != split and total.isdigit() and int(total) != len(found):
        raise ValueError(
            f"--dataset {folder}: split {split!r} has {len(found)} of {int(total)} shards: all are needed. "
            "Complete the folder or set --dataset."
        )
    return found


def _no_split(folder: Path, split: str, files: Sequence[Path], builders: Mapping[str, str]) -> str:
    if not files:
        return (
            f"--dataset {folder} holds no {', '.join(builders)} file: "
            f"set --dataset to a folder with {split}.parquet or {split}.jsonl."
        )
    splits = sorted({file.stem.split("-")[0] for file in files})
    similar = [name for name in splits if name.startswith(f"{split}_")]
    if similar:
        names = ", ".join(similar)
        return f"--dataset {folder} has no split {split!r} but {names}: choose one, --{split}-split {similar[0]}."
    flag = f"--{split}-split" if split in ("train", "validation", "test") else "the name of the split"
    return f"--dataset {folder} has no split {split!r}, only {', '.join(splits)}: set {flag} or --dataset."


def _read_files(files: Sequence[Path], dataset: str, builders: Mapping[str, str]) -> datasets.Dataset:
    if any(file.stat().st_size == 0 for file in files):
        raise ValueError(f"--dataset {dataset}: {files[0].name} is empty: at least one row is needed. Set --dataset.")
    return from_files(files, builders[files[0].suffix], dataset)


def from_files(files: Sequence[Path], builder: str, dataset: str) -> datasets.Dataset:
    """Return the rows of files of one kind.

    Args:
        builder: kind of the files, such as "parquet" or "json".
        dataset: value of --dataset, for messages.
    Raises:
        ValueError: a file cannot be read.
    """
    options = OPTIONS.get(builder, {})
    try:
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)
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
