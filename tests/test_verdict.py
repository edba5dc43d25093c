"""The sentence that says what a model is good for."""

import pytest

from coca_jax.evaluation.verdict import verdict


def _scores(r5=0.0, top1=0.0, f1=0.0, **more):
    """Scores of a model on one data set of 500 images: chance 1% in search, largest class 33%."""
    return {
        "retrieval/x_test/image_to_text_r5": r5,
        "retrieval/x_test/text_to_image_r5": r5,
        "retrieval/x_test/image_to_text_r5_chance": 0.01,
        "retrieval/x_test/text_to_image_r5_chance": 0.01,
        "retrieval/x_test/num_images": 500.0,
        "zero_shot/x_test/top1": top1,
        "zero_shot/x_test/top1_chance": 0.05,
        "zero_shot/x_test/top1_majority": 0.33,
        "captioning/x_test/word_f1": f1,
        "captioning/x_test/word_f1_majority": 0.05,
        "captioning/x_test/exact_match": 0.002,
        **{f"captioning/x_test/{name}": value for name, value in more.items()},
    }


def test_a_weak_model_is_called_so_and_pretrained_weights_are_advised():
    found = verdict(_scores(r5=0.3, top1=0.348, f1=0.077, same_start=0.54), images=5578)
    assert found.count(". ") == 0 and found.endswith(".")  # one sentence
    weak, _, rest = found.partition("not usable for")
    assert "weak at search (R@5 30% of 500 images, chance 1%)" in weak
    # 34.8% is hardly better than always naming the largest class.
    assert "classification (top-1 35%, majority class 33%)" in rest
    assert (
        "captioning (0.2% exact matches, word F1 8%, 54% start with the same three words)" in rest
    )
    assert "pretrained weights (such as coca_" in rest and "since 5,578 images are few" in rest


def test_a_good_model_needs_no_advice():
    found = verdict(_scores(r5=0.9, top1=0.9, f1=0.8), images=5578)
    assert found.startswith("The model is usable for search") and "help" not in found
    assert "not usable" not in found and "weak" not in found


@pytest.mark.parametrize(
    "known, advice",
    [
        (dict(images=100), "pretrained weights"),
        (dict(images=19_999), "pretrained weights"),
        (dict(images=20_000, passes=2.0), "longer training (2 passes"),
        (dict(images=20_000, passes=50.0), "more images than 20,000"),
        (dict(images=600, passes=1.0, pretrained=True), "longer training"),
        (dict(images=600, passes=20.0, pretrained=True), "more images than 600"),
        (dict(), "pretrained weights"),
    ],
)
def test_what_would_help_follows_from_the_run(known, advice):
    assert advice in verdict(_scores(), **known)


def test_captions_that_begin_alike_are_no_collapse_where_people_s_do():
    alike = dict(r5=0.9, top1=0.9, f1=0.8, same_start=0.9)
    assert "not usable for captioning" in verdict(_scores(**alike))
    assert "not usable" not in verdict(_scores(**alike, same_start_references=0.8))
    assert "independent of the image" in verdict(_scores(r5=0.9, f1=0.8, image_gain=0.001))


def test_long_captions_are_judged_by_cider_too():
    assert "weak at captioning" in verdict(_scores(r5=0.9, top1=0.9, f1=0.4, cider_d=0.4))
    assert "weak" not in verdict(_scores(r5=0.9, top1=0.9, f1=0.4, cider_d=1.1))


def test_the_worst_data_set_counts_and_nothing_scored_is_no_verdict():
    scores = _scores(r5=0.9) | {
        "retrieval/y/image_to_text_r5": 0.1,
        "retrieval/y/text_to_image_r5": 0.1,
    }
    assert "not usable for search (R@5 10%" in verdict(scores)
    assert verdict({"step": 5.0}) == "" == verdict({"knn/x/top1": 0.5})
    assert "search" not in verdict({"zero_shot/x/top1": 0.9})
    assert "search" not in verdict({"retrieval/x/image_to_text_r5": None})
