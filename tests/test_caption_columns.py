"""Columns of captions that are called other than the usual: read, or named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_cases import encode, import_data

from coca_jax.data import filters


def texts_of(out):
    return [one.texts for one in filters.open_source(str(out))]


@pytest.mark.parametrize("name", ["captions", "sentences", "comment"])
def test_captions_in_columns_of_other_usual_names(tmp_path, name):
    rows = [
        dict(image=encode(i), label=i, caption_en="en") | {name: [f"a {i}", f"the {i}"]}
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    result = import_data("parquet", tmp_path, tmp_path / "out")
    assert (result["with_text"], result["with_label"]) == (3, 3)
    assert texts_of(tmp_path / "out") == [(f"a {i}", f"the {i}") for i in range(3)]
    # A caption by its first name goes before it.
    pq.write_table(pa.Table.from_pylist([row | dict(text="x") for row in rows]), tmp_path / "b.pq")
    (tmp_path / "b.pq").rename(tmp_path / "a.parquet")
    import_data("parquet", tmp_path / "a.parquet", tmp_path / "text")
    assert texts_of(tmp_path / "text") == [("x",)] * 3


def test_the_keys_of_a_map_of_captions_are_no_captions(tmp_path):
    """Spark writes texts by language as maps, which Arrow gives as pairs."""
    texts = [[("de", "ein Hund"), ("en", "a dog")], [("en", "a cat")]]
    columns = dict(image=[encode(i) for i in range(2)], text=texts, size=[[("w", 3), ("h", 4)]] * 2)
    kinds = [
        (name, pa.map_(pa.string(), t)) for name, t in (("text", pa.string()), ("size", pa.int64()))
    ]
    schema = pa.schema([("image", pa.binary()), *kinds])
    pq.write_table(pa.table(columns, schema), tmp_path / "a.parquet")
    import_data("parquet", tmp_path / "a.parquet", tmp_path / "out")
    assert texts_of(tmp_path / "out") == [("ein Hund", "a dog"), ("a cat",)]
    extra = [json.loads(one.extra) for one in filters.open_source(str(tmp_path / "out"))]
    assert extra == [{"size": {"w": 3, "h": 4}}] * 2


@pytest.mark.parametrize("name", ["image_caption", "altText", "Description"])
def test_the_only_column_whose_name_ends_as_captions_do_is_read(tmp_path, name):
    fields = [{"file_name": f"{i}.jpg", name: f"a {i}", "context": "x"} for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in fields))
    rows = [",".join(fields[0]), *(",".join(one.values()) for one in fields)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    pq.write_table(pa.Table.from_pylist(fields), tmp_path / "a.parquet")
    for format in ("jsonl", "csv", "parquet"):
        import_data(format, tmp_path / f"a.{format}", tmp_path / format)
        assert texts_of(tmp_path / format) == [("a 0",), ("a 1",), ("a 2",)]
    # Of two such columns it is not known which one is meant.
    both = "".join(json.dumps(one | {"my_text": "x"}) + "\n" for one in fields)
    (tmp_path / "a.jsonl").write_text(both)
    with pytest.raises(ValueError, match=f"their fields are .*{name}.*name one with --text_field"):
        import_data("jsonl", tmp_path / "a.jsonl", tmp_path / "both")


@pytest.mark.parametrize("format", ["imagefolder", "jsonl", "json"])
def test_a_field_that_no_row_of_a_list_has_is_refused_with_those_there(tmp_path, format):
    rows = [dict(file_name=f"{i}.jpg", Beschreibung=f"Hund {i}", label="dog") for i in range(4)]
    rows[3]["rare"] = "Dackel"
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    path = tmp_path / ("metadata.jsonl" if format != "json" else "list.json")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if format == "json" else lines + "{\n")
    input = tmp_path if format == "imagefolder" else path
    there = r"it has \['file_name', 'Beschreibung', 'label', 'rare'\]"
    for slip in (dict(text_field="Beschreibnug"), dict(label_field="labl", text_field="rare")):
        name = slip.get("label_field") or slip["text_field"]
        with pytest.raises(ValueError, match=f"{input}: no field {name!r}; {there}"):
            import_data(format, input, tmp_path / "out", **slip)
    assert not (tmp_path / "out").exists()
    result = import_data(format, input, tmp_path / "few", text_field="rare")
    assert (result["written"], result["with_text"], result["with_label"]) == (4, 1, 4)
    if format == "imagefolder":
        path.unlink()
        (tmp_path / "metadata.csv").write_text("file_name,title\n0.jpg,a\n")
        with pytest.raises(ValueError, match=r"no field 'titel'; it has \['file_name', 'title'\]"):
            import_data(format, input, tmp_path / "out", text_field="titel")


def test_one_language_of_an_object_of_texts_is_named_with_a_dot(tmp_path):
    """A field that has the dot in its own name goes before it."""
    rows = [
        dict(file_name=f"{i}.jpg", text=dict(de=f"Hund {i}", ja=f"犬 {i}"), info=dict(a=dict(b=i)))
        for i in range(3)
    ]
    rows[2]["text.de"] = "wörtlich"
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("json", "jsonl"):
        named = dict(text_field="text.de", label_field="info.a.b")
        import_data(kind, tmp_path / f"a.{kind}", tmp_path / kind, **named)
        assert texts_of(tmp_path / kind) == [("Hund 0",), ("Hund 1",), ("wörtlich",)]
        first = next(iter(filters.open_source(str(tmp_path / kind))))
        assert first.labels == ("0",)
        assert json.loads(first.extra) == dict(text=dict(ja="犬 0"), info=dict(a={}))
    with pytest.raises(ValueError, match=r"no field 'text.fr'; it has \['file_name', 'text'"):
        import_data("jsonl", tmp_path / "a.jsonl", tmp_path / "fr", text_field="text.fr")
