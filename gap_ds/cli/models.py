"""A model without weights: the module tree and the shapes on the meta device, from a preset, a config or a hub id."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gap_ds.cli.presets import PRESETS, VOCAB_SIZE

#: Tried in this order where a config does not say, or says in vain, which class it is for.
_AUTO = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification")


def meta_model(name: str, vocab_size: int | None = None) -> nn.Module:
    """A model whose parameters have shapes and no values; code that comes with a model is never run.

    Args:
        name: a preset; else a Hugging Face config.json or the folder of one; else a hub id. A preset comes first
            (write ./big for a folder of that name), and what is there as a file or folder is not looked up on the hub.
        vocab_size: of a preset, which knows no vocabulary.
    Raises:
        ValueError: there is no such model, or transformers cannot build it.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("transformers is not installed: --model needs it. Run pip install transformers.") from None
    transformers.logging.set_verbosity_error()
    if preset := PRESETS.get(name):
        config = transformers.M2M100Config(vocab_size=vocab_size or VOCAB_SIZE, **preset.m2m100())
        config.architectures = ["M2M100ForConditionalGeneration"]
    elif vocab_size is not None:
        raise ValueError(f"--vocab-size {vocab_size}: has no effect, because {name} has its own vocabulary. Remove it.")
    else:
        config = _read_config(name, transformers)
    with torch.device("meta"):
        return _build(name, config, transformers)


def _read_config(name: str, transformers: Any) -> Any:
    path = Path(name).expanduser()
    is_here = path.exists()
    if not is_here and (path.suffix == ".json" or name.startswith((".", "/", "~"))):
        raise ValueError(f"--model {name}: there is no such file or folder.")
    if is_here and path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {name}: the folder holds no config.json.")
    try:
        return transformers.AutoConfig.from_pretrained(
            str(path) if is_here else name, trust_remote_code=False, local_files_only=is_here
        )
    except Exception as error:  # of the hub, the network, the JSON or the model: all mean the same to the user
        if is_here:
            raise ValueError(
                f"--model {name}: is no config of a model that transformers knows ({_reason(error)})."
            ) from error
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--model {name}: is neither a preset ({', '.join(PRESETS)}) nor a file or folder, and from the hub it "
            f"could not be had ({_reason(error)}).{hint}"
        ) from error


def _build(name: str, config: Any, transformers: Any) -> nn.Module:
    """The model of a config: of the class it names first, else of the first Auto class that takes it."""
    try:
        for architecture in config.architectures or ():
            cls = getattr(transformers, architecture, None)
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                model: nn.Module = cls(config)
                return model
        for auto in _AUTO:
            try:
                model = getattr(transformers, auto).from_config(config, trust_remote_code=False)
                return model
            except ValueError:  # not a class of this config
                continue
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        return model
    except Exception as error:  # whatever a model's constructor makes of an impossible config
        raise ValueError(
            f"--model {name}: transformers cannot build a {type(config).__name__} model from it ({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of a foreign error."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs code of its own, which gap-ds never runs"
    first = text.partition("\n")[0].rstrip(" .:")
    return first or type(error).__name__
