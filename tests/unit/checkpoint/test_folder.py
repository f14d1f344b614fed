"""Folders of checkpoints: whole or absent, found again, damage noticed, kept in number."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_ranks import Ranks
from folders import ALONE, content_of, refused, tags, writer

from gap_ds import checkpoint
from gap_ds.checkpoint import folder as folder_module
from gap_ds.sharding.comm import raise_on_all_ranks
from gap_ds.storage.json import write_json


def test_save_and_find(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.find(folder)
    assert checkpoint.save(folder, "step_1", ALONE, writer("one")) == folder / "step_1"
    assert checkpoint.save(folder, "step_2", ALONE, writer("two")) == folder / "step_2"
    assert content_of(checkpoint.find(folder)) == "two"
    assert content_of(checkpoint.find(folder, "step_1")) == "one"
    checkpoint.save(folder, "step_2", ALONE, writer("two again"))
    assert content_of(checkpoint.find(folder)) == "two again"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_1", "step_2"]


@pytest.mark.parametrize("tag", ["step_9", "", ".", "..", "../run/step_1", "step_1/gap"])
def test_no_such_checkpoint(tmp_path: Path, tag: str) -> None:
    checkpoint.save(tmp_path / "run", "step_1", ALONE, writer("one"))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.find(tmp_path / "run", tag)


class Killed(BaseException):
    """What ends a process at any line."""


@pytest.mark.parametrize("tag", ["step_1", "step_2"])
def test_a_writer_that_fails_leaves_the_older_checkpoint(tmp_path: Path, tag: str) -> None:
    checkpoint.save(tmp_path, "step_1", ALONE, writer("one"))

    def failing(folder: Path) -> None:
        (folder / "weights").write_text("half of tw")
        raise Killed

    with pytest.raises(Killed):
        checkpoint.save(tmp_path, tag, ALONE, failing)
    assert content_of(checkpoint.find(tmp_path)) == "one"
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.find(tmp_path, "step_2")
    checkpoint.save(tmp_path, tag, ALONE, writer("two"))  # what was left behind is in nobody's way
    assert content_of(checkpoint.find(tmp_path)) == "two"


def saved_until(monkeypatch: pytest.MonkeyPatch, moment: int, folder: Path, tag: str) -> bool:
    """Saves "two" and is killed at the `moment`-th change of a name; whether it was finished before."""
    calls = 0

    def mortal(method: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def call(self: Path, target: Path) -> Path:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return method(self, target)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", mortal(Path.rename))
        patch.setattr(Path, "replace", mortal(Path.replace))
        try:
            checkpoint.save(folder, tag, ALONE, writer("two"))
        except Killed:
            return False
    return True


@pytest.mark.parametrize("tag", ["step_1", "step_2"])
def test_killed_at_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    for moment in range(10):
        folder = tmp_path / str(moment)
        checkpoint.save(folder, "step_1", ALONE, writer("one"))
        finished = saved_until(monkeypatch, moment, folder, tag)
        assert content_of(checkpoint.find(folder)) in (["two"] if finished else ["one", "two"])
        if finished:
            return
    raise AssertionError("a save changes fewer names than that")


# -- manifest ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", "step_1", ALONE, writer("one"))


def test_the_manifest_lists_every_file(saved: Path) -> None:
    manifest = json.loads((saved / "gap" / "manifest.json").read_text())
    assert manifest["format"] == "gap_ds.manifest" and (manifest["version"], manifest["number"]) == (1, 1)
    assert manifest["files"].keys() == {"weights", "gap/state.json"}
    size, digest = manifest["files"]["weights"]
    assert size == 3 and digest == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert checkpoint.damage(saved, ALONE) is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_files_and_agree(saved: Path, tmp_path: Path, ranks: int) -> None:
    def write(folder: Path) -> None:
        for i in range(7):
            (folder / f"part_{i}").write_bytes(bytes([i]) * (1000 * i))
        write_json(folder / "gap" / "state.json", {})

    found = Ranks(ranks).run(
        lambda rank: checkpoint.save(tmp_path / "many", "t", rank, write if rank.rank == 0 else lambda _: None)
    )
    assert found == [tmp_path / "many" / "t"] * ranks
    alone = checkpoint.save(tmp_path / "alone", "t", ALONE, write)
    manifests = [(path / "gap" / "manifest.json").read_bytes() for path in (found[0], alone)]
    assert manifests[0] == manifests[1]
    assert Ranks(ranks).run(lambda rank: checkpoint.damage(alone, rank)) == [None] * ranks
    for i in range(1, 7):
        path = alone / f"part_{i}"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\xff")
        reason = f"{path}: does not have the checksum it was saved with"
        assert Ranks(ranks).run(lambda rank: checkpoint.damage(alone, rank)) == [reason] * ranks
        path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_balanced(ranks: int) -> None:
    rng = random.Random(ranks)
    sizes = {f"f{i}": rng.randrange(1000) for i in range(50)}
    shares = Ranks(ranks).run(lambda rank: folder_module._share(sizes, rank))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 1000


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path / "weights").unlink(), "weights: cannot be read (FileNotFoundError"),
    "shorter": (lambda path: (path / "weights").write_text("on"), "weights: has 2 bytes, and was saved with 3"),
    "longer": (lambda path: (path / "weights").write_text("one "), "weights: has 4 bytes, and was saved with 3"),
    "changed": (lambda path: (path / "weights").write_text("onf"), "weights: does not have the checksum"),
    "no manifest": (lambda path: (path / "gap/manifest.json").unlink(), "manifest.json: there is no such file"),
    "no state": (lambda path: (path / "gap/state.json").unlink(), "state.json: cannot be read"),
    "torn": (lambda path: os.truncate(path / "gap/manifest.json", 30), "manifest.json: is damaged"),
    "a folder": (lambda path: ((path / "weights").unlink(), (path / "weights").mkdir()), "weights: has "),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_a_tag_and_passed_over_without(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    for tag in ("step_1", "step_2", "step_3"):
        newest = checkpoint.save(tmp_path, tag, ALONE, writer("one"))
    damage(newest)
    assert reason in refused(lambda: checkpoint.find_whole(tmp_path, "step_3", ALONE))
    for ranks in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = Ranks(ranks).run(lambda rank: checkpoint.find_whole(tmp_path, None, rank))
        assert found == [tmp_path / "step_2"] * ranks
        assert [str(w.message) for w in caught if reason in str(w.message)] and len(caught) == 1
    for tag in ("step_1", "step_2"):
        damage(tmp_path / tag)
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        assert reason in refused(lambda: checkpoint.find_whole(tmp_path, None, ALONE))


def test_the_newest_is_the_last_written_whatever_its_name_and_time(tmp_path: Path) -> None:
    for tag in ("step_9", "b", "step_1"):
        path = checkpoint.save(tmp_path, tag, ALONE, writer("one"))
    os.utime(path / "gap" / "state.json", (0, 0))
    (tmp_path / "latest").write_text("b")  # a kill may have come between the two
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step_1", "b", "step_9"]
    checkpoint.save(tmp_path, "b", ALONE, writer("one"))
    assert checkpoint.find_whole(tmp_path, None, ALONE).name == "b"


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"number": 0},
        {"number": float("inf")},
        {"files": []},
        {"files": {}},
        {"files": {"gap/state.json": [1]}},
        {"files": {"gap/state.json": ["x", "y"]}},
        {"files": {"../weights": [1, "y"], "gap/state.json": [1, "y"]}},
        {"files": {"/etc/passwd": [1, "y"], "gap/state.json": [1, "y"]}},
        {"files": {"a\0b": [1, "y"], "gap/state.json": [1, "y"]}},
    ],
)
def test_a_manifest_that_says_something_else(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "gap" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reason = checkpoint.damage(saved, ALONE)
    assert reason is not None and str(saved) in reason


def test_a_manifest_damaged_anywhere(saved: Path) -> None:
    """Truncated at every byte, and with every bit flipped: named, or without effect on what is loaded."""
    path = saved / "gap" / "manifest.json"
    content, harmless = path.read_bytes(), 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert checkpoint.damage(saved, ALONE) is not None or content[length:].isspace()
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        harmless += checkpoint.damage(saved, ALONE) is None
        assert position % 8 or checkpoint.candidates(saved.parent) == [saved]
    assert harmless < 30  # in the number of the checkpoint, and in white space


# -- how many are kept ---------------------------------------------------------------------------------------------


def test_keep_leaves_the_newest_that_are_complete(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_0" / "gap").mkdir(parents=True)  # looks like one of ours, and is none
    (tmp_path / "step_7.partial" / "new" / "gap").mkdir(parents=True)  # what a killed save leaves
    (tmp_path / "step_8.partial" / "gap").mkdir(parents=True)  # what a killed deletion leaves
    for i in range(1, 5):
        checkpoint.save(tmp_path, f"step_{i}", ALONE, writer("one"))
    (tmp_path / "step_3" / "weights").unlink()  # damaged: not counted, and left to be looked at
    checkpoint.save(tmp_path, "step_5", ALONE, writer("one"), keep=3)
    assert tags(tmp_path) == ["notes", "step_0", "step_2", "step_3", "step_4", "step_5"]
    checkpoint.save(tmp_path, "step_6", ALONE, writer("one"), keep=1)
    assert tags(tmp_path) == ["notes", "step_0", "step_3", "step_6"]
    checkpoint.save(tmp_path, "step_6", ALONE, writer("one"), keep=1)
    assert tags(tmp_path) == ["notes", "step_0", "step_3", "step_6"]
    assert "keep=0: must be at least 1" in refused(lambda: checkpoint.save(tmp_path, "x", ALONE, writer("one"), keep=0))


def test_nothing_is_deleted_before_the_new_one_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "step_1", ALONE, writer("one"))
    rmtree, seen = shutil.rmtree, []

    def watched(path: Path, **arguments: Any) -> None:
        if Path(path).exists():
            seen.append((Path(path).name, (tmp_path / "step_2" / "gap" / "manifest.json").exists()))
        rmtree(path, **arguments)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoint.save(tmp_path, "step_2", ALONE, writer("one"), keep=1)
    assert seen == [("step_2.partial", True), ("step_1.partial", True)] and tags(tmp_path) == ["step_2"]


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "/tmp/a", "a.partial"])
def test_a_tag_is_the_name_of_a_folder(tmp_path: Path, tag: str) -> None:
    assert "must be the name of a folder" in refused(lambda: checkpoint.save(tmp_path, tag, ALONE, writer("one")))


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["step_1", "step_2"])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank(tmp_path: Path, tag: str, full: int) -> None:
    checkpoint.save(tmp_path, "step_1", ALONE, writer("one"))

    def save(rank: Any) -> Path:
        def write(folder: Path) -> None:
            def part() -> None:
                (folder / f"part_{rank.rank}").write_text("x")
                if rank.rank == full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "part"))

            raise_on_all_ranks(rank, part)

        return checkpoint.save(tmp_path, tag, rank, write)

    for error in Ranks(2).run(save):
        assert isinstance(error, ValueError) and "No space left on device" in str(error)
        assert "was not saved, and older checkpoints are as they were" in str(error)
    assert tags(tmp_path) == ["step_1"] and content_of(checkpoint.find_whole(tmp_path, None, ALONE)) == "one"


def test_contents_from_before_a_killed_save_count_as_the_checkpoint(tmp_path: Path) -> None:
    """A kill between the two renames of a tag that is saved again leaves its earlier contents aside."""
    for content in "one", "two":
        checkpoint.save(tmp_path, f"step_{content}", ALONE, writer(content))
    (tmp_path / "step_two.partial" / "new" / "gap").mkdir(parents=True)
    (tmp_path / "step_two").rename(tmp_path / "step_two.partial" / "old")
    for tag in None, "step_two":
        assert content_of(checkpoint.find_whole(tmp_path, tag, ALONE)) == "two"
    checkpoint.save(tmp_path, "step_three", ALONE, writer("three"), keep=2)
    assert tags(tmp_path) == ["step_three", "step_two.partial"]
    checkpoint.save(tmp_path, "step_two", ALONE, writer("four"))
    assert tags(tmp_path) == ["step_three", "step_two"] and content_of(checkpoint.find(tmp_path)) == "four"
    (tmp_path / "step_three.partial").mkdir()
    (tmp_path / "step_three").rename(tmp_path / "step_three.partial" / "old")
    checkpoint.save(tmp_path, "step_five", ALONE, writer("five"), keep=1)
    assert tags(tmp_path) == ["step_five"]
