"""Boxes as text: how they are written and read, where scenes have theirs, what is scored."""

import json

import jax
import numpy as np
import pytest
from conftest import tiny_config
from data_cases import take
from one_device import train_alone
from PIL import Image
from quick_start import drawn_by_numpy  # noqa: F401

import coca_jax
from coca_jax.config import Entry, typed
from coca_jax.data import filters, supervision, synthetic_source, texts
from coca_jax.data.batches import open_stream
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import prepare
from coca_jax.data.scenes import drawing
from coca_jax.data.sources import regions
from coca_jax.data.sources.records import Record
from coca_jax.evaluation.evaluators import grounding
from coca_jax.training import run_vocabulary


def test_a_box_is_written_and_read():
    box = (0.0, 0.075, 0.5, 1.0)
    assert regions.numbers(box) == "00 07 50 99"
    hundredths = [number / 100 for number in range(100)]
    assert regions.numbers(hundredths) == " ".join(f"{number:02d}" for number in range(100))
    assert regions.read(" 00 07 50 99") == (0.005, 0.075, 0.505, 0.995)
    assert regions.read("0 0 0 7 5 0 9 9") == regions.read("00 07 50 99.")  # digit by digit
    for text in (
        "",
        "a red circle",
        "00 07 50",
        "51 07 50 99",
        "12 80 50 20",
        "at the 00 07 50 99",
    ):
        assert regions.read(text) is None, text
    thin = (0.121, 0.08, 0.127, 0.27)  # within one hundredth of the height
    assert regions.numbers(thin) == "12 08 12 27"
    assert regions.read(regions.numbers(thin)) == (0.12, 0.085, 0.13, 0.275)
    assert regions.overlap(regions.read("12 08 12 27"), thin) > 0.5
    assert regions.read("99 99 99 99") == (0.99, 0.99, 1.0, 1.0)
    region = regions.Region("a dog", (0.4, 0.1, 0.9, 0.5))
    assert regions.forms(region) == ("find a dog: 40 10 90 50", "at 40 10 90 50: a dog")
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, size = rng.uniform(0, 0.7, 2), rng.uniform(0.1, 0.3, 2)
        drawn = (*low, *(low + size))
        back = regions.read(regions.numbers(drawn))
        assert np.abs(np.subtract(back, drawn)).max() <= 0.005 + 1e-9
        assert regions.overlap(back, drawn) > 0.85


def test_overlap_is_intersection_over_union():
    assert regions.overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert regions.overlap((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert regions.overlap((0, 0, 0.2, 0.2), (0.1, 0.1, 0.3, 0.3)) == pytest.approx(0.01 / 0.07)
    assert regions.overlap((0, 0, 0.2, 0.2), (0.3, 0, 0.5, 0.2)) == 0


@pytest.mark.parametrize(
    "bad",
    [
        5,
        ["a dog"],
        [{"text": "a dog"}],
        [{"text": "", "box": [0, 0, 1, 1]}],
        [{"text": "a dog", "box": [0, 0, 1]}],
        [{"text": "a dog", "box": [0, 0, 64, 64]}],
        [{"text": "a dog", "box": [0.5, 0, 0.5, 1]}],
        [{"text": "a dog", "box": ["0", 0, 1, 1]}],
    ],
)
def test_what_is_no_region_is_a_line(bad):
    with pytest.raises(ValueError, match="regions: .* is none; give {'text'.*from 0 to 1"):
        regions.regions_of(json.dumps({"regions": bad}))
    with pytest.raises(ValueError, match="record 'a7', regions: "):
        supervision.Region().trains(Record(b"", (), (), "a7", json.dumps({"regions": bad})))
    assert regions.regions_of("{}") == [] and regions.regions_of('{"regions": null}') == []


def test_scenes_know_where_their_objects_are():
    source = synthetic_source.Scenes("train", "region")
    records = source.read(np.arange(120))
    assert [r["extra"] for r in source.read_texts(np.arange(5))] == [
        r["extra"] for r in records[:5]
    ]
    sizes = {"small": [], "large": []}
    for index, record in enumerate(records):
        found = regions.regions_of(json.dumps(record["extra"]))
        assert len({one.text for one in found}) == len(found) == len(record["scene"]["objects"])
        for o, one in zip(record["scene"]["objects"], found):
            assert o["colour"] in one.text and o["shape"] in one.text
            top, left, bottom, right = one.box
            sizes[o["size"]].append(max(bottom - top, right - left))
            x, y, place = left + right, top + bottom, o["place"]  # twice the middle
            assert ("left" in place) == (x < 0.75) and ("right" in place) == (x > 1.25)
            assert ("top" in place) == (y < 0.75) and ("bottom" in place) == (y > 1.25)
        if len(found) == 1:  # what differs from a flat background is the object
            (draws,) = source._draws(np.array([index]), 1, 24)
            flat = np.full((drawing.SIDE, drawing.SIDE, 3), 127.0, np.float32)
            image = drawing.render(record["scene"], draws, flat)
            hit = np.argwhere((image != 127).any(2))
            wanted = np.concatenate([hit.min(0), hit.max(0) + 1]) / 64
            assert np.abs(wanted - found[0].box).max() <= 2 / 64
    assert max(sizes["small"]) < min(max(sizes["large"]), 0.35) and min(sizes["large"]) > 0.3
    assert synthetic_source.Scenes("train").read([0])[0]["extra"] == {}


def test_each_visit_trains_on_a_region_in_one_of_two_forms():
    source = filters.open_source(dict(builtin="scenes", kind="region"), training=True)
    assert (
        isinstance(source.kind, supervision.Region) and len(source) == 200_000
    )  # none is looked at
    (record,) = source.read([1])
    found = regions.regions_of(record.extra)
    draw = texts.Draw(0, 0, np.arange(400))
    chosen, same = source.kind.choose([record] * 400, {}, draw)
    assert chosen == same and set(chosen) == {text for one in found for text in regions.forms(one)}
    assert 150 < sum(text.startswith("find ") for text in chosen) < 250
    assert source.kind.choose([record], {}, texts.Draw(0, 0, np.array([7])))[0] == [chosen[7]]
    learned = list(source.kind.vocabulary_texts(source.read_texts([1])[0], 0))
    assert learned == [text for one in found for text in regions.forms(one)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("augment", "crop"), ("flip", True), ("resize", "crop"), ("num_frames", 2)],
)
def test_what_moves_pixels_from_their_boxes_is_refused(key, value):
    config = typed(tiny_config()).change(
        {"data.sources": (dict(builtin="scenes", kind="region"),), f"data.{key}": value}
    )
    with pytest.raises(ValueError, match=f"data.{key}=.* does not go with a source of kind='reg"):
        Mixture(config)


class Says:
    """A captioner that writes what it is given, by prompt."""

    def __init__(self, said):
        self.said, self.asked = said, []
        self.max_len = 16

    def num_tokens(self, texts):
        return np.array([min(len(text) + 1, self.max_len - 1) for text in texts])

    def caption(self, images, prompt=""):
        assert len(images) == len(prompt)
        self.asked += prompt
        return [f"{one} {self.said[one]}" for one in prompt]


def test_places_are_scored():
    boxes = {
        "a dog": [0.1, 0.1, 0.5, 0.5],
        "a cat": [0.5, 0.5, 0.9, 0.9],
        "a tree": [0, 0, 0.3, 0.3],
    }
    listed = [dict(text=text, box=box) for text, box in boxes.items()]
    image = np.zeros((8, 8, 3), np.uint8)
    records = [
        dict(image=image, extra=json.dumps({"regions": listed[:2]})),
        dict(image=image, extra="{}"),
        dict(image=image, extra={"regions": listed[2:]}),
    ]
    model = Says(
        {
            "find a dog:": "10 10 50 50",
            "find a cat:": "50 50 90 75",  # more than half of it
            "find a tree:": "a tree",
            "at 10 10 50 50:": "A dog.",
            "at 50 50 90 90:": "a dog",
            "at 00 00 30 30:": "a tree",
        }
    )
    evaluator = grounding.Grounding("s", batch_size=2)
    found = dict(evaluator.run(model, records))
    assert found["grounding/s/accuracy_50"] == pytest.approx(2 / 3)
    cat = regions.overlap(regions.read("50 50 90 75"), (0.5, 0.5, 0.9, 0.9))
    dog = regions.overlap(regions.read("10 10 50 50"), (0.1, 0.1, 0.5, 0.5))
    assert 0.6 < cat < 0.65 and found["grounding/s/overlap"] == pytest.approx((cat + dog) / 3)
    assert found["grounding/s/boxes"] == pytest.approx(2 / 3)
    assert found["grounding/s/named"] == pytest.approx(2 / 3)
    assert found["grounding/s/accuracy_50_count"] == 3
    assert [item["exact"] for item in evaluator.examples["items"]] == [True, True, False]
    json.dumps(evaluator.examples)
    # Regions of one image are drawn together: with a single one no draw is another.
    alone = dict(grounding.Grounding("s").run(model, records[:2]))
    named = [alone[f"grounding/s/named{end}"] for end in ("", "_low", "_high", "_count")]
    assert named == [0.5, 0.5, 0.5, 2]
    rows = [dict(image=image.copy(), extra={"regions": [one]}) for one in listed[:2]]  # of a list
    assert alone == dict(grounding.Grounding("s").run(model, rows))
    with pytest.raises(ValueError, match="grounding/s: no record has a region"):
        list(grounding.Grounding("s").run(model, records[1:2]))


def test_a_region_whose_text_leaves_no_room_is_left_out_and_counted():
    """A longer one ends no task: a prompt of all the model's tokens is refused."""
    image, long = np.zeros((8, 8, 3), np.uint8), "a very long text"
    listed = [dict(text=text, box=[0.1, 0.1, 0.5, 0.5]) for text in ("a dog", long)]
    records = [dict(image=image, extra={"regions": [one]}) for one in listed]
    model = Says({"find a dog:": "10 10 50 50", "at 10 10 50 50:": "a dog"})
    found = dict(grounding.Grounding("s").run(model, records))
    assert found["grounding/s/accuracy_50_count"] == 1 == found["grounding/s/left_out"]
    assert found["grounding/s/named"] == 1 and f"find {long}:" not in model.asked
    with pytest.raises(
        ValueError, match="1 of 1 regions left out, whose .*=16; the first is 'a very"
    ):
        list(grounding.Grounding("s").run(model, records[1:]))


@pytest.mark.parametrize(
    "said",
    [
        "find Clock at 10:30: 12 08 30 27",
        "find clock at 10:30: 12 08 30 27",
        "find clock at 10 : 30 : 12 08 30 27",
    ],
)
def test_an_answer_is_what_stands_behind_the_prompt_as_the_vocabulary_spells_it(said):
    behind = grounding.after(said, "find Clock at 10:30:")
    assert behind.strip() == "12 08 30 27" and regions.read(behind) is not None
    assert grounding.after("find clock", "find Clock at 10:30:") == ""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Prepared pictures, of which every second one has regions."""
    root = tmp_path_factory.mktemp("regions")
    (root / "raw").mkdir()
    lines = []
    for number in range(12):
        Image.fromarray(np.full((20, 30, 3), 20 * number, np.uint8)).save(
            root / f"raw/{number}.png"
        )
        line = dict(file_name=f"{number}.png", text=f"picture {number}")
        if number % 2:
            line["regions"] = [dict(text=f"thing {number}", box=[0.1, 0.2, 0.3, 0.4])]
        lines.append(json.dumps(line))
    (root / "raw/metadata.jsonl").write_text("\n".join(lines) + "\n")
    prepare("imagefolder", str(root / "raw"), str(root / "data"), progress=False)
    return root


def test_own_data_bring_their_regions(photos):
    entry = dict(path=str(photos / "data"), kind="region", split="train")
    source = filters.open_source(Entry.of(entry), training=True)
    assert len(source) == 6  # those that have one
    found = source.kind.choose(source.read(range(6)), {}, texts.Draw(0, 0, np.arange(6)))[0]
    assert all("10 20 30 40" in text and "thing" in text for text in found)


def test_records_of_regions_alone_are_kept(tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    told = [[dict(text="a dog", box=[0.1, 0.2, 0.3, 0.4])], dict(text="all", box=[0, 0, 1, 1]), []]
    rows = [json.dumps(dict(file_name="a.png", regions=one)) for one in told]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    made = prepare("imagefolder", str(tmp_path), str(tmp_path / "out"), progress=False)
    assert (made["written"], made["quarantined"]) == (2, {"missing_text": 1})
    entry = Entry.of(dict(path=str(tmp_path / "out"), kind="region", split="train"))
    found = filters.open_source(entry, training=True).read(range(2))
    assert [regions.regions_of(one.extra)[0].text for one in found] == ["a dog", "all"]


@pytest.mark.long
def test_a_run_learns_boxes_beside_captions_and_labels(photos):
    config = tiny_config(image_size=16, patch_size=8, bias=False)
    config.model.text.update(vocab_size=420, max_len=20)
    names = ("caption", "label", "region")
    given = dict(builtin="scenes", split="train", limit=500)  # whose texts are read for the words
    drawn = tuple(dict(given, kind=kind) for kind in names)
    own = dict(path=str(photos / "data"), kind="region", split="train")
    config.data.sources = (*drawn, own)
    config.batch_size, config.steps = 8, 2
    config.loss.contrastive_weight = 0.0  # boxes are texts: half as much to compile
    held = dict(builtin="scenes", split="heldout", kind="region", objects=(1,))
    config.eval.tasks = (dict(kind="grounding", name="held", data=held, limit=4),)
    summary = train_alone(config, photos / "run")
    assert summary["grounding/held/accuracy_50_count"] == 4
    assert 0 <= summary["grounding/held/boxes"] <= 1
    vocabulary = run_vocabulary.load_or_train(config, str(photos / "run"))
    (batch,) = take(open_stream(typed(config), vocabulary), 1)
    said = [vocabulary.decode(row) for row in batch["tokens"]]
    assert [("find " in text or "at " in text[:3]) for text in said] == [
        source >= 2 for source in batch["source"].tolist()
    ]
    assert not batch["is_label"][batch["source"] >= 2].any()
    model = coca_jax.load(str(photos / "run"), devices=jax.devices()[:1])
    (text,) = model.caption([str(photos / "raw/1.png")], prompt="find thing 1:", max_tokens=18)
    assert text.startswith("find thing 1:")
