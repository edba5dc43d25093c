"""A config as a recipe file: Python that begins from the base config and says what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from coca_jax import recipes


def source(config: ConfigDict, title: str, why: Sequence[str]) -> str:
    """The text of a recipe whose get_config() gives `config`.

    title: the first line of its docstring; why: lines that follow it.
    """
    lines = [f'"""{_doc(title)}', "", *(_doc(f"- {line}") for line in why), '"""', ""]
    lines += ["from ml_collections import ConfigDict", "", "from coca_jax.configs import base"]
    lines += ["", "", "def get_config() -> ConfigDict:"]
    lines += ['    """The choice that `coca-jax fit` made; change what you like."""']
    lines += ["    config = base.get_config()"]
    base = recipes.load("base")
    if _shape(config.model) != _shape(base.model):
        # A model from elsewhere has keys of its own and may lack some of these.
        whole = literal(plain(config.model), 4)
        lines += [f"    config.model = ConfigDict({whole}, convert_dict=True)"]
    lines += list(_assignments(config, base, "config"))
    lines += ["    return config"]
    return "\n".join(lines) + "\n"


def _doc(line: str) -> str:
    return line.replace("\\", "\\\\").replace('"""', "'''")


def _shape(config: ConfigDict) -> set[str]:
    found: set[str] = set()
    for key, value in config.items():
        inner = isinstance(value, ConfigDict)
        found |= {f"{key}.{name}" for name in _shape(value)} if inner else {key}
    return found


def _assignments(config: ConfigDict, default: ConfigDict, name: str) -> Iterator[str]:
    """One line a value that differs, groups of values in one call."""
    changed: dict[str, Any] = {}
    groups = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            if name == "config" and key == "model" and _shape(value) != _shape(default[key]):
                continue
            groups.append((key, value))
        elif plain(value) != plain(default[key]):
            changed[key] = plain(value)
    if name == "config":
        yield from (f"    config.{key} = {literal(value, 4)}" for key, value in changed.items())
    elif changed:
        yield f"    {name}.update({_items(changed, 4)})"
    for key, value in groups:
        yield from _assignments(value, default[key], f"{name}.{key}")


def plain(value: Any) -> Any:
    """A value as Python literals: ConfigDicts as dicts, lists as tuples."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(one) for one in value)
    return value


def literal(value: Any, indent: int) -> str:
    """A value as Python, on one line where it fits, else an item a line."""
    if isinstance(value, dict):
        return f"dict({_items(value, indent)})"
    if isinstance(value, (list, tuple)):
        parts = [literal(one, indent + 4) for one in value]
        return f"({_joined(parts, indent, tail=',' if len(parts) == 1 else '')})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _items(values: dict[str, Any], indent: int) -> str:
    return _joined([f"{key}={literal(one, indent + 4)}" for key, one in values.items()], indent)


def _joined(parts: list[str], indent: int, tail: str = "") -> str:
    line = ", ".join(parts) + tail
    if len(line) + indent <= 76 and "\n" not in line:
        return line
    space = " " * (indent + 4)
    return "".join(f"\n{space}{part}," for part in parts) + "\n" + " " * indent
