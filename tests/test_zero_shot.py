"""Zero-shot and generative classification against plain numpy ranking and scikit-learn."""

import json
import tracemalloc

import numpy as np
import pytest
from evaluator_cases import Fake, picture, unit

from coca_jax.evaluation import evaluators
from coca_jax.evaluation.evaluators import classification, zero_shot


def test_class_embedding_is_the_renormalised_mean_of_prompts():
    rng = np.random.default_rng(0)
    table = {}

    def text(t):
        return table.setdefault(t, rng.normal(size=8) * rng.uniform(1, 5))

    prompts = ("a photo of a {}", "{} drawing", "{}")
    got = zero_shot.class_embeddings(Fake(text=text), ["cat", "dog"], prompts, batch_size=2)
    mean = sum(v / np.linalg.norm(v) for v in (table["a photo of a dog"], table["dog drawing"]))
    mean = mean + table["dog"] / np.linalg.norm(table["dog"])
    np.testing.assert_allclose(got[1], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(zero_shot.normalise(np.zeros((1, 3))), np.zeros((1, 3)))


def test_zero_shot_equals_numpy_ranking():
    rng = np.random.default_rng(1)
    names = [f"c{i}" for i in range(12)]
    table = {n: unit(rng, 6) for n in names}
    images = unit(rng, 300, 6)
    truth = rng.integers(0, 12, 300)
    records = [dict(image=picture(i), labels=[names[truth[i]], "other"]) for i in range(300)]
    evaluator = zero_shot.ZeroShot("toy", names, ("{}",), batch_size=64)
    model = Fake(images, lambda t: table[t])
    got = dict(evaluator.run(model, records))
    assert model.largest == 64 and model.asked == {True}
    for size in (1e-7, 30):  # the length of an embedding does not count
        other = Fake(np.float32(size) * images, lambda t: table[t])
        assert dict(evaluator.run(other, records)) == got
    order = np.argsort(-(images @ np.stack([table[n] for n in names]).T), axis=1)
    top1 = (order[:, 0] == truth).mean()
    assert got["zero_shot/toy/top1"] == pytest.approx(top1)
    assert got["zero_shot/toy/top5"] == pytest.approx(
        (order[:, :5] == truth[:, None]).any(1).mean()
    )
    assert got["zero_shot/toy/top1_count"] == 300
    assert got["zero_shot/toy/top1_low"] < top1 < got["zero_shot/toy/top1_high"]
    per_class = [(order[truth == c, 0] == c).mean() for c in range(12)]
    assert got["zero_shot/toy/mean_per_class"] == pytest.approx(np.mean(per_class))
    confusion = np.asarray(evaluator.examples["confusion"]["counts"])
    assert confusion.sum() == 300 and np.trace(confusion) == round(top1 * 300)
    assert evaluator.examples["per_class"]["c3"]["accuracy"] == pytest.approx(per_class[3])
    assert len(evaluator.examples["items"]) == 16
    json.dumps(evaluator.examples)


def test_zero_shot_any_of_several_labels_is_right_and_constant_models_score_zero():
    eye = np.eye(3, dtype=np.float32)
    names = ["a", "b", "c"]
    records = [dict(image=picture(1), labels=["a", "b"]), dict(image=picture(2), labels=["a"])]
    evaluator = zero_shot.ZeroShot("toy", names, ("{}",))
    got = dict(evaluator.run(Fake(eye, lambda t: eye[names.index(t)]), records))
    assert got["zero_shot/toy/top1"] == 0.5 and "zero_shot/toy/top5" not in got
    assert evaluator.examples["confusion"]["counts"] == [[1, 1]]
    constant = Fake(np.ones((3, 3), np.float32), lambda t: np.ones(3))
    assert dict(evaluator.run(constant, records))["zero_shot/toy/top1"] == 0


@pytest.mark.parametrize("present", [12, 1])
def test_classification_equals_scikit_learn(present):
    """Scores of one decimal, so that many tie; also with only one class in the data."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(5)
    names = [f"c{i}" for i in range(12)]
    scores = np.round(rng.normal(size=(400, 12)), 1)
    truth = rng.integers(0, present, 400)
    scores[np.arange(400), truth] += 0.7
    scores[::40] = 1.0  # all equal
    records = [dict(image=picture(i), labels=[f"label {truth[i]}"]) for i in range(400)]
    tally = classification.Tally("zero_shot/x", names, [f"label {i}" for i in range(12)])
    for start in range(0, 400, 150):  # the last part is smaller
        tally.add(scores[start : start + 150], records[start : start + 150])
    got = dict(tally.results())
    against = scores - 1e-3 * (np.arange(12) == truth[:, None])  # ties go to the wrong class
    for k, name in ((1, "top1"), (5, "top5")):
        expected = sklearn.top_k_accuracy_score(truth, against, k=k, labels=range(12))
        assert got[f"zero_shot/x/{name}"] == pytest.approx(expected)
        assert got[f"zero_shot/x/{name}_count"] == 400
    guess = against.argmax(1)
    seen = np.unique(truth)
    recall = sklearn.recall_score(truth, guess, labels=seen, average=None)
    assert got["zero_shot/x/mean_per_class"] == pytest.approx(recall.mean())
    low, high = (got[f"zero_shot/x/mean_per_class_{end}"] for end in ("low", "high"))
    assert low <= recall.mean() <= high and 0.02 < high - low < 0.15
    classes = tally.classes()
    table = np.zeros((12, 12), int)
    for t, g, n in classes["confusion"]:
        table[t, g] = n
    np.testing.assert_array_equal(table, sklearn.confusion_matrix(truth, guess, labels=range(12)))
    assert [classes["accuracy"][c] for c in seen] == pytest.approx(recall.tolist())
    assert classes["accuracy"][present:] == [None] * (12 - present)
    assert classes["count"] == np.bincount(truth, minlength=12).tolist()
    json.dumps(classes)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_generative_classification_is_the_likelihood_of_the_prompts(offset):
    """Also of likelihoods that no float64 holds."""
    rng = np.random.default_rng(6)
    names, prompts = ["a", "bb", "cccc"], ("{}", "one {} in a long prompt")
    texts = [[p.replace("{}", n) for p in prompts] for n in names]
    table = {t: -20 * rng.random(400) for several in texts for t in several}
    logs = np.asarray([[table[t] for t in several] for several in texts])
    best = np.exp(logs).mean(1).argmax(0)
    truth = np.where(rng.random(400) < 0.7, best, rng.integers(0, 3, 400))
    records = [dict(image=picture(i), labels=[names[truth[i]]]) for i in range(400)]
    evaluator = zero_shot.Generative("toy", names, prompts, batch_size=128)
    model = Fake(text=lambda t: table[t] + offset)
    got = dict(evaluator.run(model, records))
    assert model.asked == {True}  # class names, in prompts
    assert got["generative/toy/top1"] == pytest.approx((best == truth).mean())
    lengths = np.asarray([[len(t) + 1 for t in several] for several in texts])
    guess = ((logs + offset) / lengths[..., None]).mean(1).argmax(0)
    assert got["generative/toy/top1_per_token"] == pytest.approx((guess == truth).mean())
    assert got["generative/toy/top1_per_token"] < got["generative/toy/top1"] - 0.05
    assert got["generative/toy/top1_count"] == 400 and len(evaluator.examples["items"]) == 16


def test_generative_ties_are_wrong_and_infinite_likelihoods_refused():
    """Likelihoods of one text in two batches differ by about 1e-5: that is no difference."""
    names = ["a", "b"]
    records = [dict(image=picture(i), labels=[names[i % 2]]) for i in range(10)]
    right = {name: -7 + 1e-5 * (np.arange(10) % 2 == number) for number, name in enumerate(names)}
    evaluator = zero_shot.Generative("toy", names, ("{}",))
    assert dict(evaluator.run(Fake(text=lambda t: right[t]), records))["generative/toy/top1"] == 0
    right["b"][3] = -np.inf
    with pytest.raises(
        ValueError, match="caption likelihoods of generative/toy: 1 of 10 are not finite"
    ):
        dict(evaluator.run(Fake(text=lambda t: right[t]), records))


@pytest.mark.parametrize("of", [zero_shot.ZeroShot, zero_shot.Generative])
def test_classes_that_the_model_reads_alike_are_named(of, caplog):
    names, prompts = ["food, fruit", "food, meat", "drink"], ("a {}", "the {}")
    model = Fake(np.eye(3, dtype=np.float32), lambda t: np.eye(3)[int("drink" in t)])
    records = [dict(image=picture(0), labels=["drink"])]

    def notes():
        caplog.clear()
        evaluator = of("toy", names, prompts)
        list(evaluator.run(model, records))
        assert caplog.messages == [f"{of.kind}/toy: {one}" for one in evaluator.examples["notes"]]
        return evaluator.examples["notes"]

    model.max_len = 9  # "the food,"; with "a " in front one more letter differs
    assert notes() == []
    model.max_len = 8
    (note,) = notes()
    for fact in ("2 of 3 classes", "'food, fruit' and 'food, meat'", "model.text.max_len=8"):
        assert fact in note
    model.max_len = 64
    assert notes() == []
    model.tokenize_with_mask = lambda texts, labels: Fake().tokenize_with_mask(
        [t.lower() for t in texts]
    )
    names = ["food", "Food", "drink"]
    (note,) = notes()
    assert "'food' and 'Food'" in note and "vocabulary" in note


def test_zero_shot_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="3 names, 2 distinct"):
        zero_shot.ZeroShot("toy", ["a", "b", "a"])
    with pytest.raises(ValueError, match="1 names, 1 distinct"):
        zero_shot.ZeroShot("toy", ["a"])
    with pytest.raises(ValueError, match="1 distinct labels for 2 class_names"):
        zero_shot.ZeroShot("toy", ["a", "b"], labels=["x", "x"])
    evaluator = zero_shot.ZeroShot("toy", ["a", "b"], ("{}",))
    model = Fake(np.eye(2, dtype=np.float32), lambda t: np.eye(2)[0])
    with pytest.raises(ValueError, match=r"x.png: labels \['z'\] are not among the 2"):
        list(evaluator.run(model, [dict(image=picture(0), labels=["z"], key="x.png")]))
    with pytest.raises(ValueError, match="closest: 'b'.*--where=label=NA"):
        list(evaluator.run(model, [dict(image=picture(0), labels=["bb"], key="x.png")]))
    with pytest.raises(ValueError, match="no records"):
        list(evaluator.run(model, []))
    model.image = np.full((2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="image embeddings: 1 of 1 are not finite"):
        list(evaluator.run(model, [dict(image=picture(0), labels=["a"])]))
    with pytest.raises(ValueError, match="to one size"):
        evaluators.stack_images([dict(image=picture(0)), dict(image=np.zeros((2, 2, 3)))])


def test_a_hundred_thousand_class_names_of_which_few_occur_take_little_memory():
    names = [f"name {number}" for number in range(100_000)]
    tally = classification.Tally("zero_shot/x", names, num_examples=0)
    scores = np.zeros((3, len(names)), np.float32)
    scores[[0, 1, 2], [70_000, 70_000, 9]] = 1.0  # the guesses
    tally.add(scores, [dict(labels=[names[n]], image=picture(0)) for n in (70_000, 5, 5)])
    tracemalloc.start()
    found = tally.examples()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 << 20  # a table of all names is 80 GB
    assert found["confusion"] == dict(
        rows=["name 5", "name 70000"],
        columns=["name 5", "name 9", "name 70000"],
        counts=[[0, 1, 1], [0, 0, 1]],
    )
    assert found["per_class"] == {
        "name 5": dict(accuracy=0.0, count=2),
        "name 70000": dict(accuracy=1.0, count=1),
    }


def test_texts_of_classes_take_the_memory_of_the_classes():
    names, prompts = [f"n{i}" for i in range(500)], [f"{i} of {{}}" for i in range(10)]
    table = np.random.default_rng(0).standard_normal((5000, 512)).astype(np.float32)
    rows = {text: row for text, row in zip(zero_shot.class_texts(names, prompts), table)}
    tracemalloc.start()
    found = zero_shot.class_embeddings(Fake(text=rows.get), names, prompts, 64)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6 << 20  # all of their embeddings are 10 MB, and were there twice
    wanted = zero_shot.normalise(table).reshape(500, 10, 512).mean(1)
    np.testing.assert_array_equal(found, zero_shot.normalise(wanted))
