"""A model behind HTTP: a real server in a thread, a tiny model, what it answers and refuses."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import socket
import struct
import threading
import time
import types
import uuid
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from test_inference import no_compile_cache, tiny_model, words  # noqa: F401

from coca_jax.apps.search import index, parts

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

import uvicorn  # noqa: E402

from coca_jax.apps.serve import app, batcher, server  # noqa: E402

KEY = "a key of many letters"


def png(seed: int, side: int = 20) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def model(words):  # noqa: F811
    return tiny_model(words, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures and their index's folder."""
    root = tmp_path_factory.mktemp("served")
    (root / "pictures/below").mkdir(parents=True)
    for number in range(6):
        name = f"below/{number}.png" if number > 3 else f"{number}.png"
        (root / "pictures" / name).write_bytes(png(number))
    return root


@pytest.fixture(scope="module")
def searched(model, folder):
    how = dict(checkpoint="here", batch_size=4, say=lambda text: None)
    new = parts.Parts(str(folder / "index"))
    index.add(model, index.groups([str(folder / "pictures")], new), new, **how)
    return index.Index(str(folder / "index"))


class Client:
    """A server, and what asks it."""

    def __init__(self, model, key="", public_name="", grace=10, **how):
        how = dict(name="tiny", limits=app.Limits(1, 40_000, 4, 2)) | how
        self.state = app.Server(model, **how)
        guard = app.build(self.state, key=key, public_name=public_name)
        self.socket = server.listen("127.0.0.1", 0)
        self.server = uvicorn.Server(server.config(guard, grace))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        self.port = self.socket.getsockname()[1]
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.state.batcher.close(60)

    def metric(self, text):
        """The number behind a line of the metrics, 0 where it is not there."""
        found = re.search(rf"^{re.escape(text)} ([\d.]+)$", self.get("/metrics")[2].decode(), re.M)
        return float(found[1]) if found else 0.0

    def send(self, method, path, body=b"", headers=None):
        """(status, headers, bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def get(self, path, headers=None):
        return self.send("GET", path, headers=headers)

    def post(self, path, *fields, headers=None):
        """(status, the answer's JSON); fields: (name, text or bytes of a file)."""
        mark = uuid.uuid4().hex
        body = b""
        for name, value in fields:
            file = '; filename="x.png"' if isinstance(value, bytes) else ""
            body += (
                f'--{mark}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
            )
            body += (value if file else str(value).encode()) + b"\r\n"
        body += f"--{mark}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        status, _, data = self.send("POST", path, body, kind | (headers or {}))
        return status, data.decode() if b"event:" in data[:10] else json.loads(data)

    def refused(self, status, path, *fields, headers=None):
        """What a refusal with this status says."""
        found, answer = self.post(path, *fields, headers=headers)
        assert found == status and list(answer) == ["detail"], answer
        assert "Traceback" not in str(answer)
        return str(answer["detail"])


@pytest.fixture(scope="module")
def client(model, searched):
    found = Client(model, index=searched)
    yield found
    found.close()


def test_captions_are_the_model_s(client, model):
    pictures = [png(number) for number in range(3)]
    fields = [("image", data) for data in pictures] + [("max_new_tokens", 5), ("explain", "true")]
    status, answer = client.post("/api/caption", *fields)
    assert status == 200, answer
    wanted = model.captions(pictures, max_new_tokens=5)
    for result, (caption,) in zip(answer["results"], wanted):
        (found,) = result["captions"]
        assert found["text"] == caption.text
        assert found["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)
        mean = np.exp(caption.log_prob / caption.num_tokens)
        assert found["confidence"] == pytest.approx(mean, rel=0.01)
        total = np.prod([word["probability"] for word in found["words"]])
        assert total == pytest.approx(np.exp(caption.log_prob), rel=0.05)
        assert np.sum(found["words"][0]["attention"]) == pytest.approx(1, abs=1e-3)
        assert np.shape(result["attention"]) == (2, 2)
    how = [("num_return_sequences", 2), ("do_sample", "true"), ("seed", 7), ("max_new_tokens", 5)]
    alone = client.post("/api/caption", ("image", pictures[1]), *how)[1]["results"][0]
    both = client.post("/api/caption", ("image", pictures[0]), ("image", pictures[1]), *how)
    assert both[1]["results"][1] == alone  # whatever runs beside it
    assert len(alone["captions"]) == 2


def test_a_stream_grows_to_the_caption(client, model):
    fields = [("image", png(1)), ("stream", "true"), ("explain", "1"), ("max_new_tokens", 6)]
    status, text = client.post("/api/caption", *fields, ("prompt", "a"))
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    kinds, data = [kind for kind, _ in found], [json.loads(text) for _, text in found]
    assert status == 200 and kinds[-1] == "result" and set(kinds[:-1]) == {"tokens"}
    (wanted,) = model.captions([png(1)], prompt="a", max_new_tokens=6)
    (caption,) = data[-1]["captions"]
    assert caption["text"] == wanted[0].text and len(kinds) == wanted[0].num_tokens + 1
    grown = [one["tokens"][0]["text"] for one in data[:-1]]
    assert all(new.startswith(old) for old, new in zip(grown, grown[1:])) and grown[-1]
    total = np.prod([one["tokens"][0]["probability"] for one in data[:-1]])
    assert total == pytest.approx(np.exp(wanted[0].log_prob), rel=0.05)


def test_labels_answers_and_embeddings(client, model):
    picture = png(2)
    status, answer = client.post(
        "/api/zero_shot", ("image", picture), ("label", "red\nblue\n\nred"), ("label", "green")
    )
    found = {one["label"]: one["probability"] for one in answer["results"][0]["labels"]}
    (wanted,) = model.zero_shot([picture], ["red", "blue", "green"])
    assert list(found) == [["red", "blue", "green"][i] for i in np.argsort(-wanted)]
    np.testing.assert_allclose([found[k] for k in ("red", "blue", "green")], wanted, atol=1e-4)
    labels = [("image", picture), ("label", "red\nblue\ngreen")]
    assert client.post("/api/zero_shot", *labels, ("template", ""))[1] == answer  # the page's form
    own = client.post("/api/zero_shot", *labels, ("template", "a {} star"))[1]["results"][0][
        "labels"
    ]
    (other,) = model.zero_shot([picture], ["red", "blue", "green"], "a {} star")
    np.testing.assert_allclose([one["probability"] for one in own], -np.sort(-other), atol=1e-4)
    assert np.abs(other - wanted).max() > 1e-3
    for template in ("red", "clip", "{} {}"):  # not the name of a set of 80 sentences either
        assert "template" in client.refused(422, "/api/zero_shot", *labels, ("template", template))
    many = "\n".join(f"{i} things that are red" for i in range(300))  # as the page's box gives them
    says = "label: number 2 of 2 is empty."
    assert client.refused(400, "/api/zero_shot", *labels, ("label", " \n")) == says
    assert "'text', 0" in client.refused(422, "/api/embed", ("image", picture), ("text", ""))
    status, answer = client.post("/api/zero_shot", ("image", picture), ("label", many))
    assert status == 200 and len(many) > 6000
    assert "more than 2000 characters" in client.refused(
        400, "/api/zero_shot", ("image", picture), ("label", "red\n" + "x" * 2001)
    )
    status, answer = client.post("/api/answer", ("image", picture), ("question", "a red"))
    assert answer["results"] == [dict(answer=model.answer([picture], ["a red"])[0], cut=False)]
    status, answer = client.post("/api/embed", ("image", picture), ("text", "red"), ("text", "a"))
    np.testing.assert_allclose(answer["images"], model.encode_image([picture]), atol=1e-5)
    np.testing.assert_allclose(answer["texts"], model.encode_text(["red", "a"]), atol=1e-5)
    status, answer = client.post("/api/explain", ("image", picture), ("text", "a red circle"))
    said = [word["text"] for word in answer["results"][0]["captions"][0]["words"]]
    assert said == ["a", "red", "circle", ""]
    assert answer["results"][0]["captions"][0]["finished"] is True
    room = model.max_len - 2  # beside the begin and the end symbol
    for count in (room, room + 1):
        text = " ".join(["a"] * count)
        assert len(model.vocabulary.encode(text)) == count
        status, answer = client.post("/api/explain", ("image", picture), ("text", text))
        assert answer["results"][0]["captions"][0]["finished"] == (count == room)
    assert "no task head" in client.refused(404, "/api/head", ("image", picture))
    for path, name in (("/api/explain", "text"), ("/api/answer", "question")):
        assert f"'{name}'" in client.refused(422, path, ("image", picture), (name, " \n"))


def test_search_by_words_pictures_and_both(client, model, searched, folder):
    picture = png(5)
    status, answer = client.post("/api/search", ("image", picture), ("k", 3))
    first = answer["results"][0]
    assert (first["image"], first["rank"]) == ("below/5.png", 1)  # no path of this machine
    assert first["score"] == pytest.approx(1, abs=2e-3) and len(answer["results"]) == 3
    alike = client.post("/api/search", ("like", first["row"]), ("k", 3))[1]["results"]
    for found, wanted in zip(alike, answer["results"], strict=True):  # kept in 16 bits
        assert found == wanted | {"score": pytest.approx(wanted["score"], abs=2e-3)}
    both = [("text_weight", 0.25), ("image_weight", 0.75), ("k", 6)]
    status, answer = client.post("/api/search", ("text", "red"), ("image", picture), *both)
    wanted = searched.search(searched.query(model, ["red"], [picture], [1, 3]), 6)
    assert [one["row"] for one in answer["results"]] == [one["row"] for one in wanted]
    status, headers, data = client.get(first["picture"])
    assert status == 200 and headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(data)).size == (20, 20)
    assert [client.get(f"/api/pictures/{n}")[0] for n in (6, "9" * 4000, "x")] == [404, 422, 422]
    assert Image.open(io.BytesIO(client.get(f"{first['picture']}?large=true")[2])).size == (20, 20)
    assert "Nothing to look for" in client.refused(400, "/api/search", ("text", " "))
    assert "nothing" in client.refused(400, "/api/search", ("text", "a"), ("text_weight", 0))
    away = client.post("/api/search", ("image", picture), ("image_weight", -1))[1]["results"]
    assert away[-1]["image"] == "below/5.png" and away[-1]["score"] < -0.99


def test_a_picture_that_changed_is_not_shown_as_the_one_that_was_found(client, searched, folder):
    path = folder / "pictures/1.png"
    (row,) = [i for i, name in enumerate(searched.names) if name == str(path)]
    assert client.get(f"/api/pictures/{row}")[0] == 200
    data, then = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(png(99, 30))
    status, _, told = client.get(f"/api/pictures/{row}")
    assert status == 404 and b"moved or changed" in told
    path.write_bytes(data)
    os.utime(path, ns=(then, then))
    assert client.get(f"/api/pictures/{row}")[0] == 200


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


def test_requests_that_cannot_be_answered_are_refused(client):
    ask, image = "/api/caption", ("image", png(0))
    assert "'image'" in client.refused(422, ask)
    assert "empty file" in client.refused(400, ask, ("image", b""))
    assert "not an image" in client.refused(400, ask, ("image", b"<svg onload=alert(1)>" * 9))
    assert "not an image" in client.refused(400, ask, ("image", b"%!PS-Adobe-3.0 EPSF-3.0"))
    assert "damaged image" in client.refused(400, ask, ("image", png(0)[:300]))
    assert "too many pixels" in client.refused(400, ask, ("image", bomb(60_000)))
    assert "too many pixels" in client.refused(400, ask, ("image", bomb(201)))
    assert "picture 2 of 2" in client.refused(400, ask, ("image", png(0)), ("image", b"no"))
    assert "number of files is 4" in client.refused(400, ask, *[image] * 5)
    assert "Expected UploadFile" in client.refused(422, ask, ("image", "/etc/passwd"))
    assert "valid string" in client.refused(422, ask, image, ("prompt", b"file"))
    for field, value, status in (
        ("num_beams", 9, 422),
        ("num_beams", "1.5", 422),
        ("temperature", "nan", 422),
        ("seed", 2**32, 422),
        ("num_return_sequences", 2, 400),  # of greedy decoding
        ("stream", "maybe", 422),
        ("path", "/etc/passwd", 422),
        ("prompt", "a " * 3000, 422),
        ("prompt", "a red " * 100, 400),
    ):
        assert field in client.refused(status, ask, image, (field, value)) or field == "prompt"
    for kind, body in (
        ("multipart/form-data", b"--x\r\nbroken"),
        ("multipart/form-data; boundary=x; charset=undefined", b"--x\r\n"),
        ("application/json", b"{}"),
        ("", png(0)),
        ("image/jpeg", png(0)),
        ("application/x-www-form-urlencoded", b'{"num_beams": 2}'),
    ):
        status, _, data = client.send("POST", ask, body, {"Content-Type": kind} if kind else {})
        assert status in (400, 422) and "detail" in json.loads(data), kind
    assert client.post(ask, image, ("max_new_tokens", 5))[0] == 200  # it still serves


def raw(client, data):
    """The first line of the answer to some bytes, b'' where the connection is closed."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sending:
        with contextlib.suppress(OSError):
            for part in data:
                sending.sendall(part)
        try:
            return sending.recv(1000).split(b"\r\n")[0]
        except ConnectionResetError:
            return b""


def head(length):
    return (
        b"POST /api/caption HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )


def test_large_and_slow_bodies_are_refused(client):
    assert b" 413 " in raw(client, [head(b"Content-Length: 2000000")])  # before it is read
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    told = raw(
        client, [head(b"Transfer-Encoding: chunked").replace(b"--x\r\n", b""), *[chunk] * 40]
    )
    assert b" 4" in told or told == b""  # cut off while it sends
    assert b" 408 " in raw(client, [head(b"Content-Length: 999")])  # a body that never comes
    before = client.metric('coca_jax_requests_total{path="/api/caption",status="400"}')
    sending = socket.create_connection(("127.0.0.1", client.port))  # half an upload
    sending.sendall(head(b"Content-Length: 999"))
    sending.close()
    until(
        lambda: (
            client.metric('coca_jax_requests_total{path="/api/caption",status="400"}') == before + 1
        )
    )
    assert client.post("/api/caption", ("image", png(0)), ("max_new_tokens", 5))[0] == 200


@pytest.mark.parametrize("seconds, most", [(0.3, 1000), (0.6, 3)])
def test_silent_connections_are_closed(model, monkeypatch, seconds, most):
    """From the start, with half of the headers, or with half of a second request's. More than
    there may be are 503 until others end."""
    monkeypatch.setattr(server, "HEADER_SECONDS", seconds)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", most)
    client = Client(model)
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    try:
        held = [
            socket.create_connection(("127.0.0.1", client.port), timeout=20)
            for _ in range(2 + 3 * (most == 3))
        ]
        held[0].sendall(b"GET /healthz HTTP")
        if most == 3:
            held[4].sendall(whole)
            assert b" 503 " in held[4].recv(1000)
        else:
            held[1].sendall(whole)
            assert b" 200 " in held[1].recv(4000)
            held[1].sendall(b"GET /heal")
        for one in held:
            with contextlib.suppress(ConnectionResetError):
                while one.recv(1000):
                    pass
            one.close()
        until(lambda: client.get("/healthz")[0] == 200)
    finally:
        client.close()


def test_no_path_leads_to_a_file(client):
    for path in ("/../setup.py", "/..%2f..%2fetc/passwd", "/serve.css/../../x", "//etc/passwd",
                 "/api/pictures/..%2f0", "/api/examples/..%2f..%2fx", "/page/serve.js", "/%00",
                 "/api/report", "/api/model_card", "/api/examples/99"):  # fmt: skip
        status, headers, data = client.get(path)
        assert status in (404, 422) and list(json.loads(data)) == ["detail"], path
    assert client.send("POST", "/", b"")[0] == 405


def test_the_page_and_what_watches_the_server(client):
    status, headers, data = client.get("/")
    assert status == 200 and "text/html" in headers["content-type"]
    assert "default-src 'self'" in headers["content-security-policy"]
    page = data.decode()
    for path in re.findall(r'(?:href|src)="(/[\w.]+)"', page):
        assert client.get(path)[0] == 200, path
    assert "http://" not in page and "https://" not in page  # nothing of others
    info = json.loads(client.get("/api/info")[2])
    assert info["name"] == "tiny" and info["index"] == dict(pictures=6) and not info["head"]
    assert (info["limits"]["labels"], info["limits"]["characters"]) == (1000, 2000)
    assert info["captions"] is True and info["explains"] is True and info["examples"] == 6
    status, headers, data = client.get("/api/examples/5")
    assert headers["content-type"] == "image/png" and Image.open(io.BytesIO(data)).size == (20, 20)
    assert json.loads(client.get("/healthz")[2]) == dict(status="ok")
    assert client.post("/api/caption", ("image", png(0)))[0] == 200
    assert client.get("/none")[0] == 404
    assert client.metric('coca_jax_requests_total{path="/api/caption",status="200"}') >= 1
    assert client.metric('coca_jax_requests_total{path="other",status="404"}') >= 1
    assert client.metric("coca_jax_batch_items_count") >= 1


def test_a_run_s_report_card_and_held_out_pictures(model, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export/README.md").write_text("# A card")
    (tmp_path / "report.html").write_text("<script>1</script>")
    pictures = [base64.b64encode(png(i)).decode() for i in range(2)]
    items = [dict(image=one) for one in pictures * 2]
    (tmp_path / "eval_examples.json").write_text(json.dumps({"captioning/x": dict(items=items)}))
    client = Client(model, folder=str(tmp_path))
    try:
        info = json.loads(client.get("/api/info")[2])
        assert info["pages"] == ["model_card", "report"] and info["examples"] == 2
        found = np.asarray(Image.open(io.BytesIO(client.get("/api/examples/1")[2])))
        np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(png(1)))))
        assert client.get("/api/model_card")[2] == b"# A card"
        status, headers, _ = client.get("/api/report")
        assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    finally:
        client.close()


def test_openapi_describes_the_forms_and_results(client):
    found = json.loads(client.get("/openapi.json")[2])
    fields = found["components"]["schemas"]["CaptionForm"]["properties"]
    beams = fields["num_beams"]
    assert (beams["minimum"], beams["maximum"], beams["default"]) == (1, 8, 1)
    assert beams["description"] == "Beams of beam search; 1: none."
    assert set(found["components"]["schemas"]["Caption"]["required"]) >= {"text", "confidence"}
    for path, methods in found["paths"].items():
        for method in methods:
            name = path.replace("{row}", "0").replace("{number}", "0")
            assert client.send(method.upper(), name, b"")[0] in (200, 400, 404, 422), path


def test_who_may_ask(model):
    client = Client(model, key=KEY)
    try:
        right = {"Authorization": f"Bearer {KEY}"}
        assert {client.get(path)[0] for path in ("/", "/serve.js", "/healthz")} == {200}
        for path in ("/api/info", "/metrics", "/api/examples/0"):
            status, headers, data = client.get(path)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert client.get(path, {"Authorization": f"Bearer {KEY}x"})[0] == 401
            assert client.get(path, right)[0] == 200
        assert "key" in client.refused(401, "/api/embed", ("text", "red"))
        assert client.post("/api/embed", ("text", "red"), headers=right)[0] == 200
        cookie = client.get("/api/info", right)[1][
            "set-cookie"
        ]  # for the page's pictures and links
        assert "HttpOnly; SameSite=Strict" in cookie and KEY not in cookie
        with_cookie = {"Cookie": cookie.split(";")[0]}
        assert client.get("/api/examples/0", with_cookie)[0] == 200
        assert client.get("/api/info", {"Host": "evil.example"} | right)[0] == 400  # rebinding
        assert client.get("/", {"Host": f"127.0.0.1:{client.port}"})[0] == 200
        other = {"Origin": "https://evil.example"} | with_cookie
        assert "other sites" in client.refused(403, "/api/embed", ("text", "red"), headers=other)
        own = {"Origin": f"http://127.0.0.1:{client.port}"} | right
        assert client.post("/api/embed", ("text", "red"), headers=own)[0] == 200
    finally:
        client.close()


def test_a_proxy_that_is_named_may_stand_before_it(model):
    """With its own Host, as nginx sets it, or with the one that it was asked by."""
    client = Client(model, key=KEY, public_name="Coca.example.org")
    inner, page = f"127.0.0.1:{client.port}", "https://coca.example.org"
    try:
        for host, origin, wanted in (
            (inner, page, 200),
            ("coca.example.org", page, 200),
            ("coca.example.org:8443", f"{page}:8443", 200),
            (inner, f"http://{inner}", 200),
            (inner, "https://coca.example.org.evil.example", 403),
            (inner, "null", 403),
            ("evil.example", page, 400),
        ):
            given = {"Host": host, "Origin": origin, "Authorization": f"Bearer {KEY}"}
            status = client.send("POST", "/api/embed", b"", given)[0]
            assert status == (400 if wanted == 200 else wanted), given  # 400: nothing to embed
    finally:
        client.close()


def test_requests_run_together_and_none_is_lost(client, model):
    names = [f"coca_jax_batch_items_{name}" for name in ("count", "sum")]
    before = [client.metric(name) for name in names]
    pictures = [png(number) for number in range(4)]
    wanted = [row[0].text for row in model.captions(pictures, max_new_tokens=5)]

    def ask(number: int):
        fields = ("image", pictures[number % 4]), ("max_new_tokens", 5)
        return client.post("/api/caption", *fields)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(60)))
    texts = [answer["results"][0]["captions"][0]["text"] for _, answer in answers]
    assert texts == [wanted[number % 4] for number in range(60)]
    count, items = (client.metric(name) - old for name, old in zip(names, before))
    assert items == 60 and count < 50


def test_a_defect_is_not_shown(client, monkeypatch):
    def fails(self, model, pixels, texts):
        raise RuntimeError("a secret")

    monkeypatch.setattr(batcher.Answer, "run", fails)
    status, answer = client.post("/api/answer", ("image", png(0)), ("question", "red"))
    assert status == 500 and "secret" not in str(answer)


def until(there) -> None:
    """Waits for it, a minute at most."""
    for _ in range(3000):
        if there():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")


class Held:
    """A model that waits in some of its methods until `go` is set."""

    def __init__(self, model, *methods):
        self.model, self.methods, self.go = model, methods, threading.Event()
        self.calls, self.now, self.most, self.lock = [], 0, 0, threading.Lock()

    def __getattr__(self, name):
        found = getattr(self.model, name)
        if name not in self.methods:
            return found

        def held(given, *rest):
            with self.lock:
                self.calls.append(given)
                self.now += 1
                self.most = max(self.most, self.now)
            self.go.wait(60)
            with self.lock:
                self.now -= 1
            return found(given, *rest)

        return held


def test_few_pictures_are_decoded_at_a_time_and_few_wait(model, monkeypatch):
    """A small file may be gigabytes of pixels: of 12 requests one is decoded, three wait."""
    monkeypatch.setattr(app, "MAX_DECODING", 1)
    held = Held(model, "fit_image")
    client, statuses = Client(held, depth=4, limits=app.Limits(1, 40_000, 5, 60)), []

    def ask(number: int):
        statuses.append(client.post("/api/embed", ("image", png(number)))[0])

    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, number) for number in range(12)]
            until(lambda: len(statuses) == 8)
            assert statuses == [503] * 8 and client.metric("coca_jax_open_items") == 4
            five = [("image", png(number)) for number in range(5)]
            assert "at most 4 (--queue)" in client.refused(400, "/api/embed", *five)
            held.go.set()
            concurrent.futures.wait(asked)
    finally:
        held.go.set()
        client.close()
    assert held.most == 1 and sorted(statuses) == [200] * 4 + [503] * 8


def test_what_a_client_asked_that_hung_up_is_not_computed(model):
    """Of three that wait behind a batch the one that is still there is answered, alone."""
    held = Held(model, "encode_text")
    client = Client(held)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.post, "/api/embed", ("text", "a"))
            until(lambda: held.calls)
            request = f"POST /api/embed HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n"
            request += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 6\r\n"
            gone = []
            for _ in range(2):
                gone.append(socket.create_connection(("127.0.0.1", client.port)))
                gone[-1].sendall(request.encode() + b"\r\ntext=b")
            until(lambda: client.metric("coca_jax_open_items") == 3)
            for one in gone:
                one.close()
            until(lambda: client.metric("coca_jax_open_items") == 1)
            last = pool.submit(client.post, "/api/embed", ("text", "c"))
            until(lambda: client.metric("coca_jax_open_items") == 2)
            held.go.set()
            assert [one.result()[0] for one in (first, last)] == [200, 200]
        assert held.calls == [["a"], ["c"]]
    finally:
        held.go.set()
        client.close()


def test_a_batch_is_bounded_and_one_bad_item_spoils_none():
    """Jobs of four callers share a batch of at most four; an abandoned one is left out."""

    class Slow:
        go, batches = threading.Event(), []

        def run(self, model, pixels, texts):
            self.go.wait(10)
            self.batches.append(texts)
            if "bad" in texts:
                raise ValueError("bad: no such thing")
            yield [text.upper() for text in texts]

    async def ask():
        queue, work = batcher.Batcher(None, batch_size=4, wait=0.05), Slow()
        running = asyncio.create_task(queue.run())
        jobs = [queue.submit(work, None, text) for text in ("a", "b", "bad", "c")]
        found = [asyncio.create_task(job.last()) for job in jobs]
        await asyncio.sleep(0.5)  # taken, and held
        found += [asyncio.create_task(queue.submit(work, None, text).last()) for text in "defgh"]
        await asyncio.sleep(0.1)
        found[-1].cancel()
        await asyncio.sleep(0.1)
        work.go.set()
        found = await asyncio.gather(*found, return_exceptions=True)
        running.cancel()
        return found, work.batches, queue.close(10)

    found, batches, ended = asyncio.run(ask())
    assert found[:2] == ["A", "B"] and found[3:8] == ["C", "D", "E", "F", "G"] and ended
    assert isinstance(found[2], ValueError) and isinstance(found[8], asyncio.CancelledError)
    assert batches == [["a", "b", "bad", "c"], ["a"], ["b"], ["bad"], ["c"], list("defg")]


def test_answers_say_whether_a_text_was_cut(client, model, searched, monkeypatch):
    """Texts that begin alike have the same embedding where the model reads no further."""
    image, room = ("image", png(0)), model.max_len - 2  # besides the begin and the end symbol
    short, fits, long = (" ".join(["a"] * count) for count in (1, room, room + 1))
    found = client.post("/api/embed", *[("text", text) for text in (fits, long, short)])[1]
    assert found["cut"] == [False, True, False] and found["texts"][0] == found["texts"][1]
    for text, cut in ((fits, False), (long, True)):
        found = client.post("/api/search", ("text", short), ("text", text), ("k", 1))[1]
        assert found["cut"] is cut
        labels = [image, ("label", short), ("label", text), ("template", "{}")]
        assert client.post("/api/zero_shot", *labels)[1]["results"][0]["cut"] is cut
    monkeypatch.setattr(model, "classify", lambda pixels, texts: np.ones((len(pixels), 1)))
    kind = types.SimpleNamespace(reads_text=True, images=1, name="vqa")
    monkeypatch.setattr(model, "head_kind", kind)
    monkeypatch.setattr(model, "class_names", ["yes"])
    room = model.max_len - max(3, model.max_len // 8) - 1  # besides the begin symbol
    for count, cut in ((1, False), (room, False), (room + 1, True)):
        question = [image, ("question", " ".join(["a"] * count))]
        for path in ("/api/answer", "/api/head"):
            assert client.post(path, *question)[1]["results"][0]["cut"] is cut, path
    kind.reads_text = False
    (found,) = client.post("/api/head", image)[1]["results"]
    assert found == dict(labels=[dict(label="yes", probability=1.0)], cut=False)
