"""The text decoder with a KV cache: the blocks of `coca_jax.models`, a few tokens at a time.

What is written with it, greedy, by sampling or by beams, is the business of `generation`.

Shape letters: B images, W captions or beams of an image, D width, H heads, K head width, Q image
tokens, V vocabulary, P prompt slots, M cache slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax import ops as operations
from coca_jax.config import Model
from coca_jax.models import block, layers, packing, rotary
from coca_jax.ops import packed
from coca_jax.ops.cpu import decode_kernels
from coca_jax.ops.packed import LAYOUTS, Cache, Layout


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
        return rotary.of_places(positions[..., None], head_width, self.rope_theta)


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
    each slice at every token), and the parts that packing knows are packed (see ops/packed.py); of
    the others the parameters stay.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; choose from {', '.join(LAYOUTS)}")
    text = params["text_decoder"]

    def blocks(stack: dict, module: block.Block) -> list[dict]:
        unknown = module.options.beyond(packing.KNOWN_OPTIONS)
        if module.kv_heads:
            unknown["kv_heads"] = module.kv_heads
        if layout in packed.PANELS and module.options.activation not in decode_kernels.ACTIVATIONS:
            unknown["activation"] = module.options.activation
        depth = jax.tree.leaves(stack)[0].shape[0]
        split = [jax.tree.map(lambda x, i=i: x[i], stack["layers"]) for i in range(depth)]
        found = []
        for layer in split:
            parts = packing.pack_block(layer, spec.dtype, layout, unknown)
            used = {name for part in parts for name in (part, *packing.NORMS[part])}
            found.append(
                dict(packed=parts, params={k: v for k, v in layer.items() if k not in used})
            )
        return found

    embedding = text["token_embedding"]["value"]
    kernel = text["head"]["kernel"]["value"] if "head" in text else embedding.T
    bias = text["head"]["bias"]["value"] if "bias" in text.get("head", {}) else None
    norm = packing.last_norm(text["multimodal_norm"], spec.multimodal.options)
    panels = layout in packed.PANELS and "epsilon" not in norm
    if panels and bias is None:
        bias = jnp.zeros(kernel.shape[1])
    # As `transposed` the softmax layer's output would cost more to transpose than the layout gives.
    head = packed.pack_matrix(kernel, bias, spec.dtype, layout if panels else "kernel")
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
    ops/packed.py; platform: of the devices that run it; default: here.

    With panels all but products computes in float32, whatever the model's dtype; the products do
    too where the processor has none of bfloat16: that is faster than bfloat16's products by XLA at
    any number of rows.
    """
    text = params["text_decoder"]
    width = text["token_embedding"]["value"].shape[1]
    layout = packed.choose_layout(
        platform or jax.default_backend(),
        spec.implementation,
        num_weights=sum(x.size for x in jax.tree.leaves(text)),
        head_widths={width // spec.unimodal.num_heads, width // spec.multimodal.num_heads},
        mlp_widths={spec.unimodal.mlp_dim, spec.multimodal.mlp_dim},
        dtype=spec.dtype,
    )
    if layout in packed.PANELS:
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
        return packed.shared_tokens(image_tokens, spec.multimodal.cross == "open_clip", dtype)
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
    return packed.log_probs(states, weights["norm"], weights["head"])
