"""The contrastive captioner: encoder, poolers and split decoder in one graph (paper, Fig. 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import ops as operations
from coca_jax.config import Head, Loss, Model, heads, read, shapes
from coca_jax.models import image_encoder, initializers, layers, poolers
from coca_jax.models.image_encoder import ImageEncoder, drop_tokens, take_tokens
from coca_jax.models.layers import Part
from coca_jax.models.onnx_encoder import OnnxEncoder
from coca_jax.models.poolers import AttentionalPooler
from coca_jax.models.text_decoder import TextDecoder
from coca_jax.ops.reference import wide

# What one forward pass of the model gives.


# Fields of Outputs that belong to the model: all rows share them.
SHARED = ("kernel", "bias", "scale", "logit_bias", "bag_kernel")


@flax.struct.dataclass
class Outputs:
    """What one forward pass gives; a field is None where the model has nothing of the kind.

    image_embedding, text_embedding: float32 [B, E], L2-normalised. image_tokens: [B, Q, D], what
    the decoder attends to. states: [B, L, D], the decoder's output before the softmax layer.
    kernel [D, V], bias [V] or None: the softmax layer. scale: float32, exp of the learned log
    inverse temperature. logit_bias: float32, or None without the sigmoid loss. class_logits:
    float32 [B, C] of the task head, or None without one. pooled: [B, W], the mean of the encoder's
    tokens, and bag_kernel: float32 [W, V], where a bag of tokens is learned; else None.
    predicted_tokens: [B, N, W], of patches some of which are hidden, and hidden: bool [B, N],
    which; None unless hidden patches are learned, and in training.
    """

    image_embedding: Any = None
    text_embedding: Any = None
    image_tokens: Any = None
    states: Any = None
    kernel: Any = None
    bias: jax.Array | None = None
    scale: Any = None
    logit_bias: jax.Array | None = None
    class_logits: jax.Array | None = None
    pooled: jax.Array | None = None
    bag_kernel: jax.Array | None = None
    predicted_tokens: jax.Array | None = None
    hidden: jax.Array | None = None

    @property
    def logits(self) -> jax.Array:
        """float32 [B, L, V]; position t predicts token t + 1."""
        logits = jnp.einsum(
            "bld,dv->blv",
            self.states,
            self.kernel.astype(self.states.dtype),
            preferred_element_type=wide(self.states.dtype),
        )
        return logits if self.bias is None else logits + self.bias


# Beside the two towers, whose modules have their own; see roles.Role. The projections to the joint
# space and the similarity's numbers are computed in float32.
PARTS = dict(
    generative_pooler=Part("pooling", "image"),
    pooled_norm=Part("pooling", "image"),
    contrastive_pooler=Part("contrastive", "image"),
    image_to_joint=Part("contrastive", "image", wide=True),
    text_to_joint=Part("contrastive", "text", wide=True),
    log_scale=Part("contrastive", wide=True),
    logit_bias=Part("contrastive", wide=True, optional=True),
    head=Part("head", optional=True),
    bag_head=Part("words", optional=True, aid=True),
    token_predictor=Part("tokens", optional=True, aid=True),
)


class CoCa(nn.Module):
    """See `build`. pooler_kind: see pooler_kinds.py; a norm follows a pooler that is alone."""

    encoder: ImageEncoder | OnnxEncoder
    decoder: TextDecoder
    pooler_kind: heads.PoolerKind
    num_queries: int
    pooler_heads: int
    embed_dim: int
    temperature: float = 0.07
    image_projection: bool = True
    query_std: float = 0.02
    sigmoid: bool = False
    bag_of_tokens: bool = False
    hidden_share: float = 0.0
    token_dropout: float = 0.0
    task_head: poolers.TaskHead | None = None
    options: layers.BlockOptions = layers.BlockOptions()
    pooler_options: layers.BlockOptions = layers.BlockOptions()

    @property
    def dtype(self) -> Any:
        """Of products."""
        return self.options.dtype

    @property
    def kernel_dtype(self) -> Any:
        """Of stacked kernels in a step, see ops.reference.Reference.kernel_dtype."""
        return self.options.ops.kernel_dtype(self.dtype)

    def setup(self) -> None:
        width = self.decoder.width
        pooler: dict[str, Any] = dict(
            width=width,
            num_heads=self.pooler_heads,
            query_std=self.query_std,
            options=self.pooler_options,
        )
        self.image_encoder = self.encoder.copy(name="image_encoder")
        self.text_decoder = self.decoder.copy(name="text_decoder")
        if self.pooler_kind.pools:
            self.generative_pooler = AttentionalPooler(self.num_queries, **pooler)
        if self.pooler_kind.by_query:
            self.pooled_norm = layers.Norm(self.encoder.options)  # as its final norm
        elif self.pooler_kind.second_pooler:
            self.contrastive_pooler = AttentionalPooler(1, **pooler)
        projection: dict[str, Any] = dict(
            axes=("embed", "joint"),
            use_bias=False,
            dtype=wide(self.dtype),
            ops=self.options.ops,
            exact=True,
        )
        if self.image_projection:
            self.image_to_joint = layers.Projection((self.embed_dim,), **projection)
        self.text_to_joint = layers.Projection((self.embed_dim,), **projection)
        self.log_scale = layers.Scalar(float(np.log(1 / self.temperature)))
        if self.sigmoid:
            self.logit_bias = layers.Scalar(-10.0)
        if self.bag_of_tokens:
            shape = (self.encoder.width, self.decoder.vocab_size)
            self.bag_head = layers.Table(shape, axes=("embed", "vocab"))
        if self.hidden_share:
            square: dict[str, Any] = dict(axes=("embed", "mlp"), dtype=self.dtype)
            self.token_predictor = layers.Projection(
                (self.encoder.width,), ops=self.options.ops, **square
            )
        if self.task_head is not None:
            self.head = self.task_head.copy(name="head")

    def encode_image(
        self, pixels: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """pixels [B, S, S, 3] -> (embedding float32 [B, E], L2 norm 1; image tokens [B, Q, D]).

        Clips, pixels [B, T, S, S, 3]: frames are encoded independently and pooled as `pool` says.
        Images of any shape: packed, [B, N, P * P * 3 + 4], see native.py.
        """
        encoded = self.encode_pixels(pixels, deterministic=deterministic)
        return self.pool(encoded, image_encoder.valid_tokens(pixels, encoded.shape[1]))

    def encode_pixels(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """pixels [B, S, S, 3] -> tokens [B, N, W]; clips [B, T, S, S, 3] -> [B, T, N, W]."""
        if pixels.ndim == 4 or shapes.is_packed(pixels.shape):
            return self.image_encoder(pixels, deterministic=deterministic)
        frames = pixels.reshape((-1,) + pixels.shape[2:])
        encoded = self.image_encoder(frames, deterministic=deterministic)
        return encoded.reshape(pixels.shape[:2] + encoded.shape[1:])

    def locked_features(self, pixels: jax.Array) -> jax.Array:
        """What a locked image encoder gives the rest of the model: its tokens, `encode_pixels`."""
        return self.encode_pixels(pixels)

    def pool(
        self, encoded: jax.Array, valid: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encoder tokens [B, N, W], of which those that are `valid`, bool [B, N], count
        -> (embedding [B, E], image tokens [B, Q, D]).

        Of clips, [B, T, N, W], the embedding is the normalised mean of the frames', as in the
        paper's video retrieval; the generative pooler reads the tokens of all frames at once, as in
        VideoCoCa (Yan et al. 2022), so that the decoder attends to Q tokens as well.
        """
        if encoded.ndim == 4:
            each, tokens = self.pool(encoded.reshape((-1,) + encoded.shape[2:]))
            embedding = normalise(each.reshape(encoded.shape[:2] + (-1,)).mean(1))
            if self.pooler_kind.pools:
                return embedding, self.pool(all_tokens(encoded))[1]
            return embedding, tokens.reshape(len(encoded), -1, tokens.shape[-1])
        mask = None if valid is None else valid[:, None, None, :]
        tokens = self.generative_pooler(encoded, mask) if self.pooler_kind.pools else encoded
        if self.pooler_kind.by_query:
            tokens = self.pooled_norm(tokens)
        if not self.pooler_kind.second_pooler:
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        else:
            source = (tokens,) if self.pooler_kind.in_cascade else (encoded, mask)
            pooled = self.contrastive_pooler(*source)[:, 0]
        # The projections to the joint space are tiny and decide the loss: float32.
        pooled = pooled.astype(wide(self.dtype))
        if self.image_projection:
            pooled = self.image_to_joint(pooled)
        return normalise(pooled), tokens

    def encode_text(self, tokens: jax.Array, text_valid: jax.Array) -> jax.Array:
        """tokens int [B, L], text_valid bool [B, L] -> embedding float32 [B, E], L2-normalised."""
        cls = self.text_decoder.encode(tokens, text_valid)[1]
        return normalise(self.text_to_joint(cls.astype(wide(self.dtype))))

    def similarity(self) -> tuple[jax.Array, jax.Array | None]:
        """(inverse temperature, bias of the sigmoid loss or None), float32."""
        return jnp.exp(self.log_scale()), self.logit_bias() if self.sigmoid else None

    def classify(
        self,
        pixels: jax.Array | None,
        tokens: jax.Array | None = None,
        prompt_len: jax.Array | None = None,
        *,
        encoded: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of the task head alone, float32 [B, C], running only what it needs.

        pixels [B, S, S, 3], or clips [B, T, S, S, 3], of which a head over images pools all tokens
        of all frames; [B, 2, S, S, 3] for a head over pairs. Heads that read a text
        take tokens int [B, L] and prompt_len int [B]: how many of a row are the question (or
        statement), with the begin symbol. What follows is not seen by the head. encoded: as of
        `__call__`.
        """
        if self.task_head is None:
            raise ValueError("this model has no task head; train it with head.kind set")
        kind = self.task_head.kind
        if kind.images > 1 and pixels is not None:  # all images of an example become rows
            pixels = pixels.reshape((-1,) + pixels.shape[2:])
        encoded = self._encoded(pixels, encoded, deterministic)
        seen = image_encoder.valid_tokens(pixels, encoded.shape[1])
        if not kind.reads_text:
            return self.head(all_tokens(encoded), seen)
        if kind.images > 1:  # each with the text
            tokens, prompt_len = (jnp.repeat(x, kind.images, 0) for x in (tokens, prompt_len))
        valid = jnp.arange(tokens.shape[1]) < prompt_len[:, None]
        text_states, _ = self.text_decoder.encode(tokens, valid)
        states = self.text_decoder.fuse(text_states, self.pool(encoded, seen)[1])
        return self.head(states, valid)

    def _encoded(
        self, pixels: jax.Array | None, encoded: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """The encoder's tokens: those of the pixels, where they are not given."""
        if encoded is not None:
            return encoded.astype(self.options.ops.stream_dtype(self.dtype))
        if pixels is None:
            raise ValueError("give pixels, or the tokens of the image encoder")
        return self.encode_pixels(pixels, deterministic=deterministic)

    def __call__(
        self,
        pixels: jax.Array | None,
        tokens: jax.Array,
        text_valid: jax.Array,
        prompt_len: jax.Array | None = None,
        *,
        encoded: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Outputs:
        """The whole model: both embeddings and the caption states from one pass.

        pixels: [B, S, S, 3], or clips [B, T, S, S, 3]. A head over questions shares this pass: the
        decoder is causal, so the states of the first prompt_len tokens know nothing of the answer
        behind them. Pairs do not run here. encoded: tokens of the encoder, [B, N, W] or of clips
        [B, T, N, W], in place of pixels.
        """
        encoded = self._encoded(pixels, encoded, deterministic)
        there = image_encoder.valid_tokens(pixels, encoded.shape[1])
        image_embedding, image_tokens = self.pool(encoded, there)
        seen = image_tokens
        if self.token_dropout and not deterministic:
            indices = drop_tokens(seen, self.token_dropout, self.make_rng("patch_dropout"))
            seen = take_tokens(seen, indices)
        cls, states = self.text_decoder(tokens, text_valid, seen)
        class_logits = None
        if self.task_head is not None and self.task_head.kind.shares_pass:
            if self.task_head.kind.reads_text:
                length = shapes.lengths(text_valid) if prompt_len is None else prompt_len
                class_logits = self.head(states, jnp.arange(tokens.shape[1]) < length[:, None])
            else:
                class_logits = self.head(all_tokens(encoded), there)
        predicted = hidden = None
        if (
            self.hidden_share
            and pixels is not None
            and (not deterministic or self.is_initializing())
        ):
            predicted, hidden = self.predict_hidden(pixels)
        kernel, bias = self.text_decoder.output_layer()
        scale, logit_bias = self.similarity()
        return Outputs(
            image_embedding=image_embedding,
            text_embedding=normalise(self.text_to_joint(cls.astype(wide(self.dtype)))),
            image_tokens=image_tokens,
            states=states,
            kernel=kernel,
            bias=bias,
            scale=scale,
            logit_bias=logit_bias,
            class_logits=class_logits,
            pooled=image_encoder.mean_token(all_tokens(encoded), there)
            if self.bag_of_tokens
            else None,
            bag_kernel=self.bag_head() if self.bag_of_tokens else None,
            predicted_tokens=predicted,
            hidden=hidden,
        )

    def patch_tokens(self, pixels: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
        """The encoder's tokens of patches alone, [B, N, W], those in `hidden` not being seen."""
        tokens = self.image_encoder(pixels, masked=hidden)
        return tokens[:, int(self.encoder.class_token) :]

    def predict_hidden(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(tokens predicted of images with hidden patches, [B, N, W]; bool [B, N], which)."""
        rows, columns = shapes.grid((pixels.shape[1], pixels.shape[2]), self.encoder.patch_size)
        shape = (pixels.shape[0], rows * columns)
        count = max(1, round(self.hidden_share * rows * columns))
        hidden = jnp.zeros(shape, bool)
        if self.is_initializing():
            hidden = hidden.at[:, :count].set(True)
        else:
            order = jnp.argsort(jax.random.uniform(self.make_rng("patch_dropout"), shape), axis=1)
            hidden = jnp.argsort(order, axis=1) < count
        return self.token_predictor(self.patch_tokens(pixels, hidden)), hidden


def all_tokens(encoded: jax.Array) -> jax.Array:
    """Encoder tokens of clips [B, T, N, W] -> [B, T N, W], in order; of images [B, N, W] as is."""
    return encoded.reshape((encoded.shape[0], -1, encoded.shape[-1]))


def normalise(x: jax.Array) -> jax.Array:
    """x over its L2 norm along the last axis, float32 at least."""
    x = x.astype(wide(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def build(
    model: Model,
    *,
    remat: str = "none",
    sigmoid: bool = False,
    loss: Loss | None = None,
    platform: str | None = None,
    head: Head | None = None,
    num_classes: int = 0,
) -> CoCa:
    """Makes the module that `config.model` describes.

    remat: of all towers, see block.Stack; 'auto': what is best on the platform.
    sigmoid: whether it has the learned bias of the sigmoid loss.
    loss: `config.loss`, of a model that trains: it has the layers and passes that these losses add.
    platform: where it will run ('cpu', 'gpu', 'tpu'; default: here); with model.implementation it
    decides how operations run (see `coca_jax.ops`), not what they compute.
    head: `config.head`; a task head over num_classes is added where its kind is not ''.
    Raises ValueError for a model without a decoder.
    """
    model, loss = read(Model, model, "model"), read(Loss, loss or {}, "loss")
    head = read(Head, head, "head") if head is not None else None
    if model.family != "coca":
        raise ValueError(
            f"model.family={model.family!r}: a dual encoder, which has no decoder. Use "
            "models.network.build."
        )
    platform = platform or jax.default_backend()
    ops = operations.choose(platform, model.implementation)
    check_dtype(model, platform)
    remat = ops.remat if remat == "auto" else remat
    options = functools.partial(layers.BlockOptions.from_config, model, ops)
    image, text = ({**part.to_dict(), "remat": remat} for part in (model.image, model.text))
    image["options"] = options(image.pop("block"))
    text["options"] = options(text.pop("block"))
    text["multimodal_options"] = options(text.pop("multimodal_block"))
    return CoCa(
        encoder=image_encoder.build(model, image, image.pop("options")),
        decoder=TextDecoder(**text),
        pooler_kind=heads.pooler_kind(model.pooler.kind),
        num_queries=model.pooler.num_queries,
        pooler_heads=model.pooler.num_heads,
        query_std=model.pooler.query_std,
        image_projection=model.pooler.project,
        embed_dim=model.embed_dim,
        temperature=model.temperature,
        sigmoid=sigmoid or loss.contrastive == "sigmoid",
        bag_of_tokens=loss.bag_weight > 0,
        hidden_share=loss.hidden_share if loss.hidden_weight else 0.0,
        token_dropout=model.pooler.token_dropout,
        task_head=poolers.build(head, model, num_classes, ops) if head and head.kind else None,
        options=options(),
        pooler_options=options(model.pooler.block),
    )


def check_dtype(model: Model, platform: str) -> None:
    """Raises ValueError for float64 where a program would compute in float32."""
    if model.dtype == "float64" and not (
        platform == "cpu" and jnp.result_type(float) == jnp.float64
    ):
        raise ValueError(
            "model.dtype='float64' is for checks on the CPU: choose 'float32', or set "
            "JAX_PLATFORMS=cpu and JAX_ENABLE_X64=1"
        )


def init(model: CoCa, rng: jax.Array) -> dict:
    """Fresh parameters, boxed with their logical axis names (see partitioning.unbox)."""
    return _draw(model)(rng)


@functools.lru_cache(maxsize=4)  # a start asks twice, of shapes and of numbers
def _draw(model: CoCa) -> Callable[[jax.Array], dict]:
    return initializers.together(functools.partial(init_alone, model))


def init_alone(model: CoCa, rng: jax.Array) -> dict:
    """`init` as Flax does it, each parameter by itself: the reference of draws.together."""
    encoder, decoder = model.encoder, model.decoder
    pixels = jnp.zeros((1, *shapes.pair(encoder.image_size), 3), jnp.float32)
    tokens = jnp.zeros((1, decoder.max_len), jnp.int32)
    inputs = (pixels, tokens, jnp.ones(tokens.shape, bool))
    if model.task_head is None or model.task_head.kind.shares_pass:
        return model.init(rng, *inputs)["params"]
    images = model.task_head.kind.images

    def both(module: CoCa, pixels: jax.Array, tokens: jax.Array, valid: jax.Array) -> None:
        module(pixels, tokens, valid)
        module.classify(jnp.stack([pixels] * images, 1), tokens, shapes.lengths(valid))

    return model.init(rng, *inputs, method=both)["params"]
