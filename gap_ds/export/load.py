"""`load_compact`: the model of a compact folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gap_ds.export.compact_file import CompactTensor, read, read_contents
from gap_ds.export.info import has_model_config
from gap_ds.storage.errors import printable, summarize_error

#: Options of `from_pretrained` that say where config and weights are.
_WITHOUT_EFFECT = ("config", "state_dict", "subfolder", "variant", "gguf_file")


def load_compact(folder: str | Path, **options: Any) -> Any:
    """The model of a compact folder, equal bit for bit to the dense export's, in evaluation mode, on the CPU.

    A folder with the config.json of a transformers model becomes that model; code that comes with a model is never run.
    Any other folder becomes a dict of tensors, for `load_state_dict`. Weights become dense one at a time: the memory is
    that of the model and one of them.

    Args:
        options: for `from_pretrained`, such as `dtype`. Those that name other files have no effect and are refused.
    Raises:
        ValueError: the file is truncated, damaged, or does not fit the config; one sentence.
    """
    folder = Path(folder)
    if without := [name for name in options if name in _WITHOUT_EFFECT]:
        raise ValueError(f"{without[0]}: has no effect here, config and weights are those of {folder}. Leave it out.")
    if not has_model_config(folder):
        if options:
            raise ValueError(
                f"{folder}: has no config.json of a transformers model, so there is no use for {', '.join(options)}."
            )
        return dict(read(folder))
    stored = read_contents(folder).tensors  # before transformers is imported
    import transformers

    path = folder / "config.json"
    with _usable(path):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = (getattr(config, "architectures", None) or [""])[0]
    architecture: Any = getattr(transformers, str(name), None)
    if not _is_model(architecture, transformers.PreTrainedModel):
        raise ValueError(
            f"{path}: names the architecture {printable(str(name))!r}, which transformers "
            f"{transformers.__version__} does not have. Load its weights with gap_ds.export.compact_file.read."
        )
    _check_shapes(folder, architecture, config, stored)

    def build(weights: dict[str, Tensor]) -> Any:
        with _usable(path):
            model, found = architecture.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                **{**options, "ignore_mismatched_sizes": True, "output_loading_info": True},
            )
        strange = (found["missing_keys"], found["unexpected_keys"], (key[0] for key in found["mismatched_keys"]))
        if wrong := [str(name) for names in strange for name in names]:
            raise ValueError(f"{folder}: the weights do not fit config.json (first: {printable(min(wrong))}).")
        return model

    # First with placeholders that take no memory: all elements of one are the same.
    model = build(
        {tensor.name: torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape) for tensor in stored}
    )
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if _can_be_filled(places, stored):
        for key, tensor in read(folder):
            places[key].data = tensor.to(places[key].device, places[key].dtype)
    else:
        model = build(dict(read(folder)))
    if (path := folder / "generation_config.json").is_file():
        with _usable(path):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.name_or_path = str(folder)
    return model


def _is_model(found: Any, base: Any) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _check_shapes(folder: Path, architecture: Any, config: Any, stored: Sequence[CompactTensor]) -> None:
    """ValueError: a weight has another shape than in the model of the config, which is built without memory."""
    try:
        with torch.device("meta"):
            wanted = architecture(copy.deepcopy(config)).state_dict()
    except Exception:  # some models cannot be built like this; a wrong config shows when it is built for good
        return
    for tensor in stored:
        if tensor.name in wanted and tuple(wanted[tensor.name].shape) != tensor.shape:
            raise ValueError(
                f"{folder}: the weights do not fit config.json ({printable(tensor.name)} has the shape {tensor.shape}, "
                f"by the config {tuple(wanted[tensor.name].shape)}). Get the config again that was exported with them."
            )


def _can_be_filled(places: Mapping[str, Tensor], stored: Sequence[CompactTensor]) -> bool:
    """True if each tensor has a separate place in the model, in which it can be stored as it is.

    If not (earlier names, one weight under two names, quantization, other devices), transformers must see the values.
    """
    found = [places[tensor.name] for tensor in stored if tensor.name in places]
    return len({id(place) for place in found}) == len(stored) and all(
        not place.is_meta
        and tuple(place.shape) == tensor.shape
        and place.is_floating_point() == tensor.dtype.is_floating_point
        for place, tensor in zip(found, stored, strict=True)
    )


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turns any error of transformers about a file into one sentence."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            reason = (
                "its model needs code from its folder, which is never run. Load its weights with "
                "gap_ds.export.compact_file.read"
            )
        else:
            reason = f"transformers cannot use it ({summarize_error(error)}). Get the file again that was exported"
        raise ValueError(f"{path}: {reason}.") from error
