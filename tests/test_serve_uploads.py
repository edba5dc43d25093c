"""What is sent to the server: how much is decoded at once, what becomes of half an upload."""

import asyncio
import concurrent.futures
import importlib.util
import socket
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_inference import no_compile_cache, tiny_model, words  # noqa: F401

if not all(map(importlib.util.find_spec, ("uvicorn", "starlette", "prometheus_client"))):
    pytest.skip("needs the extra 'serve'", allow_module_level=True)

from starlette.datastructures import FormData  # noqa: E402
from test_serve import Client, png  # noqa: E402

from coca_jax.apps.serve import app, batcher, limits, schemas  # noqa: E402
from coca_jax.config import shapes  # noqa: E402


@pytest.fixture(scope="module")
def model(words):  # noqa: F811
    return tiny_model(words, devices=jax.devices()[:1])


def test_few_pictures_are_decoded_at_a_time_and_few_wait(model, monkeypatch):
    """A small file may be gigabytes of pixels: of 12 requests at once one is decoded, three wait
    and are answered then, here that there is no index; the others are refused."""
    go, lock, now, most = threading.Event(), threading.Lock(), 0, 0

    class Held:
        def __getattr__(self, name):
            return getattr(model, name)

        def fit_image(self, data):
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            go.wait(60)
            with lock:
                now -= 1
            return model.fit_image(data)

    monkeypatch.setattr(schemas, "MOST", 1)
    limits = schemas.Limits(1, 40_000, 5, 60)
    client, statuses = Client(Held(), depth=3, limits=limits), []

    def ask(number: int):
        status, answer = client.post("/api/search", ("image", png(number)))
        statuses.append(status)
        return answer["error"]

    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = pool.map(ask, range(12))
            for _ in range(6000):
                if len(statuses) == 8:
                    break
                time.sleep(0.01)
            five = [("image", png(number)) for number in range(5)]
            never = client.refused(400, "/api/search", *five)
            assert "coca_jax_waiting_items 3.0" in client.numbers.text()[0].decode()
            go.set()
    finally:
        go.set()
        client.close()
    assert "5 pictures or texts; at most 4 are taken at a time (--queue)" in never
    assert most == 1 and sorted(statuses) == [404] * 4 + [503] * 8
    assert list(answers).count("too many requests wait; ask again later") == 8


def multipart(*parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="'
    return b"".join(head + part + b"\r\n" for part in parts) + end


def test_half_an_upload_is_refused_and_no_traceback(model, caplog):
    """A form that was cut at its end would lose its last field; who hangs up is told nothing."""
    client, kind = Client(model), {"Content-Type": "multipart/form-data; boundary=x"}
    text = b'text"\r\n\r\na cat'
    try:
        for end, wanted in ((b"--x--\r\n", 404), (b"--x--", 404), (b"", 400), (b"--x\r\n", 400)):
            body = multipart(text, text, end=end)
            status, _, answer = client.send("POST", "/api/search", body, kind)
            assert (status, b"closing boundary is missing" in answer) == (wanted, wanted == 400)
        odd = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
        status, _, answer = client.send("POST", "/api/search", multipart(text), odd)
        assert status == 400 and b"the form is not in its charset; send UTF-8" in answer
        for head in ("multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
            before = client.numbers.answered
            sending = socket.create_connection(("127.0.0.1", client.port))
            sending.sendall(
                b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
                + f"Content-Type: {head}\r\n\r\n".encode()
                + multipart(text, end=b"")
            )
            sending.close()
            for _ in range(1000):
                if client.numbers.answered > before:
                    break
                time.sleep(0.01)
            assert client.numbers.answered == before + 1
    finally:
        client.close()
    counted = client.numbers.text()[0].decode()
    assert 'coca_jax_requests_total{path="/api/search",status="400"} 5.0' in counted
    assert 'status="500"' not in counted and not caplog.records


def test_what_a_client_asked_that_hung_up_is_not_computed(model):
    """Clients that give up and ask again would fill the queue with what nobody waits for: of three
    that wait behind a batch the one that is still there is answered, alone."""
    go, begun, asked = threading.Event(), threading.Event(), []

    class Held:
        def __getattr__(self, name):
            return getattr(model, name)

        def encode_text(self, texts):
            asked.append(list(texts))
            begun.set()
            go.wait(60)
            return model.encode_text(texts)

    client = Client(Held())

    def counted(status: int) -> str:
        return f'coca_jax_requests_total{{path="/api/embed",status="{status}"}} 2.0'

    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.post, "/api/embed", ("text", "a"))
            assert begun.wait(60)
            head = f"POST /api/embed HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n"
            head += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 6\r\n\r\n"
            gone = []
            for _ in range(2):
                gone.append(socket.create_connection(("127.0.0.1", client.port)))
                gone[-1].sendall(head.encode() + b"text=b")
            _until(lambda: client.batcher.waiting == 2)
            for one in gone:
                one.close()
            _until(lambda: counted(400) in client.numbers.text()[0].decode())
            last = pool.submit(client.post, "/api/embed", ("text", "c"))
            _until(lambda: client.batcher.waiting == 3)
            go.set()
            assert [one.result()[0] for one in (first, last)] == [200, 200]
        assert asked == [["a"], ["c"]]
    finally:
        go.set()
        client.close()


def _until(there) -> None:
    """Waits for it, a minute at most."""
    for _ in range(6000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_a_text_that_a_request_must_have_is_not_blank():
    fields = {one.path: one.fields for one in app.ENDPOINTS}
    for path, name in (("/api/explain", "text"), ("/api/answer", "question")):
        for blank in ("", " \n"):
            with pytest.raises(limits.Refused, match=f"^{name} is missing: The ") as found:
                schemas.read_form(fields[path], FormData([(name, blank)]))
            assert found.value.status == 400
    assert schemas.read_form(fields["/api/caption"], FormData([("prompt", " ")]))["prompt"] == " "


def test_a_template_is_one_sentence_and_no_name_of_a_set(model):
    """'clip' made 80,000 texts of a thousand labels, which all others waited for."""
    client, fields = Client(model), (("image", png(0)), ("label", "red\nblue"))
    try:
        for given in ("red", "clip", "{} {}"):
            told = client.refused(400, "/api/zero_shot", *fields, ("template", given))
            assert told == f"template={given!r}: it must hold '{{}}' once, where the label goes"
        assert client.post("/api/zero_shot", *fields, ("template", "a {}"))[0] == 200
    finally:
        client.close()


def test_an_answer_says_whether_its_question_was_cut(model, monkeypatch):
    monkeypatch.setattr(model, "answer", lambda pixels, questions: ["red"] * len(questions))
    monkeypatch.setattr(model, "classify", lambda pixels, texts: np.ones((len(pixels), 1)))
    monkeypatch.setattr(model, "head_kind", SimpleNamespace(reads_text=True))
    monkeypatch.setattr(model, "class_names", ["yes"])
    room = model.max_len - max(3, model.max_len // 8) - 1  # beside the begin symbol
    asked = [" ".join(["a"] * count) for count in (1, room, room + 1)]
    assert [len(ids) for ids in model.vocabulary.encode_many(asked)] == [1, room, room + 1]
    items = [(np.zeros((8, 8, 3), np.uint8), question) for question in asked]
    for work in (batcher.Answer(), batcher.Head(1)):
        (found,) = work.run(model, items)
        assert [one["cut"] for one in found] == [False, False, True]
    monkeypatch.setattr(model, "head_kind", SimpleNamespace(reads_text=False))
    assert next(batcher.Head(1).run(model, items[:1])) == [
        dict(labels=[dict(label="yes", probability=1.0)])
    ]


def test_what_is_embedded_searched_and_compared_says_whether_it_was_cut(model):
    """Texts that begin alike had the same embedding, and nothing said why."""

    async def answers(work, items):
        return next(work.run(model, items)) if items else []

    index = SimpleNamespace(letters=0, search=lambda query, k: [])

    async def now():
        return index

    server = SimpleNamespace(
        batcher=SimpleNamespace(answers=answers), index=SimpleNamespace(now=now)
    )
    room = model.max_len - 2  # beside the begin and the end symbol
    short, fits, long = (" ".join(["a"] * count) for count in (1, room, room + 1))
    asked = [fits, long, short]
    found = asyncio.run(app.embed(server, dict(image=[], text=asked)))
    assert found["cut"] == [False, True, False]
    np.testing.assert_allclose(found["texts"], model.encode_text([fits, fits, short]), atol=1e-6)
    weights = dict(text_weight=1.0, image_weight=1.0)
    for texts, cut in (([short, fits], False), ([short, long], True)):
        values = dict(image=[], text=texts, like=[], k=3, **weights)
        assert asyncio.run(app.search(server, values)) == dict(results=[], cut=cut)
    pixels = np.zeros((*shapes.pair(model.image_size), 3), np.uint8)
    for label, cut in ((fits, False), (long, True)):
        (told,) = next(batcher.ZeroShot((short, label), "{}").run(model, [pixels]))
        assert told["cut"] is cut and len(told["labels"]) == 2
