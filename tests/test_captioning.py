"""Scores of captions: hand-made figures, several references, captions kept over a kill."""

import base64
import json
import math

import numpy as np
import pytest
from evaluator_cases import Fake, picture

from coca_jax.data import scenes, synthetic_source
from coca_jax.evaluation.evaluators import caption_match, captioning, collapse
from coca_jax.evaluation.evaluators.base import Writing
from coca_jax.inference.explain import Explanation, Word


def test_captioning_of_scenes_scores_attributes_and_perplexity():
    records = synthetic_source.Scenes("heldout", objects=(1,)).read(np.arange(20))
    captions = [scenes.canonical_caption(r["scene"]) for r in records]
    for i in (3, 8):
        captions[i] = "a large purple hexagon"
    for i, record in enumerate(records):
        record["image"] = picture(i)
    evaluator = captioning.Captioning("s", scorer=caption_match.score_scene, batch_size=6)
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


def test_the_same_caption_of_one_image_is_no_collapse():
    """A list with a row a caption, five of each picture: of 200 captions a fifth are distinct."""
    said = [f"number {min(i, 38)} of what there is" for i in range(40)]
    rows = [dict(image=picture(i), text=f"{c} of {i}") for i in range(40) for c in range(5)]
    evaluator = captioning.Captioning("s", perplexity=False)
    got = dict(evaluator.run(Fake(captions=said), rows))
    assert got["captioning/s/distinct"] == pytest.approx(39 / 40) and not evaluator.warning
    assert got["captioning/s/distinct_count"] == 40 and got["captioning/s/bleu4_count"] == 200
    assert got["captioning/s/self_bleu"] == pytest.approx(collapse.self_bleu(said).mean())


def test_captions_that_begin_with_the_same_words_are_a_collapse(caplog):
    """270 of 500 captions began with "a photo of", and none of the references: each caption was
    another one, so `distinct` did not show it."""
    said = [f"a photo of thing {i}" if i < 27 else f"number {i} of all" for i in range(50)]
    own = [f"what is here is {i % 10}" for i in range(50)]

    def scored(references):
        rows = [dict(image=picture(i), text=text) for i, text in enumerate(references)]
        evaluator = captioning.Captioning("s", perplexity=False)
        return dict(evaluator.run(Fake(captions=said), rows)), evaluator

    got, evaluator = scored(own)
    assert got["captioning/s/same_start"] == pytest.approx(0.54)
    assert got["captioning/s/same_start_low"] < 0.54 < got["captioning/s/same_start_high"]
    assert got["captioning/s/same_start_references"] == 0 and got["captioning/s/distinct"] == 1
    for fact in ("54% of 50 captions", "'a photo of'"):
        assert fact in evaluator.warning and fact in caplog.text
        assert fact in evaluator.examples["notes"][0]
    # The most common of ten references is right for each tenth, and shares four of five words.
    assert got["captioning/s/exact_match_majority"] == pytest.approx(0.1)
    assert got["captioning/s/word_f1_majority"] == pytest.approx(0.1 + 0.9 * 0.8)
    # Where people's captions begin alike too, the model is right to do so.
    got, evaluator = scored(["A photo of a cat"] * 25 + own[:25])
    assert got["captioning/s/same_start_references"] == 0.5 and not evaluator.warning


class Looks(Fake):
    """Finds a caption one nat a token more probable with its own picture than with another."""

    def caption_log_likelihood(self, images, texts):
        own = [text == self.captions[i] for text, i in zip(texts, images[:, 0, 0, 0])]
        tokens = np.asarray([len(t.split()) + 1 for t in texts])
        return -0.5 * tokens - np.where(own, 0, tokens), tokens


def test_the_gain_of_an_image_is_over_another_one():
    """A list with a row a caption, ten of each picture: seven rows before is often the same one,
    beside which nothing is gained."""
    said = [f"number {i} of what there is" for i in range(8)]
    rows = [dict(image=picture(i), text=f"{c} of {i}") for i in range(8) for c in range(10)]
    for size in (128, 16):
        evaluator = captioning.Captioning("s", batch_size=size)
        got = dict(evaluator.run(Looks(captions=said), rows))
        assert got["captioning/s/image_gain"] == pytest.approx(1)
        assert got["captioning/s/image_gain_low"] == pytest.approx(1)
        assert got["captioning/s/image_gain_count"] == 6  # of the first 64 rows, but for the first


def test_intervals_draw_an_image_with_all_of_its_rows():
    """Each picture three times in a list: no more is known than of each once."""
    said = [f"{'a b c d e f g h'[: 2 * (i % 7) + 1]} and number {i}" for i in range(30)]
    rows = [dict(image=picture(i), text=f"a b c d and number {i} of 30") for i in range(30)]
    once, thrice = (
        dict(captioning.Captioning("s").run(Fake(captions=said), rows * times)) for times in (1, 3)
    )
    for name in ("exact_match", "word_f1", "bleu4", "rouge_l", "perplexity"):
        assert thrice[f"captioning/s/{name}_count"] == 3 * once[f"captioning/s/{name}_count"]
        for end in ("", "_low", "_high"):
            value = once[f"captioning/s/{name}{end}"]
            assert thrice[f"captioning/s/{name}{end}"] == pytest.approx(value, rel=1e-9)
    assert once["captioning/s/bleu4_high"] > 1.1 * once["captioning/s/bleu4_low"] > 0
    # CIDEr-D, whose words nobody used weigh by the number of records, has another value.
    wide = [
        got["captioning/s/cider_d_high"] - got["captioning/s/cider_d_low"] for got in (once, thrice)
    ]
    assert wide[1] == pytest.approx(wide[0], rel=0.2)  # and not 0.58 of it


def test_captioning_with_several_references():
    records = [
        dict(image=picture(0), text=["A dog, running.", "a brown dog"]),
        dict(image=picture(1), text="two cats"),
    ]
    evaluator = captioning.Captioning("d")
    got = dict(evaluator.run(Fake(captions=["a dog  running", "two dogs"]), records))
    assert got["captioning/d/exact_match"] == 0.5
    assert got["captioning/d/word_f1"] == pytest.approx(0.75)
    assert got["captioning/d/perplexity_count"] == 2  # images
    assert "perplexity" not in "".join(
        dict(captioning.Captioning("d", perplexity=False).run(Fake(captions=["x", "y"]), records))
    )


def test_references_of_one_image_are_one_draw():
    """Five that say the same tell no more of the model than one does."""

    class Sure(Fake):
        def caption_log_likelihood(self, images, texts):
            nats = np.array([-0.1 * (1 + int(text.split()[-1])) for text in texts])
            return nats, np.ones(len(texts), np.int32)

    def scores(several):
        records = [dict(image=picture(i), text=[f"word {i % 9}"] * several) for i in range(40)]
        evaluator = captioning.Captioning("c", captions=False)
        return dict(evaluator.run(Sure(), records))

    one, five = scores(1), scores(5)
    assert one["captioning/c/perplexity_low"] < one["captioning/c/perplexity"] - 0.1
    assert one == pytest.approx(five)


def test_references_that_are_cut_are_counted(caplog):
    texts = [["one two three"], ["one two", "one two three four"], ["one"]]  # 5, 4, 6, 3 tokens
    records = [dict(image=picture(i), text=text) for i, text in enumerate(texts)]

    def said(max_len):
        model = Fake()
        model.max_len = max_len
        evaluator = captioning.Captioning("c", captions=False)
        caplog.clear()
        list(evaluator.run(model, records))
        assert evaluator.examples["notes"] == [line.partition(": ")[2] for line in caplog.messages]
        return caplog.messages

    assert said(7) == []
    (line,) = said(5)
    assert line.startswith("captioning/c: 2 of 4 references fill model.text.max_len=5 tokens")


@pytest.mark.parametrize("nats, wanted", [(2.0, math.exp(2)), (710.0, math.inf)])
def test_perplexity_beyond_a_float_is_infinite(nats, wanted):
    class Unlikely(Fake):
        def caption_log_likelihood(self, images, texts):
            return np.full(len(texts), -3 * nats), np.full(len(texts), 3)

    records = [dict(image=picture(i), text="a b", key=i) for i in range(3)]
    found = dict(captioning.Captioning("x", captions=False).run(Unlikely(), records))
    for end in ("", "_low", "_high"):
        assert found[f"captioning/x/perplexity{end}"] == pytest.approx(wanted)


def test_captions_so_far_are_kept_and_the_result_is_the_same(tmp_path):
    captions = [f"caption {i % 7}" for i in range(20)]
    captions[1] = "one line\u2028for JSON"
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
        outputs = captioning.Outputs(tmp_path / "o.jsonl", request, write=Writing(True))
        evaluator = captioning.Captioning("x", batch_size=6, outputs=outputs, how=dict(num_beams=2))
        return dict(evaluator.run(model, data))

    model = Killed(captions=captions)
    model.stop = 12
    with pytest.raises(KeyboardInterrupt):
        run(model, dict(weights="1"))
    path = tmp_path / "o.jsonl"
    assert len(path.read_text().split("\n")) == 14
    path.write_text(path.read_text()[:-5])  # killed within a line
    model.made, model.stop = 0, 100
    whole = run(model, dict(weights="1"))
    assert model.made == 9  # the cut line and the eight that were missing
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [line["caption"] for line in lines[1:]] == captions
    plain = dict(captioning.Captioning("x", batch_size=6).run(Fake(captions=captions), records))
    assert whole == plain and whole["captioning/x/perplexity_count"] == 20
    for request, data, again in (
        (dict(weights="1"), records, 0),
        (dict(weights="2"), records, 20),
        (dict(weights="2"), [dict(r, key=r["key"] + (i > 4)) for i, r in enumerate(records)], 15),
    ):
        model.made = 0
        run(model, request, data)
        assert model.made == again


@pytest.mark.parametrize("bad", [b'{"key": "3", "cap', b"[]", b"{}", b'{"key": "3\xff"}', b""])
def test_a_damaged_line_ends_the_captions_so_far_and_no_evaluation(bad, tmp_path, caplog):
    path, records = tmp_path / "o.jsonl", [dict(key=str(i)) for i in range(6)]
    outputs = captioning.Outputs(path, dict(step=1), write=Writing(True))
    outputs.add([dict(record, caption="a") for record in records])
    outputs.close()
    lines = path.read_bytes().split(b"\n")
    lines[4] = bad
    path.write_bytes(b"\n".join(lines))
    again = captioning.Outputs(path, dict(step=1), write=Writing(True))
    assert [one["key"] for one in again.take(records)] == ["0", "1", "2"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path}, line 5: damaged (")
    again.add([dict(record, caption="b") for record in records[3:]])
    again.close()
    whole = captioning.Outputs(path, dict(step=1), write=Writing(False)).take(records)
    assert "".join(one["caption"] for one in whole) == "aaabbb"


@pytest.mark.parametrize(
    "said,wanted,exact,f1",
    [
        (
            "\u0915\u093f\u0924\u093e\u092c",
            "\u0915\u0941\u0924\u093e\u092c\u093f",
            False,
            0.0,
        ),  # Hindi
        ("\u0915\u093f\u0924\u093e\u092c!", "\u0915\u093f\u0924\u093e\u092c", True, 1.0),
        ("caf\u00e9", "cafe\u0301", True, 1.0),
        ("cafe", "cafe\u0301", False, 0.0),
        ("\U0001f600", "\U0001f697", False, 0.0),
        ("A dog's  park.", "a dog s park", True, 1.0),
        ("a \u2764\ufe0f here", "a here", True, 1.0),
    ],
)
def test_words_of_all_scripts_are_compared(said, wanted, exact, f1):
    found = caption_match.score_references(said, dict(text=[wanted]))
    assert found == (exact, pytest.approx(f1))


class Broken(Fake):
    """Of every second text of a call it says NaN."""

    def caption_log_likelihood(self, images, texts):
        nats = np.where(np.arange(len(texts)) % 2, np.nan, -1.0)
        return nats, np.full(len(texts), 2)


def test_likelihoods_that_are_no_numbers_are_refused():
    records = [dict(image=picture(i), text=f"word {i}") for i in range(4)]
    says = "caption likelihoods{}: 2 of 4 are not finite"
    with pytest.raises(ValueError, match=says.format(" of captioning/c")):
        dict(captioning.Captioning("c", captions=False).run(Broken(), records))
    pixels = np.stack([record["image"] for record in records])
    with pytest.raises(ValueError, match=says.format("")):
        collapse.gains(Broken(), pixels, pixels, ["a"] * 4)
