"""Files and folders that are replaced: the old contents or the new ones, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256 as digest
from pathlib import Path

import pytest

from gap_ds.storage import atomic
from gap_ds.storage.atomic import aside_of, delete_folder, old_of, replacing, replacing_folder, scratch_folder, sha256


class Killed(BaseException):
    """Ends a process at any line."""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in "one", "two":
        with replacing(path) as aside:
            assert aside.parent == tmp_path and not aside.exists()
            aside.write_text(text)
        assert contents(tmp_path) == {"file": text}


@pytest.mark.parametrize("error", [ValueError, OSError, Killed])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as aside:
        aside.write_text("ne")
        raise error
    assert contents(tmp_path) == {"file": "old"}


def test_leftovers_of_the_same_file_go_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a[1].0123.partial").touch(), (tmp_path / "a1.0123.partial").touch()
    (tmp_path / "a[1].x.partial").mkdir()
    with replacing(tmp_path / "a[1]") as aside:
        aside.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["a1.0123.partial", "a[1]", "a[1].x.partial"]


def test_a_second_writer_that_was_first_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="another process has written it"), replacing(path) as slow:
        slow.write_text("slow")
        with replacing(path) as fast:
            fast.write_text("fast")
    assert path.read_text() == "fast"


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in "one", "two":
        with replacing_folder(folder) as aside:
            assert aside == aside_of(folder) and not list(aside.iterdir())
            (aside / "sub").mkdir()
            (aside / "sub" / "file").write_text(text)
        assert contents(tmp_path) == {"folder/sub/file": text}


def calls(monkeypatch: pytest.MonkeyPatch, moment: int, error: type[BaseException]) -> None:
    """Makes every change of a name, and every flush, after the `moment`-th one fail."""
    count = 0

    def mortal(method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal count
            count += 1
            if count > moment:
                raise error
            return method(*arguments)

        return call

    monkeypatch.setattr(Path, "rename", mortal(Path.rename))
    monkeypatch.setattr(Path, "replace", mortal(Path.replace))
    monkeypatch.setattr(atomic, "sync", mortal(atomic.sync))


@pytest.mark.parametrize("error", [Killed, OSError])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    for moment in range(12):
        path, folder = tmp_path / f"{moment}" / "file", tmp_path / f"{moment}" / "folder"
        folder.mkdir(parents=True)
        path.write_text("old"), (folder / "file").write_text("old")
        finished = False
        with monkeypatch.context() as patch:
            calls(patch, moment, error)
            try:
                with replacing(path) as aside:
                    aside.write_text("new")
                with replacing_folder(folder) as aside:
                    (aside / "file").write_text("new")
                finished = True
            except (error, ValueError):
                pass
        assert path.read_text() in ("old", "new")
        whole = folder if folder.exists() else old_of(folder)
        assert contents(whole) in ({"file": "old"}, {"file": "new"})
        with replacing_folder(folder) as aside:  # leftovers are in nobody's way
            (aside / "file").write_text("later")
        assert contents(folder) == {"file": "later"} and not aside_of(folder).parent.exists()
        if finished:
            assert moment > 5
            return
    raise AssertionError("a replacement takes fewer steps than that")


WRITER = """
import sys
from pathlib import Path
from gap_ds.storage.atomic import replacing, replacing_folder, scratch_folder
with replacing(Path("file")) as file, replacing_folder(Path("folder")) as folder, scratch_folder(Path("a")) as scratch:
    for path in file, folder / "file", scratch / "file":
        path.write_text("half of the n")
    print("now", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_killed_leaves_the_old_contents(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old"), (tmp_path / "folder" / "file").write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    for taken in replacing_folder(tmp_path / "folder"), scratch_folder(tmp_path / "a"):
        with pytest.raises(ValueError, match="another process is writing there"), taken:
            pass
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / "file").read_text() == "old" and contents(tmp_path / "folder") == {"file": "old"}
    with replacing(tmp_path / "file") as file, replacing_folder(tmp_path / "folder") as folder:
        file.write_text("new"), (folder / "file").write_text("new")
    with scratch_folder(tmp_path / "a") as scratch:
        assert scratch.parent == tmp_path and not os.listdir(scratch)
    assert contents(tmp_path) == {"file": "new", "folder/file": "new"} and not scratch.exists()


def test_a_folder_is_deleted(tmp_path: Path) -> None:
    for name in "a", "b.partial":
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").touch()
        delete_folder(tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2**22, 2**22 + 1])
def test_the_hash_is_sha256(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert sha256(tmp_path / "file") == digest(data[:size]).hexdigest()
