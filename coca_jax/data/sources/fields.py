"""The fields of somebody's data: which one is the text, the label or the image; the texts in one, in
whichever of the usual shapes; names of classes; and which values records are selected by.

A text may be a conversation: LLaVA's and ShareGPT4V's `conversations`, turns of {from, value}, or the
`messages` of other sets for chat models, turns of {role, content}.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.data.sources import files

TEXT_FIELDS = ("text", "caption", "title")
CHATS = ("conversations", "messages")  # of sets for chat models
LISTED_TEXTS = (  # in lists and tables: of sets on the hub, of Karpathy, of Flickr30k, of chats
    *(*TEXT_FIELDS, "captions", "sentences", "comment", *CHATS),
)
# How the name of a column of captions ends: image_caption, altText, but not context.
CAPTION_COLUMN = re.compile(r"(?i:caption|description|(?<![a-z])text)$|(?<=[a-z])Text$")
LABEL_FIELDS = ("label", "labels")
INNER_TEXTS = ("raw", "caption", "text", "sentence")  # where an object in a field has its text
INNER_LABELS = ("name", "label")
_TURNS = (("from", "value"), ("role", "content"))  # who speaks, what is said
_ANSWERS = ("gpt", "assistant", "model")


def take(fields: dict[str, Any], wanted: str, usual: Sequence[str]) -> Any:
    """Removes and returns the field that `chosen` names; None where it is not there. 'text.de' is
    the field 'de' of the object 'text', where no field has the dot in its name."""
    name = chosen(fields, wanted, usual)
    group, _, within = name.partition(".")
    if name in fields or not isinstance(fields.get(group), dict):
        return fields.pop(name, None) if name else None
    fields[group] = dict(fields[group])  # a list that is kept has the object too
    return take(fields[group], within, ())


def is_field(fields: Mapping[str, Any], name: str) -> bool:
    """Whether `take` finds a field of this name, which may have no value."""
    group, _, within = name.partition(".")
    inner = fields.get(group)
    return name in fields or (bool(within) and isinstance(inner, dict) and is_field(inner, within))


def chosen(fields: Mapping[str, Any], wanted: str, usual: Sequence[str]) -> str:
    """The name of the wanted field, else of the first of the usual ones with a value; '': none."""
    return wanted or next((n for n in usual if fields.get(n) not in (None, "", [])), "")


def text_column(fields: Mapping[str, Any], wanted: str, usual: Sequence[str]) -> str:
    """The name of the field of captions: that of `chosen`, else the only one whose name ends in
    caption, description or text and that holds texts; '' for none."""
    if found := chosen(fields, wanted, usual):
        return found
    there = [name for name, value in fields.items() if _is_caption_column(name, value)]
    return there[0] if len(there) == 1 else ""


def _is_caption_column(name: Any, value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and bool(CAPTION_COLUMN.search(str(name)))


def strings(value: Any, inner: Sequence[str] = INNER_TEXTS) -> list[str]:
    """A field that holds one text, a list of them, or texts by name (of a language), or nothing. Of
    an object that says more about a text, only the text counts; of a conversation the first answer.

    inner: names, of which the first that an object has is its text.

    Raises:
        ValueError: an object has none of these names, and not only texts; or as
            `answer`.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        name = next((name for name in inner if value.get(name) is not None), None)
        if name is None and not all(map(_is_text, value.values())):
            there = ", ".join(sorted(map(str, value)))
            raise ValueError(f"an object of {there}: none of them is called {' or '.join(inner)}")
        found = value.values() if name is None else [value[name]]
        return [text for one in found for text in strings(one, inner)]
    if is_conversation(value):
        return strings(answer(value), inner)
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in strings(one, inner)]
    if isinstance(value, float) and value != value:  # NaN: how tables say 'nothing'
        return []
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return [text] if text.strip() else []


def _is_text(value: Any) -> bool:
    """Whether a value is a text, a list of texts, or nothing."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(one is None or one != one or isinstance(one, (str, bytes)) for one in values)


def is_conversation(value: Any) -> bool:
    """Whether a field is a list of turns, each with a speaker and what is said."""
    return isinstance(value, (list, tuple)) and bool(value) and _turn_names(value) is not None


def _turn_names(turns: Sequence[Any]) -> tuple[str, str] | None:
    """What all turns call the speaker and what is said."""
    for names in _TURNS:
        if all(isinstance(turn, Mapping) and turn.keys() >= {*names} for turn in turns):
            return names
    return None


def answer(turns: Sequence[Mapping[str, Any]]) -> Any:
    """What the model of a conversation says first, which is the caption: later turns ask about
    parts of the image. A text, or a list of the texts among its parts.

    Raises:
        ValueError: it is no conversation, or no turn is the model's.
    """
    names = _turn_names(turns)
    if names is None:
        raise ValueError(f"no conversation: not all of {len(turns)} turns say who speaks")
    who, content = names
    found = next((turn[content] for turn in turns if turn[who] in _ANSWERS), None)
    if found is None:
        there = " and ".join(dict.fromkeys(str(turn[who]) for turn in turns))
        raise ValueError(f"a conversation of {there}, without an answer of {', '.join(_ANSWERS)}")
    if isinstance(found, (list, tuple)):
        return [part.get("text") if isinstance(part, Mapping) else part for part in found]
    return found


def names(value: Any, class_names: Sequence[str]) -> list[str]:
    """Labels as names: integers (or their digits) are looked up where class names are known, of
    which -1 says that there is no label, and WordNet ids where each line has one before the name.

    Raises:
        ValueError: a number outside the class names, or as `strings`.
    """
    found = []
    listed, by_id = named_classes(tuple(class_names))
    for text in strings(value, INNER_LABELS):
        if class_names and (number := class_number(text)) is not None:
            if number == -1:
                continue
            if not 0 <= number < len(listed):
                raise ValueError(f"label {text} of {len(listed)} class names")
            text = listed[number]
        found.append(by_id.get(text, text))
    return found


def read_class_names(path: str, called: str = "") -> tuple[str, ...]:
    """The class names in a text file, one a line; blank lines are none. called: as `read_lines`.

    Raises:
        OSError, ValueError: as `files.read_lines`; or it has no name.
    """
    found = tuple(line.strip() for line in files.read_lines(path, called) if line.strip())
    if not found:
        raise ValueError(f"{called or path}: it is empty")
    return found


def class_number(label: str) -> int | None:
    """The number that a label is, None for a name: 1.0 is 1, as pandas writes a column of integers
    where one is missing."""
    digits = re.fullmatch(r"(-?\d+)(?:\.0+)?", label.strip())
    return int(digits[1]) if digits else None


@functools.lru_cache(maxsize=1)
def named_classes(lines: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """(class names in order, id -> name) of a list of classes, such as ImageNet's, in which each
    line is a WordNet id and a name ('n01440764 tench'); of any other (its lines, {})."""
    split = [re.match(r"(n\d{8})\s+(\S.*)", line) for line in lines]
    if not all(split):
        return list(lines), {}
    pairs = [(found[1], found[2].strip()) for found in split if found]
    return [name for _, name in pairs], dict(pairs)


def values_of(
    field: str, extra: Mapping[str, Any], texts: Sequence[str], labels: Sequence[str]
) -> list[Any]:
    """The values by which a record is selected: of a field in `extra`, else its labels as 'label'
    and its texts as 'text'; [None] for none."""
    own = dict(label=labels, text=texts).get(field, ()) if field not in extra else ()
    value = list(own) or extra.get(field)
    return value if isinstance(value, list) else [value]


def wanted_values(wanted: Any) -> list[Any]:
    """The values of a field of `where`, which has one, None among them, or several."""
    return list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]


def selected(
    where: Mapping[str, Any], extra: Mapping[str, Any], texts: Sequence[str], labels: Sequence[str]
) -> bool:
    """Whether each field of `where` has a value, or one of the values, that it wants: 2020 is
    '2020', and true 'True'."""
    for field, wanted in where.items():
        allowed = wanted_values(wanted)
        values = values_of(field, extra, texts, labels)
        spelled = {_spelled(v) for v in allowed}
        if not any(v in allowed or _spelled(v) in spelled for v in values):
            return False
    return True


def _spelled(value: Any) -> str:
    """A value as CSV has it, where all are texts; 'TRUE' and 'False' in lower case."""
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def only(value: Any) -> Any:
    """The one image of a field that lists a row's images; another value as it is."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def without_bytes(value: Any) -> Any:
    """A field without the bytes in it, such as those of another image; None where it is bytes."""
    if isinstance(value, dict):
        return {k: without_bytes(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, (list, tuple)):
        return [without_bytes(v) for v in value if not isinstance(v, bytes)]
    return None if isinstance(value, bytes) else value


def printable(text: str) -> str:
    """Text that is UTF-8: half a surrogate pair, or a byte of a file name, becomes its number."""
    return text.encode("utf-8", "backslashreplace").decode()


_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str)


def plain_json(value: Any) -> str:
    """Fields as JSON, with what JSON lacks turned into text."""
    return _ENCODER.encode(value).encode("utf-8", "replace").decode()
