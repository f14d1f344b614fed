"""Errors as text: for messages that go into other errors, to other ranks, or onto a terminal."""

from __future__ import annotations


def printable(text: str, limit: int | None = 200) -> str:
    r"""A text from outside, safe to print: without control characters, and cut after `limit` characters (None: whole).

    >>> printable("fc1.weight"), printable("a\x1b[2Jb"), printable("ä\n"), printable("abc", 2)
    ('fc1.weight', 'a\\x1b[2Jb', 'ä\\n', 'ab')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])


def summarize_error(error: BaseException) -> str:
    """Kind of an error and the first line of its message.

    >>> summarize_error(KeyError("a")), summarize_error(OSError())
    ("KeyError: 'a'", 'OSError')
    """
    return ": ".join([type(error).__name__, *(printable(line, 1000) for line in str(error).strip().splitlines()[:1])])


def error_text(error: BaseException) -> str:
    """Message of an error: a ValueError of ours is complete; any other error is summarized."""
    return str(error) if isinstance(error, ValueError) else summarize_error(error)
