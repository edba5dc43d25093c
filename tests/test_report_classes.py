"""What the report shows of a classification, of few classes and of many."""

import numpy as np
import pytest
from test_report import Reader

from coca_jax import report
from coca_jax.evaluators import classification, results


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
    tally = classification.Tally("zeroshot/x", names)
    image = np.zeros((8, 8, 3), np.uint8)
    records = [dict(image=image, labels=[name]) for name in names]
    tally.add(np.roll(np.eye(count), 1, 1), records)
    results.save_examples(tmp_path, "zeroshot/x", tally.examples())
    results.save_results(tmp_path, dict(tally.results()))
    page = report.write_report(tmp_path).read_text()
    assert ("confusion of classes" in page) == drawn
    assert f"All {count:,} classes" in page and "Most confused" in page


def test_pictures_without_a_class_are_no_damage(tmp_path):
    tally = classification.Tally("zeroshot/x", ["cat", "dog"], missing=True)
    tally.add(np.eye(2), [dict(image=np.zeros((8, 8, 3), np.uint8), labels=[])] * 2)
    results.save_examples(tmp_path, "zeroshot/x", tally.examples())
    results.save_results(tmp_path, dict(tally.results()))
    page = report.write_report(tmp_path).read_text()
    assert "Confusion" not in page and page.count('class="pic"') == 2
