"""open_clip's CoCa and CLIP at the benchmark's sizes, and the light ConvNet of the reference."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
from settings import Data, Row
from torch import nn

from coca_jax.config import Model


def build(row: Row, data: Data, model: Model, vocabulary: int) -> Any:
    """The model of a row for images of model.image_size and texts of model.text.max_len."""
    width, heads = data.width, data.heads
    head_width = width // heads
    vision: dict[str, Any] = dict(
        image_size=model.image_size,
        patch_size=model.patch_size,
        width=width,
        layers=row.layers[0],
        head_width=head_width,
    )
    text: dict[str, Any] = dict(
        context_length=model.text.max_len,
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        layers=row.layers[1],
    )
    if not row.captions:
        made: Any = open_clip.CLIP(embed_dim=width, vision_cfg=vision, text_cfg=text)
    else:
        vision |= dict(
            attentional_pool=True,
            attn_pooler_queries=1 + model.pooler.num_queries,
            attn_pooler_heads=heads,
            output_tokens=True,
        )
        text |= dict(embed_cls=True, output_tokens=True)
        made = open_clip.CoCa(
            embed_dim=width,
            vision_cfg=vision,
            text_cfg=text,
            multimodal_cfg=dict(
                context_length=model.text.max_len,
                vocab_size=vocabulary,
                width=width,
                heads=heads,
                layers=row.layers[2],
            ),
        )
        with torch.no_grad():  # open_clip leaves it as the memory was found
            made.text_decoder.text_projection.normal_(std=width**-0.5)
    if row.stem:
        made.visual.conv1 = light_stem(model.patch_size, width)
    return made


def light_stem(patch: int, width: int) -> nn.Sequential:
    """[B, 3, S, S] -> [B, width, S / patch, S / patch]: a convolution of stride 2 for each halving,
    32, 64, 128 channels, behind each but the first one that keeps its size; GroupNorm and ReLU
    behind all, then 1 x 1."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(round(math.log2(patch))):
        out = 32 * 2**stage
        for stride in (2, 1) if stage else (2,):
            layers += [
                nn.Conv2d(channels, out, 3, stride, 1, bias=False),
                nn.GroupNorm(8, out),
                nn.ReLU(),
            ]
            channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))
