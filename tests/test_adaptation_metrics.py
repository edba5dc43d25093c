"""Metrics of task heads and probes against independent computations."""

import importlib
import io
import json
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from coca_jax.config import heads, typed
from coca_jax.evaluation import evaluators, runner
from coca_jax.evaluation.evaluators import probes
from coca_jax.evaluation.evaluators.base import Setting
from coca_jax.evaluation.evaluators.caption_match import vqa_accuracy
from coca_jax.evaluation.evaluators.task_head import Answers, Classification
from coca_jax.evaluation.metrics import linear

NAMES = [f"class {i}" for i in range(7)]


class Fixed:
    """Answers with prepared probabilities, whatever the picture."""

    class_names, head_kind = NAMES, heads.Classification()

    def __init__(self, probability):
        self.probability, self.done = probability, 0

    def classify(self, images, texts=None):
        rows = self.probability[self.done : self.done + len(images)]
        self.done += len(images)
        return rows


def records_of(labels):
    image = np.zeros((4, 4, 3), np.uint8)
    return [dict(image=image, labels=names, text=[], key=str(i)) for i, names in enumerate(labels)]


def test_top1_and_top5_equal_a_plain_count():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 7))
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = rng.integers(0, 7, 300)
    second = rng.integers(0, 7, 300)
    labels = [
        [NAMES[t]] if i % 3 else [NAMES[t], NAMES[s]] for i, (t, s) in enumerate(zip(truth, second))
    ]
    labels[0] = ["something else"]
    evaluator = Classification("set", batch_size=64)
    scores = dict(evaluator.run(Fixed(probability.astype(np.float32)), records_of(labels)))
    order = np.argsort(-probability, 1)
    for k, name in ((1, "top1"), (5, "top5")):
        right = [any(NAMES[c] in names for c in order[row, :k]) for row, names in enumerate(labels)]
        np.testing.assert_allclose(scores[f"classification/set/{name}"], np.mean(right))
    low, high = (scores[f"classification/set/top1_{end}"] for end in ("low", "high"))
    assert low < scores["classification/set/top1"] < high
    assert scores["classification/set/unknown_labels"] == 1
    columns = [[NAMES.index(name) for name in set(names)] for names in labels[1:]]
    nll = -np.array([np.log(row[c].sum()) for row, c in zip(probability[1:], columns)])
    np.testing.assert_allclose(scores["classification/set/nll"], nll.mean(), rtol=1e-5)
    for end, sign in (("low", -1), ("high", 1)):
        limit = nll.mean() + sign * 1.96 * nll.std() / np.sqrt(299)
        np.testing.assert_allclose(scores[f"classification/set/nll_{end}"], limit, atol=0.02)
    table = np.array(evaluator.examples["confusion"]["counts"])
    assert table.sum() == 299 and len(evaluator.examples["items"]) == 16
    assert np.sum(evaluator.classes["count"]) == 299


def test_data_of_other_classes_than_the_head_s_are_warned_of_and_a_part_of_them_counts(monkeypatch):
    rows = np.full((3, 7), 1 / 7, np.float32)
    other = records_of([["bird"], ["tree"], ["fish", "eel"]])
    line = f"none of 3 records has a class of the head.*'fish', 'eel'.*{NAMES[0]}"
    said = []
    monkeypatch.setattr(evaluators.logging, "warning", lambda text, *more: said.append(text % more))
    scores = dict(Classification("set").run(Fixed(rows), other))
    assert scores["classification/set/unknown_labels"] == 3 and re.search(line, said.pop())
    some = [*other[:2], *records_of([[NAMES[0]]])]
    assert (
        dict(Classification("set").run(Fixed(rows), some))["classification/set/unknown_labels"] == 2
    )
    assert not said


def test_small_probabilities_are_ranked_and_are_no_ties():
    """The true class is the third, fifth or sixth of probabilities from 1 down to 1e-30; of a head,
    and of a probe that finds the same."""
    row = np.asarray([1.0, 1e-8, 1e-12, 1e-18, 1e-24, 1e-28, 1e-30], np.float32)
    records = records_of([[NAMES[c]] for c in (2, 4, 5, 0)])
    found = dict(Classification("set").run(Fixed(np.tile(row, (4, 1))), records))
    assert found["classification/set/top5"] == 0.75 and found["classification/set/top1"] == 0.25

    class Probe(probes.NearestNeighbours):
        def scores(self, test, train, classes):
            return np.tile(row.astype(np.float64), (len(test), 1)), {}

    class Model:
        def features(self, images):
            return np.ones((len(images), 2), np.float32)

    found = dict(Probe("set", NAMES, records).run(Model(), records))
    assert found["knn/set/top5"] == 0.75 and found["knn/set/top1"] == 0.25
    # Those that differ by less than a millionth of themselves are ties, however small.
    row[1:] = 1e-20 * (1 + 1e-7 * np.arange(6))
    found = dict(Classification("set").run(Fixed(np.tile(row, (4, 1))), records))
    assert found["classification/set/top5"] == 0.25


def test_equal_probabilities_score_nothing():
    labels = [[NAMES[i % 7]] for i in range(14)]
    found = dict(Classification("set").run(Fixed(np.full((14, 7), 1 / 7)), records_of(labels)))
    assert found["classification/set/top1"] == found["classification/set/top5"] == 0
    with pytest.raises(ValueError, match="no record"):
        dict(Classification("set").run(Fixed(np.zeros((0, 7))), []))


class Head:
    """Says 'red' of every picture."""

    class_names, head_kind = ["red", "green"], heads.Classification()

    def fit_image(self, image):
        return image

    def classify(self, images, texts):
        return np.tile(np.float32([0.8, 0.2]), (len(images), 1))


def test_a_head_is_scored_on_what_has_a_label_and_data_without_any_are_refused(tmp_path, capsys):
    """Others counted as wrong: captions alone scored 0%, without a word."""
    for split, labels in (("test", ["red", None, "green", None]), ("train", [None, None])):
        (tmp_path / split).mkdir()
        rows = [dict(file_name=f"{i}.png", text="a colour") for i in range(len(labels))]
        for row, label in zip(rows, labels):
            Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / split / row["file_name"])
            row |= {} if label is None else dict(label=label)
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / split / "metadata.jsonl").write_text(text)
    task = dict(kind="classification", name="c", data=dict(path=str(tmp_path), split="test"))
    setting = Setting(main_process=True, workdir=str(tmp_path / "out"))
    scores = runner.run_task(Head(), task, setting)
    assert scores["classification/c/top1"] == 0.5
    assert scores["classification/c/num_examples"] == 2
    assert scores["classification/c/unknown_labels"] == 0
    assert "classification/c: skipped 2 examples without label" in capsys.readouterr().err
    task["data"]["split"] = "train"
    with pytest.raises(ValueError, match="no example has a label"):
        runner.run_task(Head(), task, setting)


def test_written_answers_are_compared_as_words():
    class Writer:
        def answer(self, images, questions):
            return ["Yes.", "two  dogs", ""][: len(images)]

    records = records_of([["yes"], ["a cat", "two dogs"], ["no"]])
    records = [dict(record, text=["what?"]) for record in records]
    found = dict(Answers("set").run(Writer(), records))
    np.testing.assert_allclose(found["answers/set/exact_match"], 2 / 3)
    with pytest.raises(ValueError, match="2 texts instead of one question"):
        dict(Answers("set").run(Writer(), [dict(records[0], text=["a?", "b?"])]))


def test_answers_of_many_people_are_scored_as_vqa_does():
    """Against its definition: each nine of ten, a third of a point for each that agrees."""
    people = ["A dog"] * 2 + ["dog."] + ["two", "2", "don't know", "dont know"] + ["cat"] * 3
    forms = ["dog"] * 3 + ["2"] * 2 + ["dont know"] * 2 + ["cat"] * 3

    def defined(said):
        nine = [forms[:i] + forms[i + 1 :] for i in range(10)]
        return np.mean([min(few.count(said) / 3, 1) for few in nine])

    said = {"the dog": "dog", "Two": "2", "dont know": "dont know", "bird": "bird", "": ""}
    for text, form in said.items():
        assert vqa_accuracy(text, people) == pytest.approx(defined(form), abs=1e-12)
    assert [vqa_accuracy("1,000", ["1000"] * n + ["x"] * (10 - n)) for n in range(6)] == (
        pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    )

    class Asked(Fixed):
        head_kind = heads.Answer()

        def answer(self, images, questions):
            return [list(said)[image[0, 0, 0]] for image in images]

    records = [dict(one, text="what?") for one in records_of([people] * 5)]
    for number, record in enumerate(records):
        record["image"] = np.full((4, 4, 3), number, np.uint8)
    written = dict(Answers("s").run(Asked(np.eye(7)), records))
    mean = np.mean([defined(form) for form in said.values()])
    assert written["answers/s/vqa_accuracy"] == pytest.approx(mean)
    assert written["answers/s/exact_match"] == 0.4 and written["answers/s/vqa_accuracy_count"] == 5
    chosen = Asked(np.eye(7, dtype=np.float32)[[0, 0, 1, 2, 3] * 2])
    answers = [[NAMES[0]] * 2 + [NAMES[1]] * 8] * 5
    records = [one | dict(labels=labels) for one, labels in zip(records, answers)]
    found = dict(Classification("s").run(chosen, records))
    assert found["classification/s/vqa_accuracy"] == pytest.approx((0.6 * 2 + 1) / 5)
    few = [record | dict(labels=record["labels"][:3]) for record in records]  # of three people
    assert "classification/s/vqa_accuracy" not in dict(Classification("s").run(chosen, few))


def test_questions_of_one_image_are_one_draw():
    """Six of each picture, all answered or none: no more is known than of one of each."""

    class Asked(Fixed):
        head_kind = heads.Answer()

        def answer(self, images, questions):
            return [NAMES[image[0, 0, 0] % 2] for image in images]

    labels = [["something else"], *[[NAMES[0]]] * 39]  # of one the head has no class
    once = [dict(one, text="what?") for one in records_of(labels)]
    for number, record in enumerate(once):
        record["image"] = np.full((4, 4, 3), number, np.uint8)
    often = [record for record in once for _ in range(6)]
    rows = np.eye(7, dtype=np.float32)[np.arange(40) % 2]
    for evaluator, name, count in (
        (Answers, "answers/s/exact_match", 240),
        (Classification, "classification/s/top1", 240),
        (Classification, "classification/s/nll", 234),
    ):
        few = dict(evaluator("s").run(Asked(rows), once))
        many = dict(evaluator("s").run(Asked(np.repeat(rows, 6, 0)), often))
        for end in ("", "_low", "_high"):
            assert many[name + end] == pytest.approx(few[name + end], rel=1e-12)
        assert many[f"{name}_count"] == count and few[f"{name}_high"] - few[f"{name}_low"] > 0.25


def blobs(count, spread=1.0):
    centres = np.random.default_rng(1).normal(size=(7, 12))
    rng = np.random.default_rng(count)
    classes = rng.integers(0, 7, count)
    features = centres[classes] + spread * rng.normal(size=(count, 12))
    return features.astype(np.float32), classes


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_logistic_regression_equals_scikit_learn(l2):
    features, classes = blobs(400)
    ours = linear.fit_linear(features, classes, 7, l2)
    # scikit-learn adds the squares to C times the sum of losses.
    theirs = LogisticRegression(C=1 / (l2 * len(features)), tol=1e-8, max_iter=2000)
    theirs.fit(features, classes)
    test, _ = blobs(200)
    logits = linear.linear_scores(test, ours)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, theirs.predict_proba(test), atol=2e-3)


def test_l2_is_chosen_on_the_held_out_part():
    features, classes = blobs(500, spread=2.0)
    noise = np.random.default_rng(4).normal(size=(500, 150))
    features = np.concatenate([features, noise], 1).astype(np.float32)
    l2, weights = linear.choose_l2(features, classes, 7, seed=3)
    order = np.random.default_rng(3).permutation(500)
    test, train = order[:50], order[50:]
    right = {}
    for one in linear.L2_SWEEP:
        theirs = LogisticRegression(C=1 / (one * len(train)), max_iter=3000)
        theirs.fit(features[train], classes[train])
        right[one] = theirs.score(features[test], classes[test])
    assert max(right.values()) - min(right.values()) > 0.05  # much noise wants a strong one
    assert right[l2] > max(right.values()) - 0.03
    whole = linear.fit_linear(features, classes, 7, l2)
    np.testing.assert_allclose(weights, whole, atol=1e-6)


def test_nearest_neighbours_equal_a_plain_vote():
    train, classes = blobs(90)
    test, _ = blobs(33)
    train[5] = train[6]  # duplicates
    found = linear.knn_scores(test, train, classes, 7, k=10, temperature=0.1, chunk=8)
    for row, feature in enumerate(test):
        cosine = train @ feature / np.linalg.norm(train, axis=1) / np.linalg.norm(feature)
        votes = np.zeros(7)
        for i in np.argsort(-cosine)[:10]:
            votes[classes[i]] += np.exp((cosine[i] - cosine.max()) / 0.1)
        np.testing.assert_allclose(found[row], votes, rtol=1e-4)
    few = linear.knn_scores(test, train[:3], classes[:3], 7, k=10)
    assert set(np.flatnonzero(few.sum(0))) == set(classes[:3])


def test_nearest_of_many_neighbours_are_found_in_bounded_memory(monkeypatch):
    """By fewer rows at a time: 1,024 rows of a million cosines would be 20 GB."""
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 4)).astype(np.float32) for n in (100_000, 120))
    classes = rng.integers(0, 7, len(train))
    monkeypatch.setattr(linear, "_AT_ONCE", 1 << 20)
    tracemalloc.start()
    found = linear.knn_scores(test, train, classes, 7)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 40 << 20  # those of all rows at once are 190 MB
    monkeypatch.setattr(linear, "_AT_ONCE", 1 << 10)  # a row at a time
    np.testing.assert_allclose(linear.knn_scores(test[:3], train, classes, 7), found[:3], rtol=1e-4)


@pytest.mark.parametrize("maker", [probes.LinearProbe, probes.NearestNeighbours])
def test_a_probe_learns_from_its_training_records(maker):
    kind = maker.kind

    class Mean:
        def features(self, images):
            return images.reshape(len(images), -1, 3).mean(1).astype(np.float32)

    def records(count):
        rng = np.random.default_rng(count)
        shades = rng.integers(0, 3, count)
        noise = rng.integers(0, 120, (count, 4, 4, 3))
        images = (noise + 130 * np.eye(3)[shades][:, None, None]).astype(np.uint8)
        return [dict(image=i, labels=[NAMES[s]], key="k") for i, s in zip(images, shades)]

    class Blind:
        features = None

    class Read(list):
        times = 0

        def __iter__(self):
            Read.times += 1
            return super().__iter__()

    cache = {}
    probe = maker("set", NAMES[:3], Read(records(200)), num_examples=3, cache=cache)
    probe_records = records(60)
    found = dict(probe.run(Mean(), probe_records))
    assert found[f"{kind}/set/top1"] == 1.0 and found[f"{kind}/set/num_train"] == 200
    assert len(probe.examples["items"]) == 3
    again = maker("set", NAMES[:3], probe.train, cache=cache)
    assert dict(again.run(Blind(), probe_records)) == found  # no image is encoded twice
    assert Read.times == 1  # or read twice
    stranger = [dict(image=np.zeros((4, 4, 3), np.uint8), labels=["new"], key="x")]
    with pytest.raises(ValueError, match="x: labels .'new'."):
        dict(maker("set", NAMES[:3], records(9)).run(Mean(), stranger))


def test_probes_of_other_records_do_not_share_features(tmp_path):
    """Of twelve pictures the half has a text that the candidates hold; the wrong labels are all
    outside of it."""
    for part in ("train", "test"):
        rows = []
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(12):
            known, shade = i % 2 == 1, i % 3
            noise = np.random.default_rng(i).integers(0, 50, (4, 4, 3))
            pixels = (noise + 200 * np.eye(3)[shade]).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / part / f"{i:02d}.png")
            label = NAMES[shade if known or part == "train" else (shade + 1) % 3]
            row = dict(file_name=f"{i:02d}.png", text=f"{known} of {part}", label=label)
            rows.append(json.dumps(row))
        (tmp_path / "data" / part / "metadata.jsonl").write_text("\n".join(rows))
    words = tmp_path / "words"
    words.mkdir()
    Image.new("RGB", (4, 4)).save(words / "a.png")
    (words / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "True of test"}\n')

    class Mean:
        def features(self, images):
            pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
            return np.stack(pixels).mean((1, 2)).astype(np.float32)

    setting = Setting(batch_size=8)
    data = dict(path=str(tmp_path / "data"), split="test", kind="label")
    task = dict(kind="knn", name="x", data=data)
    known = dict(task, known_only=True, candidates=dict(path=str(words)))
    for one, top1 in ((task, 0.5), (known, 1.0), (task, 0.5)):
        assert runner.run_task(Mean(), one, setting)["knn/x/top1"] == top1
    assert (
        runner.run_task(Mean(), dict(known, kind="linear_probe"), setting)[
            "linear_probe/x/num_examples"
        ]
        == 6
    )


@pytest.mark.parametrize(
    "recipe, head, rates",
    [
        ("imagenet_frozen", "classification", (5e-4, 0.0)),
        ("imagenet_finetune", "classification", (5e-4, 5e-4)),
        ("vqa", "answer", (5e-4, 2e-5)),
        ("snli_ve", "answer", (1e-3, 5e-5)),
        ("nlvr2", "pair", (5e-4, 2e-5)),
        ("coco_captions", "", (1e-5, -1.0)),
        ("fashion_mnist_frozen", "classification", (2e-3, 0.0)),
        ("fashion_mnist_finetune", "classification", (1e-3, 5e-4)),
        ("easy_vqa", "answer", (1.5e-3, -1.0)),
    ],
)
def test_recipes_are_sound(recipe, head, rates):
    config = importlib.import_module(f"coca_jax.recipes.{recipe}").get_config()
    typed(config).check()
    assert config.head.kind == head and config.optimizer.schedule == "cosine"
    found = config.optimizer.learning_rate, config.optimizer.encoder_learning_rate
    assert found == rates
