"""What the report shows of a classification, of few classes and of many, and of a retrieval."""

import re

import numpy as np
import pytest
from test_report import Reader

from coca_jax.cli import report
from coca_jax.evaluation.evaluators import classification, results


def test_every_class_is_listed_and_what_was_skipped_is_said(tmp_path):
    names = [f"class {i}" for i in range(20)]
    tally = classification.Tally("generative/x", names)
    image = np.zeros((8, 8, 3), np.uint8)
    tally.add(np.eye(20)[::-1], [dict(image=image, labels=[name]) for name in names])
    results.save_examples(tmp_path, "generative/x", tally.examples())
    skipped = dict(kind="captioning", items=[], notes=["SPICE skipped: java is not installed"])
    results.save_examples(tmp_path, "captioning/x", skipped)
    results.save_results(tmp_path, dict(tally.results()) | {"captioning/x/cider_d": 1.234})
    text = Reader(report.write_report(tmp_path).read_text()).text
    assert "All 20 classes" in text and text.count("class 19 0.0% 1") >= 1
    assert "SPICE skipped: java is not installed" in text
    assert "CIDEr-D 123.4" in text and "Classification by caption likelihood: x" in text


@pytest.mark.parametrize("count, drawn", [(100, True), (101, False), (1000, False)])
def test_a_confusion_of_many_classes_is_not_drawn(tmp_path, count, drawn):
    names = [f"class {i}" for i in range(count)]
    tally = classification.Tally("zero_shot/x", names)
    image = np.zeros((8, 8, 3), np.uint8)
    records = [dict(image=image, labels=[name]) for name in names]
    tally.add(np.roll(np.eye(count), 1, 1), records)
    results.save_examples(tmp_path, "zero_shot/x", tally.examples())
    results.save_results(tmp_path, dict(tally.results()))
    page = report.write_report(tmp_path).read_text()
    assert ('aria-label="confusion matrix"' in page) == drawn
    assert f"All {count:,} classes" in page and "Most confused" in page


def test_pictures_without_a_class_are_no_damage(tmp_path):
    tally = classification.Tally("zero_shot/x", ["cat", "dog"], missing=True)
    tally.add(np.eye(2), [dict(image=np.zeros((8, 8, 3), np.uint8), labels=[])] * 2)
    results.save_examples(tmp_path, "zero_shot/x", tally.examples())
    results.save_results(tmp_path, dict(tally.results()))
    page = report.write_report(tmp_path).read_text()
    assert "Confusion" not in page and page.count('class="pic"') == 2


def test_guesses_are_marked_up_to_the_right_one_and_beside_chance(tmp_path):
    """A cross at a third guess behind two right ones would tell of an error that is none."""
    names = [f"class {i}" for i in range(8)]
    tally = classification.Tally("zero_shot/x", names)
    image = np.zeros((8, 8, 3), np.uint8)
    scores = np.zeros((3, 8))
    scores[:, :3] = (
        0.9,
        0.8,
        0.7,
    )  # the first, the second and the third are guessed, in this order
    tally.add(scores, [dict(image=image, labels=[names[i]]) for i in (0, 1, 7)])
    results.save_examples(tmp_path, "zero_shot/x", tally.examples())
    results.save_results(tmp_path, dict(tally.results()))
    page = report.write_report(tmp_path).read_text()
    by_truth = {}
    for card in page.split('<div class="pic">')[1:]:
        marks = re.findall(r"<li><b(?: class=\"(yes|no)\")?", card)
        by_truth[re.search(r"<p>(.*?)</p>", card)[1]] = marks
    assert by_truth == {
        "class 0": ["yes", "", ""],
        "class 1": ["no", "yes", ""],
        "class 7": ["no", "no", "no"],
    }
    text = Reader(page).text
    assert "Random guessing 12.5% Most common answer 33.3%" in text  # eight classes, three images
    assert re.search(r"Top-1 33\.3% .* 12\.5% 33\.3% 3", text)
    assert re.search(r"Top-5 66\.7% .* 62\.5% 3", text)


def test_the_right_one_of_a_query_is_shown_with_its_rank(tmp_path):
    """Behind the best, where it is not among them."""
    images = np.eye(12, dtype=np.float32)
    texts = [f"text {i}" for i in range(12)]
    embeddings = images[::-1].copy() - 0.01 * np.arange(12, dtype=np.float32)[:, None]
    matches = np.stack([np.arange(12)] * 2, 1)
    kept = [np.zeros((8, 8, 3), np.uint8)] * 12
    found = results.examples(images, kept, texts, embeddings, matches, 2)
    assert [hit["rank"] for hit in found["items"][1]["texts"]] == [1, 2, 3, 4, 5, 12]
    results.save_examples(tmp_path, "retrieval/x", found)
    scores = dict(image_to_text_r1=0.25, image_to_text_r1_chance=1 / 6)
    results.save_results(tmp_path, {f"retrieval/x/{k}": v for k, v in scores.items()})
    page = report.write_report(tmp_path).read_text()
    text = Reader(page).text
    assert "text 11 -0.11, rank 12" in text and page.count("<small>rank 12</small>") == 1
    assert re.search(r"Image to text R@1 25\.0% 16\.7%", text)


def test_chance_is_that_of_the_data(tmp_path):
    """Any of several labels is right: a random guess among four names is right as often as they
    are of the picture, and the most common class of 'ab', 'abc', 'd', 'e' is right in two of 4."""
    tally = classification.Tally("zero_shot/x", list("abcd"), missing=True)
    image = np.zeros((8, 8, 3), np.uint8)
    records = [dict(image=image, labels=labels) for labels in ("ab", "abc", "d", "e")]
    tally.add(np.eye(4), records)
    results.save_examples(tmp_path, "zero_shot/x", tally.examples())
    results.save_results(tmp_path, dict(tally.results()))
    assert dict(tally.results())["zero_shot/x/top1_majority"] == 2 / 4
    assert tally.chance()["top1"] == (2 + 3 + 1 + 0) / 4 / 4
    assert tally.chance()["mean_per_class"] == pytest.approx((2.5 / 4 + 1 / 4) / 2)
    text = Reader(report.write_report(tmp_path).read_text()).text
    assert "Random guessing 37.5%" in text and re.search(r"Mean per class .* 43\.8% 3", text)


def test_of_several_right_texts_the_best_one_follows():
    images, kept = np.ones((1, 1), np.float32), [np.zeros((8, 8, 3), np.uint8)]
    embeddings = np.arange(12, dtype=np.float32)[:, None]
    matches = np.asarray([[0, 2], [0, 5]])
    texts = [f"text {i}" for i in range(12)]
    (item,) = results.examples(images, kept, texts, embeddings, matches, 1)["items"]
    assert [hit["text"] for hit in item["texts"]] == [f"text {i}" for i in (11, 10, 9, 8, 7, 5)]
    assert item["texts"][-1]["rank"] == 7 and item["truth"] == ["text 2", "text 5"]


def test_an_evaluation_whose_pictures_do_not_fit_their_layout_is_named(tmp_path):
    """As those of an evaluator of one's own, which evaluating again does not mend."""
    item = dict(image="", caption="a ring", references=["a ring"], exact=True, f1=1.0)
    fitting = dict(kind="captioning", items=[item], worst=[])
    results.save_results(tmp_path, {"captioning/x/exact_match": 1.0})
    results.save_examples(tmp_path, "captioning/x", fitting)
    assert "a ring" in report.write_report(tmp_path).read_text()
    results.save_examples(tmp_path, "words/y", dict(kind="table", items=[]))
    wanted = r"\w+ of y lacks .* layouts/table.html .*'head'"
    with pytest.raises(ValueError, match=wanted):
        report.write_report(tmp_path)


def test_pictures_of_an_unknown_layout_are_left_out_in_a_line(tmp_path, caplog):
    """As a typing mistake in an evaluator of one's own; the rest of the page is whole."""
    results.save_results(tmp_path, {"words/y/exact_match": 1.0})
    results.save_examples(
        tmp_path, "words/y", dict(kind="tabel", head=["a"], rows=[["a ring of gold"]])
    )
    assert "a ring of gold" not in report.write_report(tmp_path).read_text()
    says = "words/y: unknown layout 'tabel'"
    assert says in caplog.text and "table" in caplog.text
    results.save_examples(
        tmp_path, "words/y", dict(kind="table", head=["a"], rows=[["a ring of gold"]])
    )
    caplog.clear()
    assert "a ring of gold" in report.write_report(tmp_path).read_text() and not caplog.text
