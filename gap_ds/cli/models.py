"""Models without weights, on the meta device: from a preset, a config, a hub id, timm or a function of the user."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gap_ds.cli.presets import PRESETS, VOCAB_SIZE

#: Tried in this order if a config names no class, or one that transformers does not have.
_AUTO = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification")


def meta_model(name: str, vocab_size: int | None = None) -> nn.Module:
    """Return a model on the meta device. Code that comes with a model is never run.

    Args:
        name: a preset, else package.module:function, else a Hugging Face config.json or its folder, else a model of
            timm, else a hub id. Write ./big for a folder with the name of a preset. An existing file or folder is not
            looked up on the hub.
        vocab_size: vocabulary size of a preset.
    Raises:
        ValueError: there is no such model, or it cannot be built.
    """
    if vocab_size is not None and name not in PRESETS:
        raise ValueError(f"--vocab-size {vocab_size}: has no effect, because {name} has its own vocabulary. Remove it.")
    is_path = Path(name).expanduser().exists()
    if not is_path and re.fullmatch(r"[\w.]+:[\w.]+", name):
        return _call(name)
    if not (is_path or name in PRESETS) and (model := _of_timm(name)) is not None:
        return model
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("transformers is not installed: --model needs it. Run pip install transformers.") from None
    transformers.logging.set_verbosity_error()
    if preset := PRESETS.get(name):
        config = transformers.M2M100Config(vocab_size=vocab_size or VOCAB_SIZE, **preset.m2m100())
        config.architectures = ["M2M100ForConditionalGeneration"]
    else:
        config = _read_config(name, transformers)
    with torch.device("meta"):
        return _build(name, config, transformers)


def _call(name: str) -> nn.Module:
    """Return the model that a function package.module:function builds. The current folder is searched first."""
    module, _, path = name.partition(":")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        with torch.device("meta"):
            model = found()
    except Exception as error:  # of the user's code
        raise ValueError(f"--model {name}: {type(error).__name__}: {_reason(error)}.") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name}: returns a {type(model).__name__}, must return a torch.nn.Module.")
    return model


def _of_timm(name: str) -> nn.Module | None:
    """Return a model of timm, without its weights; None if timm is not installed or has none of this name."""
    try:
        import timm
    except ImportError:  # also where its torchvision does not fit torch
        return None
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        return None
    with torch.device("meta"):
        model: nn.Module = timm.create_model(short, pretrained=False)
    return model


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
    except Exception as error:  # of the hub, the network, the JSON or the model; one sentence fits all
        if is_here:
            raise ValueError(
                f"--model {name}: is no config of a model that transformers knows ({_reason(error)})."
            ) from error
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--model {name}: is neither a preset ({', '.join(PRESETS)}) nor a file, folder or module:function, and "
            f"the hub does not deliver it ({_reason(error)}).{hint}"
        ) from error


def _build(name: str, config: Any, transformers: Any) -> nn.Module:
    """Return the model of a config: of the first class that it names, else of the first Auto class that accepts it."""
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
    except Exception as error:  # constructors fail in many ways on an impossible config
        raise ValueError(
            f"--model {name}: transformers cannot build a {type(config).__name__} model from it ({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error of another library."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs custom code, which gap-ds never runs"
    first = text.partition("\n")[0].rstrip(" .:")
    return first or type(error).__name__
