"""Muon: which parameters are matrices to it, and what their updates look like."""

import jax
import numpy as np
import optax
from conftest import tiny_config

from coca_jax import optimizer, partitioning
from coca_jax.models import coca


def updates_of(config, scale_layer=1.0):
    model = coca.build(config.model)
    params = partitioning.unbox(coca.init(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    layers = gradients["text_decoder"]["multimodal"]["layers"]
    layers["mlp"]["in"]["kernel"][0] *= scale_layer
    rule = optimizer.make_optimizer(config.optimizer)
    updates, _ = rule.update(gradients, rule.init(params), params)
    return updates, gradients, params


def muon_config():
    config = tiny_config()
    config.model.text.multimodal_depth = 2
    config.optimizer.update(name="muon", weight_decay=0.0)
    return config


def test_muon_updates_of_kernels_are_orthogonal_and_of_one_size():
    updates, _, params = updates_of(muon_config())
    decoder = updates["text_decoder"]["multimodal"]["layers"]
    attention = decoder["attention"]
    width = params["text_to_joint"]["kernel"].shape[0]
    matrices = dict(
        query=attention["query"]["kernel"][1].reshape(width, -1),  # heads side by side
        out=attention["out"]["kernel"][0].reshape(-1, width),
        mlp=decoder["mlp"]["in"]["kernel"][1],
        joint=updates["text_to_joint"]["kernel"],
    )
    for name, matrix in matrices.items():
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        assert 0.6 < np.median(values) and values.max() < 1.3, (name, values)


def test_muon_keeps_layers_apart_and_leaves_the_rest_to_adam():
    updates, gradients, params = updates_of(muon_config())
    louder, _, _ = updates_of(muon_config(), scale_layer=100.0)
    kernel = updates["text_decoder"]["multimodal"]["layers"]["mlp"]["in"]["kernel"]
    other = louder["text_decoder"]["multimodal"]["layers"]["mlp"]["in"]["kernel"]
    np.testing.assert_allclose(kernel, other, atol=1e-5)  # the size of a gradient does not count
    adam = optax.scale_by_adam(0.9, 0.999)
    want, _ = adam.update(gradients, adam.init(params), params)
    decoder = updates["text_decoder"], want["text_decoder"]
    for part in ("token_embedding", "head", "positions", "unimodal_norm"):
        jax.tree.map(np.testing.assert_array_equal, *(tree[part] for tree in decoder))
