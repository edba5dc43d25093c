"""The network's sizes and options: `config.model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from annotated_types import Interval
from pydantic import AfterValidator, model_validator
from pydantic.dataclasses import dataclass

from coca_jax.config import heads, shapes
from coca_jax.config.base import (
    STRICT,
    Channels,
    Depth,
    Fraction,
    Heads,
    MlpChannels,
    OwnHeads,
    OwnMlpChannels,
    Section,
    Size,
    TextLength,
    option,
    read,
)

Theta = Annotated[float, Interval(gt=1, le=1e7)]
Mean = Annotated[float, Interval(ge=-10, le=10)]
Std = Annotated[float, Interval(ge=1e-3, le=10)]


@dataclass(frozen=True, config=STRICT)
class BlockOptions(Section):
    """Options of a transformer block. `Model` has them for all blocks; the `block` dict of a tower
    overrides them there."""

    activation: Literal["gelu", "gelu_exact", "relu", "quick_gelu", "silu"] = option(
        "gelu", "Activation of the MLPs."
    )
    gated_mlp: bool = option(
        False,
        "Multiply a second projection by the activation of the first: GEGLU with 'gelu', SwiGLU "
        "with 'silu'. Adds half of an MLP's parameters at equal mlp_dim.",
    )
    norm: Literal["layer", "rms"] = option("layer", "LayerNorm or RMSNorm.")
    norm_eps: Annotated[float, Interval(ge=1e-12, le=1e-2)] = option(
        1e-5, "Added to the variance in norms."
    )
    bias: bool = option(
        True,
        "Use biases in blocks, poolers and norms. Separate keys: image.patch_bias, text.head_bias; "
        "qk_norm_kind='layer' always has one.",
    )
    layer_scale: Annotated[float, Interval(ge=0, le=10)] = option(
        0.0, "Initial value of a learned gain per channel of every residual branch; 0: no gain."
    )
    positions: Literal["learned", "rope", "both"] = option(
        "learned",
        "Learned position embeddings, rotary positions in self-attention (by row and column in "
        "images), or both.",
    )
    qk_norm: bool = option(False, "Normalize queries and keys in each head.")
    qk_norm_kind: Literal["rms", "layer"] = option(
        "rms", "Norm of qk_norm; 'layer': LayerNorm, as in open_clip."
    )


BLOCK = tuple(field.name for field in dataclasses.fields(BlockOptions))
# A pooler has norms and attention, but no MLP, residual branch or positions.
_POOLER_BLOCK = ("norm", "norm_eps", "bias", "qk_norm", "qk_norm_kind")


def _check_block(value: Mapping[str, Any]) -> Mapping[str, Any]:
    read(BlockOptions, value, "block")
    return value


def _check_pooler_block(value: Mapping[str, Any]) -> Mapping[str, Any]:
    _check_block(value)
    for key in value:
        if key not in _POOLER_BLOCK:
            raise ValueError(
                f"{key} is an option of MLPs, residual branches or positions, which poolers do not "
                f"have. Use {', '.join(_POOLER_BLOCK)}."
            )
    return value


Overrides = Annotated[Mapping[str, Any], AfterValidator(_check_block)]
PoolerOverrides = Annotated[Mapping[str, Any], AfterValidator(_check_pooler_block)]


def _check_heads(name: str, count: int, width: int, of: str = "width") -> None:
    if width % count:
        raise ValueError(f"{name}={count} does not divide {of}={width}. Choose a divisor.")


@dataclass(frozen=True, config=STRICT)
class ImageModel(Section):
    """The image encoder, a Vision Transformer."""

    width: Channels = option(768, "Width of the residual stream.")
    depth: Depth = option(12, "Number of blocks.")
    mlp_dim: MlpChannels = option(3072, "Hidden width of the MLPs.")
    num_heads: Heads = option(12, "Number of attention heads.")
    patch_dropout: Fraction = option(0.0, "Fraction of patches dropped in training (FLIP).")
    conv_widths: tuple[Channels, ...] = option(
        (), "Width of each stage of a convolutional stem, which replaces plain patches."
    )
    conv_depths: tuple[Annotated[int, Interval(ge=0, le=1024)], ...] = option(
        (), "Number of residual blocks of each stage of the convolutional stem."
    )
    class_token: bool = option(False, "Learned class token before the patches, as in open_clip.")
    pre_norm: bool = option(False, "Norm before the first block, as in open_clip.")
    final_norm: bool = option(True, "Norm after the last block.")
    patch_bias: bool = option(True, "Bias of the patch projection.")
    registers: Annotated[int, Interval(ge=0, le=1024)] = option(
        0, "Number of register tokens, discarded after the encoder."
    )
    table_size: Annotated[int, Interval(ge=0, le=16_384)] = option(
        0,
        "Image size that the table of learned positions is for; it is resampled to "
        "model.image_size in every step. 0: model.image_size.",
    )
    resample: Literal["linear", "cubic", "bicubic"] = option(
        "linear",
        "How learned positions are resampled to another image size. 'cubic': with antialiasing "
        "(DINOv2 with registers); 'bicubic': without (DINOv2).",
    )
    rope_theta: Theta = option(100.0, "Base wavelength of rotary positions.")
    rope_start: Annotated[float, Interval(ge=0, le=100)] = option(
        0.0, "Row and column of the first patch in rotary positions; a class token is at 0."
    )
    rope_span: Annotated[float, Interval(ge=0, le=10_000)] = option(
        0.0,
        "Side of an image in rotary positions, whose center is 0 (DINOv3: 4 pi); 0: one unit per "
        "patch.",
    )
    onnx: str = option(
        "", "ONNX file that is run as the image encoder, frozen; '': the encoder described here."
    )
    onnx_output: str = option("", "Tensor of that file that holds the tokens; '': its output.")
    onnx_sha256: str = option("", "Checksum of that file.")
    block: Overrides = option({}, "Overrides of the model's block options, as {'norm_eps': 1e-6}.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads("num_heads", self.num_heads, self.width)
        if len(self.conv_widths) != len(self.conv_depths):
            raise ValueError(
                f"conv_depths={self.conv_depths} and conv_widths={self.conv_widths} describe the "
                "same stages. Give as many of both."
            )
        return self


@dataclass(frozen=True, config=STRICT)
class TextModel(Section):
    """The text decoder: a unimodal part, and a multimodal part that attends to the image."""

    width: Channels = option(768, "Width of the residual stream.")
    unimodal_depth: Depth = option(12, "Number of blocks that see text only.")
    multimodal_depth: Depth = option(12, "Number of blocks that also attend to the image.")
    mlp_dim: MlpChannels = option(3072, "Hidden width of the MLPs.")
    num_heads: Heads = option(12, "Number of attention heads.")
    vocab_size: Annotated[int, Interval(ge=1, le=1 << 24)] = option(
        64_000, "Number of rows of the token embedding."
    )
    max_len: TextLength = option(
        64, "Maximum number of tokens, with begin and end symbols, without [CLS]."
    )
    tie_embeddings: bool = option(False, "Use the token embedding as the lm_head.")
    head_bias: bool = option(True, "Bias of the lm_head.")
    cls_mask: Literal["exact", "shifted"] = option(
        "exact", "Attention mask of [CLS]; 'shifted': as in open_clip's released models."
    )
    cross: Literal["paper", "open_clip"] = option("paper", "Layout of the multimodal blocks.")
    multimodal_heads: OwnHeads = option(
        0, "Number of attention heads of the multimodal part; 0: num_heads."
    )
    multimodal_mlp_dim: OwnMlpChannels = option(
        0, "Hidden width of the MLPs of the multimodal part; 0: mlp_dim."
    )
    kv_heads: OwnHeads = option(
        0, "Number of key and value heads (grouped-query attention); 0: as many as query heads."
    )
    rope_theta: Theta = option(10_000.0, "Base wavelength of rotary positions.")
    block: Overrides = option({}, "As image.block, for the unimodal part.")
    multimodal_block: Overrides = option({}, "As image.block, for the multimodal part.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads("num_heads", self.num_heads, self.width)
        upper = self.multimodal_heads or self.num_heads
        _check_heads("multimodal_heads", upper, self.width)
        if self.kv_heads:
            _check_heads("kv_heads", self.kv_heads, self.num_heads, "num_heads")
            _check_heads("kv_heads", self.kv_heads, upper, "multimodal_heads")
        return self


@dataclass(frozen=True, config=STRICT)
class Pooler(Section):
    """The attentional poolers between the image encoder and its readers."""

    kind: Literal["cascade", "parallel", "open_clip", "none"] = option(
        "cascade",
        "'cascade': the contrastive pooler reads the output of the generative one (paper). "
        "'parallel': it reads the encoder. 'open_clip': a single pooler, whose first query is the "
        "image embedding. 'none': the class token is the image embedding and the decoder sees the "
        "patches.",
    )
    num_queries: Channels = option(256, "Number of image tokens that the decoder sees.")
    num_heads: Heads = option(12, "Number of attention heads.")
    mlp_dim: OwnMlpChannels = option(
        0, "Hidden width of the MLP in the pooler of dual encoders; 0: image.mlp_dim."
    )
    query_std: Annotated[float, Interval(ge=0, le=100)] = option(
        0.02, "Standard deviation of the initial queries."
    )
    project: bool = option(True, "Project the pooled image into the contrastive space.")
    block: PoolerOverrides = option({}, "As image.block, for all poolers and the task head.")
    token_dropout: Fraction = option(
        0.0, "Fraction of image tokens hidden from the decoder in training (OpenVision 2)."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        kind = heads.pooler_kind(self.kind)
        if kind.num_seen(self.num_queries) < 1:
            raise ValueError(
                f"num_queries={self.num_queries} leaves the decoder no token with kind="
                f"{self.kind!r}. Give at least {self.num_queries + 1 - kind.num_seen(self.num_queries)}."
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Model(BlockOptions):
    """The network. The defaults are the paper's Base size (Table 1)."""

    image_size: Size = option(288, "Side of the images in pixels, or (height, width).")
    patch_size: Size = option(
        18, "Side of a patch in pixels, or (height, width). It divides image_size."
    )
    family: Literal["coca", "clip", "siglip", "pe", "openvision", "vision"] = option(
        "coca",
        "Architecture; all but 'coca' are dual encoders, without a decoder, and 'vision' an image "
        "encoder alone, which is not trained.",
    )
    embed_dim: Channels = option(768, "Width of the contrastive space.")
    dtype: Literal["float32", "bfloat16", "float64"] = option(
        "bfloat16",
        "Type of activations; parameters are float32. float64 is for checks on the CPU.",
    )
    image_mean: tuple[Mean, Mean, Mean] = option(
        (0.5, 0.5, 0.5), "Mean of each color channel, subtracted from pixels in [0, 1]."
    )
    image_std: tuple[Std, Std, Std] = option(
        (0.5, 0.5, 0.5), "Standard deviation, by which pixels are divided."
    )
    temperature: Annotated[float, Interval(ge=1e-4, le=100)] = option(
        0.07, "Initial temperature of the contrastive softmax; it is learned."
    )
    implementation: Literal["auto", "xla", "reference"] = option(
        "auto",
        "Backend of the operations; 'xla': no other compilers' kernels, 'reference': plain JAX.",
    )
    pad_id: Annotated[int, Interval(ge=-1, le=1 << 24)] = option(
        -1, "Padding token of SigLIP's texts; -1: the vocabulary's."
    )
    clean: Literal["canonical", "lower"] = option(
        "canonical",
        "Text normalization of SigLIP; 'canonical': lower case without punctuation.",
    )
    mend_texts: bool = option(
        False,
        "Repair mojibake and HTML entities in texts of dual encoders first, as open_clip does. "
        "CLIP's own vocabulary always does.",
    )
    image: ImageModel = ImageModel()
    text: TextModel = TextModel()
    pooler: Pooler = Pooler()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return shapes.grid(self.image_size, self.patch_size)

    @property
    def table_grid(self) -> tuple[int, int]:
        """Rows and columns of the table of learned positions."""
        return shapes.grid(self.image.table_size or self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return shapes.patches(self.image_size, self.patch_size)

    def check_vocabulary(self, size: int, remedy: str = "") -> None:
        """Raises ValueError if a tokenizer has more ids than the model has embeddings.

        remedy: what to do, where the user does not choose the size of the model.
        """
        if size > self.text.vocab_size:
            remedy = remedy or f"set it to {size} or more, or use the model's own vocabulary"
            raise ValueError(
                f"model.text.vocab_size={self.text.vocab_size} is less than the {size} ids of the "
                f"vocabulary; {remedy}"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        divides = shapes.divides(self.patch_size, self.image_size)
        if not divides and (self.family == "coca" or not self.num_patches):
            raise ValueError(
                f"patch_size={self.patch_size} does not divide model.image_size={self.image_size}. "
                "Choose a divisor."
            )
        stages = len(self.image.conv_widths)
        if stages and self.patch_size != 2**stages:
            raise ValueError(
                f"image.conv_widths has {stages} stages, which need model.patch_size={2**stages} "
                f"(it is {self.patch_size})."
            )
        _check_heads("pooler.num_heads", self.pooler.num_heads, self.text.width, "model.text.width")
        table = self.image.table_size
        if table and not shapes.divides(self.patch_size, table):
            raise ValueError(
                f"patch_size={self.patch_size} does not divide model.image.table_size={table}. "
                "Choose a multiple of the patch size."
            )
        self._check_rotary()
        if self.family != "coca":
            return self
        if not self.pooler.project and self.embed_dim != self.text.width:
            raise ValueError(
                f"embed_dim={self.embed_dim} must be model.text.width={self.text.width} without a "
                "projection. Set it, or model.pooler.project=True."
            )
        if not heads.pooler_kind(self.pooler.kind).pools:
            self.require(
                "model.pooler.kind='none'",
                image__class_token=(True,),
                image__width=(self.text.width,),
                pooler__project=(True,),
            )
        return self

    def _check_rotary(self) -> None:
        image, text = self.image, self.text
        upper = text.multimodal_heads or text.num_heads
        for name, block, width, count, multiple in (
            ("image", image.block, image.width, image.num_heads, 4),
            ("text", text.block, text.width, text.num_heads, 2),
            ("text", text.multimodal_block, text.width, upper, 2),
        ):
            positions = block.get("positions", self.positions)
            if positions != "learned" and width // count % multiple:
                raise ValueError(
                    f"positions={positions!r}: the heads of model.{name} are {width // count} "
                    f"wide, and rotary positions need a multiple of {multiple}. Choose another "
                    f"model.{name}.num_heads."
                )
