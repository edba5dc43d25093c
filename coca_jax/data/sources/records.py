"""The training record: a tf.train.Example, written and read without TensorFlow.

Fields: `image` (encoded bytes), `text` (captions), `label` (class names), `key` (unique in its
data set) and `extra` (whatever else the source said, as JSON); pairs of images have `second` as
well. tensorflow-datasets reads the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


class Record(NamedTuple):
    """One example. `image` is encoded bytes; texts may be empty; `extra` is a JSON object; `second`
    is the other image of a pair."""

    image: bytes
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    key: str
    extra: str = "{}"
    second: bytes = b""


def _example_class() -> Any:
    """The message class of tf.train.Example, declared here (same field numbers)."""
    file = descriptor_pb2.FileDescriptorProto(
        name="coca_jax/example.proto", package="coca_jax", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    many, one, message = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL, kinds.TYPE_MESSAGE

    def add(name: str, *fields: tuple) -> descriptor_pb2.DescriptorProto:
        kind = file.message_type.add(name=name)
        for number, (field, label, type_, type_name) in enumerate(fields, 1):
            kind.field.add(name=field, number=number, label=label, type=type_, type_name=type_name)
        return kind

    add("BytesList", ("value", many, kinds.TYPE_BYTES, None))
    add("FloatList", ("value", many, kinds.TYPE_FLOAT, None))
    add("Int64List", ("value", many, kinds.TYPE_INT64, None))
    add(
        "Feature",
        ("bytes_list", one, message, ".coca_jax.BytesList"),
        ("float_list", one, message, ".coca_jax.FloatList"),
        ("int64_list", one, message, ".coca_jax.Int64List"),
    )
    features = add("Features", ("feature", many, message, ".coca_jax.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=kinds.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=message, type_name=".coca_jax.Feature")
    add("Example", ("features", one, message, ".coca_jax.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("coca_jax.Example"))


_Example = _example_class()


def _number(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _sized(data: bytes) -> bytes:
    """The first field of a message, of bytes."""
    return b"\n" + _number(len(data)) + data


def _many(name: bytes, values: Sequence[bytes]) -> bytes:
    """A field of a record."""
    found = _sized(b"".join(map(_sized, values)))
    return _sized(_sized(name) + b"\x12" + _number(len(found)) + found)


@functools.lru_cache(maxsize=1 << 14)
def _before(name: bytes, size: int) -> bytes:
    """What stands before the only value of a field, by the value's size."""
    value = b"\n" + _number(size)
    values = b"\n" + _number(len(value) + size) + value
    head = _sized(name) + b"\x12" + _number(len(values) + size) + values
    return b"\n" + _number(len(head) + size) + head


def _field(name: bytes, values: Sequence[bytes]) -> bytes:
    if len(values) == 1:
        return _before(name, len(values[0])) + values[0]
    return _many(name, values) if values else _EMPTY[name]


_EMPTY = {name: _many(name, ()) for name in (b"label", b"text")}


def serialize(record: Record) -> bytes:
    """A record as bytes; the same record always gives the same bytes.

    They are those of protobuf's own deterministic writer, in a fraction of its time.
    """
    image, texts, labels, key, extra, second = record
    extra_bytes, name = extra.encode(), key.encode()
    found = b"".join(
        (
            _before(b"extra", len(extra_bytes)),
            extra_bytes,
            _before(b"image", len(image)),
            image,
            _before(b"key", len(name)),
            name,
            _field(b"label", [label.encode() for label in labels]),
            _before(b"second", len(second)) + second if second else b"",
            _field(b"text", [text.encode() for text in texts]),
        )
    )
    return b"\n" + _number(len(found)) + found


def parse(data: bytes) -> Record:
    """The record of bytes that `serialize` made.

    Raises:
        ValueError: not such bytes.
    """
    try:
        feature = _Example.FromString(data).features.feature
        return Record(
            image=feature["image"].bytes_list.value[0],
            texts=tuple(str(text, "utf-8") for text in feature["text"].bytes_list.value),
            labels=tuple(str(label, "utf-8") for label in feature["label"].bytes_list.value),
            key=str(feature["key"].bytes_list.value[0], "utf-8"),
            extra=str(feature["extra"].bytes_list.value[0], "utf-8"),
            second=feature["second"].bytes_list.value[0] if "second" in feature else b"",
        )
    except Exception as error:
        raise ValueError(f"not a record of coca_jax ({len(data)} bytes): {error}") from None


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Raises OSError for what the writer of a shard at `path` raises inside, RuntimeError, as on a
    full disk."""
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise OSError(
            f"{path} cannot be written: {why}; finished shards stay, the same command goes on"
        ) from None


def json_text(value: Any) -> str:
    """A value of JSON as text; half a surrogate pair, which JSON may hold, becomes '?'."""
    return str(value).encode("utf-8", "replace").decode()
