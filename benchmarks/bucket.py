"""Objects and requests of a checkpoint in an S3 bucket, counted at a server on this machine.

    python benchmarks/bucket.py

Trains two steps of the demo with its workdir in the bucket, one save, and loads the run back.
Prints a line of JSON: objects of the checkpoint and their megabytes; requests for keys below
`checkpoints/` of training and of loading. Needs the extras 'test' and 's3'.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

RUN = "s3://bucket/run"
LOAD = "import sys, coca_jax, jax; jax.block_until_ready(coca_jax.load(sys.argv[1]).params)"


class Counting:
    """A server that counts what is asked for below checkpoints/, by method."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.seen: collections.Counter[str] = collections.Counter()

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        asked = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        if "checkpoints" in asked:
            self.seen[environ["REQUEST_METHOD"]] += 1
        return self.app(environ, start)

    def take(self) -> int:
        """How many since the last call."""
        found = self.seen.total()
        self.seen.clear()
        return found


class Silent(WSGIRequestHandler):
    """Says nothing of a request."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """A line a request would be much of the output."""


def run(words: list[str], env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])


def measure() -> dict[str, float]:
    """The values."""
    counting = Counting()
    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.port}"
    keys = dict(aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket="bucket")
    env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"AWS_ENDPOINT_URL": url}
    env |= {
        name.upper().replace("REGION_NAME", "AWS_DEFAULT_REGION"): v for name, v in keys.items()
    }
    flags = ["--config.steps=2", "--config.optimizer.warmup_steps=0", "--config.eval.tasks=()"]
    run(["-m", "coca_jax", "train", "--config=demo", f"--workdir={RUN}", *flags], env)
    found: dict[str, float] = dict(save=counting.take())
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", Prefix="run/checkpoints"
    )
    sizes = [one["Size"] for page in pages for one in page.get("Contents", ())]
    counting.take()
    run(["-c", LOAD, RUN], env)
    found["read"] = counting.take()
    server.shutdown()
    return found | dict(objects=len(sizes), saved_mb=sum(sizes) / 1e6)


if __name__ == "__main__":
    print(json.dumps(measure()))
