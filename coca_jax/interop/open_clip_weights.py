"""Which part of which open_clip tensor is which part of which parameter here, both ways.

Every relation has one form: some rows of an open_clip tensor, with its axes permuted and reshaped,
are a parameter, or one layer of a stacked one. Projections are transposed; in open_clip the
queries, keys and values of a layer lie in one tensor, row after row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from coca_jax.config import Model, heads, shapes
from coca_jax.interop import safetensors
from coca_jax.interop.open_clip_config import block_options
from coca_jax.interop.safetensors import Blocks

SHOWN = 5  # names listed in an error


class Part(NamedTuple):
    """path: 'a/b/c' of a parameter; layer: its index in the stack, or None.

    key: of the open_clip tensor; rows: which of its first axis, None for all. shape_there: of those
    rows; view: the same with axes split, () for none; flip: axes that run backwards here; axes:
    their order here; shape: of the parameter (of one layer).
    """

    path: str
    layer: int | None
    key: str
    rows: tuple[int, int] | None
    shape_there: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    view: tuple[int, ...] = ()
    flip: tuple[int, ...] = ()

    def here(self, tensor: np.ndarray) -> np.ndarray:
        """The open_clip tensor's part as it is here, float32."""
        rows = tensor if self.rows is None else tensor[slice(*self.rows)]
        split = np.flip(rows.reshape(self.view or self.shape_there), self.flip)
        return split.transpose(self.axes).reshape(self.shape)

    def there(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `here`; takes the whole (stacked) parameter."""
        value = parameter if self.layer is None else parameter[self.layer]
        split = self.view or self.shape_there
        permuted = np.asarray(value).reshape(tuple(split[axis] for axis in self.axes))
        whole = np.flip(permuted.transpose(np.argsort(self.axes)), self.flip)
        return whole.reshape(self.shape_there)


class Layout:
    """The relation for one model.

    Args:
        model: config.model, in an arrangement that open_clip has (see open_clip_config).
        logit_bias: whether the model has the bias of the sigmoid loss.
    """

    def __init__(self, model: Model, logit_bias: bool = False):
        self.parts: list[Part] = []
        self.blocks = block_options(model)
        self._add("log_scale/value", "logit_scale", ())
        if logit_bias:
            self._add("logit_bias/value", "logit_bias", ())
        self._image_side(model)
        self._text_side(model)
        self._index()

    def _index(self) -> None:
        """Sorts the parts by parameter and by tensor, once all are there."""
        self.by_path: dict[str, list[Part]] = {}
        self.by_key: dict[str, list[Part]] = {}
        for part in self.parts:
            self.by_path.setdefault(part.path, []).append(part)
            self.by_key.setdefault(part.key, []).append(part)
        for parts in self.by_path.values():
            parts.sort(key=lambda part: part.layer or 0)
        for parts in self.by_key.values():
            parts.sort(key=lambda part: part.rows or (0, 0))

    def _image_side(self, model: Model) -> None:
        """`visual` there; image_encoder, the poolers and what leads to the embedding here."""
        image, pooler, dim = model.image, model.pooler, model.text.width
        width, (high, wide) = image.width, shapes.pair(model.patch_size)
        kind = heads.pooler_kind(pooler.kind)
        positions = model.num_patches + 1
        self._add("image_encoder/class_token/value", "visual.class_embedding", (width,))
        self._add(
            "image_encoder/positions/value", "visual.positional_embedding", (positions, width)
        )
        self._add(
            "image_encoder/patch_embedding/kernel",
            "visual.conv1.weight",
            (high * wide * 3, width),
            shape_there=(width, 3, high, wide),
            axes=(2, 3, 1, 0),
        )
        if image.pre_norm:
            self._norm("image_encoder/pre_norm", "visual.ln_pre", width)
        blocks, key = "image_encoder/blocks", "visual.transformer"
        self._stack(blocks, key, image.depth, width, image, self.blocks["image"])
        if not kind.second_pooler:
            norm = "pooled_norm" if kind.by_query else "image_encoder/final_norm"
            self._norm(norm, "visual.ln_post", dim)
            self._add("image_to_joint/kernel", "visual.proj", (dim, model.embed_dim))
        else:
            self._norm("image_encoder/final_norm", "visual.ln_post", width)
            source = dim if kind.in_cascade else width
            self._pooler("contrastive_pooler", "visual.attn_pool_contrastive", 1, source, model)
        queries = pooler.num_queries
        if kind.pools:
            self._pooler("generative_pooler", "visual.attn_pool", queries, width, model)

    def _text_side(self, model: Model) -> None:
        """`text` and `text_decoder` there; text_decoder and what leads to the embedding here."""
        text, dim, vocab = model.text, model.text.width, model.text.vocab_size
        self._add("text_decoder/token_embedding/value", "text.token_embedding.weight", (vocab, dim))
        self._add(
            "text_decoder/positions/value", "text.positional_embedding", (text.max_len + 1, dim)
        )
        self._add("text_decoder/cls/value", "text.cls_emb", (dim,))
        blocks, key = "text_decoder/unimodal", "text.transformer"
        self._stack(blocks, key, text.unimodal_depth, dim, text, self.blocks["text"])
        self._norm("text_decoder/unimodal_norm", "text.ln_final", dim)
        self._add("text_to_joint/kernel", "text.text_projection", (dim, model.embed_dim))
        heads = text.multimodal_heads or text.num_heads
        mlp = text.multimodal_mlp_dim or text.mlp_dim
        for layer in range(text.multimodal_depth):
            path = "text_decoder/multimodal/layers"
            own = f"text_decoder.resblocks.{layer}"
            cross = f"text_decoder.cross_attn.{layer}"
            options = self.blocks["multimodal"]
            self._block(path, "", own, dim, heads, mlp, layer, options)
            self._block(path, "cross_", cross, dim, heads, mlp, layer, options)
            self._norm(f"{path}/context_norm", f"{cross}.ln_1_kv", dim, layer)
        self._norm("text_decoder/multimodal_norm", "text_decoder.ln_final", dim)
        self._add("text_decoder/head/kernel/value", "text_decoder.text_projection", (dim, vocab))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter here, by path, layers stacked."""
        return {
            path: (() if parts[0].layer is None else (len(parts),)) + parts[0].shape
            for path, parts in self.by_path.items()
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every open_clip tensor, by key."""
        shapes = {}
        for key, parts in self.by_key.items():
            shape = parts[0].shape_there
            if parts[0].rows is not None:
                shape = (sum(part.shape_there[0] for part in parts),) + shape[1:]
            shapes[key] = shape
        return shapes

    def check(self, source: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError naming the open_clip tensors that are unknown, missing, misshapen or
        not of floating-point type in `source`."""
        problems = compare(
            {name: tuple(array.shape) for name, array in source.items()}, self.tensors()
        )
        wrong = [n for n, a in source.items() if a.dtype.kind not in "fV" and n in self.by_key]
        if wrong:
            problems.append(f"not floating-point: {listed(wrong)}")
        if problems:
            raise ValueError(f"the tensors do not fit the model: {'; '.join(problems)}")

    def read(self, source: Mapping[str, np.ndarray]) -> dict[str, Blocks]:
        """Parameters here from (checked) open_clip tensors, a layer at a time, float32.

        Raises, as the blocks are read:
            ValueError: naming a tensor that has values that are not finite.
        """

        def blocks(path: str) -> Iterable[np.ndarray]:
            for part in self.by_path[path]:
                block = part.here(source[part.key]).astype(np.float32)
                safetensors.check_finite(part.key, block)
                yield block

        return {
            path: Blocks(shape, functools.partial(blocks, path))
            for path, shape in self.parameters().items()
        }

    def write(self, params: Mapping[str, np.ndarray]) -> dict[str, Blocks]:
        """open_clip tensors from parameters here (flat, by path), a tensor at a time, float32.

        Raises:
            ValueError: naming the parameters that are unknown, missing or misshapen; as the blocks
                are read, one that has values that are not finite.
        """
        problems = compare({k: tuple(v.shape) for k, v in params.items()}, self.parameters())
        if problems:
            raise ValueError(f"the parameters do not fit the model: {'; '.join(problems)}")

        def blocks(key: str) -> Iterable[np.ndarray]:
            for part in self.by_key[key]:
                block = np.asarray(part.there(params[part.path]), np.float32)
                safetensors.check_finite(part.path, block)
                yield block

        return {
            key: Blocks(shape, functools.partial(blocks, key))
            for key, shape in self.tensors().items()
        }

    def _add(
        self,
        path: str,
        key: str,
        shape: tuple[int, ...],
        *,
        shape_there: tuple[int, ...] | None = None,
        axes: tuple[int, ...] | None = None,
        layer: int | None = None,
        rows: tuple[int, int] | None = None,
        view: tuple[int, ...] = (),
        flip: tuple[int, ...] = (),
    ) -> None:
        shape_there = shape if shape_there is None else shape_there
        axes = tuple(range(len(shape_there))) if axes is None else axes
        self.parts.append(Part(path, layer, key, rows, shape_there, axes, shape, view, flip))

    def _norm(self, path: str, key: str, width: int, layer: int | None = None) -> None:
        self._add(f"{path}/scale", f"{key}.weight", (width,), layer=layer)
        self._add(f"{path}/bias", f"{key}.bias", (width,), layer=layer)

    def _linear(self, path: str, key: str, shape: tuple[int, int], layer: int | None) -> None:
        transposed = dict(shape_there=shape[::-1], axes=(1, 0))
        self._add(f"{path}/kernel", f"{key}.weight", shape, layer=layer, **transposed)
        self._add(f"{path}/bias", f"{key}.bias", shape[1:], layer=layer)

    def _attention(
        self, path: str, key: str, width: int, source: int, heads: int, layer: int | None = None
    ) -> None:
        head = (heads, width // heads)
        fused = source == width
        for index, name in enumerate(("query", "key", "value")):
            into = width if name == "query" else source
            rows = (index * width, (index + 1) * width)
            weight = "in_proj_weight" if fused else f"{name[0]}_proj_weight"
            self._add(
                f"{path}/{name}/kernel",
                f"{key}.{weight}",
                (into, *head),
                shape_there=(width, into),
                axes=(1, 0),
                layer=layer,
                rows=rows if fused else None,
            )
            self._add(
                f"{path}/{name}/bias",
                f"{key}.in_proj_bias",
                head,
                shape_there=(width,),
                layer=layer,
                rows=rows,
            )
        self._add(
            f"{path}/out/kernel",
            f"{key}.out_proj.weight",
            (*head, width),
            shape_there=(width, width),
            axes=(1, 0),
            layer=layer,
        )
        self._add(f"{path}/out/bias", f"{key}.out_proj.bias", (width,), layer=layer)

    def _block(
        self,
        path: str,
        prefix: str,
        key: str,
        width: int,
        heads: int,
        mlp: int,
        layer: int,
        options: dict[str, Any],
    ) -> None:
        attention, head = f"{path}/{prefix}attention", width // heads
        first_norm = f"{path}/cross_norm" if prefix else f"{path}/attention_norm"
        self._norm(first_norm, f"{key}.ln_1", width, layer)
        self._attention(attention, f"{key}.attn", width, width, heads, layer)
        self._norm(f"{path}/{prefix}mlp_norm", f"{key}.ln_2", width, layer)
        self._linear(f"{path}/{prefix}mlp/in", f"{key}.mlp.c_fc", (width, mlp), layer)
        self._linear(f"{path}/{prefix}mlp/out", f"{key}.mlp.c_proj", (mlp, width), layer)
        if options["qk_norm"]:
            for name in ("query", "key"):
                self._norm(f"{attention}/{name}_norm", f"{key}.attn.ln_{name[0]}", head, layer)
        if options["layer_scale"]:
            for part, number in (("attention", 1), ("mlp", 2)):
                scale = f"{path}/{prefix}{part}_scale/gain"
                self._add(scale, f"{key}.ls_{number}.gamma", (width,), layer=layer)

    def _stack(
        self, path: str, key: str, depth: int, width: int, tower: Any, options: dict[str, Any]
    ) -> None:
        heads, mlp = tower.num_heads, tower.mlp_dim
        for layer in range(depth):
            block = f"{key}.resblocks.{layer}"
            self._block(f"{path}/layers", "", block, width, heads, mlp, layer, options)

    def _pooler(self, path: str, key: str, queries: int, source: int, model: Model) -> None:
        width, heads = model.text.width, model.pooler.num_heads
        self._add(f"{path}/query/value", f"{key}.query", (queries, width))
        self._norm(f"{path}/query_norm", f"{key}.ln_q", width)
        self._norm(f"{path}/token_norm", f"{key}.ln_k", source)
        self._attention(f"{path}/attention", f"{key}.attn", width, source, heads)


def compare(given: dict[str, tuple], wanted: dict[str, tuple]) -> list[str]:
    """What is wrong with the shapes `given`, one line each for missing, unknown and misshapen.

    A scalar may also be an array of one element.
    """
    problems = []
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unknown:
        problems.append(f"unknown: {listed(unknown)}")
    misshapen = [
        f"{name} is {given[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape and not (shape == () and given[name] == (1,))
    ]
    if misshapen:
        problems.append(f"misshapen: {listed(misshapen)}")
    return problems


def listed(names: list[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of elements over all shapes."""
    return sum(math.prod(shape) for shape in shapes.values())
