"""Both losses against their plain definitions: values and gradients, every option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import losses

B, E = 24, 16


def embeddings(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, B, E)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    ids = rng.integers(0, 9, size=(B, 1)).repeat(2, 1).astype(np.int32)
    return jnp.asarray(x[0]), jnp.asarray(x[1]), jnp.asarray(ids)


def naive_softmax(image, text, scale, ids, duplicates):
    scores = scale * image @ text.T
    same = (ids[:, None] == ids[None]).all(-1)
    own = jnp.eye(B, dtype=bool)
    target = jnp.where(same, 1.0, 0.0) if duplicates == "positives" else jnp.where(own, 1.0, 0.0)
    target = target / target.sum(1, keepdims=True)
    if duplicates == "ignore":
        scores = jnp.where(own | ~same, scores, -1e30)
    rows = -(target * jnp.where(target > 0, jax.nn.log_softmax(scores, 1), 0)).sum(1)
    columns = -(target.T * jnp.where(target.T > 0, jax.nn.log_softmax(scores, 0), 0)).sum(0)
    return rows.mean() + columns.mean()


def naive_sigmoid(image, text, scale, bias, ids, duplicates):
    scores = scale * image @ text.T + bias
    same = (ids[:, None] == ids[None]).all(-1)
    own = jnp.eye(B, dtype=bool)
    positive = same if duplicates == "positives" else own
    loss = -jax.nn.log_sigmoid(jnp.where(positive, scores, -scores))
    if duplicates == "ignore":
        loss = jnp.where(own | ~same, loss, 0)
    return loss.sum() / B


@pytest.mark.parametrize("chunk", [0, 6, 8])
@pytest.mark.parametrize("duplicates", ["negatives", "ignore", "positives"])
def test_softmax_contrastive_equals_its_definition(duplicates, chunk):
    image, text, ids = embeddings()
    scale = jnp.float32(9.0)

    def ours(image, text, scale):
        return losses.contrastive_loss(
            image, text, scale, text_id=ids, duplicates=duplicates, chunk=chunk
        )[0]

    got = jax.value_and_grad(ours, (0, 1, 2))(image, text, scale)
    want = jax.value_and_grad(naive_softmax, (0, 1, 2))(image, text, scale, ids, duplicates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    half = losses.contrastive_loss(
        image, text, scale, text_id=ids, duplicates=duplicates, chunk=chunk, reduction="mean"
    )[0]
    np.testing.assert_allclose(half * 2, got[0], rtol=1e-6)


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("duplicates", ["negatives", "ignore", "positives"])
def test_sigmoid_contrastive_equals_its_definition(duplicates, chunk):
    image, text, ids = embeddings(1)
    scale, bias = jnp.float32(10.0), jnp.float32(-3.0)

    def ours(image, text, scale, bias):
        return losses.contrastive_loss(
            image,
            text,
            scale,
            logit_bias=bias,
            text_id=ids,
            kind="sigmoid",
            duplicates=duplicates,
            chunk=chunk,
        )[0]

    got = jax.value_and_grad(ours, (0, 1, 2, 3))(image, text, scale, bias)
    want = jax.value_and_grad(naive_sigmoid, (0, 1, 2, 3))(
        image, text, scale, bias, ids, duplicates
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_row_losses_average_to_the_loss():
    image, text, ids = embeddings(2)
    loss, rows = losses.contrastive_loss(
        image, text, jnp.float32(20.0), text_id=ids, duplicates="positives", chunk=8
    )
    np.testing.assert_allclose(rows.mean(), loss, rtol=1e-6)


def test_large_scale_stays_finite():
    image, text, _ = embeddings(3)
    loss = losses.contrastive_loss(image, -image, jnp.float32(1000.0), chunk=8)[0]
    assert np.isfinite(loss) and loss > 1000
    assert losses.contrastive_loss(image, image, jnp.float32(1000.0))[0] < 1e-6


def test_unknown_options_are_named():
    image, text, _ = embeddings()
    with pytest.raises(ValueError, match="loss.duplicate_texts='drop'"):
        losses.contrastive_loss(image, text, jnp.float32(1), duplicates="drop")
    with pytest.raises(ValueError, match="needs text_id"):
        losses.contrastive_loss(image, text, jnp.float32(1), duplicates="ignore")


def caption_inputs(seed=0, batch=5, length=7, width=12, vocab=33):
    rng = np.random.default_rng(seed)
    states = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=vocab), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, size=(batch, length)))
    mask = jnp.asarray(rng.random((batch, length)) < 0.6)
    return states, kernel, bias, targets, mask


@pytest.mark.parametrize("chunk", [1, 4, 16, 1000])
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1}])
def test_chunked_captioning_equals_naive(chunk, options):
    states, kernel, bias, targets, mask = caption_inputs()

    def loss(states, kernel, bias, chunk):
        return losses.captioning_loss(states, kernel, bias, targets, mask, chunk=chunk, **options)

    got, got_grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(states, kernel, bias, chunk)
    want, want_grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(states, kernel, bias, 0)
    for a, b in ((got, want), (got_grad, want_grad)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def test_bfloat16_captioning_with_stored_exponentials_keeps_its_gradients():
    states, kernel, bias, targets, mask = caption_inputs(batch=16, width=32, vocab=300)

    def loss(states, kernel, bias, chunk):
        return losses.captioning_loss(states, kernel, bias, targets, mask, chunk=chunk)[0]

    got = jax.value_and_grad(loss, (0, 1, 2))(states.astype(jnp.bfloat16), kernel, bias, 64)
    want = jax.value_and_grad(loss, (0, 1, 2))(states, kernel, bias, 0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert jnp.abs(a.astype(jnp.float32) - b).max() <= 1e-2 * jnp.abs(b).max()


def test_captioning_is_the_mean_over_real_targets():
    states, kernel, bias, targets, mask = caption_inputs(1)
    loss, nll = losses.captioning_loss(states, kernel, bias, targets, mask)
    log_probs = jax.nn.log_softmax(states @ kernel + bias)
    picked = np.take_along_axis(np.asarray(log_probs), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -picked[np.asarray(mask)].mean(), rtol=1e-5)
    assert (np.asarray(nll)[~np.asarray(mask)] == 0).all()


def test_without_targets_the_loss_is_zero():
    states, kernel, bias, targets, _ = caption_inputs(2)
    none = jnp.zeros(targets.shape, bool)
    for chunk in (0, 4):
        assert losses.captioning_loss(states, kernel, bias, targets, none, chunk=chunk)[0] == 0


def test_tied_layer_without_bias():
    states, kernel, _, targets, mask = caption_inputs(3)
    a = losses.captioning_loss(states, kernel, None, targets, mask)[0]
    b = losses.captioning_loss(states, kernel, None, targets, mask, chunk=4)[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)
