"""Captions from a model behind an OpenAI-compatible chat API, as vLLM, SGLang and Ollama serve it.

A request that times out, fails with a status that may pass (408, 409, 425, 429, 5xx) or answers
something else than a chat completion is repeated with growing pauses, or after the server's
Retry-After. An image whose requests all fail is quarantined; many in a row end the run, which
resumes with the same command.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from coca_jax.apps.recaption.request import Request, way
from coca_jax.inference.tokenization import without_halves

PROMPT = "Describe the image in one sentence."
TIMEOUT = 120.0  # seconds for an answer
ATTEMPTS = 6  # of a request
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the second attempt, doubled for each more
MOST_IN_A_ROW = 32  # images without an answer, after which the run ends
_PASSING = (408, 409, 425, 429)
_MOST_BYTES = 1 << 20  # of an answer
_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}


class _Refused(Exception):
    """The server refused a request, and would refuse it again."""


class ChatCaptioner:
    """Gets the captions of a recaption request from a chat API.

    Raises:
        OSError: no chat API answers at the URL.
        ValueError: it lists no models, and the request names none.
    """

    def __init__(self, request: Request):
        self._request, self._url = request, request.captioner
        self._lock, self._next, self._failed = threading.Lock(), 0.0, 0
        self._model = request.captioner_model or self._first_model()

    def _first_model(self) -> str:
        try:
            found = self._ask("/models", None)
        except (OSError, ValueError, _Refused, http.client.HTTPException) as error:
            raise OSError(
                f"--captioner={self._url}: no chat API answers there ({error}); give its address up "
                "to /v1, and --captioner_model=NAME if it lists no models"
            ) from None
        names = [
            one["id"] for one in found.get("data", ()) if isinstance(one, dict) and "id" in one
        ]
        if not names:
            raise ValueError(f"--captioner={self._url} lists no model; give --captioner_model=NAME")
        return names[0]

    def captions(self, images: Sequence[bytes], keys: Sequence[str]) -> list[list[dict] | str]:
        """For each image its captions, one per prompt and --how (dicts of text, log_prob, tokens,
        finished, checkpoint, prompt, way), or the reason why it has none.

        keys: of the images; they give the seeds.

        Raises:
            OSError: MOST_IN_A_ROW images had no answer.
        """
        with concurrent.futures.ThreadPoolExecutor(self._request.concurrency) as pool:
            waiting = [pool.submit(self._captions, one, key) for one, key in zip(images, keys)]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _captions(self, image: bytes, key: str) -> list[dict] | str:
        try:
            url = _data_url(image)
        except (ValueError, OSError) as error:
            return f"unreadable_image: {error}"
        found: list[dict] = []
        for number, prompt in enumerate(self._request.prompts):
            for place, text in enumerate(self._request.ways):
                settings = way(text)
                for copy in range(settings.num_return_sequences):
                    body: dict[str, Any] = dict(
                        model=self._model,
                        messages=[
                            dict(
                                role="user",
                                content=[
                                    dict(type="image_url", image_url=dict(url=url)),
                                    dict(type="text", text=prompt or PROMPT),
                                ],
                            )
                        ],
                        temperature=settings.temperature if settings.do_sample else 0.0,
                        seed=zlib.crc32(f"{key} {copy}".encode("utf-8", "surrogatepass")) >> 1,
                        max_tokens=settings.max_new_tokens,
                    )
                    if settings.top_p < 1:
                        body["top_p"] = settings.top_p
                    try:
                        answer, tokens, whole = self._answer(body)
                    except _Refused as error:
                        return str(error)
                    found.append(
                        dict(
                            text=answer,
                            log_prob=None,  # which no API gives of an image
                            tokens=tokens,
                            finished=whole,
                            checkpoint=0,
                            prompt=number,
                            way=place,
                        )
                    )
        return found

    def _answer(self, body: dict[str, Any]) -> tuple[str, int, bool]:
        """(text, number of tokens, whether it is complete). Raises _Refused after ATTEMPTS."""
        pause, why, attempt = PAUSE, "", 0
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2
            try:
                found = self._ask("/chat/completions", body)
                choice = found["choices"][0]
                text = " ".join(without_halves(choice["message"]["content"]).split())
                if not text:
                    raise ValueError("an empty answer")
                tokens = (found.get("usage") or {}).get("completion_tokens") or len(text.split())
                self._failed = 0
                return text, int(tokens), choice.get("finish_reason") != "length"
            except _Refused as error:
                why = str(error)
                break
            except urllib.error.HTTPError as error:
                why = f"status {error.code}"
                if (after := error.headers.get("Retry-After", "")).isdigit():
                    pause = max(pause, float(after))
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                why = f"no chat completion: {error}"
        with self._lock:
            self._failed += 1
            if self._failed >= MOST_IN_A_ROW:
                raise OSError(
                    f"--captioner={self._url}: {self._failed} images in a row have no caption; the "
                    f"last: {why}. Repair the server and give the same command to resume"
                )
        raise _Refused(why if not attempt else f"{attempt + 1} attempts, the last: {why}")

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        self._wait()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
                return json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in _PASSING:
                text = error.read(300).decode("utf-8", "replace")
                raise _Refused(f"status {error.code}: {' '.join(text.split())}") from None
            raise

    def _wait(self) -> None:
        """Until the next request may be sent, by --rate."""
        if not self._request.rate:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + 1 / self._request.rate
        time.sleep(at - now)


def _data_url(image: bytes) -> str:
    """An image as a URL; formats that few servers read are encoded as PNG."""
    with Image.open(io.BytesIO(image)) as found:
        kind = _TYPES.get(found.format or "")
        if kind is None:
            out = io.BytesIO()
            found.convert("RGB").save(out, "PNG")
            image, kind = out.getvalue(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
