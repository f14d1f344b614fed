"""The weights in a sharding library's own checkpoint, read by one process without the ranks that wrote it.

A Trainer and Accelerate write the same files in other folders, beside the masks.
Each library's own reader is used: DeepSpeed's consolidation (zero_to_fp32), torch.distributed.checkpoint.
Both unpickle: DeepSpeed all of its files, torch the small `.metadata`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from gap_ds.method.plan import clean_name
from gap_ds.storage.safetensors import LazyTensors

#: Bytes of tensors that are read together.
_AT_ONCE = 2**27


def weights(folder: Path) -> Mapping[str, Tensor]:
    """Parameters and buffers of a checkpoint FOLDER/TAG by name, in fp32 where the optimizer has them so.

    A tied parameter may be there under each of its names. Each tensor is read, or put together, when it is looked up.

    Raises:
        ValueError: the files do not say enough to be read like this, or cannot be read; one sentence.
    """
    if (read := _reader(folder)) is not None:
        return read()
    if any((folder / "state").glob("rank_*_of_*.pt")):
        raise ValueError(
            f"{folder}: fairscale's own files do not say where their pieces lie; resume the run with as many ranks and "
            "call engine.export, or save the checkpoint with portable=True."
        )
    if any(folder.glob("mp_rank_*_model_states.pt")):
        raise ValueError(
            f"{folder}: DeepSpeed consolidates checkpoints of ZeRO-1, -2 and -3 alone; resume the run and call "
            "engine.export, or save the checkpoint with portable=True."
        )
    raise ValueError(f"{folder}: holds no files of weights of DeepSpeed, PyTorch or fairscale.")


def exists(folder: Path) -> bool:
    """True if a checkpoint has files of a sharding library that can be read like this."""
    return _reader(folder) is not None


def _reader(folder: Path) -> Callable[[], Mapping[str, Tensor]] | None:
    # A Trainer and Accelerate have a folder for DeepSpeed, and one or a file for FSDP, beside the masks.
    for path in (folder / "state", *sorted(folder.glob("pytorch_model_fsdp_*"))):
        if (path / ".metadata").is_file():
            return partial(_distributed, path)
    for path in (folder, *sorted(folder.glob("global_step*")), folder / "pytorch_model"):
        if any(path.glob("*_optim_states.pt")):
            return partial(_consolidated, path)
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return partial(_whole, folder / "pytorch_model_fsdp.bin")
    return None


def _whole(path: Path) -> Mapping[str, Tensor]:
    """The model in a file of whole tensors, which is mapped and not read at once."""
    try:
        found: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path}: torch.load cannot read it ({error}).") from error
    tensors = {clean_name(name): tensor for name, tensor in found.items()}
    return LazyTensors(tensors, lambda name: tensors[name].contiguous())


def _distributed(folder: Path) -> Mapping[str, Tensor]:
    """The model in a checkpoint of torch.distributed.checkpoint, read a few tensors at a time."""
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling a damaged file can raise anything
        raise ValueError(f"{folder}: torch.distributed.checkpoint cannot read it ({error}).") from error
    prefix = "model."
    about = {
        clean_name(key.removeprefix(prefix)): (key, tensor)
        for key, tensor in stored.items()
        if key.startswith(prefix) and isinstance(tensor, TensorStorageMetadata)
    }
    held: dict[str, Tensor] = {}

    def look_up(name: str) -> Tensor:
        if name not in held:
            held.clear()
            held.update(_read_from(folder, name, about))
        return held[name]

    return LazyTensors(about, look_up)


def _read_from(folder: Path, first: str, about: Mapping[str, tuple[str, TensorStorageMetadata]]) -> dict[str, Tensor]:
    """A tensor, and those after it that take little memory with it: a call costs much more than a small tensor."""
    names = list(about)
    found: dict[str, Tensor] = {}
    size = 0
    for name in names[names.index(first) :]:
        shape, dtype = about[name][1].size, about[name][1].properties.dtype
        size += shape.numel() * dtype.itemsize
        if found and size > _AT_ONCE:
            break
        found[name] = torch.empty(shape, dtype=dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is: this is one process
        wanted = {about[name][0]: tensor for name, tensor in found.items()}
        load_distributed(wanted, checkpoint_id=folder, no_dist=True)
    return found


def _consolidated(folder: Path) -> Mapping[str, Tensor]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ModuleNotFoundError:
        raise ValueError(f"{folder}: deepspeed, which reads it, is not installed. Run pip install deepspeed.") from None
    printed = io.StringIO()  # it prints its progress
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name, lazy_mode=True)
        # ZeRO-1 lists only what the optimizer has; what is frozen is whole in the working copy, where there is one.
        for path in folder.glob("mp_rank_00_model_states.pt"):
            working: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["module"]
            found = {**working, **found}
    except Exception as error:
        raise ValueError(f"{folder}: DeepSpeed's zero_to_fp32 cannot read it ({error}).") from error
    tensors = {clean_name(name): tensor for name, tensor in found.items()}
    return LazyTensors(tensors, lambda name: tensors[name].contiguous())
