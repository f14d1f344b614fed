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


#: The name of an entry that is some rows of a parameter.
_ROWS = re.compile(r"(.+)\[(\d+):(\d+)\]", re.DOTALL)


def with_rows(parameter: str, lo: int, hi: int) -> str:
    """The name of the entry that is rows lo to hi of a parameter's first dimension."""
    return f"{parameter}[{lo}:{hi}]"


def rows_of(name: str) -> tuple[str, tuple[int, int] | None]:
    """The parameter that an entry is of, and its rows (lo, hi) of the first dimension; None: it is the whole parameter.

    >>> rows_of("mlp.experts.gate_up_proj[4:8]"), rows_of("mlp.gate_proj.weight")
    (('mlp.experts.gate_up_proj', (4, 8)), ('mlp.gate_proj.weight', None))
    """
    match = _ROWS.fullmatch(name)
    return (match[1], (int(match[2]), int(match[3]))) if match else (name, None)


def by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """The entries of each parameter, in their order. Wherever the module's names are asked for, entries pass here.

    >>> by_parameter(["experts.up[0:2]", "experts.up[2:4]", "fc.weight"])
    {'experts.up': ['experts.up[0:2]', 'experts.up[2:4]'], 'fc.weight': ['fc.weight']}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(rows_of(name)[0], []).append(name)
    return found


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names in which the pattern matches whole components: `layers.1` is in `layers.1.fc1` but not in `layers.10`."""
    try:
        re.compile(pattern)  # for a message with places in the pattern itself
        regex = re.compile(rf"(?:.*\.)?(?:{pattern})(?:\..*)?")
    except re.error as error:
        hint = ' Any text is ".*", and a name is matched with all below it.' if "*" in pattern else ""
        raise ValueError(f'pattern "{pattern}" is not a regular expression: {error}.{hint}') from None
    return [name for name in names if regex.fullmatch(name)]


def no_match(setting: str, pattern: str, names: Sequence[str]) -> str:
    """The message for a pattern that matches no name, with the nearest names."""
    parents = dict.fromkeys(prefix for name in names for prefix in (name, parent(name), parent(parent(name))) if prefix)
    near = difflib.get_close_matches(pattern, parents, n=3, cutoff=0.4) or list(names)[:3]
    return f'{setting}: pattern "{pattern}" matches none of {len(names)} weights. Near matches: {", ".join(near)}.'
