"""Load test of running servers: requests per second and latency by number of clients.

    coca-jax serve --checkpoint=runs/demo --port=8100
    coca-jax serve --checkpoint=runs/demo --port=8101 --batch_size=1
    python benchmarks/serve.py picture.png http://127.0.0.1:8100 http://127.0.0.1:8101

Each client sends the picture to /api/caption and waits for the answer before it asks again. Servers
take turns, so that all see the same machine. Prints a line of JSON for each server and number of
clients; `lost` counts answers that are not the first one's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import pathlib
import time
from urllib.parse import urlsplit

import numpy as np

BOUNDARY = "coca-jax-benchmark"


def client(url: str, body: bytes, until: float) -> list[tuple[float, str]]:
    """Asks over one connection until then: (milliseconds, caption or what went wrong) of each."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    found = []
    while not found or time.monotonic() < until:
        start = time.perf_counter()
        connection.request("POST", "/api/caption", body, headers)
        response = connection.getresponse()
        data = response.read()
        took = 1000 * (time.perf_counter() - start)
        good = response.status == 200
        text = json.loads(data)["results"][0]["captions"][0]["text"] if good else str(data)
        found.append((took, text))
    return found


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture")
    parser.add_argument("url", nargs="+")
    parser.add_argument("--clients", default="1,16")
    parser.add_argument("--seconds", type=float, default=10, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    picture = pathlib.Path(args.picture).read_bytes()
    body = head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()
    counts = list(map(int, args.clients.split(",")))
    turns: dict[tuple[str, int], list[tuple[float, list[tuple[float, str]]]]] = {}
    for turn in range(args.turns + 1):  # the first one compiles
        for count in counts:
            for url in args.url:
                start = time.monotonic()
                until = start + (args.seconds if turn else 3)
                with concurrent.futures.ThreadPoolExecutor(count) as pool:
                    runs = pool.map(client, [url] * count, [body] * count, [until] * count)
                    found = [one for run in runs for one in run]
                if turn:
                    turns.setdefault((url, count), []).append((time.monotonic() - start, found))
    for (url, count), several in turns.items():
        took, texts = zip(*(one for _, found in several for one in found))
        rates = [len(found) / seconds for seconds, found in several]
        result = dict(
            url=url,
            clients=count,
            requests=len(took),
            lost=sum(text != texts[0] for text in texts),
            requests_per_second=round(float(np.median(rates)), 1),
            p50_ms=round(float(np.percentile(took, 50)), 1),
            p95_ms=round(float(np.percentile(took, 95)), 1),
        )
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
