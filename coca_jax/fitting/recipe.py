"""A config as a recipe file: Python that begins from the base config and says what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from coca_jax.config import Config, Section


def source(config: Config, title: str, why: Sequence[str]) -> str:
    """The text of a recipe whose get_config() gives `config`.

    title: the first line of its docstring; why: lines that follow it.
    """
    lines = [f'"""{_doc(title)}', "", *(_doc(f"- {line}") for line in why), '"""', ""]
    lines += ["from ml_collections import ConfigDict", "", "from coca_jax.configs import base"]
    lines += ["", "", "def get_config() -> ConfigDict:"]
    lines += ['    """The choice that `coca-jax fit` made; change what you like."""']
    lines += ["    config = base.get_config()"]
    lines += list(_assignments(config, Config(), "config"))
    lines += ["    return config"]
    return "\n".join(lines) + "\n"


def _doc(line: str) -> str:
    return line.replace("\\", "\\\\").replace('"""', "'''")


def _assignments(section: Section, default: Section, name: str) -> Iterator[str]:
    """One line a value that differs, groups of values in one call."""
    changed: dict[str, Any] = {}
    groups: list[tuple[str, Section, Section]] = []
    for key, value in section.to_dict().items():
        here, there = getattr(section, key), getattr(default, key)
        if isinstance(here, Section):
            groups.append((f"{name}.{key}", here, there))
        elif here != there:
            changed[key] = value
    if name == "config":
        yield from (f"    config.{key} = {literal(value, 4)}" for key, value in changed.items())
    elif changed:
        yield f"    {name}.update({_items(changed, 4)})"
    for path, here, there in groups:
        yield from _assignments(here, there, path)


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
