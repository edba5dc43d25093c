"""What a single value of a configuration may be: a test, and the words for it with their unit."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from coca_jax.config import shapes

T = TypeVar("T")


class Rule(NamedTuple):
    """What a value may be: a test, and the words for it that follow 'give'."""

    holds: Callable[[Any], bool]
    words: str


def key(default: T, rule: Rule, meaning: str = "") -> T:
    """A field of a section: its default, what it may be, and what it means."""
    given: Any = dict(default_factory=dict) if default == {} else dict(default=default)
    return dataclasses.field(**given, metadata=dict(rule=rule, meaning=meaning))


def is_number(value: Any) -> bool:
    """A finite real number; no bool."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """A whole number; no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_mapping(value: Any) -> bool:
    """A mapping, or what is like one and no Mapping to Python, as a ConfigDict."""
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def is_sequence(value: Any) -> bool:
    """A tuple or list; no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def whole(low: int, high: int, what: str = "", or_else: tuple[int, str] | None = None) -> Rule:
    """A whole number from low to high; or_else: another one, and what it stands for."""
    words = f"a whole number{f' of {what}' if what else ''}, {low:,} to {high:,}"
    if or_else:
        words += f", or {or_else[0]} ({or_else[1]})"
    others = (or_else[0],) if or_else else ()
    return Rule(lambda v: is_whole(v) and (low <= v <= high or v in others), words)


def number(
    low: float, high: float, what: str = "", above: bool = False, below: bool = False
) -> Rule:
    """A finite number from low to high; above, below: the end itself is not in the range."""
    ends = f"{'above ' if above else 'from '}{low:g} {'to below' if below else 'to'} {high:g}"
    return Rule(
        lambda v: (
            is_number(v) and (low < v if above else low <= v) and (v < high if below else v <= high)
        ),
        f"a number {ends}{f', {what}' if what else ''}",
    )


def choice(*values: str) -> Rule:
    """One of some names."""
    return Rule(lambda v: v in values, f"one of {', '.join(map(repr, values))}")


def several(rule: Rule, count: int | None = None) -> Rule:
    """A tuple of values of a kind."""
    return Rule(
        lambda v: is_sequence(v) and count in (None, len(v)) and all(map(rule.holds, v)),
        f"{'a tuple' if count is None else count}, each {rule.words}",
    )


def _stages(value: Any, one: Rule) -> bool:
    """((share of the steps, size), ...): shares above 0 that leave some for the size at the end,
    sizes as the rule `one` has them."""
    if not is_sequence(value) or not all(is_sequence(pair) and len(pair) == 2 for pair in value):
        return False
    shares = [share for share, _ in value]
    good = all(is_number(share) and share > 0 for share in shares)
    good = good and math.fsum(shares) <= 1 + 1e-9  # 0.8, 0.05, 0.05 and 0.1 are a bit more than 1
    return good and all(one.holds(size) for _, size in value)


def _entries(value: Any) -> bool:
    """Mappings whose weight and limit, where there are any, are numbers of use."""
    if not is_sequence(value) or not all(is_mapping(entry) for entry in value):
        return False
    plain = [entry.to_dict() if hasattr(entry, "to_dict") else entry for entry in value]
    weights = [entry.get("weight", 1.0) for entry in plain]
    limits = [entry.get("limit") or 1 for entry in plain]
    return all(is_number(w) and w > 0 for w in weights) and all(
        is_whole(limit) and limit > 0 for limit in limits
    )


FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
TEXT = Rule(lambda v: isinstance(v, str), "a text")
TEXTS = several(TEXT)
MAPPING = Rule(is_mapping, "a dict")
MAPPINGS = Rule(lambda v: is_sequence(v) and all(map(is_mapping, v)), "a tuple of dicts")
SIZE = whole(1, 16_384, "pixels")
SIDES = Rule(
    lambda v: SIZE.holds(v) or (is_sequence(v) and len(v) == 2 and all(map(SIZE.holds, v))),
    f"{SIZE.words}, or a pair of them (height, width)",
)
WIDTH = whole(1, 65_536, "channels")
QUERIES = whole(1, 65_536, "queries")
HEADS = whole(1, 4096, "heads")
DEPTH = whole(1, 1024, "layers")
THETA = number(1, 1e7, "as 10000", above=True)
STEPS = whole(0, 1_000_000_000, "steps")
INTERVAL = whole(1, 1_000_000_000, "steps")
SHARE = number(0, 1, below=True)
WEIGHT = number(0, 1e6)
RATE = number(0, 1, "of the parameters' own size a step")
DEVICES = whole(1, 1 << 20, "devices", (-1, "those that are left"))
STAGES = Rule(
    lambda v: _stages(v, SIDES),
    "pairs (share of the steps, size in pixels), such as ((0.3, 128),), whose shares are above "
    "0 and add up to 1 at most",
)
EXAMPLES = whole(1, 1 << 24, "examples")
SEED = whole(0, (1 << 32) - 1)  # of JAX and SentencePiece, which have 32 bits for one
RAMP = Rule(
    lambda v: _stages(v, EXAMPLES),
    "pairs (share of the steps, batch size), such as ((0.2, 64),), whose shares are above 0 and "
    "add up to 1 at most",
)
SOURCES = Rule(
    _entries,
    "dicts, such as ({'path': 'data/mine', 'weight': 1.0},), weights and limits above 0",
)
RANDAUGMENT = Rule(
    lambda v: is_sequence(v) and len(v) == 2 and is_whole(v[0]) and 1 <= v[0] <= 16
    and is_number(v[1]) and 0 <= v[1] <= 30,
    "(operations 1 to 16, magnitude 0 to 30), such as (2, 10)",
)  # fmt: skip
SPAN = Rule(
    lambda v: (
        is_sequence(v) and len(v) in (0, 2) and all(map(INTERVAL.holds, v)) and v[:1] <= v[1:]
    ),
    "(first step, last step), from 1 on, or () for no profile",
)


# Sections of a configuration, and how mappings (recipes, flags, JSON) become them.


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
    elif is_mapping(value) and within and isinstance(group.get(key), dict):
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
    if not is_mapping(tree):
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
        rule: Rule = fields[key].metadata["rule"]
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
    if kind == shapes.Size:
        return shapes.shortest(value)
    if kind in (int, float, bool, str):
        return kind(value)
    return plain(value)


def plain(value: Any) -> Any:
    """A value without ConfigDicts and lists: dicts, tuples, and what is in them."""
    if is_mapping(value):
        value = value.to_dict() if hasattr(value, "to_dict") else value
        return {key: plain(one) for key, one in value.items()}
    return tuple(map(plain, value)) if is_sequence(value) else value


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
