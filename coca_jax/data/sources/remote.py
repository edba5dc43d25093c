"""Files in a bucket: ranges of them by fsspec, and local copies of ArrayRecord shards.

Retries are those of the store's library (s3fs and gcsfs try five or six times).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

from coca_jax.data.sources import files, references
from coca_jax.data.sources.references import Reference
from coca_jax.runtime import cache_folder, storage, unreachable

GAP_BYTES = 64 << 10  # between ranges that come in one request
MOST_BYTES = 8 << 20  # of a request for several ranges


def _requests(wanted: Sequence[Reference]) -> list[list[Reference]]:
    """References sorted by path and start, those near each other together."""
    found: list[list[Reference]] = []
    stop = 0
    for one in wanted:
        end = one.start + one.size
        if found and one.path == found[-1][0].path and one.start <= stop + GAP_BYTES:
            if max(end, stop) - found[-1][0].start <= max(MOST_BYTES, stop - found[-1][0].start):
                found[-1].append(one)
                stop = max(stop, end)
                continue
        found.append([one])
        stop = end
    return found


def read_ranges(wanted: Sequence[Reference]) -> list[bytes]:
    """The bytes of references that are sorted by path and start; all requests run concurrently.

    Raises:
        OSError: a file is gone, or its store does not answer.
        ValueError: the bytes are not those that were indexed.
    """
    stores: dict[object, list[tuple[str, list[Reference]]]] = {}  # of an index may be several
    for request in _requests(wanted):
        system, plain = files.filesystem(request[0].path)
        stores.setdefault(system, []).append((plain, request))
    found: dict[Reference, bytes] = {}
    for system, there in stores.items():
        starts = [request[0].start for _, request in there]
        stops = [max(one.start + one.size for one in request) for _, request in there]
        paths = [plain for plain, _ in there]
        try:
            answers = system.cat_ranges(paths, starts, stops, on_error="return")  # type: ignore[attr-defined]
        except Exception as error:  # the stores' libraries have types of their own
            answers = [error] * len(there)
        for (_, request), data in zip(there, answers):
            if isinstance(data, Exception):
                raise _unread(request[0].path, data)
            for one in request:
                start = one.start - request[0].start
                found[one] = bytes(data[start : start + one.size])
                known = one.crc != references.UNKNOWN
                if len(found[one]) != one.size or (known and zlib.crc32(found[one]) != one.crc):
                    raise changed(one, 0)
    return [found[one] for one in wanted]


def _unread(path: str, error: Exception) -> OSError:
    if not isinstance(error, unreachable.ANSWERS):
        unreachable.note(path, error)
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    return kind(f"{path} cannot be read: {type(error).__name__}: {error}")


def changed(one: Reference, there: int) -> references.Changed:
    """The error of a file that is not the one that was indexed. there: its bytes; 0: not known."""
    sizes = f" of {one.file_bytes} bytes (it has {there})" if there else ""
    return references.Changed(
        f"{one.path} is not the file{sizes} that was indexed; index the data again"
    )


def local_copy(path: str) -> str:
    """The path of a local file; of a remote one that of its copy in the cache folder, made once.

    array_record reads local files only. Raises OSError: the store does not answer, or no room.
    """
    if not files.is_remote(path):
        return path
    system, plain = files.filesystem(path)
    with unreachable.asking(path):
        # A shard that was written anew gets another copy.
        mark = f"{path} {system.size(plain)} {system.checksum(plain)}"
        folder = cache_folder.folder() / "shards"
        copy = folder / hashlib.blake2b(mark.encode(), digest_size=16).hexdigest()
        if not copy.exists():
            with storage.whole_file(copy) as new:
                system.get_file(plain, new)
    return str(copy)
