"""Weights of an image encoder alone: DINOv2 (Oquab et al. 2023), with and without registers, and
DINOv3 (Simeoni et al. 2025) in the layouts of transformers and Meta, and DINOv2 in timm's.

Tensors of all layouts get one set of names first (`canonical`), so that one relation to the
parameters here serves them all. Sizes follow from the tensors; what no tensor shows (heads, norm
epsilon, activation, preprocessing) is read from the configuration beside them, or is the layout's.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from coca_jax.config import Model, shapes
from coca_jax.data.sources import files
from coca_jax.interop.open_clip_config import is_number, is_whole, short
from coca_jax.interop.open_clip_weights import Layout, listed
from coca_jax.runtime import bounded_json

FAMILY = "vision"
CONFIG_FILE, PREPROCESSOR = "config.json", "preprocessor_config.json"
MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # of transformers
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
USUAL_SIZE = 224
ROPE_SPAN = 4 * math.pi  # DINOv3: coordinates from -1 to 1, times 2 pi
ACTIVATIONS = {"gelu": "gelu_exact", "silu": "silu", "relu": "relu", "gelu_pytorch_tanh": "gelu"}
# Heads by width, of models whose files have no configuration.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 20, 1536: 24, 4096: 32}

_BLOCK = re.compile(r"(?:encoder\.layer|layer|blocks(?:\.\d+)?)\.(\d+)\.(.+)")
_PREFIX = re.compile(r"(?:dinov2|dinov2_with_registers|dinov3_vit|model|backbone|teacher)\.")
_TOP = {
    "cls_token": "cls",
    "register_tokens": "registers",
    "storage_tokens": "registers",
    "reg_token": "registers",
    "pos_embed": "positions",
    "position_embeddings": "positions",
    "patch_embed.proj": "patch",
    "patch_embeddings.projection": "patch",
    "patch_embeddings": "patch",
    "layernorm": "norm",
    "norm": "norm",
}
# Parts of a block; a tuple names parts that are rows of one tensor.
_PARTS: dict[str, str | tuple[str, ...]] = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": ("q", "k", "v"),
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attn.proj": "o",
    "attention.output.dense": "o",
    "attention.o_proj": "o",
    "ls1.gamma": "scale1",
    "ls2.gamma": "scale2",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
    "mlp.fc1": "in",
    "mlp.up_proj": "in",
    "mlp.w2": "in",
    "mlp.gate_proj": "gate",
    "mlp.w1": "gate",
    "mlp.w12": ("gate", "in"),
    "mlp.weights_in": ("gate", "in"),
    "mlp.fc2": "out",
    "mlp.w3": "out",
    "mlp.down_proj": "out",
    "mlp.weights_out": "out",
}
# Only pretraining reads these, or they follow from the configuration.
_UNREAD = re.compile(
    r".*(?:mask_token|bias_mask|periods|inv_freq)|(?:local_cls_norm|head|classifier)\..*"
)


def is_vision(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors are of an encoder in one of these layouts, by their names."""
    names = {_PREFIX.sub("", name, count=1) for name in tensors}
    cls = {"cls_token", "embeddings.cls_token"} & names
    return bool(cls) and any(_BLOCK.fullmatch(name) for name in names)


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by one set of names: 'cls', 'registers', 'positions', 'patch.weight', 'norm.weight',
    '<block>.q.weight' and so on. Absent biases of projections are zeros.

    Raises ValueError naming tensors that no layout has.
    """
    found: dict[str, np.ndarray] = {}
    unknown = []
    for full, tensor in tensors.items():
        name = _PREFIX.sub("", full, count=1).removeprefix("embeddings.")
        if _UNREAD.fullmatch(name) or not tensor.size:  # no registers are an empty tensor
            continue
        block = _BLOCK.fullmatch(name)
        stem, _, leaf = (block[2] if block else name).rpartition(".")
        if leaf not in ("weight", "bias"):
            stem, leaf = (block[2] if block else name), ""
        part: Any = (_PARTS if block else _TOP).get(stem)
        if part is None:
            unknown.append(full)
            continue
        parts = part if isinstance(part, tuple) else (part,)
        if part == "in" and _is_gated(tensors, full):  # timm's name is the same with a gate
            parts = ("gate", "in")
        before = f"{block[1]}." if block else ""
        for one, rows in zip(parts, np.split(tensor, len(parts)) if len(parts) > 1 else [tensor]):
            found[f"{before}{one}{'.' if leaf else ''}{leaf}"] = rows
        if stem == "attn.qkv" and leaf == "bias" and f"{full}_mask" in tensors:
            # DINOv3 multiplies this bias by a mask that is 0 at the keys.
            found[f"{before}k.bias"] = np.zeros_like(found[f"{before}k.bias"])
    if unknown:
        raise ValueError(f"tensors that are not DINOv2's or DINOv3's: {listed(unknown)}")
    for name in [name for name in found if re.fullmatch(r"\d+\.\w+\.weight", name)]:
        bias = f"{name.removesuffix('weight')}bias"
        found.setdefault(bias, np.zeros(len(found[name]), np.float32))
    positions = found.get("positions")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        # timm adds no position to the class token where there are registers.
        padded = np.pad(np.asarray(positions, np.float32), ((0, 0), (1, 0), (0, 0)))
        found["positions"] = padded
    return found


def _is_gated(tensors: Mapping[str, np.ndarray], name: str) -> bool:
    """Whether the first product of an MLP makes the gate as well: twice what the second reads."""
    stem, _, leaf = name.rpartition(".")
    second = tensors.get(f"{stem.removesuffix('1')}2.weight") if stem.endswith("fc1") else None
    return second is not None and tensors[f"{stem}.weight"].shape[0] == 2 * second.shape[1]


def find(weights: str, tensors: Mapping[str, np.ndarray], image_size: int = 0) -> dict[str, Any]:
    """dict(model, resize, mean, std) of `canonical` tensors of a file of weights.

    image_size: of the model; 0: that of the preprocessor beside the weights, or 224.
    Raises ValueError for tensors of no such model, or a configuration that does not fit them.
    """
    config = _beside(weights, CONFIG_FILE)
    width, _, patch, across = _shape(tensors, "patch.weight", 4)
    depth = 1 + max(int(name.split(".")[0]) for name in tensors if name[0].isdigit())
    registers = tensors["registers"].shape[1] if "registers" in tensors else 0
    positions = tensors.get("positions")
    gated, rotary = "0.gate.weight" in tensors, positions is None
    heads = config.get("num_attention_heads", HEADS.get(width))
    if patch != across or not is_whole(heads) or width % max(heads, 1):
        raise ValueError(
            f"an encoder of width {width} with {short(heads)} heads and patches of {patch} x "
            f"{across}: not DINOv2 or DINOv3"
        )
    eps = config.get("layer_norm_eps", 1e-5 if rotary else 1e-6)
    theta = config.get("rope_theta", 100.0)
    act = config.get("hidden_act", "silu" if gated else "gelu")
    if gated and config.get("model_type") != "dinov3_vit":
        act = "silu"  # DINOv2's gate has its own activation, whatever hidden_act says
    for key, value in (("layer_norm_eps", eps), ("rope_theta", theta)):
        if not is_number(value):
            raise ValueError(f"{CONFIG_FILE}: {key}={short(value)}: give a number")
    if act not in ACTIVATIONS:
        raise ValueError(f"{CONFIG_FILE}: hidden_act={short(act)}; only {', '.join(ACTIVATIONS)}")
    table = 0 if positions is None else patch * math.isqrt(positions.shape[1] - 1)
    how = _preprocessing(weights, config)
    size = image_size or how.pop("size") or min(USUAL_SIZE, table or USUAL_SIZE)
    how.pop("size", None)
    block: dict[str, Any] = dict(
        activation=ACTIVATIONS[act],
        norm_eps=eps,
        gated_mlp=gated,
        layer_scale=1.0 if "0.scale1" in tensors else 0.0,
        positions="rope" if rotary else "learned",
    )
    image = dict(
        width=width,
        depth=depth,
        mlp_dim=len(tensors["0.in.weight"]),
        num_heads=heads,
        class_token=True,
        final_norm="norm.weight" in tensors,
        patch_bias="patch.bias" in tensors,
        registers=registers,
        table_size=0 if table == size else table,
        resample="cubic" if registers else "bicubic",
        rope_theta=float(theta),
        rope_span=ROPE_SPAN if rotary else 0.0,
        block=block,
    )
    model = dict(
        family=FAMILY,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        dtype="float32",
        image_mean=tuple(how["mean"]),
        image_std=tuple(how["std"]),
        image=image,
    )
    return dict(model=model, **how)


def first_blocks(
    tensors: Mapping[str, np.ndarray], model: dict[str, Any], count: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, config.model) of an encoder whose output is that of its first `count` blocks,
    without the norm that follows the last one.

    Raises ValueError for more blocks than there are.
    """
    depth = model["image"]["depth"]
    if not 1 <= count <= depth:
        raise ValueError(f"--layers={count}: the encoder has {depth} blocks. Give 1 to {depth}.")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("norm.") and not (name[0].isdigit() and _number(name) >= count)
    }
    return kept, model | dict(image=model["image"] | dict(depth=count, final_norm=False))


def _number(name: str) -> int:
    return int(name.partition(".")[0])


def _shape(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != axes:
        raise ValueError(f"no tensor {name} with {axes} axes: not DINOv2 or DINOv3")
    return tensors[name].shape


def _beside(weights: str, name: str) -> dict[str, Any]:
    """The JSON object in a file beside the weights; {} where there is none."""
    path = os.path.join(os.path.dirname(weights), name)
    if not os.path.isfile(path):
        return {}
    found = bounded_json.parse(files.read_bounded(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def _preprocessing(weights: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """dict(resize, mean, std, size) of the preprocessor beside the weights, or timm's
    pretrained_cfg; size: 0 where neither says it."""
    given = _beside(weights, PREPROCESSOR)
    timm = config.get("pretrained_cfg")
    if isinstance(timm, dict):
        given = {f"image_{key}": timm[key] for key in ("mean", "std") if key in timm}
    found: dict[str, Any] = dict(resize="crop" if given.get("do_center_crop", True) else "squash")
    for key, usual in zip(("mean", "std"), IMAGENET):
        values = given.get(f"image_{key}", usual)
        if not isinstance(values, (list, tuple)) or not all(map(is_number, values)):
            raise ValueError(f"{PREPROCESSOR}: image_{key}={short(values)}: give three numbers")
        found[key] = list(values)
    size = given.get("crop_size") if found["resize"] == "crop" else given.get("size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return found | dict(size=size if is_whole(size) else 0)


class VisionLayout(Layout):
    """The relation between `canonical` tensors and the parameters of config.model."""

    def __init__(self, model: Model):
        self.parts = []
        image, width = model.image, model.image.width
        self._add("image_encoder/class_token/value", "cls", (width,), shape_there=(1, 1, width))
        block = image.block
        if image.registers:
            count = image.registers
            there: dict[str, Any] = dict(shape_there=(1, count, width))
            self._add("image_encoder/registers/value", "registers", (count, width), **there)
        if block["positions"] == "learned":
            places = math.prod(model.table_grid) + 1
            there = dict(shape_there=(1, places, width))
            self._add("image_encoder/positions/value", "positions", (places, width), **there)
        high, wide = shapes.pair(model.patch_size)
        self._add(
            "image_encoder/patch_embedding/kernel",
            "patch.weight",
            (high * wide * 3, width),
            shape_there=(width, 3, high, wide),
            axes=(2, 3, 1, 0),
        )
        if image.patch_bias:
            self._add("image_encoder/patch_embedding/bias", "patch.bias", (width,))
        for layer in range(image.depth):
            self._layer(layer, model)
        if image.final_norm:
            self._norm("image_encoder/final_norm", "norm", width)
        self._index()

    def _layer(self, layer: int, model: Model) -> None:
        image, width = model.image, model.image.width
        path, head = "image_encoder/blocks/layers", (image.num_heads, width // image.num_heads)
        square: dict[str, Any] = dict(shape_there=(width, width), axes=(1, 0), layer=layer)
        self._norm(f"{path}/attention_norm", f"{layer}.norm1", width, layer)
        for name in ("query", "key", "value"):
            key = f"{layer}.{name[0]}"
            self._add(f"{path}/attention/{name}/kernel", f"{key}.weight", (width, *head), **square)
            bias = f"{path}/attention/{name}/bias", f"{key}.bias", head
            self._add(*bias, shape_there=(width,), layer=layer)
        out = f"{path}/attention/out"
        self._add(f"{out}/kernel", f"{layer}.o.weight", (*head, width), **square)
        self._add(f"{out}/bias", f"{layer}.o.bias", (width,), layer=layer)
        self._norm(f"{path}/mlp_norm", f"{layer}.norm2", width, layer)
        inward = ("in", "gate") if image.block["gated_mlp"] else ("in",)
        for name in inward:
            self._linear(f"{path}/mlp/{name}", f"{layer}.{name}", (width, image.mlp_dim), layer)
        self._linear(f"{path}/mlp/out", f"{layer}.out", (image.mlp_dim, width), layer)
        if image.block["layer_scale"]:
            for part, number in (("attention", 1), ("mlp", 2)):
                scale = f"{path}/{part}_scale/gain"
                self._add(scale, f"{layer}.scale{number}", (width,), layer=layer)
