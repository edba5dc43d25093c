"""The command that serves a model: what it refuses, and how a signal ends it."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import kept_models
import numpy as np
import pytest
from conftest import flags_of
from test_inference import no_compile_cache, tiny_model, tiny_parts, words  # noqa: F401
from test_search import embed, encoded

import coca_jax
from coca_jax import inference
from coca_jax.cli import serve
from coca_jax.config import typed

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from test_serve import Client  # noqa: E402

from coca_jax.apps.serve import app  # noqa: E402


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
        (("--checkpoint=x", "--public_name=coca.example.org"), "org is more than this machine"),
        (("--checkpoint=x", "--public_name=https://coca.example.org"), "give the name alone"),
        (("--checkpoint=none", "--port=0"), "none does not exist"),
    ],
)
def test_what_the_command_refuses(commands, arguments, says, tmp_path):
    done = commands.run(["serve", *arguments], tmp_path, timeout=120)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_its_flags_are_the_limits_of_what_it_serves(monkeypatch, tmp_path, capsys):
    """All but model and socket: what is built, how long it waits at the end, its summary."""
    from coca_jax.apps.serve import server

    (tmp_path / "key").write_text("a-key-of-20-letters.\n")
    flags_of("serve", monkeypatch)
    serve.flags.FLAGS(
        [
            *("serve", "--checkpoint=runs/demo/", f"--key_file={tmp_path / 'key'}", "--port=0"),
            *("--wait_ms=20", "--queue=7", "--max_megabytes=3", "--max_pixels=1000"),
            *("--max_images=2", "--grace=4", "--batch_size=3"),
            "--public_name=coca.example.org",
        ]
    )
    small = types.SimpleNamespace()
    monkeypatch.setattr(serve, "_load", lambda: (small, None))
    built, served, stopped = {}, {}, []

    def state(model, **given):
        built.update(given, model=model)
        return types.SimpleNamespace(batcher=types.SimpleNamespace(close=close))

    def build(state, **given):
        built.update(given)
        return types.SimpleNamespace(answered=5)

    def close(seconds):
        stopped.append(seconds)
        return len(stopped) == 1

    def run(guard, listening, *, grace, ready):
        served.update(grace=grace)
        ready()
        listening.close()
        return 2.5

    monkeypatch.setattr(app, "Server", state)
    monkeypatch.setattr(app, "build", build)
    monkeypatch.setattr(server, "serve", run)
    done = serve.main(["serve"])
    assert done["requests"] == 5 and stopped == [2.5]
    assert served == dict(grace=4)
    assert "serving at http://127.0.0.1:" in capsys.readouterr().err
    assert built.pop("limits") == app.Limits(3, 1000, 2) and built.pop("model") is small
    assert built == dict(
        name="demo",
        index=None,
        key="a-key-of-20-letters.",
        loopback=True,
        public_name="coca.example.org",
        batch_size=3,
        wait=0.02,
        depth=7,
        folder="",
    )
    monkeypatch.setattr(serve.os, "_exit", lambda status: stopped.append(f"left with {status}"))
    serve.main(["serve"])  # now the model is still at work when the time is over
    assert stopped == [2.5, 2.5, "left with 0"]
    assert json.loads(capsys.readouterr().out)["requests"] == 5
    (tmp_path / "key").write_text("short")
    with pytest.raises(ValueError, match="the key has 5 letters; give 16 or more of ASCII"):
        serve.main(["serve"])
    (tmp_path / "key").write_text(" \n")
    monkeypatch.setenv("COCA_JAX_SERVE_KEY", "another-key-of-24-letters")
    with pytest.raises(ValueError, match="--key_file=.*key is empty; put a key there"):
        serve.main(["serve"])
    serve.flags.FLAGS.key_file, serve.flags.FLAGS.public_name = "", ""
    for blank in ("", " "):  # as of a file that was not there to be read
        monkeypatch.setenv("COCA_JAX_SERVE_KEY", blank)
        with pytest.raises(ValueError, match="COCA_JAX_SERVE_KEY is empty; put a key there"):
            serve.main(["serve"])
    serve.flags.FLAGS.key_file = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"--key_file=.*none cannot be read: .*No such file"):
        serve.main(["serve"])
    with pytest.raises(ValueError, match="x: serve takes flags alone"):
        serve.main(["serve", "x"])


def test_what_a_page_asks_for_is_compiled_before_it_serves(words, monkeypatch, tmp_path):  # noqa: F811
    """Captions and what explains them; then a visitor waits for no compiler. By an index alone the
    model is that of its pictures."""
    monkeypatch.setattr(kept_models, "KEPT", {})  # programs that no other test has called
    model = tiny_model(words, devices=jax.devices()[:1])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(number))
    embed(model, folder, tmp_path / "index", checkpoint="runs/mine")
    asked, compiled = [], []
    monkeypatch.setattr(coca_jax, "load", lambda place, **how: asked.append((place, how)) or model)
    flags_of("serve", monkeypatch)
    serve.flags.FLAGS(["serve", f"--index={tmp_path / 'index'}", "--batch_size=8"])
    found, index = serve._load()
    assert found is model and len(index.names) == 3
    assert asked == [("runs/mine", dict(dtype=None, num_frames=None))] and found.batch_size == 8

    def listen(event, *_, **__):
        compiled.append(event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        picture = np.full((1, 16, 16, 3), 200, np.uint8)
        *_, last = model.stream_captions(picture)
        model.explain(picture, last[0])
        assert not any(compiled)
        jax.jit(lambda x: x * 3 - 1)(picture)
        assert any(compiled)  # they would be seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    params = jax.tree.map(lambda x: x + 1, model.params)
    other = type(model)(model.config, params, model.vocabulary, devices=jax.devices()[:1])
    monkeypatch.setattr(coca_jax, "load", lambda *_, **__: other)
    with pytest.raises(ValueError, match="runs/mine with other weights or preproc.*; give that"):
        serve._load()


@pytest.mark.parametrize("frames, size", [(0, 16), (8, 128)])
def test_requests_run_together_of_clips_too(monkeypatch, frames, size):
    """A model takes frames at a time, and says itself of how many its clips are."""
    asked = []
    loaded = types.SimpleNamespace(
        image_size=16,
        num_frames=frames,
        writes_captions=False,
        set_batch_size=asked.append,
        zero_shot=lambda *given: None,
    )
    monkeypatch.setattr(coca_jax, "load", lambda place, **how: loaded)
    flags_of("serve", monkeypatch)
    serve.flags.FLAGS(["serve", "--checkpoint=runs/clips", "--batch_size=16"])
    assert serve._load() == (loaded, None) and asked == [size]


def test_a_model_of_pictures_of_any_shape_is_served_without_what_explains(words, monkeypatch):  # noqa: F811
    config, params = tiny_parts()
    config = typed(config).change({"data.resize": "native", "data.max_patches": 6})
    native = inference.CoCaModel(config, params, words, devices=jax.devices()[:1])
    monkeypatch.setattr(coca_jax, "load", lambda *_, **__: native)
    flags_of("serve", monkeypatch)
    serve.flags.FLAGS(["serve", "--checkpoint=runs/native"])
    assert serve._load() == (native, None)
    client = Client(native)
    try:
        assert json.loads(client.get("/api/info")[2])["explains"] is False
        wide = ("image", encoded(3))
        status, answer = client.post("/api/caption", wide)
        assert status == 200
        assert answer["results"][0]["captions"][0]["text"] == native.caption([encoded(3)])[0]
        for path, field in (("/api/caption", ("explain", 1)), ("/api/explain", ("text", "red"))):
            assert "data.resize='native'" in client.refused(404, path, wide, field)
        assert client.post("/api/zero_shot", wide, ("label", "red\nblue"))[0] == 200
    finally:
        client.close()


def test_a_request_that_runs_is_answered_before_the_end(monkeypatch):
    """A signal while one is open: it is answered, the next is not; a second signal ends at once."""
    from coca_jax.apps.serve import server

    held, go_on, ended, answers, early = (threading.Event(), threading.Event(), [], [], [])

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        held.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        await send(dict(type="http.response.start", status=200, headers=[]))
        await send(dict(type="http.response.body", body=b"done"))

    def ask():
        connection = http.client.HTTPConnection(*listening.getsockname()[:2], timeout=60)
        connection.request("GET", "/")
        held.wait(60)
        for _ in range(3):  # passed on by what started it: one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        early.extend(ended)
        monkeypatch.setattr(server, "SAME_KEY", 0)
        for _ in range(6000):
            if ended:
                break
            os.kill(os.getpid(), signal.SIGTERM)  # one of them is the second
            time.sleep(0.01)
        go_on.set()
        answers.append(connection.getresponse().read())

    listening = server.listen("127.0.0.1", 0)
    address = listening.getsockname()
    assert re.fullmatch(r"http://127.0.0.1:\d+", server.url(listening))
    with pytest.raises(ValueError, match="cannot listen there .*Give another --port"):
        server.listen("127.0.0.1", address[1])
    monkeypatch.setattr(server.os, "_exit", ended.append)
    monkeypatch.setattr(server, "SAME_KEY", 60)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    client = threading.Thread(target=ask)
    server.serve(app, listening, grace=60, ready=client.start)
    client.join()
    assert not early and answers == [b"done"] and ended[0] == server.AT_ONCE == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(OSError):
        socket.create_connection(address, timeout=5)


def test_an_upload_that_never_ends_is_told_that_the_server_stops(model, capsys):
    client = Client(model, grace=0, limits=app.Limits(seconds=60))
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    kind = {"Content-Length": "999", "Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/api/caption", headers=kind)
    time.sleep(0.5)
    client.server.should_exit = True
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (503, b'{"detail":"The server is stopping."}')
    client.close()
    assert "Traceback" not in capsys.readouterr().err


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
