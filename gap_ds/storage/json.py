"""JSON files: one reader, which validates against a pydantic model, and one writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from gap_ds.storage.atomic import replacing
from gap_ds.storage.errors import printable

#: Size limit of a JSON file in bytes; the gap.json of a model of a thousand entries has some hundred kilobytes.
_MOST_JSON = 256 * 2**20

_Value = TypeVar("_Value")

#: A count in a file.
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Record(BaseModel):
    """Base of our JSON objects: types are strict, unknown keys are ignored, NaN is refused."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


def read_json(path: Path, model: type[_Value]) -> _Value:
    """Reads an untrusted JSON file as a value of a pydantic model, or of a plain type such as `dict[str, Any]`.

    Raises:
        ValueError: the file is missing, too large, damaged, or does not hold such a value.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError(f"{path}: there is no such file.")
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, which is more than such a file can have.")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        return parse_json(data.decode(json.detect_encoding(data)), model)  # some editors add a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is damaged or of another kind (it is no text).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None


def parse_json(data: bytes | str, model: type[_Value]) -> _Value:
    """Parses untrusted JSON as a value of a pydantic model or of a plain type.

    Raises:
        ValueError: it does not hold such a value.
    """
    try:
        return TypeAdapter(model).validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{printable('.'.join(map(str, first['loc'])))}: " if first["loc"] else ""
        raise ValueError(f"is damaged or of another kind ({where}{printable(first['msg'])})") from None


def write_json(path: Path, value: Any) -> None:
    """Writes a plain value or a pydantic model as JSON; after a kill the file is whole or as before.

    Of a model only the fields that were given are written; a reader fills in the defaults of the others.

    Raises:
        ValueError: JSON has no such value.
        OSError: the disk refuses the file.
    """
    plain = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
    try:
        text = json.dumps(plain, indent=1)
        from_json(text)  # not all that Python writes can be read: halves of surrogate pairs, lists in hundreds of lists
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: holds what JSON cannot express: {error}") from None
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def parse_table(text: bytes) -> dict[str, Any]:
    """Parses an untrusted JSON object, such as the header of a safetensors file.

    Raises:
        ValueError: it is not JSON, not an object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("is no JSON table")
    return found
