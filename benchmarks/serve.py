"""A server under load: many requests, some at a time; how long each took, whether one is lost.

    coca-jax serve --checkpoint=runs/demo --port=8100
    python benchmarks/serve.py http://127.0.0.1:8100 picture.png --requests=500 --at_once=50
    python benchmarks/serve.py --idle=PID --minutes=60

The first asks for captions and prints a line of JSON: the answers by status, milliseconds of the
clock, and with --pid the seconds of a core that the server took. The second asks nothing: it looks
at a process each minute, and prints its memory, open files and threads at the start, at the end and
at most.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np

BOUNDARY = "----coca-jax-benchmark"


def form(picture: bytes) -> bytes:
    """A multipart form of one picture."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()


def ask(url: str, body: bytes) -> tuple[str, float, str]:
    """(status or the name of what went wrong, milliseconds, the answer)."""
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    start = time.perf_counter()
    try:
        request = urllib.request.Request(f"{url}/api/caption", body, kind)
        with urllib.request.urlopen(request, timeout=600) as answer:
            text, status = answer.read().decode(), str(answer.status)
    except urllib.error.HTTPError as error:
        text, status = error.read().decode(), str(error.code)
    except OSError as error:
        text, status = str(error), type(error).__name__
    return status, 1000 * (time.perf_counter() - start), text


def load(args: argparse.Namespace) -> dict[str, Any]:
    """The requests, all alike; the first, alone, is not counted."""
    body = form(pathlib.Path(args.picture).read_bytes())
    first = ask(args.url, body)
    before = seen(args.pid) if args.pid else {}
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda _: ask(args.url, body), range(args.requests)))
        whole = time.perf_counter() - start
    took = [milliseconds for _, milliseconds, _ in found]
    told = dict(
        requests=args.requests,
        at_once=args.at_once,
        statuses=dict(collections.Counter(status for status, _, _ in found)),
        same=sum(text == first[2] for _, _, text in found),
        p50_ms=float(np.percentile(took, 50)),
        p99_ms=float(np.percentile(took, 99)),
        seconds=whole,
        machine_load=os.getloadavg()[0],
    )
    if args.pid:
        told["core_seconds"] = seen(args.pid)["core_seconds"] - before["core_seconds"]
    return told


def seen(pid: int) -> dict[str, float]:
    """Of a process: resident MiB, open files, threads, seconds of a core so far."""
    place = pathlib.Path(f"/proc/{pid}")
    lines = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    ticks = (place / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return dict(
        mib=int(lines["VmRSS"].split()[0]) / 1024,
        files=len(list((place / "fd").iterdir())),
        threads=int(lines["Threads"]),
        core_seconds=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    )


def idle(args: argparse.Namespace) -> dict[str, Any]:
    """Looks each minute."""
    looks = [seen(args.idle)]
    for _ in range(args.minutes):
        time.sleep(60)
        looks.append(seen(args.idle))
    most = {name: max(look[name] for look in looks) for name in looks[0]}
    return dict(minutes=args.minutes, first=looks[0], last=looks[-1], most=most)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", help="of the server")
    parser.add_argument("picture", nargs="?", help="that is sent")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at_once", type=int, default=50)
    parser.add_argument("--pid", type=int, default=0, help="of the server")
    parser.add_argument("--idle", type=int, default=0, help="a process to look at instead")
    parser.add_argument("--minutes", type=int, default=60)
    args = parser.parse_args()
    if not args.idle and not args.picture:
        parser.error("give the server's URL and a picture, or --idle=PID")
    print(json.dumps(idle(args) if args.idle else load(args)))


if __name__ == "__main__":
    main()
