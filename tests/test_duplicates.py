"""Duplicates: over splits of one import, of pairs of images, and of rows that name one file."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from prepare_cases import encode, import_data, reasons_of

from coca_jax.data import dedup, filters, holdout
from coca_jax.data.prepare import prepare_with_holdout
from coca_jax.data.sources.items import Options

BIG = (96, 72)


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def keys(out, split="train"):
    return [record.key for record in filters.open_source(str(out), split)]


def test_twins_are_on_one_side_of_a_holdout(tmp_path):
    """Each side was freed of duplicates by itself, and two thirds of the test set trained."""
    data = tmp_path / "data"
    data.mkdir()
    for n in range(24):
        (data / f"{n:02d}a.png").write_bytes(encode(n, "PNG", size=BIG))
        (data / f"{n:02d}b.bmp").write_bytes(encode(n, "BMP", size=BIG))
        for one in "ab":
            (data / f"{n:02d}{one}.txt").write_text(f"caption {n}{one}")
    options = Options(dedup="perceptual")
    train, test = prepare_with_holdout(
        "sidecars", str(data), str(tmp_path / "out"), 0.4, options=options, processes=1,
        progress=False,
    )  # fmt: skip
    assert train["written"] + test["written"] == 24 and 3 < test["written"] < 20
    both = [{key[:2] for key in keys(tmp_path / "out", split)} for split in ("train", "test")]
    assert not both[0] & both[1] and len(both[0] | both[1]) == 24
    left_out = [one["quarantined"]["near_duplicate"] for one in (train, test)]
    assert sum(left_out) == 24


def by_field(folder, out, **options):
    """Of each split that the field tells: key -> reason of what is left out, and the keys kept."""
    told = holdout.find_splits("imagefolder", str(folder), Options())
    left_out, kept = {}, {}
    for split in told.values:
        chosen = dataclasses.asdict(told.options(split, Options(**options)))
        import_data("imagefolder", folder, out, split=split, **chosen)
        left_out[split], kept[split] = reasons_of(out, split), keys(out, split)
    return left_out, kept


@pytest.mark.parametrize("mode", ["none", "content"])
def test_what_is_held_out_by_a_field_keeps_its_images(mode, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    of_split = dict(train=(0, 1, 2, 3, 4, 0), val=(1, 5, 6), test=(2, 5, 7))
    rows = []
    for split, numbers in of_split.items():
        for place, n in enumerate(numbers):
            name = f"{split}{place}.jpg"
            (data / name).write_bytes(encode(n))
            rows.append(dict(file_name=name, text=f"no. {n}", split=split))
    write_rows(data, rows)
    left_out, kept = by_field(data, tmp_path / "out", dedup=mode)
    if mode == "none":
        assert left_out == dict(train={}, test={}, validation={})
        return
    assert kept["test"] == [f"test{n}.jpg" for n in range(3)]
    assert kept["validation"] == ["val0.jpg", "val2.jpg"]
    assert kept["train"] == ["train0.jpg", "train3.jpg", "train4.jpg"]
    assert left_out["validation"] == {"val1.jpg": "duplicate_image"}
    assert list(left_out["train"]) == ["train1.jpg", "train2.jpg", "train5.jpg"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", ["content", "perceptual"])
def test_rows_that_name_one_file_are_no_duplicates(mode, in_place, tmp_path):
    """As the five captions of each Flickr picture are; those of a copy of it go together."""
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(encode(n, size=BIG))
    (tmp_path / "again.jpg").write_bytes(encode(1, size=BIG))
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for name in ("0", "1", "2", "again"):
            writer.writerows([f"{name}.jpg", f"caption {k} of {name}"] for k in range(5))
    out = tmp_path / "out"
    done = import_data("csv", tmp_path / "list.csv", out, dedup=mode, in_place=in_place)
    assert done["written"] == 15 and done["quarantined"] == {"duplicate_image": 5}
    texts = {text for record in filters.open_source(str(out)) for text in record.texts}
    assert texts == {f"caption {k} of {n}" for k in range(5) for n in range(3)}


def test_one_file_in_two_splits_is_a_duplicate(tmp_path):
    (tmp_path / "data").mkdir()
    for n in range(2):
        (tmp_path / f"data/{n}.jpg").write_bytes(encode(n))
    named = [(0, "train"), (0, "train"), (1, "train"), (1, "test"), (1, "test")]
    rows = [dict(file_name=f"{n}.jpg", text=f"{k}", split=s) for k, (n, s) in enumerate(named)]
    write_rows(tmp_path / "data", rows)
    left_out, kept = by_field(tmp_path / "data", tmp_path / "out", dedup="content")
    assert len(kept["train"]) == 2 and len(kept["test"]) == 2
    assert list(left_out["train"].values()) == ["duplicate_image"] and not left_out["test"]


@pytest.fixture
def pairs(tmp_path):
    """Pairs of files: of six pictures, and of two of them in other files, and of other bytes."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.jpg").write_bytes(encode(n, size=BIG))
    for n in (0, 1):
        (folder / f"copy{n}.jpg").write_bytes(encode(n, size=BIG))
        out = io.BytesIO()
        Image.open(io.BytesIO(encode(n, size=BIG))).save(out, "PNG")
        (folder / f"png{n}.png").write_bytes(out.getvalue())
    named = ["0 1", "0 2", "1 0", "copy0 copy1", "copy0 2", "png0 png1", "3 4", "5 3"]
    endings = {n: ".png" if n.startswith("png") else ".jpg" for row in named for n in row.split()}
    rows = [[one + endings[one] for one in row.split()] for row in named]
    told = [dict(left=left, right=right, text=f"{n}") for n, (left, right) in enumerate(rows)]
    write_rows(folder, told)
    return folder


def read_pairs(pairs, out, **options):
    done = import_data("imagefolder", pairs, out, image_field="left,right", **options)
    return done, [int(record.texts[0]) for record in filters.open_source(str(out))]


@pytest.mark.parametrize(
    ("mode", "kept", "quarantined"),
    [
        ("content", [0, 1, 2, 5, 6, 7], {"duplicate_image": 2}),
        ("perceptual", [0, 1, 2, 6, 7], {"duplicate_image": 2, "near_duplicate": 1}),
    ],
)
def test_pairs_are_duplicates_where_both_images_are(mode, kept, quarantined, pairs, tmp_path):
    """By the first alone, three quarters of them went, and with them a label."""
    done, there = read_pairs(pairs, tmp_path / "out", dedup=mode)
    assert there == kept and done["quarantined"] == quarantined


def test_a_pair_of_which_one_image_is_evaluated_on_is_left_out(pairs, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/a.jpg").write_bytes(encode(4, size=BIG))  # by its bytes
    Image.open(pairs / "2.jpg").save(tmp_path / "eval/b.png")  # by its look
    done, there = read_pairs(pairs, tmp_path / "out", exclude=(str(tmp_path / "eval"),))
    assert there == [0, 2, 3, 5, 7] and done["quarantined"] == {"in_evaluation": 3}


def test_pairs_that_are_evaluated_on_keep_both_images_out(pairs, tmp_path):
    read_pairs(pairs, tmp_path / "held")
    folder = tmp_path / "single"
    folder.mkdir()
    for n, number in enumerate((4, 7, 8)):  # the first only stands second there
        (folder / f"{n}.jpg").write_bytes(encode(number, size=BIG))
    write_rows(folder, [dict(file_name=f"{n}.jpg", text="x") for n in range(3)])
    out = tmp_path / "out"
    import_data("imagefolder", folder, out, exclude=(str(tmp_path / "held"),))
    assert reasons_of(out) == {"0.jpg": "in_evaluation"}


def test_pairs_near_each_other_are_so_over_both_images_together():
    bits = np.random.default_rng(0).integers(0, 2, (2, 2 * dedup.BITS), dtype=np.uint8)
    near, far = bits[0].copy(), bits[0].copy()
    near[[3, 90, 200, 300, 400, 500]] ^= 1
    far[[3, 90, 200, 300, 400, 500, 510]] ^= 1
    looks = [np.packbits(row).tobytes().hex() for row in (*bits, near, far)]
    found = [(0, n, f"k{n}", f"c{n}", look) for n, look in enumerate(looks)]
    single = [(0, 9, "k9", "c9", looks[0][: dedup.BITS // 4])]  # one of the images alone
    assert dedup.decide(found + single, "perceptual", 6, []) == {(0, 2): "near_duplicate: k0"}


@pytest.mark.parametrize("prepared_before", [False, True])
def test_a_holdout_of_pairs_is_refused(prepared_before, pairs, tmp_path):
    """By the first image alone, all that stood in the held-out pairs trained as well."""
    where, options = ("imagefolder", str(pairs)), Options(image_field="left,right")
    if prepared_before:
        read_pairs(pairs, tmp_path / "made")
        where, options = ("prepared", str(tmp_path / "made")), Options()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--holdout keeps no pairs of images apart.*'split'"):
        prepare_with_holdout(*where, str(out), 0.5, options=options, processes=1, progress=False)
    assert not out.exists()
