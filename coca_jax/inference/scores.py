"""The part of a model that says how probable texts are for images.

Shape letters: N images, M texts, R rows of image tokens, Q image tokens, D width, K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.inference import tokenization as text_arrays
from coca_jax.inference.devices import pad
from coca_jax.inference.embeddings import Encoders, joined


class Scores(Encoders):
    """Adds log probabilities of texts to the encoders; see `model.CoCaModel`."""

    @text_arrays.warn_truncated()
    def caption_log_likelihood(
        self, images: Any, texts: str | Sequence[str], *, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """How probable text i is for image i.

        Returns (sum of log probabilities in nats, float32 [N]; predicted tokens, int32 [N]): all
        tokens after the begin symbol, the end symbol included. Raises ValueError unless there
        are as many texts as images.
        """
        texts = text_arrays.listed(texts)
        sums, counts = [], []
        done = 0
        for pixels in self._reader.batches(images, progress):
            batch = texts[done : done + len(pixels)]
            done += len(pixels)
            if len(batch) != len(pixels):
                raise ValueError(f"{len(texts)} texts for more images; give one text an image")
            tokens, valid = self._tokenize(batch)
            sums.append(self._run(self._programs.log_likelihood, pixels, tokens, valid))
            counts.append(valid[:, 1:].sum(1).astype(np.int32))
        if done != len(texts):
            raise ValueError(f"{len(texts)} texts for {done} images; give one text an image")
        return joined(sums, ()), joined(counts, ()).astype(np.int32)

    @text_arrays.warn_truncated()
    def score(
        self,
        images: Any,
        texts: str | Sequence[str],
        *,
        per_token: bool = False,
        labels: bool = False,
        progress: bool = False,
    ) -> np.ndarray:
        """Log probability of every text for every image, in nats: float32 [N, M].

        Captioning as a classifier, or to rerank what `similarity` retrieves. per_token: divided by
        the text's number of predicted tokens. labels: as in `encode_text`. Image and text are each
        encoded once.
        """
        texts = text_arrays.listed(texts)
        tokens, valid = self._tokenize(texts, labels)
        lengths = valid[:, 1:].sum(1).astype(np.float32)
        tokens, valid = (self._in_batches(x) for x in (tokens, valid))
        states = self._text_states(tokens, valid)
        rows = []
        for pixels in self._reader.batches(images, progress):
            count = len(pixels)
            with self._devices.context():
                image = self._image_tokens(pixels, self._devices.bucket(count))
            pairs = np.stack(np.meshgrid(np.arange(count), np.arange(len(texts)), indexing="ij"))
            found = self._pair_scores(image, states, tokens, valid, *pairs.reshape(2, -1))
            rows.append(found.reshape(count, len(texts)))
        scores = joined(rows, (len(texts),))
        return scores / lengths if per_token else scores

    def score_some(
        self,
        images: Any,
        texts: str | Sequence[str],
        chosen: Sequence[np.ndarray],
        *,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Log probability, in nats, of some of the texts for each image: to rerank what was found.

        chosen: for each image the numbers of its texts, int [k]. Returns float32 [k] of each image.
        An image is encoded once, and a text once for each batch of images. Raises ValueError unless
        there is a choice for each image, of whole numbers of texts that there are.
        """
        texts, chosen = text_arrays.listed(texts), list(map(_numbers, chosen))
        found: list[np.ndarray] = []
        for pixels in self._reader.batches(images, progress):
            lists = chosen[len(found) : len(found) + len(pixels)]
            if len(lists) != len(pixels):
                raise ValueError(f"chosen has {len(chosen)} lists for more images; give one each")
            used, text = np.unique(np.concatenate(lists), return_inverse=True)
            if used.size and not 0 <= used[0] <= used[-1] < len(texts):
                wrong = used[0] if used[0] < 0 else used[-1]
                raise ValueError(f"chosen holds {wrong}; texts go from 0 to {len(texts) - 1}")
            lengths = [len(one) for one in lists]
            # As many texts as a power of two, so that few shapes are compiled.
            some = [texts[i] for i in used.tolist()]
            some += [""] * (self._devices.bucket(len(some)) - len(some))
            with self._devices.context():
                image = self._image_tokens(pixels, self._devices.bucket(len(pixels)))
            rows = np.repeat(np.arange(len(pixels)), lengths)
            scores, _ = self.score_pairs(image, some, rows, text)
            found += np.split(scores, np.cumsum(lengths)[:-1])
        if len(found) != len(chosen):
            raise ValueError(f"chosen has {len(chosen)} lists for {len(found)} images")
        return found

    def score_pairs(
        self, image_tokens: jax.Array, texts: Sequence[str], image: np.ndarray, text: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log probability of text text[k] for image image[k], in nats: float32 [K]; and the number
        of predicted tokens of each text, int32 [N].

        image_tokens: [R, Q, D] of images, as `image_tokens` gives them. texts: N; image, text:
        int [K], the pairs by number. Each text runs once through the half that sees text alone.
        """
        tokens, valid = self._tokenize(text_arrays.listed(texts))
        states = self._text_states(tokens, valid)
        found = self._pair_scores(image_tokens, states, tokens, valid, image, text)
        return found, valid[:, 1:].sum(1).astype(np.int32)

    def _in_batches(self, rows: np.ndarray) -> np.ndarray:
        """Rows of texts [M, L] with the first again and again behind them, up to a power of two or
        whole batches: programs are compiled for few numbers of texts."""
        size = max(min(self._devices.bucket(len(rows)), self.batch_size), 1)
        return np.concatenate([rows, np.repeat(rows[:1], -len(rows) % size, 0)])

    def _text_states(self, tokens: np.ndarray, valid: np.ndarray) -> jax.Array:
        """What the multimodal decoder reads of texts [M, L], made in batches: [M, L, D]."""
        count = len(tokens)
        size = max(min(self.batch_size, count), 1)
        with self._devices.context():
            parts = [
                self._programs.text_states(
                    self.params, *(pad(x[i : i + size], size) for x in (tokens, valid))
                )
                for i in range(0, max(count, 1), size)
            ]
            return jnp.concatenate(parts)[:count] if len(parts) > 1 else parts[0][:count]

    def _pair_scores(
        self,
        image_tokens: jax.Array,
        states: jax.Array,
        tokens: np.ndarray,
        valid: np.ndarray,
        image: np.ndarray,
        text: np.ndarray,
    ) -> np.ndarray:
        """See `Programs.pair_scores`; pairs int [K] are scored in batches: float32 [K]."""
        parts = []
        # The last batch is as large as the others: there is one program to compile.
        size = self._devices.bucket(min(self.batch_size, len(image)))
        for start in range(0, len(image), self.batch_size):
            rows = slice(start, start + self.batch_size)
            count = len(image[rows])
            pair = (pad(x[rows].astype(np.int32), size) for x in (image, text))
            with self._devices.context():
                out = self._programs.pair_scores(
                    self.params, image_tokens, states, tokens, valid, *pair
                )
            parts.append(np.asarray(out)[:count])
        return joined(parts, ())

    def num_tokens(self, texts: str | Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Tokens of each text that `score` predicts, the end symbol included: int32 [M]."""
        _, valid = self._tokenize(text_arrays.listed(texts), labels)
        return valid[:, 1:].sum(1).astype(np.int32)

    def _image_tokens(self, pixels: np.ndarray, size: int) -> jax.Array:
        """[size, Q, D] on the devices, of images uint8 [b, ...] and rows of zeros behind them."""
        return self._programs.encode_image(self.params, self._devices.put(pixels, size))[1]


def _numbers(chosen: Any) -> np.ndarray:
    """The numbers of texts that one image is given, int64 [k]. Raises ValueError for what is no
    list of whole numbers: a mask would be taken for the texts 0 and 1."""
    found = np.asarray(chosen)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(
            f"chosen holds {str(chosen)[:60]}; give each image a list of the numbers of its texts"
        )
    return found.astype(np.int64)
