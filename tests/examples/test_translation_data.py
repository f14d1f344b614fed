"""examples/translation: the shipped corpus, reading data, the tokenizer, and the batches."""

import doctest
import json
import threading
import unicodedata
from pathlib import Path

import batching
import data
import datasets
import numpy as np
import pytest
import torch
from common import bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, M2M100Config

MULTI30K = Path(__file__).resolve().parents[3] / "shared" / "data" / "wmt16_multi30k"

needs_multi30k = pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"real data is not on this machine: {MULTI30K}")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Arrow files of these tests go to a temporary folder."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("arrow")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


# --- the shipped corpus -----------------------------------------------------------------------------------------------


def test_splits_are_disjoint_in_both_languages():
    splits = {split: data.load_rows(None, split, "en", "de") for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12_000, "validation": 500, "test": 500}
    for column in ("source", "target"):
        texts = [text for rows in splits.values() for text in rows[column]]
        assert len(set(texts)) == len(texts)
        assert all(4 <= len(text.split()) <= 18 and text[0].isupper() and text[-1] in ".?" for text in texts)
        assert not any("  " in text or " ," in text for text in texts)


def test_doctests():
    assert doctest.testmod(data).failed == doctest.testmod(batching).failed == 0


# --- rows -------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"translation": {"en": f"row {i}", "de": f"Zeile {i}"}} for i in range(start, start + count)]


def test_shipped_rows():
    english = "A friend believed that every student sent this young brother a new table."
    german = "Ein Freund hat geglaubt, dass jeder Student diesem jungen Bruder einen neuen Tisch geschickt hat."
    rows = data.load_rows(None, "test", "de", "en", limit=1)
    assert rows.column_names == ["source", "target"]
    assert list(rows) == [{"source": german, "target": english}]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_folder_and_file(tmp_path, suffix):
    write(tmp_path / f"train.{suffix}", pairs(3))
    file = write(tmp_path / f"test.{suffix}", pairs(2, start=10))
    assert data.load_rows(str(tmp_path), "train", "en", "de")["source"][:] == ["row 0", "row 1", "row 2"]
    assert data.load_rows(str(tmp_path), "train", "en", "de", limit=2)["target"][:] == ["Zeile 0", "Zeile 1"]
    assert data.load_rows(str(file), "train", "de", "en")["source"][:] == ["Zeile 10", "Zeile 11"]


def test_shards_and_configuration_folder(tmp_path):
    for number in range(3):
        write(tmp_path / "de-en" / f"train-0000{number}-of-00003.parquet", pairs(2, start=2 * number))
    rows = data.load_rows(str(tmp_path), "train", "en", "de", config="de-en")
    assert rows["source"][:] == [f"row {i}" for i in range(6)]
    (tmp_path / "de-en" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"'train' has 2 of 3 shards.*--dataset"):
        data.load_rows(str(tmp_path), "train", "en", "de", config="de-en")


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({"train.jsonl": pairs(1)}, ("train", "en", "en"), r"both 'en'.*--source-lang.*--target-lang"),
        ({"train.jsonl": pairs(1)}, ("train", "en", "fr"), r"no language 'fr', only de, en.*--target-lang"),
        ({"train.jsonl": pairs(1)}, ("train", "fr", "en"), r"no language 'fr', only de, en.*--source-lang"),
        ({"train.jsonl": [{"text": "x"}]}, ("train", "en", "de"), r"columns text: .*'translation'.*--dataset"),
        ({"train.jsonl": [{"translation": "x"}]}, ("train", "en", "de"), r"must be a dict of one text.*--dataset"),
        (
            {"train.jsonl": [{"translation": {"en": 1, "de": "x"}}]},
            ("train", "en", "de"),
            r"'en' holds int64 instead of text.*--source-lang",
        ),
        (
            {"train.jsonl": [*pairs(2), {"translation": {"en": None, "de": "x"}}]},
            ("train", "en", "de"),
            r"row 2 of split 'train' has no text in 'en' \(1 such rows\)",
        ),
        (
            {"train.jsonl": [*pairs(1), {"translation": None}]},
            ("train", "en", "de"),
            r"row 1 of split 'train' has no text in 'en'",
        ),
        ({"train.jsonl": []}, ("train", "en", "de"), r"train.jsonl is empty.*--dataset"),
        (
            {"train.jsonl": pairs(1)},
            ("validation", "en", "de"),
            r"no split 'validation', only train.*--validation-split",
        ),
        (
            {"test_2016_flickr.jsonl": pairs(1), "test_2017_flickr.jsonl": pairs(1)},
            ("test", "en", "de"),
            r"no split 'test' but test_2016_flickr, test_2017_flickr: choose one, --test-split test_2016_flickr",
        ),
        (
            {"train.jsonl": pairs(1), "train.parquet": pairs(1)},
            ("train", "en", "de"),
            r"any of train.jsonl, train.parq",
        ),
        ({"train.txt": pairs(1)}, ("train", "en", "de"), r"holds no .parquet, .jsonl, .json file.*--dataset"),
    ],
)
def test_unusable_folders(tmp_path, files, arguments, message):
    for name, rows in files.items():
        write(tmp_path / name, rows)
    with pytest.raises(ValueError, match=message):
        data.load_rows(str(tmp_path), *arguments)


def test_other_unusable_input(tmp_path, monkeypatch):
    for missing in ("./nothing", str(tmp_path / "nothing"), "nothing.parquet", "a/b/c"):
        with pytest.raises(ValueError, match=r"no such file or folder.*Set --dataset"):
            data.load_rows(missing, "train", "en", "de")
    damaged = tmp_path / "train.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train.parquet cannot be read as parquet.*--dataset"):
        data.load_rows(str(damaged), "train", "en", "de")
    with pytest.raises(ValueError, match=r"a file must end in .parquet, .jsonl, .json, not '.txt'"):
        data.load_rows(str(write(tmp_path / "train.txt", pairs(1))), "train", "en", "de")
    with pytest.raises(ValueError, match=r"no split 'dev', only train, validation, test"):
        data.load_rows(None, "dev", "en", "de")
    with pytest.raises(ValueError, match=r"shipped corpus has no language 'fr', only de, en.*--target-lang"):
        data.load_rows(None, "test", "en", "fr")
    with pytest.raises(ValueError, match=r"limit of 0 .*at least 1"):
        data.load_rows(None, "test", "en", "de", limit=0)

    def offline(name, config, split):
        raise ConnectionError("cannot reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"wmt/wmt14, --dataset-config de-en: neither a local .*cannot reach the hub\)"
    ):
        data.load_rows("wmt/wmt14", "train", "en", "de", config="de-en")


def test_hub_features(monkeypatch):
    """Sets on the hub declare their pairs as `Translation`, not as a plain dict."""
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    hub = datasets.Dataset.from_list(pairs(4), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: hub)
    rows = data.load_rows("wmt/wmt14", "train", "de", "en", config="de-en", limit=2)
    assert list(rows) == [{"source": f"Zeile {i}", "target": f"row {i}"} for i in range(2)]


@needs_multi30k
def test_multi30k():
    rows = data.load_rows(str(MULTI30K), "test_2016_flickr", "en", "de")
    assert len(rows) == 1000 and rows.column_names == ["source", "target"]
    with pytest.raises(ValueError, match=r"--test-split test_2016_flickr"):
        data.load_rows(str(MULTI30K), "test", "en", "de")
    tokenizer = bpe.train(data.texts(rows), 1000, end=True)
    for text in rows["target"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return data.load_rows(None, "test", "en", "de")


@pytest.fixture(scope="module")
def tokenizer(rows):
    return bpe.train(data.texts(rows), 600, end=True)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(bpe.SPECIAL_TOKENS) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert len(tokenizer) == 600
    ids = tokenizer("Der alte Mann")["input_ids"]
    assert ids[-1] == 2 and not set(ids[:-1]) & {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"vocabulary of 100: must have at least 260 entries. Set --vocab-size"):
        bpe.train(["a"], 100, end=True)


TEXTS = [
    "Käse, Größe — „so“, 'so' ...",
    "  two  spaces \n",
    "a </s> b <pad>",
    "🦊👩‍👩‍👧 日本語",
    "don 't ' s n't . , !",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_again(tokenizer, tmp_path, text):
    M2M100Config().save_pretrained(tmp_path)  # as in a finished model's folder
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, again):
        assert one.decode(one(text)["input_ids"], skip_special_tokens=True) == text
        assert one(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert one(text_target=text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.pad_token_id == 1 and again.eos_token_id == 2


@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_survives_up_to_nfc(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_training_a_tokenizer_is_deterministic(rows, tokenizer):
    assert bpe.train(data.texts(rows), 600, end=True).get_vocab() == tokenizer.get_vocab()


def test_encode(rows, tokenizer, caplog):
    encoded = data.encode(rows, tokenizer, 100)
    assert len(encoded) == len(rows) and not caplog.records
    row = encoded[7]
    assert row["input_ids"] == tokenizer(rows[7]["source"])["input_ids"] and row["input_ids"][-1] == 2
    assert row["labels"] == tokenizer(rows[7]["target"])["input_ids"] and row["labels"][-1] == 2
    assert row["length"] == max(len(row["input_ids"]), len(row["labels"])) and row["target_length"] == len(
        row["labels"]
    )

    short = data.encode(rows, tokenizer, 25)
    assert 0 < len(short) < len(rows) and max(short["length"]) <= 25
    assert f"left out {len(rows) - len(short)} of 500 pairs longer than 25 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"all 500 pairs are longer than 2 tokens: set --max-length"):
        data.encode(rows, tokenizer, 2)


# --- batches ----------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 30), min_size=6, max_size=120)


def global_batches(lengths, batch_tokens, world_size, accumulation, epoch=0, seed=0):
    """The steps of an epoch as sets of rows, gathered from all ranks; checks what the ranks have in common."""
    ranks = []
    for rank in range(world_size):
        sampler = batching.TokenBatches(
            lengths, lengths, batch_tokens, world_size=world_size, rank=rank, accumulation=accumulation, seed=seed
        )
        steps = list(sampler.epoch(epoch))
        assert len(steps) == sampler.steps_per_epoch
        ranks.append(steps)
    batches = []
    for index, steps in enumerate(zip(*ranks, strict=True)):
        assert {(step.epoch, step.index, step.target_tokens) for step in steps} == {
            (epoch, index, steps[0].target_tokens)
        }
        assert all(len(step.micro_batches) == accumulation and all(step.micro_batches) for step in steps)
        rows = [row for step in steps for micro in step.micro_batches for row in micro]
        assert sum(lengths[row] for row in rows) == steps[0].target_tokens
        batches.append(sorted(rows))
    return batches


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_every_row_once_in_every_epoch(lengths, batch_tokens, world_size, accumulation):
    counts = set()
    for epoch in range(3):
        batches = global_batches(lengths, batch_tokens, world_size, accumulation, epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        counts.add(len(batches))
    assert len(counts) == 1


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(360, 1000), st.integers(0, 3), st.integers(0, 3))
def test_the_same_steps_for_any_number_of_ranks(lengths, batch_tokens, epoch, seed):
    # 360 = 2 x 3 ranks x 2 accumulation steps x 30 tokens: from there on the promise holds
    expected = global_batches(lengths, batch_tokens, 1, 1, epoch, seed)
    for batch in expected:
        assert len(batch) * max(lengths[row] for row in batch) <= batch_tokens
    for world_size, accumulation in [(2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]:
        assert global_batches(lengths, batch_tokens, world_size, accumulation, epoch, seed) == expected


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(0, 3), st.data())
def test_resuming_inside_an_epoch_skips_its_first_steps(lengths, batch_tokens, epoch, draw):
    sampler = batching.TokenBatches(lengths, lengths, batch_tokens, world_size=2, rank=1, seed=5)
    again = batching.TokenBatches(lengths, lengths, batch_tokens, world_size=2, rank=1, seed=5)
    start = draw.draw(st.integers(0, sampler.steps_per_epoch))
    assert list(again.epoch(epoch, start)) == list(sampler.epoch(epoch))[start:]


def test_epochs_and_seeds_differ():
    lengths = np.arange(1000) % 20 + 1
    sampler = batching.TokenBatches(lengths, lengths, 200)
    assert list(sampler.epoch(0)) != list(sampler.epoch(1))
    assert list(sampler.epoch(0)) != list(batching.TokenBatches(lengths, lengths, 200, seed=1).epoch(0))


def test_steps_are_filled():
    lengths = np.random.default_rng(0).integers(5, 40, 5000)
    sampler = batching.TokenBatches(lengths, lengths, 2048)
    padded = [len(rows) * max(lengths[rows]) for step in sampler.epoch(0) for rows in step.micro_batches]
    assert np.mean(padded) > 0.95 * 2048
    assert lengths.sum() > 0.97 * sum(padded)


def test_sampler_errors():
    with pytest.raises(ValueError, match=r"3 rows for 2 ranks x 2 accumulation steps: at least 4"):
        batching.TokenBatches([1, 2, 3], [1, 2, 3], 100, world_size=2, accumulation=2)
    with pytest.raises(ValueError, match=r"batches of 0 tokens.*--batch-tokens"):
        batching.TokenBatches([1], [1], 0)
    with pytest.raises(ValueError, match=r"step 2 of an epoch: must lie in \[0, 1\]"):
        next(batching.TokenBatches([1], [1], 10).epoch(0, 2))


def test_collate_pads_to_a_multiple():
    batch = batching.collate(
        [{"input_ids": [5, 6, 2], "labels": [7, 2]}, {"input_ids": [2], "labels": [2]}], 1, multiple_of=4
    )
    assert batch["input_ids"].tolist() == [[5, 6, 2, 1], [2, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 2, -100, -100], [2, -100, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.fixture(scope="module")
def encoded(rows, tokenizer):
    return data.encode(rows, tokenizer, 100)


def batch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_hold_the_rows_of_their_step(encoded):
    sampler = batching.TokenBatches.of(encoded, 1024, accumulation=2)
    seen = []
    for step, micro_batches in batching.batches(encoded, sampler, 3, 2, pad_id=1):
        assert step.target_tokens == sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        for rows, batch in zip(step.micro_batches, micro_batches, strict=True):
            assert (
                batch["input_ids"].tolist() == batching.collate([encoded[row] for row in rows], 1)["input_ids"].tolist()
            )
        seen.append(step)
    assert seen == list(sampler.epoch(3, 2))
    assert not batch_threads()


def test_the_thread_ends_with_its_reader(encoded):
    sampler = batching.TokenBatches.of(encoded, 256)
    reader = batching.batches(encoded, sampler, 0, 0, pad_id=1, prefetch=1)
    next(reader)
    assert len(batch_threads()) == 1
    reader.close()
    assert not batch_threads()


def test_an_error_in_the_thread_reaches_the_reader(encoded):
    sampler = batching.TokenBatches.of(encoded, 256)
    with pytest.raises(IndexError):
        list(batching.batches(encoded.select(range(10)), sampler, 0, 0, pad_id=1))
    assert not batch_threads()
