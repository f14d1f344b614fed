"""The folder where the workers meet: on a local or shared file system, or behind a URL that fsspec knows."""

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

from gap_ds.storage.errors import summarize_error


class Writing(Protocol):
    """A file that is being written."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        """Completes the file."""

    def discard(self) -> None:
        """Gives the file up."""


class Folder(Protocol):
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

    def stream(self, name: str) -> Writing:
        """A file that takes the place of the one that may be there when it is closed."""

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
    with _new(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _new(path: Path) -> BinaryIO:
    """A file that did not exist; also not as a link to another place."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


class _LocalFile:
    """Written aside, under a name that no other process has, flushed to disk and renamed."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        self._file = _new(self._aside)

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        try:
            self._aside.replace(self._path)
        except FileNotFoundError:
            raise OSError("another process has published in the meantime: is the same worker running twice?") from None
        for left in self._path.parent.glob(f"{self._path.name}.*.partial"):  # by jobs that were killed
            left.unlink(missing_ok=True)
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

    def stream(self, name: str) -> Writing:
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
    except (FileNotFoundError, FileExistsError) as error:
        raise type(error)(without_secrets(str(error))) from error
    except Exception as error:
        raise OSError(without_secrets(summarize_error(error))) from error


def open_folder(url: str) -> Folder:
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
            f"exchange={without_secrets(url)!r}: cannot be opened ({without_secrets(summarize_error(error))}). "
            "Name a folder, or a URL whose protocol fsspec knows here."
        ) from error
    return _Local(Path(root)) if isinstance(system, LocalFileSystem) else _Remote(system, root)


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs in it, without user, password and query (which may hold a token).

    >>> without_secrets("https://me:secret@host/run?sig=secret"), without_secrets("runs/what?")
    ('https://host/run', 'runs/what?')
    """
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", re.sub(r"//[^/@\s]*@", "//", text))
