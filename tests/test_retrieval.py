"""Retrieval against the full matrix of scores, with repeated and several captions."""

import json
import math

import numpy as np
import pytest
from evaluator_cases import Fake, picture, unit

from coca_jax.evaluation.evaluators import base, retrieval, zero_shot
from coca_jax.evaluation.metrics.ranking import TIE, retrieval_ranks


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
    images = zero_shot.normalise(texts[owner] + 0.35 * rng.normal(size=(150, 16)))
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
    images = [zero_shot.normalise(text(s[0]) + 0.4 * rng.normal(size=12)) for s in captions]
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
    for item in items:  # the right text is among the best five, or follows them with its rank
        ranks = [text["rank"] for text in item["texts"]]
        assert ranks[:5] == [1, 2, 3, 4, 5] and any(text["correct"] for text in item["texts"])
        assert len(ranks) == 5 or ranks[5] > 5 and item["texts"][5]["text"] in item["truth"]
    json.dumps(evaluator.examples)


def _chance(scores):
    """{metric: its score by random guesses}"""
    ends = {k.rpartition("/")[2]: v for k, v in scores.items() if k.endswith("_chance")}
    return {k.removesuffix("_chance"): v for k, v in ends.items()}


def test_a_guesser_has_the_recall_that_random_embeddings_have():
    """Four captions of 32 pictures, one of which occurs twice, some with a caption of their own."""
    captions = [[f"shade {i % 4}"] + [f"own {i}"] * (i > 27) for i in range(32)] + [["shade 1"]]
    records = [dict(image=picture(i % 32), text=texts) for i, texts in enumerate(captions)]
    rng, sums, draws = np.random.default_rng(5), {}, 60
    for _ in range(draws):
        table = {text: unit(rng, 12) for texts in captions for text in texts}
        evaluator = retrieval.Retrieval("toy", num_examples=0)
        got = dict(evaluator.run(Fake(unit(rng, 32, 12), table.__getitem__), records))
        for metric in ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1"):
            sums[metric] = sums.get(metric, 0) + got[f"retrieval/toy/{metric}"] / draws
    found = _chance(got)
    assert found["mean_recall"] == pytest.approx(np.mean([found[k] for k in found if "_r" in k]))
    for metric, mean in sums.items():
        assert found[metric] == pytest.approx(mean, abs=0.03), metric
    # Of 37 captions 24 are of 8 pictures, 9 of 9 and 4 of one.
    assert found["text_to_image_r1"] == pytest.approx((24 * 8 + 9 * 9 + 4) / 37 / 32)
    assert found["image_to_text_r10"] == 1  # eight different captions in all
    further = retrieval.Retrieval("toy", num_examples=0, extra_texts=["nobody", "shade 0"])
    table["nobody"] = unit(rng, 12)
    more = _chance(dict(further.run(Fake(unit(rng, 32, 12), table.__getitem__), records)))
    assert more["image_to_text_r1"] == pytest.approx(found["image_to_text_r1"] * 8 / 9)


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
    low = 0.025 ** (1 / 2)  # two of two images were right
    for score in ("mean_recall", "image_to_text_r1", "text_to_image_r5"):
        assert got[f"retrieval/toy/{score}"] == 1 == got[f"retrieval/toy/{score}_high"]
        assert got[f"retrieval/toy/{score}_low"] == pytest.approx(low)
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


def test_retrieval_intervals_draw_images_with_all_their_captions():
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


def test_intervals_are_the_same_with_a_record_a_caption():
    """Lists often have a row a caption, five of a picture: these are no five pictures."""
    rng = np.random.default_rng(7)
    images, texts = unit(rng, 60, 8), [[f"{i} {c}" for c in range(5)] for i in range(60)]
    table = {t: images[i] + 0.3 * rng.normal(size=8) for i, own in enumerate(texts) for t in own}
    model = Fake(images, lambda t: zero_shot.normalise(table[t]))
    whole = [dict(image=picture(i), text=own) for i, own in enumerate(texts)]
    rows = [dict(one, text=[text]) for one in whole for text in one["text"]]
    of_whole, of_rows = (dict(retrieval.Retrieval("x").run(model, r)) for r in (whole, rows))
    for name in ("text_to_image_r1", "image_to_text_r1", "text_to_image_median_rank"):
        for end in ("", "_low", "_high"):
            key = f"retrieval/x/{name}{end}"
            assert of_rows[key] == pytest.approx(of_whole[key]), key
    assert 0.5 < of_whole["retrieval/x/text_to_image_r1"] < 0.99
    assert of_rows["retrieval/x/image_to_text_r1_count"] == 300


def test_retrieval_of_one_record_and_of_none():
    model = Fake(np.eye(2, dtype=np.float32), lambda t: np.eye(2)[0])
    got = dict(retrieval.Retrieval("toy").run(model, [dict(image=picture(0), text="x")]))
    assert got["retrieval/toy/image_to_text_r10"] == 1 == got["retrieval/toy/text_to_image_r1"]
    with pytest.raises(ValueError, match="no record"):
        list(retrieval.Retrieval("toy").run(model, []))
    with pytest.raises(ValueError, match="record k: no text"):
        list(retrieval.Retrieval("toy").run(model, [dict(image=picture(0), text=None, key="k")]))


@pytest.mark.parametrize("batch_size", [5, 64])
def test_reranked_queries_are_ordered_by_similarity_and_captioner_together(batch_size):
    """Against the full matrices: the shortlist by cosine, then 10 times cosine + log p."""
    rng = np.random.default_rng(7)
    embeddings, captioner = unit(rng, 30, 8), rng.normal(scale=2, size=(24, 30))
    images = zero_shot.normalise(embeddings[:24] + 0.5 * rng.normal(size=(24, 8)))
    images = images.astype(np.float32)
    model = Fake(images, lambda t: embeddings[int(t)])
    model.score = lambda pixels, texts: np.asarray(
        [[captioner[p[0, 0, 0], int(t)] for t in texts] for p in pixels], np.float32
    )
    # Two records of one image, two images of one text, and six texts of no image.
    numbers = [*range(24), 3]
    texts = [str(i) for i in range(23)] + ["22", "9"]
    records = [dict(image=picture(n), text=t) for n, t in zip(numbers, texts)]
    extra = [str(t) for t in range(23, 30)]
    evaluator = retrieval.Retrieval("toy", rerank=4, extra_texts=extra, batch_size=batch_size)
    got = dict(evaluator.run(model, iter(records)))

    similarity = images @ embeddings.T
    match = np.zeros((24, 30), bool)
    match[numbers, [int(t) for t in texts]] = True
    both = 10 * similarity + captioner

    def ranks(similarity, both, match):
        order = np.argsort(-similarity, 1)
        found = []
        for i, row in enumerate(order):
            first = sorted(row[:4], key=lambda t: -both[i, t])
            found.append(int(match[i, [*first, *row[4:]]].argmax()))
        return np.asarray(found)

    by_image = ranks(similarity, both, match)[numbers]
    by_text = ranks(similarity.T, both.T, match.T)[[int(t) for t in texts]]
    for name, places in (("image_to_text", by_image), ("text_to_image", by_text)):
        for k in (1, 5, 10):
            assert got[f"retrieval/toy/reranked_{name}_r{k}"] == pytest.approx(np.mean(places < k))
        assert got[f"retrieval/toy/reranked_{name}_median_rank"] == np.median(places) + 1
    assert got["retrieval/toy/reranked_image_to_text_r1"] != got["retrieval/toy/image_to_text_r1"]
    plain = dict(retrieval.Retrieval("toy", extra_texts=extra).run(model, records))
    assert plain.items() < got.items() and not any("reranked" in name for name in plain)


def test_a_captioner_that_is_sure_puts_what_is_on_the_shortlist_first():
    rng = np.random.default_rng(8)
    texts = unit(rng, 40, 6)
    images = zero_shot.normalise(texts + rng.normal(size=texts.shape)).astype(np.float32)
    model = Fake(images, lambda t: texts[int(t)])
    model.score = lambda pixels, names: np.asarray(
        [[0.0 if p[0, 0, 0] == int(t) else -1e3 for t in names] for p in pixels], np.float32
    )
    records = [dict(image=picture(i), text=str(i)) for i in range(40)]
    got = dict(retrieval.Retrieval("toy", rerank=10).run(model, records))
    for name in ("image_to_text", "text_to_image"):
        first, ten = (got[f"retrieval/toy/{name}_r{k}"] for k in (1, 10))
        assert first < ten < 1 and got[f"retrieval/toy/reranked_{name}_r1"] == ten


def test_likelihoods_that_are_no_numbers_are_no_perfect_ranks():
    """No score is less than NaN: without the check every rank would be the first."""
    rng = np.random.default_rng(9)
    texts = unit(rng, 6, 4)
    model = Fake(texts[::-1], lambda t: texts[int(t)])
    model.score = lambda pixels, names: np.full((len(pixels), len(names)), np.nan, np.float32)
    records = [dict(image=picture(i), text=str(i)) for i in range(6)]
    says = "caption likelihoods of retrieval/toy: 6 of 6 are not finite"
    with pytest.raises(ValueError, match=says):
        dict(retrieval.Retrieval("toy", rerank=3).run(model, records))


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "ten"])
def test_what_cannot_be_a_number_of_candidates_is_refused(wrong):
    task = dict(kind="retrieval", name="toy", data=dict(builtin="scenes"), rerank=wrong)
    with pytest.raises(ValueError, match=f"rerank={wrong!r}.*whole number"):
        retrieval.Retrieval.check_task(task)


def test_a_model_without_a_captioner_cannot_rerank():
    has = dict(encode_image=None, encode_text=None, writes_captions=False)
    towers = type("Towers", (), has)()
    retrieval.Retrieval.check_model(towers, dict(kind="retrieval"))
    with pytest.raises(ValueError, match="rerank=16 needs a captioner"):
        retrieval.Retrieval.check_model(towers, dict(kind="retrieval", rerank=16))
    for kind in ("captioning", "generative"):  # not by the names of the methods that are missing
        with pytest.raises(ValueError, match=f"^task {kind!r}: this model has no decoder.$"):
            base.get(kind).check_model(towers, dict(kind=kind))


def test_a_reranked_tie_counts_against_the_model():
    """Sums of log probabilities near -20 differ by some 1e-6 for no reason."""
    lists = np.array([[0, 1], [0, 1], [1, 2]])
    scores = np.array([[-20.0, -20.00005], [-20.0, -20.001], [0.0, -1.0]], np.float32)
    found = retrieval.reranked(np.array([0, 0, 7]), lists, scores, [{0}, {0}, {5}])
    np.testing.assert_array_equal(found, [1, 0, 7])
