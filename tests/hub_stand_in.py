"""A stand-in for the Hugging Face hub: the requests of huggingface_hub for one repository's files
and commits, answered from a folder. Repositories are folders `root/org/name`; every one is at the
same commit. Nothing of it is authenticated."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """requests: the method and path of every request so far."""

    daemon_threads = True

    def __init__(self, root: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.requests = root, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def _entry(repository: pathlib.Path, place: pathlib.Path) -> dict:
    """A file or folder of a repository as the hub lists it."""
    path = place.relative_to(repository).as_posix()
    if place.is_dir():
        return dict(type="directory", path=path, oid=COMMIT)
    oid = hashlib.sha1(place.read_bytes()).hexdigest()
    return dict(type="file", path=path, size=place.stat().st_size, oid=oid)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, data: bytes | dict, headers=(), head: bool = False) -> None:
        body = json.dumps(data).encode() if isinstance(data, dict) else data
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self.answer(404, {"error": code}, headers, head=self.command == "HEAD")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head: bool = False):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/revision/(.+))?", path)
        file = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        tree = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path
        )  # since version 1
        found = info or file or tree
        if not found:
            return self.answer(404, b"", head=head)
        repository = self.server.root / found[1]
        if not repository.is_dir():
            return self.missing("RepoNotFound")
        revision = info[3] if info else found[2]
        if revision not in (None, "main", COMMIT):
            return self.missing("RevisionNotFound")
        if info:
            files = [p for p in sorted(repository.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": p.relative_to(repository).as_posix()} for p in files]
            return self.answer(200, {"id": found[1], "sha": COMMIT, "siblings": siblings})
        if tree:
            folder = repository / (tree[3] or "")
            if not folder.is_dir():
                return self.missing("EntryNotFound")
            whole = "recursive=true" in self.path.lower() or "/api/models/" in path
            found = sorted(folder.rglob("*") if whole else folder.iterdir())
            entries = [_entry(repository, p) for p in found]
            return self.answer(200, json.dumps(entries).encode())
        if not (repository / file[3]).is_file():
            return self.missing("EntryNotFound")
        data = (repository / file[3]).read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.answer(206 if start else 200, data[start:], headers, head=head)

    def do_POST(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append(f"POST {path}")
        body = self.body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if (self.server.root / name).exists() else 200
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            return self.answer(status, {"url": f"{self.server.url}/{name}", "error": "it exists"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        asked = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", path)
        if asked and (repository := self.server.root / asked[1]).is_dir():
            names = urllib.parse.parse_qs(body.decode())["paths"] if b"paths=" in body else ()
            names = names or json.loads(body)["paths"]
            there = [repository / name for name in names]
            entries = [_entry(repository, p) for p in there if p.exists()]
            return self.answer(200, json.dumps(entries).encode())
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if batch:
            objects = [
                {
                    **wanted,
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}},
                }
                for wanted in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if not found:
            return self.answer(404, b"")
        if found[2] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                continue
            value = entry["value"]
            if entry["key"] == "file":
                data = base64.b64decode(value["content"])
            else:
                data = (self.server.root / ".lfs" / value["oid"]).read_bytes()
            target = self.server.root / found[1] / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        url = f"{self.server.url}/{found[1]}/commit/{COMMIT}"
        self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def do_PUT(self):
        self.server.requests.append(f"PUT {self.path}")
        data = self.body()
        target = self.server.root / ".lfs" / self.path.rpartition("/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        assert hashlib.sha256(data).hexdigest() == target.name
        target.write_bytes(data)
        self.answer(200, b"")
