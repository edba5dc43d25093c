"""Where examples come from: random access by index to prepared data, TFDS or the embedded set."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from array_record.python import array_record_module

from coca_jax.data import files, formats, images, records
from coca_jax.data.records import Record

HOLD_BYTES = 1 << 30  # data sets below this stay in memory once read
MANIFEST = "manifest.json"

Indices = Sequence[int] | np.ndarray
Reader = Callable[[Indices], list[Record]]


class Source:
    """Random access to records, some of which may turn out not to decode.

    Attributes:
        name: for messages.
        kind: 'caption', 'label' or 'question': which of its texts train.
        complete: whether every record is known to have a text of that kind.
    """

    def __init__(self, name: str, size: int, read: Reader, read_texts: Reader | None = None):
        self.name = name
        self.kind = "caption"
        self.complete = False
        self._size = size
        self._read = read
        self._read_texts = read_texts or read

    def __len__(self) -> int:
        return self._size

    def read(self, indices: Indices) -> list[Record]:
        """The records at `indices`, in their order."""
        return self._read(indices)

    def read_texts(self, indices: Indices) -> list[Record]:
        """The same, where the image may be left out because only texts are wanted."""
        return self._read_texts(indices)

    def select(self, keep: Sequence[int] | np.ndarray, name: str) -> Source:
        """The source that has only the records `keep` (indices) of this one."""
        kept = np.asarray(keep, np.int64)
        return Source(
            name,
            len(kept),
            lambda indices: self.read(kept[np.asarray(indices)]),
            lambda indices: self.read_texts(kept[np.asarray(indices)]),
        )

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 256):
            yield from self.read(range(start, min(start + 256, len(self))))


class _Held:
    """Keeps what was read in memory, up to a number of bytes."""

    def __init__(self, read: Reader, size: int, limit: int):
        self._read, self._room = read, limit
        self._kept: list[Record | None] = [None] * size

    def __call__(self, indices: Indices) -> list[Record]:
        kept = self._kept
        missing = sorted({int(i) for i in indices if kept[i] is None})
        fresh: dict[int, Record] = {}
        if missing:
            for index, record in zip(missing, self._read(missing)):
                fresh[index] = record
                if self._room > 0:
                    self._room -= len(record.image) + 512
                    kept[index] = record
        return [kept[i] or fresh[int(i)] for i in indices]


class _ArrayRecordFiles:
    """Reads serialized records at indices into a list of ArrayRecord files. Thread-safe."""

    def __init__(self, paths: list[str], counts: list[int]):
        self._paths = paths
        self._ends = np.cumsum(counts)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    _local(self._paths[shard]),
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
            return self._readers[shard]

    def __call__(self, indices: Indices) -> list[Record]:
        wanted = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._ends, wanted, side="right")
        result: list[Record | None] = [None] * len(wanted)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            start = self._ends[shard - 1] if shard else 0
            data = self._reader(int(shard)).read([int(i - start) for i in wanted[rows]])
            for row, serialized in zip(rows, data):
                result[row] = records.parse(serialized)
        return result  # type: ignore[return-value]


def _local(path: str) -> str:
    """The file itself, or a local copy of a remote one, made when it is first read.

    array_record reads local files only. The copy is in $XDG_CACHE_HOME/coca_jax (~/.cache) and
    serves later runs; for data larger than the disk, mount the bucket and give its local path.
    """
    if not files.is_remote(path):
        return path
    system, plain = files.filesystem(path)
    mark = f"{path} {system.size(plain)} {system.checksum(plain)}"
    name = hashlib.blake2b(mark.encode(), digest_size=16).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    copy = os.path.join(root, "coca_jax", name)
    if not os.path.exists(copy):
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        temporary = f"{copy}.{os.getpid()}"
        system.get_file(plain, temporary)
        os.replace(temporary, copy)
    return copy


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of prepared data.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder that `prepare` has not written, with the command that would.
    """
    file = files.join(path, MANIFEST)
    if files.exists(file):
        return json.loads(files.read(file))
    if files.is_remote(path) or not os.path.exists(path):
        raise FileNotFoundError(f"data source {path}: no such folder, or no {MANIFEST} in it")
    raise ValueError(
        f"data source {path}: not prepared data (no {MANIFEST}); run `python -m coca_jax.prepare "
        f"--format={formats.guess(path)} --input={path} --out=DIR` and give path=DIR"
    )


def open_prepared(path: str, split: str, kind: str = "caption") -> Source:
    """A split of a folder that `python -m coca_jax.prepare` wrote.

    Raises:
        FileNotFoundError: the folder or one of its shards is missing.
        ValueError: no such split, or it is empty, or a shard has another size than the manifest.
    """
    splits = read_manifest(path)["splits"]
    if split not in splits:
        raise ValueError(f"data source {path}: no split {split!r}; it has {sorted(splits)}")
    shards = splits[split]["shards"]
    paths = [files.join(path, shard["file"]) for shard in shards]
    for shard, file in zip(shards, paths):
        if not files.exists(file):
            raise FileNotFoundError(f"data source {path}: shard {shard['file']} is missing")
        if files.size(file) != shard["bytes"]:
            raise ValueError(
                f"data source {path}: {shard['file']} has {files.size(file)} bytes, the "
                f"manifest says {shard['bytes']}; prepare it again"
            )
    counts = [shard["count"] for shard in shards]
    read: Reader = _ArrayRecordFiles(paths, counts)
    if sum(shard["bytes"] for shard in shards) < HOLD_BYTES:
        read = _Held(read, sum(counts), HOLD_BYTES)
    source = Source(f"{path} [{split}]", sum(counts), read)
    have = splits[split]["with_text" if kind == "caption" else "with_label"]
    source.complete = have == sum(counts)
    return source


def open_builtin(name: str, split: str, kind: str, objects: Sequence[int]) -> Source:
    """The embedded data set 'scenes', drawn as it is read (about 0.1 ms a scene)."""
    if name != "scenes":
        raise ValueError(f"data source builtin={name!r}: there is 'scenes'")
    from coca_jax.data import scenes

    drawn = scenes.Scenes(split, kind, objects)

    def record(scene: Mapping[str, Any]) -> Record:
        return Record(
            image=images.encode_bmp(scene["image"]),
            texts=(scene["text"],) if scene["text"] else (),
            labels=tuple(scene["labels"] or ()),
            key=scene["key"],
            extra=json.dumps({"scene": scene["scene"]}),
        )

    def read_texts(indices: Indices) -> list[Record]:
        return [
            Record(b"", (t["text"],) if t["text"] else (), tuple(t["labels"] or ()), "")
            for t in drawn.read_texts(indices)
        ]

    source = Source(
        f"{name} [{split}]",
        len(drawn),
        lambda indices: [record(scene) for scene in drawn.read(indices)],
        read_texts,
    )
    source.complete = True
    return source


def open_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_field: str = "image",
    text_field: str = "",
    label_field: str = "label",
) -> Source:
    """A TFDS data set that is already prepared in the random-access format `array_record`.

    Raises:
        ValueError: not prepared, prepared in another format, or without such fields.
    """
    import tensorflow_datasets as tfds

    hint = "use `python -m coca_jax.prepare --format=tfds --input=NAME --out=DIR` and path=DIR"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        data = builder.as_data_source(
            split=split, decoders={image_field: tfds.decode.SkipDecoding()}
        )
    except Exception as error:  # TFDS raises its own kinds for each way to be absent
        raise ValueError(f"data source tfds={name!r} [{split}]: {error}; {hint}") from None
    features = builder.info.features
    for field in (image_field, text_field, label_field):
        if field and field not in features and field != "label":
            raise ValueError(
                f"data source tfds={name!r}: no field {field!r}; it has {list(features)}"
            )
    names = getattr(features[label_field], "names", None) if label_field in features else None

    def read(indices: Indices) -> list[Record]:
        found = data.__getitems__([int(i) for i in indices])
        return [
            _tfds_record(e, i, image_field, text_field, label_field, names)
            for i, e in zip(indices, found)
        ]

    return Source(f"tfds {name} [{split}]", len(data), read)


def _tfds_record(
    example: Mapping[str, Any],
    index: int,
    image_field: str,
    text_field: str,
    label_field: str,
    names: Sequence[str] | None,
) -> Record:
    def strings(value: Any) -> tuple[str, ...]:
        values = np.asarray(value).reshape(-1).tolist()
        return tuple(
            v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values
        )

    labels: tuple[str, ...] = ()
    if label_field in example:
        value = example[label_field]
        if names is not None:
            labels = tuple(names[i] for i in np.asarray(value).reshape(-1))
        else:
            labels = strings(value)
    texts = strings(example[text_field]) if text_field else ()
    return Record(bytes(example[image_field]), texts, labels, str(index))


def _matches(extra: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    for field, wanted in where.items():
        allowed = [wanted] if isinstance(wanted, (str, int, float, bool)) else list(wanted)
        value = extra.get(field)
        values = value if isinstance(value, list) else [value]
        if not any(v in allowed or str(v) in allowed for v in values):
            return False
    return True


_KEYS = {
    "path", "tfds", "builtin", "split", "kind", "weight", "where", "text_field", "label_field",
    "captions", "prompts", "data_dir", "image_field", "limit", "objects", "questions",
    "answers",
}  # fmt: skip


def open_source(config: str | Mapping[str, Any], split: str = "train") -> Source:
    """Opens one entry of `config.data.sources`, or a path of prepared data.

    Args:
        config: a path, or a mapping with one of
            path: a folder that `prepare` wrote;
            builtin: 'scenes' (with objects, how many a scene may have);
            tfds: a prepared TFDS data set (with data_dir, image_field where needed);
            and, all optional,
            split: overrides the argument;
            kind: 'caption' (texts train), 'label' (class names train) or 'question' (each text
                is a question, and the labels are its answers);
            questions: of kind 'question', a field of `extra` that lists the questions of an image
                as {question, answer}, in place of texts and labels; an answer may be a list;
            where: {field: value or list of values} that records must have in their `extra`;
            text_field, label_field: fields of `extra` to take in place of text and label;
            captions: 'sampled' (one of an image's captions each time) or 'all' (each is an
                example);
            limit: use only the first so many records.
        split: the split where `config` names none.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it, in one line.
    """
    entry: dict[str, Any] = {"path": config} if isinstance(config, str) else dict(config)
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise ValueError(f"data source {entry}: unknown keys {unknown}; known: {sorted(_KEYS)}")
    split = entry.get("split") or split
    kind = entry.get("kind", "caption")
    if kind not in ("caption", "label", "question"):
        raise ValueError(f"data source kind={kind!r}: use 'caption', 'label' or 'question'")
    places = [place for place in ("path", "builtin", "tfds") if entry.get(place)]
    if len(places) != 1:
        raise ValueError(f"data source {entry}: give exactly one of path, builtin, tfds")
    if places[0] == "path":
        source = open_prepared(str(entry["path"]), split, kind)
    elif places[0] == "builtin":
        source = open_builtin(entry["builtin"], split, kind, entry.get("objects", (1, 2, 3, 4)))
    else:
        source = open_tfds(
            entry["tfds"],
            split,
            data_dir=entry.get("data_dir"),
            image_field=entry.get("image_field", "image"),
            text_field=entry.get("text_field", ""),
            label_field=entry.get("label_field", "label"),
        )
    return narrow(source, entry, refield=places[0] != "tfds")


def narrow(source: Source, entry: Mapping[str, Any], *, refield: bool = True) -> Source:
    """What an entry of `config.data.sources` leaves of an opened source.

    refield: takes text_field and label_field from `extra`; else they are already applied. Other
    keys and errors: see `open_source`.
    """
    kind = entry.get("kind", "caption")
    name, complete = source.name, source.complete
    if refield and (entry.get("text_field") or entry.get("label_field")):
        complete = False
        source = _refield(source, entry.get("text_field", ""), entry.get("label_field", ""))
    if entry.get("where"):
        where = dict(entry["where"])
        keep = [i for i, r in enumerate(source) if _matches(json.loads(r.extra), where)]
        if not keep:
            raise ValueError(f"data source {name}: no record has {where}")
        source = source.select(keep, name)
    if entry.get("limit"):
        source = source.select(range(min(len(source), int(entry["limit"]))), name)
    captions = entry.get("captions", "sampled")
    if captions not in ("sampled", "all"):
        raise ValueError(f"data source captions={captions!r}: use 'sampled' or 'all'")
    if kind == "question":
        wanted = frozenset(entry.get("answers") or ())
        source, complete = _one_question_each(source, entry.get("questions", ""), wanted), True
    if captions == "all" and kind == "caption":
        source = _one_caption_each(source)
    if not len(source):
        raise ValueError(f"data source {name}: it is empty")
    source.kind, source.complete = kind, complete
    return source


def _refield(source: Source, text_field: str, label_field: str) -> Source:
    """The source whose texts or labels come from fields of `extra`."""

    def strings(value: Any) -> tuple[str, ...]:
        if isinstance(value, Mapping):  # texts by language
            value = list(value.values())
        values = value if isinstance(value, list) else [value]
        return tuple(str(v) for v in values if v not in (None, ""))

    def change(record: Record) -> Record:
        extra = json.loads(record.extra)
        if text_field:
            record = record._replace(texts=strings(extra.get(text_field)))
        if label_field:
            record = record._replace(labels=strings(extra.get(label_field)))
        return record

    return Source(
        source.name, len(source), lambda indices: [change(r) for r in source.read(indices)]
    )


def _one_caption_each(source: Source) -> Source:
    """The source in which each caption of each image is an example of its own."""
    counts = np.array([len(record.texts) for record in source], np.int64)
    which = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)

    def read(indices: Indices) -> list[Record]:
        wanted = np.asarray(indices, np.int64)
        found = source.read(which[wanted])
        return [r._replace(texts=(r.texts[n],)) for r, n in zip(found, nth[wanted])]

    return Source(source.name, len(which), read)


def _one_question_each(source: Source, field: str, answers: frozenset[str]) -> Source:
    """The source in which each question about each image is an example of its own.

    answers: only questions with one of these; empty: all.
    """

    def asked(record: Record) -> list[tuple[str, tuple[str, ...]]]:
        if not field:
            return [(text, record.labels) for text in record.texts if record.labels]
        found = json.loads(record.extra).get(field) or []
        try:
            pairs = [(item["question"], item["answer"]) for item in found]
        except (KeyError, TypeError):
            raise ValueError(
                f"data source {source.name}: field {field!r} of {record.key!r} must list "
                "{question, answer} objects"
            ) from None
        listed = [(q, a if isinstance(a, list) else [a]) for q, a in pairs]
        return [(str(q), tuple(str(one) for one in a)) for q, a in listed if q and a]

    every = [
        [(q, a) for q, a in asked(record) if not answers or answers.intersection(a)]
        for record in source
    ]
    questions = [question for found in every for question in found]
    which = np.repeat(np.arange(len(every)), [len(found) for found in every])
    if not questions:
        raise ValueError(
            f"data source {source.name}: kind='question' but no record has a question and an "
            f"answer ({f'in its field {field!r}' if field else 'as text and label'}"
            f"{f', one of {sorted(answers)}' if answers else ''})"
        )

    def with_question(records: list[Record], wanted: np.ndarray) -> list[Record]:
        return [
            record._replace(
                texts=(questions[i][0],), labels=questions[i][1], key=f"{record.key}?{i}"
            )
            for record, i in zip(records, wanted.tolist())
        ]

    def read(indices: Indices) -> list[Record]:
        wanted = np.asarray(indices, np.int64)
        return with_question(source.read(which[wanted]), wanted)

    def read_texts(indices: Indices) -> list[Record]:
        wanted = np.asarray(indices, np.int64)
        return with_question([Record(b"", (), (), "")] * len(wanted), wanted)

    return Source(source.name, len(questions), read, read_texts)


def keep_useful(source: Source) -> Source:
    """Leaves out records without a text of the source's kind, which cannot train.

    Raises:
        ValueError: no record has one.
    """
    if source.complete:
        return source
    keep = [i for i, r in enumerate(source) if (r.texts if source.kind == "caption" else r.labels)]
    what = "text" if source.kind == "caption" else "label"
    if not keep:
        raise ValueError(
            f"data source {source.name}: kind={source.kind!r} but no record has a {what}; "
            "give the other kind, or prepare it with --text_field or --label_field"
        )
    if len(keep) == len(source):
        return source
    logging.info("%s: %d of %d records have a %s", source.name, len(keep), len(source), what)
    kept = source.select(keep, source.name)
    kept.kind, kept.complete = source.kind, True
    return kept
