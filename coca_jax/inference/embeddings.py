"""The half of a model that gives embeddings and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.config import Config, StoredConfig, heads, typed
from coca_jax.config.shapes import Size
from coca_jax.data import navit
from coca_jax.data import prompts as prompt_sets
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.inference import fingerprint
from coca_jax.inference import tokenization as text_arrays
from coca_jax.inference.devices import place
from coca_jax.inference.preprocess import ImageReader, check_batch_size, check_frames
from coca_jax.inference.programs import Programs
from coca_jax.models import image_encoder as pixel_values
from coca_jax.models import network, param_groups
from coca_jax.runtime import progress as bars

_SORTED = 32  # batches of texts that are sorted by length together


class Encoders:
    """The encoders of a model, and its task head; see `model.CoCaModel`, which adds the decoder."""

    writes_captions: ClassVar[bool] = False  # whether there is a decoder

    def __init__(
        self,
        config: Config,
        params: dict,
        vocabulary: Vocabulary,
        *,
        batch_size: int = 64,
        num_frames: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        config = typed(config)
        model = config.model
        model.check_vocabulary(
            vocabulary.size, "use the vocabulary that the model was trained with"
        )
        self.config, self.vocabulary = config, vocabulary
        self.stored_dtype: str = model.dtype
        self.step: int | None = None
        self.batch_size = check_batch_size(batch_size)
        self.image_size: Size = model.image_size
        self.max_len: int = model.text.max_len
        self.resize: str = config.data.resize
        if num_frames is None:
            num_frames = config.data.num_frames
        self.num_frames: int = check_frames(num_frames)
        self._given_devices = devices
        self._devices, self.params = place(params, devices)
        if class_names is None:
            class_names = config.class_names if isinstance(config, StoredConfig) else ()
        with_head = param_groups.has_task_head(params)
        self.class_names = (
            _names(class_names, param_groups.num_classes(params)) if with_head else []
        )
        self.head_kind = heads.head_kind(config.head.kind) if with_head else None
        module = self._module(params)
        self._programs = Programs(module, model, self._devices)
        packed = None
        if self.resize == "native":
            packed = navit.patch_size(model), navit.budget(model, config.data)
        self._reader = ImageReader(
            self.image_size, self.resize, self.num_frames, batch_size, self._devices, packed
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """As `pickle` and `copy` take it, for processes that a loader of data starts: what it is
        made of, the parameters on the host. Where it is read it computes on that process's
        devices, and compiles anew."""
        params = jax.tree.map(np.asarray, self.params)
        how = dict(
            batch_size=self.batch_size, num_frames=self.num_frames, class_names=self.class_names
        )
        attributes = {name: vars(self)[name] for name in _ATTRIBUTES if name in vars(self)}
        return _made_again, (type(self), (self.config, params, self.vocabulary), how, attributes)

    def _module(self, params: dict) -> Any:
        """The model that the parameters are of."""
        return network.build(
            self.config.model,
            sigmoid=param_groups.sigmoid_bias(params) is not None,
            platform=self._devices.platform,
            head=self.config.head if self.head_kind else None,
            num_classes=len(self.class_names),
        )

    def set_batch_size(self, batch_size: int) -> None:
        """Images (or frames of videos) or texts at a time from now on: what a loaded model makes of
        them, its `num_frames`, is known by then. Raises ValueError for none."""
        self.batch_size = self._reader.batch_size = check_batch_size(batch_size)

    def set_params(self, params: dict) -> None:
        """Puts other parameters of the same shapes in place, on the same devices: programs stay
        compiled. {} lets go of those that there are, until the next."""
        self.__dict__.pop("_decoder_weights", None)
        self.params = place(params, self._given_devices)[1] if params else {}

    # -- embeddings -----------------------------------------------------------------------------

    def encode_image(self, images: Any, *, progress: bool = False) -> np.ndarray:
        """Images -> float32 [N, E], L2-normalised."""

        def embed(params: dict, pixels: jax.Array) -> jax.Array:
            return self._programs.encode_image(params, pixels)[0]  # the tokens stay there

        parts = [self._run(embed, pixels) for pixels in self._reader.batches(images, progress)]
        return joined(parts, (self.config.model.embed_dim,))

    def encode_video(
        self, videos: Any, num_frames: int = 0, *, progress: bool = False
    ) -> np.ndarray:
        """Videos -> float32 [N, E]: the mean of their frames' embeddings, L2-normalised.

        num_frames: of each, sampled uniformly; 0: the model's, or 16 as in the paper where the
        model takes images.
        """
        frames = check_frames(num_frames) or self.num_frames or 16
        parts = [
            self._run(self._programs.encode_image, clips)[0]
            for clips in self._reader.batches(videos, progress, frames)
        ]
        return joined(parts, (self.config.model.embed_dim,))

    @text_arrays.warn_truncated()
    def encode_text(
        self, texts: str | Sequence[str], *, labels: bool = False, progress: bool = False
    ) -> np.ndarray:
        """Texts -> float32 [N, E], L2-normalised.

        labels: the texts are class names in prompts; a model trained with data.label_token then
        sees its label symbol before them. Raises ValueError for what is not text.
        """
        texts = text_arrays.listed(texts)
        parts = []
        with bars.Bar(len(texts), "texts", shown=progress) as bar:
            for start in range(0, len(texts), _SORTED * self.batch_size):
                some = texts[start : start + _SORTED * self.batch_size]
                tokens, valid = self._tokenize(some, labels)
                # Texts of like length run together: a batch is as long as its longest.
                order = np.argsort(valid.sum(1), kind="stable")
                found = []
                for first in range(0, len(some), self.batch_size):
                    rows = order[first : first + self.batch_size]
                    arrays = self._trimmed(tokens[rows], valid[rows])
                    found.append(self._run(self._programs.encode_text, *arrays))
                    bar.update(len(rows))
                parts.append(joined(found, ())[np.argsort(order)])
        return joined(parts, (self.config.model.embed_dim,))

    def _trimmed(self, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What of texts [N, L], and of their validity, the text tower reads."""
        return text_arrays.trimmed(tokens, valid)

    def encode_tokens(self, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Texts as ids int32 [N, L], begin symbol first, and which are valid, bool [N, L] ->
        float32 [N, E], L2-normalised. Raises ValueError for other shapes, what is no whole number,
        and ids that the model has not."""
        tokens, valid = np.asarray(tokens), np.asarray(valid, bool)
        if tokens.ndim != 2 or valid.shape != tokens.shape:
            raise ValueError(
                f"tokens have shape {tokens.shape} and valid {valid.shape}; give [N, L] of both"
            )
        tokens = text_arrays.checked_ids(tokens, "tokens", self.config.model.text.vocab_size)
        parts = []
        for start in range(0, len(tokens), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self._run(self._programs.encode_text, tokens[rows], valid[rows]))
        return joined(parts, (self.config.model.embed_dim,))

    @property
    def scale(self) -> float:
        """The inverse of the temperature, which cosine similarities are multiplied by as logits."""
        return float(np.exp(np.asarray(param_groups.log_scale(self.params))))

    @text_arrays.warn_truncated()
    def similarity(self, images: Any, texts: str | Sequence[str]) -> np.ndarray:
        """Cosine similarity of every image with every text: float32 [N, M]."""
        return self.encode_image(images) @ self.encode_text(texts).T

    @text_arrays.warn_truncated()
    def zero_shot(
        self,
        images: Any,
        class_names: Sequence[str],
        prompts: str | Sequence[str] | None = None,
        *,
        progress: bool = False,
    ) -> np.ndarray:
        """Probability of every class for every image: float32 [N, C], rows sum to 1.

        A class is the normalised mean of its prompts' embeddings (Radford et al. 2021); prompts
        hold '{}' once, and one may stand alone, or the name of a set in `data.prompts.SETS`;
        default: 'photo'. The probabilities use the model's temperature. Raises ValueError for a
        prompt without '{}', fewer than two classes, or a name that is no text.
        """
        if isinstance(prompts, str):  # no file: `serve` hands on what strangers write
            prompts = prompt_sets.SETS.get(prompts, (prompts,))
        prompts = prompt_sets.check(prompt_sets.PHOTO if prompts is None else prompts)
        if isinstance(class_names, str):
            raise ValueError(f"class_names={class_names!r}: give a list of the names")
        class_names = list(class_names)
        text_arrays.check(class_names, "class_names")
        if len(class_names) < 2:
            raise ValueError(f"class_names={class_names}: give at least two to choose from")
        texts = [prompt.replace("{}", name) for name in class_names for prompt in prompts]
        embeddings = self.encode_text(texts, labels=True)
        mean = embeddings.reshape(len(class_names), len(prompts), -1).mean(1)
        classes = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        logits = self.scale * self.encode_image(images, progress=progress) @ classes.T
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    # -- the task head --------------------------------------------------------------------------

    @text_arrays.warn_truncated()
    def classify(
        self, images: Any, texts: str | Sequence[str] | None = None, *, progress: bool = False
    ) -> np.ndarray:
        """Probability of every class of the task head: float32 [N, C], columns as class_names.

        texts: the question or statement beside each image, for a head that reads one. Of a head
        over pairs images is a list of pairs or an array [N, 2, h, w, 3].
        Raises ValueError for a model without a head, or texts that are missing, too many, or not
        read.
        """
        head = self._programs.module.task_head
        if head is None:
            raise ValueError("this model has no task head; use zero_shot, or train with head.kind")
        pair = head.kind.images > 1
        images = [one for two in images for one in two] if pair else self._reader.listed(images)
        count = len(images) // head.kind.images
        if not head.kind.reads_text:
            if texts is not None:
                raise ValueError(
                    f"texts: a head of kind {head.kind.name!r} reads none; give the images alone"
                )
            texts = [""] * count
        texts = None if texts is None else text_arrays.listed(texts)
        if texts is None or len(texts) != count:
            raise ValueError(
                f"{0 if texts is None else len(texts)} texts for {count} "
                f"{'pairs' if pair else 'images'}; a head of kind {head.kind.name!r} takes one each"
            )
        parts, done = [], 0
        for pixels in self._reader.batches(images, progress, even=pair):
            if pair:
                pixels = pixels.reshape((-1, head.kind.images) + pixels.shape[1:])
            batch = texts[done : done + len(pixels)]
            tokens, lengths = text_arrays.questions(self.vocabulary, batch, self.max_len)
            parts.append(self._run(self._programs.classify, pixels, tokens, lengths))
            done += len(pixels)
        return joined(parts, (head.num_classes,))

    def checksum(self) -> str:
        """Tells this model from others, the same on any mesh: 16 hexadecimal digits of the weights,
        '-' and 16 of what else its embeddings depend on."""
        with self._devices.context():
            found = self._programs.bit_sums(self.params)
        leaves = jax.tree_util.tree_leaves_with_path(found)
        text = "".join(f"{jax.tree_util.keystr(path)} {int(x)}\n" for path, x in leaves)
        weights = hashlib.sha256(text.encode()).hexdigest()[:16]
        return (
            f"{weights}-{fingerprint.of_rest(self.config.model, self.config.data, self.vocabulary)}"
        )

    def features(self, images: Any, *, progress: bool = False) -> np.ndarray:
        """Images -> float32 [N, W], the mean of the image encoder's tokens (of all frames of a
        video): what probes read."""
        parts = [
            self._run(self._programs.features, pixels)
            for pixels in self._reader.batches(images, progress)
        ]
        return joined(parts, (self.config.model.image.width,))

    def preprocess(self, images: Any) -> np.ndarray:
        """Images -> pixels float32 [N, S, S, 3], normalized, as `forward` takes them; videos
        -> [N, T, S, S, 3].

        Raises ValueError for an image that can't be decoded, and for a model that takes images in
        their own aspect ratio.
        """
        if self.resize == "native":
            raise ValueError(
                "preprocess: this model takes images in their own aspect ratio "
                "(data.resize='native'), which has no array of pixels. Call encode_image."
            )
        fitted = jnp.asarray(self._reader.read(images))
        return np.array(pixel_values.normalise_pixels(fitted, self.config.model))

    @text_arrays.warn_truncated()
    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """Texts -> token_ids int32 [N, max_len], as `forward` takes them: begin symbol, tokens, end
        symbol, padding."""
        return self.tokenize_with_mask(texts)[0]

    def fit_image(self, image: Any, num_frames: int = 0) -> np.ndarray:
        """One image -> uint8 [S, S, 3], one video -> [T, S, S, 3]: resized as in evaluation, before
        normalization. `encode_image` uses such arrays as they are.

        num_frames: T; 0: the model's. Raises ValueError: cannot be decoded.
        """
        return self._reader.preprocess(image, num_frames)

    @text_arrays.warn_truncated()
    def tokenize_with_mask(
        self, texts: str | Sequence[str], *, labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts as `encode_tokens` takes them: ids int32 and padding mask bool, [N, max_len].

        labels: as of `encode_text`.
        """
        tokens, valid = self._tokenize(text_arrays.listed(texts), labels)
        room = ((0, 0), (0, self.max_len - tokens.shape[1]))
        return np.pad(tokens, room, constant_values=self.vocabulary.pad_id), np.pad(valid, room)

    def _run(self, program: Callable, *arrays: np.ndarray) -> Any:
        return self._programs.run(program, self.params, *arrays)

    def _tokenize(
        self, texts: Sequence[str], labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and validity [N, L]. Label texts get their symbol where training gave it them."""
        marked = labels and self.config.data.label_token
        return text_arrays.tokenize(self.vocabulary, texts, self.max_len, marked)


def _made_again(
    kind: Callable, made_of: Sequence[Any], how: dict[str, Any], attributes: dict[str, Any]
) -> Encoders:
    """What `Encoders.__reduce__` took apart."""
    model: Encoders = kind(*made_of, **how)
    vars(model).update(attributes)
    return model


_ATTRIBUTES = ("stored_dtype", "step", "generation_config")  # set after the model is made


def _names(given: Sequence[str], classes: int) -> list[str]:
    """The names of the classes of a task head. Raises ValueError for another number of them, and
    for what is no list of texts."""
    if isinstance(given, str):
        raise ValueError(f"class_names={given!r}: give a list of the names")
    names = list(given)
    text_arrays.check(names, "class_names")
    if len(names) != classes:
        raise ValueError(
            f"class_names: {len(names)} names for a task head of {classes} classes; give one for "
            "each, in the order of its outputs"
        )
    return names


def joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Parts one after the other; float32 [0, *shape] of none."""
    if not parts:
        return np.zeros((0,) + shape, np.float32)
    return np.concatenate(parts)
