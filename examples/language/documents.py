"""Read documents and turn them into token ids.

    load -> bpe.train -> encode -> packing.Packed

Documents and token ids stay in memory-mapped Arrow files: a corpus needs no Python lists.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import sources

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SPLITS = ("train", "validation", "test")

#: Of so many documents in a row of a source without splits, the first is for validation and the second for the test.
HELD_OUT_EVERY = 20


def load(
    dataset: str | None,
    split: str,
    *,
    config: str | None = None,
    column: str = "text",
    limit: int | None = None,
) -> datasets.Dataset:
    """Return the documents of one split, with a string column `text`.

    Args:
        dataset: None (Python's own documentation), a folder with `<split>.parquet`, `.jsonl` or `.txt`, or shards of
            one; a file; or a name on the Hugging Face hub. The documents of a text file are its paragraphs. A file has
            no splits: see HELD_OUT_EVERY.
        column: of the documents; `translation.en` for a field of a column.
        limit: largest number of documents, a fixed random choice, because sources are often sorted.
    Raises:
        ValueError: no such documents can be read. The message names the flag to change.
    """
    if dataset is None:
        rows = _part(datasets.Dataset.from_dict({"text": python_documentation()}), split)
    else:
        rows = sources.load(dataset, split, config, BUILDERS)
        rows = _part(rows, split) if Path(dataset).expanduser().is_file() else rows
        rows = _column(rows, column, f"--dataset {dataset}")
    if limit is not None:
        rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:limit]))
    if not len(rows):
        raise ValueError(f"--dataset {dataset}: has no documents in split {split!r}: at least one is needed.")
    return rows


def _part(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    """Return the rows of a split of a source without splits."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of a source without splits: must be one of {', '.join(SPLITS)}.")
    held_out = {"validation": 0, "test": 1}
    wanted = set(range(2, HELD_OUT_EVERY)) if split == "train" else {held_out[split]}
    return rows.select([row for row in range(len(rows)) if row % HELD_OUT_EVERY in wanted])


def _column(rows: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """Return the rows with the column of the documents alone, called `text`."""
    if column not in rows.column_names and "." in column:
        rows = rows.select_columns([outer] if (outer := column.split(".")[0]) in rows.column_names else []).flatten()
    if column not in rows.column_names:
        names = ", ".join(rows.column_names) or "none of that name"
        raise ValueError(f"{where}: has no column {column!r}, only {names}. Set --text-column.")
    rows = rows.select_columns([column])
    rows = rows if column == "text" else rows.rename_column(column, "text")
    kind = getattr(rows.features["text"], "dtype", rows.features["text"])
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"{where}: column {column!r} holds {kind} instead of text. Set --text-column.")
    return rows


@functools.cache
def python_documentation() -> list[str]:
    """Return the documentation that comes with Python: its language topics, and the docstrings of its modules.

    Depends on the version of Python. Licence: that of Python (PSF).
    """
    from pydoc_data import topics

    documents = [re.sub(r"\n{3,}", "\n\n", topics.topics[name]).strip() for name in sorted(topics.topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if text := _docstring(path):
            documents.append(f"{path.stem}\n\n{text}")
    return list(dict.fromkeys(documents))


def _docstring(path: Path) -> str | None:
    """Return the docstring of a module, read from its first token alone: parsing all modules takes seconds."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.STRING:
                return inspect.cleandoc(str(ast.literal_eval(token.string)))
            if token.type not in (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL):
                break
    return None


def texts(rows: datasets.Dataset) -> Iterator[str]:
    """Yield all documents, for `bpe.train`. Reads a hundred at a time."""
    for batch in rows.iter(batch_size=100):
        yield from (text for text in batch["text"] if text)


def encode(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Return token ids `input_ids` and UTF-8 length `bytes` of every document that is not empty.

    A document begins with the tokenizer's start token (its end token if it has none) and ends with its end token, so
    that each of its tokens and its end can be predicted.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-sentence token: documents need one. Set --model-name.")
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = rows.map(
        _encode_batch,
        batched=True,
        batch_size=100,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "start": start, "end": end},
        features=datasets.Features(
            {"input_ids": datasets.Sequence(datasets.Value("int32")), "bytes": datasets.Value("int64")}
        ),
        desc="encode",
    )
    if not len(encoded):
        raise ValueError("all documents are empty. Set --dataset or --text-column.")
    return encoded


def _encode_batch(
    batch: Mapping[str, list[str | None]], tokenizer: PreTrainedTokenizerBase, start: int, end: int
) -> dict[str, Any]:
    found = [text for text in batch["text"] if text]
    if not found:
        return {"input_ids": [], "bytes": []}
    ids: Iterable[list[int]] = tokenizer(found, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return {"input_ids": [[start, *one, end] for one in ids], "bytes": [len(text.encode()) for text in found]}
