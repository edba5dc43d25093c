"""The embedded data set: determinism, held-out compositions, captions that can be scored."""

import collections
import itertools

import numpy as np
import pytest

from coca_jax.data import scenes, synthetic_source
from coca_jax.data.scenes import drawing, world


def test_records_are_a_function_of_split_and_index():
    source = synthetic_source.Scenes("train")
    together = source.read(np.asarray([5, 199_999, 7]))
    alone = synthetic_source.Scenes("train").read(np.asarray([199_999]))[0]
    np.testing.assert_array_equal(together[1]["image"], alone["image"])
    assert together[1]["text"] == alone["text"] and together[1]["key"] == alone["key"]
    assert together[0]["image"].shape == (64, 64, 3) and together[0]["image"].dtype == np.uint8
    assert [r["text"] for r in source.read_texts([5, 199_999, 7])] == [r["text"] for r in together]
    other = synthetic_source.Scenes("test").read([5])[0]
    assert (other["image"] != together[0]["image"]).any()


def test_first_captions_stay_as_published():
    """A change here changes every published score: raise the stream's version when it is meant."""
    texts = [r["text"] for r in synthetic_source.Scenes("train").read_texts(range(2))]
    assert texts[1].startswith("a small cross at the top left, a small cross on the right and a")
    labels = synthetic_source.Scenes("train", "label").read([0])[0]["labels"]
    assert labels == ["cross"]


def test_heldout_compositions_never_occur_in_training():
    pairs = {f"{c} {s}" for c, s in scenes.HELDOUT_PAIRS}
    assert {c for c, _ in scenes.HELDOUT_PAIRS} == set(scenes.COLOURS)
    assert {s for _, s in scenes.HELDOUT_PAIRS} == set(scenes.SHAPES)
    for split, kind in itertools.product(("train", "test"), ("caption", "label")):
        source = synthetic_source.Scenes(split, kind)
        for record in source.read(np.arange(1500)):
            assert not scenes.has_heldout(record["scene"])
            text = record["text"] or ", ".join(record["labels"])
            assert not any(pair in text for pair in pairs), text
    for kind in ("caption", "label"):
        heldout = synthetic_source.Scenes("heldout", kind).read(np.arange(500))
        assert all(scenes.has_heldout(r["scene"]) for r in heldout)
    by_relation = [
        r
        for r in synthetic_source.Scenes("heldout").read(np.arange(500))
        if not any((o["colour"], o["shape"]) in scenes.HELDOUT_PAIRS for o in r["scene"]["objects"])
    ]
    assert len(by_relation) > 20


def test_training_shows_every_attribute_evenly():
    records = synthetic_source.Scenes("train", objects=(1,)).read(np.arange(3000))
    objects = [r["scene"]["objects"][0] for r in records]
    pairs = collections.Counter((o["colour"], o["shape"]) for o in objects)
    assert len(pairs) == 56 and min(pairs.values()) > 25
    assert min(collections.Counter(o["place"] for o in objects).values()) > 250
    assert len({r["text"] for r in records}) > 2000
    counts = collections.Counter(
        len(r["scene"]["objects"]) for r in synthetic_source.Scenes("train").read(np.arange(2000))
    )
    assert counts[1] == pytest.approx(800, abs=80) and counts[4] == pytest.approx(300, abs=60)


def test_varied_and_unseen_scenery_share_nothing_but_the_scenes():
    """Scenes and texts of an index stay; hues and grain of the one are not those of the other."""
    index = np.arange(300)
    plain, varied, unseen = (
        synthetic_source.Scenes("test", scenery=kind).read(index) for kind in scenes.SCENERY
    )
    for a, b, c in zip(plain, varied, unseen):
        assert a["scene"]["objects"] == b["scene"]["objects"] == c["scene"]["objects"]
        assert c["scene"]["background"] is None and "background" not in c["text"]
        assert b["scene"]["background"] in (a["scene"]["background"], None)
        assert scenes.score_caption(c["text"], c["scene"]) == (True, 1.0)
        assert (a["image"] != c["image"]).any()
    named = sum(r["scene"]["background"] is not None for r in varied)
    assert 100 < named < 200
    again = synthetic_source.Scenes("test", scenery="varied")
    np.testing.assert_array_equal(again.read([7])[0]["image"], varied[7]["image"])
    assert again.read_texts([7])[0]["text"] == varied[7]["text"]
    draws = [world.Draws(1, i, []) for i in range(400)]
    for low, high in scenes.UNSEEN_HUES:
        assert not any(low <= drawing.hue("varied", d) <= high for d in draws)
        assert any(low <= drawing.hue("unseen", d) <= high for d in draws)
    assert drawing.GRAIN["varied"][1] < drawing.GRAIN["unseen"][0]
    with pytest.raises(ValueError, match="scenery='unseen' is for evaluation alone"):
        synthetic_source.Scenes("train", scenery="unseen")
    with pytest.raises(ValueError, match="scenery is 'forest'; use one of plain, varied, unseen"):
        synthetic_source.Scenes("test", scenery="forest")


def test_canonical_and_full_captions_say_everything():
    for record in synthetic_source.Scenes("heldout").read(np.arange(800)):
        scene = record["scene"]
        said = scenes.parse_caption(scenes.canonical_caption(scene))
        assert said == scenes.described_attributes(scene)
        assert record["text"] == scenes.full_caption(scene)
        assert scenes.parse_caption(record["text"]) - said == {("background", scene["background"])}
        assert scenes.score_caption(record["text"], scene) == (True, 1.0)


def test_noisy_captions_are_true_and_mostly_complete():
    """A quarter of the listings leave colour out, all else is rarely missing or wrong."""
    records = synthetic_source.Scenes("train").read(np.arange(3000))
    coloured = [r for r in records if "'? " not in str(scenes.parse_caption(r["text"]))]
    assert 0.7 < len(coloured) / len(records) < 0.85
    scores = [scenes.score_caption(r["text"], r["scene"]) for r in coloured]
    assert np.mean([f1 for _, f1 in scores]) > 0.93
    one = [s for s, r in zip(scores, coloured) if len(r["scene"]["objects"]) == 1]
    assert np.mean([exact for exact, _ in one]) > 0.75
    every = [r for r in records if len(r["scene"]["objects"]) == 1]
    exact = [scenes.score_caption(r["text"], r["scene"])[0] for r in every]
    assert np.mean(exact) > 0.55  # so the likeliest caption is complete


def test_labels_always_name_the_shape_and_in_evaluation_the_pair():
    train = synthetic_source.Scenes("train", "label").read(np.arange(1000))
    pairs = 0
    for record in train:
        (o,) = record["scene"]["objects"]
        assert o["shape"] in record["labels"]
        pairs += f"{o['colour']} {o['shape']}" in record["labels"]
    assert pairs == pytest.approx(700, abs=50)
    for record in synthetic_source.Scenes("heldout", "label").read(np.arange(200)):
        (o,) = record["scene"]["objects"]
        assert record["labels"] == [o["shape"], f"{o['colour']} {o['shape']}"]


def test_parse_caption_forms():
    parse = scenes.parse_caption
    assert parse("TWO big crimson Discs, on the left and in the upper right corner!") == {
        ("count", "red circle", 2),
        ("size", "red circle", "large"),
        ("texture", "red circle", "solid"),
        ("place", "red circle", "left"),
        ("place", "red circle", "top right"),
    }
    assert ("relation", "blue star", "left of", "green ring") in parse(
        "a green hoop to the right of a blue star"
    )
    fronted = parse("in the middle a tiny red box, at the top a polka-dot pink heart")
    assert ("place", "red square", "centre") in fronted
    assert ("place", "pink heart", "top") in fronted
    assert ("texture", "pink heart", "dotted") in fronted
    assert ("count", "red ?", 1) in parse("a red thing")
    assert parse("") == frozenset()


def test_score_caption_counts_errors():
    scene = dict(
        objects=[
            dict(shape="star", colour="blue", size="large", texture="striped", place="left"),
            dict(shape="ring", colour="red", size="small", texture="solid", place="right"),
        ],
        background="grey",
    )
    right = "a large striped blue star on the left and a small red ring on the right"
    assert scenes.score_caption(right, scene) == (True, 1.0)
    assert scenes.score_caption(right + " on a grey background", scene) == (True, 1.0)
    assert scenes.score_caption(right + " on a white background", scene)[0] is False
    exact, f1 = scenes.score_caption(right.replace("small", "large"), scene)
    assert not exact and f1 == pytest.approx(7 / 8)
    exact, f1 = scenes.score_caption("a large striped blue star on the left", scene)
    assert not exact and f1 == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert scenes.score_caption("nothing", scene) == (False, 0.0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="split is 'val'; use one of train, test, heldout"):
        synthetic_source.Scenes("val")
    says = "^builtin='scenes' draws nothing for kind='question', but for 'caption' or 'label'"
    with pytest.raises(ValueError, match=says):  # as of the task 'answers', which names no kind
        synthetic_source.Scenes("test", "question")
    with pytest.raises(ValueError, match="counts from 1 to 4"):
        synthetic_source.Scenes("train", objects=(5,))
    with pytest.raises(IndexError):
        synthetic_source.Scenes("test").read([2_000])
