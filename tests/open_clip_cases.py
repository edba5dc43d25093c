"""Models, weights and inputs for the open_clip tests, all drawn from seeds; no torch."""

from __future__ import annotations

import gzip
import zlib

import numpy as np
from PIL import Image

# Unequal widths and head counts everywhere that open_clip allows them.
SMALL = dict(
    embed_dim=48,
    quick_gelu=False,
    vision_cfg=dict(
        image_size=32,
        layers=2,
        width=64,
        head_width=16,
        mlp_ratio=3.0,
        patch_size=8,
        attentional_pool=True,
        attn_pooler_queries=10,
        attn_pooler_heads=4,
        output_tokens=True,
    ),
    text_cfg=dict(
        context_length=12,
        vocab_size=530,
        width=48,
        heads=3,
        layers=3,
        mlp_ratio=2.0,
        embed_cls=True,
        output_tokens=True,
    ),
    multimodal_cfg=dict(context_length=12, vocab_size=530, width=48, heads=6, layers=2),
    custom_text=True,
)
MERGES = [
    *("t h", "a n", "th e</w>", "an d</w>", "o n", "r e", "i n", "in g</w>", "a t", "c at</w>"),
    *("d o", "do g</w>", "p h", "ph o", "pho t", "phot o</w>"),
]
TEXTS = [
    "",
    "a photo of a cat",
    "The dog AND the cat!",
    "x!=y",
    "don't they'll I'm 'S",
    "  spaces\t and\nlines  ",
    "1234 \u00bd \u00b2 \u2167",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600",
    "&amp;lt;b&amp;gt; &quot;q&quot;",
    "sch\u00c3\u00b6n \u2018quotes\u2019",
    "<start_of_text> the cat <end_of_text>",
    "photo " * 40,
]


def redraw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights of a tensor from its name: like trained ones in size, none zero or empty.

    Positions are large and residual branches small, as in training: with more even weights all
    tokens of a deep tower become alike and some gradients nothing but rounding.
    """
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    noise = rng.standard_normal(shape)
    if key == "logit_scale":
        return np.asarray(2.5, np.float32)
    if ".ln_" in key and key.endswith("weight"):
        value = 1 + 0.2 * noise
    elif key == "visual.positional_embedding":
        value = noise
    elif key.endswith(("out_proj.weight", "c_proj.weight")) and "attn_pool" not in key:
        value = 0.25 * noise * shape[1] ** -0.5
    elif len(shape) == 1 or key.endswith("positional_embedding"):
        value = 0.1 * noise
    elif key == "text.token_embedding.weight":
        value = 0.5 * noise
    elif key.endswith("query"):
        value = noise
    elif key.endswith(("proj", "text_projection")):  # applied as x @ w
        value = noise * shape[0] ** -0.5
    else:
        value = noise * np.prod(shape[1:]) ** -0.5
    return value.astype(np.float32)


def pixels(count: int, size: int | tuple[int, int], seed: int = 0) -> np.ndarray:
    """Normalised images float32 [count, height, width, 3] of a size."""
    rng = np.random.Generator(np.random.PCG64(seed))
    height, width = (size, size) if isinstance(size, int) else size
    return rng.standard_normal((count, height, width, 3)).astype(np.float32)


def captions(vocab_size: int, length: int, seed: int = 0) -> np.ndarray:
    """int64 [6, length], as open_clip's tokenizer makes them: empty, short, exactly full, cut off,
    holding id 0 (inside, and just before the end)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    bos, eos = vocab_size - 2, vocab_size - 1
    rows = np.zeros((6, length), np.int64)
    lengths = [2, length // 2, length, length, length // 2 + 1, length // 2]
    for row, n in zip(rows, lengths):
        row[:n] = [bos, *rng.integers(1, vocab_size - 2, n - 2), eos]
    rows[4, 2] = 0
    rows[5, length // 2 - 2] = 0
    return rows


def small_merges() -> bytes:
    """A merges file for CLIP's tokenizer; 530 ids."""
    return gzip.compress("\n".join(["#version: 0.2", *MERGES]).encode(), mtime=0)


def digest(key: str, gradient: np.ndarray) -> np.ndarray:
    """Two numbers that stand for a gradient: its norm, its product with fixed noise of norm 1."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"digest {key}".encode())))
    noise = rng.standard_normal(gradient.shape)
    gradient = gradient.astype(np.float64)
    return np.asarray(
        [np.linalg.norm(gradient), np.vdot(gradient, noise) / np.linalg.norm(noise)], np.float64
    )


def odd_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Images of extreme and random sizes in modes RGB, L, P, LA (opaque), CMYK and 16-bit."""
    rng = np.random.Generator(np.random.PCG64(seed))
    sizes = [(1, 500), (500, 1), (3000, 2000), (1, 1), (2, 3), (224, 224), (224, 225), (2000, 37)]
    modes = ["RGB", "P", "LA", "CMYK", "L", "I;16", "1", "RGBA"]
    images = []
    for index in range(count):
        width, height = sizes[index] if index < len(sizes) else rng.integers(1, 700, 2)
        coarse = (max(1, int(height) // 8), max(1, int(width) // 8), 3)
        base = Image.fromarray(rng.integers(0, 256, coarse).astype(np.uint8))
        image = base.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        mode = modes[(index + index // len(modes)) % len(modes)]
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        images.append(image if mode == "I;16" else image.convert(mode))
    return images
