"""The compiled programs of a model: parameters and arrays in, arrays out.

Shape letters: N images or texts, S image size, L text length, E embedding, Q image tokens, D width,
W width of the image encoder, V vocabulary, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.config import Model
from coca_jax.inference.devices import WHOLE, Devices
from coca_jax.models import coca, image_encoder
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.ops.captioning_loss import caption_targets
from coca_jax.parallel import sharding

_BITS: dict[int, Any] = {2: np.uint16, 4: np.uint32}  # by bytes of a number


class Forward(NamedTuple):
    """What one forward pass gives, as NumPy arrays.

    image_embedding, text_embedding: float32 [N, E], L2-normalised. logits: float32 [N, L, V],
    position t predicts token t + 1. image_tokens: float32 [N, Q, D], what the decoder attends to.
    """

    image_embedding: np.ndarray
    text_embedding: np.ndarray
    logits: np.ndarray
    image_tokens: np.ndarray


class Programs:
    """Each is compiled at its first call, once a shape; its first argument is the parameters.

    Args:
        module: the model.
        normalise: uint8 [N, S, S, 3] -> what the module takes.
        devices: where they run.
    """

    def __init__(self, module: coca.CoCa, model: Model, devices: Devices) -> None:
        self.module, self._devices = module, devices
        self._normalise = functools.partial(normalise_pixels, model=model)

    def run(self, program: Callable, params: dict, *arrays: np.ndarray) -> Any:
        """program(params, *arrays) with the first axis padded to a bucket and cut again; NumPy."""
        count = len(arrays[0])
        size = self._devices.bucket(count)
        with self._devices.context():
            out = program(params, *(self._devices.put(array, size) for array in arrays))
        return jax.tree.map(lambda x: np.asarray(x)[:count], out)

    @functools.cached_property
    def encode_image(self) -> Callable:
        """uint8 [N, S, S, 3] -> embedding float32 [N, E], image tokens [N, Q, D] on the devices."""

        def run(params: dict, image: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._apply(params, self._normalise(image), method="encode_image")

        return self._devices.jit(run, (WHOLE, sharding.spec("batch")))

    @functools.cached_property
    def encode_text(self) -> Callable:
        """tokens int32, valid bool [N, L] -> embedding float32 [N, E]."""

        def run(params: dict, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            return self._apply(params, tokens, valid, method="encode_text")

        return self._devices.jit(run)

    @functools.cached_property
    def features(self) -> Callable:
        """uint8 [N, S, S, 3] -> mean of the image encoder's tokens, float32 [N, W]."""

        def mean(module: coca.CoCa, pixels: jax.Array) -> jax.Array:
            tokens = coca.all_tokens(module.encode_pixels(pixels)).astype(jnp.float32)
            return image_encoder.mean_token(
                tokens, image_encoder.valid_tokens(pixels, tokens.shape[1])
            )

        def run(params: dict, image: jax.Array) -> jax.Array:
            return self._apply(params, self._normalise(image), method=mean)

        return self._devices.jit(run)

    @functools.cached_property
    def classify(self) -> Callable:
        """Images, tokens [N, L], prompt lengths [N] -> probabilities float32 [N, C]."""

        def run(
            params: dict, image: jax.Array, tokens: jax.Array, prompt_len: jax.Array
        ) -> jax.Array:
            pixels = self._normalise(image)
            return jax.nn.softmax(
                self._apply(params, pixels, tokens, prompt_len, method="classify")
            )

        return self._devices.jit(run)

    @functools.cached_property
    def log_likelihood(self) -> Callable:
        """Images, tokens, valid [N, L] -> log probability of each image's text, float32 [N]."""

        def run(params: dict, image: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            out = self._apply(params, self._normalise(image), tokens, valid)
            return _sum_log_probs(out.states, out.kernel, out.bias, tokens, valid)

        return self._devices.jit(run)

    @functools.cached_property
    def text_states(self) -> Callable:
        """tokens, valid [M, L] -> what the multimodal decoder reads of the texts, [M, L, D]."""

        def states(module: coca.CoCa, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            return module.text_decoder.encode(tokens, valid)[0]

        def run(params: dict, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            return self._apply(params, tokens, valid, method=states)

        return self._devices.jit(run)

    @functools.cached_property
    def pair_scores(self) -> Callable:
        """Image tokens [N, Q, D]; states [M, L, D], tokens, valid [M, L] of texts; pairs of image i
        and text t, int32 [B] each -> log probability of each pair's text, float32 [B]."""

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

        return self._devices.jit(run)

    @functools.cached_property
    def forward(self) -> Callable:
        """pixels float32 [N, S, S, 3], tokens, valid [N, L] -> Forward."""

        def run(params: dict, pixels: jax.Array, tokens: jax.Array, valid: jax.Array) -> Forward:
            out = self._apply(params, pixels, tokens, valid)
            image_tokens = out.image_tokens.astype(jnp.float32)
            return Forward(out.image_embedding, out.text_embedding, out.logits, image_tokens)

        return self._devices.jit(run)

    @functools.cached_property
    def gather(self) -> Callable:
        """Results whole on every process."""
        return self._devices.jit(lambda x: x) if self._devices.several_processes else lambda x: x

    @functools.cached_property
    def bit_sums(self) -> Callable:
        """Sum of each parameter's bits, modulo 2^32: the same on any mesh."""
        if self._devices.in_host_memory:
            return _bit_sums_here  # a program of so many parameters takes a second to compile

        def bits(x: jax.Array) -> jax.Array:
            whole = _BITS[x.dtype.itemsize]
            return jnp.sum(jax.lax.bitcast_convert_type(x, whole).astype(jnp.uint32))

        return self._devices.jit(lambda params: jax.tree.map(bits, params))

    def _apply(self, params: dict, *inputs: Any, method: Any = None) -> Any:
        return self.module.apply({"params": params}, *inputs, method=method)


def _bit_sums_here(params: dict) -> dict:
    """`Programs.bit_sums` by NumPy."""

    def bits(x: jax.Array) -> np.uint32:
        return np.asarray(x).view(_BITS[x.dtype.itemsize]).sum(dtype=np.uint32)

    return jax.tree.map(bits, params)


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
