"""The compact form of a sparse model: of each entry the bits of its mask and the kept weights, everything else whole.

    FOLDER/compact.safetensors   all weights; a safetensors file, described in docs/inference.md
    FOLDER/...                   config, tokenizer, gap.json and whatever else lay beside the weights

A weight is kept if any of its bits is set: NaN, infinities and -0.0 come back as they were, and the model that
`load_compact` returns equals the dense export bit for bit. An entry of N weights, k of them kept, takes N / 8 + k * b
bytes at b bytes a weight: 0.16 of a bf16 entry at 90 % sparsity. Files are written and read one tensor at a time.

Nothing is unpickled, no name in a file becomes a path, and no memory is taken for a tensor before its size was found to
agree with the file's. SHA-256 of every tensor and of the header refuse what was truncated or changed on its way; they
are no signature: who can write the file can write them, too.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gap_ds.export import folder as export
from gap_ds.export.folder import INFO, Progress, is_weights, weight_files, write_weights
from gap_ds.masks import bitmask
from gap_ds.parallel.items import printable
from gap_ds.sharding.comm import summarize_error
from gap_ds.storage import safetensors as tensorfile
from gap_ds.storage.safetensors import DTYPES, NAMES, encode, header_length, load_json

FILE = "compact.safetensors"
FORMAT = "gap_ds.compact"
VERSION = 1

#: Longest header that is read; safetensors itself stops there.
_MOST_HEADER = 100_000_000
_ZEROS = "0" * 64  # stands for a digest where there is none yet

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Stored:
    """A tensor of the model as the header describes it.

    kept: weights that have a bit set; None for a tensor that is stored whole.
    sha256: of the tensor's bytes in the file; of an entry those of its mask and then those of its values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: int | None
    sha256: str = _ZEROS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def parts(self) -> list[tuple[str, str, list[int]]]:
        """(name, dtype, shape) of what the file holds of it."""
        if self.kept is None:
            return [(self.name, NAMES[self.dtype], list(self.shape))]
        return [
            (f"{self.name}.mask", "U8", [bitmask.nbytes(self.numel)]),
            (f"{self.name}.values", NAMES[self.dtype], [self.kept]),
        ]

    @property
    def stored_bytes(self) -> int:
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in self.parts)


@dataclass(frozen=True)
class Header:
    """What a compact file says of itself. `signature` is that of the run, as in gap.json."""

    signature: str
    tensors: tuple[Stored, ...]


# -- write ----------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    entries: Container[str],
    signature: str = "",
    progress: Progress | None = None,
) -> Path:
    """Writes FOLDER/compact.safetensors, whole or not at all, and returns its path.

    Every tensor is asked for twice, and none is held while the next one is: `tensors` may read them from files.

    Args:
        entries: names of what may be stored as mask and values; an entry that would not get smaller is stored whole.
        progress: told after each tensor, in dense bytes.
    Raises:
        ValueError: a dtype that safetensors does not have, or two names that would be one in the file.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: _describe(name, tensors[name], name in entries) for name in tensors}
    header = Header(signature, tuple(stored.values()))
    _check_names(header)
    where, length = _offsets(header), len(_header_bytes(header))
    total, done = sum(tensor.dense_bytes for tensor in header.tensors), 0
    partial = path.with_name(FILE + ".partial")
    try:
        with partial.open("wb") as file:
            for name in tensors:
                digest = hashlib.sha256()
                for (part, *_), data in zip(stored[name].parts, _parts(stored[name], tensors[name]), strict=True):
                    file.seek(length + where[part][0])
                    file.write(data)
                    digest.update(data)
                stored[name] = replace(stored[name], sha256=digest.hexdigest())
                done += stored[name].dense_bytes
                if progress:
                    progress(name, done, total)
            file.seek(0)
            file.write(_header_bytes(Header(signature, tuple(stored.values()))))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _describe(name: str, tensor: Tensor, is_entry: bool) -> Stored:
    tensorfile.name_of(tensor.dtype, name)
    whole = Stored(name, tuple(tensor.shape), tensor.dtype, None)
    if not is_entry:
        return whole
    packed = replace(whole, kept=int(torch.count_nonzero(_words(tensor))))
    return packed if packed.stored_bytes < whole.stored_bytes else whole


def _words(tensor: Tensor) -> Tensor:
    """The bits of its elements as integers (N,), on the CPU: 0 is +0.0 and nothing else."""
    return tensor.detach().cpu().contiguous().view(-1).view(_WORDS[tensor.dtype.itemsize])


def _parts(stored: Stored, tensor: Tensor) -> list[Any]:
    """The bytes of each part, as arrays that share the memory of their tensors."""
    words = _words(tensor)
    if stored.kept is None:
        return [encode(words)]
    kept = words != 0
    values = words[kept]
    assert (tuple(tensor.shape), tensor.dtype, values.numel()) == (stored.shape, stored.dtype, stored.kept)
    return [encode(bitmask.pack(kept)), encode(values)]


# -- the header -----------------------------------------------------------------------------------------------------


def _check_names(header: Header) -> None:
    seen = {"__metadata__"}
    for tensor in header.tensors:
        for part, *_ in tensor.parts:
            if part in seen:
                raise ValueError(f"{printable(part)}: two tensors of a compact file would have this name.")
            seen.add(part)


def _offsets(header: Header) -> dict[str, tuple[int, int]]:
    """[begin, end) of each part after the header: wide dtypes first, so that all are aligned.

    >>> _offsets(Header("", (Stored("w", (3, 4), torch.float32, 5), Stored("b", (3,), torch.float32, None))))
    {'w.values': (0, 20), 'b': (20, 32), 'w.mask': (32, 34)}
    """
    parts = [part for tensor in header.tensors for part in tensor.parts]
    offsets, end = {}, 0
    for name, dtype, shape in sorted(parts, key=lambda part: -DTYPES[part[1]].itemsize):
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        offsets[name] = (begin, end)
    return offsets


def _table(header: Header) -> dict[str, Any]:
    """The header as JSON has it, but for its own digest."""
    tensors = {
        tensor.name: {
            "shape": list(tensor.shape),
            "dtype": NAMES[tensor.dtype],
            "kept": tensor.kept,
            "sha256": tensor.sha256,
        }
        for tensor in header.tensors
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "sha256": _ZEROS,
        "signature": header.signature,
        "tensors": json.dumps(tensors),
    }
    where = _offsets(header)
    parts = [part for tensor in header.tensors for part in tensor.parts]
    return tensorfile.table(((name, dtype, shape, where[name]) for name, dtype, shape in parts), metadata)


def _header_bytes(header: Header) -> bytes:
    """The first bytes of a file. The header's digest is that of its own text with zeros in the digest's place."""
    table = _table(header)
    table["__metadata__"]["sha256"] = hashlib.sha256(tensorfile.header_text(table)).hexdigest()
    return tensorfile.header_bytes(table)


_Dim = Annotated[int, Field(ge=0, lt=2**48)]


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    shape: Annotated[list[_Dim], Field(max_length=64)]
    dtype: str
    kept: _Dim | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _accept(text: bytes, area: int) -> Header:
    """The header with this text, of a file with `area` bytes after it.

    All sizes are derived from the model's own shapes and counts, and the header must say the same of each tensor.

    Raises:
        ValueError: it is damaged, or the file has another size.
    """
    table = load_json(text)
    metadata = table.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f'has not the format "{FORMAT}"')
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"has version {printable(str(metadata.get('version')))}, this gap_ds reads {VERSION}")
    digest, signature, listed = (metadata.get(key) for key in ("sha256", "signature", "tensors"))
    if not (isinstance(digest, str) and isinstance(signature, str) and isinstance(listed, str)):
        raise ValueError("its header lacks a digest, a signature or the list of tensors")
    if hashlib.sha256(text.replace(digest.encode(), _ZEROS.encode(), 1)).hexdigest() != digest:
        raise ValueError("its header was changed: it has another SHA-256")
    header = Header(signature, tuple(_tensor(name, said) for name, said in load_json(listed.encode()).items()))
    _check_names(header)
    wanted = _table(header)
    for name in wanted.keys() | table.keys():
        if name != "__metadata__" and wanted.get(name) != table.get(name):
            raise ValueError(f"its header contradicts itself about {printable(name)}")
    if area != (end := sum(tensor.stored_bytes for tensor in header.tensors)):
        raise ValueError(f"its tensors have {end} bytes, and {area} follow the header")
    return header


def _tensor(name: str, table: Any) -> Stored:
    try:
        said = _Said.model_validate(table)
        tensor = Stored(name, tuple(said.shape), DTYPES[said.dtype], said.kept, said.sha256)
    except (ValidationError, KeyError):
        raise ValueError(f"its header has a wrong, missing or unknown field for {printable(name)}") from None
    # An empty tensor's other dimensions are in no size that could be compared.
    if math.prod(max(dim, 1) for dim in tensor.shape) >= 2**48 or (tensor.kept or 0) > tensor.numel:
        raise ValueError(f"the shape of {printable(name)} is that of no weight")
    return tensor


# -- read -----------------------------------------------------------------------------------------------------------


def header(folder: str | Path) -> Header:
    """What FOLDER/compact.safetensors holds, without reading a weight.

    Raises:
        ValueError: there is no such file, or it is truncated, damaged or of another format; one sentence.
    """
    path = _path(folder)
    with _reading(path), path.open("rb") as file:
        return _read_header(file)[0]


def read(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of FOLDER/compact.safetensors, dense, on the CPU, in the order of the model.

    Raises:
        ValueError: as `header`, or at the tensor that is damaged.
    """
    with opened(folder) as tensors:
        yield from tensors.items()


@contextmanager
def opened(folder: str | Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of FOLDER/compact.safetensors, each read when it is asked for; errors as `read`."""
    path = _path(folder)
    with _reading(path), path.open("rb") as file:
        yield _Tensors(file)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open compact file, read when asked for."""

    def __init__(self, file: io.BufferedReader) -> None:
        found, self._start = _read_header(file)
        self._file, self._where = file, _offsets(found)
        self._stored = {stored.name: stored for stored in found.tensors}

    def __getitem__(self, name: str) -> Tensor:
        return _read_tensor(self._file, self._stored[name], self._start, self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _path(folder: str | Path) -> Path:
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    return path


class _reading:
    """Names the file in the sentence about what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}).") from None
        if isinstance(error, ValueError):
            raise ValueError(f"{self.path}: {error}. Get the file again, or write it anew.") from None


def _read_header(file: io.BufferedReader) -> tuple[Header, int]:
    """The header, and where the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    length = header_length(file.read(8), size, _MOST_HEADER)
    return _accept(file.read(length), size - 8 - length), 8 + length


def _read_tensor(file: io.BufferedReader, stored: Stored, start: int, where: Mapping[str, tuple[int, int]]) -> Tensor:
    digest = hashlib.sha256()
    parts = []
    for name, *_ in stored.parts:
        begin, end = where[name]
        data = torch.empty(end - begin, dtype=torch.uint8)
        array: Any = data.numpy()
        file.seek(start + begin)
        if file.readinto(array) != end - begin:
            raise ValueError(f"ends inside {printable(name)}")
        digest.update(array)
        parts.append(data)
    if digest.hexdigest() != stored.sha256:
        raise ValueError(f"{printable(stored.name)} was changed: it has another SHA-256")
    if stored.kept is None:
        return parts[0].view(stored.dtype).view(stored.shape)
    bits, values = parts
    used = stored.numel % 8 or 8  # bits of the last byte
    if bitmask.count(bits) != stored.kept or (bits.numel() and int(bits[-1]) >> used):
        raise ValueError(f"the mask of {printable(stored.name)} does not keep {stored.kept} weights")
    word = _WORDS[stored.dtype.itemsize]
    words = torch.zeros(stored.numel, dtype=word).masked_scatter_(bitmask.unpack(bits, stored.numel), values.view(word))
    return words.view(stored.dtype).view(stored.shape)


def load_compact(folder: str | Path, **options: Any) -> Any:
    """The model of a compact folder, equal bit for bit to the dense export's, in evaluation mode, on the CPU.

    A folder with a config.json becomes a Hugging Face model of the class that the config names; code that comes with a
    model is never run. Any other folder becomes a dict of tensors, for `load_state_dict`. Weights become dense one at a
    time: the memory is that of the model and one of them.

    Args:
        options: for `from_pretrained`, such as `dtype`.
    Raises:
        ValueError: the file is truncated, damaged, or does not fit the config; one sentence.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        if options:
            raise ValueError(f"{folder}: has no config.json, so there is no use for {', '.join(options)}.")
        return dict(read(folder))
    stored = header(folder).tensors  # before a library is imported for it
    import transformers

    path = folder / "config.json"
    with _usable(path):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = (getattr(config, "architectures", None) or [""])[0]
    architecture: Any = getattr(transformers, str(name), None)
    if not _is_model(architecture, transformers.PreTrainedModel):
        raise ValueError(
            f"{path}: names the architecture {printable(str(name))!r}, which transformers "
            f"{transformers.__version__} does not have. Load its weights with gap_ds.export.compact.read."
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
    model = build({tensor.name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for tensor in stored})
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


def _check_shapes(folder: Path, architecture: Any, config: Any, stored: Sequence[Stored]) -> None:
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


def _can_be_filled(places: Mapping[str, Tensor], stored: Sequence[Stored]) -> bool:
    """Whether each tensor has a place of its own in the model, as it is.

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
    """Turns whatever transformers says of a file that it cannot use into one sentence."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            reason = (
                "its model needs code of its own, which is never run. Load its weights with gap_ds.export.compact.read"
            )
        else:
            reason = f"transformers cannot use it ({_first_line(error)}). Get the file again that was exported"
        raise ValueError(f"{path}: {reason}.") from error


def _first_line(error: Exception) -> str:
    return printable(summarize_error(error))


# -- convert --------------------------------------------------------------------------------------------------------


def compact(
    source: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Converts an exported model folder into a compact one; `out` is whole or absent. Returns figures, for JSON.

    The weights are model.safetensors or what model.safetensors.index.json names; gap.json says which tensors are
    entries. All other files at the top of the folder are copied; the card and gap.json then say what is there.

    Raises:
        ValueError: `source` is no exported model or is damaged; `out` holds something and `overwrite` is not set, or it
            is no exported model.
    """
    source, out = Path(source), export.place(out)
    info = _read_info(source / INFO)
    with _folder(source, out, overwrite) as aside, ExitStack() as stack:
        try:
            files = _Files(weight_files(source), stack)
            if info.entries and set(info.entries).isdisjoint(files):
                name = printable(next(iter(info.entries)))
                raise ValueError(f"{source}: {name} and all other entries of {INFO} are in no file. Export it again.")
            write(aside, files, info.entries, info.signature, progress)
        except SafetensorError as error:
            raise ValueError(f"{source}: its weights are damaged ({printable(str(error))}). Export it again.") from None
    return figures(out)


def expand(source: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Converts a compact folder back into a dense one, for tools that know nothing of it; `out` is whole or absent.

    The tensors of its model.safetensors equal those of the first export bit for bit. Read and written one at a time.

    Raises:
        ValueError: as `read`; `out` holds something and `overwrite` is not set, or it is no exported model.
    """
    source, out = Path(source), export.place(out)
    header(source)
    with _folder(source, out, overwrite) as aside, opened(source) as tensors:
        write_weights(aside / "model.safetensors", tensors, progress)
    return out


@contextmanager
def _folder(source: Path, out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write weights to; what else lies in `source` joins them, and it becomes `out`, or vanishes."""
    check_out(source, out, overwrite)
    with export.aside(out) as aside:
        yield aside
        for path in sorted(source.iterdir()):
            if path.is_file() and not is_weights(path):
                shutil.copyfile(path, aside / path.name)
        if export.is_export(aside):
            export.renew_digests(aside)
        export.fit_card(aside)


def check_out(source: Path, out: Path, overwrite: bool) -> None:
    """ValueError: `out` is `source` or holds it, or may not be written (`export.check_out`)."""
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise ValueError(f"{out}: is the model's own folder, or holds it. Choose another folder.")
    export.check_out(out, overwrite)


def figures(folder: str | Path) -> dict[str, Any]:
    """Sizes of a compact folder, for JSON: of the tensors in bytes, and of the file itself."""
    found = header(folder)
    packed = [tensor for tensor in found.tensors if tensor.kept is not None]
    return {
        "path": str(folder),
        "signature": found.signature,
        "tensors": len(found.tensors),
        "packed": len(packed),
        "weights": sum(tensor.numel for tensor in packed),
        "kept": sum(tensor.kept or 0 for tensor in packed),
        "packed_dense_bytes": sum(tensor.dense_bytes for tensor in packed),
        "packed_bytes": sum(tensor.stored_bytes for tensor in packed),
        "dense_bytes": sum(tensor.dense_bytes for tensor in found.tensors),
        "file_bytes": (Path(folder) / FILE).stat().st_size,
    }


class _Info(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    signature: str
    entries: dict[str, Any]


def _read_info(path: Path) -> _Info:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file: its folder is no exported model.")
    try:
        return _Info.model_validate_json(path.read_bytes())
    except ValidationError:
        raise ValueError(f"{path}: is damaged, or is not the {INFO} of an exported model.") from None


class _Files(Mapping[str, Tensor]):
    """The tensors of safetensors files, read when asked for."""

    def __init__(self, files: Mapping[Path, Sequence[str] | None], stack: ExitStack) -> None:
        self._home: dict[str, Any] = {}
        for path, expected in files.items():
            if not path.is_file():
                raise ValueError(f"{path}: there is no such file.")
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path}: is truncated or damaged ({printable(str(error))}). Export it again."
                ) from None
            names = list(opened.keys())
            if lost := sorted(set(expected or ()) - set(names)):
                raise ValueError(f"{path}: lacks {printable(lost[0])}, which the index says it has.")
            for name in names:
                if name in self._home:
                    raise ValueError(f"{path}: holds {printable(name)}, which another file holds, too.")
                self._home[name] = opened

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)
