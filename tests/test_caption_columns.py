"""Columns of captions that are called other than the usual: read, or named."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_cases import encode, import_data

from coca_jax.data import sources


def texts_of(out):
    return [one.texts for one in sources.open_source(str(out))]


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


def test_columns_like_captions_that_are_not_read_are_named(tmp_path, capsys):
    rows = [
        dict(image=encode(i), label="cat", caption_en=f"a cat {i}", alt_text=["x"], text_size=3)
        for i in range(3)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    import_data("parquet", path, tmp_path / "out")
    line = (
        f"{path}: it has class names alone; not read as captions: its fields alt_text, caption_en "
        "(`coca-jax prepare --text_field=alt_text` reads one)\n"
    )
    assert capsys.readouterr().err.count(line) == 1
    import_data("parquet", path, tmp_path / "named", text_field="caption_en")
    pq.write_table(pa.Table.from_pylist([dict(image=encode(0), label="cat", texture=3)]), path)
    import_data("parquet", path, tmp_path / "none")
    assert "not read" not in capsys.readouterr().err
