"""What lies at a path: the format in which `prepare` reads it, told from the files themselves."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from coca_jax import storage
from coca_jax.data import bounded_json, files, images, videos

MEDIA = images.SUFFIXES + tuple(f".{suffix}" for suffix in videos.SUFFIXES)
METADATA = (  # of an imagefolder
    *("metadata.jsonl", "metadata.csv", "metadata.jsonl.zst", "metadata.jsonl.gz"),
)
TEXTS = (".txt", ".caption")  # of captions in files beside the images; the first that is there
SIDECARS = (*TEXTS, ".json", ".cls")  # of all that is read beside them
IMAGE_COLUMNS = ("file_name", "filepath", "image", "path")  # of lists of image files

_SUFFIXES = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),  # img2dataset leaves parquet lists beside its tars
    "parquet": (".parquet",),
    "tfrecord": (".tfrecord", ".tfrecords"),
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".jsonl.zst", ".jsonl.gz"),
}
_LOOK_AT = 20_000  # files; a folder shows what it is long before


def guess(path: str) -> str:
    """The format of a file, glob or folder: a name that `prepare --format` takes.

    Raises:
        FileNotFoundError: nothing there.
        OSError: its store or host does not answer.
        ValueError: a folder without anything that can be read, or a file of no known kind; the
            text says what there is.
    """
    if not files.is_remote(path) and path.startswith("tfds:"):
        return "tfds"
    system, plain = files.filesystem(path)
    if files.is_pattern(path) or system.isfile(plain):
        found = _of_names([plain])
        if not found:
            raise ValueError(
                f"{path} is one file, and no list or archive of images; give the folder of the "
                "images, tars, parquet, CSV or TSV"
            )
        return found
    with storage.as_os_error(path, "cannot be reached"):
        folder = system.isdir(plain)
    if not folder:
        raise FileNotFoundError(f"{path}: no such file or folder")
    names = list(_names(path))
    tops = {name for name in names if "/" not in name}
    if "manifest.json" in tops and any(name.endswith(".array_record") for name in tops):
        return "prepared"
    if {"features.json", "dataset_info.json"} <= tops:
        return "tfds"
    if any(name.count("/") <= 1 and posixpath.basename(name) in METADATA for name in names):
        return "imagefolder"
    found = _of_names(names)
    pictures = any(name.lower().endswith(MEDIA) for name in names)
    if found in ("", "parquet") and _has_sidecars(names):
        return "sidecars"
    if found == "jsonl" or (found == "csv" and pictures):
        lists = [name for name in names if name.lower().endswith(_SUFFIXES[found])]
        if not any(_lists_images(path, name, set(names)) for name in lists[:8]):
            found = ""  # a table of something else beside folders of images
    if found or pictures:
        return found or "imagefolder"
    raise ValueError(f"{path}: {_contents(names)}; give images, tars, parquet, CSV or TSV")


def _names(path: str) -> Iterator[str]:
    """Names of the files in a folder and below, hidden ones left out, up to a number."""
    count = 0
    for names in files.walk(path):
        yield from names
        count += len(names)
        if count >= _LOOK_AT:
            return


def _of_names(names: list[str]) -> str:
    lower = [name.lower() for name in names]
    for kind, suffixes in _SUFFIXES.items():
        if any(name.endswith(suffixes) or f"{suffixes[0]}-" in name for name in lower):
            return kind
    return ""


def _has_sidecars(names: list[str]) -> bool:
    """Whether most pictures have a text of their name beside them."""
    texts = {posixpath.splitext(name)[0] for name in names if name.lower().endswith(SIDECARS)}
    pictures = [posixpath.splitext(name)[0] for name in names if name.lower().endswith(MEDIA)]
    return 2 * sum(name in texts for name in pictures) > len(pictures)


def separator(header: str) -> str:
    """What separates the columns of a list with this first line: a tab where it has one, a
    semicolon where it has no comma (as spreadsheets write in much of Europe), else a comma."""
    if "\t" in header:
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def image_field(row: Mapping[str, Any]) -> str:
    """The field of a list's row that names an image: one of the usual names, else the only one
    whose text ends as the names of pictures do; '' where there is none."""
    usual = [name for name in IMAGE_COLUMNS if row.get(name) not in (None, "", [])]
    by_text = [
        name
        for name, value in row.items()
        if isinstance(value, str) and value.strip().lower().endswith(MEDIA)
    ]
    return usual[0] if usual else by_text[0] if len(by_text) == 1 else ""


def beside(path: str) -> list[str]:
    """Files in a folder of pictures that may hold their texts, and are not read with them."""
    return [name for name in _names(path) if name.lower().endswith((".csv", ".tsv", *SIDECARS))]


def _lists_images(folder: str, name: str, names: set[str]) -> bool:
    """Whether a list has a column of image files: by its name, or by a picture that is there."""
    packed = name.lower().endswith(_SUFFIXES["jsonl"])
    row = (
        _first_object(files.join(folder, name)) if packed else _first_row(files.join(folder, name))
    )
    if set(IMAGE_COLUMNS) & set(row):
        return True
    named = str(row.get(image_field(row), "")).strip().replace("\\", "/")
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), named)) in names


def _first_row(path: str) -> dict[str, str]:
    """The first row of a table, by column; without a row its columns."""
    with files.open_binary(path) as file:
        data = file.read(65_536)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # refused when it is read
    text = data.decode("utf-16" if marked else "utf-8", "replace").removeprefix("\ufeff")
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator(header))
    try:
        columns, first = next(rows, []), next(rows, [])
    except csv.Error:
        return {}
    return dict.fromkeys((name.strip() for name in columns), "") | dict(zip(columns, first))


def _first_object(path: str) -> dict[str, Any]:
    """The first object of a list."""
    packed, line = path.lower().endswith(_SUFFIXES["jsonl"][1:]), b""
    try:
        with files.open_unpacked(path) if packed else files.open_binary(path) as file:
            while b"\n" not in line and len(line) < 1 << 20 and (block := file.read(64)):
                line += block
        return bounded_json.parse(line.split(b"\n", 1)[0])
    except (ValueError, OSError):
        return {}


def _contents(names: list[str]) -> str:
    if not names:
        return "the folder is empty"
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"no images in it, only {len(names)} other files ({shown})"
