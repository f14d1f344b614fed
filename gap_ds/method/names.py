"""Dotted names of modules and parameters: parents, prefixes, patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence


def inside(name: str, prefix: str) -> bool:
    """True if the name is the prefix or lies below it; everything lies below the empty prefix."""
    return name == prefix or name.startswith(prefix + ".") if prefix else True


def parent(name: str) -> str:
    """The name without its last component.

    >>> parent("layers.0.fc1.weight"), parent("weight")
    ('layers.0.fc1', '')
    """
    return name.rpartition(".")[0]


def ancestors(name: str) -> Iterator[str]:
    """The name, its parent and so on up to the empty name of the root.

    >>> list(ancestors("layers.0"))
    ['layers.0', 'layers', '']
    """
    while name:
        yield name
        name = parent(name)
    yield ""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names in which the pattern matches whole components: `layers.1` is in `layers.1.fc1` but not in `layers.10`."""
    try:
        regex = re.compile(rf"(?:.*\.)?(?:{pattern})(?:\..*)?")
    except re.error as error:
        raise ValueError(f'pattern "{pattern}" is not a regular expression: {error}.') from None
    return [name for name in names if regex.fullmatch(name)]


def no_match(setting: str, pattern: str, names: Sequence[str]) -> str:
    """The message for a pattern that matches no name, with the nearest names."""
    parents = dict.fromkeys(prefix for name in names for prefix in (name, parent(name), parent(parent(name))) if prefix)
    near = difflib.get_close_matches(pattern, parents, n=3, cutoff=0.4) or list(names)[:3]
    return f'{setting}: pattern "{pattern}" matches none of {len(names)} weights. Near matches: {", ".join(near)}.'
