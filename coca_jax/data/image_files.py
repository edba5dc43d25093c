"""Image and video files by path, folder or URL."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence

from coca_jax.data import images
from coca_jax.data.sources import files, formats
from coca_jax.runtime import storage


def find(paths: Sequence[str], video: bool = False) -> list[str]:
    """Image files: those named, and those in folders and below that are not hidden, sorted, by
    their extensions.

    Paths and URLs (gs://, s3://, https://); an https URL is always taken for one image.
    video: video files as well.

    Raises FileNotFoundError for a path that does not exist, ValueError when there is no image.
    """
    extensions = set(files.IMAGE_SUFFIXES)
    if video:
        extensions |= {f".{suffix}" for suffix in files.VIDEO_SUFFIXES}
    found: dict[str, None] = {}
    for path in map(storage.plain_path, paths):
        for name, within in _below(path):
            image = posixpath.splitext(name)[1].lower() in extensions
            if not within or (image and not files.is_hidden(within)):
                found[name] = None
    if not found:
        raise ValueError(f"no image in {', '.join(paths) or 'no path'}; give images or folders")
    return list(found)


def refuse_others(paths: Sequence[str]) -> None:
    """Raises ValueError where no local one of the files that `find` gave can be a picture or a
    video, by what it begins with: those that are named may be anything. Of those whose names say
    that they are one nothing is read."""
    first = ""
    for path in paths:
        if files.is_remote(path) or path.lower().endswith(formats.MEDIA):
            return
        try:
            data = files.read_image(path)
            if images.is_video_file(data):
                return
            images.open_image(data)
            return
        except (OSError, ValueError) as error:
            first = first or (str(error) if path in str(error) else f"{path}: {error}")
    raise ValueError(first)


def without_videos(paths: Sequence[str], named: Sequence[str]) -> list[str]:
    """Those of the paths that `find` would have found without videos, or that are named."""
    suffixes = tuple(files.IMAGE_SUFFIXES)
    return [path for path in paths if path.lower().endswith(suffixes) or path in named]


def _below(path: str) -> Iterator[tuple[str, str]]:
    """(path, its name within the folder) of all files of a folder and below, each folder's own
    first; of a file itself (path, '').

    Raises FileNotFoundError for what does not exist.
    """
    if path.startswith(("http://", "https://")):
        yield path, ""
    elif files.is_remote(path):
        system, plain = files.filesystem(path)
        scheme = path.split("://", 1)[0]
        if system.isdir(plain):
            for name in sorted(system.find(plain)):
                yield f"{scheme}://{name.lstrip('/')}", posixpath.relpath(name, plain)
        elif system.exists(plain):
            yield path, ""
        else:
            raise FileNotFoundError(f"{path} does not exist; give images or folders of them")
    elif not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; give images or folders of them")
    elif not os.path.isdir(path):
        yield path, ""
    else:
        for folder, subfolders, names in os.walk(path):
            subfolders.sort()
            inside = os.path.relpath(folder, path)  # a file's would take longer than to find it
            prefix = "" if inside == "." else f"{inside}/"
            for name in sorted(names):
                yield os.path.join(folder, name), prefix + name
