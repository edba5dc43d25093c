"""Sets where the right one of a few texts, or images, is chosen.

SugarCrepe's `<part>.json` ({number: {filename, caption, negative_caption}}), ARO's relation and
attribution lists ([{image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption}]),
Winoground's `examples.jsonl` ({image_0, image_1, caption_0, caption_1}) and WinoGAViL's lines
({cue, candidates, associations}). Images lie beside the list or in a folder below it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from coca_jax.data import images
from coca_jax.data.dedup import content_digest
from coca_jax.data.sources import files, media
from coca_jax.runtime import bounded_json, storage

SUGARCREPE = ("filename", "caption", "negative_caption")
ARO = ("image_path", "true_caption", "false_caption")
WINOGROUND = ("image_0", "image_1", "caption_0", "caption_1")
WINOGAVIL = ("cue", "candidates", "associations")
_BELOW = ("", "images", "val2017", "val2014", "prerelease_images")


def lists(path: str) -> list[Any]:
    """The lists of pairs in a folder, or the one that `path` names itself."""
    place = storage.place(path)
    found = [place] if not place.is_dir() else [*place.glob("*.json"), *place.glob("*.jsonl")]
    return sorted(one for one in found if _is_list(one))


def _is_list(place: Any) -> bool:
    if not place.name.endswith((".json", ".jsonl")) or place.name == "metadata.jsonl":
        return False
    try:
        rows = _rows(place)
    except ValueError:
        return False
    return bool(rows) and _format(rows[0]) is not None


def _rows(place: Any) -> list[Mapping[str, Any]]:
    text = files.decode_text(place.read_bytes())
    if place.name.endswith(".jsonl"):
        return [bounded_json.loads(line) for line in text.split("\n") if line.strip()]
    found = bounded_json.loads(text)
    rows = list(found.values()) if isinstance(found, dict) else found
    return rows if isinstance(rows, list) else []


def _format(row: Any) -> tuple[str, ...] | None:
    if not isinstance(row, dict):
        return None
    known = (SUGARCREPE, ARO, WINOGROUND, WINOGAVIL)
    return next((fields for fields in known if all(name in row for name in fields)), None)


def have_cues(path: str) -> bool:
    """Whether the first of the lists that `lists` finds, one at least, is WinoGAViL's."""
    return _format(_rows(lists(path)[0])[0]) == WINOGAVIL


def examples(path: str) -> Iterator[dict[str, Any]]:
    """dict(images, texts, of), where image i belongs to text i, and `of`, bytes, tells examples of
    one image, or two, from others: pieces of a photograph are of one. Of WinoGAViL dict(images,
    cue, right), the numbers of the images that belong to the cue.

    Raises ValueError for what lacks a field, and FileNotFoundError for an image that is not there.
    """
    for place in lists(path):
        for number, row in enumerate(_rows(place)):
            fields = _format(row)
            if fields is None:
                raise ValueError(f"{place}, row {number}: {json.dumps(row)[:80]} is no such pair")
            yield _example(place, fields, row)


def _example(place: Any, fields: tuple[str, ...], row: Mapping[str, Any]) -> dict[str, Any]:
    for name in fields:
        if ("caption" in name or name == "cue") and not isinstance(row[name], str):
            raise ValueError(f"{place}: {name}={str(row[name])[:80]} is not a text")
    if fields == WINOGROUND:
        pictures = [_read(place, row[f"image_{i}"]) for i in range(2)]
        of = content_digest(b"".join(pictures))
        return dict(images=pictures, texts=[row["caption_0"], row["caption_1"]], of=of)
    if fields == WINOGAVIL:
        names, wanted = _names(row["candidates"]), _names(row["associations"])
        right = [names.index(name) for name in wanted if name in names]
        return dict(images=[_read(place, name) for name in names], cue=row["cue"], right=right)
    image, true, false = (row[name] for name in fields)
    data = _read(place, image)
    of = content_digest(data)
    if "bbox_w" in row:
        data = _cut(data, *(_whole(row, f"bbox_{one}") for one in ("x", "y", "w", "h")))
    return dict(images=[data], texts=[true, false], of=of)


def _whole(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    if not isinstance(value, (int, float)) or not abs(value) < 1 << 20:
        raise ValueError(f"{name}={str(value)[:80]} is not a number of pixels")
    return int(value)


def _names(value: Any) -> list[str]:
    """A list of names, which WinoGAViL's table also writes as text."""
    found = bounded_json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{str(value)[:80]} is not a list of names")
    return found


def _read(place: Any, name: str) -> bytes:
    if not isinstance(name, str):
        raise ValueError(f"{place}: image {name!r} is not a name")
    if "://" in name or ".." in name.split("/") or name.startswith("/"):
        raise ValueError(f"{place}: image {name!r} does not lie below the list's folder")
    names = (
        [name] if "." in name.rpartition("/")[2] else [f"{name}{s}" for s in media.IMAGE_SUFFIXES]
    )
    for below in _BELOW:
        for one in names:
            file = place.parent / below / one
            if file.exists():
                return file.read_bytes()
    raise FileNotFoundError(f"{place}: no image {name} beside it, nor in {', '.join(_BELOW[1:])}")


def _cut(data: bytes, left: int, top: int, width: int, height: int) -> bytes:
    picture = Image.fromarray(images.decode(data)).crop((left, top, left + width, top + height))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
