"""A trained model as people use it: embeddings, captions, scores, zero-shot classes.

    model = coca_jax.load("runs/demo")
    model.caption(["cat.jpg", "dog.jpg"])

TensorFlow is never imported here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from PIL import Image

from coca_jax import compile_cache, export_format, generation, partitioning, storage
from coca_jax.data import image_files, videos, vocabulary
from coca_jax.data import images as image_data
from coca_jax.data import prompts as prompt_sets
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.decode_settings import Settings
from coca_jax.models import coca, decoding, head_kinds, roles
from coca_jax.train_step import caption_targets, normalise_pixels

WHOLE = P()


@dataclasses.dataclass(frozen=True)
class Caption:
    """text: prompt included; log_prob: of the new tokens under the model, in nats; num_tokens: how
    many those are, the end symbol included; finished: whether the end symbol came."""

    text: str
    log_prob: float
    num_tokens: int
    finished: bool


class Forward(NamedTuple):
    """What one forward pass gives, as NumPy arrays.

    image_embedding, text_embedding: float32 [N, E], L2-normalised. logits: float32 [N, L, V],
    position t predicts token t + 1. image_tokens: float32 [N, Q, D], what the decoder attends to.
    """

    image_embedding: np.ndarray
    text_embedding: np.ndarray
    logits: np.ndarray
    image_tokens: np.ndarray


class CoCaModel:
    """A model, its vocabulary and its image preprocessing.

    Images are paths, PIL images, encoded bytes, arrays [h, w, 3], uint8 arrays [N, h, w, 3], or a
    list of these; one alone counts as a list of one. Images of the model's size are used as they
    are. With `num_frames` T they are videos: paths or bytes of animations and video files, uint8
    arrays [t, h, w, 3] in a list or [N, t, h, w, 3]; T frames of each are sampled uniformly (a
    still image is repeated), encoded one by one and pooled (CoCa.pool). Calls run in batches,
    padded to a power of two so that few programs are compiled, split over the devices; with
    `progress` they show a bar.

    Args:
        config: of the run; `model` is needed, `data.resize` or `preprocess.resize` is used.
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
        head_kind: what the task head reads; None without one.

    Raises:
        ValueError: the vocabulary is larger than the model's, or the config impossible.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: dict,
        vocabulary: Vocabulary,
        *,
        batch_size: int = 64,
        num_frames: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        model = config.model
        if vocabulary.size > model.text.vocab_size:
            raise ValueError(
                f"the vocabulary has {vocabulary.size} ids and model.text.vocab_size is "
                f"{model.text.vocab_size}; use the vocabulary that the model was trained with"
            )
        self.config, self.vocabulary, self.batch_size = config, vocabulary, batch_size
        self.image_size: int = model.image_size
        self.max_len: int = model.text.max_len
        self.resize: str = _resize_mode(config)
        if num_frames is None:
            num_frames = config.get("data", {}).get("num_frames", 0)
        self.num_frames: int = check_frames(num_frames)
        self._devices = devices
        self._mesh, self.params = _place(params, devices)
        self._parts = partitioning.batch_parts(self._mesh) if self._mesh else 1
        if class_names is None:
            class_names = config.get("class_names", ())
        self.class_names = list(class_names) if roles.has_task_head(params) else []
        self._module = coca.build(
            model,
            sigmoid=roles.sigmoid_bias(params) is not None,
            head=config.head if roles.has_task_head(params) else None,
            num_classes=len(self.class_names),
        )
        with_head = roles.has_task_head(params)
        self.head_kind = head_kinds.of(config.head.kind) if with_head else None
        self._spec = decoding.decoder(
            model,
            num_ids=vocabulary.size,
            eos_id=vocabulary.eos_id,
            hidden_id=vocabulary.hidden_id,
        )

    def set_params(self, params: dict) -> None:
        """Puts other parameters of the same shapes in place, on the same devices: programs stay
        compiled. {} lets go of those that there are, until the next."""
        self.__dict__.pop("_decoder_weights", None)
        self.params = _place(params, self._devices)[1] if params else {}

    # -- embeddings -----------------------------------------------------------------------------

    def encode_image(self, images: Any, *, progress: bool = False) -> np.ndarray:
        """Images -> float32 [N, E], L2-normalised."""

        def embed(params: dict, pixels: jax.Array) -> jax.Array:
            return self._encode_image(params, pixels)[0]  # the tokens stay where they are

        parts = [self._run(embed, pixels) for pixels in self._pixel_batches(images, progress)]
        return _joined(parts, (self.config.model.embed_dim,))

    def encode_video(
        self, videos: Any, num_frames: int = 0, *, progress: bool = False
    ) -> np.ndarray:
        """Videos -> float32 [N, E]: the mean of their frames' embeddings, L2-normalised.

        num_frames: of each, sampled uniformly; 0: the model's, or 16 as in the paper where the
        model takes images.
        """
        frames = check_frames(num_frames) or self.num_frames or 16
        parts = [
            self._run(self._encode_image, clips)[0]
            for clips in self._pixel_batches(videos, progress, frames)
        ]
        return _joined(parts, (self.config.model.embed_dim,))

    def encode_text(
        self, texts: str | Sequence[str], *, labels: bool = False, progress: bool = False
    ) -> np.ndarray:
        """Texts -> float32 [N, E], L2-normalised.

        labels: the texts are class names in prompts; a model trained with data.label_token then
        sees its label symbol before them.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        parts = [
            self._run(self._encode_text, *self._tokenize(batch, self._marked(labels)))
            for batch in self._batches(texts, progress, "text")
        ]
        return _joined(parts, (self.config.model.embed_dim,))

    def similarity(self, images: Any, texts: Sequence[str]) -> np.ndarray:
        """Cosine similarity of every image with every text: float32 [N, M]."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def zero_shot(
        self,
        images: Any,
        class_names: Sequence[str],
        templates: Sequence[str] = prompt_sets.PHOTO,
        *,
        progress: bool = False,
    ) -> np.ndarray:
        """Probability of every class for every image: float32 [N, C], rows sum to 1.

        A class is the normalised mean of its prompts' embeddings (Radford et al. 2021); templates
        hold '{}' once. The probabilities use the model's temperature. Raises ValueError for a
        template without '{}' or no class.
        """
        templates = prompt_sets.check(templates)
        if not len(class_names):
            raise ValueError("class_names is empty; give the names to choose among")
        texts = [template.replace("{}", name) for name in class_names for template in templates]
        mean = (
            self.encode_text(texts, labels=True)
            .reshape(len(class_names), len(templates), -1)
            .mean(1)
        )
        classes = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        scale = np.exp(np.asarray(roles.log_scale(self.params)))
        logits = scale * self.encode_image(images, progress=progress) @ classes.T
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    # -- the task head --------------------------------------------------------------------------

    def classify(
        self, images: Any, texts: Sequence[str] | None = None, *, progress: bool = False
    ) -> np.ndarray:
        """Probability of every class of the task head: float32 [N, C], columns as class_names.

        texts: the question or statement beside each image, for a head that reads one. Of a head
        over pairs images is a list of pairs or an array [N, 2, h, w, 3].
        Raises ValueError for a model without a head, or texts that are missing or too many.
        """
        head = self._module.task_head
        if head is None:
            raise ValueError("this model has no task head; use zero_shot, or train with head.kind")
        pair = head.kind.images > 1
        clips = bool(self.num_frames)
        images = [one for pair in images for one in pair] if pair else as_list(images, clips)
        count = len(images) // head.kind.images
        texts = [""] * count if not head.kind.reads_text and texts is None else texts
        if texts is None or len(texts) != count:
            raise ValueError(
                f"{0 if texts is None else len(texts)} texts for {count} "
                f"{'pairs' if pair else 'images'}; a head of kind {head.kind.name!r} takes one each"
            )
        parts, done = [], 0
        for pixels in self._pixel_batches(images, progress, even=pair):
            if pair:
                pixels = pixels.reshape((-1, head.kind.images) + pixels.shape[1:])
            tokens, lengths = self._questions(texts[done : done + len(pixels)])
            parts.append(self._run(self._classify, pixels, tokens, lengths))
            done += len(pixels)
        return _joined(parts, (head.num_classes,))

    def answer(
        self, images: Any, questions: Sequence[str], *, progress: bool = False, **how: Any
    ) -> list[str]:
        """The answer that the decoder writes behind each question about each image.

        how: as of `caption`. Raises ValueError unless there are as many questions as images.
        """
        images = as_list(images, bool(self.num_frames))
        if isinstance(questions, str) or len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions for {len(images)} images; give one each")
        prompts = []
        for question in questions:
            ids = self.vocabulary.encode_question(question, self.max_len)
            whole = len(ids) > len(self.vocabulary.encode(question))
            prompts.append(question if whole else self.vocabulary.decode(ids[1:]))
        written = self.caption(images, prompts, progress=progress, **how)
        known = [self.vocabulary.decode(self.vocabulary.encode(prompt)) for prompt in prompts]
        return [text[len(prompt) :].strip() for text, prompt in zip(written, known)]

    def features(self, images: Any, *, progress: bool = False) -> np.ndarray:
        """Images -> float32 [N, W], the mean of the image encoder's tokens (of all frames of a
        video): what probes read."""
        parts = [
            self._run(self._features, pixels) for pixels in self._pixel_batches(images, progress)
        ]
        return _joined(parts, (self.config.model.image.width,))

    # -- captions -------------------------------------------------------------------------------

    def caption(
        self, images: Any, prompt: str | Sequence[str] = "", *, progress: bool = False, **how: Any
    ) -> list[str]:
        """The best caption of each image. how: fields of `decode_settings.Settings`.

        prompt: how captions begin, one text for all images or one each. Raises ValueError for
        settings that exclude each other, a prompt without room, or a wrong number of prompts.
        """
        found = self.captions(images, prompt, progress=progress, **how)
        return [captions[0].text for captions in found]

    def captions(
        self,
        images: Any,
        prompt: str | Sequence[str] = "",
        *,
        seeds: Sequence[int] | None = None,
        progress: bool = False,
        **how: Any,
    ) -> list[list[Caption]]:
        """`num_captions` captions of each image with their log probabilities, most probable first
        (beams: by the score that ranked them).

        seeds: a number for each image that makes its random numbers its own; default: its place in
        the list. With the same `seed` and number an image gets the same captions in any company.
        """
        try:
            settings = Settings(**how)
        except TypeError as error:
            names = ", ".join(f.name for f in dataclasses.fields(Settings))
            raise ValueError(f"unknown option of captions ({error}); choose from {names}") from None
        captions: list[list[Caption]] = []
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for pixels in self._pixel_batches(images, progress):
            start, count = len(captions), len(pixels)
            chosen = prompts * count if isinstance(prompt, str) else prompts[start : start + count]
            numbers = np.arange(start, start + count)
            if seeds is not None:
                numbers = np.asarray(seeds[start : start + count], np.uint32)
            if len(chosen) != count or len(numbers) != count:
                raise ValueError(
                    f"{len(prompts)} prompts or seeds for more images than that; give one each"
                )
            captions += self._caption_batch(pixels, chosen, settings, numbers)
        return captions

    def _caption_batch(
        self, pixels: np.ndarray, prompts: list[str], settings: Settings, rows: np.ndarray
    ) -> list[list[Caption]]:
        vocabulary = self.vocabulary
        by_text = {text: [vocabulary.bos_id] + vocabulary.encode(text) for text in set(prompts)}
        ids = [by_text[text] for text in prompts]
        count, size = len(ids), self._bucket(len(ids))
        slots = 1 << (max(len(row) for row in ids) - 1).bit_length()
        prompt = np.full((size, slots), vocabulary.bos_id, np.int32)
        length = np.ones(size, np.int32)
        for row, known in enumerate(ids):
            prompt[row, slots - len(known) :] = known
            length[row] = len(known)
        rows = np.pad(rows.astype(np.uint32), (0, size - count))
        with self._context():
            image_tokens = self._encode_image(self.params, self._put(_pad(pixels, size)))[1]
            out = generation.generate(
                self._spec,
                self._decoder_weights,
                image_tokens,
                prompt,
                length,
                settings,
                rows=rows,
                active=np.arange(size) < count,
            )
            out = self._gather(out)
        tokens, lengths, log_probs = (np.asarray(x) for x in out)
        captions = []
        for row in range(count):
            found = [
                Caption(
                    text=vocabulary.decode(ids[row][1:] + new[:n].tolist()),
                    log_prob=float(log_prob),
                    num_tokens=int(n),
                    finished=bool(n) and int(new[n - 1]) == vocabulary.eos_id,
                )
                for new, n, log_prob in zip(tokens[row], lengths[row], log_probs[row])
            ]
            if settings.num_beams == 1:
                found.sort(key=lambda caption: -caption.log_prob)
            captions.append(found)
        return captions

    # -- scores ---------------------------------------------------------------------------------

    def caption_log_likelihood(
        self, images: Any, texts: Sequence[str], *, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """How probable text i is for image i.

        Returns (sum of log probabilities in nats, float32 [N]; predicted tokens, int32 [N]): all
        tokens after the begin symbol, the end symbol included. Raises ValueError unless there
        are as many texts as images.
        """
        texts = list(texts)
        sums, counts = [], []
        done = 0
        for pixels in self._pixel_batches(images, progress):
            batch = texts[done : done + len(pixels)]
            done += len(pixels)
            if len(batch) != len(pixels):
                raise ValueError(f"{len(texts)} texts for more images; give one text an image")
            tokens, valid = self._tokenize(batch)
            sums.append(self._run(self._log_likelihood, pixels, tokens, valid))
            counts.append(valid[:, 1:].sum(1).astype(np.int32))
        if done != len(texts):
            raise ValueError(f"{len(texts)} texts for {done} images; give one text an image")
        return _joined(sums, ()), _joined(counts, ()).astype(np.int32)

    def score(
        self,
        images: Any,
        texts: Sequence[str],
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
        tokens, valid = self._tokenize(list(texts), self._marked(labels))
        with self._context():
            states = self._text_states(self.params, tokens, valid)
        rows = []
        for pixels in self._pixel_batches(images, progress):
            count, size = len(pixels), self._bucket(len(pixels))
            with self._context():
                image = self._encode_image(self.params, self._put(_pad(pixels, size)))[1]
            pairs = np.stack(np.meshgrid(np.arange(count), np.arange(len(tokens)), indexing="ij"))
            pairs = pairs.reshape(2, -1).astype(np.int32)
            parts = []
            for start in range(0, pairs.shape[1], self.batch_size):
                i, t = pairs[:, start : start + self.batch_size]
                inputs = (_pad(x, self._bucket(len(i))) for x in (i, t))
                with self._context():
                    out = self._pair_scores(self.params, image, states, tokens, valid, *inputs)
                parts.append(np.asarray(out)[: len(i)])
            rows.append(_joined(parts, ()).reshape(count, len(tokens)))
        scores = _joined(rows, (len(tokens),))
        return scores / valid[:, 1:].sum(1) if per_token else scores

    def num_tokens(self, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Tokens of each text that `score` predicts, the end symbol included: int32 [M]."""
        _, valid = self._tokenize(list(texts), self._marked(labels))
        return valid[:, 1:].sum(1).astype(np.int32)

    def forward(self, pixels: np.ndarray, token_ids: np.ndarray) -> Forward:
        """The whole model on prepared input.

        pixels: float [N, S, S, 3], already normalised. token_ids: int [N, L], begin symbol first.
        Tokens up to and including the first end symbol are valid; with CLIP's tokenizer, as in
        open_clip, every token that is not the padding id. Raises ValueError when the shapes do not
        fit the model.
        """
        tokens = np.asarray(token_ids, np.int32)
        if tokens.ndim != 2 or len(tokens) != len(pixels):
            raise ValueError(
                f"token_ids has shape {tokens.shape} for {len(pixels)} images; give [N, L]"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._spec.vocab_size:
            raise ValueError(
                f"token_ids holds {tokens.min()}..{tokens.max()}; ids go from 0 to "
                f"{self._spec.vocab_size - 1}"
            )
        if self.vocabulary.hidden_id is not None:
            valid = tokens != self.vocabulary.hidden_id
        else:
            ended = np.cumsum(tokens == self.vocabulary.eos_id, axis=1)
            valid = np.pad(ended, ((0, 0), (1, 0)))[:, :-1] == 0
        with self._context():
            out = self._forward(self.params, np.asarray(pixels, np.float32), tokens, valid)
        return Forward(*(np.asarray(x) for x in out))

    def checksum(self) -> str:
        """Tells these weights from others, the same on any mesh: 16 hexadecimal digits."""
        with self._context():
            found = self._bits(self.params)
        leaves = jax.tree_util.tree_leaves_with_path(found)
        text = "".join(f"{jax.tree_util.keystr(path)} {int(x)}\n" for path, x in leaves)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def _bits(self) -> Callable:
        def bits(x: jax.Array) -> jax.Array:
            whole = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
            return jnp.sum(jax.lax.bitcast_convert_type(x, whole).astype(jnp.uint32))

        return self._jit(lambda params: jax.tree.map(bits, params))

    # -- programs -------------------------------------------------------------------------------

    def _apply(self, params: dict, *inputs: Any, method: Any = None) -> Any:
        return self._module.apply({"params": params}, *inputs, method=method)

    @functools.cached_property
    def _encode_image(self) -> Callable:
        def run(params: dict, image: jax.Array) -> tuple[jax.Array, jax.Array]:
            pixels = normalise_pixels(image, self.config.model)
            return self._apply(params, pixels, method="encode_image")

        return self._jit(run, (WHOLE, partitioning.spec("batch")))

    @functools.cached_property
    def _features(self) -> Callable:
        def mean(module: coca.CoCa, pixels: jax.Array) -> jax.Array:
            tokens = coca.all_tokens(module.encode_pixels(pixels))
            return tokens.astype(jnp.float32).mean(1)

        def run(params: dict, image: jax.Array) -> jax.Array:
            return self._apply(params, normalise_pixels(image, self.config.model), method=mean)

        return self._jit(run)

    @functools.cached_property
    def _classify(self) -> Callable:
        def run(
            params: dict, image: jax.Array, tokens: jax.Array, prompt_len: jax.Array
        ) -> jax.Array:
            pixels = normalise_pixels(image, self.config.model)
            logits = self._apply(params, pixels, tokens, prompt_len, method="classify")
            return jax.nn.softmax(logits)

        return self._jit(run)

    @functools.cached_property
    def _encode_text(self) -> Callable:
        def run(params: dict, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            return self._apply(params, tokens, valid, method="encode_text")

        return self._jit(run)

    @functools.cached_property
    def _log_likelihood(self) -> Callable:
        def run(params: dict, image: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            pixels = normalise_pixels(image, self.config.model)
            out = self._apply(params, pixels, tokens, valid)
            return _sum_log_probs(out.states, out.kernel, out.bias, tokens, valid)

        return self._jit(run)

    @functools.cached_property
    def _text_states(self) -> Callable:
        def states(module: coca.CoCa, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            return module.text_decoder.encode(tokens, valid)[0]

        def run(params: dict, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            return self._apply(params, tokens, valid, method=states)

        return self._jit(run)

    @functools.cached_property
    def _pair_scores(self) -> Callable:
        def fuse(module: coca.CoCa, states: jax.Array, image: jax.Array) -> tuple:
            return module.text_decoder.fuse(states, image), module.text_decoder.output_layer()

        def run(
            params: dict,
            image: jax.Array,
            states: jax.Array,
            tokens: jax.Array,
            valid: jax.Array,
            i: jax.Array,
            t: jax.Array,
        ) -> jax.Array:
            fused, (kernel, bias) = self._apply(params, states[t], image[i], method=fuse)
            return _sum_log_probs(fused, kernel, bias, tokens[t], valid[t])

        return self._jit(run)

    @functools.cached_property
    def _forward(self) -> Callable:
        def run(params: dict, pixels: jax.Array, tokens: jax.Array, valid: jax.Array) -> Forward:
            out = self._apply(params, pixels, tokens, valid)
            image_tokens = out.image_tokens.astype(jnp.float32)
            return Forward(out.image_embedding, out.text_embedding, out.logits, image_tokens)

        return self._jit(run)

    @functools.cached_property
    def _decoder_weights(self) -> dict:
        layout = decoding.best_layout(self._spec, self.params)
        with self._context():
            return decoding.pack(self._spec, self.params, layout)

    def _jit(self, run: Callable, out_spec: Any = WHOLE) -> Callable:
        """A program whose results are whole on every device, and so on every process, unless
        out_spec says otherwise."""
        if self._mesh is None:
            return jax.jit(run)
        return jax.jit(run, out_shardings=partitioning.shardings(self._mesh, out_spec))

    def _context(self) -> Any:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def _put(self, array: np.ndarray) -> Any:
        if self._mesh is None:
            return array
        return _spread(array, NamedSharding(self._mesh, partitioning.spec("batch")))

    @functools.cached_property
    def _gather(self) -> Callable:
        """Results whole on every process."""
        return self._jit(lambda x: x) if self._several_processes() else lambda x: x

    def _several_processes(self) -> bool:
        return self._mesh is not None and self._mesh.is_multi_process

    def _own_rows(self, size: int) -> np.ndarray:
        """Which rows of a batch the devices of this process read: bool [size]."""
        if not self._several_processes():
            return np.ones(size, bool)
        own = np.zeros(size, bool)
        sharding = NamedSharding(cast(Mesh, self._mesh), partitioning.spec("batch"))
        for (rows,) in sharding.addressable_devices_indices_map((size,)).values():
            own[rows] = True
        return own

    def _run(self, program: Callable, *arrays: np.ndarray) -> Any:
        """program(params, *arrays) with the first axis padded to a bucket and cut again."""
        count = len(arrays[0])
        size = self._bucket(count)
        with self._context():
            out = program(self.params, *(self._put(_pad(array, size)) for array in arrays))
        return jax.tree.map(lambda x: np.asarray(x)[:count], out)

    def _bucket(self, count: int) -> int:
        """The power of two that holds `count`, as a multiple of the devices."""
        size = 1 << max(count - 1, 0).bit_length()
        return -(-size // self._parts) * self._parts

    # -- inputs ---------------------------------------------------------------------------------

    def _marked(self, labels: bool) -> bool:
        """Whether label texts get the label symbol: it is in the texts of such a training run."""
        return labels and bool(self.config.get("data", {}).get("label_token", False))

    def _tokenize(
        self, texts: Sequence[str], labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and validity [N, L], L the smallest multiple of 16 that leaves a place of padding
        (open_clip's shifted mask reads it) or max_len."""
        marks = [True] * len(texts) if labels else None
        tokens, valid = self.vocabulary.encode_batch(texts, self.max_len, marks)
        used = np.flatnonzero(valid.any(0))
        longest = int(used[-1]) + 1 if len(used) else 1
        length = min(-(-(longest + 1) // 16) * 16, self.max_len)
        return tokens[:, :length], valid[:, :length]

    def _questions(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N, L] of questions, L a multiple of 16 or max_len, and their lengths [N]."""
        ids = [self.vocabulary.encode_question(text, self.max_len) for text in texts]
        lengths = np.array([len(row) for row in ids], np.int32)
        length = min(-(-int(lengths.max()) // 16) * 16, self.max_len)
        tokens = np.full((len(ids), length), self.vocabulary.pad_id, np.int32)
        for row, known in zip(tokens, ids):
            row[: len(known)] = known
        return tokens, lengths

    def _batches(
        self, items: Sequence, progress: bool, unit: str, size: int = 0
    ) -> Iterator[Sequence]:
        size = size or self.batch_size
        with tqdm.tqdm(total=len(items), unit=unit, disable=not progress) as bar:
            for start in range(0, len(items), size):
                batch = items[start : start + size]
                yield batch
                bar.update(len(batch))

    def _pixel_batches(
        self, images: Any, progress: bool, num_frames: int = 0, *, even: bool = False
    ) -> Iterator[np.ndarray]:
        """uint8 [b, S, S, 3], b even where asked, of videos [b, T, S, S, 3]; the next batch is
        read by threads while one is used."""
        frames = num_frames or self.num_frames
        images = as_list(images, bool(frames))
        size = max(self.batch_size // max(frames, 1), 1)
        size += size % 2 if even else 0
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def read(start: int) -> list[concurrent.futures.Future]:
                part = images[start : start + size]
                # Pairs are padded as pairs: every process reads all of them.
                own = np.ones(len(part), bool) if even else self._own_rows(self._bucket(len(part)))
                return [
                    pool.submit(self.preprocess if mine else self._blank, image, frames)
                    for image, mine in zip(part, own)
                ]

            now = read(0)
            for start, batch in zip(
                range(0, len(images), size), self._batches(images, progress, "image", size)
            ):
                following = read(start + len(batch))
                yield np.stack([item.result() for item in now])
                now = following

    def _blank(self, image: Any, frames: int) -> np.ndarray:
        """In place of an image or video that another process decodes."""
        clip = (frames,) if frames else ()
        return np.zeros((*clip, self.image_size, self.image_size, 3), np.uint8)

    def preprocess(self, image: Any, num_frames: int = 0) -> np.ndarray:
        """One image -> uint8 [S, S, 3], one video -> [T, S, S, 3], as in evaluation.

        num_frames: T; 0: the model's. Raises ValueError: cannot be decoded.
        """
        frames = num_frames or self.num_frames
        if frames:
            return np.stack([self._fit(frame) for frame in videos.decode(image, frames)])
        return self._fit(image_data.decode(image))

    def _fit(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[:2] == (self.image_size, self.image_size):
            return pixels
        return image_data.preprocess_eval(pixels, self.image_size, self.resize)


def check_frames(num_frames: int) -> int:
    """Returns it; raises ValueError for what is not a number of frames."""
    if not isinstance(num_frames, int) or num_frames < 0:
        raise ValueError(f"num_frames={num_frames!r}; give the frames of a video, or 0 for images")
    return num_frames


def as_list(images: Any, clips: bool = False) -> Sequence:
    """Images as a sequence: one path, PIL image, encoded image or array [h, w(, c)] becomes a list
    of one, a folder the images in it and below; arrays [N, h, w, c] and lists stay.

    Raises ValueError for anything else, FileNotFoundError for a path that does not exist.

    clips: they are videos, whose arrays have one axis more.
    """
    if isinstance(images, (str, os.PathLike)):
        return image_files.find([os.fspath(images)], video=clips)
    if isinstance(images, (bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if hasattr(images, "ndim"):
        if not 2 <= images.ndim <= 4 + clips:
            raise ValueError(f"image array of shape {images.shape}; give [h, w, 3] or [N, h, w, 3]")
        array = np.asarray(images)
        return cast(Sequence, array) if images.ndim == 4 + clips else [array]
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images of type {type(images).__name__}; give a list, array or path")
    return images


def load(path: str | os.PathLike[str], *, dtype: str | None = None, **options: Any) -> CoCaModel:
    """Loads a model to use.

    Args:
        path: a run's workdir, its checkpoints folder or one step of it (the averaged parameters
            where the run kept them); an export or converted folder; or open_clip's own weights
            (.bin, .pt, .safetensors, or their folder), converted on the way. Local, or in a bucket
            (gs://, s3://).
        dtype: 'float32' or 'bfloat16', of weights and products; default: the run's.
        options: of `CoCaModel`.

    Raises:
        FileNotFoundError: nothing of that kind at `path`.
        ValueError: damaged or mismatched files, or an unknown dtype.
    """
    path = os.fspath(path)
    compile_cache.use()
    place = storage.place(path)
    if not storage.reach(place):
        raise FileNotFoundError(f"{path} does not exist; give a run, an export or weights")
    if place.is_dir() and export_format.is_export(path):
        params, config = export_format.read_export(path)
        words = vocabulary.load(export_format.vocabulary_path(path))
    elif place.is_dir() and not any((place / name).exists() for name in OPEN_CLIP_FILES):
        params, config, words = _read_run(path)
    else:
        with storage.local_copy(path) as copy:
            params, config, words = _read_open_clip(copy)
    if dtype is not None:
        config.model.dtype = dtype
        coca.validate(config.model)
    if config.model.dtype == "bfloat16":
        params = _narrow(params)
    return CoCaModel(config, params, words, **options)


def _read_run(path: str) -> tuple[dict, ConfigDict, Vocabulary]:
    from coca_jax import checkpointing  # Orbax: only where a run is read

    directory, _ = checkpointing.find_step(path)
    params, config = checkpointing.load_params(path)
    file = directory.parent / "vocabulary.model"
    words = vocabulary.load(str(file))
    if config.get("vocabulary_checksum", words.checksum) != words.checksum:
        raise ValueError(f"{file} is not the vocabulary that this run was trained with; restore it")
    return params, config, words


def _read_open_clip(path: str) -> tuple[dict, ConfigDict, Vocabulary]:
    """Through the command, which says in one line what is wrong with a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "coca_jax.convert", f"--input={path}", f"--out={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
        params, config = export_format.read_export(folder)
        words = vocabulary.load(export_format.vocabulary_path(folder))
        return jax.tree.map(jnp.asarray, params), config, words


OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def _narrow(params: dict) -> dict:
    """Matrices and tables in bfloat16; what the model computes in float32 anyway stays."""

    def one(role: roles.Role, x: Any) -> jax.Array:
        narrow = role.kind in ("kernel", "table") and x.ndim > 1 and not role.part.wide
        return jnp.asarray(x, jnp.bfloat16) if narrow else jnp.asarray(x)

    return roles.map_with_roles(one, params)


def _resize_mode(config: ConfigDict) -> str:
    for section in ("preprocess", "data"):
        if section in config and "resize" in config[section]:
            return config[section].resize
    return "squash"


def _place(params: dict, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh | None, dict]:
    """The mesh that params are on and params; None and the only device when there is one."""
    leaf = jax.tree.leaves(params)[0]
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        return cast(Mesh, sharding.mesh), params
    devices = jax.local_devices() if devices is None else list(devices)
    if len(devices) == 1:
        return None, jax.device_put(params, devices[0])
    mesh = partitioning.make_mesh(len(devices), 1, 1, devices)
    return mesh, jax.tree.map(lambda x: _spread(x, NamedSharding(mesh, WHOLE)), params)


def _spread(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds, or at least its rows of it, as one over their devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Rows of zeros to `size` rows."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Parts one after the other; float32 [0, *shape] of none."""
    if not parts:
        return np.zeros((0,) + shape, np.float32)
    return np.concatenate(parts)


def _sum_log_probs(
    states: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    tokens: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """Sum of the log probabilities of each row's tokens after the first: float32 [B].

    states [B, L, D] before the softmax layer. One position at a time: [B, L, V] never exists.
    """
    targets, counted = caption_targets(tokens, valid)
    kernel = kernel.astype(states.dtype)

    def position(inputs: tuple) -> jax.Array:
        state, target, count = inputs
        logits = jnp.dot(state, kernel, preferred_element_type=jnp.float32)
        logits = logits if bias is None else logits + bias
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return jnp.where(count, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

    by_position = (states.swapaxes(0, 1), targets.T, counted.T)
    return jax.lax.map(position, by_position).sum(0)
