"""The contrastive loss against all examples: its formula, its memory, and a run that goes on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, tiny_config, train_step_of
from quick_start import first_state
from test_checkpointing import RUN, restore, state_of

from coca_jax.checkpoints import manager
from coca_jax.config import typed
from coca_jax.models import coca
from coca_jax.ops import contrastive_loss
from coca_jax.ops.contrastive_loss import UNSEEN, Estimates, global_contrastive_loss
from coca_jax.parallel import sharding

COUNT, WIDTH = 12, 5
compiled = jax.jit(global_contrastive_loss, static_argnames=("num_examples", "rate"))


def embeddings(seed=0, count=COUNT):
    rows = np.random.default_rng(seed).normal(size=(2, count, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def unseen(count=COUNT):
    return Estimates(*(jnp.full(count, UNSEEN, jnp.float32) for _ in range(2)))


@pytest.mark.parametrize(("scale", "reduction"), [(5.0, "sum"), (100.0, "mean")])
def test_a_batch_of_all_examples_has_the_loss_and_gradient_of_softmax(scale, reduction):
    image, text = embeddings()

    def whole(image, text, scale):
        found = contrastive_loss.contrastive_loss(image, text, scale, reduction=reduction)
        return found[0]

    def ours(image, text, scale):
        return global_contrastive_loss(
            *(image, text, scale, unseen()), num_examples=COUNT, rate=1.0, reduction=reduction
        )[0]

    inputs = (image, text, jnp.float32(scale))
    want, wanted = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(*inputs)
    got, found = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(*inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_tiles_give_the_loss_gradient_and_means_of_the_full_matrix(sizes):
    """Tiles of 4 rows of 16, with equal texts and visited examples; on a mesh, too. The compiled
    gradient holds no array of the size of the full matrix."""
    count = 16
    image, text = embeddings(2, count)
    ids = np.arange(count).repeat(2).reshape(count, 2)
    ids[3] = ids[0]
    old = np.linspace(-2, 1, count).astype(np.float32)
    old[5:9] = UNSEEN

    def loss(chunk, image, text, scale):
        value, rows, new = global_contrastive_loss(
            *(image, text, scale, Estimates(old, old[::-1])),
            num_examples=40,
            rate=0.3,
            text_id=ids,
            chunk=chunk,
        )
        return value, (rows, new)

    def run(chunk, mesh=None):
        function = jax.jit(
            jax.value_and_grad(functools.partial(loss, chunk), (0, 1, 2), has_aux=True)
        )
        arguments = (image, text, jnp.float32(8.0))
        if mesh is None:
            assert ("f32[16,16]" in function.lower(*arguments).compile().as_text()) == (chunk == 0)
            return function(*arguments)
        rows = sharding.place_batch(mesh, dict(image=image, text=text))
        with jax.set_mesh(mesh):
            return function(rows["image"], rows["text"], arguments[2])

    mesh = None if sizes is None else sharding.make_mesh(*sizes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(4, mesh), run(0)
    )


def test_means_are_kept_from_visit_to_visit():
    """By hand, in float64: a first visit's mean is its own, later ones are mixed; equal texts are
    no negatives."""
    image, text = embeddings().astype(np.float64)
    ids = np.arange(COUNT).repeat(2).reshape(COUNT, 2)
    ids[3] = ids[0]
    terms = np.exp(4 * (image @ text.T - np.sum(image * text, 1)[:, None]))
    other = ~np.eye(COUNT, dtype=bool)
    other[0, 3] = other[3, 0] = False
    own = (terms * other).sum(1) / other.sum(1)
    old = np.full(COUNT, UNSEEN)
    old[:6] = np.log(np.linspace(0.5, 3, 6))
    kept = Estimates(jnp.asarray(old, jnp.float32), unseen().text)
    _, rows, new = compiled(
        *(jnp.float32(x) for x in (image, text, 4.0)),
        kept,
        num_examples=100,
        rate=0.25,
        text_id=jnp.asarray(ids),
    )
    want = np.where(np.arange(COUNT) < 6, 0.75 * np.exp(old) + 0.25 * own, own)
    np.testing.assert_allclose(np.exp(new.image), want, rtol=1e-4)
    each = np.log1p(99 * np.exp(new.image)) + np.log1p(99 * np.exp(new.text))
    np.testing.assert_allclose(rows, each, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_a_batch_without_negatives_tells_nothing(rate):
    """Rows of equal texts keep their means as they are; with another text all are told one."""
    image, text = embeddings(count=3)
    old = jnp.asarray([0.25, UNSEEN, -1.5], jnp.float32)

    def new(ids):
        loss, _, means = compiled(
            *(image, text, jnp.float32(4.0), Estimates(old, old)),
            num_examples=10,
            rate=rate,
            text_id=jnp.asarray(ids)[:, None].repeat(2, 1),
        )
        assert np.isfinite(loss)
        return np.asarray(means.image)

    np.testing.assert_array_equal(new([0, 0, 0]), old)
    assert (np.abs(new([0, 0, 1]) - old) > 0.01).all()


def test_small_batches_come_near_the_gradient_of_all_examples():
    """Embeddings that stand still: the mean gradient over batches of four is nearer to that of the
    whole with kept means than that of each batch alone."""
    count, batch = 64, 4
    image, text = embeddings(1, count)
    whole = jax.grad(lambda i: contrastive_loss.contrastive_loss(i, text, jnp.float32(8.0))[0])(
        image
    )
    kept = dict(image=np.full(count, UNSEEN, np.float32), text=np.full(count, UNSEEN, np.float32))
    sums = {"kept": np.zeros_like(image), "alone": np.zeros_like(image)}

    @jax.jit
    def ours(i, t, kept):
        def loss(i):
            value, _, new = global_contrastive_loss(
                *(i, t, jnp.float32(8.0), kept), num_examples=count, rate=0.1
            )
            return value, new

        return jax.grad(loss, has_aux=True)(i)

    alone = jax.jit(
        jax.grad(lambda i, t: contrastive_loss.contrastive_loss(i, t, jnp.float32(8.0))[0])
    )
    rng = np.random.default_rng(0)
    for epoch in range(80):
        for rows in rng.permutation(count).reshape(-1, batch):
            found, new = ours(image[rows], text[rows], Estimates(*(k[rows] for k in kept.values())))
            for side, values in zip(kept, new):
                kept[side][rows] = values
            if epoch >= 40:
                sums["kept"][rows] += found
                sums["alone"][rows] += alone(image[rows], text[rows])

    def far(x):
        x, y = x.ravel(), np.asarray(whole).ravel()
        return 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    assert far(sums["kept"]) < 0.5 * far(sums["alone"])


@pytest.mark.long
def test_a_step_keeps_the_means_of_its_examples(one_device_mesh):
    """Of 40 examples, the 16 of the batch, in micro-batches."""
    config = tiny_config(bias=False)
    config.loss.update(contrastive="global", global_examples=40, captioning_weight=0.0)
    config.accumulate_steps = 4
    model = coca.build(config.model)
    state = first_state(model, config, one_device_mesh)
    batch = random_batch(config) | dict(example=np.arange(2, 34, 2, dtype=np.int32))
    step = train_step_of(model, config, 5)
    after, metrics = step(state, sharding.place_batch(one_device_mesh, batch))
    for table in after.estimates.values():
        seen = np.flatnonzero(np.asarray(table) > UNSEEN / 2)
        np.testing.assert_array_equal(seen, batch["example"])
    assert np.isfinite(metrics["loss"]) and all(x.ndim == 0 for x in metrics.values())
    means = [np.log1p(39 * np.exp(t[batch["example"]])).mean() for t in after.estimates.values()]
    np.testing.assert_allclose(metrics["contrastive_loss"], sum(means), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss=dict(duplicate_texts="positives")), "loss.duplicate_texts='positives' does not"),
        (dict(data=dict(loader="seqio")), "data.loader='seqio' does not go with"),
        (dict(loss=dict(global_examples=1)), "loss.global_examples=1"),
    ],
)
def test_what_does_not_go_with_it_is_named(changes, message):
    config = tiny_config()
    config.loss.contrastive = "global"
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        typed(config).check()


def test_checkpoints_keep_the_means(tmp_path):
    kept = {side: jnp.asarray([0.5, UNSEEN, -3.0], jnp.float32) for side in ("image", "text")}
    state = state_of(3).replace(estimates=kept)
    checkpoints = manager.Checkpoints(str(tmp_path), run=RUN)
    checkpoints.save(3, state)
    checkpoints.wait_for(3)
    checkpoints.close()
    found, step, _ = restore(tmp_path, state)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, found, state)
