"""A data set of a suite as it lies in a folder.

- CLIP_benchmark's and DataComp's layout: `classnames.txt`, `zeroshot_classification_templates.txt`
  ('{c}' stands for the class), `dataset_type.txt` (`retrieval`, `multilabel`; else classification),
  `<split>/nshards.txt` and that many tars `0.tar`, `1.tar`, ... with `.webp`, `.png` or `.jpg` and
  `.cls` (a class's number), `.npy` (of multilabel sets a row of zeros and ones; else the example's
  group first), `.txt` (a caption a line) or `.json` (`caption`, `captions` or `text`; `group`,
  `region` or `income`).
- Pairs to choose from (pairs.py).
- Whatever `evaluate --data` takes: an imagefolder, data that `prepare` wrote.
"""

from __future__ import annotations

import dataclasses
import io
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from coca_jax.apps.suites import pairs
from coca_jax.data import evaluation_data, prompts
from coca_jax.data.evaluation_data import Records
from coca_jax.data.sources import files, tars
from coca_jax.runtime import bounded_json, storage

CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
ABOUT = (CLASSES, TEMPLATES, TYPE)  # what stands in the folder of a set, beside its splits
IMAGES = ("webp", "png", "jpg", "jpeg")  # in the order in which CLIP_benchmark looks for them
ONE, SEVERAL, TEXTS = TYPES = ("classification", "multilabel", "retrieval")
CAPTIONS, GROUPS = ("captions", "caption", "text"), ("group", "region", "income")
MAX_MEMBER = 256 << 20


@dataclasses.dataclass(frozen=True)
class Folder:
    """A data set. kind: one of TYPES, or 'selection'. layout: 'tars', 'pairs' or 'plain'.

    class_names, prompts: of classification; prompts hold '{}'.
    """

    path: str
    split: str
    kind: str
    layout: str
    class_names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def one_label(self) -> bool:
        """Whether an example has one class of several."""
        return bool(self.class_names) and self.kind != SEVERAL

    def examples(self, split: str = "") -> Iterator[dict[str, Any]]:
        """Its examples in their order: dict(image, and target: a number or a row of zeros and ones,
        or texts; group where there are groups), of 'selection' what `pairs.examples` gives.

        split: another one than the folder's. Raises ValueError for a damaged one.
        """
        split = split or self.split
        if self.layout == "pairs":
            yield from pairs.examples(self.path)
        elif self.layout == "plain":
            yield from self._plain(split)
        else:
            for tar in shards(self.path, split):
                for key, members in _groups(tar):
                    yield self._example(f"{tar}/{key}", members)

    def _plain(self, split: str) -> Iterator[dict[str, Any]]:
        need = "caption" if self.kind == TEXTS else "label"
        number = {name: i for i, name in enumerate(self.class_names)}
        for record in Records(dict(path=self.path, split=split), need=need):
            if need == "caption":
                yield dict(image=record["image"], texts=record["text"])
            elif record["labels"][0] in number:
                yield dict(image=record["image"], target=number[record["labels"][0]])

    def _example(self, where: str, members: Mapping[str, bytes]) -> dict[str, Any]:
        image = next((members[suffix] for suffix in IMAGES if suffix in members), None)
        if image is None:
            raise ValueError(f"{where}: no image, one of .{', .'.join(IMAGES)}, but {[*members]}")
        try:
            extra = bounded_json.parse(members["json"]) if "json" in members else {}
            if self.kind == TEXTS:
                return dict(image=image, texts=_captions(members, extra))
            if self.kind == SEVERAL:
                return dict(image=image, target=_numbers(members["npy"]) > 0)
            found = dict(image=image, target=self._class(members["cls"]))
            group = _group(members, extra)
        except KeyError as error:
            raise ValueError(f"{where}: no .{error.args[0]}, but {[*members]}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return found if group is None else dict(found, group=group)

    def _class(self, data: bytes) -> int:
        number = int(data)
        if not 0 <= number < len(self.class_names):
            raise ValueError(f"class {number} of {len(self.class_names)} in classnames.txt")
        return number


def is_set(path: str, split: str) -> bool:
    """Whether a folder holds a set in the layout of tars, or of pairs."""
    place = storage.place(path)
    return (place / split / "nshards.txt").exists() or bool(pairs.lists(path))


def read(path: str, split: str = "test") -> Folder:
    """The data set in a folder. Raises ValueError for one without what its kind needs, and
    FileNotFoundError where there is none."""
    place = storage.place(path)
    if not storage.reach(place):
        raise FileNotFoundError(f"{path} does not exist")
    if pairs.lists(path):
        return Folder(path, split, "selection", "pairs")
    if not (place / split / "nshards.txt").exists():
        if any((place / name).exists() for name in ABOUT) and any((place / split).glob("*.tar")):
            raise ValueError(  # read as any tars, its classes would be called by their numbers
                f"{path}/{split}/nshards.txt is missing, the number of tars; write it, or download "
                "the set again"
            )
        return _plain_folder(path, split)
    shards(path, split)
    kind = (_lines(path, TYPE) or ["classification"])[0].strip().lower()
    if kind not in TYPES:
        raise ValueError(f"{path}/{TYPE} says {kind!r}; choose from {', '.join(TYPES)}")
    if kind == TEXTS:
        return Folder(path, split, kind, "tars")
    names = [line.strip() for line in _lines(path, CLASSES)]
    if len(names) < 2:
        raise ValueError(f"{path}/{CLASSES} names {len(names)} classes; two or more, a line")
    templates = [line.strip() for line in _lines(path, TEMPLATES)]
    if not templates:
        raise ValueError(
            f"{path}/{TEMPLATES} is missing or empty; "
            "write prompts into it, such as 'a photo of a {c}', a line each"
        )
    texts = tuple(template.replace("{c}", "{}") for template in templates)
    prompts.check(texts)
    return Folder(path, split, kind, "tars", tuple(names), texts)


def shards(path: str, split: str) -> list[str]:
    """The tars of a split. Raises ValueError where nshards.txt and what is there differ."""
    lines = _lines(path, f"{split}/nshards.txt")
    if not lines or not lines[0].strip().isdecimal() or not int(lines[0]):
        raise ValueError(f"{path}/{split}/nshards.txt: give the number of tars, from 1")
    found = [f"{path.rstrip('/')}/{split}/{i}.tar" for i in range(int(lines[0]))]
    for tar in found:
        if not storage.place(tar).exists():
            raise ValueError(f"{path}/{split}/nshards.txt says {len(found)} tars; {tar} is missing")
    return found


def _plain_folder(path: str, split: str) -> Folder:
    data = dict(path=path, split=split)
    counts = evaluation_data.counts(data)
    if not counts.get("label"):
        return Folder(path, split, "retrieval", "plain")
    names = evaluation_data.class_names(dict(data, kind="label"), split)
    return Folder(path, split, "classification", "plain", tuple(names), prompts.PHOTO)


def _lines(path: str, name: str) -> list[str]:
    """Of a file that may be missing, without a byte order mark, which would be of the first class's
    name. Raises ValueError, naming it, for one that is no text in UTF-8."""
    file = f"{path.rstrip('/')}/{name}"
    found = files.read_lines(file) if storage.place(file).exists() else []
    return [] if found == [""] else found


def _groups(tar: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The examples of a tar: members whose names are the same up to the first dot."""
    key, found = "", {}  # type: str, dict[str, bytes]
    try:
        with files.open_binary(tar) as handle:
            for member in tars.members(handle):
                folder, last = posixpath.split(member.name.removeprefix("./"))
                stem, _, suffix = last.partition(".")
                if posixpath.join(folder, stem) != key:
                    if found:
                        yield key, found
                    key, found = posixpath.join(folder, stem), {}
                if member.size > MAX_MEMBER:
                    raise ValueError(f"{tar}/{member.name} has {member.size} bytes")
                found[suffix.lower()] = member.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{tar} is damaged: {error}") from None
    if found:
        yield key, found


def _captions(members: Mapping[str, bytes], extra: Mapping[str, Any]) -> list[str]:
    if "txt" in members:
        found: Any = files.decode_text(members["txt"]).splitlines()
    else:
        found = next((extra[name] for name in CAPTIONS if name in extra), [])
    texts = [found] if isinstance(found, str) else found
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no caption, as lines of .txt or {', '.join(CAPTIONS)} of .json")
    return list(texts)


def _numbers(data: bytes) -> np.ndarray:
    """What an .npy holds, [N], N above 0. Raises ValueError for a damaged one, or one without."""
    try:
        found = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).reshape(-1)
    except (ValueError, MemoryError) as error:  # a shape may be any
        raise ValueError(f".npy is damaged: {error}") from None
    if not found.size or found.dtype.kind not in "biuf" or not np.isfinite(found).all():
        raise ValueError(f".npy holds {found.size} {found.dtype}; give finite numbers, one or more")
    return found


def _group(members: Mapping[str, bytes], extra: Mapping[str, Any]) -> Any:
    """What group an example belongs to: a number, a name or None."""
    if "npy" in members:
        return int(_numbers(members["npy"])[0])
    return next((extra[name] for name in GROUPS if name in extra), None)
