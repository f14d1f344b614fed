"""Load a pretrained model and its tokenizer from a folder or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load(kind: Any, what: str, name: str, **options: Any) -> Any:
    """Return a pretrained model. A folder is never looked up on the hub.

    Args:
        kind: Auto class of transformers.
        what: kind of the model in words, for messages.
        options: of `from_pretrained`, such as `dtype`. Code that comes with a model runs only with `trust_remote_code`.
    Raises:
        ValueError: there is no such model.
    """
    try:
        return kind.from_pretrained(name, local_files_only=Path(name).is_dir(), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {name!r}: must be a folder or hub name of {what} that transformers can load"
            f' ({reason}). Set "--model-name" or "--model-dir".'
        ) from error


def tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a pretrained model. A folder is never looked up on the hub.

    Raises:
        ValueError: the model has none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=Path(name).is_dir()
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name!r}: has no tokenizer ({reason}). Set --model-name or --model-dir.") from error
