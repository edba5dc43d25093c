"""Both losses against their definitions in float64: values and gradients, every option."""

import functools
import re

import jax
import jax.numpy as jnp
import loss_definitions
import numpy as np
import pytest

from coca_jax.ops import cpu
from coca_jax.ops.captioning_loss import captioning_loss, weighted_captioning_loss
from coca_jax.ops.contrastive_loss import contrastive_loss, tile_width
from coca_jax.ops.gpu import Gpu
from coca_jax.ops.reference import Reference
from coca_jax.parallel import sharding

B, E = 24, 16


def embeddings(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, B, E)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    ids = rng.integers(0, 9, size=(B, 1)).repeat(2, 1).astype(np.int32)
    return jnp.asarray(x[0]), jnp.asarray(x[1]), jnp.asarray(ids)


def test_row_losses_average_to_the_loss():
    image, text, ids = embeddings(2)
    loss, rows = contrastive_loss(
        image, text, jnp.float32(20.0), text_id=ids, duplicates="positives", chunk=8
    )
    np.testing.assert_allclose(rows.mean(), loss, rtol=1e-6)


def test_the_mean_of_both_directions_is_half_their_sum():
    """Of the softmax loss; the sigmoid loss has no directions."""
    image, text, _ = embeddings(2)
    for kind, share in (("softmax", 0.5), ("sigmoid", 1.0)):
        whole, half = (
            contrastive_loss(image, text, jnp.float32(20.0), kind=kind, reduction=reduction)
            for reduction in ("sum", "mean")
        )
        assert_equal(half, [share * x for x in whole], 1e-6)


@pytest.mark.parametrize(
    ("size", "chunk", "rows", "width"),
    [(16384, 0, 16384, 1024), (16384, 0, 64, 16384), (4096, 0, 4096, 4096), (24, 7, 24, 6)]
    + [(2038, 512, 2038, 1019), (32768, 0, 128, 32768), (65536, 0, 8192, 2048)],
)
def test_a_tile_holds_at_most_64_mib_by_default(size, chunk, rows, width):
    assert tile_width(size, chunk, rows) == width


def test_scores_are_never_wider_than_the_chunk():
    """Which keeps the memory of a large batch: of 24 texts in chunks of 7, tiles of 6."""
    image, text, _ = embeddings()

    def loss(image, text):
        return contrastive_loss(image, text, jnp.float32(20.0), chunk=7)[0]

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(image, text))
    assert set(re.findall(rf"f32\[{B},(\d+)\]", program)) == {"1", "6", str(E)}


def test_large_scale_stays_finite():
    image, text, _ = embeddings(3)
    loss = contrastive_loss(image, -image, jnp.float32(1000.0), chunk=8)[0]
    assert np.isfinite(loss) and loss > 1000
    assert contrastive_loss(image, image, jnp.float32(1000.0))[0] < 1e-6


def test_unknown_options_are_named():
    image, text, _ = embeddings()
    with pytest.raises(ValueError, match="loss.duplicate_texts='drop'"):
        contrastive_loss(image, text, jnp.float32(1), duplicates="drop")
    with pytest.raises(ValueError, match="needs text_id"):
        contrastive_loss(image, text, jnp.float32(1), duplicates="ignore")


def caption_inputs(seed=0, batch=5, length=7, width=12, vocab=33):
    rng = np.random.default_rng(seed)
    states = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=vocab), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, size=(batch, length)))
    mask = jnp.asarray(rng.random((batch, length)) < 0.6)
    return states, kernel, bias, targets, mask


def test_captioning_is_the_mean_over_real_targets():
    states, kernel, bias, targets, mask = caption_inputs(1)
    loss, nll = captioning_loss(states, kernel, bias, targets, mask)
    log_probs = jax.nn.log_softmax(states @ kernel + bias)
    picked = np.take_along_axis(np.asarray(log_probs), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -picked[np.asarray(mask)].mean(), rtol=1e-5)
    assert (np.asarray(nll)[~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("chunk", [0, 4])
def test_without_targets_nothing_moves(chunk):
    states, kernel, bias, targets, _ = caption_inputs(2)
    none = jnp.zeros(targets.shape, bool)

    @jax.jit
    def loss(*arguments):
        return captioning_loss(*arguments, targets, none, chunk=chunk, z_loss=0.1)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(states, kernel, bias)
    assert value == 0 and not any(np.any(g) for g in gradients)  # a NaN would be something


def test_a_tied_layer_has_no_bias():
    states, kernel, bias, targets, mask = caption_inputs(3)

    def loss(chunk, bias, states, kernel):
        return captioning_loss(states, kernel, bias, targets, mask, chunk=chunk)[0]

    found = [
        jax.jit(jax.value_and_grad(functools.partial(loss, chunk, bias), (0, 1)))(states, kernel)
        for chunk, bias in ((0, 0 * bias), (0, None), (4, None))
    ]
    for other in found[1:]:
        assert_equal(other, found[0], 2e-6)


def assert_equal(got, want, tolerance):
    """Differences over the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2)]


def on_mesh(sizes, function, *arguments):
    """The function compiled for a mesh, with its arguments as host arrays."""
    if sizes is None:
        return jax.device_get(jax.jit(function)(*arguments))
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        return jax.device_get(jax.jit(function)(*arguments))


@pytest.mark.parametrize("sizes, chunk", [(None, 0), (None, 8), *((sizes, 7) for sizes in MESHES)])
@pytest.mark.parametrize("duplicates", ["negatives", "ignore", "positives"])
def test_contrastive_losses_on_every_mesh_are_those_in_float64(duplicates, sizes, chunk):
    """Values, row losses and gradients, times a weight; a chunk of 7 becomes one of 6,
    which divides 24 pairs. Some ids differ in their second half alone."""
    image, text, ids = embeddings(4)
    ids = ids.at[:, 0].set(ids[:, 0] // 3)
    texts = np.unique(ids, axis=0, return_inverse=True)[1].ravel()
    scale, bias, weight = jnp.float32(9.0), jnp.float32(-3.0), 0.7

    def ours(kind, image, text, scale, bias):
        loss, rows = contrastive_loss(
            image,
            text,
            scale,
            logit_bias=bias,
            text_id=ids,
            kind=kind,
            duplicates=duplicates,
            chunk=chunk,
        )
        return weight * loss, rows

    def both(*arguments):
        return [
            jax.value_and_grad(functools.partial(ours, kind), (0, 1, 2, 3), has_aux=True)(
                *arguments
            )
            for kind in ("softmax", "sigmoid")
        ]

    found = on_mesh(sizes, both, image, text, scale, bias)
    arrays = [np.asarray(x, np.float64) for x in (image, text)]
    options = np.asarray(ids), duplicates
    softmax = loss_definitions.contrastive_softmax(*arrays, 9.0, *options)
    sigmoid = loss_definitions.contrastive_sigmoid(*arrays, 9.0, -3.0, *options)
    for ((loss, rows), gradients), wanted in zip(found, (softmax, sigmoid)):
        assert_equal(loss, weight * wanted[0], 1e-5)
        if duplicates == "positives":  # what equal texts share is split evenly among them
            rows, wanted[1][:] = (
                np.bincount(texts, rows)[texts],
                np.bincount(texts, wanted[1])[texts],
            )
        assert_equal(rows, wanted[1], 1e-5)
        # The softmax loss has no bias.
        assert_equal(gradients[: len(wanted[2])], [weight * g for g in wanted[2]], 2e-5)
        assert len(wanted[2]) == 4 or abs(gradients[3]) < 1e-6


@pytest.mark.parametrize(
    "sizes, width, vocab, options",
    [
        (None, 12, 33, {}),
        (None, 12, 33, dict(z_loss=1e-2, label_smoothing=0.1)),
        ((8, 1, 1), 12, 33, dict(z_loss=1e-2, label_smoothing=0.1)),
        # The softmax layer's gradient is split along its vocabulary, its width, or not at all.
        ((4, 2, 1), 12, 32, {}),
        ((2, 2, 2), 12, 32, dict(z_loss=1e-2, label_smoothing=0.1)),
        ((2, 2, 2), 12, 34, dict(z_loss=1e-2, label_smoothing=0.1)),
        ((2, 2, 2), 13, 34, dict(z_loss=1e-2, label_smoothing=0.1)),
    ],
)
def test_captioning_on_every_mesh_is_that_in_float64(sizes, width, vocab, options):
    """With chunks of several sizes and without, all targets and some."""
    states, kernel, bias, targets, mask = caption_inputs(5, 8, 6, width, vocab)
    weights = mask / 17.0 * jnp.linspace(0.5, 1.5, 6)

    def ours(chunk, states, kernel, bias):
        loss, nll = weighted_captioning_loss(
            states, kernel, bias, targets, weights, chunk=chunk, **options
        )
        return 0.7 * loss, nll

    def each(*arguments):
        return [
            jax.value_and_grad(functools.partial(ours, chunk), (0, 1, 2), has_aux=True)(*arguments)
            for chunk in ((0, 1, 4, 1000) if sizes is None else (0, 4))
        ]

    flat = [np.asarray(x, np.float64) for x in (states.reshape(-1, width), kernel, bias)]
    loss, nll, wanted = loss_definitions.captioning(
        *flat, np.asarray(targets).ravel(), np.asarray(weights).ravel(), *options.values()
    )
    real = np.asarray(mask).ravel()
    for (found, likelihoods), gradients in on_mesh(sizes, each, states, kernel, bias):
        assert_equal(found, 0.7 * loss, 2e-6)
        assert_equal(likelihoods.ravel(), np.where(real, nll, 0.0), 2e-6)
        gradients = (gradients[0].reshape(-1, width), *gradients[1:])
        assert_equal(gradients, [0.7 * g for g in wanted], 5e-6)


def test_bfloat16_captioning_points_where_float64_does():
    states, kernel, bias, targets, mask = caption_inputs(6, batch=16, width=32, vocab=300)
    weights = mask / mask.sum()

    def ours(states, kernel):
        return weighted_captioning_loss(
            states.astype(jnp.bfloat16), kernel, bias, targets, weights, chunk=16
        )[0]

    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    states = states.astype(jnp.bfloat16).astype(jnp.float32)
    found = jax.jit(jax.grad(ours, (0, 1)))(states, kernel)
    flat = [np.asarray(x, np.float64) for x in (states.reshape(-1, 32), kernel, bias)]
    _, _, wanted = loss_definitions.captioning(
        *flat, np.asarray(targets).ravel(), np.asarray(weights).ravel()
    )
    for a, b in zip(found, wanted):
        a, b = np.asarray(a, np.float64).ravel(), b.ravel()
        assert np.abs(a - b).max() < 1e-2 * np.abs(b).max()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99998


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_as_a_gpu_runs_them_give_what_the_reference_gives(dtype):
    """Bit for bit, with chunks of padding that are left out: 12 targets of 40 in chunks of 8."""
    states, kernel, bias, targets, _ = caption_inputs(7, batch=5, length=8)
    weights = (jnp.arange(40).reshape(5, 8) % 10 < 3) / 12.0

    def ours(ops, states, kernel, bias):
        return weighted_captioning_loss(
            states.astype(dtype), kernel, bias, targets, weights, chunk=8, z_loss=1e-2, ops=ops
        )

    found = [
        jax.jit(jax.value_and_grad(functools.partial(ours, ops), (0, 1, 2), has_aux=True))(
            states, kernel, bias
        )
        for ops in (Reference(), Gpu())
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert np.abs(found[0][1][1]).max() > 0.01


def test_a_cpu_takes_fewer_tokens_of_a_large_vocabulary_at_a_time(monkeypatch):
    """In even chunks; what comes out is the reference's in chunks of that size, bit for bit."""
    assert cpu.Cpu().caption_chunk(1216, 49408) == 608
    assert cpu.Cpu().caption_chunk(2048, 512) == 2048
    states, kernel, bias, targets, mask = caption_inputs(8, batch=5, length=8)
    vocab = kernel.shape[1]
    monkeypatch.setattr(cpu, "MOST_LOGITS", 15 * vocab)

    def ours(ops, chunk, states, kernel, bias):
        return captioning_loss(states, kernel, bias, targets, mask, chunk=chunk, ops=ops)

    programs = [
        jax.jit(
            jax.value_and_grad(functools.partial(ours, ops, chunk), (0, 1, 2), has_aux=True)
        ).trace(states, kernel, bias)
        for ops, chunk in ((cpu.Cpu(), 1000), (Reference(), 14))
    ]
    assert f"f32[14,{vocab}]" in str(programs[0].jaxpr)
    assert f"f32[40,{vocab}]" not in str(programs[0].jaxpr)
    found = [program.lower().compile()(states, kernel, bias) for program in programs]
    jax.tree.map(np.testing.assert_array_equal, *found)
