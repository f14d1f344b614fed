"""Config files: where a config is found, how it is read, and the sentences that explain the mistakes in one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

#: Folder of the shipped configs, which are loaded by name.
SHIPPED = Path(__file__).resolve().parents[1] / "configs"
#: Earlier names of settings, for the sentence that refuses them.
_RENAMED = {
    "assign": "partition_assignment",
    "init": "mask_init",
    "init_file": "mask_file",
    "lr": "lr_restart",
    "order": "partition_order",
    "shared": "unpartitioned",
}


def _find(source: str | Path) -> Path:
    """Return the file at a path, or the shipped config of that name."""
    path = Path(source)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}
    if path.name not in shipped:
        raise ValueError(f"{source}: is neither a file nor a shipped config. Shipped are {', '.join(shipped)}.")
    return shipped[path.name]


def read(source: str | Path) -> Any:
    """Return the content of a JSON or YAML file, or of the shipped config of that name."""
    path = _find(source)
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors add a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path}: cannot be read as a GaP config: {reason}") from None
    try:
        return _parse_yaml(text) if is_yaml else json.loads(text, object_pairs_hook=_once)
    except ImportError:
        raise ValueError(f"{path}: YAML configs need PyYAML (pip install pyyaml); JSON needs nothing") from None
    except Exception as error:  # the parsers raise many kinds; all mean the same to the user
        raise ValueError(f"{path}: not valid {'YAML' if is_yaml else 'JSON'}: {error}") from None


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs as a dict; ValueError if a key comes twice, where both readers would take the last one."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{key}" is set twice. Remove one of the two.')
        found[key] = value
    return found


def _parse_yaml(text: str) -> Any:
    import yaml  # optional: only YAML configs need it

    class Loader(yaml.SafeLoader):
        """Reads no key twice, and `2:4` as the text that it is in YAML 1.2: in 1.1 it is 2 times 60 and 4."""

        def construct_yaml_int(self, node: Any) -> Any:
            value: str = self.construct_scalar(node)
            return value if ":" in value else super().construct_yaml_int(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _once((self.construct_object(key, deep=True), None) for key, _ in node.value)
            found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return found

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return yaml.load(text, Loader)


def explain(error: ValidationError, origin: str, known: list[str]) -> str:
    """Return one sentence per mistake in a config: the value given, what is allowed, where to change it."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden" and where in _RENAMED:
            hint = ' (true for "restart", false for "continuous")' if where == "lr" else ""
            lines.append(f'setting "{where}" in {origin} is now called "{_RENAMED[where]}"{hint}.')
        elif item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(known)}."
            lines.append(f'unknown setting "{where}" in {origin}: {hint}')
        elif not where:
            lines.append(f"{item['msg'].removeprefix('Value error, ')} (in {origin}).")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            lines.append(f'{where}={item["input"]!r}: {message}. Set "{item["loc"][0]}" in {origin}.')
    return "\n".join(lines)
