"""Losses as classes: values and metrics add up over parts; a tangent has its loss's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from coca_jax.config import Loss, typed
from coca_jax.models import param_groups
from coca_jax.recipes import base
from coca_jax.training import losses as objectives

ROWS, LENGTH, WIDTH, VOCAB = 8, 6, 4, 11


def inputs_of(seed=0):
    """What all losses read, of eight rows: two without a class, three labels."""
    rng = np.random.default_rng(seed)
    valid = np.arange(LENGTH)[None] < rng.integers(2, LENGTH + 1, ROWS)[:, None]
    unit = rng.normal(size=(2, ROWS, WIDTH))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    return {
        name: jnp.asarray(x)
        for name, x in dict(
            image_embedding=unit[0].astype(np.float32),
            text_embedding=unit[1].astype(np.float32),
            scale=np.float32(5.0),
            logit_bias=np.float32(-2.0),
            states=rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
            kernel=rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
            pooled=rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
            bag_kernel=rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
            bias=rng.normal(size=VOCAB).astype(np.float32),
            class_logits=rng.normal(size=(ROWS, 3)).astype(np.float32),
            class_id=np.array([0, 1, -1, 2, 2, -1, 0, 1], np.int32),
            tokens=rng.integers(0, VOCAB, (ROWS, LENGTH)),
            text_valid=valid,
            text_id=rng.integers(0, 4, (ROWS, 2)).astype(np.int32),
            is_label=np.array([0, 1, 0, 0, 1, 0, 1, 0], bool),
        ).items()
    }


SHARED = ("scale", "logit_bias", "kernel", "bias", "bag_kernel")


def rows_of(inputs, rows):
    return {name: x if name in SHARED else x[rows] for name, x in inputs.items()}


def config_of(**loss):
    head = dict(kind="classification", weight=0.5, label_smoothing=0.1)
    text = {"model.text.vocab_size": VOCAB}
    return tiny(head=head, loss=dict(duplicate_texts="positives") | loss, **text)


def read(objective, inputs):
    """Only what the loss says that it reads."""
    return {name: inputs[name] for name in (*objective.outputs, *objective.fields)}


def test_a_run_has_the_losses_that_have_a_weight():
    config = config_of()
    found = objectives.of(config)
    assert [o.name for o in found] == ["head_loss", "contrastive_loss", "captioning_loss"]
    assert [o.weight for o in found] == [0.5, 1.0, 2.0]
    assert not objectives.head_alone(found)
    config = config_of(contrastive_weight=0.0, captioning_weight=0.0)
    assert objectives.head_alone(objectives.of(config))
    config = config.change({"head.kind": "", "loss.contrastive_weight": 3.0})
    assert [o.name for o in objectives.of(config)] == ["contrastive_loss"]


@pytest.mark.parametrize("chunk", [0, 4])
def test_values_and_metrics_of_parts_add_up(chunk):
    """Of five rows and three, of which the last part may have no class or no label."""
    inputs = inputs_of()
    config = config_of(caption_chunk=chunk, z_loss=1e-2, bag_weight=1.0)
    for objective in objectives.of(config):
        if objective.couples:
            continue
        totals = objective.totals({name: inputs[name] for name in objective.fields})
        value = jax.jit(objective.value)
        whole, means = value(read(objective, inputs), totals)
        cuts = [rows_of(inputs, np.s_[:5]), rows_of(inputs, np.s_[5:])]
        each = [value(read(objective, cut), totals) for cut in cuts]
        np.testing.assert_allclose(sum(value for value, _ in each), whole, rtol=1e-6)
        for name, (total, count) in means.items():
            np.testing.assert_allclose(sum(m[name][0] for _, m in each), total, rtol=1e-6)
            np.testing.assert_allclose(sum(m[name][1] for _, m in each), count, rtol=1e-6)


def test_a_bag_of_tokens_is_a_softmax_with_rare_tokens_as_its_target():
    """By hand in NumPy: each token once a text, by the logarithm of one over its share of texts."""
    inputs = inputs_of() | dict(tokens=jnp.asarray(inputs_of()["tokens"]).at[:, 0].set(3))
    config = config_of(bag_weight=1.0)
    bag = objectives.of(config)[-1]
    totals = bag.totals({name: inputs[name] for name in bag.fields})
    tokens, valid = np.asarray(inputs["tokens"]), np.asarray(inputs["text_valid"])
    texts = [set(row[ok]) for row, ok in zip(tokens, valid)]
    rarity = {t: np.log(ROWS / sum(t in text for text in texts)) for t in set().union(*texts)}
    assert rarity[3] == 0  # the begin symbol, which all have
    logits = np.asarray(inputs["pooled"]) @ np.asarray(inputs["bag_kernel"])
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = []
    for text, row in zip(texts, logs):
        whole = sum(rarity[t] for t in text)
        rows.append(-sum(rarity[t] * row[t] for t in text) / whole if whole else 0.0)
    value, means = bag.value(read(bag, inputs), totals)
    counted = sum(sum(rarity[t] for t in text) > 0 for text in texts)
    np.testing.assert_allclose(value, sum(rows) / counted, rtol=1e-5)
    label = np.asarray(inputs["is_label"])
    np.testing.assert_allclose(means["bag_loss/label"][0], np.array(rows)[label].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        dict(),
        dict(contrastive="sigmoid"),
        dict(contrastive="global", global_examples=40),
        dict(contrastive_weight=0.0, affinity_weight=1.0, teacher_width=WIDTH),
    ],
)
def test_similarities_are_never_rounded(loss):
    """Where a TPU multiplies float32 as bfloat16 unless told: they are scaled by up to 100."""
    losses = objectives.of(config_of(duplicate_texts="ignore", **loss))
    (objective,) = (one for one in losses if one.couples)
    inputs = inputs_of()
    inputs |= {f"teacher_{one}": inputs[f"{one}_embedding"] for one in ("image", "text")}
    inputs |= {objectives.ESTIMATE.format(one): jnp.zeros(ROWS) for one in objectives.ESTIMATES}
    given = read(objective, inputs)

    def value(image, text):
        return objective.value(given | dict(image_embedding=image, text_embedding=text), None)[0]

    both = given["image_embedding"], given["text_embedding"]
    step = jax.jit(jax.grad(value, (0, 1))).trace(*both)
    lines = step.lower(lowering_platforms=("tpu",)).as_text().splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert len(products) >= 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_metrics_count_what_they_are_means_of():
    inputs = inputs_of()
    head, contrastive, captioning = objectives.of(config_of())

    def means(objective):
        totals = objective.totals({name: inputs[name] for name in objective.fields})
        return objective.value(read(objective, inputs), totals)[1]

    right = np.asarray(inputs["class_logits"]).argmax(1) == np.asarray(inputs["class_id"])
    assert tuple(map(int, means(head)["head_accuracy"])) == (right.sum(), 6)
    rows = means(contrastive)
    assert (rows["contrastive_loss/caption"][1], rows["contrastive_loss/label"][1]) == (5, 3)
    targets = np.asarray(inputs["text_valid"])[:, 1:].sum(1)
    label = np.asarray(inputs["is_label"])
    assert float(means(captioning)["captioning_loss/label"][1]) == targets[label].sum()
    assert float(means(captioning)["captioning_loss/caption"][1]) == targets[~label].sum()


@pytest.mark.parametrize("chunk", [0, 4])
def test_captions_alone_train_the_decoder_where_label_rows_have_no_captioning_loss(chunk):
    inputs = inputs_of()
    captions = rows_of(inputs, np.flatnonzero(~np.asarray(inputs["is_label"])))

    def loss(states, given, **options):
        config = config_of(caption_chunk=chunk, **options)
        (objective,) = (o for o in objectives.of(config) if o.name == "captioning_loss")
        read_ = read(objective, given | dict(states=states))
        return objective.value(read_, objective.totals(read_))

    def gradient(given, **options):
        (value, means), found = jax.value_and_grad(loss, has_aux=True)(
            given["states"], given, **options
        )
        return float(value), means, np.asarray(found)

    value, means, found = gradient(inputs, caption_labels=False)
    label = np.asarray(inputs["is_label"])
    wanted, _, wanted_gradient = gradient(captions)  # as if the label rows were not there
    assert value == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(found[~label], wanted_gradient, rtol=1e-5, atol=1e-7)
    assert not found[label].any() and float(means["captioning_loss/label"][1]) == 0
    assert np.abs(gradient(inputs)[2][label]).max() > 1e-3  # by default they train it


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_tangent_has_the_gradient_of_its_loss(kind):
    """Over two parts, by the embeddings, the scale and the sigmoid's bias."""
    inputs = inputs_of()
    objective = objectives.of(config_of(contrastive=kind))[1]
    outputs = {name: inputs[name] for name in objective.outputs}

    def whole(outputs):
        return objective.value(read(objective, inputs | outputs), None)[0]

    slopes = jax.jit(jax.grad(whole))(outputs)
    shared = {name: slopes[name] / 2 for name in ("scale", "logit_bias")}
    tangent = objectives.Tangent(objective, shared, ("image_embedding", "text_embedding"))
    fields = {tangent.field(name): slopes[name] for name in tangent.rows}

    def parts(outputs):
        given = inputs | outputs | fields
        cuts = [rows_of(given, np.s_[::2]), rows_of(given, np.s_[1::2])]
        return sum(tangent.value(read(tangent, cut), None)[0] for cut in cuts)

    for name, found in jax.jit(jax.grad(parts))(outputs).items():
        np.testing.assert_allclose(found, slopes[name], rtol=1e-6, atol=1e-8, err_msg=name)


def test_losses_and_parts_of_the_model_speak_of_the_same():
    """A word that one of them alone has would train nothing, or leave a layer as it was drawn."""
    weights = {name: 1.0 for name in vars(Loss()) if name.endswith("_weight")}
    change = {"loss": weights | dict(teacher_width=4), "optimizer.ema": 0.9}
    config = typed(base.get_config()).change(change)
    question = config.change({"head.kind": "answer", "loss.hidden_weight": 0.0})
    losses = [objective.of(question, objectives.REFERENCE) for objective in objectives.OBJECTIVES]
    words = frozenset().union(*(loss.serves for loss in losses))
    assert words == {part.serves for part in param_groups.PARTS.values()}
