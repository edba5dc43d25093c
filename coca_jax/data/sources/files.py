"""Files by path or URL (gs://, s3://, memory:// ...), through fsspec: listing, reading, finding those
of an input, and what their names say: images and videos, splits, folders that commands of ours wrote.
"""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import os
import posixpath
import re
import socket
import stat
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from coca_jax.runtime import storage, unreachable
from coca_jax.runtime.storage import as_os_error, filesystem, is_remote

MAX_PIXELS = 120_000_000  # of an image or frame; decoding takes about 7 bytes for each
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
VIDEO_SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "flv", "ogv")
VALIDATION = ("validation", "valid", "val", "dev")  # one split by its usual names
SPLITS = {  # what files and folders are called, in any case -> the split that they tell
    **dict(train="train", training="train", test="test", testing="test"),
    **dict.fromkeys(VALIDATION, "validation"),
}
_MARKS = ("manifest.json", "index.json")  # of folders that `prepare` and `search index` wrote
_OF_SYSTEMS = ("__MACOSX", "@eaDir")  # folders that macOS packs and Synology's stations make
_UNREACHED = (ConnectionError, TimeoutError, socket.gaierror)
MAX_IMAGE_FILE = 1 << 30  # bytes of any one file of pictures
MAX_TEXT_FILE = 64 << 20  # of a list of names or prompts
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")  # of a pattern


def join(folder: str, name: str) -> str:
    """A file in a folder, or `name` itself where it is absolute or a URL."""
    if "://" in name or posixpath.isabs(name) or name.startswith("file:/"):
        return name
    return posixpath.join(folder, name)


def absolute(path: str) -> str:
    """The path of a file or folder here from the root on; a URL as it is."""
    return path if is_remote(path) else os.path.abspath(storage.plain_path(path))


def real(path: str) -> str:
    """The one path of a file or folder: here with links followed, of a URL without '..'."""
    if not is_remote(path):
        return os.path.realpath(absolute(path))
    scheme, rest = path.split("://", 1)
    if ".." in rest.split("/"):  # else left alone: 'a//b' is a key of its own in a bucket
        rest = posixpath.normpath(rest)
    return f"{scheme}://{rest}"


def exists(path: str) -> bool:
    """Whether a file or folder is there. Raises OSError where its host does not answer."""
    system, plain = filesystem(path)
    with as_os_error(path, "cannot be reached"):
        return bool(system.exists(plain))


def listing(folder: str) -> list[str]:
    """The names in a folder, sorted."""
    system, plain = filesystem(folder)
    return sorted(posixpath.basename(found.rstrip("/")) for found in system.ls(plain, detail=False))


def is_hidden(name: str) -> bool:
    """Whether a file, by its name within a folder, is none that somebody put there: a part of the
    name begins with a dot, or is that of a folder that systems make for themselves."""
    parts = name.split("/")
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in _OF_SYSTEMS for part in parts
    )


def walk(path: str) -> Iterator[list[str]]:
    """For a folder and each one below, the names of its files within `path`, sorted, without those
    that are hidden."""
    system, plain = filesystem(path)
    walk = os.walk if "file" in system.protocol else system.walk  # which asks of each file
    for folder, folders, names in walk(plain):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        within = posixpath.relpath(folder, plain)
        yield [posixpath.normpath(f"{within}/{n}") for n in sorted(names) if not is_hidden(n)]


def read(path: str) -> bytes:
    """The whole of a regular file; see `read_bounded`."""
    return read_bounded(path)


def decode_text(data: bytes) -> str:
    """The contents of a text file: UTF-8, or UTF-16 where its first two bytes say so, as editors on
    Windows write it. Raises UnicodeDecodeError for another encoding."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if marked else "utf-8-sig")


def read_lines(path: str, called: str = "") -> list[str]:
    """The lines of a text file, without their ends.

    called: what the message for a file that is not there calls it, such as 'head.classes=x.txt'.

    Raises:
        OSError, ValueError: as `read_bounded`; or it is no text in UTF-8.
    """
    try:
        text = decode_text(read_bounded(path, MAX_TEXT_FILE))
    except FileNotFoundError:
        line = f"{called or path}: no such file; give a text file, one name a line"
        raise FileNotFoundError(line) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if "\0" in text:
        raise ValueError(f"{path}: no text, it has zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


class TooLarge(ValueError):
    """A file that has more bytes than are read."""


def read_bounded(path: str, most: int = MAX_IMAGE_FILE) -> bytes:
    """The whole of a regular file: neither a pipe nor a device, however it is named.

    Raises:
        TooLarge: it has more than `most` bytes.
        OSError: it is absent, not a regular file or cannot be read.
        ValueError: the path cannot be one.
    """
    if is_remote(path):
        with open_binary(path) as file:
            data = file.read(most + 1)
    else:
        path = storage.plain_path(path)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"{path}: not a regular file")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):  # exchanged since
                raise OSError(f"{path}: not a regular file")
            data = file.read(min(found.st_size, most) + 1)
    if len(data) > most:
        raise TooLarge(f"{path}: more than {most} bytes")
    return data


def read_image(path: str) -> bytes:
    """The whole of a file that somebody named as an image.

    Raises FileNotFoundError, ValueError for a folder, each saying what to give, or what
    `read_bounded` raises.
    """
    if is_remote(path):
        return read_bounded(path)
    path = storage.plain_path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; give an image file, folder or URL")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give it alone for all of its images, or name them")
    return read_bounded(path)


def open_binary(path: str) -> Any:
    """A file to read, seekable. Raises OSError where it cannot be, as of a pipe or a device."""
    if is_remote(path):
        with unreachable.asking(path), _named(path):
            system, plain = filesystem(path)
            return unreachable.Asked(system.open(plain, "rb"), path)
    system, plain = filesystem(path)
    if not stat.S_ISREG(os.stat(plain).st_mode):
        raise OSError(f"{path}: not a regular file")
    return system.open(plain, "rb")


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Raises ConnectionError naming the URL where nothing was reached: fsspec takes a refused
    http:// for a file that is not there, and ftp:// names no address."""
    try:
        yield
    except OSError as error:
        why = error.__cause__ if isinstance(error, FileNotFoundError) else error
        refused = why is not error and isinstance(why, OSError)  # by the library of the store
        if isinstance(why, FileNotFoundError) or not (refused or isinstance(why, _UNREACHED)):
            raise
        raise ConnectionError(f"{path} cannot be reached: {why}") from why


def mark(path: str) -> str:
    """What is another where a file has changed. Raises FileNotFoundError."""
    system, plain = filesystem(path)
    return str(system.info(plain))


def size(path: str) -> int:
    """Bytes of a file."""
    system, plain = filesystem(path)
    with unreachable.asking(path):
        return system.size(plain)


def find(path: str, patterns: tuple[str, ...], split: str = "") -> list[str]:
    """Files of an input: the file itself, a glob, the files of a pattern with braces as webdataset
    has it ({000..999} or {a,b}, each of which may be a glob), or the matching files of a folder,
    sorted.

    In a folder, where some files' names tell their split (train-0001.tar, train.csv, a folder
    train/), only those of `split` are taken.

    patterns: in lower case; names match them in any.

    Raises:
        FileNotFoundError: nothing matches, or a file of a pattern with braces is not there.
        ValueError: such a pattern names more than a million files.
    """
    system, plain = filesystem(path)
    if is_pattern(path):
        found = list(_matching(system, plain, path))
    elif system.isfile(plain):
        return [storage.plain_path(path)]
    elif system.isdir(plain):
        by_split = _splits_by_file(system, plain, patterns)
        found = list(by_split)
        if split and any(by_split.values()):
            wanted = SPLITS.get(split.lower(), split)
            found = [file for file in found if by_split[file] == wanted]
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        raise FileNotFoundError(
            f"{path}: no {' or '.join(patterns)} in it" + (f" for split {split!r}" if split else "")
        )
    prefix = path.split("://", 1)[0] + "://" if is_remote(path) else ""
    return [prefix + f.lstrip("/") if prefix == "memory://" else prefix + f for f in sorted(found)]


def is_pattern(path: str) -> bool:
    """Whether a path has marks of a glob or braces, and names files by them: what is there under
    that very name is none. Raises OSError where its host does not answer."""
    plain = filesystem(path)[1]
    marked = _has_marks(plain) or _BRACES.search(plain)
    return bool(marked) and not exists(path)


def _has_marks(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _matching(system: Any, plain: str, path: str) -> set[str]:
    """The files of a pattern. Raises FileNotFoundError where braces name one, or a glob, that is
    not there."""
    if not _BRACES.search(plain):
        return _globbed(system, plain)
    found: set[str] = set()
    missing = []
    names = _expanded(plain)
    there = set() if _has_marks(plain) else set(system.glob(_BRACES.sub("*", plain)))
    for name in names:
        here = _globbed(system, name) if _has_marks(name) else {name} & there
        found |= here
        if not here:
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(names)} files are missing, the first {missing[0]}"
        )
    return found


def _globbed(system: Any, plain: str) -> set[str]:
    """The files of a glob; hidden ones, as shells do, only where its wildcards are behind a dot.
    Marks in the names of folders that are there, '[2024] photos/*.jpg', are letters."""
    parts = plain.split("/")
    marked = [number for number, part in enumerate(parts) if _has_marks(part)]
    first = next((n for n in marked[:-1] if not system.isdir("/".join(parts[: n + 1]))), marked[-1])
    there, named = "/".join(parts[:first]), is_hidden("/".join(parts[first:]))
    plain = "/".join([re.sub(r"([*?[])", r"[\1]", there)] * bool(first) + parts[first:])
    return {
        file
        for file in system.glob(plain)
        if not system.isdir(file) and (named or not is_hidden("/".join(file.split("/")[first:])))
    }


def _expanded(path: str) -> list[str]:
    """The names that a path with braces stands for, in the order of bash."""
    found = _BRACES.search(path)
    if not found:
        return [path]
    first, last, listed = found.groups()
    if listed is not None:
        parts = listed.split(",")
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        if abs(int(last) - int(first)) > 1_000_000:
            raise ValueError(f"{path}: {{{first}..{last}}} names more than a million files")
        step = 1 if int(last) >= int(first) else -1
        numbers = range(int(first), int(last) + step, step)
        parts = [str(number).zfill(width) for number in numbers]
    before, behind = path[: found.start()], _expanded(path[found.end() :])
    if len(parts) * len(behind) > 1_000_000:
        raise ValueError(f"{path}: it names more than a million files")
    return [f"{before}{part}{rest}" for part in parts for rest in behind]


def splits_in_names(path: str, patterns: tuple[str, ...]) -> list[str]:
    """The splits that the names of a folder's matching files tell, as `find` understands them:
    'train', 'test', 'validation' (also said valid, val, dev), sorted; [] where they tell none."""
    system, plain = filesystem(path)
    if not system.isdir(plain):
        return []
    by_split = _splits_by_file(system, plain, patterns).values()
    return sorted({*by_split} - {""})


def _splits_by_file(system: Any, plain: str, patterns: tuple[str, ...]) -> dict[str, str]:
    """Matching files of a folder and below -> the split that their names within it tell, or ''."""
    start = plain.rstrip("/") + "/"
    names = {_within(file, start): file for file in _below(system, plain)}
    matches = re.compile("|".join(map(fnmatch.translate, patterns))).match
    return {
        names[name]: split_of(name)
        for name in without_ours(names)
        if matches(name.lower()) and not is_hidden(name)
    }


def _below(system: Any, plain: str) -> Iterable[str]:
    """The files of a folder and below. Of a local one nothing is asked of each file."""
    if "file" not in system.protocol:
        return system.find(plain)
    top = plain.rstrip("/") or "/"
    return (f"{folder}/{name}" for folder, _, names in os.walk(top) for name in names)


def _within(file: str, start: str) -> str:
    """The name of a file within the folder whose paths begin with `start`."""
    name = file.removeprefix(start)
    odd = name == file or "//" in f"/{name}" or "/." in f"/{name}"
    return posixpath.relpath(file, start) if odd else name  # which takes ten times as long


def split_of(name: str) -> str:
    """The split that the first part of a path with such a word names ("train-0001.tar", "val2017/"),
    '' for none; of several in one part the first of SPLITS."""
    for part in name.lower().split("/"):
        if found := SPLITS.keys() & set(re.findall("[a-z]+", part)):
            return next(split for word, split in SPLITS.items() if word in found)
    return ""


def is_prepared(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is one that `prepare` wrote."""
    return "manifest.json" in names and any(name.endswith(".array_record") for name in names)


def without_ours(names: Collection[str]) -> list[str]:
    """Names within a folder but for those of the folders below that `prepare` or `search index`
    wrote."""
    inside: dict[str, list[str]] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        inside.setdefault(folder, []).append(own)
    marked = {f: found for f, found in inside.items() if f and {*_MARKS} & {*found}}
    if not marked:
        return list(names)
    ours = {folder for folder, found in marked.items() if is_prepared(found)}
    for folder, found in marked.items():
        parts = inside.get(f"{folder}/metadata", ())
        if folder and "index.json" in found and any(one.startswith("metadata_") for one in parts):
            ours |= {folder, f"{folder}/metadata", f"{folder}/img_emb"}
    return [name for name in names if name.rpartition("/")[0] not in ours]
