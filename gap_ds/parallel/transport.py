"""The exchange folder: files on a local or shared file system, or behind a URL that fsspec supports."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gap_ds.storage.atomic import replacing
from gap_ds.storage.errors import summarize_error


class Writing(Protocol):
    """A file that is being written."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        """Complete the file. Only then does a local file appear in its place."""

    def discard(self) -> None:
        """Delete what was written, as far as possible. No effect after `close`."""


class Folder(Protocol):
    """Files below the exchange folder.

    Raises:
        FileNotFoundError: there is no such file. FileExistsError: `create` found one.
        OSError: any other error of the file system. ValueError: the name is that of a link, a folder or a pipe.
    """

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return the bytes [begin, end), or fewer at the end of the file."""

    def size(self, name: str) -> int: ...

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, which replaces an earlier one of that name."""

    def stream(self, name: str) -> Writing:
        """Begin a file that replaces an earlier one of that name."""

    def refresh(self) -> None:
        """Drop cached listings of the folder."""


class _Local:
    """A folder on a local or shared file system. Links in it are not followed, so nothing is written outside it."""

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
        # Without O_NONBLOCK, opening a named pipe would wait forever.
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
        with replacing(self._parent_made(name)) as aside:
            _write_new(aside, data)

    def stream(self, name: str) -> Writing:
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
    with path.open("xb") as file:  # exclusive: links are not followed
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._open = contextlib.ExitStack()
        aside = self._open.enter_context(replacing(path))
        self._file = self._open.enter_context(aside.open("xb"))

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._open.close()

    def discard(self) -> None:
        with contextlib.suppress(_Discarded, OSError), self._open:
            raise _Discarded


class _Discarded(Exception):
    pass


class _Remote:
    """A folder behind a URL. Files are streamed to their place; they count once the manifest is written, at last."""

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
            except Exception as error:  # a file system, or a version of fsspec, without exclusive creation
                if self._system.exists(path):
                    raise FileExistsError(path) from error
                self._system.pipe_file(path, data)

    def put(self, name: str, data: bytes) -> None:
        with _os_errors():
            self._system.pipe_file(self._path(name, make_parent=True), data)

    def stream(self, name: str) -> Writing:
        with _os_errors():
            return _RemoteFile(self._system.open(self._path(name, make_parent=True), "wb"))

    def _path(self, name: str, make_parent: bool = False) -> str:
        path = f"{self._root}/{name}"
        if make_parent:
            # Object stores have no folders, and some refuse to make one. If one is needed, writing fails later.
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
    """Turn the errors of all fsspec file systems into OSError. TimeoutError is reserved for missing workers."""
    try:
        yield
    except (FileNotFoundError, FileExistsError) as error:
        raise type(error)(without_secrets(str(error))) from error
    except Exception as error:
        raise OSError(without_secrets(summarize_error(error))) from error


def open_folder(url: str) -> Folder:
    """Return the folder of a path or an fsspec URL.

    Raises:
        ValueError: the protocol of the URL is unknown, or its package is not installed.
    """
    if "://" not in url and "::" not in url:
        return _Local(Path(url).expanduser())
    # fsspec comes with torch. A plain path does not need it.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    try:
        system, root = url_to_fs(url)
    except Exception as error:
        raise ValueError(
            f"exchange={without_secrets(url)!r}: cannot be opened ({without_secrets(summarize_error(error))}). "
            "Name a folder, or a URL with a protocol that fsspec supports here."
        ) from error
    return _Local(Path(root)) if isinstance(system, LocalFileSystem) else _Remote(system, root)


def without_secrets(text: str) -> str:
    """Return a URL, or a text with URLs in it, without user, password and query (which may hold a token).

    >>> without_secrets("https://me:secret@host/run?sig=secret"), without_secrets("runs/what?")
    ('https://host/run', 'runs/what?')
    """
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", re.sub(r"//[^/@\s]*@", "//", text))
