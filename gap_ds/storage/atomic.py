"""Files and folders that are written aside, flushed to disk and renamed: after a kill they are whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: End of the names of files and folders that are being written, or were when their process was killed.
PARTIAL = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write a file to, which replaces `path` when the block ends without an error.

    The path is beside `path` under a random name. Leftovers of killed writers of the same file are deleted.

    Raises:
        OSError: the disk refuses the file, or another process has replaced `path` in the meantime.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        yield aside
        try:
            sync(aside)
            aside.replace(path)
        except FileNotFoundError:
            raise OSError(f"{path}: another process has written it in the meantime") from None
        for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
            if left.is_file():
                left.unlink(missing_ok=True)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def aside_of(folder: Path) -> Path:
    """The path that `replacing_folder(folder)` yields, for the other ranks of a job."""
    return folder.with_name(folder.name + PARTIAL) / "new"


def old_of(folder: Path) -> Path:
    """The path where a killed `replacing_folder(folder)` may have left the earlier contents."""
    return folder.with_name(folder.name + PARTIAL) / "old"


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, which replaces `folder` when the block ends without an error, and is deleted otherwise.

        FOLDER.partial/new    `aside_of(folder)`: the contents to come; a rename makes it FOLDER
        FOLDER.partial/old    `old_of(folder)`: the contents before, from just before that rename until after it

    A process that is killed between the two leaves `old` whole; the next one puts it back, or replaces it.

    Raises:
        ValueError: the disk refuses something, or another process is writing there now.
    """
    new, old = aside_of(folder), old_of(folder)
    shown = False
    try:
        with _alone_in(new.parent):
            try:
                for path in new.parent.iterdir():  # leftovers of a killed process
                    if path != old or folder.exists():
                        _delete(path)
                new.mkdir()
                yield new
                for path in (*new.rglob("*"), new):
                    if not path.is_symlink() and (path.is_file() or path.is_dir()):
                        sync(path)
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                shown = True
                with contextlib.suppress(OSError):  # from here on the new contents are in place
                    sync(folder.parent)
            finally:
                if old.exists() and not folder.exists():
                    old.rename(folder)
                is_lost = old.exists() and not shown  # another process has made FOLDER in the meantime
                shutil.rmtree(new if is_lost else new.parent, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error}).") from error


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` for work on it, which is deleted when the block ends.

    Its name depends on `path` alone, so that the next work deletes what a killed process has left there.

    Raises:
        ValueError: another process is working there now.
        OSError: the disk refuses it.
    """
    scratch = path.with_name(f"{path.name}.work{PARTIAL}")
    with _alone_in(scratch):
        try:
            for left in scratch.iterdir():
                _delete(left)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def delete_folder(path: Path) -> None:
    """Deletes a folder, so that a kill in the middle leaves no half of it under its name."""
    if not path.name.endswith(PARTIAL):
        gone = path.with_name(path.name + PARTIAL)
        shutil.rmtree(gone, ignore_errors=True)
        path = path.rename(gone)
    shutil.rmtree(path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, if there is none, that no other process holds; ValueError if one does.

    The lock ends with its process. A file system without locks does not keep other processes out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass
        if taken or os.fstat(descriptor).st_ino != folder.stat().st_ino:
            raise ValueError(f"{folder}: another process is writing there. Wait for it, or choose another folder.")
        yield
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            total.update(chunk)
    return total.hexdigest()
