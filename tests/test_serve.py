"""A model behind HTTP: a real server in a thread, a tiny model, what it answers and refuses."""

import concurrent.futures
import http.client
import importlib.util
import io
import json
import os
import re
import socket
import struct
import threading
import uuid
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from test_inference import no_compile_cache, tiny_model, words  # noqa: F401

from coca_jax.apps.search import index, parts

if not all(map(importlib.util.find_spec, ("uvicorn", "starlette", "prometheus_client"))):
    pytest.skip("needs the extra 'serve'", allow_module_level=True)

import uvicorn  # noqa: E402

from coca_jax.apps.serve import app, batcher, schemas, server  # noqa: E402

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

    def __init__(self, model, **how):
        how = dict(name="tiny", limits=schemas.Limits(1, 40_000, 4, 2)) | how
        self.app, self.batcher, self.numbers = app.build(model, **how)
        self.socket = server.listen("127.0.0.1", 0)
        config = uvicorn.Config(self.app, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        self.port = self.socket.getsockname()[1]

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.batcher.stop()

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
        """The one sentence of a refusal with this status."""
        found, answer = self.post(path, *fields, headers=headers)
        assert found == status and list(answer) == ["error"], answer
        assert "\n" not in answer["error"] and "Traceback" not in answer["error"]
        return answer["error"]


@pytest.fixture(scope="module")
def client(model, searched):
    found = Client(model, index=searched)
    yield found
    found.close()


def test_captions_are_the_model_s(client, model):
    pictures = [png(number) for number in range(3)]
    fields = [("image", data) for data in pictures] + [("max_tokens", 5), ("explain", "true")]
    status, answer = client.post("/api/caption", *fields)
    assert status == 200, answer
    wanted = model.captions(pictures, max_tokens=5)
    for result, (caption,) in zip(answer["results"], wanted):
        (found,) = result["captions"]
        assert found["text"] == caption.text
        assert found["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)
        total = np.prod([word["probability"] for word in found["words"]])
        assert total == pytest.approx(np.exp(caption.log_prob), rel=0.05)
        assert np.sum(found["words"][0]["attention"]) == pytest.approx(1, abs=1e-3)
        assert np.shape(result["attention"]) == (2, 2)
    how = [("num_captions", 2), ("temperature", 1), ("seed", 7), ("max_tokens", 5)]
    alone = client.post("/api/caption", ("image", pictures[1]), *how)[1]["results"][0]
    both = client.post("/api/caption", ("image", pictures[0]), ("image", pictures[1]), *how)
    assert both[1]["results"][1] == alone  # whatever runs beside it
    assert len(alone["captions"]) == 2


def test_a_stream_grows_to_the_caption(client, model):
    fields = [("image", png(1)), ("stream", "true"), ("explain", "1"), ("max_tokens", 6)]
    status, text = client.post("/api/caption", *fields, ("prompt", "a"))
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    kinds, data = [kind for kind, _ in found], [json.loads(text) for _, text in found]
    assert status == 200 and kinds[-1] == "result" and set(kinds[:-1]) == {"tokens"}
    (wanted,) = model.captions([png(1)], "a", max_tokens=6)
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
    assert "must hold '{}' once" in client.refused(
        400, "/api/zero_shot", *labels, ("template", "red")
    )
    many = "\n".join(f"{i} things that are red" for i in range(300))  # as the page's box gives them
    says = "label: number 2 of 2 is empty; leave it out"
    assert client.refused(400, "/api/zero_shot", *labels, ("label", " \n")) == says
    says = "text: number 1 of 1 is empty; leave it out"
    assert client.refused(400, "/api/embed", ("image", picture), ("text", "")) == says
    status, answer = client.post("/api/zero_shot", ("image", picture), ("label", many))
    assert status == 200 and len(many) > 6000
    assert "2001 characters; at most 2000 each" in client.refused(
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
    assert [client.get(f"/api/pictures/{n}")[0] for n in (6, "9" * 5000)] == [404, 404]
    assert client.get("/api/pictures/0?side=999999")[0] == 400
    assert "nothing to look for" in client.refused(400, "/api/search", ("text", " "))
    assert "nothing" in client.refused(400, "/api/search", ("text", "a"), ("text_weight", 0))
    for name, given in (("text", ("image", picture)), ("image", ("text", "red"))):
        assert f"{name}_weight=0.3: there is no {name} that it weighs" in client.refused(
            400, "/api/search", given, (f"{name}_weight", 0.3)
        )
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


def test_uploads_that_cannot_be_are_a_sentence(client):
    ask = "/api/caption"
    assert "image is missing" in client.refused(400, ask)
    assert "empty file" in client.refused(400, ask, ("image", b""))
    assert "not an image" in client.refused(400, ask, ("image", b"<svg onload=alert(1)>" * 9))
    assert "not an image" in client.refused(400, ask, ("image", b"%!PS-Adobe-3.0 EPSF-3.0"))
    assert "damaged image" in client.refused(400, ask, ("image", png(0)[:300]))
    assert "too many pixels" in client.refused(400, ask, ("image", bomb(60_000)))
    assert "too many pixels" in client.refused(400, ask, ("image", bomb(201)))
    assert "picture 2 of 2" in client.refused(400, ask, ("image", png(0)), ("image", b"no"))
    many = [("image", png(0))] * 5
    assert "more than 4 pictures" in client.refused(400, ask, *many)
    assert "more than 4 pictures" in client.refused(400, ask, *many * 9)
    assert "give a file" in client.refused(400, ask, ("image", "/etc/passwd"))
    assert "not a file" in client.refused(400, ask, ("image", png(0)), ("prompt", b"file"))
    assert "larger than 1 MiB" in client.refused(413, ask, ("image", b"x" * (2 << 20)))
    for field, value, says in (
        ("num_beams", 9, "from 1 to 8"),
        ("num_beams", "1.5", "give a whole number"),
        ("temperature", "nan", "from 0 to 10"),
        ("seed", 2**32, "give a whole number from 0 to 4294967295"),
        ("num_captions", 2, "greedy decoding"),
        ("stream", "maybe", "true or false"),
        ("path", "/etc/passwd", "no such field"),
        ("prompt", "a " * 3000, "at most 2000"),
        ("prompt", "a red " * 100, "shorten it"),
    ):
        assert says in client.refused(400, ask, ("image", png(0)), (field, value)), field
    status, _, data = client.send(
        "POST", ask, b"--x\r\nbroken", {"Content-Type": "multipart/form-data"}
    )
    assert status == 400 and "error" in json.loads(data)
    for kind, body, says in (
        ("application/json", b"{}", "Content-Type application/json: send multipart/form-data"),
        ("", png(0), "Content-Type is missing: send multipart/form-data"),
        ("image/jpeg", png(0), "Content-Type image/jpeg: send multipart/form-data"),
        *(  # as curl -d sends anything
            ("application/x-www-form-urlencoded", body, "no fields with names: send multipart/form")
            for body in (png(0), b'{"num_beams": 2}')
        ),
    ):
        status, _, data = client.send("POST", ask, body, {"Content-Type": kind} if kind else {})
        assert status == 400 and says in json.loads(data)["error"], kind
    sending = socket.create_connection(("127.0.0.1", client.port))  # a body that never comes
    sending.sendall(
        b"POST /api/caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    assert b" 408 " in sending.recv(1000).split(b"\r\n")[0]
    sending.close()
    assert client.post(ask, ("image", png(0)), ("max_tokens", 5))[0] == 200  # it goes on


def test_no_path_leads_to_a_file(client):
    for path in ("/../setup.py", "/..%2f..%2fetc/passwd", "/serve.css/../../x", "//etc/passwd",
                 "/api/pictures/..%2f0", "/api/pictures/-1", "/page/serve.js", "/%00"):  # fmt: skip
        status, headers, data = client.get(path)
        assert status == 404 and list(json.loads(data)) == ["error"], path
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
    bounds = info["limits"]["fields"]
    assert bounds["/api/caption"]["num_beams"] == bounds["/api/caption"]["num_captions"] == [1, 8]
    assert bounds["/api/caption"]["max_tokens"] == [1, 256] and "explain" not in bounds
    assert bounds["/api/search"]["k"] == [1, 200] and bounds["/api/head"] == {"k": [1, 1000]}
    assert (info["limits"]["labels"], info["limits"]["characters"]) == (1000, 2000)
    assert "num_beams" in client.refused(
        400,
        "/api/caption",
        ("image", png(0)),
        ("num_beams", bounds["/api/caption"]["num_beams"][1] + 1),
    )
    assert info["captions"] is True and info["explains"] is True
    assert json.loads(client.get("/healthz")[2]) == dict(status="ok")
    image = ("image", png(0))
    assert client.post("/api/caption", image)[0] == 200 and client.get("/none")[0] == 404
    text = client.get("/metrics")[2].decode()
    assert re.search(r'coca_jax_requests_total{path="/api/caption",status="200"} \d', text)
    assert re.search(r'coca_jax_requests_total{path="other",status="404"} \d', text)
    assert "coca_jax_batch_items_count" in text


def test_openapi_describes_what_there_is(client):
    found = json.loads(client.get("/openapi.json")[2])
    assert found == json.loads(json.dumps(app.document(False)))
    caption = found["paths"]["/api/caption"]["post"]["requestBody"]["content"]
    fields = caption["multipart/form-data"]["schema"]["properties"]
    assert fields["num_beams"] == dict(
        type="integer",
        minimum=1,
        maximum=8,
        default=1,
        description="Beams of beam search; 1: none.",
    )
    assert fields["image"]["items"] == dict(type="string", format="binary")
    for path, methods in found["paths"].items():
        for method in methods:
            status = client.send(method.upper(), path.replace("{row}", "0"), b"")[0]
            assert status in (200, 400, 404), path


def test_requests_run_together_and_none_is_lost(client, model):
    before = client.numbers.text()[0].decode()
    pictures = [png(number) for number in range(4)]
    wanted = [row[0].text for row in model.captions(pictures, max_tokens=5)]

    def ask(number: int):
        fields = ("image", pictures[number % 4]), ("max_tokens", 5)
        return client.post("/api/caption", *fields)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(60)))
    texts = [answer["results"][0]["captions"][0]["text"] for _, answer in answers]
    assert texts == [wanted[number % 4] for number in range(60)]
    after = client.numbers.text()[0].decode()
    count, items = (
        float(re.search(rf"coca_jax_batch_items_{name} ([\d.]+)", after)[1])
        - float(re.search(rf"coca_jax_batch_items_{name} ([\d.]+)", before)[1])
        for name in ("count", "sum")
    )
    assert items == 60 and count < 50


def test_a_defect_is_not_shown(client, monkeypatch):
    def fails(self, model, items):
        raise RuntimeError("a secret")

    monkeypatch.setattr(batcher.Answer, "run", fails)
    status, answer = client.post("/api/answer", ("image", png(0)), ("question", "red"))
    assert status == 500 and "secret" not in answer["error"]
