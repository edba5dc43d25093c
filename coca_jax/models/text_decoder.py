"""The causal text decoder, split in two halves (paper Section 3.2, Fig. 2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import ops as operations
from coca_jax.config import Model, shapes
from coca_jax.models import block, layers
from coca_jax.models.layers import BOTTOM, STACK, BlockOptions, Part
from coca_jax.ops import decode_layouts
from coca_jax.ops.cpu_kernels import decode
from coca_jax.ops.decode_layouts import LAYOUTS, Cache, Layout
from coca_jax.ops.reference import log_once
from coca_jax.parallel.sharding import constrain

# See roles.Role. The halves are one tower: the upper one's layers stand on the lower one's.
PARTS = dict(
    token_embedding=Part("text", "text", BOTTOM),
    positions=Part("text", "text", BOTTOM, positions="text"),
    cls=Part("contrastive", "text", BOTTOM),
    unimodal=Part("text", "text", STACK),
    unimodal_norm=Part("contrastive", "text"),
    multimodal=Part("decoding", "text", STACK),
    multimodal_norm=Part("decoding", "text"),
    head=Part("captioning", "text"),
)


class TextDecoder(nn.Module):
    """Unimodal half: text alone, with [CLS] appended; multimodal half: cross-attends to the image.

    cls_mask: 'exact' ([CLS] sees every valid token and itself) or 'shifted' (open_clip's released
    models: the validity mask stands one place too far right).
    cross: the layout of the multimodal half's blocks, see block.Block.
    multimodal_heads, multimodal_mlp_dim: of the multimodal half; None: as in the unimodal one.
    kv_heads: of both halves' attention, see layers.Attention. rope_theta: see rotary.of_places.
    multimodal_options: of the multimodal half's blocks; None: `options`, as of the unimodal one.
    """

    width: int
    unimodal_depth: int
    multimodal_depth: int
    mlp_dim: int
    num_heads: int
    vocab_size: int
    max_len: int
    tie_embeddings: bool = False
    head_bias: bool = True
    cls_mask: str = "exact"
    cross: str = "paper"
    multimodal_heads: int | None = None
    multimodal_mlp_dim: int | None = None
    kv_heads: int = 0
    rope_theta: float = 10_000.0
    remat: str = "none"
    options: layers.BlockOptions = layers.BlockOptions()
    multimodal_options: layers.BlockOptions | None = None

    @property
    def upper(self) -> layers.BlockOptions:
        """Of the multimodal half's blocks."""
        return self.multimodal_options or self.options

    def setup(self) -> None:
        stack: dict[str, Any] = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            kv_heads=self.kv_heads,
            causal=True,
            remat=self.remat,
            options=self.options,
        )
        self.token_embedding = layers.Table((self.vocab_size, self.width), axes=("vocab", "embed"))
        if self.options.learned:
            shape = (self.max_len + 1, self.width)
            self.positions = layers.Table(shape, axes=("position", "embed"))
        self.cls = layers.Table((self.width,), axes=("norm",))
        self.unimodal = block.Stack(depth=self.unimodal_depth, **stack)
        self.unimodal_norm = layers.Norm(self.options)
        stack["num_heads"] = self.multimodal_heads or self.num_heads
        stack["options"] = self.upper
        stack["mlp_dim"] = self.multimodal_mlp_dim or self.mlp_dim
        self.multimodal = block.Stack(depth=self.multimodal_depth, cross=self.cross, **stack)
        self.multimodal_norm = layers.Norm(self.upper)
        if not self.tie_embeddings:
            self.head = Head(self.vocab_size, self.width, self.head_bias)

    def encode(self, tokens: jax.Array, text_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens int [B, L], text_valid bool [B, L] -> (text states [B, L, D], [CLS] [B, D]).

        L may be anything up to max_len; [CLS] always has the last row of the position table, and
        turns as if it stood directly behind the text, so a caption's embedding does not depend on
        how far it is padded.
        """
        batch, length = tokens.shape
        if length > self.max_len:
            raise ValueError(
                f"captions have {length} tokens, more than model.text.max_len={self.max_len}; "
                "truncate them"
            )
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        x, cls = self.token_embedding().astype(dtype)[tokens], self.cls()
        if self.options.learned:
            positions = self.positions()
            x = x + positions[:length].astype(dtype)
            cls = cls + positions[self.max_len]
        x = constrain(x, "batch", "length", "act_embed")
        cls = cls.astype(dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(cls, (batch, 1, self.width))], axis=1)
        x = constrain(x, "batch", "length", "act_embed")
        always = jnp.ones((batch, 1), bool)
        order = (text_valid, always) if self.cls_mask == "exact" else (always, text_valid)
        keys = jnp.concatenate(order, axis=1)
        x = self.unimodal(x, keys[:, None, None, :], None, self._rotation(length, text_valid))
        states = constrain(x[:, :-1], "batch", "length", "act_embed")
        return states, self.unimodal_norm(constrain(x[:, -1], "batch", "act_embed"))

    def fuse(self, text_states: jax.Array, image_tokens: jax.Array) -> jax.Array:
        """(text states [B, L, D], image tokens [B, Q, D]) -> states before the softmax [B, L, D].

        Captions are padded on the right, so the causal mask already hides padding from tokens.
        """
        dtype = self.options.ops.stream_dtype(self.options.dtype)
        rotation = None
        if self.upper.rotary:
            heads = self.multimodal_heads or self.num_heads
            rotation = self._turned(jnp.arange(text_states.shape[1])[None], heads)
        x = self.multimodal(text_states, None, image_tokens.astype(dtype), rotation)
        return self.multimodal_norm(x).astype(self.options.dtype)

    def _rotation(self, length: int, text_valid: jax.Array) -> jax.Array | None:
        """Of `length` tokens and a [CLS] behind each text in the unimodal half, [B, L + 1, K]."""
        if not self.options.rotary:
            return None
        places = jnp.broadcast_to(jnp.arange(length)[None], text_valid.shape)
        places = jnp.concatenate([places, shapes.lengths(text_valid)[:, None]], axis=1)
        return self._turned(places, self.num_heads)

    def _turned(self, places: jax.Array, heads: int) -> jax.Array:
        return layers.of_places(places[..., None], self.width // heads, self.rope_theta)

    def output_layer(self) -> tuple[jax.Array, jax.Array | None]:
        """The softmax layer: kernel [D, V] and bias [V] (None when tied or without bias)."""
        if self.tie_embeddings:
            return self.token_embedding().T, None
        return self.head()

    def __call__(
        self, tokens: jax.Array, text_valid: jax.Array, image_tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Both halves -> ([CLS] [B, D], states before the softmax [B, L, D])."""
        text_states, cls = self.encode(tokens, text_valid)
        states = self.fuse(text_states, image_tokens)
        self.output_layer()  # so that initialisation makes its parameters
        return cls, states


class Head(nn.Module):
    """The softmax layer's parameters; losses and decoding multiply, in chunks where they want."""

    vocab_size: int
    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = layers.Table(
            (self.width, self.vocab_size), axes=("embed", "vocab"), name="kernel"
        )()
        if not self.use_bias:
            return kernel, None
        return kernel, layers.Table((self.vocab_size,), ("vocab",), init_std=0.0, name="bias")()


# The parameters of a block as packed weights: which of them become which matrix of a part.


# Of layers.BlockOptions: what the parts of a block may have, and what does not touch a norm.
KNOWN_OPTIONS = ("activation", "dtype", "ops")
KNOWN_AROUND_NORM = (
    *KNOWN_OPTIONS,
    "gated_mlp",
    "layer_scale",
    "positions",
    "qk_norm",
    "qk_norm_kind",
)
# The norms that go with a part when it is packed.
NORMS = dict(
    attention=("attention_norm",),
    cross_attention=("cross_norm", "context_norm"),
    mlp=("mlp_norm",),
    cross_mlp=("cross_mlp_norm",),
)


def last_norm(params: dict, options: BlockOptions) -> dict:
    """The norm behind the last block, as packed.norm takes it."""
    if not options.beyond(KNOWN_AROUND_NORM):
        return params
    return {options.norm: params, "epsilon": jnp.float32(options.norm_eps)}


def pack_block(params: dict, dtype: Any, layout: Layout, unknown: dict[str, Any]) -> dict:
    """The parts of one layer's parameters, packed: {part: its weights}, {} where nothing is.

    params: of block.Block. unknown: options of the block beyond KNOWN_OPTIONS that are set; its
    modules alone know what they mean, so that nothing is packed.
    """
    if unknown:
        log_once(f"decoding runs the block's own modules: packing does not know {unknown}")
    if layout == "reference" or unknown:
        return {}
    found: dict[str, Any] = {"attention": _pack_attention(params["attention"], dtype, layout)}
    if "cross_attention" in params:
        norm = params.get("context_norm")
        found["cross_attention"] = _pack_cross(params["cross_attention"], norm, dtype, layout)
    for name in ("mlp", "cross_mlp"):
        if name in params:
            found[name] = {
                k: decode_layouts.pack_matrix(v["kernel"], v["bias"], dtype, layout)
                for k, v in params[name].items()
            }
    for name, part in found.items():
        part["norm"] = params["cross_norm" if name == "cross_attention" else f"{name}_norm"]
    return found


def _matrix(kernel: jax.Array, num_in: int = 1) -> jax.Array:
    """A kernel whose first num_in axes are inputs, as a matrix."""
    return kernel.reshape(int(np.prod(kernel.shape[:num_in])), -1)


def _join(part: dict, names: tuple[str, ...], dtype: Any, layout: Layout) -> dict:
    """Several projections as one; the query's with the scale of the scores in it."""
    scale = part["query"]["kernel"].shape[-1] ** -0.5
    kernels = [part[n]["kernel"] * (scale if n == "query" else 1.0) for n in names]
    biases = [part[n]["bias"].reshape(-1) * (scale if n == "query" else 1.0) for n in names]
    kernel = jnp.concatenate([_matrix(k).astype(dtype) for k in kernels], axis=1)
    return decode_layouts.pack_matrix(kernel, jnp.concatenate(biases), dtype, layout)


def _out(part: dict, dtype: Any, layout: Layout) -> dict:
    return decode_layouts.pack_matrix(
        _matrix(part["out"]["kernel"], 2), part["out"]["bias"], dtype, layout
    )


def _pack_attention(part: dict, dtype: Any, layout: Layout) -> dict:
    qkv = _join(part, ("query", "key", "value"), dtype, layout)
    return dict(qkv=qkv, out=_out(part, dtype, layout))


def _pack_cross(part: dict, norm: dict | None, dtype: Any, layout: Layout) -> dict:
    found: dict[str, Any] = dict(
        query=_join(part, ("query",), dtype, layout),
        # Image keys are computed once, from many rows: there the plain product is best.
        kv=_join(part, ("key", "value"), dtype, "kernel"),
        out=_out(part, dtype, layout),
    )
    if norm is not None:
        found["context_norm"] = norm
    if layout in decode_layouts.PANELS:
        found["shared"] = _shared(part, norm, decode_layouts.PANELS[layout])
    return found


def _shared(part: dict, norm: dict | None, dtype: Any) -> dict:
    """Keys and values moved to the query's side, see decode_kernels.image_attention.

    What the bias of the keys adds is the same at every token, and so nothing to the softmax.
    """
    key, value = part["key"]["kernel"], part["value"]["kernel"]  # [D, H, K]
    bias = part["value"]["bias"].reshape(-1)
    if norm is not None:
        bias = bias + jnp.einsum("d,dhk->hk", norm["bias"], value).reshape(-1)
        key, value = (norm["scale"][:, None, None] * x for x in (key, value))
    padded = jnp.pad(value, ((0, -value.shape[0] % decode.PANEL), (0, 0), (0, 0)))
    panels = jax.vmap(functools.partial(decode.panels, dtype=dtype))
    return dict(
        query=panels(key.transpose(1, 2, 0)),
        value=panels(padded.transpose(1, 0, 2)),
        bias=bias,
    )


# The text decoder with a KV cache: the blocks of `coca_jax.models`, a few tokens at a time.
#
# What is written with it, greedy, by sampling or by beams, is the business of `generation`.
#
# Shape letters: B images, W captions or beams of an image, D width, H heads, K head width, Q image
# tokens, V vocabulary, P prompt slots, M cache slots.


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The sizes that a decode program is compiled for; hashable.

    num_ids: ids that the vocabulary has; the softmax layer may have more rows, never chosen.
    hidden_id: an id that the unimodal half's mask takes for padding wherever it stands, or None;
    hides_next: it is the key after such a token that is hidden, not its own (cls_mask 'shifted').
    unimodal, multimodal: the blocks of both halves. rope_theta: see rotary.of_places.
    """

    unimodal: block.Block
    multimodal: block.Block
    vocab_size: int
    num_ids: int
    max_len: int
    dtype: str
    implementation: str
    eos_id: int
    hidden_id: int | None = None
    hides_next: bool = False
    rope_theta: float = 10_000.0

    def rotation(self, positions: jax.Array, half: block.Block) -> jax.Array | None:
        """Of tokens at positions int32 [B, N] in the blocks of a half, see rotary.py."""
        if not half.options.rotary:
            return None
        head_width = half.width // half.num_heads
        return layers.of_places(positions[..., None], head_width, self.rope_theta)


def decoder(
    model: Model,
    *,
    num_ids: int,
    eos_id: int,
    hidden_id: int | None = None,
    platform: str | None = None,
) -> Decoder:
    """The part of `config.model` that decoding needs, and of the vocabulary.

    platform: of the devices that run it; default: here.
    Raises ValueError for float64, which decoding does not compute in.
    """
    text = model.text
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={model.dtype!r}: decoding needs 'float32' or 'bfloat16'")
    implementation = model.implementation
    common: dict[str, Any] = dict(width=text.width, kv_heads=text.kv_heads)
    ops = operations.choose(platform or jax.default_backend(), implementation)
    options = functools.partial(layers.BlockOptions.from_config, model, ops)
    heads = text.multimodal_heads or text.num_heads
    mlp_dim = text.multimodal_mlp_dim or text.mlp_dim
    return Decoder(
        unimodal=block.Block(
            num_heads=text.num_heads,
            mlp_dim=text.mlp_dim,
            depth=text.unimodal_depth,
            options=options(text.block),
            **common,
        ),
        multimodal=block.Block(
            num_heads=heads,
            mlp_dim=mlp_dim,
            depth=text.multimodal_depth,
            cross=text.cross,
            options=options(text.multimodal_block),
            **common,
        ),
        vocab_size=text.vocab_size,
        num_ids=num_ids,
        max_len=text.max_len,
        dtype=model.dtype,
        implementation=implementation,
        eos_id=eos_id,
        hidden_id=hidden_id,
        hides_next=text.cls_mask == "shifted",
        rope_theta=text.rope_theta,
    )


@functools.partial(jax.jit, static_argnames=("spec", "layout"))
def pack(spec: Decoder, params: dict, layout: Layout = "kernel") -> dict:
    """The text decoder's weights as decoding wants them: a copy, made once per model.

    params: the model's parameters. Layers are taken apart (a loop over stacked weights would copy
    each slice at every token), and the parts that packing knows are packed (see ops/decode_layouts.py); of
    the others the parameters stay.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; choose from {', '.join(LAYOUTS)}")
    text = params["text_decoder"]

    def blocks(stack: dict, module: block.Block) -> list[dict]:
        unknown = module.options.beyond(KNOWN_OPTIONS)
        if module.kv_heads:
            unknown["kv_heads"] = module.kv_heads
        if layout in decode_layouts.PANELS and module.options.activation not in decode.ACTIVATIONS:
            unknown["activation"] = module.options.activation
        depth = jax.tree.leaves(stack)[0].shape[0]
        split = [jax.tree.map(lambda x, i=i: x[i], stack["layers"]) for i in range(depth)]
        found = []
        for layer in split:
            parts = pack_block(layer, spec.dtype, layout, unknown)
            used = {name for part in parts for name in (part, *NORMS[part])}
            found.append(
                dict(packed=parts, params={k: v for k, v in layer.items() if k not in used})
            )
        return found

    embedding = text["token_embedding"]["value"]
    kernel = text["head"]["kernel"]["value"] if "head" in text else embedding.T
    bias = text["head"]["bias"]["value"] if "bias" in text.get("head", {}) else None
    norm = last_norm(text["multimodal_norm"], spec.multimodal.options)
    panels = layout in decode_layouts.PANELS and "epsilon" not in norm
    if panels and bias is None:
        bias = jnp.zeros(kernel.shape[1])
    # As `transposed` the softmax layer's output would cost more to transpose than the layout gives.
    head = decode_layouts.pack_matrix(kernel, bias, spec.dtype, layout if panels else "kernel")
    positions = text["positions"]["value"].astype(spec.dtype) if "positions" in text else None
    return dict(
        embedding=embedding.astype(spec.dtype),
        positions=positions,
        unimodal=blocks(text["unimodal"], spec.unimodal),
        multimodal=blocks(text["multimodal"], spec.multimodal),
        norm=norm,
        head=head,
    )


def fastest(spec: Decoder, params: dict, platform: str | None = None) -> tuple[Decoder, Layout]:
    """How decoding is fastest on this machine: the spec to decode by, and the layout, see
    ops/decode_layouts.py; platform: of the devices that run it; default: here.

    With panels all but products computes in float32, whatever the model's dtype; the products do
    too where the processor has none of bfloat16: that is faster than bfloat16's products by XLA at
    any number of rows.
    """
    text = params["text_decoder"]
    width = text["token_embedding"]["value"].shape[1]
    layout = decode_layouts.choose_layout(
        platform or jax.default_backend(),
        spec.implementation,
        num_weights=sum(x.size for x in jax.tree.leaves(text)),
        head_widths={width // spec.unimodal.num_heads, width // spec.multimodal.num_heads},
        mlp_widths={spec.unimodal.mlp_dim, spec.multimodal.mlp_dim},
        dtype=spec.dtype,
    )
    if layout in decode_layouts.PANELS:
        spec = dataclasses.replace(spec, dtype="float32")
    return spec, layout


def image_caches(
    spec: Decoder, weights: dict, image_tokens: jax.Array, width: int = 1
) -> list[Cache] | jax.Array:
    """What cross-attention reads of image tokens [B, Q, D], for `width` captions an image.

    Keys and values, one Cache [B, H, Q, K] a block; in panels with one caption an image the tokens
    themselves (decode_kernels.image_attention; more captions share the reading of keys, so those
    are less work).
    """
    cross = weights["multimodal"][0]["packed"].get("cross_attention", {})
    if width == 1 and "shared" in cross:
        dtype = cross["shared"]["query"].dtype
        return decode_layouts.shared_tokens(
            image_tokens, spec.multimodal.cross == "open_clip", dtype
        )
    return [
        _apply(spec.multimodal, layer, image_tokens, method="image_cache")
        for layer in weights["multimodal"]
    ]


def _apply(module: block.Block, weights: dict, *inputs: Any, method: Any = None) -> Any:
    """A block with its own weights: {'params': ..., 'packed': ...}."""
    return module.apply(weights, *inputs, method=method)


def empty_caches(spec: Decoder, weights: dict, batch: int, slots: int) -> list[Cache]:
    """Caches of zeros for every block of both halves."""
    width = weights["embedding"].shape[1]
    shapes = []
    for module, layers_ in ((spec.unimodal, "unimodal"), (spec.multimodal, "multimodal")):
        shape = (batch, module.kv_heads or module.num_heads, slots, width // module.num_heads)
        shapes += [shape] * len(weights[layers_])
    return [Cache(jnp.zeros(s, spec.dtype), jnp.zeros(s, spec.dtype)) for s in shapes]


def run_tokens(
    spec: Decoder,
    weights: dict,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    slot: jax.Array | int,
    caches: list[Cache],
    image: list[Cache] | jax.Array,
    visible: jax.Array | None = None,
) -> tuple[jax.Array, list[Cache]]:
    """Runs N tokens per image through both halves and writes their keys at slots slot..slot + N.

    tokens, positions: int32 [B, N]. mask: bool [B, N, M], which slots each token may look at, its
    own included. visible: bool [B, M], slots that the unimodal half does not hide (see
    Decoder.hidden_id); None: all. Returns the last block's output, float32 [B, N, D], and the
    caches.
    """
    own = mask if visible is None else mask & visible[:, None]
    x = weights["embedding"][tokens]
    if weights["positions"] is not None:
        x = x + weights["positions"][positions]
    x = x.astype(jnp.float32)
    turns = [spec.rotation(positions, half) for half in (spec.unimodal, spec.multimodal)]
    depth = len(weights["unimodal"])
    written = []
    for layer, cache in zip(weights["unimodal"], caches):
        x, new = _apply(spec.unimodal, layer, x, block.Step(cache, slot, own), None, turns[0])
        written.append(new)
    for number, (layer, cache) in enumerate(zip(weights["multimodal"], caches[depth:])):
        context = image[number] if isinstance(image, list) else image
        x, new = _apply(spec.multimodal, layer, x, block.Step(cache, slot, mask), context, turns[1])
        written.append(new)
    return x, written


def prefill(
    spec: Decoder,
    weights: dict,
    prompt: jax.Array,
    prompt_len: jax.Array,
    caches: list[Cache],
    image: list[Cache] | jax.Array,
    visible: jax.Array | None = None,
) -> list[Cache]:
    """Writes the keys of all prompt tokens but the last. prompt int32 [B, P], right-aligned;
    visible: bool [B, P - 1], keys that the unimodal half sees, or None for all."""
    slots = prompt.shape[1] - 1
    if slots == 0:
        return caches
    if visible is not None:
        visible = jnp.pad(visible, ((0, 0), (0, caches[0].key.shape[2] - slots)))
    first = (prompt.shape[1] - prompt_len)[:, None]
    place = jnp.arange(slots)[None]
    present = jnp.pad(place >= first, ((0, 0), (0, caches[0].key.shape[2] - slots)))
    causal = jnp.arange(caches[0].key.shape[2])[None] <= jnp.arange(slots)[:, None]
    mask = present[:, None] & causal[None]
    positions = jnp.maximum(place - first, 0)
    return run_tokens(spec, weights, prompt[:, :-1], positions, mask, 0, caches, image, visible)[1]


def log_probs_of(weights: dict, states: jax.Array) -> jax.Array:
    """The next token's, float32 [B, N, V], from what run_tokens returns, [B, N, D]."""
    return decode_layouts.log_probs(states, weights["norm"], weights["head"])
