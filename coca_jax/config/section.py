"""Sections of a configuration, and how mappings (recipes, flags, JSON) become them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from coca_jax import image_shape
from coca_jax.config import rules

S = TypeVar("S", bound="Section")


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of keys: attributes with a default, a rule and a meaning each (`rules.key`)."""

    def to_dict(self) -> dict[str, Any]:
        """{key: value}, sections as dicts: what `read` takes back."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Section):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = tuple(v.to_dict() if isinstance(v, Section) else v for v in value)
            found[field.name] = value
        return found

    def change(self: S, values: Mapping[str, Any], name: str = "config") -> S:
        """This section with other values: {'batch_size': 8, 'data.num_threads': 1}, or with a
        section's together, {'data': {'num_threads': 1}}.

        Raises ValueError for a key that there is not, and a value that cannot be.
        """
        tree = self.to_dict()
        for path, value in values.items():
            group: Any = tree
            kind: Any = type(self)
            *groups, last = path.split(".")
            for part in groups:
                if not isinstance(group.get(part), dict):
                    raise ValueError(f"{name}.{path}: {_no_section(group, part)}")
                group, kind = group[part], inner(kind, part)
            _merge(group, last, value, kind)
        return read(type(self), tree, name)


def _no_section(group: Mapping[str, Any], part: str) -> str:
    if part in group:
        return f"{part!r} is no section; give its value whole"
    near = difflib.get_close_matches(part, group, n=1)
    return f"there is no {part!r}" + (f"; did you mean {near[0]}?" if near else "")


def _merge(group: dict[str, Any], key: str, value: Any, kind: type[Section] | None) -> None:
    """Puts a value into a section's tree; a mapping goes into a section in it key by key, and takes
    the place of a mapping, which would keep keys that nobody wants otherwise."""
    within = inner(kind, key)
    if isinstance(value, Section):
        group[key] = value.to_dict()
    elif rules.is_mapping(value) and within and isinstance(group.get(key), dict):
        for name, one in value.items():
            _merge(group[key], name, one, within)
    else:
        group[key] = value


_TYPES: dict[str, dict[str, Any]] = {}  # to ask Python for them takes as long as all the rest


def types(section: type[Section]) -> dict[str, Any]:
    """{key: the type of its value} of a section."""
    name = section.__qualname__
    if name not in _TYPES:
        _TYPES[name] = typing.get_type_hints(section)
    return _TYPES[name]


def inner(section: type[Section] | None, key: str) -> type[Section] | None:
    """The section that the value of a key is, or None for a plain value and what is in one."""
    found = types(section).get(key) if section else None
    return found if isinstance(found, type) and issubclass(found, Section) else None


def keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted name, field) of all plain values of a section, those of its sections included."""
    for field in dataclasses.fields(section):
        below = inner(section, field.name)
        if below:
            yield from keys(below, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def is_value(section: type[Section], name: str) -> bool:
    """Whether a dotted name is that of a plain value of a section, which a dict may be as well."""
    return any(name == known for known, _ in keys(section))


def read(section: type[S], tree: Mapping[str, Any], name: str = "config", old: bool = False) -> S:
    """A section from a mapping; keys that are not there have their default.

    Args:
        section: what to make.
        tree: a dict or ConfigDict, of values as Python or JSON has them.
        name: what messages call it.
        old: whether keys that are not known are left out: of a file that another version wrote.

    Raises:
        ValueError: naming the first key that there is not, with the nearest one, or the first
            value that cannot be, with what can.
    """
    if not rules.is_mapping(tree):
        raise ValueError(f"{name}={short(tree)}: give a dict of {_names(section)}")
    values: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key, value in tree.items():
        if key not in fields:
            if not old:
                raise ValueError(unknown(section, str(key), name))
            continue
        below = inner(section, key)
        if below:
            values[key] = read(below, value, f"{name}.{key}", old)
            continue
        rule: rules.Rule = fields[key].metadata["rule"]
        if not rule.holds(value):
            raise ValueError(f"{name}.{key}={short(value)}: give {rule.words}")
        values[key] = _value(types(section)[key], value, f"{name}.{key}", old)
    return section(**values)


def _value(kind: Any, value: Any, name: str, old: bool) -> Any:
    """A value that its rule holds of, as the type of its key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        item = arguments[0]
        if isinstance(item, type) and issubclass(item, Section):
            return tuple(read(item, v, f"{name}[{i}]", old) for i, v in enumerate(value))
        return plain(value)
    if kind == image_shape.Size:
        return image_shape.shortest(value)
    if kind in (int, float, bool, str):
        return kind(value)
    return plain(value)


def plain(value: Any) -> Any:
    """A value without ConfigDicts and lists: dicts, tuples, and what is in them."""
    if rules.is_mapping(value):
        value = value.to_dict() if hasattr(value, "to_dict") else value
        return {key: plain(one) for key, one in value.items()}
    return tuple(map(plain, value)) if rules.is_sequence(value) else value


def unknown(section: type[Section], key: str, name: str) -> str:
    """The line for a key that a section has not."""
    here = [field.name for field in dataclasses.fields(section)]
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    near = near or nearest(key, [below for below, _ in keys(section)])
    guess = " or ".join(f"{name}.{one}" for one in near)
    remedy = f"did you mean {guess}?" if near else f"{name} has: {_names(section)}"
    return f"{name}.{key}: no key {key!r}; {remedy}"


def nearest(key: str, names: Sequence[str]) -> list[str]:
    """Of dotted names those, three at most, whose last part is most like a key; [] where none is
    much like it."""
    last = [name.rpartition(".")[2] for name in names]
    near = difflib.get_close_matches(key, last, n=1, cutoff=0.8)
    return [name for name, one in zip(names, last) if [one] == near][:3]


def whole_dict(name: str, key: str = "norm_eps") -> str:
    """What to do with a value that is a dict, of which a key, or something else, was given."""
    return f"{name} is a dict; give all of it in quotes: {name}=\"{{'{key}': ...}}\""


def _names(section: type[Section]) -> str:
    return ", ".join(sorted(field.name for field in dataclasses.fields(section)))


def short(value: Any) -> str:
    """A value as messages show it."""
    shown = repr(value)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def dotted(section: type[Section], tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a section's tree by the names that `change` takes: as `flatten`, but a mapping that
    is a value stays whole, an empty one too."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        below = inner(section, key)
        if below and isinstance(value, Mapping):
            found |= dotted(below, value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def flatten(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested values by the names that flags have: {'mesh': {'fsdp': 8}} -> {'mesh.fsdp': 8}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[prefix + key] = value
    return flat
