"""Files of a run by their path: in a local folder, or in a bucket by gs://bucket/... or s3://...

`place` gives paths of etils.epath, which Orbax uses as well: the interface of pathlib, in a bucket
over fsspec (gcsfs, s3fs). In a bucket a file appears whole or not at all, cannot grow, and a folder
is there when a file is in it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import posixpath
import re
import resource
import shutil
import sys
import tempfile
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
from etils import epath

from coca_jax.runtime import extras

# Which file a name means, whether that file is still the same, how many may be open, and a folder
# to be alone in.


def plain_path(name: str) -> str:
    """The path of a file:// URL, as file managers give them, or of file:/path; any other name as it
    is."""
    if not name.startswith("file:/"):
        return name
    path = name.removeprefix("file:")
    if path.startswith("//"):
        path = path.removeprefix("//").removeprefix("localhost")
    return path if os.path.exists(path) else urllib.parse.unquote(path)


def from_home(name: str) -> str:
    """The path of '~/a', in the home folder, as shells have it where it stands alone: they leave
    `--out=~/a` as it is. A file or folder that is there by that very name stays."""
    if not name.startswith("~/") or os.path.lexists(name):
        return name
    return os.path.expanduser(name)


def whole_path(name: str, folder: str = "") -> str:
    """The one spelling of a name: './a', 'a' and '/here/a' are one file, and a URL is itself.

    folder: where relative names begin; '': the current folder.
    """
    name = plain_path(name)
    if "://" in name:
        return name
    return os.path.normpath(os.path.join(folder or os.getcwd(), name))


def stamp(name: str) -> tuple[int, int] | None:
    """The size of a local file in bytes and when it was changed, in nanoseconds; None for what is
    no local file."""
    try:
        found = os.stat(whole_path(name))
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def most_open(share: float, most: int) -> int:
    """That share of the files, sockets too, that this process may have open; `most` at most, and
    one at least."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, int(share * limit)))


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process or thread is inside for the same folder, which is there and local,
    or on a disk that machines share. Some network disks know no locks: there others may be."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            opened = os.open(plain_path(os.fspath(folder)), os.O_RDONLY)
            stack.callback(os.close, opened)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


# Where TensorFlow is installed, etils would reach buckets through it: another way of finding
# credentials than that of the data's files, seconds to import, and no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")

# What a listing showed once may be old a moment later: other processes and TensorStore write too.
for _protocol in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file
UNNAMED = re.compile(r"(.*)\.[0-9a-f]+\.new")  # what `unnamed` gives

# gcsfs logs what it also raises, with a traceback, and a line a call where it may not ask for the
# kind of the bucket.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_MAKE = {
    "gs": "gcloud storage buckets create gs://{}",
    "s3": "aws s3 mb s3://{}",
}
_CREDENTIALS = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or run `gcloud auth application-default login`",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run `aws configure`",
}
_RIGHTS = {
    "gs": "the role Storage Object User (roles/storage.objectUser) on the bucket",
    "s3": "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject on the bucket",
}
ANSWER_SECONDS = 90  # that a bucket is waited for at the start of a command


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of something other than a local file."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


_ONE_SLASH = re.compile(r"(gs|gcs|s3|https?|az|abfs|hdfs|hf):/[^/]")  # of a URL


def check_slashes(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a URL with one slash, which would be a local folder called 'gs:'."""
    text = os.fspath(path)
    if _ONE_SLASH.match(text):
        raise ValueError(f"{text}: a URL has two slashes, {text.replace(':/', '://', 1)}")


def filesystem(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The fsspec file system of a path or URL of any kind, and the path in it.

    Raises:
        ValueError: the URL's kind is unknown, has one slash, or needs a package that is not there.
    """
    check_slashes(path)
    try:
        return fsspec.url_to_fs(plain_path(os.fspath(path)))
    except ImportError as error:
        extra = EXTRAS.get(os.fspath(path).split("://", 1)[0])
        raise ValueError(f"{path}: {extras.remedy(extra) if extra else error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def place(path: str | os.PathLike[str]) -> epath.Path:
    """The path of a run, or of a file in it: absolute where it is local.

    Raises:
        ValueError: a URL of another kind than gs:// and s3://, or its package is missing.
    """
    text = os.fspath(path)
    check_slashes(text)
    if not is_remote(text):
        return epath.Path(os.path.abspath(plain_path(text)))
    scheme = text.split("://", 1)[0]
    if scheme not in PACKAGES:
        raise ValueError(
            f"{text}: a run lives in a local folder or in a bucket, gs:// or s3://; mount other "
            "storage and give the folder"
        )
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise ValueError(f"{text}: {extras.remedy(EXTRAS[scheme])}")
    return epath.Path(text)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that there is no room for a file. TensorStore
    reports that of a local file as RESOURCE_EXHAUSTED, without the system's number."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in FULL or "No space left on device" in text:
            return True
        if "RESOURCE_EXHAUSTED" in text and "local file" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def unnamed(name: str) -> str:
    """The name of a file that is being written, before it is `name`: no other process has it, on no
    other machine either (in containers of one job their numbers are often the same)."""
    return f"{name}.{uuid.uuid4().hex[:12]}.new"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file at once or not at all; its folder is made when missing.

    Raises ValueError for a URL that `filesystem` does not know, OSError when it cannot be.
    """
    if is_remote(path):
        system, plain = filesystem(path)
        if os.fspath(path).split("://", 1)[0] in PACKAGES:  # objects are seen when they are whole
            with as_os_error(path, "cannot be written"):
                system.pipe_file(plain, data)
            return
        system.makedirs(posixpath.dirname(plain), exist_ok=True)
        new = unnamed(plain)
        system.pipe_file(new, data)
        system.mv(new, plain)
        return
    with whole_file(path) as new:
        place(new).write_bytes(data)


def remove(path: str) -> None:
    """Removes a file or a folder with all that is in it; nothing where there is none."""
    system, plain = filesystem(path)
    if system.exists(plain):
        system.rm(plain, recursive=True)


def check_writable(workdir: str | os.PathLike[str], *, make: bool = True) -> None:
    """Makes the folder when it is missing and writes, reads and removes a small file in it.

    make=False: a local one that is missing is not made; the nearest above it is tried.

    Raises:
        ValueError: the place cannot be written; of a bucket, why, and what to do.
    """
    folder = given = place(workdir)
    if not is_remote(folder):
        above = next(there for there in (folder, *folder.parents) if os.path.exists(there))
        folder = folder if make else above
    probe = folder / f".probe-{uuid.uuid4().hex}"

    def work() -> None:
        probe.write_bytes(b"coca_jax")
        if probe.read_bytes() != b"coca_jax":
            raise OSError("a file that was written does not read the same")
        probe.unlink()

    if is_remote(folder):
        answer(folder, work)
        return
    if not above.is_dir():
        raise ValueError(f"{given} cannot be written ({above} is a file); give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error}); give another folder") from None


def reach(path: epath.Path) -> bool:
    """Whether a file or folder is there. Raises ValueError when a bucket cannot be asked."""
    return answer(path, path.exists) if is_remote(path) else path.exists()


def answer(path: epath.Path, work: Callable[[], Any]) -> Any:
    """`work()`, a first call to the bucket of `path`; what goes wrong becomes one clear line.

    Raises:
        ValueError: the bucket is not there, credentials are missing or lack a right, or no answer
            came within ANSWER_SECONDS.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except Exception as error:  # the bucket's libraries have types of their own
            outcome.append((None, error))

    # A daemon: a call that hangs must not keep the program from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    if not outcome:
        print(f"waiting for {path} to answer", file=sys.stderr)
        thread.join(ANSWER_SECONDS)
    if not outcome:
        raise ValueError(
            f"{path}: no answer in {ANSWER_SECONDS} s; is the network there, is the endpoint right?"
        )
    value, error = outcome[0]
    if error is not None:
        raise ValueError(f"{path}: {_why(path, error)}") from error
    return value


def _why(path: epath.Path, error: Exception) -> str:
    scheme, rest = os.fspath(path).split("://", 1)
    bucket = rest.split("/", 1)[0]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    low = text.lower()
    missing = isinstance(error, FileNotFoundError)  # its text has a name that may hold any digits
    if not missing and re.search(r"credential|anonymous|\b401\b|unauthorized", low):
        return f"no credentials that the bucket takes; {_CREDENTIALS[scheme]} ({text})"
    refused = isinstance(error, PermissionError) or re.search(r"denied|forbidden|\b403\b", low)
    if not missing and refused:
        return f"these credentials are not enough there; they need {_RIGHTS[scheme]} ({text})"
    if isinstance(error, FileNotFoundError) or "404" in low or "no such bucket" in low:
        return f"there is no bucket {bucket!r}; make it ({_MAKE[scheme].format(bucket)}) or name it"
    if "connect" in low or "timeout" in low:
        return f"the bucket cannot be reached; is the network there, the endpoint right? ({text})"
    return f"the bucket cannot be used ({text})"


@contextmanager
def as_os_error(path: str | os.PathLike[str], fails: str) -> Iterator[None]:
    """OSError, 'PATH FAILS: why', for what the library of a bucket or host raises; fails: 'cannot
    be written' or the like. Other errors stay as they are."""
    try:
        yield
    except Exception as error:
        if not is_of_network(error):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"{os.fspath(path)} {fails}: {text}") from error


def is_of_network(error: BaseException) -> bool:
    """Whether an error comes from the libraries that speak with buckets: it says nothing of what
    is there, and another try may do."""
    names = {type(error).__module__.split(".", 1)[0]}
    return bool(names & {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "requests"})


def move_folder(path: epath.Path, target: epath.Path) -> None:
    """Gives a folder another name; in a bucket the server copies each file."""
    if not is_remote(path):
        path.rename(target)
        return
    system, plain = filesystem(path)
    names = [name.removeprefix(plain) for name in system.find(plain)]
    system.copy([plain + name for name in names], [filesystem(target)[1] + n for n in names])
    path.rmtree()


@contextmanager
def local_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """A local folder to write files in that belong in `path`: `path` itself, made when missing, or
    for a bucket a temporary one, whose files are put there at the end."""
    target = place(path)
    if not is_remote(target):
        target.mkdir(parents=True, exist_ok=True)
        yield str(target)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder
        system, plain = filesystem(target)
        system.put(f"{folder}/", f"{plain}/", recursive=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], last: str) -> Iterator[str]:
    """A local folder to write files in that belong in `path`: they are moved there at the end, the
    file named `last` after all others. An exception inside leaves `path` as it was.

    The folder starts with links to the files that are in `path`; a file that is removed from it is
    removed from `path` too. Write new files under other names and rename them: a link that is
    written through would change the original.
    """
    if is_remote(path):
        with local_folder(path) as folder:
            yield folder
        return
    target = place(path)
    # A new folder is renamed into place. An existing one may be a mount point or the working
    # directory, so its files are moved one by one, from a folder on the same file system.
    exists = target.is_dir()
    new = target / f".{unnamed('write')}" if exists else target.parent / f".{unnamed(target.name)}"
    before = [file for file in _files_below(target) if not file.startswith(".")] if exists else []
    new.mkdir(parents=True)
    try:
        for name in before:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            _link(target / name, new / name)
        yield str(new)
        if not exists:
            os.replace(new, target)
            return
        after = _files_below(new)
        for name in sorted(after, key=lambda name: name == last):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, target / name)
        for name in set(before) - set(after):
            (target / name).unlink()
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _files_below(folder: epath.Path) -> list[str]:
    """Paths of all files in a local folder, relative to it."""
    return [
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
    ]


def _link(source: epath.Path, target: epath.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """A local name to write a file under that belongs at `path`: it is there at the end, whole,
    unless nothing was written; its folder is made when missing."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "file")
            yield local
            if os.path.exists(local):
                system, plain = filesystem(path)
                with as_os_error(path, "cannot be written"):
                    system.put_file(local, plain)
        return
    target = place(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / unnamed(target.name)
    try:
        yield str(new)
        if new.exists():
            new.replace(target)
    except OSError as error:
        if str(error.filename) == str(new):  # nobody knows the temporary name
            error.filename = str(target)
        raise
    finally:
        with suppress(OSError):  # on a read-only disk even of a file that is not there
            new.unlink(missing_ok=True)


@contextmanager
def local_copy(path: str | os.PathLike[str]) -> Iterator[str]:
    """A file or folder as a local one: `path` itself, or for a bucket a copy that is removed at
    the end (what is mapped from it stays readable). Raises FileNotFoundError."""
    source = place(path)
    if not is_remote(source):
        yield str(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        system, plain = filesystem(source)
        copy = os.path.join(folder, source.name)
        if system.isfile(plain):
            system.get_file(plain, copy)
        else:
            system.get(f"{plain}/", f"{copy}/", recursive=True)
        yield copy
