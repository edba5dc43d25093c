"""A contrastive captioner (CoCa, https://arxiv.org/abs/2205.01917) in plain PyTorch: inference.

    from transformers import AutoModel

    model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()

    model.caption(["cat.jpg", "dog.jpg"])                     # list of str
    pixel_values = model.preprocess(["cat.jpg", "dog.jpg"])   # [B, 3, S, S]
    input_ids, attention_mask = model.tokenize(["a cat", "a dog"])
    with torch.no_grad():
        image_embeds, image_tokens = model.encode_image(pixel_values)     # [B, E], [B, Q, D]
        text_embeds = model.encode_text(input_ids, attention_mask)        # [B, E]
        log_probs = model.caption_log_probs(pixel_values, input_ids, attention_mask)  # [B, L - 1]

Without transformers: `CoCaModel.from_folder("FOLDER")` of this file.
Needs torch, safetensors, numpy and pillow, and for the tokenizer sentencepiece, tokenizers or (for
CLIP's byte pairs, only with texts that are not plain ASCII) ftfy.

Shape letters: B batch, L text length, N image encoder tokens, Q image tokens that the decoder sees,
W image width, D text width, H heads, G key heads, K head width, E joint space, V vocabulary.
"""

from __future__ import annotations

import gzip
import html
import importlib
import itertools
import json
import os
import shutil
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

try:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils import cached_file
except ImportError:  # then `CoCaModel.from_folder` loads the model

    class PretrainedConfig:  # type: ignore[no-redef]
        def __init__(self, **kwargs: Any):
            vars(self).update(kwargs)

    class PreTrainedModel(nn.Module):  # type: ignore[no-redef]
        def __init__(self, config: Any):
            super().__init__()
            self.config = config

        def post_init(self) -> None:
            pass


class CoCaConfig(PretrainedConfig):
    """config.json.

    model: sizes and options. preprocess: how images are resized. tokenizer: its file and special
    ids. head: the task head, or None. class_names: of the task head.
    """

    model_type = "coca"

    def __init__(
        self,
        model: dict | None = None,
        preprocess: dict | None = None,
        tokenizer: dict | None = None,
        head: dict | None = None,
        class_names: Sequence[str] = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self.head, self.class_names = head, list(class_names)


# -- layers --------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def make_norm(width: int, options: dict) -> nn.Module:
    """LayerNorm or RMSNorm, as a tower's options say."""
    if options["norm"] == "rms":
        return nn.RMSNorm(width, eps=options["norm_eps"])
    return nn.LayerNorm(width, eps=options["norm_eps"], bias=options["bias"])


def make_head_norm(head_width: int, options: dict) -> nn.Module:
    """The norm of queries and keys within each head (QK-norm)."""
    if options["qk_norm_kind"] == "rms":
        return nn.RMSNorm(head_width, eps=options["norm_eps"])
    return nn.LayerNorm(head_width, eps=options["norm_eps"])


def rotary_angles(positions: Tensor, head_width: int, theta: float) -> Tensor:
    """positions [..., N, A] along A axes (1 in texts, 2 in images) -> angles [..., N, K / 2]."""
    count = head_width // 2 // positions.shape[-1]
    frequencies = theta ** -(torch.arange(count, device=positions.device) / count)
    return (positions[..., None].float() * frequencies).flatten(-2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, H, N, K], angles [B or 1, N, K / 2]: number i of a head's first half and number i of
    its second half are turned together."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of x to itself or to a context."""

    def __init__(
        self, width: int, num_heads: int, options: dict, context_width: int = 0, kv_heads: int = 0
    ):
        super().__init__()
        self.num_heads, self.kv_heads = num_heads, kv_heads or num_heads
        head_width, bias = width // num_heads, options["bias"]
        context_width = context_width or width
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(context_width, self.kv_heads * head_width, bias)
        self.v_proj = nn.Linear(context_width, self.kv_heads * head_width, bias)
        self.out_proj = nn.Linear(width, width, bias)
        norm = make_head_norm if options["qk_norm"] else lambda *_: nn.Identity()
        self.q_norm, self.k_norm = norm(head_width, options), norm(head_width, options)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        angles: Tensor | None = None,
        cache: dict | None = None,
    ) -> Tensor:
        """x [B, N, D] attends to context [B, M, W], or to itself: [B, N, D].

        mask: bool, broadcastable to [B, H, N, M], True where a query may look. cache: the keys and
        values of earlier tokens, to which those of x are added; of a context, which stays the same,
        they are computed once.
        """
        query = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)
        if angles is not None:
            query = rotate(query, angles)
        if context is not None and cache:
            key, value = cache["key"], cache["value"]
        else:
            source = x if context is None else context
            key, value = (
                projection(source).unflatten(-1, (self.kv_heads, -1))
                for projection in (self.k_proj, self.v_proj)
            )
            key, value = self.k_norm(key).transpose(1, 2), value.transpose(1, 2)  # [B, G, M, K]
            if angles is not None:
                key = rotate(key, angles)
            if cache:
                key = torch.cat([cache["key"], key], 2)
                value = torch.cat([cache["value"], value], 2)
            if cache is not None:
                cache.update(key=key, value=value)
        shared = self.num_heads // self.kv_heads  # query heads that share a key head
        if shared > 1:
            key, value = (y.repeat_interleave(shared, 1) for y in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, mask)  # [B, H, N, K]
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """D -> F -> D; gated: the activation of a second projection times the first."""

    def __init__(self, width: int, mlp_dim: int, options: dict):
        super().__init__()
        self.activation = ACTIVATIONS[options["activation"]]
        self.up_proj = nn.Linear(width, mlp_dim, options["bias"])
        self.gate_proj = (
            nn.Linear(width, mlp_dim, options["bias"]) if options["gated_mlp"] else None
        )
        self.down_proj = nn.Linear(mlp_dim, width, options["bias"])

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block.

    cross: None; "paper" (self-attention, cross-attention, MLP); or "open_clip" (self-attention,
    MLP, cross-attention to a normalized context, a second MLP).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        options: dict,
        kv_heads: int = 0,
        cross: str | None = None,
        context_width: int = 0,
    ):
        super().__init__()
        self.cross = cross
        self.attention_norm = make_norm(width, options)
        self.attention = Attention(width, num_heads, options, kv_heads=kv_heads)
        self.mlp_norm, self.mlp = make_norm(width, options), Mlp(width, mlp_dim, options)
        parts = ["attention", "mlp"]
        if cross:
            self.cross_norm = make_norm(width, options)
            self.cross_attention = Attention(width, num_heads, options, context_width, kv_heads)
            parts.append("cross_attention")
        if cross == "open_clip":
            self.context_norm = make_norm(context_width, options)
            self.cross_mlp_norm = make_norm(width, options)
            self.cross_mlp = Mlp(width, mlp_dim, options)
            parts.append("cross_mlp")
        # LayerScale: a learned gain for each channel of what a part adds to the residual stream.
        scales = {part: nn.Parameter(torch.ones(width)) for part in parts}
        self.layer_scale = nn.ParameterDict(scales) if options["layer_scale"] else None

    def scaled(self, part: str, update: Tensor) -> Tensor:
        return update if self.layer_scale is None else update * self.layer_scale[part]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        angles: Tensor | None = None,
        cache: dict | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]. mask and angles are of self-attention; cache: {"self": {},
        "cross": {}} in decoding."""
        own, cross = (None, None) if cache is None else (cache["self"], cache["cross"])
        attended = self.attention(self.attention_norm(x), None, mask, angles, own)
        x = x + self.scaled("attention", attended)
        if self.cross == "open_clip":
            x = x + self.scaled("mlp", self.mlp(self.mlp_norm(x)))
            context = context if cross else self.context_norm(context)
        if self.cross:
            attended = self.cross_attention(self.cross_norm(x), context, cache=cross)
            x = x + self.scaled("cross_attention", attended)
        if self.cross == "open_clip":
            return x + self.scaled("cross_mlp", self.cross_mlp(self.cross_mlp_norm(x)))
        return x + self.scaled("mlp", self.mlp(self.mlp_norm(x)))


# -- image encoder -------------------------------------------------------------------------------

# One over the standard deviation of the activation of a standard normal number.
ACTIVATION_GAIN = {
    "gelu": 1.7012,
    "gelu_exact": 1.7012,
    "relu": 1.7131,
    "quick_gelu": 1.7096,
    "silu": 1.7881,
}


class ConvStem(nn.Module):
    """Strided 3 x 3 convolutions and residual blocks in place of plain patches.

    There are no norms: `activate` scales its input, whose variance at initialization is known, to
    unit variance. Training standardizes the kernels; here they are stored as they are applied.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], activation: str):
        super().__init__()
        self.activation, self.gain = ACTIVATIONS[activation], ACTIVATION_GAIN[activation]
        self.down, self.blocks = nn.ModuleList(), nn.ModuleList()
        for channels, width, depth in zip((3, *widths), widths, depths):
            self.down.append(nn.Conv2d(channels, width, 3, stride=2, padding=1))
            pairs = (
                nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
                for _ in range(depth)
            )
            self.blocks.append(nn.ModuleList(pairs))

    def activate(self, x: Tensor, variance: float) -> Tensor:
        return self.activation(x * variance**-0.5) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C, S / 2^stages, S / 2^stages]."""
        variance = 1.0
        for stage, (down, blocks) in enumerate(zip(self.down, self.blocks)):
            x, variance = down(self.activate(x, variance) if stage else x), 1.0
            for first, second in blocks:  # type: ignore[attr-defined]
                x = x + second(self.activate(first(self.activate(x, variance)), 1.0))
                variance += 0.25  # a residual branch has half the standard deviation
        return self.activate(x, variance)


class ImageEncoder(nn.Module):
    """Vision Transformer."""

    def __init__(self, model: dict):
        super().__init__()
        self.sizes, options = model["image"], model["image"]["block"]
        image, width = self.sizes, self.sizes["width"]
        (height, breadth), patch = pair(model["image_size"]), pair(model["patch_size"])
        self.grid = height // patch[0], breadth // patch[1]
        bias = image["patch_bias"]
        self.stem = None
        self.patch_embedding: nn.Module
        if image["conv_widths"]:
            activation = options["activation"]
            self.stem = ConvStem(image["conv_widths"], image["conv_depths"], activation)
            self.patch_embedding = nn.Conv2d(image["conv_widths"][-1], width, 1, bias=bias)
        else:  # pixels at the right and lower edge that fill no patch are ignored
            self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=bias)
        self.num_prefix = int(image["class_token"]) + image["registers"]
        if image["class_token"]:
            self.class_token = nn.Parameter(torch.zeros(width))
        if image["registers"]:
            self.registers = nn.Parameter(torch.zeros(image["registers"], width))
        self.rotary = options["positions"] != "learned"
        if options["positions"] != "rope":
            rows = int(image["class_token"]) + self.grid[0] * self.grid[1]
            self.position_embedding = nn.Parameter(torch.zeros(rows, width))
        self.pre_norm = make_norm(width, options) if image["pre_norm"] else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, image["num_heads"], image["mlp_dim"], options)
            for _ in range(image["depth"])
        )
        self.final_norm = make_norm(width, options) if image["final_norm"] else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, W], the class token first where there is one."""
        x = pixel_values if self.stem is None else self.stem(pixel_values)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # [B, N, W], row by row
        classes = int(self.sizes["class_token"])
        prefix = [self.class_token[None]] if classes else []
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding[classes:]
            prefix = [token + self.position_embedding[:1] for token in prefix]
        if self.sizes["registers"]:
            prefix.append(self.registers)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], 1)
        x = self.pre_norm(x)
        angles = self.angles(x.device) if self.rotary else None
        for block in self.blocks:
            x = block(x, angles=angles)
        if self.sizes["registers"]:  # nothing reads them after the last block
            x = torch.cat([x[:, :classes], x[:, self.num_prefix :]], 1)
        return self.final_norm(x)

    def angles(self, device: torch.device) -> Tensor:
        """[1, N, K / 2]; class token and registers have no place, so they are not turned."""
        lines = [torch.arange(count, device=device) for count in self.grid]
        if span := self.sizes["rope_span"]:  # every image has this side, with 0 in its center
            lines = [((line + 0.5) / len(line) - 0.5) * span for line in lines]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 2)
        head_width = self.sizes["width"] // self.sizes["num_heads"]
        places = places + self.sizes["rope_start"]
        angles = rotary_angles(places, head_width, self.sizes["rope_theta"])
        return F.pad(angles, (0, 0, self.num_prefix, 0))[None]


class AttentionalPooler(nn.Module):
    """One attention layer with learned queries over the encoder's tokens."""

    def __init__(
        self, num_queries: int, width: int, num_heads: int, token_width: int, options: dict
    ):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.query_norm = make_norm(width, options)
        self.token_norm = make_norm(token_width, options)
        self.attention = Attention(width, num_heads, options, token_width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, W] -> [B, Q, D]."""
        query = self.query_norm(self.query).expand(len(tokens), -1, -1)
        return self.attention(query, self.token_norm(tokens), mask)


# -- text decoder --------------------------------------------------------------------------------


class TextDecoder(nn.Module):
    """A causal decoder in two halves: the unimodal one sees text alone and has a [CLS] token at its
    end; the multimodal one also attends to the image tokens."""

    def __init__(self, model: dict, context_width: int):
        super().__init__()
        self.sizes = text = model["text"]
        width, options, upper = text["width"], text["block"], text["multimodal_block"]
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.cls = nn.Parameter(torch.zeros(width))
        if options["positions"] != "rope":
            # The last row is [CLS]'s, however long the text is.
            self.position_embedding = nn.Parameter(torch.zeros(text["max_len"] + 1, width))
        kv_heads, upper_heads = text["kv_heads"], text["multimodal_heads"] or text["num_heads"]
        self.unimodal = nn.ModuleList(
            Block(width, text["num_heads"], text["mlp_dim"], options, kv_heads)
            for _ in range(text["unimodal_depth"])
        )
        self.unimodal_norm = make_norm(width, options)
        upper_mlp = text["multimodal_mlp_dim"] or text["mlp_dim"]
        self.multimodal = nn.ModuleList(
            Block(width, upper_heads, upper_mlp, upper, kv_heads, text["cross"], context_width)
            for _ in range(text["multimodal_depth"])
        )
        self.multimodal_norm = make_norm(width, upper)
        self.head_widths = width // text["num_heads"], width // upper_heads
        self.lm_head = None  # the softmax layer is the embedding
        if not text["tie_embeddings"]:
            self.lm_head = nn.Linear(width, text["vocab_size"], text["head_bias"])

    def embed(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """[B, L] -> [B, L, D], of tokens at positions start, start + 1, ..."""
        x = self.token_embedding(input_ids)
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding[start : start + input_ids.shape[1]]
        return x

    def angles(self, positions: Tensor, half: int) -> Tensor | None:
        """Rotary angles of positions [B or 1, L] in the unimodal (0) or multimodal (1) half."""
        options = self.sizes["multimodal_block" if half else "block"]
        if options["positions"] == "learned":
            return None
        width, theta = self.head_widths[half], self.sizes["rope_theta"]
        return rotary_angles(positions[..., None], width, theta)

    def visible_keys(self, valid: Tensor) -> Tensor:
        """valid bool [B, L] -> [B, L + 1], which keys the unimodal half sees, [CLS] last.

        'shifted': as open_clip's released models, whose mask stands one place too far right.
        """
        always = torch.ones_like(valid[:, :1])
        order = (valid, always) if self.sizes["cls_mask"] == "exact" else (always, valid)
        return torch.cat(order, 1)

    def encode(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B, L], valid bool [B, L] -> (text states [B, L, D], [CLS] [B, D])."""
        length, device = input_ids.shape[1], input_ids.device
        if length > self.sizes["max_len"]:
            raise ValueError(f"{length} tokens: at most {self.sizes['max_len']}. Truncate them.")
        cls: Tensor = self.cls
        if hasattr(self, "position_embedding"):
            cls = cls + self.position_embedding[-1]
        x = torch.cat([self.embed(input_ids), cls.expand(len(input_ids), 1, -1)], 1)
        # [CLS] turns as if it stood directly after the text.
        places = torch.arange(1, length + 1, device=device)
        ends = (valid * places).amax(1, keepdim=True)
        places = torch.cat([(places - 1).expand(len(valid), -1), ends], 1)
        causal = torch.ones(length + 1, length + 1, dtype=torch.bool, device=device).tril()
        mask = causal & self.visible_keys(valid)[:, None, None]  # [B, 1, L + 1, L + 1]
        angles = self.angles(places, 0)
        for block in self.unimodal:
            x = block(x, mask=mask, angles=angles)
        return x[:, :-1], self.unimodal_norm(x[:, -1])

    def fuse(self, text_states: Tensor, image_tokens: Tensor) -> Tensor:
        """text states [B, L, D], image tokens [B, Q, D] -> states before the lm_head [B, L, D]."""
        length, device = text_states.shape[1], text_states.device
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        angles, x = self.angles(torch.arange(length, device=device)[None], 1), text_states
        for block in self.multimodal:
            x = block(x, image_tokens, mask, angles)
        return self.multimodal_norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """[B, L, D] -> float32 [B, L, V]."""
        if self.lm_head is None:
            return F.linear(states, self.token_embedding.weight).float()
        return self.lm_head(states).float()

    def decode_step(
        self, token: Tensor, position: int, valid: Tensor, image_tokens: Tensor, caches: list[dict]
    ) -> Tensor:
        """One token [B] of each text at a position, after those in the caches -> float32 [B, V].

        valid: bool [B, position + 1], of the tokens so far.
        """
        x = self.embed(token[:, None], position)
        place = torch.full((1, 1), position, device=x.device)
        mask = self.visible_keys(valid)[:, None, None, : position + 1]
        angles, depth = self.angles(place, 0), len(self.unimodal)
        for block, cache in zip(self.unimodal, caches):
            x = block(x, mask=mask, angles=angles, cache=cache)
        angles = self.angles(place, 1)
        for block, cache in zip(self.multimodal, caches[depth:]):
            x = block(x, image_tokens, angles=angles, cache=cache)
        return self.logits(self.multimodal_norm(x))[:, 0]

    def new_caches(self) -> list[dict]:
        return [{"self": {}, "cross": {}} for _ in (*self.unimodal, *self.multimodal)]


class TaskHead(nn.Module):
    """Classes of images ('classification'), answers to questions about an image ('answer'), or
    whether a statement holds for two images ('pair'): a pooler and a linear classifier."""

    def __init__(self, head: dict, model: dict, num_classes: int):
        super().__init__()
        self.num_images = 2 if head["kind"] == "pair" else 1
        self.reads_text = head["kind"] != "classification"
        token_width = model["text" if self.reads_text else "image"]["width"]
        self.pooler = AttentionalPooler(
            head["num_queries"],
            head["width"],
            head["num_heads"],
            token_width,
            model["pooler"]["block"],
        )
        inputs = head["num_queries"] * self.num_images * head["width"]
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """tokens [B * images, N, W], valid bool [B * images, N] -> logits float32 [B, C]."""
        mask = None if valid is None else valid[:, None, None]
        pooled = self.pooler(tokens, mask).flatten(1)
        return float_linear(self.classifier, pooled.reshape(-1, self.classifier.in_features))


# -- the model -----------------------------------------------------------------------------------


class CoCaOutput(NamedTuple):
    """image_embeds, text_embeds: float32 [B, E], L2-normalized. logits: float32 [B, L, V], position
    t predicts token t + 1. image_tokens: [B, Q, D]."""

    image_embeds: Tensor
    text_embeds: Tensor
    logits: Tensor
    image_tokens: Tensor


class Generated(NamedTuple):
    """input_ids: [B, L], begin symbol and prompt first, padded. lengths: [B], without padding.
    log_probs: float32 [B], of the new tokens together, in nats."""

    input_ids: Tensor
    lengths: Tensor
    log_probs: Tensor


class CoCaModel(PreTrainedModel):
    """See the module's docstring. Images are [B, 3, S, S]; clips, of a model with
    `config.preprocess["num_frames"]`, [B, T, 3, S, S]."""

    config_class = CoCaConfig

    def __init__(self, config: CoCaConfig):
        super().__init__(config)
        model, text_width = config.model, config.model["text"]["width"]
        pooler, image_width = model["pooler"], model["image"]["width"]
        self.kind = pooler["kind"]
        self.image_encoder = ImageEncoder(model)

        def make_pooler(num_queries: int, token_width: int) -> AttentionalPooler:
            heads, options = pooler["num_heads"], pooler["block"]
            return AttentionalPooler(num_queries, text_width, heads, token_width, options)

        pooled_width = text_width
        if self.kind == "none":
            pooled_width = image_width
        else:
            self.generative_pooler = make_pooler(pooler["num_queries"], image_width)
        if self.kind == "open_clip":
            self.pooled_norm = make_norm(text_width, model["image"]["block"])
        elif self.kind != "none":
            source = text_width if self.kind == "cascade" else image_width
            self.contrastive_pooler = make_pooler(1, source)
        self.image_projection = None
        if pooler["project"]:
            self.image_projection = nn.Linear(pooled_width, model["embed_dim"], bias=False)
        self.text_projection = nn.Linear(text_width, model["embed_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))  # log of the inverse temperature
        if model["logit_bias"]:
            self.logit_bias = nn.Parameter(torch.zeros(()))  # of the sigmoid loss
        self.text_decoder = TextDecoder(model, pooled_width)
        self.head = None
        if config.head:
            self.head = TaskHead(config.head, model, len(config.class_names))
        self.tokenizer: Any = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: all weights are loaded."""

    # -- loading and saving --

    @classmethod
    def from_folder(cls, folder: str, dtype: torch.dtype = torch.float32) -> CoCaModel:
        """Loads the model of a folder, in evaluation mode; needs no transformers."""
        with open(os.path.join(folder, "config.json")) as file:
            config = CoCaConfig(**json.load(file))
        model = cls(config)
        model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
        model.tokenizer = load_tokenizer(os.path.join(folder, config.tokenizer["file"]), config)
        nn.Module.to(model, dtype)
        return model.eval()

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        """A folder, or the name of a repository on the Hugging Face hub."""
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        of_hub = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        where = {key: kwargs[key] for key in of_hub if key in kwargs}
        path = cached_file(name, model.config.tokenizer["file"], **where)
        model.tokenizer = load_tokenizer(path, model.config)
        return loaded

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes a folder with the tokenizer, for `from_pretrained`."""
        super().save_pretrained(save_directory, **kwargs)
        target = os.path.join(save_directory, self.config.tokenizer["file"])
        if not os.path.exists(target):
            shutil.copyfile(self.tokenizer.path, target)

    # -- images --

    def preprocess(self, images: Any) -> Tensor:
        """Images -> pixel_values float32 [B, 3, S, S], on the model's device.

        images: one or a list of paths, PIL images, or uint8 arrays [h, w, 3]. For a model of clips:
        paths or PIL images of animations, or lists of frames; [B, T, 3, S, S].
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
            images = [images]
        settings, model = self.config.preprocess, self.config.model
        size, frames = pair(model["image_size"]), settings["num_frames"]
        clips = [
            fit_frames(read_frames(image, frames), image, size, settings["resize"])
            for image in images
        ]
        pixels = torch.from_numpy(np.stack([np.stack(clip) for clip in clips])).float()
        mean, std = (torch.tensor(model[f"image_{name}"]) * 255 for name in ("mean", "std"))
        pixels = ((pixels - mean) / std).permute(0, 1, 4, 2, 3)  # [B, T, 3, S, S]
        return (pixels if frames else pixels[:, 0]).to(self.logit_scale.device)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """-> (embeddings float32 [B, E], L2-normalized; image tokens [B, Q, D] for the decoder)."""
        return self.pool(self.encode_pixels(pixel_values))

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> tokens of the image encoder [B, N, W]; clips -> [B, T, N, W]."""
        pixel_values = pixel_values.to(self.text_decoder.cls.dtype)
        if pixel_values.ndim == 4:
            return self.image_encoder(pixel_values)
        frames = self.image_encoder(pixel_values.flatten(0, 1))
        return frames.unflatten(0, pixel_values.shape[:2])

    def pool(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        if encoded.ndim == 4:
            # A clip's embedding is the mean of its frames'; the generative pooler reads the tokens
            # of all frames at once.
            frames, tokens = self.pool(encoded.flatten(0, 1))
            embeds = F.normalize(frames.unflatten(0, encoded.shape[:2]).mean(1), dim=-1)
            if self.kind == "none":
                return embeds, tokens.reshape(len(encoded), -1, tokens.shape[-1])
            return embeds, self.pool(encoded.flatten(1, 2))[1]
        tokens = encoded if self.kind == "none" else self.generative_pooler(encoded)
        if self.kind in ("none", "open_clip"):  # the class token, or the first query, is the image
            tokens = self.pooled_norm(tokens) if self.kind == "open_clip" else tokens
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        else:
            source = tokens if self.kind == "cascade" else encoded
            pooled = self.contrastive_pooler(source)[:, 0]
        pooled = pooled.float()
        if self.image_projection is not None:
            pooled = float_linear(self.image_projection, pooled)
        return F.normalize(pooled, dim=-1), tokens

    # -- texts --

    def tokenize(
        self, texts: str | Sequence[str], *, labels: bool = False, questions: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Texts -> input_ids int64 and attention_mask bool, [B, L], padded to the longest text.

        labels: the texts are class names in prompts, which get the label symbol that training gave
        them. questions: they are prompts of `classify`, so that the end symbol is left out.
        """
        texts, ids = [texts] if isinstance(texts, str) else list(texts), self.config.tokenizer
        max_len = self.config.model["text"]["max_len"]
        rows = []
        for text in texts:
            if questions:
                rows.append(self.question_ids(text))
                continue
            head = [ids["bos_id"]]
            if labels and self.config.preprocess["label_token"]:
                head.append(ids["label_id"])
            own = self.tokenizer.encode(text)[: max_len - len(head) - 1]
            rows.append([*head, *own, ids["eos_id"]])
        # A place of padding stays behind every text where there is room: the shifted mask of
        # open_clip's models reads it.
        length = min(max(map(len, rows)) + 1, max_len)
        input_ids = torch.full((len(rows), length), ids["pad_id"])
        attention_mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = torch.tensor(row)
            attention_mask[number, : len(row)] = True
        if ids["hidden_id"] is not None and not questions:
            # open_clip takes every token with the id of padding, which is also "!", for padding.
            attention_mask &= input_ids != ids["hidden_id"]
        device = self.logit_scale.device
        return input_ids.to(device), attention_mask.to(device)

    def question_ids(self, question: str) -> list[int]:
        """Begin symbol and question, cut so that an answer has room."""
        max_len = self.config.model["text"]["max_len"]
        ids = [self.config.tokenizer["bos_id"], *self.tokenizer.encode(question)]
        return ids[: max_len - max(3, max_len // 8)]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """-> float32 [B, E], L2-normalized."""
        cls = self.text_decoder.encode(input_ids, attention_mask.bool())[1]
        return F.normalize(float_linear(self.text_projection, cls), dim=-1)

    # -- captions --

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> CoCaOutput:
        image_embeds, image_tokens = self.encode_image(pixel_values)
        text_states, cls = self.text_decoder.encode(input_ids, attention_mask.bool())
        text_embeds = F.normalize(float_linear(self.text_projection, cls), dim=-1)
        logits = self.text_decoder.logits(self.text_decoder.fuse(text_states, image_tokens))
        return CoCaOutput(image_embeds, text_embeds, logits, image_tokens)

    def caption_log_probs(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Log probability of each token of text i after the first, for image i: float32 [B, L - 1],
        0 at padding. Their sum is the text's."""
        logits = self(pixel_values, input_ids, attention_mask).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        return chosen * attention_mask[:, 1:]

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Writes a caption for each image.

        prompts: of each image the token ids that its caption starts with, begin symbol included.
        do_sample: sample among the top_k most probable tokens (0: all) and the fewest that together
        have probability top_p; otherwise take the most probable token.
        """
        ids, max_len = self.config.tokenizer, self.config.model["text"]["max_len"]
        image_tokens = self.encode_image(pixel_values)[1]
        batch, device = len(image_tokens), image_tokens.device
        prompts = [[ids["bos_id"]]] * batch if prompts is None else prompts
        tokens = torch.full((batch, max_len), ids["pad_id"], device=device)
        for row, prompt in enumerate(prompts):
            if len(prompt) >= max_len:
                raise ValueError(
                    f"prompt {row}: {len(prompt)} tokens. Shorten it to {max_len - 1}."
                )
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        limits = (lengths + max_new_tokens).clamp(max=max_len)
        log_probs = torch.zeros(batch, device=device)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        caches = self.text_decoder.new_caches()
        for step in range(max_len - 1):
            valid = torch.ones_like(tokens[:, : step + 1], dtype=torch.bool)
            if ids["hidden_id"] is not None:
                valid = tokens[:, : step + 1] != ids["hidden_id"]
            logits = self.text_decoder.decode_step(
                tokens[:, step], step, valid, image_tokens, caches
            )
            scores = logits.log_softmax(-1)
            allowed = scores[:, : ids["size"]]  # the model may have more rows than there are ids
            if do_sample:
                chosen = sample(allowed / temperature, top_k, top_p, generator)
            else:
                chosen = allowed.argmax(-1)
            new = (step + 1 >= lengths) & ~done  # the other rows are in their prompt, or finished
            tokens[:, step + 1] = torch.where(new, chosen, tokens[:, step + 1])
            log_probs += torch.where(new, scores.gather(1, chosen[:, None])[:, 0], 0.0)
            lengths += new
            done |= new & ((chosen == ids["eos_id"]) | (lengths >= limits))
            if done.all():
                break
        return Generated(tokens[:, : int(lengths.max())], lengths, log_probs)

    def caption(self, images: Any, prompt: str = "", **how: Any) -> list[str]:
        """The caption of each image; how: arguments of `generate`."""
        pixel_values = self.preprocess(images)
        ids = [self.config.tokenizer["bos_id"], *self.tokenizer.encode(prompt)]
        found = self.generate(pixel_values, [ids] * len(pixel_values), **how)
        return [text.rstrip() for text in self.decode(found)]

    def answer(self, images: Any, questions: Sequence[str], **how: Any) -> list[str]:
        """What the decoder writes after each question about each image."""
        prompts = [self.question_ids(question) for question in questions]
        texts = self.decode(self.generate(self.preprocess(images), prompts, **how))
        known = [self.tokenizer.decode(prompt[1:]) for prompt in prompts]
        return [text[len(start) :].strip() for text, start in zip(texts, known)]

    def decode(self, generated: Generated) -> list[str]:
        """The texts of generated ids, prompts included."""
        rows = zip(generated.input_ids.tolist(), generated.lengths.tolist())
        return [self.tokenizer.decode(row[1:length]) for row, length in rows]

    # -- the task head --

    def classify(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the task head over `config.class_names`, float32 [B, C].

        input_ids, attention_mask: `tokenize(texts, questions=True)`, for a head that reads a text.
        For a head over pairs pixel_values is [B, 2, 3, S, S].
        """
        if self.head is None:
            raise ValueError("this model has no task head. Compare embeddings of images and texts.")
        images = self.head.num_images
        encoded = self.encode_pixels(pixel_values.flatten(0, 1) if images > 1 else pixel_values)
        if not self.head.reads_text:
            return self.head(encoded.flatten(1, -2))
        valid = attention_mask.bool().repeat_interleave(images, 0)
        input_ids = input_ids.repeat_interleave(images, 0)
        text_states = self.text_decoder.encode(input_ids, valid)[0]
        states = self.text_decoder.fuse(text_states, self.pool(encoded)[1])
        return self.head(states, valid)


def float_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A projection in float32, whatever the model's dtype: these decide similarities."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.weight.float(), bias)


def sample(scores: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One id for each row of log probabilities [B, V], which need not be normalized."""
    probs, order = scores.softmax(-1).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs  # the probability of all better tokens
    keep = before < top_p
    if top_k:
        keep[:, top_k:] = False
    picked = torch.multinomial(probs * keep, 1, generator=generator)
    return order.gather(1, picked)[:, 0]


# -- preprocessing -------------------------------------------------------------------------------


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a side or a pair."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def read_frames(image: Any, num_frames: int) -> list[np.ndarray]:
    """An image -> [uint8 [h, w, 3]]; of a clip num_frames frames, at the middles of as many equal
    segments."""
    if isinstance(image, (str, os.PathLike)):
        image = Image.open(image)
    if not num_frames:
        return [to_rgb(image)]
    if isinstance(image, Image.Image):
        count = getattr(image, "n_frames", 1)
    else:
        count = len(image)
    places = [int((number + 0.5) * count / num_frames) for number in range(num_frames)]
    if not isinstance(image, Image.Image):
        return [to_rgb(image[place]) for place in places]
    frames = {}
    for place in sorted(set(places)):
        image.seek(place)
        frames[place] = to_rgb(image.copy())
    return [frames[place] for place in places]


def to_rgb(image: Any) -> np.ndarray:
    """A PIL image, upright and over white where it is transparent, or an array: uint8 [h, w, 3]."""
    if isinstance(image, np.ndarray):
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would cut values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA")).astype(np.uint16)
        alpha = pixels[..., 3:]
        return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.asarray(image.convert("RGB"))


def fit_frames(
    frames: list[np.ndarray], image: Any, size: tuple[int, int], resize: str
) -> list[np.ndarray]:
    """Frames uint8 [h, w, 3] -> of the model's size, antialiased, by the mode of training."""
    same = frames[0].shape[:2] == size
    if same and (resize != "trim" or isinstance(image, np.ndarray)):
        return frames
    if resize == "squash":  # stretch
        return [bilinear(frame, size) for frame in frames]
    if resize == "crop":
        return [center_crop(frame, size) for frame in frames]
    return trim(frames, size)


def bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales until both sides are filled and one fits, and takes the center."""
    (high, wide), own = size, pixels.shape[:2]
    if high == wide:  # as torchvision's Resize
        height, width = (high if side == min(own) else int(high * side / min(own)) for side in own)
    else:
        ratio = min(own[0] / high, own[1] / wide)
        height, width = (round(side / ratio) for side in own)
    scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = int(round((height - high) / 2)), int(round((width - wide) / 2))
    return np.asarray(scaled.crop((left, top, left + wide, top + high)))


def trim(frames: list[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """For drawings: removes margins of one color, and scales what is left to 95% of the size."""
    color = frames[0][0, 0].astype(int)  # of the first pixel; JPEG changes it by a few levels
    shown = np.any([np.abs(frame - color).max(-1) > 12 for frame in frames], 0)  # [h, w]
    rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
    if len(rows):
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        frames = [frame[box] for frame in frames]
    scale = 0.95 * min(side / own for side, own in zip(size, frames[0].shape))
    height, width = (max(1, round(own * scale)) for own in frames[0].shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    fitted = []
    for frame in frames:
        full = np.empty((*size, 3), np.uint8)
        full[:] = color
        full[top : top + height, left : left + width] = bilinear(
            np.ascontiguousarray(frame), (height, width)
        )
        fitted.append(full)
    return fitted


# -- tokenizers ----------------------------------------------------------------------------------


def load_tokenizer(path: str, config: CoCaConfig) -> Any:
    """The tokenizer of a file; its kind and special ids are those of the configuration."""
    kinds = dict(
        sentencepiece=SentencePieceTokenizer, clip_bpe=ClipTokenizer, tokenizers=JsonTokenizer
    )
    return kinds[config.tokenizer["kind"]](path, config.tokenizer)


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"the tokenizer needs {name}: pip install {name}") from None


class SentencePieceTokenizer:
    """Text to ids and back; `encode` adds no special ids, `decode` stops at the end symbol."""

    def __init__(self, path: str, ids: dict):
        self.path, self.ids = path, ids
        self.model = package("sentencepiece").SentencePieceProcessor(model_file=path)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.ids[f"{name}_id"] for name in ("pad", "bos", "unk", "label")}
        text = itertools.takewhile(lambda i: i != self.ids["eos_id"], ids)
        return self.model.decode([i for i in text if i not in special])


class JsonTokenizer:
    """A tokenizer.json of Hugging Face."""

    def __init__(self, path: str, ids: dict):
        self.path, self.ids = path, ids
        self.model = package("tokenizers").Tokenizer.from_file(path)
        self.model.no_padding()
        self.model.no_truncation()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        text = itertools.takewhile(lambda i: i != self.ids["eos_id"], ids)
        return self.model.decode(list(text), skip_special_tokens=True)


class ClipTokenizer:
    """CLIP's lower-cased byte pairs."""

    SPECIAL = ("<start_of_text>", "<end_of_text>")
    CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

    def __init__(self, path: str, ids: dict):
        self.path, self.ids = path, ids
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
        merges = [tuple(line.split()) for line in lines if line]
        # A printable character for each byte, in the order of CLIP's ids.
        own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in own]
        self.of_byte = {byte: chr(byte) for byte in own}
        self.of_byte |= {byte: chr(256 + number) for number, byte in enumerate(others)}
        self.bytes = {symbol: byte for byte, symbol in self.of_byte.items()}
        symbols = list(self.of_byte.values())
        symbols += [f"{symbol}</w>" for symbol in symbols]
        symbols += ["".join(merge) for merge in merges]
        self.symbols = [*symbols, *self.SPECIAL]
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(package("ftfy").fix_text(text)))
        words = self.split(" ".join(text.split()).lower())
        return [number for word in words for number in self.encode_word(word)]

    def decode(self, ids: Sequence[int]) -> str:
        text = itertools.takewhile(lambda i: i != self.ids["eos_id"], ids)
        joined = "".join(self.symbols[i] for i in text if i != self.ids["bos_id"])
        data = bytes(self.bytes[symbol] for symbol in joined)
        return data.decode("utf-8", errors="replace").replace("</w>", " ").strip()

    def split(self, text: str) -> list[str]:
        """Special symbols, contractions, runs of letters, single digits, runs of other signs."""
        folded, words, at = text.replace("\u017f", "s"), [], 0
        while at < len(text):
            whole = (w for w in (*self.SPECIAL, *self.CONTRACTIONS) if folded.startswith(w, at))
            end = at + len(next(whole, ""))
            if end == at:
                kind, end = self.kind(text[at]), at + 1
                while kind in "LO" and end < len(text) and self.kind(text[end]) == kind:
                    end += 1
                if kind == "S":
                    at = end
                    continue
            words.append(text[at:end])
            at = end
        return words

    @staticmethod
    def kind(character: str) -> str:
        """'L' letter, 'N' number, 'S' space, 'O' other."""
        if character.isspace() or character == "\u0345":
            return "S"
        category = unicodedata.category(character)[0]
        return category if category in "LN" else "O"

    def encode_word(self, word: str) -> list[int]:
        if word in self.SPECIAL:
            return [self.numbers[word]]
        if word not in self.known:
            pieces = [self.of_byte[byte] for byte in word.encode()]
            pieces[-1] += "</w>"
            while len(pieces) > 1:
                pairs = list(zip(pieces, pieces[1:]))
                best = min(pairs, key=lambda both: self.ranks.get(both, len(self.ranks)))
                if best not in self.ranks:
                    break
                merged: list[str] = []
                at = 0
                while at < len(pieces):
                    step = 2 if tuple(pieces[at : at + 2]) == best else 1
                    merged.append("".join(pieces[at : at + step]))
                    at += step
                pieces = merged
            self.known[word] = [self.numbers[piece] for piece in pieces]
        return self.known[word]
