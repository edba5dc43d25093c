"""What lies at a path: the format in which `prepare` reads it, told from the files themselves."""

from __future__ import annotations

import codecs
import contextlib
import csv
import fnmatch
import functools
import io
import itertools
import os
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from coca_jax.data.sources import files, registry
from coca_jax.runtime import bounded_json, extras, storage

MEDIA = files.IMAGE_SUFFIXES + tuple(f".{suffix}" for suffix in files.VIDEO_SUFFIXES)
METADATA = ("metadata.jsonl", "metadata.csv")  # of an imagefolder
TEXTS = (".txt", ".caption")  # of captions in files beside the images; the first that is there
SIDECARS = (*TEXTS, ".json", ".cls")  # of all that is read beside them
IMAGE_COLUMNS = ("file_name", "filepath", "image", "path")  # of lists of image files

SEPARATORS = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "bars",
}  # of the columns of lists

CSV, JSONL = (".csv", ".tsv"), ".jsonl"
IMAGES = tuple(f"*{suffix}" for suffix in MEDIA)  # globs
TABLES = (".csv", ".tsv", ".jsonl", ".json")
_READ = "images, tars, parquet, Arrow, CSV, TSV or JSON lists"
_LOOK_AT = 20_000  # files; a folder shows what it is long before
_LOOK_AT_ROWS, _LOOK_AT_BYTES = 100, 1 << 20  # of a list
_MOST_LISTS = 64  # JSON files of a folder that are opened
_FILE_NAME = re.compile(rb'"file_?name"\s*:\s*"([^"]+)"')


def from_hub(path: str) -> str:
    """A path, and for hf://OWNER/NAME[/CONFIG][:SPLIT] that of its Arrow files here, which the
    first call downloads. Raises ValueError."""
    if not path.startswith("hf://") or path.startswith("hf://datasets/"):  # a file, of fsspec
        return path
    extras.check("datasets", "datasets", f"{path}: reading the Hugging Face hub")
    from coca_jax.data.sources import hf_datasets  # and with it pyarrow

    found = hf_datasets.resolve(path)
    print(f"{path}: reading its Arrow files, {found}", file=sys.stderr)
    return found


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
        return _of_file(path, plain)
    with storage.as_os_error(path, "cannot be reached"):
        folder = system.isdir(plain)
    if not folder:
        raise FileNotFoundError(f"{path}: no such file or folder")
    everything = _names(path)
    names = files.without_ours(everything)
    tops = {name for name in names if "/" not in name}
    if files.is_prepared(tops):
        return "prepared"
    if {"features.json", "dataset_info.json"} <= tops:
        return "tfds"
    if any(name.count("/") <= 1 and posixpath.basename(name) in METADATA for name in names):
        return "imagefolder"
    pictures = any(name.lower().endswith(MEDIA) for name in names)
    found = _of_names(names)
    if found in ("", "parquet") and _has_sidecars(names):
        return "sidecars"
    if found == "jsonl" or (found == "csv" and pictures):
        lists = [
            name for name in names if name.lower().endswith(JSONL if found == "jsonl" else CSV)
        ]
        if not any(_lists_images(path, name, names) for name in lists[:8]):
            found = ""  # a table of something else beside folders of images
    elif not found and text_lists(path, names):
        return "csv"
    if not found and pictures and caption_lists(path, names):
        return "json"
    if found or pictures:
        return found or "imagefolder"
    raise ValueError(f"{path}: {_contents(everything)}; give {_READ}")


def _of_file(path: str, plain: str) -> str:
    """The format of a file or glob, whose path in its file system is `plain`."""
    found = _of_names([plain])
    if files.is_pattern(path) and plain.lower().endswith(MEDIA):
        return "sidecars"
    if not found and plain.lower().endswith(".txt") and not files.is_pattern(path):
        above, _, name = path.rpartition("/")
        found = "csv" if _is_text_list(above or ".", name, _names(above or ".")) else ""
    if not found and plain.lower().endswith(".json"):
        return "json"
    if not found:
        raise ValueError(
            f"{path} is one file, and no list or archive of images; give the folder of the {_READ}"
        )
    return found


def caption_lists(path: str, names: Sequence[str] = ()) -> list[str]:
    """The JSON lists, COCO's or Karpathy's, that have captions of the images in a folder: those in
    the folder and below; of a local folder without any, those next to it or in the folder
    `annotations` next to it that name an image in it. names: of the files in it, where known."""
    names = names or files.without_ours(_names(path))
    stems = {posixpath.splitext(name)[0] for name in names if name.lower().endswith(MEDIA)}
    lists = [name for name in names if name.lower().endswith(".json")]
    lists = [name for name in lists if posixpath.splitext(name)[0] not in stems]  # no sidecars
    inside = [files.join(path, name) for name in lists[:_MOST_LISTS]]
    if found := [file for file in inside if _listed_images(file)]:
        return found
    if files.is_remote(path):
        return []
    above = posixpath.dirname(files.absolute(path).rstrip("/"))
    for folder in (above, files.join(above, "annotations")):
        there = files.listing(folder) if files.exists(folder) else []
        beside = [files.join(folder, n) for n in sorted(there) if n.lower().endswith(".json")]
        found += [
            file
            for file in beside[:_MOST_LISTS]
            if any(files.exists(files.join(path, name)) for name in _listed_images(file))
        ]
    return found


def _listed_images(file: str) -> list[str]:
    """The first images that a JSON list of captions names; [] for any other file."""
    try:
        with files.open_binary(file) as stream:
            data = stream.read(_LOOK_AT_BYTES)
            stream.seek(max(len(data), files.size(file) - _LOOK_AT_BYTES))
            end = stream.read(_LOOK_AT_BYTES)
    except OSError:
        return []
    both = data + end
    if b'"images"' not in both or not (b'"caption"' in both or b'"sentences"' in both):
        return []
    found = itertools.islice(_FILE_NAME.finditer(data), _LOOK_AT_ROWS)
    return [one[1].decode("utf-8", "replace") for one in found]


def _names(path: str) -> list[str]:
    """Names of the files in a folder and below, hidden ones left out, up to a number."""
    found: list[str] = []
    for names in files.walk(path):
        found += names
        if len(found) >= _LOOK_AT:
            break
    return found


def _of_names(names: list[str]) -> str:
    lower = [name.lower() for name in names]
    for kind, format in registry.formats().items():
        if format.priority and any(fnmatch.filter(lower, one) for one in format.patterns):
            return kind
    return ""


def is_archive_or_list(path: str) -> bool:
    """Whether a file's name is that of data, and not of one image."""
    return bool(_of_names([path])) or path.lower().endswith(".txt")


def _has_sidecars(names: list[str]) -> bool:
    """Whether most pictures have a text of their name beside them."""
    texts = {posixpath.splitext(name)[0] for name in names if name.lower().endswith(SIDECARS)}
    pictures = [posixpath.splitext(name)[0] for name in names if name.lower().endswith(MEDIA)]
    return 2 * sum(name in texts for name in pictures) > len(pictures)


def dialect(header: str, row: str = "") -> dict[str, Any]:
    """How `csv` is to read a list with this first line, and the second. What separates its columns:
    a tab where it has one, else a comma, a semicolon (as spreadsheets write in much of Europe) or a
    bar; of several the first that sets an image apart, best with as many cells in both lines. Where
    a space follows there, it is none of the cells', which may be quoted behind it."""
    ways = [_separated(mark, header) for mark in ("\t", ",", ";", "|") if mark in header]
    return max(ways or [_separated(",", header)], key=lambda way: _fit(header, row, way))


def _separated(mark: str, header: str) -> dict[str, Any]:
    quoting = csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL  # no text has bars
    return dict(delimiter=mark, skipinitialspace=f"{mark} " in header, quoting=quoting)


def _fit(header: str, row: str, way: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a cell of the two lines is an image's or so called, and whether both have as many."""
    names, cells = _cells(header, way), _cells(row, way)
    named = set(IMAGE_COLUMNS) & {*names} or any(cell.lower().endswith(MEDIA) for cell in cells)
    return bool(named), len(names) == len(cells)


def _cells(line: str, way: dict[str, Any]) -> list[str]:
    """The cells of a line; none of what the format does not allow."""
    try:
        return [cell.strip() for cell in next(csv.reader([line.rstrip("\r\n")], **way), [])]
    except csv.Error:
        return []


def image_field(row: Mapping[str, Any]) -> str:
    """The field of a list's row that names an image: one of the usual names, else the only one
    whose text, or each text of which, ends as the names of pictures do; '' where there is none."""
    usual = [name for name in IMAGE_COLUMNS if row.get(name) not in (None, "", [])]
    by_text = [name for name, value in row.items() if _names_pictures(value)]
    return usual[0] if usual else by_text[0] if len(by_text) == 1 else ""


def url_field(row: Mapping[str, Any]) -> str:
    """The field of a list's row that holds the URL of its image on the web, as the lists that
    img2dataset downloads have it; '' where there is none, or the row names a file."""
    image = image_field(row)
    named = [image] if image else [name for name in row if str(name).lower().endswith("url")]
    return next((name for name in named if _is_url(row[name])), "")


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value.strip().startswith(("http://", "https://"))


def _names_pictures(value: Any) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, str) and one.strip().lower().endswith(MEDIA) for one in texts)


def beside(path: str) -> list[str]:
    """Files in a folder of pictures that may hold their texts, and are not read with them."""
    names = files.without_ours(_names(path))
    return [name for name in names if name.lower().endswith((".csv", ".tsv", *SIDECARS))]


def text_lists(path: str, names: Sequence[str] = ()) -> list[str]:
    """The .txt files of a folder that are lists of its pictures, with columns as a CSV has them;
    none where there is a .csv or .tsv. names: of the files in the folder, where they are known."""
    names = names or files.without_ours(_names(path))
    if any(name.lower().endswith(CSV) for name in names):
        return []
    pictures = {posixpath.splitext(name)[0] for name in names if name.lower().endswith(MEDIA)}
    texts = [name for name in names if name.lower().endswith(".txt")]
    apart = [name for name in texts if posixpath.splitext(name)[0] not in pictures]
    return [files.join(path, name) for name in apart[:8] if _is_text_list(path, name, names)]


def _is_text_list(folder: str, name: str, names: Sequence[str]) -> bool:
    columns = list(_first_rows(files.join(folder, name))[0])
    headed = len(columns) > 1 and not any(column.lower().endswith(MEDIA) for column in columns)
    return headed and _lists_images(folder, name, names)


def _lists_images(folder: str, name: str, names: Sequence[str]) -> bool:
    """Whether a list has a column of image files: by its name, or by a picture that is there, in
    one of the first rows, as the files of some may be gone.

    names: of the files in the folder.
    """
    rows, there = _first_objects if name.lower().endswith(JSONL) else _first_rows, set(names)
    pictures = [one for one in names if one.lower().endswith(MEDIA)]
    if len({posixpath.dirname(one) for one in pictures}) == 1:  # whose name is no class
        there.update(map(posixpath.basename, pictures))  # see `named_files.resolve`
    for row in rows(files.join(folder, name)):
        named = str(row.get(image_field(row), ""))
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), named))
        if {named, path} & there or set(IMAGE_COLUMNS) & set(row):
            return True
        if not pictures and url_field(row):
            return True
    return False


def _first_rows(path: str) -> list[dict[str, str]]:
    """The first rows of a table, by column; of one without rows its columns."""
    with files.open_binary(path) as file:
        data = file.read(_LOOK_AT_BYTES)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # refused when it is read
    text = data.decode("utf-16" if marked else "utf-8", "replace").removeprefix("\ufeff")
    header, _, rest = text.partition("\n")
    row = rest.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), **dialect(header, row))
    found: list[list[str]] = []
    with contextlib.suppress(csv.Error):
        found.extend(itertools.islice(rows, 1 + _LOOK_AT_ROWS))
    columns = [name.strip() for name in found[0]] if found else []
    return [dict.fromkeys(columns, "") | dict(zip(columns, row)) for row in found[1:] or [[]]]


def _first_objects(path: str) -> list[dict[str, Any]]:
    """The first objects of a list."""
    with files.open_binary(path) as file:
        data, found = file.read(_LOOK_AT_BYTES), []
    for line in data.split(b"\n")[:_LOOK_AT_ROWS]:
        with contextlib.suppress(ValueError):
            found.append(bounded_json.parse(line))
    return found


def _contents(names: list[str]) -> str:
    if not names:
        return "the folder is empty"
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"no images in it, only {len(names)} other files ({shown}; archives are unpacked first, "
        "and links to folders are not followed)"
    )


# Files that data name: a stranger's row may point only into the folders that the user gave.
#
# Without that, a row of somebody else's list makes a command read /home/you/.ssh, call an address of
# the inner network or wait at a pipe for ever.


_MOST_BELOW = 500_000  # files


class Outside(ValueError):
    """A name that leads out of the folders that are allowed."""


def root_of(path: str) -> str:
    """The folder below which an input's rows may name files: the input where it is a folder, else
    the folder that it lies in, of a glob the part before the first wildcard or brace. JSON lists
    in a folder `annotations` are those of the folder above, as COCO lays them out. To ask begins to
    read an input: what lies below is looked for anew."""
    _pictures_below.cache_clear()
    system, plain = files.filesystem(path)
    if files.is_pattern(path):
        parts = path.split("/")
        wild = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?[{"))
        found = "/".join(parts[:wild]) or ("/" if path.startswith("/") else ".")
    else:
        found = path if system.isdir(plain) else posixpath.dirname(path) or "."
    of_coco = path.lower().endswith(".json") and posixpath.basename(found) == "annotations"
    return posixpath.dirname(found) or "." if of_coco else found


def path_of(folder: str, name: Any) -> str:
    """The path of a file that a row names, relative to `folder`. A local image that is named without
    its folder is searched for below, because many lists stand above a folder of images.

    Raises ValueError: the name cannot be a path.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is no name of a file")
    path = files.join(folder, name)
    if "/" in name or files.is_remote(path) or os.path.lexists(path):
        return path
    return _pictures_below(folder).get(name) or path


def resolve(folder: str, name: Any, roots: Sequence[str]) -> str:
    """The path of a file that a row names, relative to `folder`, with symbolic links followed.

    Args:
        folder: of the file that has the row.
        roots: folders or URLs; the file must lie below one of them.

    Raises:
        Outside: it does not.
        ValueError: the name cannot be a path.
    """
    path = path_of(folder, name)
    if "::" in path and files.is_remote(path):  # fsspec would chain file systems
        raise Outside(f"{name[:200]!r} chains file systems")
    found = files.real(path)
    here = os.getcwd()  # the roots may be relative
    if not any(found.startswith(_prefix(root, here)) for root in roots):
        raise Outside(
            f"{name[:200]!r} leads to {found[:200]}, outside the input; "
            "`fit`, `prepare`, `recaption` and `search index` take --allow_paths=FOLDER_OR_URL"
        )
    return found


@functools.lru_cache(maxsize=4)
def _pictures_below(folder: str) -> dict[str, str]:
    """Names of the images in a folder and below -> their paths; '' for a name that several have.
    Hidden folders are skipped. Empty, with a warning, for a folder with more than `_MOST_BELOW`
    files: walking a large disk above a list takes minutes."""
    found: dict[str, str] = {}
    seen = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not files.is_hidden(name)]
        seen += len(names)
        if seen > _MOST_BELOW:
            logging.warning(
                "%s: more than %s files in it and below. Images named without their folder are not "
                "searched for there; name them as FOLDER/IMAGE.",
                folder,
                f"{_MOST_BELOW:,}",
            )
            return {}
        for name in names:
            if name.lower().endswith(MEDIA):
                found[name] = "" if name in found else posixpath.join(place, name)
    return found


@functools.lru_cache(maxsize=64)
def _prefix(root: str, here: str) -> str:
    """What paths below a folder begin with, seen from the folder `here`."""
    found = files.real(root)
    separator = "/" if files.is_remote(found) else os.sep
    return found.rstrip(separator) + separator
