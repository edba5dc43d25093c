"""Tensors of image and text towers, as open_clip and transformers name them, and the parameters
here that they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coca_jax.config import Model, heads, shapes
from coca_jax.config.heads import CLASS, QUERY
from coca_jax.interop.open_clip_config import block_options
from coca_jax.interop.open_clip_weights import Layout

STYLES = ("open_clip", "transformers")


class TowersLayout(Layout):
    """The relation for one model.

    Args:
        model: config.model, of a family of towers.
        names: of the tensors in the file; they tell whose they are.
        logit_bias: whether there is the bias of the sigmoid loss.
    """

    def __init__(self, model: Model, names: Iterable[str], logit_bias: bool = False):
        names = set(names)
        self.parts, self.kind = [], heads.tower_kind(model.family)
        self.blocks = block_options(model)
        self.style = (
            "transformers" if any(n.startswith("vision_model.") for n in names) else STYLES[0]
        )
        self._add("log_scale/value", "logit_scale", ())
        if logit_bias:
            self._add("logit_bias/value", "logit_bias", ())
        if self.style == "transformers":
            self._transformers(model)
        else:
            prefix = "text." if any(n.startswith("text.") for n in names) else ""
            if self.kind.pool == QUERY:
                self._trunk(model)
            else:
                self._image_of_open_clip(model)
            self._text_of_open_clip(model, prefix)
        self._index()

    def _patches(self, model: Model, key: str) -> None:
        width, (high, wide) = model.image.width, shapes.pair(model.patch_size)
        self._add(
            "image_encoder/patch_embedding/kernel",
            f"{key}.weight",
            (high * wide * 3, width),
            shape_there=(width, 3, high, wide),
            axes=(2, 3, 1, 0),
        )
        if model.image.patch_bias:
            self._add("image_encoder/patch_embedding/bias", f"{key}.bias", (width,))

    def _image_of_open_clip(self, model: Model) -> None:
        image = model.image
        places = model.num_patches + 1
        self._add("image_encoder/class_token/value", "visual.class_embedding", (image.width,))
        self._add(
            "image_encoder/positions/value", "visual.positional_embedding", (places, image.width)
        )
        self._patches(model, "visual.conv1")
        if image.pre_norm:
            self._norm("image_encoder/pre_norm", "visual.ln_pre", image.width)
        blocks, own = "image_encoder/blocks", self.blocks["image"]
        self._stack(blocks, "visual.transformer", image.depth, image.width, image, own)
        self._norm("pooled_norm", "visual.ln_post", image.width)
        self._add("image_to_joint/kernel", "visual.proj", (image.width, model.embed_dim))

    def _text_of_open_clip(self, model: Model, prefix: str) -> None:
        text, decoder = model.text, "text_decoder"
        tokens, positions = (text.vocab_size, text.width), (text.max_len, text.width)
        self._add(f"{decoder}/token_embedding/value", f"{prefix}token_embedding.weight", tokens)
        self._add(f"{decoder}/positions/value", f"{prefix}positional_embedding", positions)
        blocks, own, depth = f"{decoder}/unimodal", self.blocks["text"], text.unimodal_depth
        self._stack(blocks, f"{prefix}transformer", depth, text.width, text, own)
        self._norm(f"{decoder}/unimodal_norm", f"{prefix}ln_final", text.width)
        joint, shape = f"{prefix}text_projection", (text.width, model.embed_dim)
        if self.kind.text_bias:
            self._linear("text_to_joint", joint, shape, None)
        else:
            self._add("text_to_joint/kernel", joint, shape)

    def _trunk(self, model: Model) -> None:
        """An image trunk of timm with a pooler: SigLIP's, or PE-Core's."""
        image, trunk, width = model.image, "visual.trunk", model.image.width
        places = model.num_patches + image.class_token
        if image.class_token:
            token = "image_encoder/class_token/value", f"{trunk}.cls_token"
            self._add(*token, (width,), shape_there=(1, 1, width))
        self._add(
            "image_encoder/positions/value",
            f"{trunk}.pos_embed",
            (places, width),
            shape_there=(1, places, width),
        )
        self._patches(model, f"{trunk}.patch_embed.proj")
        if image.pre_norm:
            self._norm("image_encoder/pre_norm", f"{trunk}.norm_pre", width)
        turned = self.blocks["image"]["positions"] != "learned"
        head = (image.num_heads, width // image.num_heads)
        for layer in range(image.depth):
            here, there = "image_encoder/blocks/layers", f"{trunk}.blocks.{layer}"
            self._norm(f"{here}/attention_norm", f"{there}.norm1", width, layer)
            parts = ("query", "key", "value")
            qkv = f"{here}/attention", f"{there}.attn.qkv", parts, width, head
            self._fused(*qkv, layer, turned=turned)
            self._out(f"{here}/attention/out", f"{there}.attn.proj", width, head, layer)
            self._norm(f"{here}/mlp_norm", f"{there}.norm2", width, layer)
            self._linear(f"{here}/mlp/in", f"{there}.mlp.fc1", (width, image.mlp_dim), layer)
            self._linear(f"{here}/mlp/out", f"{there}.mlp.fc2", (image.mlp_dim, width), layer)
        self._norm("image_encoder/final_norm", f"{trunk}.norm", width)
        self._pool_of_timm(model, f"{trunk}.attn_pool")
        if self.kind.projection:
            joint = f"{trunk}.head", (width, model.embed_dim)
            self._linear("image_to_joint", *joint, None)

    def _pool_of_timm(self, model: Model, key: str) -> None:
        path, width, heads = "contrastive_pooler", model.image.width, model.pooler.num_heads
        head, mlp = (heads, width // heads), model.pooler.mlp_dim or model.image.mlp_dim
        self._add(f"{path}/query/value", f"{key}.latent", (1, width), shape_there=(1, 1, width))
        self._fused(f"{path}/attention", f"{key}.q", ("query",), width, head)
        self._fused(f"{path}/attention", f"{key}.kv", ("key", "value"), width, head)
        self._out(f"{path}/attention/out", f"{key}.proj", width, head)
        self._norm(f"{path}/norm", f"{key}.norm", width)
        self._linear(f"{path}/mlp/in", f"{key}.mlp.fc1", (width, mlp), None)
        self._linear(f"{path}/mlp/out", f"{key}.mlp.fc2", (mlp, width), None)

    def _fused(
        self,
        path: str,
        key: str,
        parts: tuple[str, ...],
        width: int,
        head: tuple[int, int],
        layer: int | None = None,
        turned: bool = False,
    ) -> None:
        """Projections of attention that are rows of one matrix there.

        turned: queries and keys have rotary positions. There the numbers of a head are those of
        columns, then those of rows, and the two that are turned together are neighbours; here rows
        come first, and the two stand half a head apart (see models/layers.py).
        """
        heads, wide = head
        for index, name in enumerate(parts):
            rows = (index * width, (index + 1) * width) if len(parts) > 1 else None
            more: dict[str, Any] = dict(layer=layer, rows=rows)
            kernel: dict[str, Any] = dict(axes=(1, 0))
            bias: dict[str, Any] = {}
            if turned and name != "value":
                split = (heads, 2, wide // 4, 2)  # heads, column or row, angles, the two numbers
                kernel = dict(view=(*split, width), flip=(1,), axes=(4, 0, 3, 1, 2))
                bias = dict(view=split, flip=(1,), axes=(0, 3, 1, 2))
            weight = f"{path}/{name}/kernel", f"{key}.weight", (width, *head)
            self._add(*weight, shape_there=(width, width), **(kernel | more))
            own = f"{path}/{name}/bias", f"{key}.bias", head
            self._add(*own, shape_there=(width,), **(bias | more))

    def _out(
        self, path: str, key: str, width: int, head: tuple[int, int], layer: int | None = None
    ) -> None:
        """The projection behind attention."""
        square: dict[str, Any] = dict(shape_there=(width, width), axes=(1, 0), layer=layer)
        self._add(f"{path}/kernel", f"{key}.weight", (*head, width), **square)
        self._add(f"{path}/bias", f"{key}.bias", (width,), layer=layer)

    def _transformers(self, model: Model) -> None:
        image, text, embed = model.image, model.text, model.embed_dim
        clip = self.kind.pool == CLASS
        vision, places = "vision_model", model.num_patches
        if clip:
            token = f"{vision}.embeddings.class_embedding"
            self._add("image_encoder/class_token/value", token, (image.width,))
            self._norm("image_encoder/pre_norm", f"{vision}.pre_layrnorm", image.width)
        self._add(
            "image_encoder/positions/value",
            f"{vision}.embeddings.position_embedding.weight",
            (places + clip, image.width),
        )
        self._patches(model, f"{vision}.embeddings.patch_embedding")
        self._encoder("image_encoder/blocks", vision, image.depth, image.width, image)
        norm = "pooled_norm" if clip else "image_encoder/final_norm"
        self._norm(norm, f"{vision}.post_layernorm", image.width)
        decoder, written = "text_decoder", "text_model"
        tokens, positions = (text.vocab_size, text.width), (text.max_len, text.width)
        embeddings = f"{written}.embeddings"
        self._add(
            f"{decoder}/token_embedding/value", f"{embeddings}.token_embedding.weight", tokens
        )
        self._add(
            f"{decoder}/positions/value", f"{embeddings}.position_embedding.weight", positions
        )
        self._encoder(f"{decoder}/unimodal", written, text.unimodal_depth, text.width, text)
        self._norm(f"{decoder}/unimodal_norm", f"{written}.final_layer_norm", text.width)
        if clip:
            for path, key, width in (
                ("image_to_joint", "visual_projection", image.width),
                ("text_to_joint", "text_projection", text.width),
            ):
                shape = (width, embed)
                self._add(
                    f"{path}/kernel", f"{key}.weight", shape, shape_there=shape[::-1], axes=(1, 0)
                )
        else:
            self._linear("text_to_joint", f"{written}.head", (text.width, embed), None)
            self._pooling_head(model, f"{vision}.head")

    def _pooling_head(self, model: Model, key: str) -> None:
        path, image = "contrastive_pooler", model.image
        width = image.width
        self._add(f"{path}/query/value", f"{key}.probe", (1, width), shape_there=(1, 1, width))
        heads = model.pooler.num_heads
        self._attention(f"{path}/attention", f"{key}.attention", width, width, heads)
        self._norm(f"{path}/norm", f"{key}.layernorm", width)
        self._linear(f"{path}/mlp/in", f"{key}.mlp.fc1", (width, image.mlp_dim), None)
        self._linear(f"{path}/mlp/out", f"{key}.mlp.fc2", (image.mlp_dim, width), None)

    def _encoder(self, path: str, key: str, depth: int, width: int, tower: Any) -> None:
        heads, mlp = tower.num_heads, tower.mlp_dim
        head = (heads, width // heads)
        square = dict(shape_there=(width, width), axes=(1, 0))
        for layer in range(depth):
            here, there = f"{path}/layers", f"{key}.encoder.layers.{layer}"
            self._norm(f"{here}/attention_norm", f"{there}.layer_norm1", width, layer)
            for name in ("query", "key", "value"):
                kernel, part = f"{here}/attention/{name}", f"{there}.self_attn.{name[0]}_proj"
                shape = (width, *head)
                self._add(f"{kernel}/kernel", f"{part}.weight", shape, layer=layer, **square)
                self._add(f"{kernel}/bias", f"{part}.bias", head, shape_there=(width,), layer=layer)
            out, part = f"{here}/attention/out", f"{there}.self_attn.out_proj"
            self._add(f"{out}/kernel", f"{part}.weight", (*head, width), layer=layer, **square)
            self._add(f"{out}/bias", f"{part}.bias", (width,), layer=layer)
            self._norm(f"{here}/mlp_norm", f"{there}.layer_norm2", width, layer)
            self._linear(f"{here}/mlp/in", f"{there}.mlp.fc1", (width, mlp), layer)
            self._linear(f"{here}/mlp/out", f"{there}.mlp.fc2", (mlp, width), layer)
