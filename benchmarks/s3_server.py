"""A folder as an S3 bucket that can be read: lists, sizes and ranges of files, from disk to socket.

    python benchmarks/s3_server.py DIR     # says its port; DIR/a/b.tar is s3://bucket/a/b.tar

For benchmarks of who reads: moto, which tests use, copies the whole object for each range.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import functools
import http.server
import os
import pathlib
import re
import socketserver
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from xml.sax.saxutils import escape

NAME = "bucket"


class Bucket(http.server.BaseHTTPRequestHandler):
    """Answers what reading a bucket asks; everything else is refused."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *given: object, root: pathlib.Path):
        self.root = root
        super().__init__(*given)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_PUT(self) -> None:
        self._told(403, b"", "this bucket can only be read")

    do_POST = do_DELETE = do_PUT

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line a request would be much of the time."""

    def _answer(self, body: bool) -> None:
        asked = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(asked.path).lstrip("/").partition("/")
        path = (self.root / key).resolve()
        if bucket != NAME or not path.is_relative_to(self.root.resolve()):
            self._told(404, b"", "no such bucket")
        elif not key:
            self._list(dict(urllib.parse.parse_qsl(asked.query)), body)
        elif not path.is_file():
            self._told(404, b"<Error><Code>NoSuchKey</Code></Error>" if body else b"")
        else:
            self._file(path, body)

    def _file(self, path: pathlib.Path, body: bool) -> None:
        found = path.stat()
        start, stop = 0, found.st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            start = int(span[1])
            stop = min(stop, int(span[2]) + 1) if span[2] else stop
            if start >= stop:
                return self._told(416, b"<Error><Code>InvalidRange</Code></Error>")
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{found.st_size}")
        self._end(stop - start, found)
        if body:
            with path.open("rb") as file:
                self.connection.sendfile(file, start, stop - start)

    def _list(self, query: dict[str, str], body: bool) -> None:
        """ListObjectsV2, all in one page, which holds for a thousand files."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folders = [], set()
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix):
                continue
            head, cut, _ = key[len(prefix) :].partition(delimiter or "\0")
            if cut:
                folders.add(prefix + head + cut)
                continue
            size, when = path.stat().st_size, "2026-01-01T00:00:00.000Z"
            items.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        items += [
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>"
            for one in sorted(folders)
        ]
        text = (
            '<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>'
            f"<Name>{NAME}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(items)}</KeyCount>{''.join(items)}</ListBucketResult>"
        )
        self._told(200, text.encode() if body else b"")

    def _told(self, status: int, text: bytes, message: str | None = None) -> None:
        self.send_response(status, message)
        self._end(len(text))
        self.wfile.write(text)

    def _end(self, length: int, found: os.stat_result | None = None) -> None:
        self.send_header("Content-Length", str(length))
        if found:
            self.send_header("ETag", f'"{found.st_mtime_ns:x}-{found.st_size:x}"')
            self.send_header("Last-Modified", email.utils.formatdate(found.st_mtime, usegmt=True))
        self.end_headers()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[int]:
    """A server of the folder in a process of its own; its port."""
    command = [sys.executable, __file__, str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    handler = functools.partial(Bucket, root=args.folder.resolve())
    with Server(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
