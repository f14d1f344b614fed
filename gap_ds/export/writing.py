"""The weights and the config of a model, written to a folder by its `save_pretrained` where that can be trusted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.export.info import INFO, renew_digests
from gap_ds.export.weights import Counted, first_difference, is_weights, opened, write_weights
from gap_ds.method.plan import clean_name
from gap_ds.storage.json import read_json, write_json


def write_model(folder: Path, module: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Counted]:
    """Writes the weights of a model, and what else its `save_pretrained` writes; returns what the files must hold.

    The files of a transformers model are its own, if they hold the weights. All others become model.safetensors, where
    a tied weight has all its names; files that the model's `save_pretrained` adds stay if they hold these weights.
    """
    own = getattr(module, "save_pretrained", None)
    model = getattr(own, "__self__", module)  # the one inside a wrapper
    is_transformers = _is_transformers(model)
    declared = getattr(model, "all_tied_weights_keys", {}) if is_transformers else {}
    known = {*declared, *declared.values()}
    # Copies, as transformers refuses tensors that share memory.
    tied = {name: weights[one].clone() for name, one in tied_names(module, weights).items() if name not in known}
    weights = weights | tied
    written = {name: Counted.of(weight) for name, weight in weights.items()}
    if not callable(own):
        write_weights(folder / "model.safetensors", weights)
        return written
    before = set(folder.rglob("*"))
    with _holding(model, weights):
        save_pretrained(model, folder, state_dict=dict(weights))
    if is_transformers:
        with suppress(ValueError):  # an adapter's folder has no such config
            complete_config(folder / "config.json", dtype)
        left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
        saved = {name: counted for name, counted in written.items() if name not in left_out}
        if first_difference(folder, saved) is None:
            return saved
    files = [path for path in folder.rglob("*") if is_weights(path) and path.is_file() and path not in before]
    others = [path for path in files if not path.name.startswith("model.safetensors")]
    keep = all(path.suffix == ".json" or _holds(path, written) for path in others)
    for path in files:
        if not (keep and path in others):
            path.unlink()
    write_weights(folder / "model.safetensors", weights)
    return written


def _is_transformers(model: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _holds(path: Path, written: Mapping[str, Counted]) -> bool:
    """True if a file is one of safetensors, and all its tensors are among those."""
    try:
        with opened(path) as tensors:
            return all(written.get(name) == tensor.counted for name, tensor in tensors.items())
    except ValueError:
        return False


def tied_names(module: nn.Module, names: Container[str]) -> dict[str, str]:
    """The further names of parameters and buffers that a strict `load_state_dict` asks for, each with that in `names`.

    >>> a = nn.Linear(2, 2); tied_names(nn.ModuleDict({"a": a, "b": a}), {"a.weight", "a.bias"})
    {'b.weight': 'a.weight', 'b.bias': 'a.bias'}
    """
    groups: dict[int, list[str]] = {}
    buffers = {id(buffer) for buffer in module.buffers()}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        # Flat sharding leaves views of its flat parameter in the place of parameters.
        views = [(k, v) for k, v in vars(owner).items() if isinstance(v, Tensor) and id(v) not in buffers]
        for key, tensor in (*owner._parameters.items(), *owner._buffers.items(), *views):
            if tensor is not None and key not in owner._non_persistent_buffers_set:
                groups.setdefault(id(tensor), []).append(clean_name(f"{prefix}.{key}" if prefix else key))
    return {
        name: first
        for group in groups.values()
        for first in [name for name in group if name in names][:1]
        for name in group
        if name not in names
    }


@contextmanager
def _holding(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `state_dict` of the model and of every module in it returns the weights of the export.

    For a `save_pretrained` that drops the `state_dict` it is given: rank 0 is alone here, and a sharded module has
    neither the whole weights nor the masks.
    """

    def holding(root: str) -> Callable[..., dict[str, Tensor]]:
        def state_dict(*_: Any, destination: Any = None, prefix: str = "", **__: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {} if destination is None else destination
            found |= {prefix + n.removeprefix(root): w for n, w in weights.items() if n.startswith(root)}
            return found

        return state_dict

    modules = {name: part for name, part in model.named_modules() if "state_dict" not in vars(part)}
    try:
        for name, part in modules.items():
            vars(part)["state_dict"] = holding(f"{clean_name(name)}." if name else "")
        yield
    finally:
        for part in modules.values():
            vars(part).pop("state_dict", None)


def save_pretrained(model: Any, folder: Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, with weights under the names and in the shapes that the model has.

    By default transformers 5 goes back to the names of earlier versions for some models, and splits or joins weights.
    The model's config stays as it is: the values that transformers sets in it are about the files. In an exported
    folder gap.json gets the digests of the new weights.
    """
    parameters = inspect.signature(model.save_pretrained).parameters
    if "save_original_format" in parameters:
        options["save_original_format"] = False
    if "state_dict" not in parameters and all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
        options.pop("state_dict", None)
    config = getattr(model, "config", None)
    before = {key: getattr(config, key) for key in ("dtype", "architectures") if hasattr(config, key)}
    try:
        model.save_pretrained(folder, **options)
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    if (folder / INFO).is_file():
        renew_digests(folder)


def complete_config(path: Path, dtype: torch.dtype, architecture: str | None = None) -> None:
    """The working copies may be bf16 where the exported weights are fp32: the config must name the file's dtype.

    Args:
        architecture: class of the model, for a config that names none.
    """
    config = read_json(path, dict[str, Any])
    config["dtype"] = str(dtype).removeprefix("torch.")
    if architecture is not None and not config.get("architectures"):
        config["architectures"] = [architecture]
    write_json(path, dict(sorted(config.items())))
