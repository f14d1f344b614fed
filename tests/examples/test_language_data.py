"""examples/language: documents, packing and perplexity, against references that share no code with them."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path

import datasets
import decoder
import documents
import numpy as np
import packing
import perplexity
import pytest
import torch
from common import bpe, cross_entropy, run, sampling
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = [f"Document {i}: " + " ".join(f"word{(i * j) % 7}" for j in range(i % 13)) for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, one_thread: None):
    """Arrow files of these tests go to a temporary folder."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("arrow")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(TEXTS, 300, end=False)


def test_doctests() -> None:
    assert doctest.testmod(perplexity).failed == doctest.testmod(run).failed == 0


# -- documents ---------------------------------------------------------------------------------------------------------


def test_pythons_documentation() -> None:
    splits = {split: documents.load(None, split) for split in documents.SPLITS}
    texts = [text for rows in splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) > 150 and sum(map(len, texts)) > 400_000
    assert len(splits["train"]) > 15 * len(splits["validation"]) and any("lambda" in text for text in texts)
    assert documents.load(None, "train", limit=7)["text"] == documents.load(None, "train", limit=7)["text"]


def test_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": text, "other": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "validation.parquet")
    (tmp_path / "test.txt").write_text("\n\n".join(TEXTS))
    for split in documents.SPLITS:
        assert documents.load(str(tmp_path), split)["text"] == TEXTS, split
    parts = {split: documents.load(str(tmp_path / "train.jsonl"), split)["text"] for split in documents.SPLITS}
    assert parts["validation"] == TEXTS[::20] and parts["test"] == TEXTS[1::20]
    assert sorted(text for part in parts.values() for text in part) == sorted(TEXTS)
    pairs = [{"translation": {"en": text, "de": "x"}} for text in TEXTS]
    datasets.Dataset.from_list(pairs).to_parquet(tmp_path / "pairs.parquet")
    found = documents.load(str(tmp_path), "pairs", column="translation.en")
    assert found["text"] == TEXTS and found.column_names == ["text"]
    datasets.Dataset.from_dict({"a.b": TEXTS}).to_parquet(tmp_path / "dotted.parquet")
    assert documents.load(str(tmp_path), "dotted", column="a.b")["text"] == TEXTS


def test_documents_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a", "n": 1}\n')
    with pytest.raises(ValueError, match=r"no column 'body', only text, n. Set --text-column"):
        documents.load(str(tmp_path), "train", column="body")
    with pytest.raises(ValueError, match=r"'n' holds int64 instead of text. Set --text-column"):
        documents.load(str(tmp_path), "train", column="n")
    with pytest.raises(ValueError, match=r"no column 'n.x'"):
        documents.load(str(tmp_path), "train", column="n.x")
    with pytest.raises(ValueError, match=r"has no split 'test', only train: set --test-split"):
        documents.load(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"no documents in split 'test'"):
        documents.load(str(file), "test")
    with pytest.raises(ValueError, match=r"split 'dev' of a source without splits"):
        documents.load(None, "dev")


def test_a_document_has_a_start_and_an_end(tokenizer) -> None:
    rows = datasets.Dataset.from_dict({"text": ["Document ü", "", None, "word1"]})
    encoded = documents.encode(rows, tokenizer)
    assert encoded["bytes"] == [11, 5]
    for ids, text in zip(encoded["input_ids"], ["Document ü", "word1"], strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]) == text
    with pytest.raises(ValueError, match="all documents are empty"):
        documents.encode(rows.select([1, 2]), tokenizer)


# -- packing -----------------------------------------------------------------------------------------------------------


def pieces(docs: list[list[int]], context: int) -> list[list[tuple[list[int], list[int]]]]:
    """Rows as lists of (inputs, next tokens) of the pieces of documents on them, token by token."""
    stream = [(token, n, i) for n, doc in enumerate(docs) for i, token in enumerate(doc)]
    found: list[list[tuple[list[int], list[int]]]] = []
    for at, (token, number, _) in enumerate(stream[:-1]):
        if at % context == 0:
            found.append([])
            before = None
        if number != before:
            found[-1].append(([], []))
            before = number
        following, next_number, _ = stream[at + 1]
        found[-1][-1][0].append(token)
        found[-1][-1][1].append(following if next_number == number else cross_entropy.IGNORE)
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data(), context=st.integers(2, 9))
def test_packing(data: st.DataObject, context: int) -> None:
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=8))
    tokens = iter(range(10, 10_000))
    docs = [[next(tokens) for _ in range(length)] for length in lengths]
    wanted = pieces(docs, context)
    packed = packing.Packed([np.array(doc) for doc in docs], context)
    assert len(packed) == len(wanted)
    assert packed.predicted.sum() == sum(lengths) - len(lengths)  # all but the first of each document
    rows = packed.rows(range(len(packed)))
    assert packed.predicted.tolist() == (rows["labels"] != cross_entropy.IGNORE).sum(1).tolist()
    for number, row in enumerate(wanted):
        size = sum(len(ids) for ids, _ in row)
        assert rows["input_ids"][number, :size].tolist() == [token for ids, _ in row for token in ids]
        assert rows["labels"][number, :size].tolist() == [token for _, ids in row for token in ids]
        assert rows["position_ids"][number, :size].tolist() == [i for ids, _ in row for i in range(len(ids))]
        assert (rows["labels"][number, size:] == cross_entropy.IGNORE).all()
        if size < context:
            assert rows["position_ids"][number, size] == 0
    across = packing.Packed([np.array(doc) for doc in docs], context, across=True).rows(range(len(packed)))
    assert torch.equal(across["labels"], rows["labels"]) and torch.equal(across["input_ids"], rows["input_ids"])
    assert (across["position_ids"] == torch.arange(context)).all()


def test_packing_from_arrow_files_in_pieces(tokenizer) -> None:
    encoded = documents.encode(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer)
    parts = datasets.concatenate_datasets([encoded.select(range(a, a + 20)) for a in (0, 20, 40)])
    whole = packing.Packed([np.array(ids) for ids in encoded["input_ids"]], 16)
    for found in (packing.Packed.of(encoded, 16), packing.Packed.of(parts, 16)):
        assert len(found) == len(whole)
        for name, tensor in whole.rows(range(len(whole))).items():
            assert torch.equal(found.rows(range(len(found)))[name], tensor), name


def test_packing_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no tokens to predict"):
        packing.Packed([np.array([1])], 8)
    with pytest.raises(ValueError, match="context of 1 tokens: must be at least 2"):
        packing.Packed([np.array([1, 2])], 1)


# -- models and perplexity ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2_tiny", "llama_tiny"])
def model(request, tokenizer):
    torch.manual_seed(0)
    return decoder.build(request.param, tokenizer, context=16).eval()


def test_perplexity_is_that_of_a_plain_loop_over_pieces(model, tokenizer) -> None:
    docs = documents.encode(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer)["input_ids"]
    packed = packing.Packed([np.array(ids) for ids in docs], 16)
    nats, tokens = 0.0, 0
    for row in pieces(docs, 16):
        for ids, following in row:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0]
            for position, token in enumerate(following):
                if token != cross_entropy.IGNORE:
                    nats -= float(logits[position].double().log_softmax(-1)[token])
                    tokens += 1
    for batch_size in (1, 5):
        found = perplexity.score(lambda batch: model(**batch, use_cache=False).logits, packed, batch_size)
        assert found["tokens"] == tokens == packed.predicted.sum()
        assert math.isclose(found["loss"], nats / tokens, rel_tol=1e-6)
        assert found["perplexity"] == math.exp(found["loss"])
    blank = packed.rows([sampling.PADDING])
    assert perplexity.nats(model(input_ids=blank["input_ids"]).logits, blank["labels"]) == 0


def test_documents_are_kept_apart_or_the_model_is_refused(model) -> None:
    decoder.check_documents_apart(model)
    forward = model.forward

    def without_positions(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    model.forward = without_positions
    try:
        with pytest.raises(ValueError, match="attends across the documents of a row"):
            decoder.check_documents_apart(model)
    finally:
        del model.forward


def test_sizes(tokenizer) -> None:
    sizes = {}
    for preset in decoder.presets():
        with torch.device("meta"):
            sizes[preset] = sum(p.numel() for p in decoder.build(preset, range_tokenizer(), context=128).parameters())
    assert 9.9e6 < sizes["gpt2_10m"] < 10.1e6
    assert sizes["llama_1b"] < 1.3e9 and 7e9 < sizes["llama_8b"] < 8.1e9
    with pytest.raises(ValueError, match=r"preset='big': must be one of gpt2_10m, .*Set --preset"):
        decoder.build("big", tokenizer, context=8)
    small = decoder.build("gpt2_tiny", tokenizer, context=8, dropout=0.25)
    assert small.config.attn_pdrop == small.config.resid_pdrop == 0.25 and small.config.vocab_size == len(tokenizer)
    with pytest.raises(ValueError, match="context=9: the model has 8 positions"):
        decoder.check_context(small, 9)


def range_tokenizer():
    """Stands for a tokenizer of 8,000 entries, which would take seconds to train."""

    class Tokens:
        bos_token_id, eos_token_id, pad_token_id = 0, 2, 1

        def __len__(self) -> int:
            return 8_000

    return Tokens()
