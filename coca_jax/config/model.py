"""The model's sizes and options: `config.model` and `config.head`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coca_jax.config import heads, shapes
from coca_jax.config.fields import (  # fmt: skip
    DEPTH,
    FLAG,
    HEADS,
    MAPPING,
    QUERIES,
    SHARE,
    SIDES,
    TEXT,
    THETA,
    WEIGHT,
    WIDTH,
    Section,
    choice,
    key,
    number,
    several,
    whole,
)
from coca_jax.config.shapes import Size

# The keys of Model that say what a block is. All blocks share them, but for those that a tower's
# own `block` has otherwise.
BLOCK = (
    *("activation", "gated_mlp", "norm", "norm_eps", "bias", "layer_scale", "positions"),
    *("qk_norm", "qk_norm_kind"),
)


@dataclasses.dataclass(frozen=True)
class ImageModel(Section):
    """The image encoder."""

    width: int = key(768, WIDTH, "of the residual stream")
    depth: int = key(12, DEPTH, "blocks")
    mlp_dim: int = key(3072, whole(1, 1 << 20, "channels"), "width inside the MLPs")
    num_heads: int = key(12, HEADS, "of attention")
    patch_dropout: float = key(0.0, SHARE, "share of patches left out in training (FLIP)")
    conv_widths: tuple[int, ...] = key(
        (), several(WIDTH), "stages of a convolutional stem in place of plain patches ..."
    )
    conv_depths: tuple[int, ...] = key(
        (), several(whole(0, 1024, "blocks")), "... and their residual blocks"
    )
    class_token: bool = key(False, FLAG, "a learned token before the patches, as open_clip has it")
    pre_norm: bool = key(False, FLAG, "a norm before the first block, as open_clip has it")
    final_norm: bool = key(True, FLAG, "a norm after the last block")
    patch_bias: bool = key(True, FLAG, "a bias in the projection of patches")
    registers: int = key(
        0, whole(0, 1024, "tokens"), "learned tokens beside the patches, read by nobody at the end"
    )
    rope_theta: float = key(100.0, THETA, "base of the waves of rotary positions")
    rope_start: float = key(
        0.0,
        number(0, 100),
        "row and column of the first patch in rotary positions; a class token is at 0",
    )
    block: Mapping[str, Any] = key(
        {}, MAPPING, "keys of the model's blocks that differ here, as {'norm_eps': 1e-6}"
    )


@dataclasses.dataclass(frozen=True)
class TextModel(Section):
    """The text decoder: its unimodal part, and the multimodal one that sees the image."""

    width: int = key(768, WIDTH, "of the residual stream")
    unimodal_depth: int = key(12, DEPTH, "blocks that see text alone")
    multimodal_depth: int = key(12, DEPTH, "blocks that attend to the image as well")
    mlp_dim: int = key(3072, whole(1, 1 << 20, "channels"), "width inside the MLPs")
    num_heads: int = key(12, HEADS, "of attention")
    vocab_size: int = key(64_000, whole(1, 1 << 24, "tokens"), "rows of the embedding")
    max_len: int = key(
        64, whole(3, 65_536, "tokens"), "caption tokens with begin and end, without [CLS]"
    )
    tie_embeddings: bool = key(False, FLAG, "the softmax layer is the embedding")
    head_bias: bool = key(True, FLAG, "a bias in the softmax layer")
    cls_mask: str = key(
        "exact", choice("exact", "shifted"), "'shifted': as open_clip's released models have it"
    )
    cross: str = key("paper", choice("paper", "open_clip"), "layout of the multimodal blocks")
    multimodal_heads: int = key(0, whole(0, 4096, "heads"), "of the multimodal part; 0: num_heads")
    multimodal_mlp_dim: int = key(
        0, whole(0, 1 << 20, "channels"), "of the multimodal part; 0: mlp_dim"
    )
    kv_heads: int = key(
        0,
        whole(0, 4096, "heads"),
        "of keys and values in both parts, each for several of queries; 0: as many as of queries",
    )
    rope_theta: float = key(10_000.0, THETA, "base of the waves of rotary positions")
    block: Mapping[str, Any] = key({}, MAPPING, "as image.block, of the unimodal part")
    multimodal_block: Mapping[str, Any] = key({}, MAPPING, "as image.block, of the multimodal part")


@dataclasses.dataclass(frozen=True)
class Pooler(Section):
    """The attentional poolers between the image encoder and what reads it."""

    kind: str = key(
        "cascade",
        choice(*heads.POOLERS),
        "whether the contrastive pooler reads the generative one's output (paper) or the encoder; "
        "'open_clip': one pooler, whose first query is the image embedding; 'none': none, the "
        "class token is that, and the decoder sees the patches",
    )
    num_queries: int = key(256, QUERIES, "image tokens that the decoder sees")
    num_heads: int = key(12, HEADS, "of attention")
    mlp_dim: int = key(
        0, whole(0, 1 << 20, "channels"), "inside the MLP of towers' pooler; 0: image.mlp_dim"
    )
    query_std: float = key(0.02, number(0, 100), "standard deviation of the queries at the start")
    project: bool = key(True, FLAG, "a projection from the pooled image to the contrastive space")
    block: Mapping[str, Any] = key({}, MAPPING, "as image.block, of all poolers and the task head")
    token_dropout: float = key(
        0.0, SHARE, "share of image tokens that the decoder does not see in training (OpenVision 2)"
    )


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """The paper's architecture at its Base size (Table 1)."""

    image_size: Size = key(288, SIDES, "side of the images, or (height, width)")
    patch_size: Size = key(18, SIDES, "side of a patch, or (height, width); divides image_size")
    family: str = key(
        "coca",
        choice("coca", *heads.TOWERS),
        "others than 'coca': towers without a decoder, of converted weights; not for training",
    )
    embed_dim: int = key(768, WIDTH, "of the contrastive space")
    dtype: str = key(
        "bfloat16",
        choice("float32", "bfloat16", "float64"),
        "compute; parameters stay float32. float64 is for checks on the CPU",
    )
    image_mean: tuple[float, ...] = key(
        (0.5, 0.5, 0.5), several(number(-10, 10), 3), "pixels in [0, 1] minus this ..."
    )
    image_std: tuple[float, ...] = key(
        (0.5, 0.5, 0.5), several(number(1e-3, 10), 3), "... over this"
    )
    temperature: float = key(
        0.07, number(1e-4, 100, "as 0.07"), "of the softmax at the start; learned"
    )
    implementation: str = key(
        "auto",
        choice("auto", "xla", "reference"),
        "how operations run; 'xla': no kernels of others, 'reference': plain JAX",
    )
    qk_norm: bool = key(False, FLAG, "RMS norm of queries and keys in each head, in all towers")
    qk_norm_kind: str = key(
        "rms", choice("rms", "layer"), "of qk_norm; 'layer': LayerNorm, as open_clip has it"
    )
    activation: str = key(
        "gelu", choice("gelu", "gelu_exact", "relu", "quick_gelu", "silu"), "of the MLPs"
    )
    gated_mlp: bool = key(
        False,
        FLAG,
        "MLPs multiply a second projection by the activation of the first: GEGLU with 'gelu', "
        "SwiGLU with 'silu'; half as many parameters more at equal mlp_dim",
    )
    norm: str = key("layer", choice("layer", "rms"), "LayerNorm or RMSNorm, in all towers")
    norm_eps: float = key(1e-5, number(1e-12, 1e-2, "as 1e-5"), "what norms add to the variance")
    bias: bool = key(
        True,
        FLAG,
        "biases in blocks, poolers and norms; image.patch_bias, text.head_bias and that of "
        "qk_norm_kind='layer' are apart",
    )
    layer_scale: float = key(
        0.0,
        number(0, 10, "0 being none"),
        "first value of a learned gain of each channel of every residual part; 0: none",
    )
    positions: str = key(
        "learned",
        choice("learned", "rope", "both"),
        "tables that are added, or rotary positions in self-attention: of row and column in images",
    )
    pad_id: int = key(
        -1,
        whole(-1, 1 << 24, "id"),
        "behind a text that is padded, of SigLIP; -1: the vocabulary's",
    )
    clean: str = key(
        "canonical",
        choice("canonical", "lower"),
        "texts of SigLIP: in lower case without punctuation, or only in lower case",
    )
    mend_texts: bool = key(
        False,
        FLAG,
        "mojibake and HTML entities of image and text towers' texts are repaired first, as "
        "open_clip does; CLIP's own vocabulary always does",
    )
    image: ImageModel = ImageModel()
    text: TextModel = TextModel()
    pooler: Pooler = Pooler()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return shapes.grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return shapes.patches(self.image_size, self.patch_size)


@dataclasses.dataclass(frozen=True)
class Head(Section):
    """The task head: a pooler of its own and a classifier."""

    kind: str = key(
        "",
        choice("", *heads.HEADS),
        f"'': none; {', '.join(f'{one.name!r} {one.about}' for one in heads.HEADS.values())}",
    )
    num_queries: int = key(1, QUERIES, "of the head's attentional pooler")
    width: int = key(0, whole(0, 65_536, "channels"), "of that pooler; 0: that of the decoder")
    num_heads: int = key(0, whole(0, 4096, "heads"), "of its attention; 0: as model.pooler")
    classes: str = key("", TEXT, "a text file, one class a line; '': the class names of the data")
    unknown: str = key(
        "refuse", choice("refuse", "skip"), "examples with no label among the classes"
    )
    weight: float = key(1.0, WEIGHT, "of the head's loss, beside the weights of `loss`")
    label_smoothing: float = key(0.0, SHARE, "of the head's loss")
