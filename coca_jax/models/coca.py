"""The contrastive captioner: encoder, poolers and split decoder in one graph (paper, Fig. 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from coca_jax.models import layers
from coca_jax.models.image_encoder import ImageEncoder
from coca_jax.models.pooler import AttentionalPooler
from coca_jax.models.text_decoder import TextDecoder


@flax.struct.dataclass
class Outputs:
    """What one forward pass gives.

    image_embedding, text_embedding: float32 [B, E], L2-normalised. image_tokens: [B, Q, D], what
    the decoder attends to. states: [B, L, D], the decoder's output before the softmax layer.
    kernel [D, V], bias [V] or None: the softmax layer. scale: float32, exp of the learned log
    inverse temperature. logit_bias: float32, or None without the sigmoid loss.
    """

    image_embedding: jax.Array
    text_embedding: jax.Array
    image_tokens: jax.Array
    states: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    scale: jax.Array
    logit_bias: jax.Array | None

    @property
    def logits(self) -> jax.Array:
        """float32 [B, L, V]; position t predicts token t + 1."""
        logits = jnp.einsum(
            "bld,dv->blv",
            self.states,
            self.kernel.astype(self.states.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits if self.bias is None else logits + self.bias


class CoCa(nn.Module):
    """See `build`. pooler_kind: 'cascade' (paper: the contrastive pooler reads the generative
    pooler's output), 'parallel' (both read the encoder) or 'open_clip' (query 0 of the one pooler
    is the image embedding, the others go to the decoder; a norm follows the pooler)."""

    encoder: ImageEncoder
    decoder: TextDecoder
    pooler_kind: str
    num_queries: int
    pooler_heads: int
    embed_dim: int
    temperature: float = 0.07
    image_projection: bool = True
    query_std: float = 0.02
    sigmoid: bool = False
    dtype: Any = jnp.float32
    flat: bool = True

    def setup(self) -> None:
        width = self.decoder.width
        pooler: dict[str, Any] = dict(
            width=width,
            num_heads=self.pooler_heads,
            query_std=self.query_std,
            dtype=self.dtype,
            flat=self.flat,
        )
        self.image_encoder = self.encoder.copy(name="image_encoder")
        self.text_decoder = self.decoder.copy(name="text_decoder")
        self.generative_pooler = AttentionalPooler(self.num_queries, **pooler)
        if self.pooler_kind == "open_clip":
            self.pooled_norm = layers.LayerNorm(self.dtype, self.flat)
        else:
            self.contrastive_pooler = AttentionalPooler(1, **pooler)
        projection: dict[str, Any] = dict(axes=("embed", "joint"), use_bias=False, flat=self.flat)
        if self.image_projection:
            self.image_to_joint = layers.Projection((self.embed_dim,), **projection)
        self.text_to_joint = layers.Projection((self.embed_dim,), **projection)
        self.log_scale = layers.Scalar(float(np.log(1 / self.temperature)))
        if self.sigmoid:
            self.logit_bias = layers.Scalar(-10.0)

    def encode_image(
        self, pixels: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """pixels [B, S, S, 3] -> (embedding float32 [B, E], L2 norm 1; image tokens [B, Q, D])."""
        return self.pool(self.image_encoder(pixels, deterministic=deterministic))

    def pool(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encoder tokens [B, N, W] -> (embedding [B, E], image tokens [B, Q, D])."""
        tokens = self.generative_pooler(encoded)
        if self.pooler_kind == "open_clip":
            tokens = self.pooled_norm(tokens)
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        else:
            source = tokens if self.pooler_kind == "cascade" else encoded
            pooled = self.contrastive_pooler(source)[:, 0]
        # The projections to the joint space are tiny and decide the loss: float32.
        pooled = pooled.astype(jnp.float32)
        if self.image_projection:
            pooled = self.image_to_joint(pooled)
        return normalise(pooled), tokens

    def encode_text(self, tokens: jax.Array, text_valid: jax.Array) -> jax.Array:
        """tokens int [B, L], text_valid bool [B, L] -> embedding float32 [B, E], L2-normalised."""
        cls = self.text_decoder.encode(tokens, text_valid)[1]
        return normalise(self.text_to_joint(cls.astype(jnp.float32)))

    def similarity(self) -> tuple[jax.Array, jax.Array | None]:
        """(inverse temperature, bias of the sigmoid loss or None), float32."""
        return jnp.exp(self.log_scale()), self.logit_bias() if self.sigmoid else None

    def __call__(
        self,
        pixels: jax.Array,
        tokens: jax.Array,
        text_valid: jax.Array,
        *,
        deterministic: bool = True,
    ) -> Outputs:
        """The whole model: both embeddings and the caption states from one pass."""
        image_embedding, image_tokens = self.encode_image(pixels, deterministic=deterministic)
        cls, states = self.text_decoder(tokens, text_valid, image_tokens)
        kernel, bias = self.text_decoder.output_layer()
        scale, logit_bias = self.similarity()
        return Outputs(
            image_embedding=image_embedding,
            text_embedding=normalise(self.text_to_joint(cls.astype(jnp.float32))),
            image_tokens=image_tokens,
            states=states,
            kernel=kernel,
            bias=bias,
            scale=scale,
            logit_bias=logit_bias,
        )


def normalise(x: jax.Array) -> jax.Array:
    """x over its L2 norm along the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def build(
    model: ConfigDict, *, remat: str = "none", sigmoid: bool = False, platform: str | None = None
) -> CoCa:
    """Makes the module that `config.model` describes.

    sigmoid: whether it has the learned bias of the sigmoid loss.
    platform: where it will run ('cpu', 'gpu', 'tpu'; default: here); it decides how products are
    laid out, not what they compute. Raises ValueError for sizes that cannot be (see `validate`).
    """
    validate(model)
    flat = (platform or jax.default_backend()) == "cpu"
    dtype = jnp.dtype(model.dtype)
    shared = dict(activation=model.get("activation", "gelu"), remat=remat, dtype=dtype, flat=flat)
    image, text, pooler = dict(model.image), dict(model.text), dict(model.pooler)
    for name in ("conv_widths", "conv_depths"):
        image[name] = tuple(image.get(name, ()))
    return CoCa(
        encoder=ImageEncoder(
            image_size=model.image_size, patch_size=model.patch_size, **image, **shared
        ),
        decoder=TextDecoder(**text, **shared),
        pooler_kind=pooler["kind"],
        num_queries=pooler["num_queries"],
        pooler_heads=pooler["num_heads"],
        query_std=pooler.get("query_std", 0.02),
        image_projection=pooler.get("project", True),
        embed_dim=model.embed_dim,
        temperature=model.temperature,
        sigmoid=sigmoid,
        dtype=dtype,
        flat=flat,
    )


def validate(model: ConfigDict) -> None:
    """Raises ValueError that names the first impossible size, its value and the remedy."""
    if model.image_size % model.patch_size:
        raise ValueError(
            f"model.patch_size={model.patch_size} does not divide "
            f"model.image_size={model.image_size}; choose a divisor"
        )
    stages = len(model.image.get("conv_widths", ()))
    if stages and (
        model.patch_size != 2**stages or len(model.image.get("conv_depths", ())) != stages
    ):
        raise ValueError(
            f"model.image.conv_widths has {stages} stages; it needs model.patch_size={2**stages} "
            f"(is {model.patch_size}) and as many model.image.conv_depths"
        )
    for name, tower in (("image", model.image), ("text", model.text)):
        if tower.width % tower.num_heads:
            raise ValueError(
                f"model.{name}.num_heads={tower.num_heads} does not divide "
                f"model.{name}.width={tower.width}; choose a divisor"
            )
    pooler = model.pooler
    if model.text.width % pooler.num_heads:
        raise ValueError(
            f"model.pooler.num_heads={pooler.num_heads} does not divide "
            f"model.text.width={model.text.width}; choose a divisor"
        )
    if pooler.kind not in ("cascade", "parallel", "open_clip"):
        raise ValueError(
            f"model.pooler.kind={pooler.kind!r}; choose 'cascade', 'parallel' or 'open_clip'"
        )
    least = 2 if pooler.kind == "open_clip" else 1
    if pooler.num_queries < least:
        raise ValueError(
            f"model.pooler.num_queries={pooler.num_queries}; {pooler.kind} needs at least {least}"
        )
    activation = model.get("activation", "gelu")
    if activation not in layers.ACTIVATIONS:
        raise ValueError(f"model.activation={activation!r}; choose from {list(layers.ACTIVATIONS)}")
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={model.dtype!r}; choose 'float32' or 'bfloat16'")
    if model.text.max_len < 3:
        raise ValueError(
            f"model.text.max_len={model.text.max_len}; captions need at least 3 tokens"
        )


def init(model: CoCa, rng: jax.Array) -> dict:
    """Fresh parameters, boxed with their logical axis names (see partitioning.unbox)."""
    encoder, decoder = model.encoder, model.decoder
    pixels = jnp.zeros((1, encoder.image_size, encoder.image_size, 3), jnp.float32)
    tokens = jnp.zeros((1, decoder.max_len), jnp.int32)
    return model.init(rng, pixels, tokens, jnp.ones(tokens.shape, bool))["params"]


def count_parameters(params: dict) -> dict[str, int]:
    """Parameters by part, split as in the paper's Table 1.

    'encoder' and 'decoder' hold what Table 1 counts (blocks, embeddings, softmax layer);
    'generative_pooler' and 'contrastive_pooler' it leaves out; 'extras' are the text positions,
    [CLS], the decoder's two last norms, the projections to the joint space, temperature and bias.
    """

    def size(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    decoder = params["text_decoder"]
    table1 = ("token_embedding", "unimodal", "multimodal", "head")
    counts = {
        "encoder": size(params["image_encoder"]),
        "decoder": size({k: v for k, v in decoder.items() if k in table1}),
        "generative_pooler": size(params["generative_pooler"]),
        "contrastive_pooler": size(params.get("contrastive_pooler", {})),
    }
    total = size(params)
    return counts | {"extras": total - sum(counts.values()), "total": total}
