"""The base of all config sections: how they are declared, read, changed and validated.

A section is a frozen pydantic dataclass. pydantic checks types and ranges, from the annotations
alone; everything else sees an ordinary dataclass (`dataclasses.fields`, `dataclasses.replace`,
attributes, equality). We prefer its dataclasses to `BaseModel` because a model adds some forty
methods to the namespace of the keys, and its copies are not validated.

`read` makes a section from a mapping (a recipe's ConfigDict, JSON). It turns the first problem that
pydantic finds into one line that names the key, its value and what is allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import numbers
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import annotated_types
import numpy as np
import pydantic
from annotated_types import Interval
from pydantic import AfterValidator

from coca_jax.config import shapes

# strict: no text for a number, no number for a flag.
STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

# Types that several sections share.
Channels = Annotated[int, Interval(ge=1, le=65_536)]
OwnChannels = Annotated[int, Interval(ge=0, le=65_536)]  # 0: those of another key
MlpChannels = Annotated[int, Interval(ge=1, le=1 << 20)]
OwnMlpChannels = Annotated[int, Interval(ge=0, le=1 << 20)]
Heads = Annotated[int, Interval(ge=1, le=4096)]
OwnHeads = Annotated[int, Interval(ge=0, le=4096)]
Depth = Annotated[int, Interval(ge=1, le=1024)]
TextLength = Annotated[int, Interval(ge=3, le=65_536)]  # begin and end symbols, and one token
Steps = Annotated[int, Interval(ge=0, le=1_000_000_000)]
EverySteps = Annotated[int, Interval(ge=1, le=1_000_000_000)]
BatchSize = Annotated[int, Interval(ge=1, le=1 << 24)]
Seed = Annotated[int, Interval(ge=0, le=(1 << 32) - 1)]  # JAX and SentencePiece keep 32 bits
Weight = Annotated[float, Interval(ge=0, le=1e6)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Side = Annotated[int, Interval(ge=1, le=16_384)]
Size = Annotated[Side | tuple[Side, Side], AfterValidator(shapes.shortest)]

T = TypeVar("T")
S = TypeVar("S", bound="Section")


def option(default: T, help: str) -> T:
    """A key of a section: its default and its help text. Its annotation says what is allowed."""
    given: Any = dict(default_factory=dict) if default == {} else dict(default=default)
    return dataclasses.field(**given, metadata=dict(help=help))


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of keys. Subclasses are pydantic dataclasses with the config STRICT."""

    def to_dict(self) -> dict[str, Any]:
        """{key: value} with sections as dicts: what `read` accepts."""
        return {
            field.name: _untyped(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def change(self: S, values: Mapping[str, Any], name: str = "config") -> S:
        """A copy with other values: {'batch_size': 8, 'data.num_threads': 1}, or several of a
        section, {'data': {'num_threads': 1}}.

        Raises ValueError for an unknown key and for a value that is not allowed.
        """
        tree = self.to_dict()
        for path, value in values.items():
            group: Any = tree
            kind: Any = type(self)
            *groups, last = path.split(".")
            for part in groups:
                if not isinstance(group.get(part), dict):
                    near = difflib.get_close_matches(part, group, n=1)
                    remedy = f" Did you mean {near[0]}?" if near and part not in group else ""
                    raise ValueError(f"{name}.{path}: {part!r} is not a section.{remedy}")
                group, kind = group[part], inner(kind, part)
            _merge(group, last, value, kind)
        return read(type(self), tree, name)

    def replace_unchecked(self: S, **values: Any) -> S:
        """A copy with other values that need not be allowed, for what is not a user's config."""
        copied = copy.copy(self)
        for key, value in values.items():
            object.__setattr__(copied, key, value)
        return copied

    def require(self, reason: str, prefix: str = "", /, **wanted: tuple[Any, ...]) -> None:
        """Raises ValueError for the first key whose value is not among the `wanted` ones. A double
        underscore stands for a dot. reason: the setting that the key conflicts with."""
        for key, good in wanted.items():
            key = key.replace("__", ".")
            value = operator.attrgetter(key)(self)
            if value not in good:
                choices = " or ".join(map(repr, good))
                raise ValueError(
                    f"{prefix}{key}={value!r} does not go with {reason}. Set {choices}."
                )


def _untyped(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    return tuple(map(_untyped, value)) if isinstance(value, tuple) else value


def _merge(group: dict[str, Any], key: str, value: Any, kind: type[Section] | None) -> None:
    """Puts a value into a section's tree. A mapping updates a section key by key; it replaces a
    plain value that is a mapping, such as model.image.block."""
    within = inner(kind, key)
    if isinstance(value, Section):
        group[key] = value.to_dict()
    elif is_mapping(value) and within and isinstance(group.get(key), dict):
        for name, one in value.items():
            _merge(group[key], name, one, within)
    else:
        group[key] = value


def is_mapping(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a mapping; a ConfigDict is one, though not for Python."""
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def inner(section: type[Section] | None, key: str) -> type[Section] | None:
    """The class of a key that is itself a section, or None for a plain value."""
    field = pydantic_fields(section).get(key) if section else None
    found = field.annotation if field else None
    return found if isinstance(found, type) and issubclass(found, Section) else None


def pydantic_fields(section: type[Section]) -> dict[str, pydantic.fields.FieldInfo]:
    """What pydantic knows of the keys: annotation and constraints."""
    found: dict[str, pydantic.fields.FieldInfo] = section.__pydantic_fields__  # type: ignore
    return found


def keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted name, field) of all plain values, including those of inner sections."""
    for field in dataclasses.fields(section):
        below = inner(section, field.name)
        if below:
            yield from keys(below, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def is_value(section: type[Section], name: str) -> bool:
    """Whether a dotted name is a plain value (which may be a dict) rather than a section."""
    return any(name == known for known, _ in keys(section))


def read(
    section: type[S], tree: Section | Mapping[str, Any], name: str = "config", old: bool = False
) -> S:
    """A section from a mapping; missing keys have their default.

    Args:
        section: the class.
        tree: a dict or ConfigDict with values as Python or JSON has them.
        name: what messages call it.
        old: ignore unknown keys, for a file that another version may have written.

    Raises:
        ValueError: names the first unknown key and the nearest known one, or the first value that
            is not allowed.
    """
    if isinstance(tree, section):
        return tree
    if not is_mapping(tree):
        raise ValueError(f"{name}={short(tree)}: give a dict of {_names(section)}")
    known = pydantic_fields(section)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in known:
            if not old:
                raise ValueError(_unknown(section, str(key), name))
            continue
        below, annotation = inner(section, key), known[key].annotation
        item = (*typing.get_args(annotation), None)[0]
        if below:
            values[key] = read(below, value, f"{name}.{key}", old)
        elif isinstance(item, type) and issubclass(item, Section) and is_sequence(value):
            places = [f"{name}.{key}[{number}]" for number in range(len(value))]
            values[key] = tuple(read(item, v, place, old) for v, place in zip(value, places))
        else:
            values[key] = plain(value)
    try:
        return section(**values)
    except pydantic.ValidationError as error:
        raise ValueError(_line(section, values, name, error)) from None


def _line(
    section: type[Section], values: Mapping[str, Any], name: str, error: pydantic.ValidationError
) -> str:
    """pydantic's first error in one line. A message of our own validators is shown as it is."""
    first = error.errors(include_url=False)[0]
    own = str(first["ctx"]["error"]) if first["type"] == "value_error" else ""
    if not first["loc"]:  # a validator of the section, which names its keys
        return f"{name}.{own}"
    key = str(first["loc"][0])
    field = pydantic_fields(section)[key]
    remedy = own or f"give {allowed(field.annotation, field.metadata)}"
    return f"{name}.{key}={short(values[key])}: {remedy}"


def check_value(kind: Any, value: Any, name: str) -> None:
    """Raises ValueError, in one line, for a value that an annotation does not allow."""
    adapter = pydantic.TypeAdapter(kind, config=STRICT)
    try:
        adapter.validate_python(plain(value))
    except pydantic.ValidationError:
        raise ValueError(f"{name}={short(value)}: give {allowed(kind)}") from None


def allowed(kind: Any, limits: Sequence[Any] = ()) -> str:
    """What an annotation allows, in words: "a whole number from 1 to 4,096"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return allowed(arguments[0], [*arguments[1:], *limits])
    if origin is Literal:
        names = ", ".join(map(repr, arguments))
        return f"one of {names}" if len(arguments) > 1 else names
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(allowed, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a tuple, each item {allowed(arguments[0])}"
        if len(set(arguments)) == 1:
            count = "a pair" if len(arguments) == 2 else f"a tuple of {len(arguments)}"
            return f"{count}, each {allowed(arguments[0])}"
        return f"a pair ({', '.join(map(allowed, arguments))})"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(limits)
    return {bool: "True or False", str: "a string"}.get(kind, "a dict")


def _range(limits: Sequence[Any]) -> str:
    """' from 0 to below 1' of annotated_types' constraints, '' without any."""
    words = {annotated_types.Ge: "from", annotated_types.Gt: "above"}
    words |= {annotated_types.Le: "to", annotated_types.Lt: "to below"}
    found = ""
    for group in limits:
        for limit in group if isinstance(group, annotated_types.GroupedMetadata) else [group]:
            if type(limit) in words:
                bound = getattr(limit, type(limit).__name__.lower())  # Ge(ge=0)
                shown = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
                found += f" {words[type(limit)]} {shown}"
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; True and False are not."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_sequence(value: Any) -> bool:
    """Whether a value is a tuple or list; not a string."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def plain(value: Any) -> Any:
    """A value without ConfigDicts, lists and NumPy scalars: dicts, tuples, and what they hold."""
    if isinstance(value, Section):
        return value
    if is_mapping(value):
        value = value.to_dict() if hasattr(value, "to_dict") else value
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(plain, value)) if is_sequence(value) else value


def _unknown(section: type[Section], key: str, name: str) -> str:
    """The line for an unknown key."""
    here = [field.name for field in dataclasses.fields(section)]
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    near = near or nearest(key, [below for below, _ in keys(section)])
    guess = " or ".join(f"{name}.{one}" for one in near)
    remedy = f"did you mean {guess}?" if near else f"{name} has: {_names(section)}"
    return f"{name}.{key}: no key {key!r}; {remedy}"


def nearest(key: str, names: Sequence[str]) -> list[str]:
    """At most three dotted names whose last part resembles a key; [] if none does."""
    last = [name.rpartition(".")[2] for name in names]
    near = difflib.get_close_matches(key, last, n=1, cutoff=0.8)
    return [name for name, one in zip(names, last) if [one] == near][:3]


def whole_dict(name: str, key: str = "norm_eps") -> str:
    """How to set a value that is a dict, when a single key of it was given."""
    return f"{name} is a dict; give all of it in quotes: {name}=\"{{'{key}': ...}}\""


def _names(section: type[Section]) -> str:
    return ", ".join(sorted(field.name for field in dataclasses.fields(section)))


def short(value: Any) -> str:
    """A value as messages show it."""
    shown = repr(value)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def dotted(section: type[Section], tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a section's tree by the names that `change` takes. Unlike `flatten`, a value
    that is a mapping remains one."""
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
