"""The exchange of parallel GaP: once per round each worker gives its pruned partition away and takes the others'.

    EXCHANGE/run.json                        which run the folder belongs to: signature, plan, number of workers
    EXCHANGE/round_R/worker_I.safetensors    partition I as worker I trained and pruned it, and the shared tensors
    EXCHANGE/round_R/worker_I.json           manifest: size and SHA-256 of that file; written last, so the file is whole

EXCHANGE is a folder that all workers reach, or a URL that fsspec knows (s3://..., gs://..., sftp://...). A worker is an
ordinary job of any number of ranks, on any backend. The compact form holds, of a pruned entry, the bits of its mask and
the kept weights alone; everything else whole. So a file has exactly

    8 + header + sum over entries of (ceil(numel / 8) + 4 * kept) + 4 * other weights     bytes

Files are written one tensor at a time and read shard-wise: a rank reads the bytes that cover its own pieces, and none
ever holds a full model. Nothing that is read is unpickled, and no name in a file becomes a path: a header is accepted
only if it describes exactly what the plan expects, which also bounds what is allocated for it.

N weights of a piece or parameter, E entries, K workers (one per partition), R ranks of a job.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gap_ds import masks
from gap_ds.comm import Comm
from gap_ds.plan import Plan
from gap_ds.shard import Shard

log = logging.getLogger("gap_ds")

FORMAT = "gap_ds.exchange"
VERSION = 1

#: The largest header and the largest JSON file that are read.
MAX_HEADER = 100_000_000
MAX_JSON = 1 << 20
#: What a header may have beyond the one that we would write: another library's spaces.
_SLACK = 1 << 16
#: Bytes read or written at a time.
_CHUNK = 1 << 24
#: Seconds: between two looks for the others' files (first, and at most); between two lines of progress; after which the
#: ranks meet while one of them works alone; that a damaged JSON file gets to become whole; before a file is read again.
_POLL, _POLL_MOST, _PROGRESS, _MEET, _SETTLE, _AGAIN = 0.05, 5.0, 30.0, 5.0, 10.0, 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """Which worker of parallel GaP this job is.

    index: 0 .. workers - 1; the partition that is dense here.
    exchange: the folder or fsspec URL where the workers meet; every run needs one of its own.
    timeout: seconds to wait for the others at the end of a round.
    """

    index: int
    exchange: str
    timeout: float = 3600.0


@dataclass(frozen=True)
class Item:
    """One tensor of the model, and this rank's piece of it: flatten(tensor)[start : start + numel] == piece().

    partition: the worker that it comes from; None for what is shared.
    keep: of an entry, the weights that it keeps; None for everything else. With `pooled`, the entries of a partition
        share one budget, and only the sum of their `keep` is binding.
    dtype: as it is exchanged.
    """

    name: str
    shape: tuple[int, ...]
    partition: int | None
    start: int
    numel: int
    piece: Callable[[], Tensor] = field(repr=False, compare=False)
    keep: int | None = None
    pooled: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def full_numel(self) -> int:
        """Weights of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Received:
    """This rank's piece of one tensor after the exchange, on the CPU.

    value: (N,), in fp32 or the buffer's own dtype; of an entry, exactly +0.0 where it is pruned.
    bits: of an entry, the mask of the piece as `gap_ds.masks` packs it; None for everything else.
    """

    name: str
    value: Tensor
    bits: Tensor | None


@dataclass(frozen=True)
class Manifest:
    """What is said of a complete file: its size in bytes, its SHA-256 in hexadecimal digits, when it was published."""

    bytes: int
    sha256: str
    published: str


def items_of(plan: Plan, shards: Sequence[Shard], buffers: Mapping[str, Tensor]) -> list[Item]:
    """What is exchanged of a model: its trained parameters and its buffers, each with the partition it belongs to.

    Frozen parameters are left out: they are equal on all workers.

    Args:
        shards: this rank's piece of every parameter, in an order that is the same on all ranks.
        buffers: those that a checkpoint holds, by clean name; whole on every rank.
    Raises:
        ValueError: a buffer has a dtype that cannot be exchanged.
    """
    entries = {entry.name: entry for entry in plan.entries}
    items = []
    for shard in shards:
        if not shard.trainable:
            continue
        entry = entries.get(shard.name)
        where = plan.home(shard.name) if entry is None else entry.partition
        keep = None if entry is None else entry.keep
        items.append(Item(shard.name, shard.shape, where, shard.start, shard.numel, shard.weight, keep, plan.pooled))
    for name, buffer in buffers.items():
        dtype = torch.float32 if buffer.is_floating_point() and buffer.dtype != torch.float64 else buffer.dtype
        if dtype not in _DTYPES:
            raise ValueError(f"{name}: a buffer of {buffer.dtype} cannot be exchanged. Make it non-persistent.")
        piece = partial(torch.Tensor.reshape, buffer.detach(), (-1,))
        items.append(Item(name, tuple(buffer.shape), plan.home(name), 0, buffer.numel(), piece, dtype=dtype))
    return items


# -- the file: a safetensors file, described by pure functions ------------------------------------------------------

#: dtype -> (its name in safetensors, NumPy's name of its little-endian form)
_DTYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("F64", "<f8"),
    torch.float32: ("F32", "<f4"),
    torch.int64: ("I64", "<i8"),
    torch.int32: ("I32", "<i4"),
    torch.int16: ("I16", "<i2"),
    torch.int8: ("I8", "|i1"),
    torch.uint8: ("U8", "|u1"),
    torch.bool: ("BOOL", "|u1"),
}
_BY_NAME = {name: dtype for dtype, (name, _) in _DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """A tensor in a file: the bytes [begin, end) after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def selected(items: Sequence[Item], worker: int, shared: str = "average") -> list[Item]:
    """The items that worker's file holds: its own partition, and the shared tensors that are taken from it.

    Shared integers, and with `shared="first"` all shared tensors, are taken from worker 0 alone.
    """
    return [
        item
        for item in items
        if item.partition == worker or (item.partition is None and (worker == 0 or _is_averaged(item, shared)))
    ]


def _is_averaged(item: Item, shared: str) -> bool:
    return shared == "average" and item.dtype.is_floating_point


def layout(items: Sequence[Item], kept: Mapping[str, int]) -> list[Slot]:
    """Where the tensors of a file lie: wide dtypes first, so that all are aligned, and by name.

    Args:
        kept: weights that each entry keeps.

    >>> entry = Item("w", (3, 4), 0, 0, 12, lambda: torch.ones(12), keep=5)
    >>> [(slot.name, slot.begin, slot.end) for slot in layout([entry], {"w": 5})]
    [('w.values', 0, 20), ('w.mask', 20, 22)]
    """
    tensors = [tensor for item in items for tensor in _tensors(item, kept.get(item.name, 0))]
    slots: list[Slot] = []
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        slots.append(Slot(name, dtype, shape, begin, end))
    return slots


def _tensors(item: Item, kept: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What a file holds of an item: (name, dtype, shape)."""
    if item.keep is None:
        return [(item.name, item.dtype, item.shape)]
    mask = (masks.nbytes(item.full_numel),)
    return [(f"{item.name}.values", torch.float32, (kept,)), (f"{item.name}.mask", torch.uint8, mask)]


def header_bytes(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file: the length of the header in 8 bytes, and the header."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    for slot in slots:
        offsets = [slot.begin, slot.end]
        table[slot.name] = {"dtype": _DTYPES[slot.dtype][0], "shape": list(slot.shape), "data_offsets": offsets}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_length(first: bytes, size: int, limit: int = MAX_HEADER) -> int:
    """Length of the header of a file of `size` bytes, from its first 8.

    Raises:
        ValueError: the file is shorter than its header, or the header longer than `limit`.
    """
    if len(first) != 8:
        raise ValueError(f"has {len(first)} bytes, too few for a safetensors file")
    length = int(struct.unpack("<Q", first)[0])
    if length > size - 8:
        raise ValueError(f"its header of {length} bytes does not fit into the {size} bytes of the file")
    if length > min(limit, MAX_HEADER):
        raise ValueError(f"its header of {length} bytes is longer than {min(limit, MAX_HEADER)}")
    return length


def parse_header(text: bytes, area: int) -> tuple[dict[str, str], dict[str, Slot]]:
    """(metadata, tensors by name) of a header that is followed by `area` bytes.

    Raises:
        ValueError: the header is no JSON of the right form, names a tensor twice or with a dtype unknown here, or its
            tensors leave gaps, overlap, or do not end with the file.
    """
    table = _load_json(text)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata of its header are no table of strings")
    slots = [_slot(name, described) for name, described in table.items()]
    end = 0
    for slot in sorted(slots, key=lambda slot: (slot.begin, slot.end)):
        if slot.begin != end:
            name = _printable(slot.name)
            raise ValueError(f"{name} begins at byte {slot.begin} of the data, where {end} was expected")
        end = slot.end
    if end != area:
        raise ValueError(f"its tensors have {end} bytes, and {area} follow the header")
    return metadata, {slot.name: slot for slot in slots}


def _slot(tensor: str, described: Any) -> Slot:
    name = _printable(tensor)
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BY_NAME:
        raise ValueError(f"{name} has the dtype {str(dtype)[:20]!a}, which is not one of {', '.join(_BY_NAME)}")
    if not _are_counts(shape) or len(shape) > 64:
        raise ValueError(f"{name} has a shape that is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has data_offsets that are no two positions")
    # Sizes of a real tensor lie below 2^63; without this bound their product could have millions of digits.
    if any(n >= 1 << 63 for n in (*shape, *offsets)):
        raise ValueError(f"{name} has a size of 2^63 or more")
    if offsets[1] - offsets[0] != math.prod(shape) * _BY_NAME[dtype].itemsize:
        raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes, which does not go with its shape")
    return Slot(tensor, _BY_NAME[dtype], tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def match(found: Mapping[str, Slot], items: Sequence[Item]) -> None:
    """Checks that a file's tensors are exactly those of these items.

    Raises:
        ValueError: a tensor is missing or unknown, or has another dtype or shape, or other budgets.
    """
    # Where entries share a budget, what each of them keeps is in the file alone.
    kept = {item.name: item.keep for item in items if item.keep is not None}
    for item in items:
        values = found.get(f"{item.name}.values")
        if item.pooled and values is not None and len(values.shape) == 1 and values.shape[0] <= item.full_numel:
            kept[item.name] = values.shape[0]
    wanted = {slot.name: slot for slot in layout(items, kept)}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"lacks {_some(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"holds {_some(unknown)}, which this model does not have there")
    for name, slot in wanted.items():
        if (found[name].dtype, found[name].shape) != (slot.dtype, slot.shape):
            raise ValueError(
                f"{name} is {_DTYPES[found[name].dtype][0]} {list(found[name].shape)} instead of "
                f"{_DTYPES[slot.dtype][0]} {list(slot.shape)}"
            )
    budget = sum(item.keep for item in items if item.keep is not None)
    if sum(kept.values()) != budget:
        raise ValueError(f"its entries keep {sum(kept.values())} weights instead of {budget}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return ", ".join(_printable(name) for name in names[:3]) + more


def _printable(text: str) -> str:
    """What a file said, for a message: not endless, and without control characters."""
    return text[:200].encode("unicode_escape").decode()


def encode(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor on the CPU, flat."""
    flat = values.contiguous().view(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    return flat.numpy().astype(_DTYPES[values.dtype][1], copy=False).view(np.uint8)


def decode(data: bytes, dtype: torch.dtype) -> Tensor:
    """The flat tensor that has these bytes; a copy."""
    values = np.frombuffer(data, _DTYPES[dtype][1])
    if dtype == torch.bool:
        return torch.from_numpy(values != 0)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


def spread(values: Tensor, bits: Tensor, numel: int) -> Tensor:
    """The weights (N,) of a piece from its kept ones and its mask; the pruned ones are +0.0.

    >>> spread(torch.tensor([7.0, 8.0]), torch.tensor([0b1010], dtype=torch.uint8), 5).tolist()
    [0.0, 7.0, 0.0, 8.0, 0.0]
    """
    piece = torch.zeros(numel, dtype=values.dtype)
    piece[masks.unpack(bits, numel)] = values
    return piece


def _load_json(text: bytes) -> dict[str, Any]:
    """The table that a JSON text describes.

    Raises:
        ValueError: it is no JSON, no table, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name comes twice")
        return table

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({_why(error)})") from None
    if not isinstance(table, dict):
        raise ValueError("is no JSON table")
    return table


def _check_types(table: Mapping[str, Any], types: Mapping[str, type]) -> None:
    if table.get("format") != FORMAT:
        raise ValueError(f'has not the format "{FORMAT}"')
    if table.get("version") != VERSION:
        raise ValueError(
            f"has the version {str(table.get('version'))[:20]!a}, and this gap_ds reads version {VERSION}: all workers "
            "need one version of gap_ds"
        )
    wrong = [key for key in types if type(table.get(key)) is not types[key]] + sorted(table.keys() - types.keys())
    if wrong:
        raise ValueError(f"has a wrong, missing or unknown field {_printable(wrong[0])}")


# -- the folder: local, or a URL ------------------------------------------------------------------------------------


class _Writing(Protocol):
    """A file that is being written."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        """Completes the file."""

    def discard(self) -> None:
        """Gives the file up."""


class _Folder(Protocol):
    """Files below the exchange folder.

    Raises:
        FileNotFoundError: there is no such file. FileExistsError: `create` found one.
        OSError: everything else that went wrong; ValueError: what was found is no regular file.
    """

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes [begin, end), or those of them that exist."""

    def size(self, name: str) -> int: ...

    def create(self, name: str, data: bytes) -> None:
        """Writes a file that must not exist yet."""

    def put(self, name: str, data: bytes) -> None:
        """Writes a file so that it is whole or as before."""

    def stream(self, name: str) -> _Writing: ...

    def refresh(self) -> None:
        """Forgets what was remembered of the folder."""


class _Local:
    """A folder on a local or shared file system. Links in it are not followed, so nothing is written outside of it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, begin: int, end: int) -> bytes:
        with self._open(name) as file:
            file.seek(begin)
            return file.read(end - begin)

    def size(self, name: str) -> int:
        with self._open(name) as file:
            return os.fstat(file.fileno()).st_size

    def _open(self, name: str) -> BinaryIO:
        path = self._root / name
        # Not blocking: a named pipe in the place of a file would be waited for without end.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError("is a link, and must be a file") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError("is no regular file")
        return os.fdopen(descriptor, "rb")

    def create(self, name: str, data: bytes) -> None:
        path = self._parent_made(name)
        aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        _write_new(aside, data)
        try:
            os.link(aside, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            _write_new(path, data)
        finally:
            aside.unlink()

    def put(self, name: str, data: bytes) -> None:
        file = self.stream(name)
        file.write(data)
        file.close()

    def stream(self, name: str) -> _Writing:
        return _LocalFile(self._parent_made(name))

    def _parent_made(self, name: str) -> Path:
        path = self._root / name
        self._root.mkdir(parents=True, exist_ok=True)
        if path.parent != self._root:
            path.parent.mkdir(exist_ok=True)
            if path.parent.is_symlink():
                raise ValueError(f"{path.parent} is a link, and must be a folder")
        return path

    def refresh(self) -> None:
        pass


def _write_new(path: Path, data: bytes) -> None:
    with _new(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _new(path: Path) -> BinaryIO:
    """A file that did not exist; also not as a link to another place."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


class _LocalFile:
    """Written aside, flushed to disk and renamed."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f"{path.name}.partial")
        self._aside.unlink(missing_ok=True)
        self._file = _new(self._aside)

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            self._aside.unlink(missing_ok=True)


class _Remote:
    """A folder behind a URL. Files are streamed to their place: what counts is the manifest, which is written last."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root.rstrip("/")

    def read(self, name: str, begin: int, end: int) -> bytes:
        with _os_errors():
            return bytes(self._system.cat_file(self._path(name), start=begin, end=end))

    def size(self, name: str) -> int:
        with _os_errors():
            return int(self._system.info(self._path(name))["size"])

    def create(self, name: str, data: bytes) -> None:
        path = self._path(name, make_parent=True)
        with _os_errors():
            try:
                self._system.pipe_file(path, data, mode="create")
            except FileExistsError:
                raise
            except Exception as error:  # a system, or a version of fsspec, that has no exclusive creation
                if self._system.exists(path):
                    raise FileExistsError(path) from error
                self._system.pipe_file(path, data)

    def put(self, name: str, data: bytes) -> None:
        with _os_errors():
            self._system.pipe_file(self._path(name, make_parent=True), data)

    def stream(self, name: str) -> _Writing:
        with _os_errors():
            return _RemoteFile(self._system.open(self._path(name, make_parent=True), "wb"))

    def _path(self, name: str, make_parent: bool = False) -> str:
        path = f"{self._root}/{name}"
        if make_parent:
            # Object stores have no folders, and some refuse to make one; where one is needed, writing will say so.
            with contextlib.suppress(Exception):
                self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def refresh(self) -> None:
        self._system.invalidate_cache()


class _RemoteFile:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        with _os_errors():
            self._file.write(data)

    def close(self) -> None:
        with _os_errors():
            self._file.close()

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Each of fsspec's systems has errors of its own: they become OSError. TimeoutError is kept for our own."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        raise OSError(_why(error)) from error


def open_folder(url: str) -> _Folder:
    """The folder behind a path or an fsspec URL.

    Raises:
        ValueError: the URL's protocol is unknown, or its package is not installed.
    """
    if "://" not in url and "::" not in url:
        return _Local(Path(url).expanduser())
    # fsspec comes with torch; a plain path does not need it.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    try:
        system, root = url_to_fs(url)
    except Exception as error:
        raise ValueError(
            f"exchange={_shown(url)!r}: cannot be opened ({_why(error)}). Name a folder, or a URL whose protocol "
            "fsspec knows here."
        ) from error
    return _Local(Path(root)) if isinstance(system, LocalFileSystem) else _Remote(system, root)


def _shown(url: str) -> str:
    """A URL without the user and password that it may have."""
    return re.sub(r"//[^/@]*@", "//", url)


def _why(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


# -- the exchange ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spread:
    """Of one parameter, for each of the R ranks: its piece, the kept weights in it, and those before it."""

    starts: list[int]
    numels: list[int]
    kept: list[int]
    before: list[int]


class Exchange:
    """One worker's side of the exchange. All ranks of the job must make the same calls.

    Errors are raised on all ranks alike, so that none waits for one that has left.

    Args:
        worker: which one this job is.
        workers: K, the number of workers, which is the plan's number of partitions.
        signature: of the run; its last part, `|v:...`, may differ between workers.
        fingerprint: of the plan.
        world: all ranks of the job.
        comm: the ranks among which the pieces of a parameter are spread.
        shared: what becomes of the tensors in no partition: their mean over the workers, or worker 0's.
    Raises:
        ValueError: the worker's numbers are impossible, or the folder cannot be used or belongs to another run.
    """

    def __init__(
        self,
        worker: Worker,
        workers: int,
        signature: str,
        fingerprint: str,
        world: Comm,
        comm: Comm,
        shared: Literal["average", "first"] = "average",
    ) -> None:
        _check_worker(worker, workers)
        self.worker, self.workers, self.shared = worker, workers, shared
        # Whoever puts parameters together is the one that writes.
        assert (world.rank == 0) == (comm.writes and comm.rank == 0)
        self._world, self._comm = world, comm
        self._identity = {"signature": _unversioned(signature), "plan": fingerprint, "workers": workers}
        #: Bytes of this worker's own file that were written, and of all files that all ranks of this job read, in the
        #: last round; manifests are not counted.
        self.bytes_written = 0
        self.bytes_read = 0
        self._read = 0
        self._shown = _shown(worker.exchange)
        self._folder = open_folder(worker.exchange)
        self._by_first(self._enter())

    def combine(self, round: int, items: Sequence[Item], bits: Mapping[str, Tensor]) -> Iterator[Received]:
        """Publishes this worker's partition, waits for the others, and returns what all partitions became.

        A partition is taken from its own worker: this worker's too, from its file, so that a job that was killed after
        it had published goes on with what the others have read. The result is the same on all workers bit for bit.
        Nothing is returned unless all files of the round are whole. The iterator goes through collectives: every rank
        must go through it to its end.

        Args:
            items: all that is exchanged (`items_of`).
            bits: mask of this rank's piece of each entry of the worker's own partition, on the device of the weights.
        Raises:
            ValueError: a mask does not keep the entry's budget, a file cannot be written or read, or is damaged.
            TimeoutError: another worker has not published in time.
        """
        started = time.perf_counter()
        written = self.publish(round, items, bits)
        received = self.read(round, items, self.wait(round))
        return self._reported(received, round, written, started)

    def _reported(self, received: Iterator[Received], round: int, written: int, started: float) -> Iterator[Received]:
        yield from received
        self._say(
            f"round {round}: worker {self.worker.index} wrote {written} bytes and read {self.bytes_read} bytes of "
            f"{self.workers} workers, {time.perf_counter() - started:.3f} s"
        )

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish(self, round: int, items: Sequence[Item], bits: Mapping[str, Tensor]) -> int:
        """Writes this worker's file of a round, tensor by tensor; bytes written.

        If the round is already published, nothing is written (0 bytes): others may have read it.
        """
        self._check_items(items)
        index, name = self.worker.index, _name(round, self.worker.index)
        self.bytes_written = 0
        if (manifest := self._by_first(self._manifest(round, index))) is not None:
            self._say(
                f"round {round}: worker {index} has published at {manifest.published}, before this job was started "
                f"or resumed. That file is used; if it is another run's, stop and give this run a folder of its own.",
                logging.WARNING,
            )
            return 0
        own = selected(items, index, self.shared)
        table = dict(zip((item.name for item in own), self._spreads(own, bits), strict=True))
        kept = {item.name: sum(table[item.name].kept) for item in own if item.keep is not None}
        self._together(partial(_check_kept, own, kept))
        slots = layout(own, kept)
        writes = self._world.rank == 0
        file = self._together(lambda: self._folder.stream(f"{name}.safetensors") if writes else None)
        digest, size = hashlib.sha256(), 0
        try:
            for data in self._contents(round, own, slots, table, bits):
                self._together(partial(_write, file, data, digest))
                size += len(data)
            self._together(lambda: file.close() if file is not None else None)
        except BaseException:
            if file is not None:
                file.discard()
            raise
        described = {
            **{"format": FORMAT, "version": VERSION, **self._identity, "round": round, "worker": index},
            **{"bytes": size, "sha256": digest.hexdigest()},
            "published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        text = json.dumps(described, indent=1).encode()
        self._together(lambda: self._folder.put(f"{name}.json", text) if writes else None)
        self.bytes_written = int(self._world.from_first(size))
        return self.bytes_written

    def _contents(
        self,
        round: int,
        own: Sequence[Item],
        slots: Sequence[Slot],
        table: Mapping[str, _Spread],
        bits: Mapping[str, Tensor],
    ) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """The bytes of a file, tensor by tensor, on the rank that writes; empty arrays on the others."""
        sources = {name: item for item in own for name, _, _ in _tensors(item, 0)}
        header = header_bytes(slots, self._metadata(round, self.worker.index))
        nothing = np.empty(0, np.uint8)
        writes = self._world.rank == 0
        yield np.frombuffer(header, np.uint8) if writes else nothing
        for slot in slots:
            # Where groups of ranks hold the same pieces, one group writes, and the others keep step with it.
            if not self._comm.writes:
                yield nothing
                continue
            item, pieces = sources[slot.name], table[sources[slot.name].name]
            if item.keep is None:
                piece = item.piece().to(item.dtype)
                whole = self._comm.assemble(piece, pieces.starts, pieces.numels, item.full_numel)
            elif slot.name.endswith(".values"):
                piece = item.piece()
                kept = masks.unpack(bits[item.name], item.numel)
                values = piece.float()[kept.to(piece.device)]
                whole = self._comm.assemble(values, pieces.before, pieces.kept, slot.shape[0])
            else:
                flags = masks.unpack(bits[item.name], item.numel).to(torch.uint8)
                whole = self._comm.assemble(flags, pieces.starts, pieces.numels, item.full_numel)
                whole = None if whole is None else masks.pack(whole.bool())
            yield nothing if whole is None else encode(whole)

    def _spreads(self, items: Sequence[Item], bits: Mapping[str, Tensor]) -> list[_Spread]:
        """How pieces, and the kept weights in them, are spread over the ranks; known to every rank."""
        if not items:
            return []
        kept = [masks.count(bits[item.name]) if item.keep is not None else 0 for item in items]
        own = [[item.start, item.numel, k] for item, k in zip(items, kept, strict=True)]
        every = self._comm.all_gather(torch.tensor(own, dtype=torch.int64)).numpy()
        spreads = []
        for i in range(len(items)):
            starts, numels, counts = every[:, i, 0], every[:, i, 1], every[:, i, 2]
            order = np.lexsort((numels, starts))  # of two pieces that begin alike, one is empty and comes first
            before = np.empty_like(counts)
            before[order] = np.cumsum(counts[order]) - counts[order]
            spreads.append(_Spread(starts.tolist(), numels.tolist(), counts.tolist(), before.tolist()))
        return spreads

    # -- waiting ---------------------------------------------------------------------------------------------------

    def wait(self, round: int) -> list[Manifest]:
        """The manifests of all K workers, once all have published.

        Raises:
            TimeoutError: a worker has not published within the worker's timeout.
            ValueError: a manifest is damaged, or belongs to another run.
        """
        return self._by_first(self._wait(round))

    def _wait(self, round: int) -> Generator[None, None, list[Manifest]]:
        found: dict[int, Manifest] = {}
        timeout, pause, trouble = self.worker.timeout, _POLL, ""
        started = said = time.monotonic()
        while True:
            self._folder.refresh()
            for worker in range(self.workers):
                try:
                    manifest = None if worker in found else (yield from self._manifest(round, worker))
                except OSError as error:  # a network may be away for a while
                    manifest, trouble = None, f" (the folder could not be read: {_why(error)})"
                if manifest is not None:
                    found[worker] = manifest
            missing = [worker for worker in range(self.workers) if worker not in found]
            if not missing:
                return [found[worker] for worker in range(self.workers)]
            who = f"worker{'s' if len(missing) > 1 else ''} {', '.join(str(worker) for worker in missing)}"
            now = time.monotonic()
            if now - started >= timeout:
                raise TimeoutError(
                    f"round {round}: {who} of {self.workers} did not publish in {self._shown} within {timeout:g} s"
                    f"{trouble}. Check that each job runs, with its own worker index and this exchange folder, and "
                    'start this one again from its checkpoint; or raise "timeout".'
                )
            if now - said >= _PROGRESS:
                said = now
                log.info(
                    f"round {round}: waiting for {who}, {now - started:.0f} of {timeout:g} s, {self._shown}{trouble}"
                )
            time.sleep(max(0.0, min(pause, started + timeout - now)))
            pause = min(1.5 * pause, _POLL_MOST)
            yield

    def _manifest(self, round: int, worker: int) -> Generator[None, None, Manifest | None]:
        """A worker's manifest; None if there is none yet."""
        name = f"{_name(round, worker)}.json"
        types = {"round": int, "worker": int, "bytes": int, "sha256": str, "published": str}
        table = yield from self._json(name, types)
        if table is None:
            return None
        if different := self._different(table):
            raise ValueError(
                f"{self._path(name)}: belongs to another run: {different}. Give this run an exchange folder of its own."
            )
        if (table["round"], table["worker"]) != (round, worker):
            raise ValueError(
                f"{self._path(name)}: is that of round {table['round']}, worker {table['worker']}. Delete it, and "
                f"start worker {worker} again from its checkpoint."
            )
        return Manifest(table["bytes"], table["sha256"], table["published"])

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, round: int, items: Sequence[Item], manifests: Sequence[Manifest]) -> Iterator[Received]:
        """This rank's pieces of all items: partition k from worker k's file, the shared ones from all.

        Rank 0 checks all files against their manifests first; the pieces are then read one at a time.

        Raises:
            ValueError: a file is damaged or is not of this plan (at once), or cannot be read (in the course of it).
        """
        self._check_items(items)
        self._read = 0
        tables = [self._by_first(self._verify(round, worker, items, m)) for worker, m in enumerate(manifests)]
        return self._pieces(round, items, tables)

    def _pieces(
        self, round: int, items: Sequence[Item], tables: Sequence[Mapping[str, tuple[int, int]]]
    ) -> Iterator[Received]:
        for worker, table in enumerate(tables):
            path = f"{_name(round, worker)}.safetensors"
            own = [item for item in items if item.partition == worker]
            entries = [item for item in own if item.keep is not None]
            bits = self._together(partial(self._read_masks, path, table, entries))
            spreads = self._spreads(entries, bits)
            self._together(partial(self._check_masks, path, table, entries, spreads))
            for item, pieces in zip(entries, spreads, strict=True):
                before = pieces.before[self._comm.rank]
                value = self._together(partial(self._read_weights, path, table, item, bits[item.name], before))
                yield Received(item.name, value, bits.pop(item.name))
            for item in own:
                if item.keep is None:
                    yield Received(item.name, self._together(partial(self._read_whole, path, table, item)), None)
        for item in items:
            if item.partition is None:
                yield Received(item.name, self._together(partial(self._read_shared, round, tables, item)), None)
        self.bytes_read = int(self._world.sum(torch.tensor([self._read], dtype=torch.int64)))

    def _read_masks(
        self, path: str, table: Mapping[str, tuple[int, int]], entries: Sequence[Item]
    ) -> dict[str, Tensor]:
        """The bits of this rank's pieces, cut out of the bytes that cover them."""
        found = {}
        for item in entries:
            begin = table[f"{item.name}.mask"][0]
            lo, hi = item.start // 8, masks.nbytes(item.start + item.numel) if item.numel else item.start // 8
            covering = decode(self._fetch(path, begin + lo, begin + hi), torch.uint8)
            found[item.name] = masks.pack(masks.unpack(covering, item.numel, start=item.start - 8 * lo))
        return found

    def _check_masks(
        self, path: str, table: Mapping[str, tuple[int, int]], entries: Sequence[Item], spreads: Sequence[_Spread]
    ) -> None:
        """A mask with more or fewer bits than values would put weights into wrong places."""
        for item, pieces in zip(entries, spreads, strict=True):
            begin, end = table[f"{item.name}.values"]
            if sum(pieces.kept) != (end - begin) // 4:
                raise ValueError(
                    f"{self._path(path)}: the mask of {item.name} keeps {sum(pieces.kept)} weights, and there are "
                    f"{(end - begin) // 4}: it is damaged, or the pieces of the ranks do not make up the parameter"
                )

    def _read_weights(
        self, path: str, table: Mapping[str, tuple[int, int]], item: Item, bits: Tensor, before: int
    ) -> Tensor:
        begin = table[f"{item.name}.values"][0] + 4 * before
        values = decode(self._fetch(path, begin, begin + 4 * masks.count(bits)), torch.float32)
        return spread(values, bits, item.numel)

    def _read_whole(self, path: str, table: Mapping[str, tuple[int, int]], item: Item) -> Tensor:
        begin, width = table[item.name][0], item.dtype.itemsize
        return decode(
            self._fetch(path, begin + width * item.start, begin + width * (item.start + item.numel)), item.dtype
        )

    def _read_shared(self, round: int, tables: Sequence[Mapping[str, tuple[int, int]]], item: Item) -> Tensor:
        """The mean over the workers, or worker 0's piece.

        Summed in fp64 in the order of the workers and rounded once: the same on every worker bit for bit, and equal
        values are their own mean.
        """
        first = self._read_whole(f"{_name(round, 0)}.safetensors", tables[0], item)
        if not _is_averaged(item, self.shared):
            return first
        total = first.double()
        for worker in range(1, self.workers):
            total += self._read_whole(f"{_name(round, worker)}.safetensors", tables[worker], item)
        return (total / self.workers).to(item.dtype)

    def _fetch(self, path: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file."""
        if begin == end:
            return b""
        try:
            data = self._folder.read(path, begin, end)
        except OSError as error:
            raise ValueError(f"{self._path(path)}: cannot be read ({_why(error)})") from error
        if len(data) != end - begin:
            raise ValueError(f"{self._path(path)}: is truncated: {len(data)} bytes at {begin} instead of {end - begin}")
        self._read += len(data)
        return data

    def _verify(
        self, round: int, worker: int, items: Sequence[Item], manifest: Manifest
    ) -> Generator[None, None, dict[str, tuple[int, int]]]:
        """(begin, end) in the file of each tensor, once the whole file was seen to be what its manifest says."""
        path = f"{_name(round, worker)}.safetensors"
        for attempt in (1, 2):
            try:
                return (yield from self._verified(path, round, worker, selected(items, worker, self.shared), manifest))
            except (OSError, ValueError) as error:
                if attempt == 2:
                    said = str(error) if isinstance(error, ValueError) else _why(error)
                    said = said.removeprefix(f"{self._path(path)}: ")
                    raise ValueError(
                        f"{self._path(path)}: {said}. To have worker {worker} write it again, delete its manifest "
                        f"(worker_{worker}.json) and start that worker again from its checkpoint."
                    ) from error
                log.warning(f"{self._path(path)}: {_why(error)}; reading it once more")
            end = time.monotonic() + _AGAIN
            while time.monotonic() < end:
                time.sleep(min(_AGAIN, 0.1))
                yield
            self._folder.refresh()
        raise AssertionError("not reached")

    def _verified(
        self, path: str, round: int, worker: int, items: Sequence[Item], manifest: Manifest
    ) -> Generator[None, None, dict[str, tuple[int, int]]]:
        size = self._folder.size(path)
        if size != manifest.bytes:
            raise ValueError(f"has {size} bytes instead of the {manifest.bytes} that its manifest says")
        # The plan says how much data there is, and the writer's header is known up to spaces: so the size is bounded.
        expected = layout(items, {item.name: item.keep for item in items if item.keep is not None})
        metadata = self._metadata(round, worker)
        limit = len(header_bytes(expected, metadata)) + _SLACK
        first = self._fetch(path, 0, min(8, size))
        start = 8 + header_length(first, size, limit)
        text = self._fetch(path, 8, start)
        said, slots = parse_header(text, size - start)
        match(slots, items)
        if said != metadata:
            raise ValueError(f"its header is that of {_metadata_shown(said)} instead of {_metadata_shown(metadata)}")
        digest = hashlib.sha256(first + text)
        for begin in range(start, size, _CHUNK):
            digest.update(self._fetch(path, begin, min(begin + _CHUNK, size)))
            yield
        if digest.hexdigest() != manifest.sha256:
            raise ValueError("its SHA-256 is not that of its manifest: it is damaged")
        return {name: (start + slot.begin, start + slot.end) for name, slot in slots.items()}

    # -- the folder's identity -------------------------------------------------------------------------------------

    def _enter(self) -> Generator[None, None, None]:
        """Makes run.json, or checks that of the worker that was first."""
        described = {"format": FORMAT, "version": VERSION, **self._identity, "shared": self.shared}
        try:
            with contextlib.suppress(FileExistsError):
                self._folder.create("run.json", json.dumps(described, indent=1).encode())
            self._folder.refresh()
            # Read back even if it was just written: where there is no exclusive creation, another may have been later.
            table = yield from self._json("run.json", {"shared": str})
        except OSError as error:
            raise ValueError(
                f"exchange={self._shown!r}: cannot be used as exchange folder ({_why(error)}). Name a folder or URL "
                "that every worker can read and write."
            ) from error
        if table is None:
            raise ValueError(f"{self._path('run.json')}: vanished. Do not delete the exchange folder of a running run.")
        if different := self._different(table):
            raise ValueError(
                f"{self._shown}: is the exchange folder of another run: {different}. Give this run a folder of its "
                "own, or start it with the settings of that one."
            )

    def _different(self, table: Mapping[str, Any]) -> str:
        """What differs between this run and what a file says; empty if nothing does."""
        found = []
        if table["signature"] != self._identity["signature"]:
            was, now = table["signature"].split("|"), str(self._identity["signature"]).split("|")
            longest = range(max(len(was), len(now)))
            pairs = [tuple(x[i] if i < len(x) else "nothing" for x in (was, now)) for i in longest]
            found += [f"{_printable(a)} (here {b})" for a, b in pairs if a != b]
        if table["plan"] != self._identity["plan"]:
            found.append(
                f"plan {_printable(table['plan'])} (here {self._identity['plan']}), so the model, the sparsity, the "
                "distribution, the pattern or the partitions differ"
            )
        if table["workers"] != self.workers:
            found.append(f"{table['workers']} workers (here {self.workers})")
        if table.get("shared", self.shared) != self.shared:
            found.append(f'shared "{_printable(table["shared"])}" (here "{self.shared}")')
        return ", ".join(found[:5])

    def _json(self, name: str, types: Mapping[str, type]) -> Generator[None, None, dict[str, Any] | None]:
        """A JSON file of ours with these fields and those of the run; None if there is none.

        Where a system shows a file while it is written, it may look damaged for a moment.
        """
        types = {"format": str, "version": int, "signature": str, "plan": str, "workers": int, **types}
        end = time.monotonic() + _SETTLE
        while True:
            try:
                text = self._folder.read(name, 0, MAX_JSON + 1)
                if len(text) > MAX_JSON:
                    raise ValueError(f"is longer than {MAX_JSON} bytes")
                table = _load_json(text)
                _check_types(table, types)
                return table
            except FileNotFoundError:
                return None
            except ValueError as error:
                if time.monotonic() >= end:
                    raise ValueError(
                        f"{self._path(name)}: {error}. If nothing else explains it, the file is damaged: delete it, "
                        "and start the worker that wrote it again from its checkpoint."
                    ) from None
            time.sleep(min(0.2, _SETTLE))
            yield
            self._folder.refresh()

    # -- the ranks of this job -------------------------------------------------------------------------------------

    def _by_first(self, work: Generator[None, None, T]) -> T:
        """What `work` returns on rank 0, or its error, on all ranks.

        While it takes its time the ranks meet every few seconds: a collective that is waited for longer than the
        process group's timeout (10 minutes with NCCL) would end the job.
        """
        while True:
            state, cause = _advance(work) if self._world.rank == 0 else (None, None)
            kind, value = self._world.from_first(state)
            if kind == "done":
                result: T = value
                return result
            if kind != "busy":
                raise {"TimeoutError": TimeoutError, "ValueError": ValueError}.get(kind, RuntimeError)(value) from cause

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` returns on this rank; an error on any rank becomes the same ValueError on all.

        `work` must not wait for other ranks.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # whatever it is, the others must hear of it before they wait for this rank
            error = caught
        failed = self._world.all_gather(torch.tensor([error is not None], dtype=torch.int64)).view(-1)
        if not bool(failed.any()):
            return result
        text = "" if error is None else str(error) if isinstance(error, ValueError) else _why(error)
        row = torch.zeros(2048, dtype=torch.uint8)
        data = text.encode(errors="replace")[: row.numel()]
        row[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = self._world.all_gather(row)
        said = bytes(rows[int(failed.nonzero()[0, 0])].tolist()).rstrip(b"\0").decode(errors="replace")
        raise ValueError(said) from error

    def _check_items(self, items: Sequence[Item]) -> None:
        """Names are those of the file, so no two may be the same; all ranks have the same items."""
        names = [slot.name for slot in layout(items, {i.name: i.keep for i in items if i.keep is not None})]
        if len({"__metadata__", *names}) != len(names) + 1:
            twice = next(name for i, name in enumerate(names) if name in ("__metadata__", *names[:i]))
            raise ValueError(f"{twice}: two tensors of the exchange would have this name")
        for item in items:
            if item.partition is not None and not 0 <= item.partition < self.workers:
                raise ValueError(f"{item.name}: is in partition {item.partition}, and there are {self.workers} workers")

    def _metadata(self, round: int, worker: int) -> dict[str, str]:
        plan = str(self._identity["plan"])
        return {"format": FORMAT, "version": str(VERSION), "plan": plan, "round": str(round), "worker": str(worker)}

    def _path(self, name: str) -> str:
        return f"{self._shown.rstrip('/')}/{name}"

    def _say(self, message: str, level: int = logging.INFO) -> None:
        if self._world.rank == 0:
            log.log(level, message)


def _check_worker(worker: Worker, workers: int) -> None:
    if type(worker.index) is not int or not 0 <= worker.index < workers:
        raise ValueError(
            f"worker index={worker.index!r}: must be a whole number from 0 to {workers - 1}, one for each of the "
            f'{workers} partitions. Start one job per partition, or change "partitions".'
        )
    if not isinstance(worker.exchange, str) or not worker.exchange:
        raise ValueError(f"exchange={worker.exchange!r}: must name the folder or URL where the workers meet.")
    is_number = isinstance(worker.timeout, int | float) and not isinstance(worker.timeout, bool)
    if not is_number or not 0 < worker.timeout < math.inf:
        raise ValueError(f"timeout={worker.timeout!r}: must be a number of seconds above 0.")


def _check_kept(items: Sequence[Item], kept: Mapping[str, int]) -> None:
    """What is published must be pruned to target, or no reader would accept it."""
    for item in items:
        if item.keep is not None and not item.pooled and kept[item.name] != item.keep:
            raise ValueError(f"{item.name}: its mask keeps {kept[item.name]} weights instead of {item.keep}")
    budget = sum(item.keep for item in items if item.keep is not None)
    if sum(kept.values()) != budget:
        raise ValueError(f"the entries of the partition keep {sum(kept.values())} weights instead of {budget}")


def _write(file: _Writing | None, data: np.ndarray[Any, np.dtype[np.uint8]], digest: hashlib._Hash) -> None:
    if file is not None:
        for lo in range(0, len(data), _CHUNK):
            chunk = data[lo : lo + _CHUNK].tobytes()
            digest.update(chunk)
            file.write(chunk)


def _advance(work: Generator[None, None, T]) -> tuple[tuple[str, Any], Exception | None]:
    """Lets a generator work for some seconds: what to tell the other ranks, and the error that it ended with."""
    end = time.monotonic() + _MEET
    try:
        while time.monotonic() < end:
            next(work)
    except StopIteration as stop:
        return ("done", stop.value), None
    except (TimeoutError, ValueError) as error:
        return ("TimeoutError" if isinstance(error, TimeoutError) else "ValueError", str(error)), error
    except OSError as error:
        return ("ValueError", f"the exchange folder cannot be used ({_why(error)})"), error
    except Exception as error:
        return ("error", _why(error)), error
    return ("busy", None), None


def _name(round: int, worker: int) -> str:
    """Path of a worker's files below the exchange folder, without their endings; made of numbers alone."""
    return f"round_{int(round)}/worker_{int(worker)}"


def _unversioned(signature: str) -> str:
    """A signature without the version of the library at its end.

    >>> _unversioned("gap|k:3|s:0.8|v:0.1.0")
    'gap|k:3|s:0.8'
    """
    return re.sub(r"\|v:[^|]*\Z", "", signature)


def _metadata_shown(metadata: Mapping[str, str]) -> str:
    return ", ".join(f"{_printable(key)} {_printable(value)}" for key, value in sorted(metadata.items())[:8])
