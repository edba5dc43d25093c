"""Files that data name: a stranger's row may point only into the folders that the user gave.

Without that, a row of somebody else's list makes a command read /home/you/.ssh, call an address of
the inner network or wait at a pipe for ever.
"""

from __future__ import annotations

import functools
import os
import posixpath
import unicodedata
from collections.abc import Sequence
from typing import Any

from absl import logging

from coca_jax.data import files, formats
from coca_jax.files import sealed_json

_MOST_BELOW = 500_000  # files


class Outside(ValueError):
    """A name that leads out of the folders that are allowed."""


def root_of(path: str) -> str:
    """The folder below which an input's rows may name files: the input where it is a folder, else
    the folder that it lies in, of a glob the part before the first wildcard or brace. JSON lists
    in a folder `annotations` are those of the folder above, as COCO lays them out. To ask begins to
    read an input: what lies below is looked for anew."""
    _pictures_below.cache_clear()
    _ran_in.cache_clear()
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
    """The path of a file that a row names, relative to `folder`, as it is spelled where it lies.

    Raises ValueError: the name cannot be a path.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is no name of a file")
    path = files.join(folder, name)
    if not files.is_remote(path) and not os.path.lexists(path):
        path = _meant(folder, name) or path
    return path


def from_list(path: str, name: Any) -> Any:
    """The name of a picture in a row, as it is seen from the folder of the list at `path`. What
    `caption --out` wrote names pictures from the folder in which that ran, and by them is found
    what is not found from the list's; any other name stays.

    Raises ValueError: what `caption` wrote beside its list is damaged.
    """
    folder, ran_in = posixpath.dirname(path) or ".", _ran_in(path)
    if not ran_in or not isinstance(name, str) or os.path.lexists(files.join(folder, name)):
        return name
    there, own = os.path.split(os.path.join(ran_in, name))
    if not os.path.lexists(os.path.join(there, own)):
        return name
    return os.path.relpath(os.path.join(os.path.realpath(there), own), os.path.realpath(folder))


@functools.lru_cache(maxsize=4)
def _ran_in(path: str) -> str:
    """The folder in which `caption` ran that wrote the local list at a path; '' for any other."""
    told = f"{path}{formats.HOW}"
    if files.is_remote(path) or not os.path.isfile(told):
        return ""
    found = sealed_json.read(told).get("made_in")
    return found if isinstance(found, str) else ""


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


def _meant(folder: str, name: str) -> str:
    """The local file for whose name a list has another spelling: backslashes, as those from Windows
    do, the other form of letters with accents, or blanks around it; '' for none. A name without
    folders is looked for in the folders below as well, as lists stand above their pictures."""
    plain = name.replace("\\", "/").strip()
    for spelling in (plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))):
        if spelling and os.path.lexists(path := files.join(folder, spelling)):
            return path
    below = {} if "/" in plain or not plain else _pictures_below(folder)
    return below.get(unicodedata.normalize("NFC", plain), "")


@functools.lru_cache(maxsize=4)
def _pictures_below(folder: str) -> dict[str, str]:
    """Names of the pictures in a folder and below -> their paths; '' for a name that several have,
    hidden folders left out.
    Of a folder with more than half a million files nothing, which a warning says: a list may lie
    above all that is there.
    """
    found: dict[str, str] = {}
    seen = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not files.is_hidden(name)]
        seen += len(names)
        if seen > _MOST_BELOW:
            logging.warning(
                "%s and the folders below have more than %s files; pictures that are named without "
                "their folders are looked for in no folder below: name them as FOLDER/PICTURE",
                folder,
                f"{_MOST_BELOW:,}",
            )
            return {}
        for name in names:
            if name.lower().endswith(formats.MEDIA):
                known = unicodedata.normalize("NFC", name)
                found[known] = "" if known in found else posixpath.join(place, name)
    return found


@functools.lru_cache(maxsize=64)
def _prefix(root: str, here: str) -> str:
    """What paths below a folder begin with, seen from the folder `here`."""
    found = files.real(root)
    separator = "/" if files.is_remote(found) else os.sep
    return found.rstrip(separator) + separator
