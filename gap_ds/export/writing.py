"""The weights of a model, written to a folder one at a time, and the other files of its `save_pretrained`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gap_ds.export.info import INFO, renew_digests
from gap_ds.export.weights import Counted, ModelFiles, check_range, counts_of, is_weights, opened, weight_files
from gap_ds.method.plan import clean_name
from gap_ds.storage.json import read_json, write_json
from gap_ds.storage.safetensors import Layout, open_tensors


@dataclass(frozen=True)
class Stream:
    """The tensors of a model, of which only one is there at a time.

    layout: dtype and shape of each by name.
    tensors: names and tensors; on ranks other than 0, None for a tensor. All ranks go through them together, to the
        end.
    entries: names of the entries of each parameter that has some.
    """

    layout: Layout
    tensors: Iterator[tuple[str, Tensor | None]]
    entries: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """Figures of the tensors of a stream and of their entries (`counts`), and of the tensors in the files (`files`)."""

    counts: Mapping[str, Counted]
    files: Mapping[str, Counted]


def write_stream(folder: Path, module: nn.Module, stream: Stream, dtype: torch.dtype) -> Written:
    """Writes the weights of a model, as they come out of the stream. On rank 0.

    They become model.safetensors, or several files with their index. A tied weight has all its names, unless the model
    is of transformers and declares it.

    Raises:
        ValueError: `dtype` is float16, and a weight is too large for it.
    """
    model = _inside(module)
    is_transformers = _is_transformers(model)
    declared = getattr(model, "all_tied_weights_keys", {}) if is_transformers else {}
    known = {*declared, *declared.values()}
    left_out = (getattr(model, "_keys_to_ignore_on_save", None) or ()) if is_transformers else ()
    tied = {name: one for name, one in tied_names(module, stream.layout).items() if name not in known}
    source = {name: name for name in stream.layout} | tied
    layout = {name: stream.layout[one] for name, one in source.items() if name not in left_out}
    names: dict[str, list[str]] = {}
    for name in layout:
        names.setdefault(source[name], []).append(name)
    counts: dict[str, Counted] = {}
    with ModelFiles(folder, layout) as files:
        for one, weight in stream.tensors:
            assert weight is not None
            if dtype == torch.float16:
                check_range(one, weight)
            counts |= counts_of(one, weight, stream.entries.get(one, ()))
            for name in names.get(one, ()):
                files.write(name, weight)
            del weight  # before the next one comes
    return Written(counts, {name: counts[source[name]] for name in layout})


def complete(folder: Path, module: nn.Module, written: Mapping[str, Counted], dtype: torch.dtype) -> None:
    """Adds all else that the model's `save_pretrained` writes. On rank 0.

    Files of weights that it adds stay if they hold these weights.

    Args:
        written: figures of the tensors in the files.
    """
    model = _inside(module)
    if callable(getattr(module, "save_pretrained", None)):
        _add_own_files(folder, model, written)
    if _is_transformers(model):
        with suppress(ValueError):  # an adapter's folder has no such config
            complete_config(folder / "config.json", dtype)


def _inside(module: nn.Module) -> Any:
    """The model inside a wrapper that passes its `save_pretrained` on."""
    return getattr(getattr(module, "save_pretrained", None), "__self__", module)


def _add_own_files(folder: Path, model: Any, written: Mapping[str, Counted]) -> None:
    """Adds the files that a model's `save_pretrained` writes, but for other weights than those in the folder."""
    with ExitStack() as stack:
        aside = Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix="own_")))
        # Mapped from the files: whatever is not written again takes no memory.
        weights = {name: file.get_tensor(name) for file in _mapped(folder, stack) for name in file.keys()}  # noqa: SIM118
        with _holding(model, weights):
            save_pretrained(model, aside, state_dict={} if _writes_as_we_do(model) else weights)
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        found = [path for path in files if is_weights(path)]
        others = [path for path in found if not path.name.startswith("model.safetensors")]
        keep = all(path.suffix == ".json" or _holds(path, written) for path in others)
        for path in files:
            if path not in found or (keep and path in others):
                target = folder / path.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)


def _mapped(folder: Path, stack: ExitStack) -> list[Any]:
    """The open files of a folder's weights."""
    return [stack.enter_context(open_tensors(path)) for path in weight_files(folder)]


def _writes_as_we_do(model: Any) -> bool:
    """True for a model of transformers without adapters and quantization: its weights would be the files again."""
    if (
        not _is_transformers(model)
        or type(model).save_pretrained is not _transformers().PreTrainedModel.save_pretrained
    ):
        return False
    return not getattr(model, "_hf_peft_config_loaded", False) and getattr(model, "hf_quantizer", None) is None


def _transformers() -> Any:
    """The module of transformers, if it is loaded: without it there is no model of it."""
    return sys.modules.get("transformers")


def _is_transformers(model: Any) -> bool:
    transformers = _transformers()
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


def save_pretrained(model: Any, folder: str | Path, **options: Any) -> None:
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
    config: Any = getattr(model, "config", None)
    kept = ("dtype", "architectures", "distributed_config")
    before = {key: getattr(config, key) for key in kept if hasattr(config, key)}
    if config is not None and before.get("distributed_config") is not None and "state_dict" in options:
        # Else transformers would gather the weights with the other ranks, who are not here.
        config.distributed_config = None
    try:
        model.save_pretrained(folder, **options)
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    if (Path(folder) / INFO).is_file():
        renew_digests(Path(folder))


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
