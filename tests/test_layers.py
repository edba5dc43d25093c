"""Layers against their formulas: norms of queries and keys, rotary positions, shared keys, gated
MLPs, convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.config import Model
from coca_jax.models import image_encoder, layers
from coca_jax.ops.reference import ACTIVATIONS, Reference
from coca_jax.parallel import sharding


def waved(params):
    """Parameters that are no longer zero, with signs that differ."""
    wave = (0.1 * np.cos(np.arange(p.size)).reshape(p.shape) for p in jax.tree.leaves(params))
    moved = [np.asarray(p) + w.astype(p.dtype) for p, w in zip(jax.tree.leaves(params), wave)]
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def test_queries_and_keys_are_normed_in_each_head():
    """Against the formula in NumPy; their size no longer matters, and the key's bias does."""
    options = layers.BlockOptions(qk_norm=True)
    attention = layers.Attention(8, 2, options=options)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 8)))
    params = waved(sharding.unbox(jax.jit(attention.init)(jax.random.key(1), x)["params"]))
    attend = jax.jit(lambda params, x: attention.apply({"params": params}, x))

    def project(name):
        return np.einsum("bnd,dhk->bnhk", x, params[name]["kernel"]) + params[name]["bias"]

    def normed(name):
        y = project(name)
        inverse = 1 / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-5)
        return y * inverse * params[f"{name}_norm"]["scale"]

    scores = np.einsum("bnhk,bmhk->bhnm", normed("query"), normed("key")) / 2
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bmhk->bnhk", weights, project("value"))
    want = np.einsum("bnhk,hkd->bnd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    np.testing.assert_allclose(attend(params, x), want, atol=2e-6)
    larger = jax.tree.map(lambda p: 50.0 * p, params["query"])
    np.testing.assert_allclose(attend(params | {"query": larger}, x), want, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda params: attend(params, x)[0, 0, 0]))(params)
    assert np.abs(gradient["key"]["bias"]).max() > 1e-4


def test_rotary_positions_turn_pairs_by_their_place():
    """Against complex numbers; and a score depends on the distance alone."""
    places = jnp.array([[0, 3, 7, 11]])
    rotation, rotate = layers.of_places(places[..., None], 8, 100.0), Reference().rotate
    x = jax.random.normal(jax.random.key(0), (1, 4, 16))
    got = np.asarray(rotate(x, rotation, 2)).reshape(4, 2, 8)
    heads = np.asarray(x).reshape(4, 2, 8)
    angle = np.asarray(places)[0][:, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (heads[..., :4] + 1j * heads[..., 4:]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    later = rotate(x, layers.of_places(places[..., None] + 5, 8, 100.0), 2)
    scores = [np.einsum("bnd,bmd->nm", y, y) for y in (rotate(x, rotation, 2), later)]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_rotary_positions_of_patches_go_by_row_and_column():
    rotation = layers.of_places(layers.grid((3, 3), (3, 3)), 8, 100.0).reshape(3, 3, 2, 2, 2)
    rows, columns = rotation[:, :, :, 0], rotation[:, :, :, 1]  # [row, column, cos or sin, wave]
    np.testing.assert_array_equal(rows[:, 0], rows[:, 2])
    np.testing.assert_array_equal(columns[0], columns[2])
    np.testing.assert_allclose(rows[2, 0, 1], np.sin([2, 0.2]), rtol=1e-6)
    np.testing.assert_array_equal(rows[:, 0], columns[0])
    halved = layers.grid((6, 6), (3, 3)).reshape(
        6, 6, 2
    )  # twice as many patches of the same picture
    np.testing.assert_allclose(halved[:2, 0, 0].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(halved[4:, 0, 0].mean(), 2.0, atol=1e-6)


def test_heads_that_share_keys_are_heads_with_equal_keys():
    grouped, whole = layers.Attention(12, 4, kv_heads=2), layers.Attention(12, 4)
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    params = waved(sharding.unbox(jax.jit(grouped.init)(jax.random.key(1), x)["params"]))
    assert params["key"]["kernel"].shape == (12, 2, 3)
    repeated = {
        name: jax.tree.map(lambda p: np.repeat(p, 2, axis=p.ndim - 2), params[name])
        for name in ("key", "value")
    }
    got = jax.jit(grouped.apply)({"params": params}, x)
    want = jax.jit(whole.apply)({"params": params | repeated}, x)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_gated_mlps_and_norms_are_their_formulas():
    options = layers.BlockOptions(gated_mlp=True, activation="silu", bias=False, norm="rms")
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 8)) + 1
    mlp = layers.Mlp(12, options=options)
    params = sharding.unbox(mlp.init(jax.random.key(1), x)["params"])
    gate, up, out = (np.asarray(params[name]["kernel"]) for name in ("gate", "in", "out"))
    gated = x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)
    np.testing.assert_allclose(mlp.apply({"params": params}, x), gated @ out, atol=1e-5)
    scale = jnp.linspace(0.5, 2, 8)
    got = layers.Norm(options).apply({"params": {"scale": scale}}, x)
    want = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(got, want, atol=1e-5)
    plain = dataclasses.replace(options, norm="layer", norm_eps=0.5)
    got = layers.Norm(plain).apply({"params": {"scale": scale}}, x)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("channels,stride", [(3, 2), (8, 1)])
def test_convolution_standardises_its_kernel(channels, stride):
    """Also of images, whose few channels take another way through unfolded pixels."""
    layer = image_encoder.Convolution(16, stride=stride)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, channels))
    params = sharding.unbox(layer.init(jax.random.key(1), x)["params"])
    kernel = params["kernel"] * 5 + 0.3  # neither scale nor mean of a kernel matters
    params = params | {"gain": jnp.linspace(0.5, 2, 16), "bias": jnp.linspace(-1, 1, 16)}
    centred = kernel - kernel.mean((0, 1, 2))
    unit = centred / jnp.sqrt(jnp.square(centred).sum((0, 1, 2)))
    want = jax.lax.conv_general_dilated(
        x, unit, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = want * params["gain"] + params["bias"]
    got = layer.apply({"params": params | {"kernel": kernel}}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, atol=1e-4)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_convolutional_stem_keeps_the_variance_of_its_features(activation):
    module = image_encoder.ConvStem((64, 64), (1, 2), activation, jnp.float32)
    pixels = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    draw = jax.jit(lambda x: module.apply(module.init(jax.random.key(1), x), x))
    features = np.asarray(draw(pixels))
    assert features.shape == (8, 8, 8, 64)
    assert 0.6 < features.std((0, 1, 2)).mean() < 1.4


def test_a_parameter_of_another_shape_is_named():
    """By its path and both shapes; the model's own ones are taken as they are."""
    projection = layers.Projection((6,), axes=("embed", "mlp"), name="out")
    x = jnp.ones((2, 4))
    params = sharding.unbox(projection.init(jax.random.key(0), x)["params"])
    assert projection.apply({"params": params}, x).shape == (2, 6)
    params["kernel"] = jnp.zeros((4, 5))
    with pytest.raises(ValueError, match=r"kernel is \[4, 5\], and the model's \[4, 6\]"):
        projection.apply({"params": params}, x)


def test_an_option_of_blocks_that_no_key_sets_is_named():
    """A field of BlockOptions that config.BLOCK lacks would stay as by default, whatever is set."""

    @dataclasses.dataclass(frozen=True)
    class More(layers.BlockOptions):
        inner_norm: bool = False

    with pytest.raises(TypeError, match="differ in inner_norm; name it in both"):
        More.from_config(Model(), Reference())
    assert layers.BlockOptions.from_config(Model(), Reference()).norm == "layer"
