"""Whether an item can train: the reasons why not, and the record of one that can."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from coca_jax.data import images, order, regions, videos
from coca_jax.data.field_texts import selected
from coca_jax.data.records import Record
from coca_jax.importers.items import Item, Options, plain_json


def wanted(item: Item, options: Options) -> str:
    """'' for an item that the selection keeps, else what leaves it out: 'where', 'sample', or the
    side of a holdout on which it is, 'held_out' or 'not_held_out'.

    An item with a problem is kept, to be listed once: on the side that is not held out, and where
    its fields are known, with those that have the wanted values.
    """
    if options.holdout:
        held = not item.problem and is_held_out(item.image, options.holdout, item.drawn.holdouts)
        if held != options.held_out:
            return "held_out" if held else "not_held_out"
    for field, values in options.where:
        known = not item.problem or field in item.extra
        if known and not selected({field: values}, item.extra, item.texts, item.labels):
            return "where"
    if item.problem:
        return ""
    if options.sample < 1.0:
        digest = order.key_of(item.key.encode())
        again = item.drawn.seeds.count(options.seed)
        key = order.key_of([options.seed, digest & (2**63 - 1), *([again] if again else [])])
        if order.uniform(np.array([key], np.uint64), 1)[0, 0] >= options.sample:
            return "sample"
    return ""


def is_held_out(image: bytes, share: float, earlier: int = 0) -> bool:
    """Whether an encoded image is among the share that is held out: a function of its bytes, and of
    how many holdouts there were before."""
    return place(image, earlier) < share


def place(image: bytes, earlier: int = 0) -> float:
    """Where the bytes of an image put it, uniformly in [0, 1); after holdouts, which leave a part
    of that, elsewhere."""
    salt = earlier.to_bytes(8, "little")
    digest = hashlib.blake2b(image, digest_size=8, person=b"holdout", salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**64


def record(item: Item, options: Options) -> tuple[Record | None, str, str]:
    """The record of a good item, or the reason and detail of its quarantine."""
    if item.problem:
        return None, item.problem, item.detail
    if not item.image:
        return None, "empty_image", "zero bytes"
    texts, labels = texts_and_labels(item)
    if any(len(text) > options.max_text for text in texts):
        return None, "text_too_long", f"{max(map(len, texts))} characters"
    if any("\ufffd" in text for text in (*texts, *labels)):
        return None, "bad_utf8", "a text or label has bytes that are not UTF-8"
    try:
        "".join((*texts, *item.labels)).encode()
    except UnicodeEncodeError:
        return None, "bad_utf8", "a text or label has half a surrogate pair"
    texts = [text for text in texts if len(text) >= max(options.min_text, 1)]
    if options.require == "text" and not texts:
        return None, "missing_text", "no caption of the wanted length"
    if options.require == "label" and not labels:
        return None, "missing_label", "no class name"
    if not texts and not labels and not _asks(item.extra):
        other = ", ".join(sorted(item.extra)[:8])
        other = f"; its other fields: {other}" if other else ""
        return None, "missing_text", f"neither a caption nor a class name{other}"
    data, reason, detail = _checked(item.image, options)
    if not reason and item.second:
        second, reason, detail = _checked(item.second, options)
    else:
        second = b""
    if reason:
        return None, reason, detail
    extra = plain_json(dict(item.extra))
    return Record(data, tuple(texts), tuple(labels), item.key, extra, second), "", ""


def texts_and_labels(item: Item) -> tuple[list[str], list[str]]:
    """An item's texts, and its labels once each, as records have them: blanks are single spaces."""
    texts = [" ".join(text.split()) for text in item.texts]
    labels = [" ".join(label.split()) for label in item.labels]
    return texts, list(dict.fromkeys(label for label in labels if label))


def _asks(extra: Mapping[str, Any]) -> bool:
    """Whether a field lists questions or regions, as sources of these kinds read them."""
    told = extra.get(regions.FIELD)
    first = told[0] if isinstance(told, list) and told else told
    if isinstance(first, dict) and {"text", "box"} <= first.keys():
        return True
    lists = (value for value in extra.values() if isinstance(value, list))
    return any(isinstance(one, dict) and "question" in one for found in lists for one in found[:1])


def _checked(data: bytes, options: Options) -> tuple[bytes, str, str]:
    """What is kept of an encoded image or clip, or the reason and detail of its quarantine."""
    if len(data) > options.max_image_bytes:
        return data, "image_too_big", f"{len(data)} bytes"
    image = None
    try:
        if images.is_video_file(data):
            _, height, width = videos.sniff(data, options.max_pixels)
        else:
            image = images.open_image(data, options.max_pixels)
            width, height = image.size
    except ValueError as error:
        big = str(error).startswith("too many pixels")
        return data, "too_many_pixels" if big else "unreadable_image", str(error)
    if min(width, height) < options.min_side:
        return data, "image_too_small", f"{width} x {height}"
    if options.max_aspect and max(width, height) > options.max_aspect * min(width, height):
        return data, "aspect", f"{width} x {height}"
    try:
        if image is None or videos.is_animation(image, data):  # never encoded again
            if options.verify:
                videos.verify(data)
        elif options.max_side and max(width, height) > options.max_side:
            data = _shrink(image, options.max_side)
        elif options.verify:
            if image.format == "JPEG":  # checks all the data, spares most of the arithmetic
                image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
    except Exception as error:  # PIL's decoders raise all sorts on damaged data
        many = str(error).startswith("too many frames")
        return data, "too_many_frames" if many else "damaged_image", str(error)
    return data, "", ""


def _shrink(image: Image.Image, max_side: int) -> bytes:
    """Encodes a smaller image: JPEG, or PNG where there is transparency."""
    alpha = images.has_alpha(image)
    pixels = Image.fromarray(images.to_rgba(image))
    pixels.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if alpha:
        pixels.save(out, "PNG")
    else:
        pixels.save(out, "JPEG", quality=92)
    return out.getvalue()
