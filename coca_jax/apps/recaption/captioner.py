"""Captions, scores and embeddings of the images of a part."""

from __future__ import annotations

import base64
import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import coca_jax
from coca_jax.apps.recaption import chat_api, selection
from coca_jax.apps.recaption.request import Request, way
from coca_jax.data.dedup import content_digest, firsts
from coca_jax.data.sources.items import Item
from coca_jax.evaluation.evaluators import check_finite
from coca_jax.inference import model as two_towers
from coca_jax.inference.tokenization import without_halves

_LOOKED_AT = 64  # images whose captions are tried with each other's images


class Picture(NamedTuple):
    """An image that can be read: its number in the shard, key and texts; pixels: uint8 [S, S, 3] as
    each model takes it; image: encoded."""

    number: int
    key: str
    texts: list[str]
    pixels: tuple[np.ndarray, ...]
    image: bytes = b""


class Captioner:
    """The models of a request, loaded.

    Attributes:
        seconds: spent so far, by what they went to.

    Raises:
        FileNotFoundError, ValueError: as `coca_jax.load`; a model without a decoder, or a
            prompt that leaves no room.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.models = [
            coca_jax.load(
                place, num_frames=0, batch_size=request.batch_size, dtype=request.dtype or None
            )
            for place in request.checkpoints
        ]
        self.seconds: dict[str, float] = dict(input=0.0, encoder=0.0, decoder=0.0, scores=0.0)
        self._api = chat_api.ChatCaptioner(request) if request.captioner else None
        for model, place in zip(self.models, request.checkpoints) if not self._api else ():
            two_towers.refuse(model, place)
            for prompt in request.prompts:
                if len(model.vocabulary.encode(prompt)) + 1 >= model.max_len:
                    raise ValueError(
                        f"--prompt={prompt!r} leaves no room for a caption: {place} writes "
                        f"{model.max_len} tokens in all"
                    )

    def checksums(self) -> list[str]:
        """Of each model."""
        return [model.checksum() for model in self.models]

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time that its block takes to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def read(self, item: Item) -> tuple[np.ndarray, ...]:
        """The pixels of an item for each model. Raises ValueError: why it cannot be used."""
        if item.problem:
            raise ValueError(f"{item.problem}: {item.detail}")
        if not item.image:
            raise ValueError("empty_image: zero bytes")
        found: dict[tuple, np.ndarray] = {}
        for model in self.models:
            kind = self._kind(model)
            try:
                found[kind] = found[kind] if kind in found else model.fit_image(item.image)
            except Exception as error:  # decoders raise all sorts on damaged data
                raise ValueError(f"unreadable_image: {error}") from None
        return tuple(found[self._kind(model)] for model in self.models)

    @staticmethod
    def _kind(model: Any) -> tuple:
        """Models of which that is the same take the same pixels."""
        shape = model.config.model.patch_size, model.config.data.max_patches
        return (model.image_size, model.resize, *(shape if model.resize == "native" else ()))

    def ask(self, images: Sequence[bytes], keys: Sequence[str]) -> list[list[dict] | str] | None:
        """The API's captions of each image, or why there are none; None where models write them.

        Raises OSError where the API does not answer at all.
        """
        if self._api is None:
            return None
        with self.timed("decoder"):
            return self._api.captions(images, keys)

    def part(
        self,
        pictures: Sequence[Picture],
        look: bool = False,
        answers: Sequence[list[dict[str, Any]]] | None = None,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What is kept of each image: number, key, captions (text, log_prob, tokens, score, flags,
        checkpoint, prompt and way by their numbers), originals (text, score), embeddings.

        answers: the captions of an API.

        Besides how well the model matches the originals (match, matched: `choose.match`) and, with
        `look`, what the first captions of some images tell of a model that says the same of all
        (gain, tokens).
        """
        if not pictures:
            return [], {}
        written: list[list[dict[str, Any]]] = [[] for _ in pictures]
        finished: list[list[bool]] = [[] for _ in pictures]
        first_model: list[tuple] = []
        if self._api:
            with self.timed("encoder"):
                images = self.models[0].encode_image([one.pixels[0] for one in pictures])
            for row, several in enumerate(answers or ()):
                finished[row] = [one["finished"] for one in several]
                written[row] = [
                    {k: v for k, v in one.items() if k != "finished"} for one in several
                ]
        else:
            first_model = self._encode(0, pictures)
            images = np.concatenate([embedding for embedding, _ in first_model])
            for number in range(len(self.models)):
                encoded = self._encode(number, pictures) if number else first_model
                tokens = [tokens for _, tokens in encoded]
                self._captions(number, pictures, tokens, written, finished)
        originals = [picture.texts for picture in pictures]
        texts = [[one["text"] for one in several] for several in written]
        model = self.models[0]
        with self.timed("scores"):
            every = [text for several in texts for text in several]
            captions = model.encode_text(every)
            original_embeddings = model.encode_text(
                [text for several in originals for text in several]
            )
        owners = firsts(content_digest(picture.pixels[0]) for picture in pictures)
        wrong = selection.of_part(texts, originals, finished, images, captions, owners)
        found, at, first = [], 0, 0
        for i, picture in enumerate(pictures):
            own = captions[at : at + len(texts[i])]
            known = original_embeddings[first : first + len(originals[i])]
            at, first = at + len(own), first + len(known)
            for one, score, marks in zip(written[i], own @ images[i], wrong[i]):
                one.update(score=_short(score), flags=marks)
            result = dict(
                number=picture.number,
                key=picture.key,
                captions=written[i],
                originals=[
                    dict(text=text, score=_short(score))
                    for text, score in zip(originals[i], known @ images[i])
                ],
            )
            if self.request.embeddings:
                result["image_emb"] = _packed(images[i : i + 1])
                result["text_emb"] = _packed(np.concatenate([known, own]))
            found.append(result)
        figures: dict[str, Any] = {}
        firsts_of = np.cumsum([0, *map(len, originals)])
        texted = [i for i in np.unique(owners) if originals[i]]
        if texted:
            share, count = selection.match(
                images[texted],
                original_embeddings[firsts_of[texted]],
                [originals[i][0] for i in texted],
            )
            figures |= dict(match=round(share, 3), matched=count) if count else {}
        if look and not self._api:  # which has no likelihood of a caption
            blocks = [tokens for _, tokens in first_model]
            once = np.unique(owners[:_LOOKED_AT])
            figures |= self._look(blocks, [texts[i][0] for i in once], once)
        return found, figures

    def _look(
        self, blocks: Sequence[jax.Array], texts: Sequence[str], numbers: np.ndarray
    ) -> dict[str, Any]:
        """How much more probable captions are with their own images than with others'; {} of fewer
        than two images, which have no others.

        blocks: tokens of the images, as `image_tokens` gives them for batches; numbers: int [N],
        the places of the texts' images, which all differ.
        """
        model, count, per_block = self.models[0], len(texts), self.request.batch_size
        if count < 2:
            return {}
        with self.timed("scores"):
            used = int(numbers.max()) // per_block + 1
            tokens = jnp.concatenate(blocks[:used]) if used > 1 else blocks[0]
            own = np.arange(count)
            place = numbers // per_block * len(blocks[0]) + numbers % per_block
            sums, lengths = model.score_pairs(
                tokens,
                texts,
                np.concatenate([place, np.roll(place, count // 2)]),
                np.concatenate([own, own]),
            )
            check_finite(sums, "caption likelihoods")
        gain = (sums[:count] - sums[count:]).astype(np.float64).sum()
        return dict(gain=round(float(gain), 3), tokens=int(lengths.sum()))

    def _encode(self, number: int, pictures: Sequence[Picture]) -> list[tuple]:
        """What `image_tokens` of a model gives of each batch of the pictures."""
        model, size = self.models[number], self.request.batch_size
        with self.timed("encoder"):
            return [
                model.image_tokens(np.stack([one.pixels[number] for one in pictures[i : i + size]]))
                for i in range(0, len(pictures), size)
            ]

    def _captions(
        self,
        number: int,
        pictures: Sequence[Picture],
        tokens: Sequence[jax.Array],
        written: list[list[dict[str, Any]]],
        finished: list[list[bool]],
    ) -> None:
        """Adds the captions of one model, of images whose tokens are given batch by batch."""
        model, size = self.models[number], self.request.batch_size
        counts = [len(pictures[i : i + size]) for i in range(0, len(pictures), size)]
        seeds = [zlib.crc32(picture.key.encode()) for picture in pictures]
        for p, prompt in enumerate(self.request.prompts):
            for w, text in enumerate(self.request.ways):
                with self.timed("decoder"):
                    several = model.caption_tokens(
                        tokens,
                        counts,
                        seeds,
                        prompt,
                        way(text),
                        self.request.rows,
                    )
                for row, captions in enumerate(several):
                    for one in captions:
                        finished[row].append(one.finished)
                        written[row].append(
                            dict(
                                text=without_halves(one.text),
                                log_prob=_short(one.log_prob),
                                tokens=one.num_tokens,
                                checkpoint=number,
                                prompt=p,
                                way=w,
                            )
                        )


def _short(value: Any) -> float:
    return round(float(value), 4)


def _packed(rows: np.ndarray) -> str:
    return base64.b64encode(rows.astype(np.float16).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """float16 [count, E] of what a result holds under image_emb or text_emb."""
    return np.frombuffer(base64.b64decode(text), np.float16).reshape(count, -1)
