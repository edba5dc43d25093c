"""Querybank normalisation against its definition, and what can be no querybank."""

import numpy as np
import pytest
from evaluator_cases import Fake, picture, unit
from PIL import Image

from coca_jax.evaluation.evaluators import base, retrieval, zero_shot
from coca_jax.evaluation.metrics import querybank

SCENES = dict(builtin="scenes")


@pytest.mark.parametrize("tile", [3, 4096])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_hubness_is_the_log_of_the_mean_over_the_bank(tile, scale, monkeypatch):
    monkeypatch.setattr(querybank, "_TILE", tile)
    rng = np.random.default_rng(0)
    bank, candidates = unit(rng, 11, 8), unit(rng, 7, 8)
    bank[4] = -candidates[2]  # exp(-200) beside others
    products = bank.astype(np.float64) @ candidates.T
    want = np.log(np.exp(scale * products).mean(0)) / scale
    got = querybank.hubness(bank, candidates, scale)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (got > products.mean(0)).all() and (got < products.max(0)).all()


def test_scores_beside_the_plain_ones_are_those_of_the_definition():
    """Cosine less hubness, with a bank whose records share images and texts."""
    rng = np.random.default_rng(1)
    texts, noise = unit(rng, 40, 8), rng.normal(size=(40, 8))
    images = zero_shot.normalise(texts + 0.6 * noise).astype(np.float32)
    model = Fake(images, lambda t: texts[int(t)])
    bank = [dict(image=picture(i), text=[str(i), str(i - 1)]) for i in (30, 31, 32, 32, 33)]
    records = [dict(image=picture(i), text=str(i)) for i in range(28)]
    extra = [str(i) for i in range(28, 36)]
    evaluator = retrieval.Retrieval("toy", extra_texts=extra, bank=bank, chunk=16)
    got = dict(evaluator.run(model, records))

    cosines = images[:28] @ texts[:36].T
    less = [
        np.log(np.exp(10 * bank.astype(np.float64) @ there.T).mean(0)) / 10
        for bank, there in ((images[30:34], texts[:36]), (texts[29:34], images[:28]))
    ]
    to_text, to_image = cosines - less[0], (cosines - less[1][:, None]).T[:28]
    for name, scores in (("image_to_text", to_text), ("text_to_image", to_image)):
        places = (scores > np.diagonal(scores)[:, None]).sum(1)
        for k in (1, 5, 10):
            key = f"retrieval/toy/normalised_{name}_r{k}"
            assert got[key] == pytest.approx(np.mean(places < k))
            assert got[f"{key}_low"] <= got[key] <= got[f"{key}_high"]
        assert got[f"retrieval/toy/normalised_{name}_median_rank"] == np.median(places) + 1
    plain = dict(retrieval.Retrieval("toy", extra_texts=extra).run(model, records))
    assert plain.items() < got.items() and not any("normalised" in name for name in plain)


def test_a_text_that_is_near_every_picture_is_put_back():
    """The hub is found first by every picture, and by none once a bank of others tells of it."""
    rng = np.random.default_rng(2)
    middle = unit(rng, 16)
    texts = unit(rng, 60, 16)
    images = zero_shot.normalise(0.3 * texts + middle).astype(np.float32)
    table = {str(i): text for i, text in enumerate(texts)} | {"hub": middle}
    model = Fake(images, table.__getitem__)
    records, bank = (
        [dict(image=picture(i), text=str(i)) for i in some] for some in (range(20), range(20, 60))
    )
    got = dict(retrieval.Retrieval("toy", extra_texts=["hub"], bank=bank).run(model, records))
    assert got["retrieval/toy/image_to_text_r1"] == 0
    assert got["retrieval/toy/normalised_image_to_text_r1"] >= 0.9


def task_of(**change):
    return dict(dict(kind="retrieval", name="mine", data=SCENES), **change)


@pytest.mark.parametrize(
    "bank, says",
    [
        ("texts", "querybank='texts': give a dict"),
        (dict(path="no/such"), "data source no/such"),
        (dict(SCENES, split="val"), "split is 'val'; use one of train, test, heldout"),
        (dict(SCENES, split="test"), "of mine: scenes would be both the querybank and scored"),
    ],
)
def test_what_can_be_no_querybank_is_refused(bank, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        base.check([task_of(querybank=bank)])
    base.check([task_of(querybank=SCENES)])  # its split is 'train'


def test_a_folder_without_splits_is_no_querybank_of_itself(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(ValueError, match="would be both the querybank and scored"):
        base.check([task_of(data=dict(path=str(tmp_path)), querybank=dict(path=str(tmp_path)))])


def test_what_holds_all_that_is_scored_is_no_querybank():
    """`--where` leaves a part to be scored, and a bank of everything would have it too."""
    data = dict(tfds="x", split="train", where={"site": "a"})
    for bank in (dict(tfds="x", split="train"), data):
        with pytest.raises(ValueError, match="x would be both the querybank and scored"):
            base.check_apart(task_of(data=data), bank, "the querybank")
    for other in (dict(data, where={"site": "b"}), dict(tfds="x", split="validation")):
        base.check_apart(task_of(data=data), other, "the querybank")
