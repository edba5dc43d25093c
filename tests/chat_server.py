"""A chat API with images that behaves badly: it stalls, fails, answers garbage, repeats itself.

    python tests/chat_server.py            # prints its port

Its caption of an image depends on the image alone, and how it fails on the image and on how often
it was asked about it, so that a test's outcome does not depend on chance. It fails at most four
times in a row, which is less often than the client tries.
"""

import base64
import hashlib
import http.server
import json
import random
import sys
import threading
import time
from collections import Counter

WORDS = (
    "red blue green large small round square dog cat house tree boat on under near a the".split()
)


class Server(http.server.ThreadingHTTPServer):
    """bad: share of the requests that fail in some way; asked: captions asked for so far."""

    daemon_threads = True

    def __init__(self, bad=0.4):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bad, self.asked, self.down = bad, 0, False
        self.requests = Counter()  # by their content
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def caption(image: bytes, seed: int = 0) -> str:
    """What is said of an image; of some the same words again and again."""
    digest = hashlib.sha256(image + str(seed).encode()).digest()
    if digest[0] < 16:
        return " ".join(["dog"] * 6)
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest[1:9])


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def answer(self, status, data, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, dict(data=[dict(id="describer")]))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)
        self.server.asked += 1
        if self.server.down:
            return self.answer(503, b"")
        before = self.server.requests[body]
        self.server.requests[body] += 1
        chance = random.Random(body + bytes([before % 256]))
        if before % 5 < 4 and chance.random() < self.server.bad:
            kind = chance.randrange(6)
            if kind == 0:
                time.sleep(0.2)  # and then an answer after all
            elif kind == 1:
                return self.answer(500, b"oops")
            elif kind == 2:
                return self.answer(429, b"", Retry_After="0")
            elif kind == 3:
                return self.answer(200, b"{garbage")
            elif kind == 4:
                return self.answer(200, dict(choices=[dict(message=dict(content=None))]))
            else:
                self.connection.close()
                return
        picture, text = asked["messages"][0]["content"]
        image = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        found = caption(image + text["text"].encode(), asked["seed"] if asked["temperature"] else 0)
        choice = dict(message=dict(content=found), finish_reason="stop")
        self.answer(200, dict(choices=[choice], usage=dict(completion_tokens=8)))


if __name__ == "__main__":
    server = Server(float(sys.argv[1]) if len(sys.argv) > 1 else 0.4)
    print(server.url, flush=True)
    server.serve_forever()
