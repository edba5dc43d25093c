"""Views of data: which records are examples, and the file that remembers it."""

import itertools
import json
import os
import re
import threading
import types

import numpy as np
import pytest
from data_cases import write_data

from coca_jax.config import Entry
from coca_jax.data import filters
from coca_jax.data.filters import Indexes
from coca_jax.data.prepare import prepare
from coca_jax.data.sources import fields
from coca_jax.data.sources.items import Options
from coca_jax.runtime import activity


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


@pytest.fixture
def scans(monkeypatch):
    """Counts how often all records are read for an index."""
    found, scan = [], filters.View.scan

    def counted(self):
        found.append(self.source.name)
        return scan(self)

    monkeypatch.setattr(filters.View, "scan", counted)
    return found


def keys(source):
    return [(r.key, r.texts) for r in source]


def test_an_index_is_made_once_and_lies_beside_the_data(data, scans):
    entries = [
        dict(path=str(data / "a"), where={"group": 1}),
        dict(path=str(data / "a"), captions="all"),
        dict(path=str(data / "a"), kind="question"),
    ]
    first = [keys(filters.open_source(entry)) for entry in entries]
    assert len(scans) == 3 and len(list((data / "a" / "views").iterdir())) == 3
    assert [keys(filters.open_source(entry)) for entry in entries] == first
    assert len(scans) == 3
    assert [len(found) for found in first] == [11, 46, 46]
    filters.open_source(dict(entries[0], where={"group": 0}))  # another view
    assert len(scans) == 4
    filters.open_source(dict(path=str(data / "a"), limit=3))  # this one needs no look
    assert len(scans) == 4


def test_each_view_of_data_has_a_fingerprint_of_its_own(data):
    """Kept tokens are found by it, of two views with equally many rows as well."""
    a = dict(path=str(data / "a"))
    entries = [
        *(a, dict(a, limit=3), dict(a, limit=4), dict(a, where={"group": 1}, limit=3)),
        *(dict(a, where={"group": 0}, limit=3), dict(a, captions="all"), dict(a, kind="question")),
        *(dict(path=str(data / "b")), dict(path=str(data / "b"), limit=3)),
    ]
    found = [filters.open_source(entry).fingerprint for entry in entries]
    assert all(found) and len(set(found)) == len(found)
    assert [filters.open_source(entry).fingerprint for entry in entries] == found
    # A limit alone chooses the same images, whatever is made of them, and one that cuts nothing
    # leaves the data as they are.
    other = filters.open_source(dict(a, limit=3, text_field="caption")).fingerprint
    assert other == found[1]
    assert filters.open_source(dict(a, limit=10**6)).fingerprint == found[0]


def test_answers_are_kept_with_the_index(data, scans):
    entry = dict(path=str(data / "a"), kind="question")
    for _ in range(2):
        assert filters.open_source(entry).labels() == ["blue", "green", "red", "square"]
    assert len(scans) == 1


@pytest.mark.parametrize("harm", ["cut", "empty", "rows"])
def test_a_damaged_index_is_made_anew(data, scans, harm):
    entry = dict(path=str(data / "a"), where={"group": 1})
    want = keys(filters.open_source(entry))
    (file,) = (data / "a" / "views").iterdir()
    content = bytearray(file.read_bytes())
    if harm == "cut":
        content = content[: len(content) // 2]
    elif harm == "empty":
        content = b""
    else:
        with np.load(file) as arrays:
            kept = dict(arrays)
        kept["rows"] = kept["rows"] + 20
        np.savez(file, **kept)
        content = file.read_bytes()
    file.write_bytes(content)
    assert keys(filters.open_source(entry)) == want
    assert len(scans) == 2
    assert keys(filters.open_source(entry)) == want and len(scans) == 2


def test_no_flipped_byte_of_an_index_goes_unseen(data):
    entry = dict(path=str(data / "a"), where={"group": 1})
    source = filters.open_source(str(data / "a"))
    want = keys(filters.open_source(entry))
    (file,) = (data / "a" / "views").iterdir()
    content = file.read_bytes()
    view = filters.View(source, Entry.of(entry), source.kind, False)
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 0x55
        try:
            found = filters._decode(bytes(flipped), view.mark(), len(source))
        except ValueError:
            continue
        assert found is None or keys(view.select(found)) == want, place


def test_other_data_of_the_same_name_get_an_index_of_their_own(data, scans):
    entry = dict(path=str(data / "a"), where={"group": 1})
    filters.open_source(entry)
    manifest = json.loads((data / "b" / "manifest.json").read_text())
    os.rename(data / "a" / "views", data / "b" / "views")
    found = filters.open_source(dict(entry, path=str(data / "b")))
    assert len(scans) == 2 and len(found) == manifest["splits"]["train"]["count"] // 2


def test_data_that_cannot_be_written_are_remembered_in_the_workdir(data, scans, monkeypatch):
    write = filters._write
    monkeypatch.setattr(
        filters, "_write", lambda folder, *rest: "run" in folder and write(folder, *rest)
    )
    entry = dict(path=str(data / "a"), where={"group": 1})
    for _ in range(2):
        filters.open_source(entry, indexes=Indexes(str(data / "run")))
    assert len(scans) == 1 and len(list((data / "run" / "views").iterdir())) == 1
    for _ in range(2):  # nowhere: made each time
        filters.open_source(entry)
    assert len(scans) == 3


def test_other_processes_wait_for_the_first(data, scans):
    """Their data may lie on disks of their own: the workdir is what they share."""
    entry, workdir = dict(path=str(data / "a"), where={"group": 1}), str(data / "run")
    found = []
    second = threading.Thread(
        target=lambda: found.append(
            keys(filters.open_source(entry, indexes=Indexes(workdir, 1, 2)))
        )
    )
    second.start()
    second.join(0.3)
    assert second.is_alive() and not scans
    want = keys(filters.open_source(entry, indexes=Indexes(workdir, 0, 2)))
    second.join(60)
    assert found == [want] and len(scans) == 1
    (file,) = (data / "a" / "views").iterdir()
    (copy,) = (data / "run" / "views").iterdir()
    assert file.read_bytes() == copy.read_bytes()
    copy.unlink()  # a later run has another workdir, and the file beside the data
    filters.open_source(entry, indexes=Indexes(workdir, 0, 2))
    assert copy.exists() and len(scans) == 1


def test_other_processes_wait_for_hours_where_the_first_reads_so_long(data, monkeypatch):
    """As a billion records take: the clock goes on by five hours at each look."""
    entry, workdir = dict(path=str(data / "a"), where={"group": 1}), str(data / "run")
    clock, want = itertools.count(0.0, 5 * 3600.0), []

    def sleep(_):
        want.append(keys(filters.open_source(entry, indexes=Indexes(workdir, 0, 2))))

    stand_in = types.SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep)
    monkeypatch.setattr(activity, "time", stand_in)
    found = keys(filters.open_source(entry, indexes=Indexes(workdir, 1, 2)))
    assert [found] == want


def test_a_damaged_record_is_named_where_all_must_be_read(data):
    shard = data / "a" / "train-00000-of-00001.array_record"
    content = bytearray(shard.read_bytes())
    place = content.index((data / "raw" / "a" / "0009.png").read_bytes()) + 20
    content[place : place + 4] = bytes(4)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read .* prepare it again"):
        filters.open_source(dict(path=str(data / "a"), where={"group": 1}))


def test_texts_of_fields_hold_no_half_characters(tmp_path):
    from coca_jax.data.sources.records import Record
    from coca_jax.data.sources.source import Source

    record = Record(b"", (), (), "k", json.dumps(dict(alt="caf\ud83d", qa=[])))
    source = Source("odd", 1, lambda indices: [record] * len(indices))
    found = filters.narrow(source, Entry(text_field="alt"))
    assert found.read([0])[0].texts == ("caf?",)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        (dict(year=2020), 2),
        (dict(year=[2020, "2021"]), 3),
        (dict(year=20), 0),
        (dict(good=True), 2),
        (dict(good="True"), 2),
        (dict(good=False), 1),
        (dict(share=1), 3),
        (dict(name="true north"), 1),
        (dict(note=None), 2),
        (dict(note=(None, "x")), 3),
        (dict(note={"a": 1}), 0),
        (dict(year={2020, 2021}), 3),
    ],
)
def test_values_select_as_they_are_spelled_in_lists(where, count):
    rows = [
        dict(year="2020", good="true", share=1.0, name="true north"),
        dict(year=2020, good=True, share=1.0, name="True North", note=None),
        dict(year="2021", good="FALSE", share=1, name="", note="x"),
    ]
    assert sum(fields.selected(where, row, (), ()) for row in rows) == count


def test_a_field_that_is_named_and_gives_nothing_is_in_the_message(data):
    def open_as(**given):
        return filters.open_source(dict(path=str(data / "a"), **given), training=True)

    says = "no record has a {0}; give the other kind, or --{0}_field=.*; {0}_field=.nope. gives no"
    for kind, wanted in (("caption", "text"), ("label", "label")):
        with pytest.raises(ValueError, match=says.format(wanted)):
            open_as(kind=kind, **{f"{wanted}_field": "nope"})


def test_labels_and_texts_select_records_and_what_none_has_is_named(data, tmp_path):
    def select(**where):
        return filters.open_source(dict(path=str(data / "a"), where=where))

    assert len(select(label="red")) == 8 and len(select(label=["red", "blue"])) == 15
    assert [r.key for r in select(text="number 4")] == ["0004.png"]
    assert len(select(label="red", group=0)) == 4
    for where, says in (
        (dict(gruop=1), "no field is called 'gruop': group, label, text"),
        (dict(label=("ret", "x")), "'label': ('ret', 'x')}; 'label' is red, green, square, blue"),
        (dict(group=7), "'group' is 0, 1"),
        (dict(group=None), "{'group': None}; 'group' is 0, 1"),
        (dict(text="number 33"), "'text' is number 3, number 13"),
    ):
        with pytest.raises(ValueError, match="no record has .*" + re.escape(says)):
            select(**where)
    # `prepare` selects by the same.
    options = Options(where=(("label", ("green",)), ("group", ("1",))))
    out = str(tmp_path / "selected")
    prepare("imagefolder", str(data / "raw/a"), out, options=options, progress=False)
    assert {r.key for r in filters.open_source(out)} == {f"{i:04d}.png" for i in (1, 7, 13, 19)}


def test_prepared_data_have_the_images_that_they_were_prepared_with(data):
    place = dict(path=str(data / "a"), split="train")
    file = data / "a" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"]["request"] = dict(options=dict(image_field="left,right"))
    file.write_text(json.dumps(manifest))
    whole = len(filters.open_source(place))
    assert len(filters.open_source(place | dict(image_field="left,right"))) == whole > 0
    line = "it was prepared with image_field='left,right', not 'zzz'; leave that out, or prepare"
    with pytest.raises(ValueError, match=line):
        filters.open_source(place | dict(image_field="zzz"))
