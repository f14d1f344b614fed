"""Safetensors: the writer against the library's reader and writer, the reader against damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gap_ds.storage.safetensors import (
    DTYPES,
    LazyTensors,
    Writer,
    chunks,
    decode,
    encode,
    header_length,
    header_table,
    offsets,
    open_tensors,
    read_header,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
#: C64 is not in every version of the library.
NAMES = sorted(DTYPES.keys() - {"C64"})


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"), unique=True)):
        dtype, shape = DTYPES[draw(st.sampled_from(NAMES))], draw(st.lists(st.integers(0, 4), max_size=3))
        size = torch.Size(shape).numel() * dtype.itemsize
        data = draw(st.binary(min_size=size, max_size=size))
        data = bytes(byte % 2 for byte in data) if dtype == torch.bool else data
        found[name] = decode(data, dtype).view(shape)
    return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and encode(a).tobytes() == encode(b).tobytes()


def write(path: Path, values: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with Writer(path, {name: (t.dtype, t.shape) for name, t in values.items()}, metadata) as file:
        for name in reversed(values):
            file.write(name, values[name])


@PROPERTY
@given(tensors(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_the_library_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("written") / "file"
    write(path, values, metadata)
    found = load_file(path)
    assert found.keys() == values.keys() and all(same(found[name], values[name]) for name in values)
    with open_tensors(path) as file:
        assert (file.metadata() or {}) == metadata
    text, area = read_header(path)
    assert json.loads(text) == header_table({name: (t.dtype, t.shape) for name, t in values.items()}, metadata)
    assert area == sum(encode(t).size for t in values.values()) and (8 + len(text)) % 8 == 0


@PROPERTY
@given(tensors())
def test_what_the_library_writes_is_read(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Tensor]) -> None:
    path = tmp_path_factory.mktemp("read") / "file"
    save_file(values, path, {"format": "x", "version": "3"})
    with open_tensors(path, ("x", 3)) as file:
        assert set(file.keys()) == set(values)
        for name, tensor in values.items():
            assert same(file.get_tensor(name), tensor)
            parts = list(chunks(file, name))
            assert same(torch.cat(parts) if tensor.dim() and tensor.shape[0] else tensor, tensor)


def test_tensors_on_a_graph_or_not_contiguous_are_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3)).t()
    write(tmp_path / "file", {"w": weight}, {})
    assert torch.equal(load_file(tmp_path / "file")["w"], weight)


def test_metadata_can_be_replaced_by_one_of_the_same_length(tmp_path: Path) -> None:
    with Writer(tmp_path / "file", {"a": (torch.uint8, (3,))}, {"digest": "00"}) as file:
        file.write("a", torch.tensor([1, 2, 3], dtype=torch.uint8))
        file.set_metadata({"digest": "f0"})
    with open_tensors(tmp_path / "file") as found:
        assert found.metadata() == {"digest": "f0"} and found.get_tensor("a").tolist() == [1, 2, 3]


def test_an_error_of_the_disk_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"a": (torch.uint8, (1,))}
    reached = []
    with pytest.raises(FileNotFoundError), Writer(tmp_path / "no" / "file", layout, {}) as file:
        file.write("a", torch.zeros(1, dtype=torch.uint8))
        reached.append(1)
    assert reached == [1]
    with pytest.raises(KeyError), Writer(tmp_path / "no" / "file", layout, {}):  # an error of the block comes first
        raise KeyError

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), Writer(tmp_path / "file", layout, {}) as file:
        file.write("a", torch.zeros(1, dtype=torch.uint8))


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w: safetensors has no torch\.complex128\. Convert it first"):
        Writer(tmp_path / "file", {"w": (torch.complex128, (1,))}, {})


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, {"a": torch.arange(4), "b": torch.zeros(2, dtype=torch.uint8)}, {"format": "x", "version": "1"})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or damaged"), open_tensors(path):
            pass
    path.write_bytes(content)
    for kind, message in ((("y", 1), "is no file of the kind y"), (("x", 2), "x of version 1; this .* version 2")):
        with pytest.raises(ValueError, match=message), open_tensors(path, kind):
            pass
    with pytest.raises(ValueError, match=r"truncated or damaged .*nothing"), open_tensors(path) as file:
        file.get_tensor("nothing")
    with pytest.raises(OSError, match="of the caller"), open_tensors(path):  # which is not of this file
        raise OSError("of the caller")
    with pytest.raises(ValueError, match="there is no such file"), open_tensors(tmp_path):
        pass


@pytest.mark.parametrize(
    ("first", "size", "message"),
    [
        (b"\1\0", 2, "has 2 bytes, too few"),
        ((100).to_bytes(8, "little"), 99, "does not fit into the 99 bytes"),
        ((2**62).to_bytes(8, "little"), 2**63, "is longer than 100000000"),
    ],
)
def test_header_lengths(first: bytes, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        header_length(first, size)


def test_lazy_tensors_are_read_at_each_look_up() -> None:
    read: list[str] = []

    def look_up(name: str) -> Any:
        read.append(name)
        return torch.zeros(1)

    found = LazyTensors(["b", "a", "b"], look_up)
    assert (list(found), len(found), "a" in found, read) == (["b", "a"], 2, True, ["a"])
    assert found["a"] is not found["a"] and read == ["a"] * 3
    with pytest.raises(KeyError):
        found["c"]


def test_offsets_follow_each_other() -> None:
    assert offsets({"w": (torch.float32, (2, 3)), "e": (torch.bool, (0, 7)), "b": (torch.uint8, ())}) == {
        "w": (0, 24),
        "e": (24, 24),
        "b": (24, 25),
    }
