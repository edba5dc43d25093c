"""An image encoder alone (`model.family='vision'`): DINOv2, DINOv3, or what a run's encoder became.

Its parameters have the names of CoCa's, so that a captioner can start from them
(`config.init_parts='image'`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from coca_jax import ops as operations
from coca_jax.config import Model, shapes
from coca_jax.models import image_encoder, layers
from coca_jax.models.coca import normalise
from coca_jax.models.image_encoder import ImageEncoder
from coca_jax.models.onnx_encoder import OnnxEncoder


class Vision(nn.Module):
    """An image is its class token, or the mean of its tokens where there is none."""

    encoder: ImageEncoder | OnnxEncoder
    task_head: None = None

    def setup(self) -> None:
        self.image_encoder = self.encoder.copy(name="image_encoder")

    def encode_pixels(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """[B, S, S, 3] -> tokens [B, N, W], of clips [B, T, S, S, 3] -> [B, T, N, W]."""
        if pixels.ndim == 5:
            flat = self.image_encoder(pixels.reshape((-1, *pixels.shape[2:])))
            return flat.reshape((*pixels.shape[:2], *flat.shape[1:]))
        return self.image_encoder(pixels, deterministic=deterministic)

    def encode_image(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, S, 3] -> (embedding float32 [B, W], L2-normalised; the encoder's tokens). Clips
        have the mean of their frames' embeddings."""
        encoded = self.encode_pixels(pixels)
        valid = image_encoder.valid_tokens(pixels, encoded.shape[-2])
        if self.encoder.class_token:
            pooled = encoded[..., 0, :]
        elif encoded.ndim == 4:
            pooled = encoded.mean(2)
        else:
            pooled = image_encoder.mean_token(encoded, valid)
        embedding = normalise(pooled)
        return (normalise(embedding.mean(1)) if encoded.ndim == 4 else embedding), encoded

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.encode_image(pixels)[0]


def build(model: Model, *, platform: str | None = None) -> Vision:
    """Makes the encoder that `config.model` describes."""
    ops = operations.choose(platform or jax.default_backend(), model.implementation)
    image: dict[str, Any] = model.image.to_dict()
    options = layers.BlockOptions.from_config(model, ops, image.pop("block"))
    return Vision(image_encoder.build(model, image, options))


def init(module: Vision, rng: jax.Array) -> dict:
    """Fresh parameters, boxed with their logical axis names."""
    pixels = jnp.zeros((1, *shapes.pair(module.encoder.image_size), 3))
    return module.init(rng, pixels).get("params", {})  # an ONNX file has none
