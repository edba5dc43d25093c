"""A small model's weights as open_clip has them, and ways to compare what came of them."""

import functools
import json

import jax
import numpy as np
import open_clip_cases as cases

from coca_jax.cli import convert
from coca_jax.config import Model, read
from coca_jax.interop import export_format, open_clip_config, safetensors
from coca_jax.interop.open_clip_weights import Layout
from coca_jax.interop.safetensors import Blocks
from coca_jax.models import coca
from coca_jax.ops.captioning_loss import captioning_loss
from coca_jax.ops.contrastive_loss import contrastive_loss
from coca_jax.parallel import sharding

SMALL = read(Model, open_clip_config.to_model(cases.SMALL))


def small_weights():
    return {key: cases.redraw(key, shape) for key, shape in Layout(SMALL).tensors().items()}


def write_weights(path, tensors):
    safetensors.write(
        path, {k: Blocks(v.shape, lambda v=v: [np.asarray(v)]) for k, v in tensors.items()}
    )


def write_source(folder, tensors, config=cases.SMALL):
    """A folder as open_clip publishes it."""
    folder.mkdir(exist_ok=True)
    write_weights(folder / convert.WEIGHTS_NAME, tensors)
    (folder / convert.CONFIG_NAME).write_text(json.dumps(dict(model_cfg=config)))
    (folder / "vocabulary.bpe.gz").write_bytes(cases.small_merges())
    return folder


@functools.cache
def _applied(model):
    """`model.apply`, jitted once for all that ask for the same model."""
    return jax.jit(model.apply)


def forward(model, params, pixels, tokens):
    return _applied(model)({"params": params}, pixels, tokens, tokens != 0)


def relative(value, reference):
    """Largest difference over the largest value."""
    return np.abs(np.asarray(value) - reference).max() / np.abs(reference).max()


def digests_of(tensors):
    return {key: cases.digest(key, tensor) for key, tensor in tensors.items()}


def assert_equal_digests(found, wanted, tolerance):
    """Norm and product of each tensor, within tolerance of its norm."""
    assert set(found) == set(wanted)
    for key, digest in wanted.items():
        assert np.abs(found[key] - digest).max() <= tolerance * max(digest[0], 1e-12), key


def as_tensors(model, params):
    """Parameters or gradients here as open_clip's tensors, by key, in their own dtype."""
    flat = {path: np.asarray(leaf) for path, leaf in export_format.flatten(params).items()}
    layout = Layout(model)
    shapes = layout.tensors()
    return {
        key: np.concatenate([np.ravel(part.there(flat[part.path])) for part in parts]).reshape(
            shapes[key]
        )
        for key, parts in layout.by_key.items()
    }


def each_loss(model, params, pixels, tokens):
    """The contrastive, then the captioning loss by open_clip's conventions, unweighted, each with
    its gradients and what the model gave, as `forward`; all in the model's dtype."""
    dtype = model.dtype
    params, pixels = jax.tree.map(lambda x: np.asarray(x, dtype), (params, pixels))

    def total(params, weights):
        out = model.apply({"params": params}, pixels, tokens, tokens != 0)
        contrastive = contrastive_loss(
            out.image_embedding, out.text_embedding, out.scale, reduction="mean"
        )[0]
        captioning = captioning_loss(
            out.states[:, :-1], out.kernel, out.bias, tokens[:, 1:], tokens[:, 1:] != 0
        )[0]
        return weights[0] * contrastive + weights[1] * captioning, out

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    for weights in np.eye(2, dtype=dtype):
        (value, out), gradients = run(params, weights)
        yield float(value), gradients, out


def greedy(model, params, pixels, length, vocab_size):
    """Captions by the largest logit, the whole model on each prefix; zeros after the end."""
    tokens = np.zeros((len(pixels), length), np.int32)
    tokens[:, 0] = vocab_size - 2
    ended = np.zeros(len(pixels), bool)
    for step in range(1, length):
        logits = np.asarray(forward(model, params, pixels, tokens).logits)[:, step - 1]
        chosen = np.where(ended, 0, logits.argmax(-1))
        ended |= chosen == vocab_size - 1
        tokens[:, step] = chosen
    return tokens


def shapes_of(model):
    built = coca.build(model)
    params = jax.eval_shape(lambda: sharding.unbox(coca.init(built, jax.random.key(0))))
    return {path: leaf.shape for path, leaf in export_format.flatten(params).items()}


def with_keys(config, **sections):
    return config | {name: config[name] | keys for name, keys in sections.items()}
