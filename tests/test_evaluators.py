"""Evaluators against plain numpy ranking, hand-made figures and degenerate models."""

import base64
import json
import math

import numpy as np
import pytest

from coca_jax import evaluators
from coca_jax.data import scenes
from coca_jax.evaluators import (
    captioning,
    classification,
    intervals,
    results,
    retrieval,
    zeroshot,
)
from coca_jax.evaluators.ranks import TIE, retrieval_ranks
from coca_jax.inference.explain import Explanation, Word


class Fake:
    """A model whose embeddings and captions are given; an image holds its number in one pixel."""

    def __init__(self, image=None, text=None, captions=None):
        self.image, self.text, self.captions = image, text, captions
        self.largest = 0
        self.asked = set()  # whether texts were class names in prompts

    def encode_image(self, images):
        assert images.dtype == np.uint8 and images.ndim == 4
        self.largest = max(self.largest, len(images))
        return self.image[images[:, 0, 0].astype(int) @ [1, 256, 0]]

    def encode_text(self, texts, *, labels=False):
        self.asked.add(labels)
        return np.stack([self.text(t) for t in texts]).astype(np.float32)

    def caption(self, images, **how):
        return [self.captions[i] for i in images[:, 0, 0, 0]]

    def score(self, images, texts, *, labels=False):
        self.asked.add(labels)
        numbers = images[:, 0, 0].astype(int) @ [1, 256, 0]
        return np.asarray([[self.text(t)[i] for t in texts] for i in numbers], np.float32)

    def num_tokens(self, texts, *, labels=False):
        self.asked.add(labels)
        return np.asarray([len(t) + 1 for t in texts])

    def caption_log_likelihood(self, images, texts):
        tokens = np.asarray([len(t.split()) + 1 for t in texts])
        return -0.5 * tokens, tokens


def picture(number):
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0, 0], image[0, 0, 1] = number % 256, number // 256
    return image


def unit(rng, *shape):
    return zeroshot.normalise(rng.normal(size=shape)).astype(np.float32)


# ---- Zero-shot


def test_class_embedding_is_the_renormalised_mean_of_prompts():
    rng = np.random.default_rng(0)
    table = {}

    def text(t):
        return table.setdefault(t, rng.normal(size=8) * rng.uniform(1, 5))

    prompts = ("a photo of a {}", "{} drawing", "{}")
    got = zeroshot.class_embeddings(Fake(text=text), ["cat", "dog"], prompts, batch_size=2)
    mean = sum(v / np.linalg.norm(v) for v in (table["a photo of a dog"], table["dog drawing"]))
    mean = mean + table["dog"] / np.linalg.norm(table["dog"])
    np.testing.assert_allclose(got[1], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(zeroshot.normalise(np.zeros((1, 3))), np.zeros((1, 3)))


def test_zeroshot_equals_numpy_ranking():
    rng = np.random.default_rng(1)
    names = [f"c{i}" for i in range(12)]
    table = {n: unit(rng, 6) for n in names}
    images = unit(rng, 300, 6)
    truth = rng.integers(0, 12, 300)
    records = [dict(image=picture(i), labels=[names[truth[i]], "other"]) for i in range(300)]
    evaluator = zeroshot.ZeroShot("toy", names, ("{}",), batch_size=64)
    model = Fake(images, lambda t: table[t])
    got = dict(evaluator.run(model, records))
    assert model.largest == 64 and model.asked == {True}
    for size in (1e-7, 30):  # the length of an embedding does not count
        other = Fake(np.float32(size) * images, lambda t: table[t])
        assert dict(evaluator.run(other, records)) == got
    order = np.argsort(-(images @ np.stack([table[n] for n in names]).T), axis=1)
    top1 = (order[:, 0] == truth).mean()
    assert got["zeroshot/toy/top1"] == pytest.approx(top1)
    assert got["zeroshot/toy/top5"] == pytest.approx((order[:, :5] == truth[:, None]).any(1).mean())
    assert got["zeroshot/toy/top1_count"] == 300
    assert got["zeroshot/toy/top1_low"] < top1 < got["zeroshot/toy/top1_high"]
    per_class = [(order[truth == c, 0] == c).mean() for c in range(12)]
    assert got["zeroshot/toy/mean_per_class"] == pytest.approx(np.mean(per_class))
    confusion = np.asarray(evaluator.examples["confusion"]["counts"])
    assert confusion.sum() == 300 and np.trace(confusion) == round(top1 * 300)
    assert evaluator.examples["per_class"]["c3"]["accuracy"] == pytest.approx(per_class[3])
    assert len(evaluator.examples["items"]) == 16
    json.dumps(evaluator.examples)


def test_zeroshot_any_of_several_labels_is_right_and_constant_models_score_zero():
    eye = np.eye(3, dtype=np.float32)
    names = ["a", "b", "c"]
    records = [dict(image=picture(1), labels=["a", "b"]), dict(image=picture(2), labels=["a"])]
    evaluator = zeroshot.ZeroShot("toy", names, ("{}",))
    got = dict(evaluator.run(Fake(eye, lambda t: eye[names.index(t)]), records))
    assert got["zeroshot/toy/top1"] == 0.5 and "zeroshot/toy/top5" not in got
    assert evaluator.examples["confusion"]["counts"] == [[1, 1]]
    constant = Fake(np.ones((3, 3), np.float32), lambda t: np.ones(3))
    assert dict(evaluator.run(constant, records))["zeroshot/toy/top1"] == 0


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
    tally = classification.Tally("zeroshot/x", names, [f"label {i}" for i in range(12)])
    for start in range(0, 400, 150):  # the last part is smaller
        tally.add(scores[start : start + 150], records[start : start + 150])
    got = dict(tally.results())
    against = scores - 1e-3 * (np.arange(12) == truth[:, None])  # ties go to the wrong class
    for k, name in ((1, "top1"), (5, "top5")):
        expected = sklearn.top_k_accuracy_score(truth, against, k=k, labels=range(12))
        assert got[f"zeroshot/x/{name}"] == pytest.approx(expected)
        assert got[f"zeroshot/x/{name}_count"] == 400
    guess = against.argmax(1)
    seen = np.unique(truth)
    recall = sklearn.recall_score(truth, guess, labels=seen, average=None)
    assert got["zeroshot/x/mean_per_class"] == pytest.approx(recall.mean())
    low, high = (got[f"zeroshot/x/mean_per_class_{end}"] for end in ("low", "high"))
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
    evaluator = zeroshot.Generative("toy", names, prompts, batch_size=128)
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
    evaluator = zeroshot.Generative("toy", names, ("{}",))
    assert dict(evaluator.run(Fake(text=lambda t: right[t]), records))["generative/toy/top1"] == 0
    right["b"][3] = -np.inf
    with pytest.raises(ValueError, match="caption likelihoods of generative/toy are not finite"):
        dict(evaluator.run(Fake(text=lambda t: right[t]), records))


def test_zeroshot_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="3 names, 2 distinct"):
        zeroshot.ZeroShot("toy", ["a", "b", "a"])
    with pytest.raises(ValueError, match="1 names, 1 distinct; give two or more"):
        zeroshot.ZeroShot("toy", ["a"])
    with pytest.raises(ValueError, match="1 distinct labels for 2 class_names"):
        zeroshot.ZeroShot("toy", ["a", "b"], labels=["x", "x"])
    evaluator = zeroshot.ZeroShot("toy", ["a", "b"], ("{}",))
    model = Fake(np.eye(2, dtype=np.float32), lambda t: np.eye(2)[0])
    with pytest.raises(ValueError, match=r"labels of x.png are \['z'\]; none is among the 2"):
        list(evaluator.run(model, [dict(image=picture(0), labels=["z"], key="x.png")]))
    with pytest.raises(ValueError, match="has no record"):
        list(evaluator.run(model, []))
    model.image = np.full((2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="image embeddings: 1 of 1 are not finite"):
        list(evaluator.run(model, [dict(image=picture(0), labels=["a"])]))
    with pytest.raises(ValueError, match="preprocess to one size"):
        evaluators.stack_images([dict(image=picture(0)), dict(image=np.zeros((2, 2, 3)))])


def plain_ranks(images, texts, pairs):
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    match = np.zeros(scores.shape, bool)
    match[pairs[:, 0], pairs[:, 1]] = True
    both = []
    for s, r in ((scores, match), (scores.T, match.T)):
        best = np.where(r, s, -np.inf).max(1, keepdims=True)
        ranks = ((s >= best - TIE) & ~r).sum(1)
        both.append(np.where(r.any(1), ranks, -1))
    return both


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_retrieval_ranks_equal_the_full_matrix_in_any_tiling(chunk):
    rng = np.random.default_rng(2)
    texts = unit(rng, 83, 16)
    owner = rng.integers(0, 80, 150)  # the last texts have no image
    images = zeroshot.normalise(texts[owner] + 0.35 * rng.normal(size=(150, 16)))
    images = images.astype(np.float32)
    extra = np.stack([rng.integers(0, 150, 60), rng.integers(0, 80, 60)], 1)
    pairs = np.concatenate([np.stack([np.arange(150), owner], 1), extra])
    got = retrieval_ranks(images, texts, pairs, chunk=chunk)
    for ranks, expected in zip(got, plain_ranks(images, texts, pairs)):
        np.testing.assert_array_equal(ranks, expected)
    assert (got[1][80:] == -1).all() and got[0].max() > 3


@pytest.mark.parametrize("chunk", [3, 100])
def test_ties_count_against_the_model(chunk):
    images = np.tile(np.eye(4, dtype=np.float32)[:1], (10, 1))
    pairs = np.stack([np.arange(10), np.arange(10)], 1)
    by_image, by_text = retrieval_ranks(images, images.copy(), pairs, chunk=chunk)
    assert (by_image == 9).all() and (by_text == 9).all()  # all equal: the match comes last


def test_retrieval_end_to_end_with_repeated_and_several_captions():
    rng = np.random.default_rng(3)
    table = {}

    def text(t):
        return table.setdefault(t, unit(rng, 12))

    captions = [[f"caption {i}", f"other {i}"] for i in range(40)] + [["twice"], ["twice"]]
    for several in captions:
        for t in several:
            text(t)
    images = [zeroshot.normalise(text(s[0]) + 0.4 * rng.normal(size=12)) for s in captions]
    images = np.stack(images).astype(np.float32)
    records = [dict(image=picture(i), text=s) for i, s in enumerate(captions)]
    evaluator = retrieval.Retrieval("toy", extra_texts=["nobody", "twice"], batch_size=16, chunk=9)
    got = dict(evaluator.run(Fake(images, text), records))

    texts = list(dict.fromkeys(t for s in captions for t in s)) + ["nobody"]
    scores = images @ np.stack([text(t) for t in texts]).T
    order = np.argsort(-scores, 1)
    hits = [texts[order[i, 0]] in s for i, s in enumerate(captions)]
    assert got["retrieval/toy/image_to_text_r1"] == pytest.approx(np.mean(hits))
    hits5 = [any(texts[t] in s for t in order[i, :5]) for i, s in enumerate(captions)]
    assert got["retrieval/toy/image_to_text_r5"] == pytest.approx(np.mean(hits5))
    queries = [t for s in captions for t in s]
    found = [np.argmax(scores[:, texts.index(t)]) for t in queries]
    back = [t in captions[i] for t, i in zip(queries, found)]
    assert got["retrieval/toy/text_to_image_r1"] == pytest.approx(np.mean(back))
    assert got["retrieval/toy/text_to_image_r1_count"] == 82
    assert got["retrieval/toy/num_texts"] == 82 and got["retrieval/toy/num_images"] == 42
    recalls = [
        got[f"retrieval/toy/{d}_r{k}"]
        for d in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    ]
    assert got["retrieval/toy/mean_recall"] == pytest.approx(np.mean(recalls))
    assert 0 < np.mean(hits) < 1
    items = evaluator.examples["items"]
    assert len(items) == 8 and items[0]["texts"][0]["text"] == texts[order[0, 0]]
    found = [text for item in items for text in item["texts"]]
    truths = [item["truth"] for item in items for _ in item["texts"]]
    assert [text["correct"] for text in found] == [t["text"] in s for t, s in zip(found, truths)]
    assert 0 < sum(text["correct"] for text in found) < len(found)
    twice = evaluator.examples["text_items"][-1]
    assert twice["text"] == "twice" and len(twice["images"]) == 5
    json.dumps(evaluator.examples)


def test_equal_images_are_one_candidate():
    """A, A again with another caption, and B. A's captions are found although A occurs twice."""
    eye = np.eye(3, dtype=np.float32)
    table = {"a": eye[0], "also a": eye[0], "b": eye[1]}
    model = Fake(eye, lambda t: table[t])
    texts = ["a", "also a", "b"]
    records = [dict(image=picture(n), text=t) for n, t in zip((0, 0, 1), texts)]
    got = dict(retrieval.Retrieval("toy").run(model, records))
    assert got["retrieval/toy/num_images"] == 2 and got["retrieval/toy/num_texts"] == 3
    assert got["retrieval/toy/image_to_text_r1_count"] == 3
    assert got["retrieval/toy/mean_recall"] == 1 == got["retrieval/toy/mean_recall_low"]
    # Other pixels with the same embedding are two candidates, and the tie counts as wrong.
    model.image = eye[[0, 0, 1]]
    records = [dict(image=picture(n), text=t) for n, t in zip((0, 1, 2), texts)]
    got = dict(retrieval.Retrieval("toy").run(model, records))
    assert got["retrieval/toy/text_to_image_r1"] == pytest.approx(1 / 3)
    assert got["retrieval/toy/text_to_image_r5"] == 1
    # Each record is a query: three of one image that finds another text, one that is right.
    eye = np.eye(4, dtype=np.float32)
    table = {"a": eye[1], "also a": eye[1], "too": eye[1], "b": eye[2], "x": eye[0]}
    model = Fake(eye[[0, 2]], lambda t: table[t])
    records = [dict(image=picture(n), text=t) for n, t in zip((0, 0, 0, 1), table)]
    got = dict(retrieval.Retrieval("toy", extra_texts=["x"]).run(model, records))
    assert got["retrieval/toy/image_to_text_r1"] == 1 / 4
    # Behind x, and behind b, which is no nearer than the right ones: rank 3 of a's, 1 of b's.
    assert got["retrieval/toy/image_to_text_median_rank"] == 3
    model.image = np.full((2, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match="image embeddings: 2 of 2 are not finite"):
        dict(retrieval.Retrieval("toy").run(model, records))


def test_retrieval_intervals_draw_records_with_all_their_captions():
    """Five captions that always share their fate are no more evidence than one."""
    rng = np.random.default_rng(7)
    found = rng.random(200) < 0.5
    images = unit(rng, 200, 16)
    wrong = unit(rng, 200, 16)
    table = {f"{i} {c}": images[i] if found[i] else wrong[i] for i in range(200) for c in range(5)}
    records = [dict(image=picture(i), text=[f"{i} {c}" for c in range(5)]) for i in range(200)]
    got = dict(retrieval.Retrieval("toy").run(Fake(images, lambda t: table[t]), records))
    share = got["retrieval/toy/text_to_image_r1"]
    assert share == pytest.approx(found.mean(), abs=0.03)
    half = 1.96 * math.sqrt(share * (1 - share) / 200)
    width = got["retrieval/toy/text_to_image_r1_high"] - got["retrieval/toy/text_to_image_r1_low"]
    assert width / 2 == pytest.approx(half, rel=0.15)
    assert got["retrieval/toy/text_to_image_r1_count"] == 1000
    assert got["retrieval/toy/mean_recall_count"] == 1200
    low, high = (got[f"retrieval/toy/image_to_text_median_rank_{e}"] for e in ("low", "high"))
    assert low <= got["retrieval/toy/image_to_text_median_rank"] <= high


def test_retrieval_of_one_record_and_of_none():
    model = Fake(np.eye(2, dtype=np.float32), lambda t: np.eye(2)[0])
    got = dict(retrieval.Retrieval("toy").run(model, [dict(image=picture(0), text="x")]))
    assert got["retrieval/toy/image_to_text_r10"] == 1 == got["retrieval/toy/text_to_image_r1"]
    with pytest.raises(ValueError, match="no record"):
        list(retrieval.Retrieval("toy").run(model, []))
    with pytest.raises(ValueError, match="record k has no text"):
        list(retrieval.Retrieval("toy").run(model, [dict(image=picture(0), text=None, key="k")]))


# ---- Captioning


def test_captioning_of_scenes_scores_attributes_and_perplexity():
    records = scenes.Scenes("heldout", objects=(1,)).read(np.arange(20))
    captions = [scenes.canonical_caption(r["scene"]) for r in records]
    for i in (3, 8):
        captions[i] = "a large purple hexagon"
    for i, record in enumerate(records):
        record["image"] = picture(i)
    evaluator = captioning.Captioning("s", scorer=captioning.score_scene, batch_size=6)
    got = dict(evaluator.run(Fake(captions=captions), records))
    assert got["captioning/s/exact_match"] == pytest.approx(0.9)
    assert got["captioning/s/attribute_f1"] == pytest.approx(0.9, abs=0.03)
    assert got["captioning/s/perplexity"] == pytest.approx(math.exp(0.5))
    assert got["captioning/s/perplexity_low"] == pytest.approx(math.exp(0.5))
    assert got["captioning/s/exact_match_count"] == 20 == got["captioning/s/perplexity_count"]
    assert evaluator.examples["items"][3]["exact"] is False


def test_captions_of_the_report_have_their_words_where_asked():
    seen = np.array([[0.5, 0.25], [0.25, 0.0]], np.float32)

    class Looks(Fake):
        resize, image_size = "crop", 4

        def explain(self, images, texts):
            assert [np.asarray(image).shape for image in images] == [(4, 4, 3)] * len(texts)
            words = [[Word(w, math.log(0.5), [], seen) for w in [*t.split(), ""]] for t in texts]
            return [Explanation(row, seen) for row in words]

    records = [dict(image=picture(i), text="a cat") for i in range(3)]
    for wanted in (True, False):
        evaluator = captioning.Captioning("s", attention=wanted)
        list(evaluator.run(Looks(captions=["a cat", "a dog", "a cat"]), records))
        json.dumps(evaluator.examples)  # nothing but what the report shows
        items = evaluator.examples["items"] + evaluator.examples["worst"]
        assert len(items) == 4 and all(("words" in item) == wanted for item in items)
        if wanted:
            assert [word["text"] for word in items[1]["words"]] == ["a", "dog", "end"]
            word = items[1]["words"][0]
            assert word["probability"] == pytest.approx(0.5) and items[1]["fit"] == "crop"
            assert list(base64.b64decode(word["map"])) == [255, 128, 128, 0]


def test_captioning_with_several_references():
    records = [
        dict(image=picture(0), text=["A dog, running.", "a brown dog"]),
        dict(image=picture(1), text="two cats"),
    ]
    evaluator = captioning.Captioning("d")
    got = dict(evaluator.run(Fake(captions=["a dog  running", "two dogs"]), records))
    assert got["captioning/d/exact_match"] == 0.5
    assert got["captioning/d/word_f1"] == pytest.approx(0.75)
    assert got["captioning/d/perplexity_count"] == 3
    assert "perplexity" not in "".join(
        dict(captioning.Captioning("d", perplexity=False).run(Fake(captions=["x", "y"]), records))
    )


def test_captions_so_far_are_kept_and_the_result_is_the_same(tmp_path):
    captions = [f"caption {i % 7}" for i in range(20)]
    records = [dict(image=picture(i), text=[f"caption {i}", ""], key=i) for i in range(20)]

    class Killed(Fake):
        made = 0

        def caption(self, images, **how):
            assert how == {"num_beams": 2}
            if self.made >= self.stop:
                raise KeyboardInterrupt
            self.made += len(images)
            return super().caption(images)

    def run(model, request, data=records):
        outputs = captioning.Outputs(tmp_path / "o.jsonl", request, write=True)
        evaluator = captioning.Captioning("x", batch_size=6, outputs=outputs, how=dict(num_beams=2))
        return dict(evaluator.run(model, data))

    model = Killed(captions=captions)
    model.stop = 12
    with pytest.raises(KeyboardInterrupt):
        run(model, dict(weights="1"))
    path = tmp_path / "o.jsonl"
    assert len(path.read_text().splitlines()) == 13
    path.write_text(path.read_text()[:-5])  # killed within a line
    model.made, model.stop = 0, 100
    whole = run(model, dict(weights="1"))
    assert model.made == 9  # the cut line and the eight that were missing
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["caption"] for line in lines[1:]] == captions
    plain = dict(captioning.Captioning("x", batch_size=6).run(Fake(captions=captions), records))
    assert whole == plain and whole["captioning/x/perplexity_count"] == 40
    for request, data, again in (
        (dict(weights="1"), records, 0),
        (dict(weights="2"), records, 20),
        (dict(weights="2"), [dict(r, key=r["key"] + (i > 4)) for i, r in enumerate(records)], 15),
    ):
        model.made = 0
        run(model, request, data)
        assert model.made == again


# ---- Intervals and files


def test_intervals_of_other_figures_agree_with_theory():
    rng = np.random.default_rng(8)
    totals, hits = np.asarray([400, 100]), np.asarray([200, 90])
    low, high = intervals.limits(intervals.mean_of_classes(hits, totals))
    half = 1.96 * 0.5 * math.sqrt(0.25 / 400 + 0.09 / 100)
    assert low == pytest.approx(0.7 - half, abs=0.01) and high == pytest.approx(
        0.7 + half, abs=0.01
    )
    covered = 0
    for _ in range(200):
        low, high = intervals.median_limits(rng.exponential(size=101))
        covered += low <= math.log(2) <= high
    assert 180 <= covered <= 199
    assert intervals.median_limits(np.asarray([2.0, 1.0])) == (1, 2)  # few values: all of them
    assert intervals.median_limits(np.asarray([5.0])) == (5, 5)
    sums = intervals.resampled_sums(np.ones((7, 2)), resamples=130)
    assert sums.shape == (130, 2) and (sums == 7).all()


def test_bootstrap_agrees_with_theory_and_is_deterministic():
    rng = np.random.default_rng(4)
    for n in (400, 20_000):
        hits = rng.uniform(size=n) < 0.7
        mean, low, high = intervals.bootstrap(hits)
        assert mean == pytest.approx(hits.mean())
        half = 1.96 * math.sqrt(mean * (1 - mean) / n)
        assert high - mean == pytest.approx(half, rel=0.15)
        assert mean - low == pytest.approx(half, rel=0.15)
        assert intervals.bootstrap(hits) == (mean, low, high)
    _, low, high = intervals.bootstrap(np.sort(hits))  # neighbours alike: blocks are drawn
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert intervals.bootstrap(np.ones(5)) == (1, 1, 1)
    assert intervals.bootstrap(np.asarray([1.0, 6.0]), np.asarray([1.0, 2.0]))[0] == 7 / 3
    with pytest.raises(ValueError, match="0 examples"):
        intervals.bootstrap(np.zeros(0))
    with pytest.raises(ValueError, match="3 examples with weights of sum 0.0"):
        intervals.bootstrap(np.ones(3), np.zeros(3))
    samples = np.append(np.linspace(0, 1, 1001), [np.nan] * 50)  # resamples of no example
    assert intervals.limits(samples) == pytest.approx((0.025, 0.975))


@pytest.mark.parametrize("length", [0, 1, 5, 8, 9, 1000])
def test_shown_items_are_spread(length):
    spread, made = results.Spread(8), []
    for i in range(length):
        spread.offer(lambda i=i: made.append(i) or i)
    items = spread.items()
    assert len(items) == min(8, length) and items == sorted(set(items))
    assert len(made) < 80
    if length == 1000:
        assert items[0] == 0 and items[-1] > 850 and max(np.diff(items)) < 200


def test_the_worst_are_kept_whatever_their_place():
    rng = np.random.default_rng(0)
    badness = np.round(rng.normal(size=500), 1)  # with ties
    worst, made = results.Worst(6), []
    for number, value in enumerate(badness.tolist()):
        worst.offer(value, lambda number=number: made.append(number) or number)
    order = sorted(range(500), key=lambda i: (-badness[i], i))  # of equal ones the first
    assert worst.items() == order[:6] and len(made) < 80
    none = results.Worst(0)
    none.offer(1.0, lambda: pytest.fail("made"))
    assert none.items() == []


def test_results_are_merged(tmp_path):
    results.save_results(tmp_path, {"zeroshot/a/top1": 0.5, "b": float("nan")})
    results.save_results(tmp_path, {"zeroshot/a/top1": np.float32(0.75), "c": 1})
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert saved == {"zeroshot/a/top1": 0.75, "b": None, "c": 1}
    results.save_examples(tmp_path, "zeroshot/a", dict(kind="zeroshot"))
    results.save_examples(tmp_path, "retrieval/a", dict(kind="retrieval"))
    assert list(json.loads((tmp_path / "eval_examples.json").read_text())) == [
        *("zeroshot/a", "retrieval/a")
    ]
    big = np.zeros((300, 200, 3), np.uint8)
    assert results.thumbnail(big).shape == (96, 64, 3)


def test_the_table_for_people_has_a_line_a_score_with_its_interval_and_count():
    scores = {"a/b/r1": 0.5, "a/b/r1_low": 0.4, "a/b/r1_high": 0.6, "a/b/r1_count": 1200.0}
    lines = results.table(scores | {"a/b/num_examples": 1200.0})
    assert [line.split() for line in lines] == [
        ["a/b/r1", "0.5000", "[0.4000,", "0.6000]", "of", "1,200"],
        ["a/b/num_examples", "1200.0000"],
    ]
