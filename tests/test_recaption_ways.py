"""The ways of `recaption --how`, and what is kept of the captions that they give."""

import threading

import numpy as np
import pytest
from conversion_cases import small_weights, write_source

from coca_jax.apps.recaption import job, selection, shard
from coca_jax.apps.recaption.captioner import Captioner, Picture
from coca_jax.apps.recaption.request import Request, way
from coca_jax.cli import convert
from coca_jax.data.sources import registry
from coca_jax.data.sources.items import Options
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.tokenization import without_halves
from coca_jax.runtime import storage


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small model whose tokens are bytes: it writes halves of characters too."""
    folder = tmp_path_factory.mktemp("weights")
    source = write_source(folder / "open_clip", small_weights())
    convert.from_open_clip(str(source), str(folder / "model"))
    return str(folder / "model")


def test_ways_are_read_and_wrong_ones_are_told():
    assert way("nucleus,top_p=0.8,num_return_sequences=3") == GenerationConfig(
        do_sample=True, top_p=0.8, num_return_sequences=3
    )
    assert way("beams,early_stopping=never").early_stopping == "never"
    for text, why in (
        ("best", "begin with one of greedy"),
        ("greedy,length=3", "unknown field 'length'"),
        ("beams,num_beams=many", "num_beams='many': give a whole number"),
        ("greedy,num_return_sequences=2", "greedy decoding has one caption"),
        ("greedy,num_beams=3", "these settings are not greedy; begin with beams"),
        ("greedy,do_sample=true", "these settings are not greedy; begin with nucleus"),
        ("beams,num_beams=1", "these settings are not beams; begin with greedy"),
        ("nucleus,length_penalty=2", "length_penalty=2.0: only beam search uses it"),
    ):
        with pytest.raises(ValueError, match=f"--how={text}: .*{why}"):
            way(text)


def test_half_a_character_is_in_no_caption_that_is_kept(weights):
    """The model's own are as its tokens are decoded; `prepare` takes such texts for damaged."""
    assert without_halves("a  red ring") == "a  red ring"
    assert without_halves("a \ufffd\ufffd red \N{CAT}\ufffd") == "a red \N{CAT}"
    request = Request(
        *("", "webdataset", ""),
        checkpoints=(weights,),
        ways=("greedy,max_new_tokens=6",),
        batch_size=4,
    )
    captioner = Captioner(request)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    own = captioner.models[0].caption(list(pixels), max_new_tokens=6)
    assert any("\ufffd" in text for text in own)
    pictures = [Picture(n, str(n), [], (image,)) for n, image in enumerate(pixels)]
    found, _ = captioner.part(pictures)
    kept = [caption["text"] for one in found for caption in one["captions"]]
    assert kept == [" ".join(text.replace("\ufffd", "").split()) for text in own]


def test_an_image_that_a_list_names_several_times_is_one():
    """Four rows of each of five images, whose captions are the same: none is said of others."""
    owners, texts = np.arange(20) // 4 * 4, [[f"image {n // 4}"] for n in range(20)]
    images = np.eye(5, dtype=np.float32)[owners // 4]
    how: dict = dict(originals=[[]] * 20, finished=[[True]] * 20, images=images, captions=images)
    assert selection.of_part(texts, owners=owners, **how) == [[[]]] * 20
    told = selection.of_part([["image"]] * 12 + texts[12:], owners=owners, **how)
    assert told == [[["collapsed"]]] * 12 + [[[]]] * 8  # the same of three images


def test_what_a_model_gains_by_an_image_is_over_another_one(weights):
    how: dict = dict(checkpoints=(weights,), ways=("greedy,max_new_tokens=6",), batch_size=4)
    captioner = Captioner(Request("", "webdataset", "", **how))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    once = [Picture(n, str(n), [], (pixels[n],)) for n in range(2)]
    often = [Picture(n, str(n), [], (pixels[n // 5],)) for n in range(10)]
    _, wanted = captioner.part(once, look=True)
    _, told = captioner.part(often, look=True)
    assert told == dict(gain=pytest.approx(wanted["gain"], abs=2e-3), tokens=wanted["tokens"])
    assert wanted["gain"] and captioner.part(often[:5], look=True)[1] == {}


def test_the_files_of_a_folder_are_asked_for_at_once(tmp_path, monkeypatch):
    """One after the other, a million on a network's disk would hold up each start for minutes."""
    for number in range(40):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"x" * number)
        (tmp_path / f"{number:02}.txt").write_text("a caption")
    (unit,) = registry.find("sidecars").plan(str(tmp_path), "", Options())
    told = job._digest("sidecars", unit)
    stamp, changed, asked = storage.stamp, threading.Condition(), set()

    def answered_late(name):
        if name.endswith((".jpg", ".txt")):
            with changed:
                asked.add(name)
                changed.notify_all()
                assert changed.wait_for(lambda: len(asked) >= 8, 20)
        return stamp(name)

    monkeypatch.setattr(storage, "stamp", answered_late)
    assert job._digest("sidecars", unit) == told  # in the order of the names
    with monkeypatch.context() as patched:
        patched.setattr(storage, "stamp", stamp)
        (tmp_path / "07.txt").write_text("another caption")
        assert job._digest("sidecars", unit) != told


def test_the_scores_of_many_shards_are_asked_for_at_once(monkeypatch):
    """A bucket takes tens of milliseconds for a part of a shard."""
    together = threading.Barrier(8)

    def read_parts(job):
        together.wait(10)  # raises where fewer are under way
        one = dict(originals=[dict(text="alt", score=job / 16)], captions=[])
        return [dict(results=[one])]

    monkeypatch.setattr(shard, "read_parts", read_parts)
    request = Request("in", format="webdataset", out="out", text="original", quantile=0.5)
    assert shard.threshold(list(range(16)), request) == 7.5 / 16
