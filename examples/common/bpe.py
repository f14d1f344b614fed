"""A byte-level BPE tokenizer, trained on the text of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common import runtime

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, the order of M2M100's configuration


def of_run(folder: Path, texts: Iterable[str], vocab_size: int, *, end: bool, trained: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run, which rank 0 trains once and saves in `folder`; the other ranks come after it.

    Args:
        trained: the folder has it already.
    """
    if runtime.rank() == 0 and not trained:
        train(texts, vocab_size, end=end).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def train(texts: Iterable[str], vocab_size: int, *, end: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most `vocab_size` entries. Equal texts give equal tokenizers.

    Ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then the 256 bytes. Nothing precedes the text.
    `decode(ids, skip_special_tokens=True)` restores any text, up to Unicode's NFC form: every byte has an entry, and
    "</s>" inside a text is not a special token.

    Args:
        end: put </s> at the end of every sequence.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"a vocabulary of {vocab_size}: must have at least {smallest} entries. Set --vocab-size.")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    # No blank before the first word: every decoder would have to remove it again.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if end:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
        )
    bos, pad, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
