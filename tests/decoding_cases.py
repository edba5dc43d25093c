"""Small models of every kind of decoder, and ragged prompts, for tests of decoding."""

import jax
import numpy as np
import pytest
from conftest import needs_compiler, params_of, tiny_config

from coca_jax.inference.generation import loop
from coca_jax.inference.generation.settings import Settings
from coca_jax.models import coca, decoding
from coca_jax.ops.cpu import decode_kernels as cpu_kernels

EOS, VOCAB = 1, 7
PANELS, OPEN_CLIP_PANELS = (
    pytest.param(kind, marks=needs_compiler) for kind in ("panels", "open_clip_panels")
)

MODERN = dict(
    modern=dict(
        qk_norm=True, norm="rms", bias=False, positions="rope", gated_mlp=True, layer_scale=0.5
    ),
    modern_open_clip=dict(
        norm_eps=1e-2,
        bias=False,
        positions="both",
        activation="silu",
        text=dict(block=dict(bias=True, qk_norm=True, qk_norm_kind="layer")),
    ),
)


def moved(params, by):
    """The parameters with noise of standard deviation `by`: norms and biases have numbers too."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, leaves)


def make(kind="paper", vocab=VOCAB, hidden_id=None, **text):
    """(spec, decoding weights, image tokens [3, Q, D], log probabilities of token rows)."""
    options = dict(
        paper={},
        open_clip=dict(cross="open_clip", head_bias=False),
        tied=dict(tie_embeddings=True),
        reference={},
        modern=dict(kv_heads=2),  # nothing of these two is packed
        modern_open_clip=dict(cross="open_clip", head_bias=False, kv_heads=1, multimodal_heads=2),
        open_clip_reference=dict(cross="open_clip", head_bias=False),
        panels=dict(num_heads=1),  # a head of 16
        open_clip_panels=dict(cross="open_clip", head_bias=False, num_heads=1),
    )[kind]
    config = tiny_config().model
    config.text.update(options | dict(vocab_size=vocab, unimodal_depth=1, multimodal_depth=1))
    config.text.update(text)
    config.image.depth = 1
    modern = dict(MODERN.get(kind, {}))
    config.text.update(modern.pop("text", {}))
    config.update(modern)
    module = coca.build(config)
    params = moved(params_of(module), 0.3)
    pixels = jax.random.normal(jax.random.key(2), (3, 16, 16, 3))
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_image")[1])
    image_tokens = encode(params, pixels)

    @jax.jit
    def log_probs(rows, tokens):
        valid = tokens != (-1 if hidden_id is None else hidden_id)
        out = module.apply({"params": params}, pixels[rows], tokens, valid)
        return jax.nn.log_softmax(out.logits)

    spec = decoding.decoder(config, num_ids=vocab, eos_id=EOS, hidden_id=hidden_id)
    layout = next((name for name in ("panels", "reference") if kind.endswith(name)), "kernel")
    assert layout != "panels" or cpu_kernels.available()
    pack = jax.jit(lambda params: decoding.pack(spec, params, layout))
    return spec, pack(params), image_tokens, log_probs


PROMPT = np.array([[0, 0, 3], [0, 3, 5], [3, 6, 2]], np.int32)  # right-aligned
LENGTH = np.array([1, 2, 3], np.int32)


def run(model, prompt=PROMPT, length=LENGTH, rows=slice(None), numbers=None, **how):
    spec, weights, image_tokens, _ = model
    out = loop.generate(
        spec, weights, image_tokens[rows], prompt, length, Settings(**how), rows=numbers
    )
    return jax.tree.map(np.asarray, out)


def own(prompt, length, tokens, count):
    """One row's prompt and new tokens."""
    return np.concatenate([prompt[len(prompt) - length :], tokens[:count]]).astype(np.int32)
