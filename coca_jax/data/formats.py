"""What lies at a path: the format in which `prepare` reads it, told from the files themselves."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator

from coca_jax.data import bounded_json, files, images, videos

MEDIA = images.SUFFIXES + tuple(f".{suffix}" for suffix in videos.SUFFIXES)
METADATA = (  # of an imagefolder
    *("metadata.jsonl", "metadata.csv", "metadata.jsonl.zst", "metadata.jsonl.gz"),
)
SIDECARS = (".txt", ".json", ".cls")  # of texts in files beside the images
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
    if not system.isdir(plain):
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
        if not any(_lists_images(files.join(path, name)) for name in lists[:8]):
            found = ""  # a table of something else beside folders of images
    if found or pictures:
        return found or "imagefolder"
    raise ValueError(f"{path}: {_contents(names)}; give images, tars, parquet, CSV or TSV")


def _names(path: str) -> Iterator[str]:
    """Names of the files in a folder and below, hidden ones left out, up to a number."""
    system, plain = files.filesystem(path)
    count = 0
    for folder, folders, inside in system.walk(plain, topdown=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(inside):
            if not name.startswith("."):
                count += 1
                yield posixpath.relpath(posixpath.join(folder, name), plain)
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


def _lists_images(path: str) -> bool:
    """Whether the header of a list has a column of image files."""
    if path.lower().endswith(_SUFFIXES["jsonl"]):
        return _names_an_image(path)
    with files.open_binary(path) as file:
        header = file.readline(65_536).decode("utf-8", "replace").removeprefix("\ufeff")
    row = next(csv.reader(io.StringIO(header), delimiter=separator(header)), [])
    return bool(set(IMAGE_COLUMNS) & {column.strip() for column in row})


def _names_an_image(path: str) -> bool:
    """Whether the first object of a list has a field of an image's file."""
    packed, line = path.lower().endswith(_SUFFIXES["jsonl"][1:]), b""
    try:
        with files.open_unpacked(path) if packed else files.open_binary(path) as file:
            while b"\n" not in line and len(line) < 1 << 20 and (block := file.read(64)):
                line += block
        row = bounded_json.parse(line.split(b"\n", 1)[0])
    except (ValueError, OSError):
        return False
    return bool(set(IMAGE_COLUMNS) & set(row))


def _contents(names: list[str]) -> str:
    if not names:
        return "the folder is empty"
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"no images in it, only {len(names)} other files ({shown})"
