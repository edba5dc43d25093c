"""The command that serves a model: what it refuses, and how a signal ends it."""

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from test_inference import no_compile_cache, tiny_model, words  # noqa: F401

if not all(map(importlib.util.find_spec, ("uvicorn", "starlette", "prometheus_client"))):
    pytest.skip("needs the extra 'serve'", allow_module_level=True)


@pytest.fixture(scope="module")
def model(words):  # noqa: F811
    return tiny_model(words, devices=jax.devices()[:1])


def command(*arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "coca_jax", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint=x", "--host=0.0.0.0"), "needs a key"),
        (("--checkpoint=none", "--port=0"), "none does not exist"),
    ],
)
def test_what_the_command_refuses(commands, arguments, says, tmp_path):
    done = commands.run(["serve", *arguments], tmp_path, {"COCA_JAX_SERVE_KEY": ""}, timeout=120)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow  # two starts of the command
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(model, tmp_path, number):
    from coca_jax.inference import export_programs

    export_programs.export(model, str(tmp_path / "export"))
    process = command(f"--checkpoint={tmp_path / 'export'}", "--port=0")
    said = ""
    while "serving at" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    port = int(re.search(r"http://127.0.0.1:(\d+)", said)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/healthz")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["requests"] == 1
    assert "Traceback" not in err and time.monotonic() - start < 30
