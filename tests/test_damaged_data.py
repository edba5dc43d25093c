"""Training on data that nobody has checked: the index, and what stands in for damaged images."""

import dataclasses
import io
import json
import logging
import random
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_config
from data_cases import data_config, equal, picture
from PIL import Image

from coca_jax.checkpoints import manager
from coca_jax.config import typed
from coca_jax.data import order, source_index
from coca_jax.data.batches import open_stream
from coca_jax.data.evaluation_data import Records
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import prepare
from coca_jax.data.quarantine import Quarantine
from coca_jax.data.sources import in_place, manifest
from coca_jax.data.sources.items import Options
from coca_jax.data.sources.source import read_all
from coca_jax.runtime.metric_log import read_metrics
from coca_jax.training import run_vocabulary, trainer

DAMAGED = (3, 4, 20)


def encoded(index):
    out = io.BytesIO()
    Image.fromarray(picture(index)).save(out, "PNG")
    return out.getvalue()


def pictures(count, damaged=DAMAGED):
    return [b"no picture at all" if n in damaged else encoded(n) for n in range(count)]


def write_tars(path, images):
    path.mkdir()
    for first in range(0, len(images), 20):
        with tarfile.open(path / f"{first:05d}.tar", "w") as archive:
            for n, image in list(enumerate(images))[first : first + 20]:
                for suffix, data in (("png", image), ("txt", b"picture %d" % n)):
                    info = tarfile.TarInfo(f"{n:06d}.{suffix}")
                    info.size, info.mtime = len(data), n + 0.5  # which takes a header of its own
                    archive.addfile(info, io.BytesIO(data))


def write_parquet(path, images, **how):
    path.mkdir()
    column = pa.array([dict(bytes=one, path=None) for one in images])
    texts = [f"picture {n}" for n in range(len(images))]
    table = pa.table({"image": column, "text": texts})
    pq.write_table(table, path / "a.parquet", **how)


def write_images(path, images):
    path.mkdir()
    rows = []
    for n, image in enumerate(images):
        (path / f"{n:04d}.png").write_bytes(image)
        rows.append(json.dumps(dict(file_name=f"{n:04d}.png", text=f"picture {n}")) + "\n")
    (path / "metadata.jsonl").write_text("".join(rows))


WAYS = {
    "tars": write_tars,
    "parquet": write_parquet,
    "folder": write_images,
}


def indexed(path, workdir, batch=8, **data):
    """The config of a run on the data, as `train` reads them, and its vocabulary."""
    config = data_config(dict(path=str(path)), batch=batch, max_bad_fraction=0.5, **data)
    config = source_index.of_sources(typed(config), str(workdir))
    return config, run_vocabulary.load_or_train(config, str(workdir))


def batches(config, vocabulary, count=12, **how):
    stream = open_stream(config, vocabulary, **how)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_index_is_made_without_an_image_and_damage_is_found_by_training(tmp_path, way):
    WAYS[way](tmp_path / "data", pictures(30))
    config, vocabulary = indexed(tmp_path / "data", tmp_path / "run")
    split = manifest.read(config.data.sources[0].path)["splits"]["train"]
    assert (split["count"], split["quarantined"]) == (30, {})
    found = batches(config, vocabulary, 15, quarantine=(quarantine := Quarantine()))
    seen = np.concatenate([one["index"] for one in found])
    assert set(seen.tolist()) == set(range(30)) - set(DAMAGED)
    assert [row.index for row in quarantine.rows()] == list(DAMAGED)
    assert {row.reason for row in quarantine.rows()} == {"unreadable_image"}
    # Every other example is where the order has it.
    wanted = order.indices(np.arange(120), 30, config.seed, 0)
    assert all(a == b for a, b in zip(seen.tolist(), wanted.tolist()) if b not in DAMAGED)
    # In the place of a damaged one is that of the same place in the next epoch.
    for at in np.flatnonzero(np.isin(wanted, DAMAGED)).tolist():
        following = order.indices(at + 30 * np.arange(1, 9), 30, config.seed, 0).tolist()
        assert seen[at] == next(index for index in following if index not in DAMAGED)


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_batch_is_the_same_on_two_hosts_and_after_a_resume(tmp_path, way):
    WAYS[way](tmp_path / "data", pictures(30))
    config, vocabulary = indexed(tmp_path / "data", tmp_path / "run")
    whole = batches(config, vocabulary)
    parts = [batches(config, vocabulary, process_index=p, process_count=2) for p in (0, 1)]
    for one, *halves in zip(whole, *parts):
        both = {name: np.concatenate([half[name] for half in halves]) for name in one}
        assert equal(one, both)
    resumed = batches(config, vocabulary, 5, start_step=7)
    assert all(equal(a, b) for a, b in zip(resumed, whole[7:]))


def test_a_repaired_file_stays_out_of_the_run_whose_checkpoint_has_it(tmp_path, caplog):
    images = [one.ljust(len(encoded(n))) for n, one in enumerate(pictures(30))]
    write_tars(tmp_path / "tars", images)  # damaged, with room for what they were
    config, vocabulary = indexed(tmp_path / "tars", tmp_path / "run")
    before = batches(config, vocabulary, quarantine=(quarantine := Quarantine()))
    shutil.rmtree(tmp_path / "tars")
    write_tars(tmp_path / "tars", pictures(30, ()))
    recorded = json.loads(json.dumps([dataclasses.astuple(one) for one in quarantine.rows()]))
    logging.getLogger("absl").propagate = True
    with caplog.at_level("WARNING"):
        after = batches(config, vocabulary, quarantine=Quarantine(recorded=recorded))
    assert all(equal(a, b) for a, b in zip(before, after))
    assert sum("can be read now" in line for line in caplog.messages) == 3
    other = batches(config, vocabulary)
    assert not all(equal(a, b) for a, b in zip(before, other))


def test_a_run_of_damaged_data_stops_with_the_counts_and_the_list(tmp_path):
    write_tars(tmp_path / "data", pictures(400, range(0, 400, 10)))
    config, vocabulary = indexed(tmp_path / "data", tmp_path / "run")
    config = config.change({"data.max_bad_fraction": 0.05})
    quarantine = Quarantine(str(tmp_path / "run"))
    stream = open_stream(config, vocabulary, quarantine=quarantine)
    with pytest.raises(ValueError) as error:
        for _ in range(50):
            next(stream)
    assert stream.step in (11, 12)  # after 100 images, of which a tenth is damaged
    stream.close()
    listed = tmp_path / "run" / "quarantine.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    line = str(error.value)
    assert f"({len(rows)} unreadable_image)" in line and str(listed) in line
    assert "data.max_bad_fraction=0.05" in line and "\n" not in line
    assert rows[0]["key"].endswith(f"{rows[0]['index']:06d}") and rows[0]["source"] == 0
    # A tenth that is allowed goes on; the images read before a resume count.
    config = config.change({"data.max_bad_fraction": 0.2})
    batches(config, vocabulary, 50)


def test_what_is_gone_or_changed_is_damage_too(tmp_path):
    write_images(tmp_path / "data", pictures(30, ()))
    config, vocabulary = indexed(tmp_path / "data", tmp_path / "run")
    (tmp_path / "data" / "0003.png").unlink()
    (tmp_path / "data" / "0004.png").write_bytes(encoded(4) + b"longer")
    batches(config, vocabulary, 15, quarantine=(quarantine := Quarantine()))
    reasons = {row.index: row.reason for row in quarantine.rows()}
    assert reasons == {3: "missing_image", 4: "changed_file"}


@pytest.mark.parametrize(
    "how",
    [
        dict(row_group_size=7, data_page_size=100, write_batch_size=2),
        dict(use_dictionary=False, compression="zstd", data_page_version="2.0"),
        dict(compression="none", data_page_size=4000, write_batch_size=3),
        dict(use_dictionary=False, column_encoding={"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}),
    ],
)
def test_pages_of_any_writer_give_the_images_of_the_rows(tmp_path, how):
    """The last is read with its images, as its pages do not tell the places of values."""
    images = [encoded(n % 25) for n in range(60)]
    write_parquet(tmp_path / "data", images, **({"column_encoding": None} | how))
    config, _ = indexed(tmp_path / "data", tmp_path / "run")
    (source,) = Mixture(config).sources
    assert [one.image for one in source] == images
    assert [one.texts for one in source] == [(f"picture {n}",) for n in range(60)]


def test_damaged_references_and_pages_cause_errors_and_nothing_else(tmp_path):
    images = [encoded(n % 25) for n in range(60)]
    write_parquet(tmp_path / "data", images, compression="none", data_page_size=2000)
    config, _ = indexed(tmp_path / "data", tmp_path / "run")
    (source,) = Mixture(config).sources
    rng, file = random.Random(0), tmp_path / "data" / "a.parquet"
    root, records = str(tmp_path / "data"), source._read._index(range(60))
    whole, caught = file.read_bytes(), 0
    for _ in range(1500):
        damaged = bytearray(rng.choice(records).image)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'0123456789-,[]"ae')
        one = records[0]._replace(image=bytes(damaged))
        try:
            in_place.InPlace(lambda _, one=one: [one], root)([0])
        except (ValueError, OSError):
            caught += 1
    assert caught > 500
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[rng.randrange(len(damaged) - 2000)] = rng.randrange(256)
        file.write_bytes(damaged)
        found, unread = read_all(Mixture(config).sources[0], np.arange(60))
        assert len(found) == 60 and {p.reason for p in unread.values()} <= {"damaged_record"}


def test_rows_without_texts_or_labels_are_listed_as_in_a_checked_index(tmp_path):
    """Also of a parquet table whose batches are read column by column."""
    images = [encoded(n) for n in range(12)]
    texts = [
        None if n == 2 else "\ufffd" if n == 5 else "  " if n == 7 else f"no. {n}"
        for n in range(12)
    ]
    extra = [dict(width=n) for n in range(12)]
    table = pa.table({"image": images, "caption": texts, "meta": extra})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    told, records = [], []
    for check in (True, False):
        out = str(tmp_path / f"out{check}")
        options = Options(in_place=True, check=check)
        prepare("parquet", str(tmp_path / "data"), out, options=options, progress=False)
        told.append((tmp_path / f"out{check}" / "train-quarantine.jsonl").read_text())
        source = Mixture(typed(data_config(dict(path=out)))).sources[0]
        records.append(list(source))
    assert told[0] == told[1] and told[0].count("\n") == 3
    assert records[0] == records[1] and len(records[0]) == 9


def test_evaluation_leaves_out_what_cannot_be_read(tmp_path):
    write_tars(tmp_path / "data", pictures(30))
    config, _ = indexed(tmp_path / "data", tmp_path / "run")
    data = dict(path=config.data.sources[0].path, split="train", kind="caption")
    records = Records(data)
    assert (len(records), records.damaged) == (27, 3)
    assert [one["key"][-2:] for one in records][:5] == ["00", "01", "02", "05", "06"]
    assert len(Records(data, limit=4)) == 4


def test_an_index_without_checks_refuses_what_needs_every_image(tmp_path):
    write_tars(tmp_path / "data", pictures(30))
    for options in (dict(dedup="content"), dict(min_side=20), dict(exclude=("x",))):
        options = Options(in_place=True, check=False, **options)
        with pytest.raises(ValueError, match="--nocheck reads none"):
            prepare("webdataset", str(tmp_path / "data"), str(tmp_path / "out"), options=options)


def test_a_run_ends_alike_when_it_is_cut_short_and_a_file_is_repaired(tmp_path):
    def config(steps):
        found = tiny_config()
        found.steps, found.data.max_bad_fraction = steps, 0.5
        found.model.text.vocab_size, found.model.text.max_len = 400, 16
        found.checkpoint.every_steps, found.log.every_steps = 2, 1
        found.data.sources = (dict(path=str(tmp_path / "data")),)
        return found

    images = [one.ljust(len(encoded(n))) for n, one in enumerate(pictures(30))]
    write_tars(tmp_path / "data", images)
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    trainer.train(config(6), whole)
    rows = [json.loads(n) for n in (tmp_path / "whole" / "quarantine.jsonl").open()]
    assert [row["index"] for row in rows] == list(DAMAGED)
    shutil.copytree(whole, cut)
    for step in manager.Checkpoints(cut).steps():
        if step > 4:
            shutil.rmtree(f"{cut}/checkpoints/{step}")
    shutil.rmtree(tmp_path / "data")
    write_tars(tmp_path / "data", pictures(30, ()))
    trainer.train(config(6), cut)
    assert [row["loss"] for row in read_metrics(cut)] == [
        row["loss"] for row in read_metrics(whole)
    ]
    assert (tmp_path / "cut" / "quarantine.jsonl").read_text() == (
        tmp_path / "whole" / "quarantine.jsonl"
    ).read_text()


def test_an_index_of_tars_without_checks_is_that_with_them(tmp_path):
    """Whatever stands beside the images; by another reference, as no checksum is known."""
    told = json.dumps(dict(caption="of json", label=["a", "b"], url="x")).encode()
    beside = [
        {"txt": b"plain"},
        {"txt": "utf-16".encode("utf-16")},
        {"txt": b"both", "json": told},
        {"json": told},
        {"cls": b"dog"},
        {"txt": b" "},
        {"txt": b"caf\xe9"},
        {"txt": b"", "json": b'{"recaption": {"captions": []}, "caption": "no"}'},
        {"txt": b"x", "json": b"{"},
        {"txt": b"x", "json": b'{"deep": {"ones": [1, {"a": null}]}, "caption": "c"}'},
        {"txt": b"two", "jpg": encoded(1)},
    ]
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as archive:
        for n, members in [*enumerate(beside), (3, {"txt": b"again"})]:
            for suffix, data in {"png": encoded(n), **members}.items():
                info = tarfile.TarInfo(f"some/{n}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    listed, records = [], []
    for check in (True, False):
        out = tmp_path / f"out{check}"
        options = Options(in_place=True, check=check)
        prepare("webdataset", str(tmp_path / "data"), str(out), options=options, progress=False)
        listed.append((out / "train-quarantine.jsonl").read_text())
        records.append(list(Mixture(typed(data_config(dict(path=str(out))))).sources[0]))
    assert listed[0] == listed[1] and listed[0].count("\n") == 5
    assert records[0] == records[1] and len(records[0]) == 6  # one has a label alone
