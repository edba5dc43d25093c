"""The transformer block of every tower, and stacks of it: the only place with scan and remat.

Shape letters: B batch, N queries, M keys or cache slots, D width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from coca_jax.models.layers import RECORDED, Attention, BlockOptions, LayerScale, Mlp, Norm
from coca_jax.ops import decode_layouts
from coca_jax.parallel.sharding import constrain

STACKED = "layers"  # the name above parameters whose first axis runs over layers


class Step(NamedTuple):
    """What a block needs to run rows of text behind those of a cache.

    cache: of its self-attention. slot: where the rows' own keys and values go. mask: bool
    [B, N, M], which slots each row may look at, its own included.
    """

    cache: decode_layouts.Cache
    slot: jax.Array | int
    mask: jax.Array


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention when `cross`, MLP.

    One description for training, prefill and cached decoding: with a `Step` in place of the mask,
    self-attention reads and writes a cache. Decoding may give packed weights for some parts, as the
    variables 'packed' (see ops/decode_layouts.py); those parts then run as one piece each.

    cross: None, 'paper' (self-attention, cross-attention, one MLP: the layout that reproduces the
    paper's parameter counts) or 'open_clip' (a full block, then cross-attention over normalised
    context with an MLP of its own).
    causal: whether self-attention sees only a token's own place and before.
    kv_heads: of all attention, see layers.Attention.
    """

    width: int
    num_heads: int
    mlp_dim: int
    depth: int
    kv_heads: int = 0
    cross: str | None = None
    causal: bool = False
    options: BlockOptions = BlockOptions()

    def setup(self) -> None:
        shared: dict[str, Any] = dict(
            out_scale=(2 * self.depth) ** -0.5,  # keeps the residual stream's variance flat
            options=self.options,
        )
        norm = functools.partial(Norm, self.options)
        attention = functools.partial(
            Attention, self.width, self.num_heads, self.kv_heads, **shared
        )
        mlp = functools.partial(Mlp, self.mlp_dim, **shared)
        turned = self.options.rotary
        self.attention_norm, self.attention = norm(), attention(turned=turned)
        self.mlp_norm, self.mlp = norm(), mlp()
        if self.cross is not None:
            self.cross_norm, self.cross_attention = norm(), attention()
        if self.cross == "open_clip":
            self.context_norm = norm()
            self.cross_mlp_norm, self.cross_mlp = norm(), mlp()
        if self.options.layer_scale:
            scale = functools.partial(LayerScale, self.options.layer_scale)
            self.attention_scale, self.mlp_scale = scale(), scale()
            if self.cross is not None:
                self.cross_attention_scale = scale()
            if self.cross == "open_clip":
                self.cross_mlp_scale = scale()

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | Step | None,
        context: Any,
        rotation: jax.Array | None = None,
    ) -> tuple[jax.Array, decode_layouts.Cache | None]:
        """x [B, N, D] -> the same, and the cache that a Step brought, written to.

        mask: bool, broadcastable to [B, 1, N, N], of self-attention, or None; a Step in decoding.
        context: [B, M, W]; in decoding what `image_cache` gives, or in panels image tokens.
        rotation: of x in self-attention, see rotary.py.
        """
        x, cache = self.attend_to_text(x, mask, rotation)
        if self.cross == "open_clip":
            x = self.feed_forward(x, "mlp")
        if self.cross is not None:
            x = self.attend_to_image(x, context)
        x = self.feed_forward(x, "cross_mlp" if self.cross == "open_clip" else "mlp")
        return x, cache

    def _packed(self, part: str) -> Any:
        return self.variables.get("packed", {}).get(part)

    def _add(self, x: jax.Array, update: jax.Array, part: str) -> jax.Array:
        if self.options.layer_scale:
            update = getattr(self, f"{part}_scale")(update)
        x = constrain(self.options.ops.add_update(x, update), "batch", "length", "act_embed")
        return checkpoint_name(x, "residual")

    def attend_to_text(
        self, x: jax.Array, mask: jax.Array | Step | None, rotation: jax.Array | None
    ) -> tuple[jax.Array, decode_layouts.Cache | None]:
        """The residual part of self-attention."""
        if not isinstance(mask, Step):
            normal = self.attention_norm(x)
            out = self.attention(normal, mask=mask, causal=self.causal, rotation=rotation)
            return self._add(x, out, "attention"), None
        weights = self._packed("attention")
        if weights is not None:
            return decode_layouts.self_attention(x, weights, mask.mask, mask.slot, mask.cache)
        normal = self.attention_norm(x)
        cache = decode_layouts.write(mask.cache, *self.attention.cache(normal, rotation), mask.slot)
        out = self.attention.attend_cached(normal, cache, mask.mask, rotation)
        return self._add(x, out, "attention"), cache

    def attend_to_image(self, x: jax.Array, context: Any) -> jax.Array:
        """The residual part of cross-attention."""
        weights = self._packed("cross_attention")
        if weights is not None:
            return decode_layouts.cross_attention(x, weights, context)
        normal = self.cross_norm(x)
        if isinstance(context, decode_layouts.Cache):
            out = self.cross_attention.attend_cached(normal, context)
            return self._add(x, out, "cross_attention")
        if self.cross == "open_clip":
            context = self.context_norm(context)
        return self._add(x, self.cross_attention(normal, context), "cross_attention")

    def feed_forward(self, x: jax.Array, part: str) -> jax.Array:
        """The residual part of an MLP: 'mlp' or 'cross_mlp'."""
        weights = self._packed(part)
        if weights is not None:
            return decode_layouts.mlp(x, weights, self.options.activation)
        mlp, norm = getattr(self, part), getattr(self, f"{part}_norm")
        return self._add(x, mlp(norm(x)), part)

    def image_cache(self, tokens: jax.Array) -> decode_layouts.Cache:
        """What cross-attention reads of image tokens [B, Q, D], for a whole caption."""
        weights = self._packed("cross_attention")
        if weights is not None:
            return decode_layouts.image_cache(weights, tokens, self.num_heads, self.options.dtype)
        if self.cross == "open_clip":
            tokens = self.context_norm(tokens)
        return self.cross_attention.cache(tokens.astype(self.options.dtype))


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # What costs products or reductions to make again; norms, softmax and GELU are recomputed.
    "named": jax.checkpoint_policies.save_only_these_names(
        "qkv", "attended", "mlp", "residual", "statistics"
    ),
    "full": None,  # save nothing but each block's input
}


class Stack(nn.Module):
    """`depth` blocks with parameters stacked on a leading axis, run by one scan.

    remat: 'none' | 'dots' (save the products) | 'named' (save the tensors that are dear to make
    again) | 'full' (save only each block's input). causal: of self-attention. kv_heads: see Block.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    kv_heads: int = 0
    cross: str | None = None
    causal: bool = False
    remat: str = "none"
    options: BlockOptions = BlockOptions()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        context: jax.Array | None = None,
        rotation: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, N, D] -> the same; mask, context and rotation as of Block."""
        ops, length = self.options.ops, x.shape[1]
        x, mask, rotation = ops.pad_sequences(x, mask, rotation, self.num_heads, self.causal)
        mask, causal = ops.prepare_mask(mask, self.causal, x.shape[1])
        fields: dict[str, Any] = dict(
            width=x.shape[-1],
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            depth=self.depth,
            kv_heads=self.kv_heads,
            cross=self.cross,
            causal=causal,
        )
        known = dict(activation=self.options.activation, dtype=self.options.dtype)
        loop = ops.layer_loop(fields | known | self.options.beyond(known), self.remat)
        if loop is not None and not self.is_initializing():
            return loop(self.variables["params"][STACKED], x, mask, context)
        if self._is_narrow() and not self.is_mutable_collection(RECORDED):
            return self._by_number(fields, x, mask, context, rotation)[:, :length]
        block: Any = Block
        if self.remat != "none":
            # A loop keeps what is made again apart from what was; without one the compiler would
            # see that both are the same, and keep all.
            apart = ops.unroll(self.depth) > 1
            block = nn.remat(Block, prevent_cse=apart, policy=REMAT_POLICIES[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0, RECORDED: 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=ops.unroll(self.depth),
            # Checked, a block is traced once more; to draw the same parameters it must be there.
            check_constancy_invariants=self.is_initializing(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name=STACKED, options=self.options, **fields)
        return layers(x, mask, context, rotation)[0][:, :length]

    def _is_narrow(self) -> bool:
        """Whether there are bfloat16 parameters, which only inference has, and a way to them."""
        if self.is_initializing() or self.options.ops.layer_of is None:
            return False
        leaves = jax.tree.leaves(self.variables["params"][STACKED])
        return any(leaf.dtype == jnp.bfloat16 for leaf in leaves)

    def _by_number(self, fields: dict[str, Any], x: jax.Array, *inputs: Any) -> jax.Array:
        """The stack as a loop over numbers, which takes each layer's parameters by `layer_of`."""
        params, narrow = self.variables["params"][STACKED], self.options.ops.layer_of
        assert narrow is not None

        def of(leaf: jax.Array, number: jax.Array) -> jax.Array:
            return narrow(leaf, number) if leaf.dtype == jnp.bfloat16 else leaf[number]

        def run(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            own = jax.tree.map(lambda leaf: of(leaf, number), params)
            block = Block(options=self.options, parent=None, **fields)
            return block.apply({"params": own}, x, *inputs)[0], None

        return jax.lax.scan(run, x, jnp.arange(self.depth))[0]
