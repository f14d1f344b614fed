"""Writes docs/reference.md from docstrings, the settings of the config and the help texts of the command line.

    python docs/build_reference.py

tests/unit/test_docs.py compares the file with what this gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

import gap_ds
from gap_ds import distill, hf, optim
from gap_ds.cli.app import app
from gap_ds.export import compact, expand
from gap_ds.method.config import GaPConfig
from gap_ds.method.methods import METHODS

PAGE = Path(__file__).with_name("reference.md")
#: Public objects by the module that they are imported from.
PUBLIC: dict[str, list[Any]] = {
    "gap_ds": [getattr(gap_ds, name) for name in gap_ds.__all__ if not name.startswith("__")],
    "gap_ds.optim": [optim.AdamW, optim.SGD],
    "gap_ds.hf": [hf.GaPCallback, hf.prepare, hf.mask_adapters, hf.merge],
    "gap_ds.export": [compact, expand],
    "gap_ds.distill": [distill.Teacher, distill.logit_distance, distill.hidden_distance],
}
#: Methods that the Trainer calls, not the user.
_HOOKS = "on_"
_WIDTH = 100


def build() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "Written by `python docs/build_reference.py` from the code: change it there.",
        "- [Commands](#commands)\n- [Methods](#methods)\n- [Settings](#settings)\n"
        + "\n".join(f"- [{module}](#{anchor(module)})" for module in PUBLIC),
        "## Commands",
        *_commands(),
        "## Methods",
        "Values of the setting `method`. The record of each is in `gap_ds/method/methods.py`.",
        _methods(),
        "## Settings",
        "Of the GaP config, JSON or YAML. `gap-ds schema` prints them as a JSON schema. Setting what a method never "
        "reads is an error.",
        _settings(),
    ]
    for module, objects in PUBLIC.items():
        parts.append(f"## {module}")
        for found in objects:
            parts += _object(found)
    return "\n\n".join(parts) + "\n"


def anchor(heading: str) -> str:
    """The id that GitHub gives a heading.

    >>> anchor("gap_ds.hf"), anchor("What is in one"), anchor("`gap-ds plan`")
    ('gap_dshf', 'what-is-in-one', 'gap-ds-plan')
    """
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


# -- commands ----------------------------------------------------------------------------------------------------------


def help_text(*command: str) -> str:
    """What `gap-ds COMMAND --help` prints at 80 columns."""
    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERMINAL_WIDTH": "80"}
    done = CliRunner().invoke(app, [*command, "--help"], prog_name="gap-ds", env=environment)
    assert done.exit_code == 0, done.output
    return "\n".join(line.rstrip() for line in done.output.strip().splitlines())


def commands() -> list[str]:
    """Names of the commands, in the order of the help."""
    return list(getattr(typer.main.get_command(app), "commands", {}))


def _commands() -> Iterator[str]:
    yield _block(help_text())
    for command in commands():
        yield f"### gap-ds {command}"
        yield _block(help_text(command))


# -- methods -----------------------------------------------------------------------------------------------------------


def _methods() -> str:
    rows = ["| method | is | source |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| `{m.name}` | {m.summary} | {m.source} |" for m in METHODS.values())])


# -- settings ----------------------------------------------------------------------------------------------------------


def _settings() -> str:
    rows = ["| setting | values | default | meaning | not read by |", "|---|---|---|---|---|"]
    for name, field in GaPConfig.model_fields.items():
        unread = ", ".join(method.name for method in METHODS.values() if not method.reads_setting(name))
        default = field.get_default(call_default_factory=True)
        shown = "" if default is None else f"`{default}`"
        cells = [f"`{name}`", _values(field), shown, field.description or "", unread]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def _values(field: FieldInfo) -> str:
    """The values that a setting takes, in words."""
    limits = {key: getattr(limit, key) for limit in field.metadata for key in ("ge", "gt", "le", "lt")
              if hasattr(limit, key)}  # fmt: skip
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = ", ".join(f"{signs[key]} {value:g}" for key, value in limits.items())
    kinds = " or ".join(dict.fromkeys(_kinds(field.annotation)))
    return f"{kinds}, {bounds}" if bounds else kinds


def _kinds(annotation: Any) -> Iterator[str]:
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if get_origin(annotation) is Literal:
        yield ", ".join(f"`{value}`" for value in get_args(annotation))
    elif annotation in names:
        yield names[annotation]
    elif get_origin(annotation) is list:
        yield "list of " + " or ".join(f"{kind}s" if not kind.startswith("list") else kind.replace("list", "lists", 1)
                                       for kind in _kinds(get_args(annotation)[0]))  # fmt: skip
    elif get_origin(annotation) is dict:
        yield "object of numbers"
    elif annotation is not NoneType:
        for part in get_args(annotation):
            yield from _kinds(part)


# -- objects -----------------------------------------------------------------------------------------------------------


def _object(found: Any) -> Iterator[str]:
    yield f"### {found.__name__}"
    # A config is built from its settings, which have a table of their own.
    own = f"{found.__name__}(**settings)" if found is GaPConfig else signature(found, found.__name__)
    yield _block(f"{own}\n\n{_doc(found)}")
    if inspect.isclass(found):
        for name, member in vars(found).items():
            if (text := _member(found, name, member)) is not None:
                yield f"#### {found.__name__}.{name}"
                yield _block(text)


def _member(owner: type, name: str, member: Any) -> str | None:
    """Signature and docstring of a method or property; None for what is not for users."""
    inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
    if name.startswith(("_", _HOOKS)) or not inspect.isfunction(inner) or not inner.__module__.startswith("gap_ds"):
        return None
    if inner.__qualname__ != f"{owner.__name__}.{name}":  # torch hooks an inherited step() by putting it in the class
        return None
    called = f"{owner.__name__}.{name}"
    if isinstance(member, property):
        return f"{called} -> {inspect.signature(inner).return_annotation}\n\n{_doc(inner)}"
    return f"{signature(getattr(owner, name), called)}\n\n{_doc(inner)}"


def signature(found: Callable[..., Any], name: str) -> str:
    """A signature, with a line for each parameter where one line is too long.

    >>> signature(anchor, "anchor")
    'anchor(heading: str) -> str'
    """
    of = inspect.signature(found)
    given = [
        p if p.annotation is p.empty else p.replace(annotation=_Bare(p.annotation)) for p in of.parameters.values()
    ]
    parameters = [p for p in given if p.name != "self"]
    returned = "" if inspect.isclass(found) else f" -> {of.return_annotation}"
    line = f"{name}{inspect.Signature(parameters)}{returned}"
    if len(line) <= _WIDTH:
        return line
    rows = [str(p) for p in parameters]
    named = [i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY]
    if named:
        rows.insert(named[0], "*")
    return f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + f"){returned}"


class _Bare(str):
    """An annotation that is shown as it stands in the source, without quotes."""

    __repr__ = str.__str__


def _doc(found: Any) -> str:
    return inspect.cleandoc(found.__doc__ or "")


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
