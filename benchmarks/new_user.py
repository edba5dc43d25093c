"""A new user's clock: from a clone in an empty home to a caption and a searchable folder.

    taskset -c 0 python benchmarks/new_user.py PLACE PHOTOS     # a quarter of an hour of a core

Clones this repository into PLACE, which is its home too, makes an environment, installs it, trains
the demo, starts the server until a caption has come, embeds the pictures of PHOTOS and asks for
one by words. Prints a line of JSON with the minutes of a core of each, their sums, and of the
server the seconds of a core until it serves, the first time and later. Needs what pip needs.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from measuring import ROOT, children
from serve import ask, form, seen

TO_CAPTION = ("clone", "install", "train", "serve")
TO_SEARCH = ("clone", "install", "train", "index", "query")


def user(home: pathlib.Path) -> dict[str, str]:
    """Their environment: nothing of this one but the way to packages."""
    kept = ("PIP_", "SSL_", "HTTP", "http", "no_proxy", "NO_PROXY", "UV_")
    env = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    path = os.pathsep.join([str(home / "coca/.venv/bin"), "/usr/local/bin", "/usr/bin", "/bin"])
    return env | dict(HOME=str(home), PATH=path, LANG="C.UTF-8")


def run(command: list[str], home: pathlib.Path, cwd: pathlib.Path) -> float:
    """Seconds of a core. Raises SystemExit where it fails."""
    before = children()
    done = subprocess.run(command, env=user(home), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return children() - before


def serve(home: pathlib.Path, picture: bytes) -> tuple[float, float]:
    """Seconds of a core until the server answers, and until a caption has come and it has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before, url = children(), f"http://127.0.0.1:{port}"
    command = ["coca-jax", "serve", "--checkpoint=runs/demo", f"--port={port}"]
    server = subprocess.Popen(
        command, env=user(home), cwd=home / "coca", stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not answers(url):
        if server.poll() is not None:
            raise SystemExit(f"serve ended with status {server.returncode}")
        time.sleep(0.2)
    ready = seen(server.pid)["core_seconds"]
    status, _, text = ask(url, form(picture))
    server.send_signal(signal.SIGTERM)
    server.wait()
    if status != "200":
        raise SystemExit(f"no caption: {status}: {text}")
    return ready, children() - before


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def main() -> None:
    """Command-line entry."""
    home, photos = (pathlib.Path(word).absolute() for word in sys.argv[1:3])
    home.mkdir(parents=True)
    clone = home / "coca"
    python = [sys.executable, "-m", "venv", ".venv"]
    index = ["coca-jax", "search", "index", str(photos), "--checkpoint=runs/demo"]
    query = ["coca-jax", "search", "query", "a red star", "--index=photos.index"]
    took = dict(
        clone=run(["git", "clone", "-q", str(ROOT), str(clone)], home, home)
        + run(python, home, clone),
        install=run(["pip", "install", "-q", "-e", ".[serve,search]"], home, clone),
        train=run(["coca-jax", "train", "--config=demo", "--workdir=runs/demo"], home, clone),
    )
    picture = next(photos.glob("*.jpg")).read_bytes()
    first, took["serve"] = serve(home, picture)
    later, _ = serve(home, picture)
    took["index"] = run([*index, "--out=photos.index"], home, clone)
    took["query"] = run(query, home, clone)
    found = {name: seconds / 60 for name, seconds in took.items()}
    found["to_caption"] = sum(found[name] for name in TO_CAPTION)
    found["to_search"] = sum(found[name] for name in TO_SEARCH)
    print(json.dumps(found | dict(serve_first=first, serve_later=later)))


if __name__ == "__main__":
    main()
