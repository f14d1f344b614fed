"""Helpers of the tests beside this file: small checkpoints, and changed headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_ds.sharding.comm import Comm
from gap_ds.storage.json import write_json

ALONE = Comm(single=True)


def refused(work: Callable[[], Any]) -> str:
    """The message of the ValueError that the work ends in."""
    with pytest.raises(ValueError) as error:
        work()
    return str(error.value)


def writer(content: str) -> Callable[[Path], None]:
    """Writes a checkpoint of two small files."""

    def write_all(folder: Path) -> None:
        (folder / "weights").write_text(content)
        write_json(folder / "gap" / "state.json", {"content": content})

    return write_all


def content_of(path: Path) -> str:
    """The content that `writer` wrote, the same in both files."""
    state = json.loads((path / "gap" / "state.json").read_text())
    assert (path / "weights").read_text() == state["content"]
    return str(state["content"])


def tags(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def replace_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
