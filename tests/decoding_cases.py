"""Small models of every kind of decoder, and ragged prompts, for tests of decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_compiler, tiny_config
from ops_cases import drawn

from coca_jax.inference.generation import driver
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.models import coca
from coca_jax.models import text_decoder as decoding
from coca_jax.ops.cpu_kernels import decode as cpu_kernels

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


def logits_of(text, tokens, valid, image_tokens):
    """The forward pass of a text decoder."""
    _, states = text(tokens, valid, image_tokens)
    kernel, bias = text.output_layer()
    return states @ kernel + (0 if bias is None else bias)


def text_decoder(model, by=0.4, queries=4, seed=2):
    """(the text decoder of config.model, its parameters in a model's, image tokens [3, Q, D]): of
    standard deviation `by`, norms about one. The image's tower is not there: it takes as long to
    compile."""
    text, rng = coca.build(model).decoder, np.random.default_rng(seed)
    image_tokens = jnp.asarray(rng.normal(size=(3, queries, model.text.width)), np.float32)
    row = np.zeros((3, 4), np.int32)
    shapes = jax.eval_shape(text.init, jax.random.key(0), row, row == 0, image_tokens)["params"]
    return text, {"text_decoder": drawn(shapes, by, seed)}, image_tokens


def make(kind="paper", vocab=VOCAB, hidden_id=None, seed=2, **text_options):
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
    config.text.update(text_options)
    modern = dict(MODERN.get(kind, {}))
    config.text.update(modern.pop("text", {}))
    config.update(modern)
    text, params, image_tokens = text_decoder(config, seed=seed)

    @jax.jit
    def log_probs(rows, tokens):
        valid = tokens != (-1 if hidden_id is None else hidden_id)
        given = {"params": params["text_decoder"]}
        return jax.nn.log_softmax(
            text.apply(given, tokens, valid, image_tokens[rows], method=logits_of)
        )

    spec = decoding.decoder(config, num_ids=vocab, eos_id=EOS, hidden_id=hidden_id)
    layout = next((name for name in ("panels", "reference") if kind.endswith(name)), "kernel")
    assert layout != "panels" or cpu_kernels.available()
    return spec, decoding.pack(spec, params, layout), image_tokens, log_probs


PROMPT = np.array([[0, 0, 3], [0, 3, 5], [3, 6, 2]], np.int32)  # right-aligned
LENGTH = np.array([1, 2, 3], np.int32)


def run(model, prompt=PROMPT, length=LENGTH, rows=slice(None), numbers=None, **how):
    spec, weights, image_tokens, _ = model
    out = driver.generate(
        spec, weights, image_tokens[rows], prompt, length, GenerationConfig(**how), rows=numbers
    )
    return jax.tree.map(np.asarray, out)


def own(prompt, length, tokens, count):
    """One row's prompt and new tokens."""
    return np.concatenate([prompt[len(prompt) - length :], tokens[:count]]).astype(np.int32)
