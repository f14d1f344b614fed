"""Damaged and hostile files: truncated, flipped, forged, replaced."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanging import read, start
from fake_ranks import item_of

from gap_ds.masks import bitmask
from gap_ds.parallel import Exchange, Received


@pytest.fixture
def small(tmp_path: Path) -> tuple[Exchange, Path, Callable[[], list[Received]]]:
    """One worker's folder with a small file in it."""
    weight, kept = torch.arange(1.0, 13.0), torch.arange(12) % 3 == 0
    items = [
        item_of("w", (3, 4), 0, 0, 12, lambda: weight, keep=4),
        item_of("b", (2,), None, 0, 2, lambda: torch.tensor([0.5, 1.5])),
    ]
    job = start(str(tmp_path), 0, 1)
    job.publish(0, items, {"w": bitmask.pack(kept)})
    return job, tmp_path / "round_0", lambda: read(job, items)


def resign(folder: Path, data: bytes) -> None:
    """Writes a file and a manifest that goes with it."""
    (folder / "worker_0.safetensors").write_bytes(data)
    manifest = json.loads((folder / "worker_0.json").read_text())
    manifest |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "worker_0.json").write_text(json.dumps(manifest))


def test_a_file_truncated_anywhere_is_refused(small: Any) -> None:
    _, folder, read = small
    path = folder / "worker_0.safetensors"
    data = path.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"worker_0.safetensors: has \d+ bytes instead of the \d+ of its manifest"):
            read()
        resign(folder, data[:length])
        with pytest.raises(ValueError, match=r"worker_0.safetensors: .*delete its manifest \(worker_0.json\)"):
            read()
        resign(folder, data)
    assert len(read()) == 2


def test_a_flipped_bit_anywhere_is_refused(small: Any) -> None:
    _, folder, read = small
    path = folder / "worker_0.safetensors"
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"worker_0.safetensors: "):
            read()


def test_a_manifest_truncated_anywhere_is_refused(small: Any) -> None:
    _, folder, read = small
    path = folder / "worker_0.json"
    text = path.read_bytes()
    for length in range(0, len(text), 3):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match=r"worker_0.json: is damaged or of another kind"):
            read()


def test_a_file_that_is_whole_on_the_second_look_is_read(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    job, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    original, seen = job._folder.read, []

    def first_wrong(name: str, begin: int, end: int) -> bytes:
        found = original(name, begin, end)
        if name.endswith(".safetensors") and begin > 8 and not seen:
            seen.append(name)
            return b"\0" * len(found)
        return found

    job._folder.read = first_wrong
    with caplog.at_level(logging.WARNING, "gap_ds"):
        assert len(read()) == 2
    assert "SHA-256" in caplog.text and "reading it once more" in caplog.text and len(data) > 0


def test_a_file_that_vanished_is_refused(small: Any) -> None:
    _, folder, read = small
    (folder / "worker_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"worker_0.safetensors: FileNotFoundError"):
        read()


def forged(data: bytes, change: Callable[[dict[str, Any]], Any], area: bytes | None = None) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (data[8 + length :] if area is None else area)


def sized(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: b"{", "is no JSON"),
        (lambda h: b"[" * 2000, "is no JSON"),
        (lambda h: b'{"a": {}, "a": {}}', "a name comes twice"),
        (lambda h: h.pop("b") and None, "lacks b"),
        (lambda h: h.update(c=h.pop("b")), "lacks b"),
        (
            lambda h: h.update({"../../c": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            "holds ../../c, which",
        ),
        (
            lambda h: h.update({"\ud800\x1b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            r"holds \\ud800\\x1b, which",
        ),
        (
            sized("b", dtype="I32"),
            r'b is {"dtype": "I32", "shape": \[2\], .*} instead of {"dtype": "F32", "shape": \[2\]',
        ),
        (sized("b", dtype=["F32"]), "b is"),
        (sized("b", shape=[1, 2]), "b is"),
        (sized("b", shape=2), "b is"),
        (sized("b", shape=[1 << 64]), "b is"),
        (lambda h: b'{"a": 1' + b"0" * 5000 + b"}", "is no JSON"),
        (sized("b", data_offsets=[0, 1 << 62]), "b is"),
        (sized("b", more=1), "b is"),
        (sized("b", more="\x1b" * 1000), "b is"),
        (lambda h: h.update(b=[]), r"b is \[\] instead of"),
        (sized("w.values", data_offsets=[0, 16]), "w.values is"),
        (lambda h: h["__metadata__"].update(round="1"), '"round": "1".* instead of .*"round": "0"'),
        (lambda h: h["__metadata__"].update(more=1), "__metadata__ is"),
        (lambda h: h.pop("__metadata__") and None, "lacks __metadata__"),
    ],
)
def test_a_forged_header_is_refused(small: Any, change: Any, sentence: str) -> None:
    """With a manifest that goes with the file, so that its checksum is right."""
    _, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    resign(folder, forged(data, change))
    with pytest.raises(ValueError, match=sentence) as caught:
        read()
    str(caught.value).encode()


@pytest.mark.parametrize("area", [b"", b"\0" * 1000])
def test_a_file_with_more_or_fewer_bytes_than_its_header_says_is_refused(small: Any, area: bytes) -> None:
    _, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    resign(folder, forged(data, lambda header: None, area))
    with pytest.raises(ValueError, match=rf"its tensors have 26 bytes, and {len(area)} follow the header"):
        read()


def test_a_huge_header_is_not_read(small: Any) -> None:
    _, folder, read = small
    data = (folder / "worker_0.safetensors").read_bytes()
    resign(folder, struct.pack("<Q", 1 << 62) + data[8:])
    with pytest.raises(ValueError, match="does not fit into"):
        read()
    with (folder / "worker_0.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(95_000_000)
    manifest = json.loads((folder / "worker_0.json").read_text())
    (folder / "worker_0.json").write_text(json.dumps(manifest | {"bytes": 95_000_000}))
    with pytest.raises(ValueError, match="header of 90000000 bytes is longer than"):
        read()


def test_a_forged_mask_does_not_move_weights(small: Any) -> None:
    """A mask with another number of bits than there are values, under a right checksum."""
    _, folder, read = small
    data = bytearray((folder / "worker_0.safetensors").read_bytes())
    data[-2] ^= 1 << 1
    resign(folder, bytes(data))
    with pytest.raises(ValueError, match="the mask of w keeps 5 weights, and there are 4"):
        read()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["worker_0.safetensors", "worker_0.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_regular_file_is_refused(small: Any, name: str, kind: str, tmp_path: Path) -> None:
    """A named pipe would be waited for without end; a link may lead to a device."""
    _, folder, read = small
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name}: is (no regular file|a link)"):
        read()
