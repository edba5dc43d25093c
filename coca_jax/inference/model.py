"""What `coca_jax.load` returns."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import jax
import numpy as np

from coca_jax.config import Entry, heads, shapes
from coca_jax.data import supervision, tower_texts
from coca_jax.inference import explain
from coca_jax.inference import tokenization as text_arrays
from coca_jax.inference.embeddings import Encoders
from coca_jax.inference.explain import Explanation
from coca_jax.inference.generation import continuous, driver
from coca_jax.inference.generation.config import GenerationConfig, own_seeds
from coca_jax.inference.programs import Forward
from coca_jax.inference.scores import Scores
from coca_jax.inference.tokenization import Caption
from coca_jax.models import text_decoder, vision
from coca_jax.ops.decode_layouts import Layout


class CoCaModel(Scores):
    """A model, its vocabulary and its image preprocessing.

    Images are paths, URLs of files, a folder for all images in it, PIL images, encoded bytes,
    arrays [h, w, 3], uint8 arrays [N, h, w, 3], or a list of single ones; one alone counts as a
    list of one. Images of the model's size are used as they are. With `num_frames` T they are
    videos: paths or bytes of animations and video files, uint8 arrays [t, h, w, 3] in a list or
    [N, t, h, w, 3]; T frames of each are sampled uniformly (a still image is repeated), encoded one
    by one and pooled (CoCa.pool). Calls run in batches, padded to a power of two so that few
    programs are compiled, split over the devices; with `progress` they show a bar.

    Args:
        config: of the run, or as it stands beside the weights.
        params: nested dict of arrays (unboxed), on the host, on a device, or spread over a mesh
            named as in partitioning.py; replicated over `devices` unless on a mesh.
        vocabulary: the one that the model was trained with.
        batch_size: images (or frames of videos) or texts at a time, over all devices.
        num_frames: T, with which all images are taken for videos; 0: images; default: as in
            training, `data.num_frames`.
        devices: default all of this process; those of several processes make them work as one:
            each calls the same methods with the same arguments, decodes and runs only the rows
            of its devices, and gets the whole result.
        class_names: of the task head, where the model has one; default: those in the config.

    Attributes:
        class_names: of the task head, in the order of `classify`; empty without one.
        generation_config: how captions are written by default; `load` reads it from a folder's
            generation_config.json.
        head_kind: what the task head reads; None without one.
        stored_dtype: that of its configuration, whatever `load` was told to compute in.
        step: of the run, after which `load` found it in a checkpoint; None of other weights.

    Raises:
        ValueError: the vocabulary is larger than the model's, the config impossible, or
            class_names are not as many as the task head's classes.
    """

    writes_captions: ClassVar[bool] = True
    generation_config = GenerationConfig()

    # -- captions -------------------------------------------------------------------------------

    def caption(
        self,
        images: Any,
        generation_config: GenerationConfig | None = None,
        *,
        prompt: str | Sequence[str] = "",
        progress: bool = False,
        **overrides: Any,
    ) -> list[str]:
        """The best caption of each image.

        generation_config: how captions are written; default: the model's own, `generation_config`.
        overrides: fields of it to change. prompt: how captions begin, one text for all images or
        one each. Raises ValueError for an unknown field (the message lists them), values that
        exclude each other, a prompt or min_new_tokens without room, or a wrong number of prompts.
        """
        found = self.captions(
            images, generation_config, prompt=prompt, progress=progress, **overrides
        )
        return [captions[0].text for captions in found]

    def captions(
        self,
        images: Any,
        generation_config: GenerationConfig | None = None,
        *,
        prompt: str | Sequence[str] = "",
        seeds: Sequence[int] | None = None,
        progress: bool = False,
        **overrides: Any,
    ) -> list[list[Caption]]:
        """`num_return_sequences` captions of each image with their log probabilities, most probable
        first (beams: by the score that ranked them); arguments as of `caption`.

        seeds: a number for each image, from 0 and below 2**32, that makes its random numbers its
        own; default: its place in the list. With the same `seed` and number an image gets the same
        captions in any company.
        """
        config = self._generation(generation_config, overrides)
        images = self._reader.listed(images)
        prompts = text_arrays.one_each(prompt, len(images))
        text_arrays.check_room(self.vocabulary, prompts, self.max_len, config.min_new_tokens)
        numbers = own_seeds(seeds, len(images))
        captions: list[list[Caption]] = []
        for pixels in self._reader.batches(images, progress):
            part = slice(len(captions), len(captions) + len(pixels))
            captions += self._caption_batch(pixels, prompts[part], config, numbers[part])
        return captions

    def _generation(
        self, generation_config: GenerationConfig | None, overrides: dict[str, Any]
    ) -> GenerationConfig:
        if not isinstance(generation_config, GenerationConfig | None):
            raise ValueError(
                f"generation_config={generation_config!r}: not a GenerationConfig. Give one, or its "
                "fields by name."
            )
        config = (generation_config or self.generation_config).updated(overrides)
        config.check_ids(self.vocabulary.size)
        return config

    def stream_captions(
        self,
        images: Any,
        generation_config: GenerationConfig | None = None,
        *,
        prompt: str | Sequence[str] = "",
        seeds: Sequence[int] | None = None,
        **overrides: Any,
    ) -> Iterator[list[list[Caption]]]:
        """The captions of at most batch_size images while they are written: yields them after each
        token, as far as they are. They end as those of `captions`, in the order of drawing.

        Arguments as of `captions`. Raises ValueError as `captions`, and for beams.
        """
        config = self._generation(generation_config, overrides)
        images = self._reader.listed(images)
        texts = text_arrays.one_each(prompt, len(images))
        text_arrays.check_room(self.vocabulary, texts, self.max_len, config.min_new_tokens)
        rows = own_seeds(seeds, len(images))
        batches = list(self._reader.batches(images, False))
        if len(batches) > 1:
            raise ValueError(f"more images than batch_size={self.batch_size} are streamed at once")
        if not batches:
            return
        pixels = batches[0]
        size = self._devices.bucket(len(pixels))
        begin = text_arrays.prompts(self.vocabulary, texts, size)
        with self._devices.context():
            self._begin_decoding()
            tokens = self._image_tokens(pixels, size)
            steps = driver.stream(
                self._spec,
                self._decoder_weights,
                tokens,
                begin.tokens,
                begin.lengths,
                config,
                **_rows(rows, size),
            )
        while True:
            with self._devices.context():
                decoded = next(steps, None)
            if decoded is None:
                return
            yield text_arrays.captions(self.vocabulary, begin.ids, decoded, by_log_prob=False)

    def _caption_batch(
        self, pixels: np.ndarray, prompts: list[str], config: GenerationConfig, rows: np.ndarray
    ) -> list[list[Caption]]:
        size = self._devices.bucket(len(prompts))
        prompt = text_arrays.prompts(self.vocabulary, prompts, size)
        with self._devices.context():
            self._begin_decoding()
            tokens = self._image_tokens(pixels, size)
            decoded = driver.generate(
                self._spec,
                self._decoder_weights,
                tokens,
                prompt.tokens,
                prompt.lengths,
                config,
                **_rows(rows, size),
            )
            decoded = self._programs.gather(decoded)
        return text_arrays.captions(
            self.vocabulary, prompt.ids, decoded, by_log_prob=config.streams
        )

    def image_tokens(self, pixels: np.ndarray) -> tuple[np.ndarray, jax.Array]:
        """Embeddings float32 [b, E], L2-normalised, of images uint8 [b, S, S, 3], at most
        `batch_size`; and their image tokens on the devices, [bucket of batch_size, Q, D]."""
        size = self._devices.bucket(self.batch_size)
        with self._devices.context():
            embedding, tokens = self._programs.encode_image(
                self.params, self._devices.put(pixels, size)
            )
        return np.asarray(embedding)[: len(pixels)], tokens

    def caption_tokens(
        self,
        tokens: Sequence[jax.Array],
        counts: Sequence[int],
        seeds: Sequence[int],
        prompt: str,
        config: GenerationConfig,
        rows: int,
    ) -> list[list[Caption]]:
        """`captions` of images whose tokens `image_tokens` gave, counts[i] of them in tokens[i].

        Rows whose captions end take the next images (continuous batching). seeds: a number for
        each image; rows: captions in flight, rounded up to batches. An image's captions are the
        same to the bit whenever the whole call is; in other company their sums may round
        otherwise.
        """
        config.check_ids(self.vocabulary.size)
        text_arrays.check_room(self.vocabulary, [prompt], self.max_len, config.min_new_tokens)
        size = self._devices.bucket(self.batch_size)
        known = text_arrays.prompts(self.vocabulary, [prompt] * size, size)
        numbers = np.asarray(seeds, np.uint32)
        ends = np.cumsum(counts)
        blocks = (
            continuous.Block(
                one,
                known.tokens,
                known.lengths,
                np.pad(numbers[end - count : end], (0, size - count)),
                count,
            )
            for one, count, end in zip(tokens, counts, ends)
        )
        with self._devices.context():
            decoded = continuous.generate(
                self._spec, self._decoder_weights, blocks, config, -(-rows // size) * size
            )
        return text_arrays.captions(
            self.vocabulary,
            [known.ids[0]] * len(numbers),
            decoded,
            by_log_prob=config.streams,
        )

    def _begin_decoding(self) -> None:
        """On a CPU a large model's decoding may have its kernels compiled, for seconds: better
        beside the image encoder's program than after it."""
        _ = self._decoding

    @functools.cached_property
    def _decoding(self) -> Future[tuple[text_decoder.Decoder, Layout]]:
        spec = text_decoder.decoder(
            self.config.model,
            num_ids=self.vocabulary.size,
            eos_id=self.vocabulary.eos_id,
            hidden_id=self.vocabulary.hidden_id,
            platform=self._devices.platform,
        )
        aside = ThreadPoolExecutor(1, "decoding")
        chosen = aside.submit(text_decoder.fastest, spec, self.params, self._devices.platform)
        aside.shutdown(wait=False)
        return chosen

    @property
    def _spec(self) -> text_decoder.Decoder:
        return self._decoding.result()[0]

    @functools.cached_property
    def _decoder_weights(self) -> dict:
        with self._devices.context():
            return text_decoder.pack(self._spec, self.params, self._decoding.result()[1])

    @text_arrays.warn_truncated()
    def answer(
        self,
        images: Any,
        questions: str | Sequence[str],
        generation_config: GenerationConfig | None = None,
        *,
        progress: bool = False,
        **overrides: Any,
    ) -> list[str]:
        """The answer that the decoder writes behind each question about each image.

        generation_config, overrides: as of `caption`. Raises ValueError unless there are as many questions as images. Warns
        where the model's run trained on data that ask nothing.
        """
        images = self._reader.listed(images)
        questions = text_arrays.listed(questions)
        if len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions for {len(images)} images; give one each")
        trained_on = [supervision.of(Entry.of(one)) for one in self.config.data.sources]
        if trained_on and not any(kind.asks for kind in trained_on):  # an export does not say
            warnings.warn(
                "no source of this model's data.sources is of kind='question': it was not trained "
                "to answer, and may write nothing",
                stacklevel=3,
            )
        prompts = []
        for question in questions:
            ids = self.vocabulary.encode_question(question, self.max_len)
            whole = len(ids) > len(self.vocabulary.encode(question))
            text_arrays.note_cuts([not whole], self.max_len)
            prompts.append(question if whole else self.vocabulary.decode(ids[1:]))
        written = self.caption(
            images, generation_config, prompt=prompts, progress=progress, **overrides
        )
        known = [self.vocabulary.decode(self.vocabulary.encode(prompt)) for prompt in prompts]
        return [text[len(prompt) :].strip() for text, prompt in zip(written, known)]

    @property
    def explains(self) -> bool:
        """Whether `explain` is for this model: its images are of one shape."""
        return self.resize != "native"

    @text_arrays.warn_truncated()
    def explain(
        self, images: Any, texts: str | Caption | Sequence[str | Caption], *, progress: bool = False
    ) -> list[Explanation]:
        """How probable each word of text i is for image i, what else could have stood there, and
        where the model looked; see `explain.Explanation`.

        texts: captions of `captions` (their tokens are taken as they were written) or texts. One
        pass by the reference form of the operations. Raises ValueError unless there are as many
        texts as images.
        """
        if not self.explains:
            raise ValueError("explain takes square images; this model has data.resize='native'")
        ids = []
        for text in text_arrays.listed(texts, (str, Caption)):
            if isinstance(text, Caption):
                ids.append(list(text.tokens))
            else:
                tokens, valid = self._tokenize([text])
                ids.append(tokens[0, : np.flatnonzero(valid[0])[-1] + 1].tolist())
        grid = shapes.grid(self.image_size, self.config.model.patch_size)
        shape = (self.num_frames,) * bool(self.num_frames) + grid
        found: list[Explanation] = []
        for pixels in self._reader.batches(images, progress):
            known = ids[len(found) : len(found) + len(pixels)]
            if len(known) != len(pixels):
                raise ValueError(f"{len(ids)} texts for more images; give one text an image")
            # As long as texts may be, so that one program serves all: the picture is what costs.
            rows = text_arrays.known_rows(self.vocabulary, known, self.max_len)
            arrays = self._run(self._explain, pixels, *rows)
            found += explain.explanations(self.vocabulary, known, arrays, shape)
        if len(found) != len(ids):
            raise ValueError(f"{len(ids)} texts for {len(found)} images; give one text an image")
        return found

    @functools.cached_property
    def _explain(self) -> Callable:
        return explain.program(
            self._programs.module, self.config.model, self._devices, self.vocabulary.size
        )

    # -- the whole model ---------------------------------------------------------------------------

    def forward(self, pixels: np.ndarray, token_ids: np.ndarray) -> Forward:
        """The whole model on prepared input.

        pixels: float [N, S, S, 3], normalised as `models.pixels.normalise_pixels` does. token_ids:
        int [N, L], begin symbol first.
        Tokens up to and including the first end symbol are valid; with CLIP's tokenizer, as in
        open_clip, every token that is not the padding id. Raises ValueError for whole numbers as
        pixels, and when the shapes do not fit the model.
        """
        pixels = np.asarray(pixels)
        if pixels.dtype.kind in "biu":
            raise ValueError(
                f"pixels are {pixels.dtype}: forward takes normalised floats; give "
                "coca_jax.models.image_encoder.normalise_pixels(pixels, model.config.model), or call "
                "encode_image"
            )
        tokens = np.asarray(token_ids)
        if tokens.ndim != 2 or len(tokens) != len(pixels):
            raise ValueError(
                f"token_ids has shape {tokens.shape} for {len(pixels)} images; give [N, L]"
            )
        ids = self.config.model.text.vocab_size
        tokens = text_arrays.checked_ids(tokens, "token_ids", ids)
        valid = text_arrays.validity(self.vocabulary, tokens)
        out = self._run(self._programs.forward, np.asarray(pixels, np.float32), tokens, valid)
        return Forward(*out)


def _rows(rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """What `loop.generate` takes of the rows of a batch of `size`, of which the first are real."""
    padded = np.pad(rows.astype(np.uint32), (0, size - len(rows)))
    return dict(rows=padded, active=np.arange(size) < len(rows))


# What `coca_jax.load` returns for image and text towers without a decoder, as CLIP's.


OF_A_DECODER = (
    *("caption", "captions", "stream_captions", "explain", "answer", "score"),
    *("caption_log_likelihood", "forward"),
)


class TwoTowerModel(Encoders):
    """Embeddings, similarity, zero-shot and features; see `model.CoCaModel` for its arguments.

    It writes no captions and scores no texts by likelihood: such methods are missing.
    """

    @property
    def family(self) -> str:
        """Whose towers they are, a name of config/heads.py."""
        return self.config.model.family

    def __getattr__(self, name: str) -> Any:
        if name in OF_A_DECODER:
            raise AttributeError(
                f"{name}: a model of the family {self.family!r} has no decoder and writes no texts"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _tokenize(
        self, texts: Sequence[str], labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """By the family's rules, see data/tower_texts.py."""
        model = self.config.model
        if heads.tower_kind(self.family).causal:
            texts = tower_texts.clean(texts, model)
            return text_arrays.tokenize(self.vocabulary, texts, self.max_len)
        tokens, valid, cut = tower_texts.padded(texts, self.vocabulary, model)
        text_arrays.note_cuts(cut, self.max_len)
        return tokens, valid

    def _trimmed(self, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All of it where the tower sees the padding too."""
        causal = heads.tower_kind(self.family).causal
        return super()._trimmed(tokens, valid) if causal else (tokens, valid)


class VisionModel(Encoders):
    """An image encoder alone: `encode_image`, `encode_video` and `features`.

    An embedding is the normalised class token. Methods that read or write texts are errors.
    """

    def __getattr__(self, name: str) -> Any:
        if name in OF_A_DECODER:
            raise AttributeError(f"{name}: an image encoder alone reads and writes no texts")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _module(self, params: dict) -> vision.Vision:
        return vision.build(self.config.model, platform=self._devices.platform)

    def _tokenize(
        self, texts: Sequence[str], labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        self.vocabulary.encode_many(texts)
        raise AssertionError  # its vocabulary raises


def model_class(family: str) -> Any:
    """The class of loaded models of a family, `config.model.family`."""
    return {"coca": CoCaModel, "vision": VisionModel}.get(family, TwoTowerModel)


def refuse(model: Encoders, checkpoint: str) -> None:
    """Raises ValueError for a model without a decoder, where captions are to be written;
    checkpoint: the flag's value."""
    if not model.writes_captions:
        raise ValueError(
            f"--checkpoint={checkpoint}: a model of the family {model.config.model.family!r} has "
            "no decoder; it writes no captions"
        )
