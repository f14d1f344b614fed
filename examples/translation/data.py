"""Read sentence pairs and turn them into token ids.

    load_rows -> bpe.train -> encode -> batching.TokenBatches -> batching.batches

Rows stay in memory-mapped Arrow files: millions of them need no Python lists.
"""

from __future__ import annotations

import bz2
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import sources

logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
CORPUS = Path(__file__).parent / "corpus"  # the default data set: 12,000, 500 and 500 sentence pairs
SPLITS = ("train", "validation", "test")

# --- rows -------------------------------------------------------------------------------------------------------------


def load_rows(
    dataset: str | None,
    split: str,
    source: str,
    target: str,
    *,
    config: str | None = None,
    limit: int | None = None,
) -> datasets.Dataset:
    """Return the rows of one split, with string columns `source` and `target`.

    Args:
        dataset: None (the shipped corpus, in English and German), a folder, a file, or a name on the Hugging Face hub.
            A folder contains `<split>.parquet`, `<split>.jsonl` or shards `<split>-00000-of-00002.parquet`. A file is
            read for any split.
        source, target: language keys of the rows' `translation`: {"en": ..., "de": ...}.
        config: configuration of a hub data set ("de-en"), or the folder of that name in a local one.
        limit: largest number of rows; the first ones are taken.
    Raises:
        ValueError: no such rows can be read. The message names the flag to change.
    """
    if source == target:
        raise ValueError(
            f"source and target are both {source!r}: must be two languages. Set --source-lang or --target-lang."
        )
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} rows for split {split!r}: must be at least 1, or not given.")
    rows = _shipped(split) if dataset is None else sources.load(dataset, split, config, BUILDERS)
    where = "the shipped corpus" if dataset is None else f"--dataset {dataset}"
    if len(rows) == 0:
        raise ValueError(f"{where} has no rows in split {split!r}: at least one is needed. Set --dataset.")
    _check_languages(rows.features, source, target, where)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    # Flatten and rename only relabel Arrow columns; they copy no text.
    rows = rows.select_columns(["translation"]).flatten()
    rows = rows.select_columns([f"translation.{source}", f"translation.{target}"])
    rows = rows.rename_columns({f"translation.{source}": "source", f"translation.{target}": "target"})
    _check_text(rows, {"source": source, "target": target}, split, where)
    return rows


def _shipped(split: str) -> datasets.Dataset:
    if split not in SPLITS:
        names = ", ".join(SPLITS)
        raise ValueError(f"the shipped corpus has no split {split!r}, only {names}: choose one, or set --dataset.")
    with bz2.open(CORPUS / f"{split}.jsonl.bz2", "rt", encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


def _check_languages(features: datasets.Features, source: str, target: str, where: str) -> None:
    if "translation" not in features:
        raise ValueError(
            f"{where} has the columns {', '.join(features)}: WMT-style rows with a column 'translation' are needed. "
            "Set --dataset."
        )
    translation = features["translation"]
    if isinstance(translation, datasets.Translation):
        languages = {language: datasets.Value("string") for language in translation.languages}
    elif isinstance(translation, Mapping):
        languages = dict(translation)
    else:
        raise ValueError(
            f"{where}: 'translation' holds {translation}: must be a dict of one text for each language. Set --dataset."
        )
    for language, flag in ((source, "--source-lang"), (target, "--target-lang")):
        if language not in languages:
            raise ValueError(f"{where} has no language {language!r}, only {', '.join(sorted(languages))}: set {flag}.")
        kind = getattr(languages[language], "dtype", languages[language])
        if kind not in ("string", "large_string", "null"):
            raise ValueError(f"{where}: language {language!r} holds {kind} instead of text: set {flag} or --dataset.")


def _check_text(rows: datasets.Dataset, languages: Mapping[str, str], split: str, where: str) -> None:
    """Raise ValueError, naming the first row, where a row has no text."""
    for column, language in languages.items():
        values = rows.data.column(column)
        if values.null_count:
            row = values.is_null().index(True).as_py()
            raise ValueError(
                f"{where}: row {row} of split {split!r} has no text in {language!r} ({values.null_count} such rows): "
                f"every row needs both languages. Set --dataset, --source-lang or --target-lang."
            )


# --- tokens -----------------------------------------------------------------------------------------------------------


def texts(rows: datasets.Dataset) -> Iterator[str]:
    """Yield all source and target texts, for `bpe.train`. Reads a thousand rows at a time."""
    for batch in rows.iter(batch_size=1000):
        yield from batch["source"]
        yield from batch["target"]


def _encode_batch(
    batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    eos = tokenizer.eos_token_id
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": [], "target_length": []}
    sources = tokenizer(batch["source"], return_attention_mask=False)["input_ids"]
    targets = tokenizer(text_target=batch["target"], return_attention_mask=False)["input_ids"]
    for source, target in zip(sources, targets, strict=True):
        # Some tokenizers put a language code after the end of the sentence, others add no end of sentence.
        source = source if eos in source[-2:] else [*source, eos]
        target = target if eos in target[-2:] else [*target, eos]
        length = max(len(source), len(target))
        if length <= max_length:
            for column, value in zip(columns, (source, target, length, len(target)), strict=True):
                columns[column].append(value)
    return columns


def encode(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Return token ids of the rows: `input_ids`, `labels`, `length` (the longer of the two) and `target_length`.

    Both sequences have an end-of-sentence token. Pairs with more than `max_length` tokens on either side are left out;
    a log line counts them. Set `src_lang` and `tgt_lang` of a multilingual tokenizer first.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sentence token: translation needs one. Set --model-name.")
    if max_length < 1:
        raise ValueError(f"a length of {max_length} tokens: must be at least 1. Set --max-length.")
    ids = datasets.Sequence(datasets.Value("int32"))
    number = datasets.Value("int32")
    encoded = rows.map(
        _encode_batch,
        batched=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
        features=datasets.Features({"input_ids": ids, "labels": ids, "length": number, "target_length": number}),
        desc="encode",
    )
    dropped = len(rows) - len(encoded)
    if not len(encoded):
        raise ValueError(f"all {len(rows)} pairs are longer than {max_length} tokens: set --max-length to more.")
    if dropped:
        logger.warning("left out %d of %d pairs longer than %d tokens", dropped, len(rows), max_length)
    return encoded
