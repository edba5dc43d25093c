"""The page of all keys, docs/config.md: `python -m coca_jax.config.docs > docs/config.md`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from coca_jax.config.data import Entry
from coca_jax.config.fields import Section, inner, types
from coca_jax.config.run import Config

TOP = """# Every key of a run

<!-- Made by `python -m coca_jax.config.docs`; the text stands in coca_jax/config. -->

A recipe is a Python file whose `get_config()` begins from `coca_jax.recipes.base` and changes what
it needs. Each value can be set on the command line, as `--config.optimizer.learning_rate=1e-4`; a
tuple is given whole, in quotes: `--config.image_sizes="((0.5, 128),)"`. A key that there is not is
refused with the nearest name, and a value out of its range with the range. `config.json` of a run
holds all keys.
"""
NESTED = "Each entry of `data.sources` is a dict of these keys; names one of the first four."


def page() -> str:
    """The text of the page."""
    parts = [TOP, *_section(Config, "")]
    parts += [f"## An entry of `data.sources`\n\n{NESTED}\n", _table(Entry, "")]
    return "\n".join(parts).rstrip("\n") + "\n"


def _section(section: type[Section], name: str) -> Iterator[str]:
    """Heading and table of a section, then those of its sections."""
    title = f"`{name[:-1]}`" if name else "The run"
    yield f"## {title}\n\n{(section.__doc__ or '').strip()}\n"
    yield _table(section, name)
    for field in dataclasses.fields(section):
        below = inner(section, field.name)
        if below:
            yield from _section(below, f"{name}{field.name}.")


def _table(section: type[Section], name: str) -> str:
    lines = ["| key | type | default | what it may be | what it is |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(section):
        if inner(section, field.name):
            continue
        kind = _kind(types(section)[field.name])
        rule, meaning = field.metadata["rule"], field.metadata["meaning"]
        default = getattr(section(), field.name)
        cells = (f"`{name}{field.name}`", kind, f"`{default!r}`", rule.words, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(found: Any) -> str:
    """A type as the page calls it."""
    if isinstance(found, type):
        return found.__name__
    name = str(found).replace("typing.", "").replace("collections.abc.", "")
    return name.replace("coca_jax.config.data.Entry", "dict").replace("Mapping[str, Any]", "dict")


if __name__ == "__main__":
    print(page(), end="")
