"""JSON files: written whole or not at all, read against a model, and refused with one sentence."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from gap_ds.storage.json import Count, Record, parse_json, parse_table, read_json, write_json


class Row(Record):
    name: str
    count: Count
    share: float = 0.5


def refused(path: Path, model: Any = Row) -> str:
    with pytest.raises(ValueError) as error:
        read_json(path, model)
    return str(error.value)


def test_a_model_comes_back_and_defaults_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    write_json(path, Row(name="ä", count=2**62))
    assert read_json(path, Row) == Row(name="ä", count=2**62)
    assert read_json(path, dict[str, Any]) == {"name": "ä", "count": 2**62}
    assert os.listdir(tmp_path) == ["row.json"]


def test_values_that_json_lacks_are_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"a": [1, 2.5, None, "x"]})
    with pytest.raises(ValueError, match=r"state\.json: holds what JSON cannot express"):
        write_json(path, {"a": {1, 2}})
    assert read_json(path, dict[str, Any]) == {"a": [1, 2.5, None, "x"]} and os.listdir(tmp_path) == ["state.json"]


def test_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    write_json(path, Row(name="a", count=3))
    content = path.read_bytes()
    for length in range(len(content) - 1):
        path.write_bytes(content[:length])
        assert refused(path).startswith(f"{path}: is damaged or of another kind (")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "Input should be an object"),
        ('{"name": "a"}', "count: Field required"),
        ('{"name": "a", "count": -1}', "count: Input should be greater than or equal to 0"),
        ('{"name": "a", "count": 9223372036854775808}', "count: Input should be less than"),
        ('{"name": "a", "count": true}', "count: Input should be a valid integer"),
        ('{"name": "a", "count": 1, "share": NaN}', "share: Input should be a finite number"),
        ('{"name": "a\\u001b", "count": "\\u001b[2J"}', "count: Input should be a valid integer"),
        ("[" * 100_000, "recursion limit"),
        ("\ud800", ""),
    ],
)
def test_other_values_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "row.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    said = refused(path)
    assert message in said and said.endswith(").") and len(said) < 400 and "\x1b" not in said


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing") == f"{tmp_path / 'missing'}: there is no such file."
    assert "there is no such file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "there is no such file" in refused(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 2**29)
    assert "has 536,870,912 bytes" in refused(tmp_path / "huge")


def test_parsing_a_text() -> None:
    assert parse_json('{"a": 1}', dict[str, int]) == {"a": 1}
    assert math.isnan(parse_json("NaN", float))
    with pytest.raises(ValueError, match=r"^is damaged or of another kind \(a: Input should be a valid integer"):
        parse_json('{"a": "x"}', dict[str, int])


def test_tables_have_each_key_once() -> None:
    assert parse_table(b'{"a": {"b": 1}} ') == {"a": {"b": 1}}
    for text in (b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 1}}', b"[1]", b"1", b"", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="is no JSON"):
            parse_table(text)
