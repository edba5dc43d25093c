"""The formats that coca_jax reads, found in the modules of this package.

A module that defines FORMATS adds formats; nothing else names them. To add one, write a module with
`plan` and `read`. A module imports the package that it needs lazily (`epy.lazy_imports`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import coca_jax.data.sources
from coca_jax.runtime import extras

if TYPE_CHECKING:  # they name files, and so formats
    from coca_jax.data.sources.items import Drawn, Item, Options, Rows, Unit


@dataclasses.dataclass(frozen=True)
class Format:
    """How data of a format are read.

    Attributes:
        name: of `prepare --format`.
        plan: (path, split, options) -> the units of the input, in order.
        read: (unit, options) -> the items of a unit, in order.
        patterns: globs of its files, in lower case.
        priority: where files of several formats lie in a folder, the format with the lowest number
            is read; 0: the names of files alone don't tell this format.
        in_place: whether an index of the data can be read, without a copy of them.
        obstacle: (units) -> why these units can't be read in place, '' if they can.
        package: (module, extra) that it needs.
        splits: (path) -> the splits that the input tells; None: those in its files' names.
        located: (unit, options) -> items whose images are files, without those.
        column: (unit, name) -> the values of a field, without reading any other.
        index_rows: (unit, options, root) -> `read` for an index without checks, faster.
        joined: (units) -> units as one process reads them; neighbors may become one.
        declared_classes: (unit, options) -> the class names that the data declare, in order.
        drawn: (unit) -> what was drawn of the data before.
        has_pairs: (path, split) -> whether its examples are pairs of images.
    """

    name: str
    plan: Callable[[str, str, Options], list[Unit]]
    read: Callable[[Unit, Options], Iterator[Item]]
    patterns: tuple[str, ...] = ()
    priority: int = 100
    in_place: bool = True
    obstacle: Callable[[Sequence[Unit]], str] = lambda units: ""
    package: tuple[str, str] | None = None
    splits: Callable[[str], list[str]] | None = None
    located: Callable | None = None
    column: Callable | None = None
    index_rows: Callable[..., Iterator[Item | Rows]] | None = None
    joined: Callable[[Sequence[Unit]], Sequence[Unit]] = lambda units: units
    declared_classes: Callable[[Unit, Options], Iterable[str]] = lambda unit, options: (
        options.class_names
    )
    drawn: Callable[[Unit], Drawn] | None = None
    has_pairs: Callable[[str, str], bool] = lambda path, split: False


@functools.cache
def formats() -> dict[str, Format]:
    """All formats by name, in the order in which they are recognized."""
    found: list[Format] = []
    for module in pkgutil.iter_modules(coca_jax.data.sources.__path__):
        name = f"{coca_jax.data.sources.__name__}.{module.name}"
        found += getattr(importlib.import_module(name), "FORMATS", ())
    return {one.name: one for one in sorted(found, key=lambda one: one.priority)}


def find(name: str) -> Format:
    """A format by its name. Raises ValueError: an unknown one, or its package is not installed."""
    if name not in formats():
        raise ValueError(f"--format={name}: use one of {', '.join(formats())}")
    found = formats()[name]
    if found.package:
        extras.check(*found.package, f"--format={name}")
    return found
