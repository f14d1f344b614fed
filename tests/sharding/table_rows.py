"""The rows of a table of runs: which of them `make test` takes, and which of them the selected tests need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

#: Every test that was collected, as FILE::NAME, and its markers; before any was deselected.
COLLECTED = pytest.StashKey[dict[str, set[str]]]()


def marked(rows: Iterable[Any], short: Collection[str], name: Callable[[Any], str] = str) -> list[Any]:
    """Rows as pytest takes them; those whose names are not in `short` have the marker `full`."""
    rows = list(rows)
    unknown = set(short) - {name(row) for row in rows}
    assert not unknown, f"no such rows: {sorted(unknown)}"
    marks = {False: [pytest.mark.full], True: []}
    return [pytest.param(row, id=name(row), marks=marks[name(row) in short]) for row in rows]


def needed(request: pytest.FixtureRequest, *arguments: str) -> list[Any]:
    """The values that the selected tests of this file have for an argument, in their order, each once.

    With several arguments: their tuples, of the tests that have all of them.
    """
    found: list[Any] = []
    for item in request.session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if item.path == request.path and all(argument in parameters for argument in arguments):
            values = tuple(parameters[argument] for argument in arguments)
            value = values if len(arguments) > 1 else values[0]
            found += [value] if value not in found else []
    return found
