"""JSON files of unknown origin, read against a model: what is wrong with one is a ValueError with one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

#: Bytes of JSON that are read at most; the gap.json of a model of a thousand entries has some hundred kilobytes.
_MOST_JSON = 256 * 2**20

_Model = TypeVar("_Model", bound=BaseModel)


class Record(BaseModel):
    """A JSON object of ours: types are strict, what is not asked for is ignored, NaN is refused."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


def read_json(path: Path, model: type[_Model]) -> _Model:
    """A JSON file as a value of a pydantic model.

    Raises:
        ValueError: the file is missing, too large, damaged, or does not hold such a value.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError(f"{path}: there is no such file.")
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, which is more than such a file can have.")
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{printable('.'.join(map(str, first['loc'])))}: " if first["loc"] else ""
        raise ValueError(f"{path}: is damaged or of another kind ({where}{printable(first['msg'])}).") from None


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or colour its letters.

    >>> printable("fc1.weight"), printable("a\\x1b[2Jb"), printable("ä\\n")
    ('fc1.weight', 'a\\\\x1b[2Jb', 'ä\\\\n')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
