"""The separator of a list is told by its first two lines, and each column has a name of its own."""

import csv

import pytest
from prepare_cases import encode, import_data

from coca_jax.data import filters
from coca_jax.data.sources import formats


@pytest.mark.parametrize(
    "header, row, columns",
    [
        ("image;caption (en, de)", "0.jpg;a dog, ein Hund", ["image", "caption (en, de)"]),
        ("image;caption (en, de)", "0.jpg;a dog", ["image", "caption (en, de)"]),
        ("image;caption (en, de)", "", ["image", "caption (en, de)"]),
        ("picture;caption (en, de)", "0;a dog", ["picture", "caption (en, de)"]),
        ("image|a, b;c", "0.jpg|1, 2, 3;4;5", ["image", "a, b;c"]),
        ("image,caption (a; b)", "0.jpg,a dog; a cat", ["image", "caption (a; b)"]),
        ("image,caption; all", "0.jpg,a dog, running; a cat", ["image", "caption; all"]),
        ('"image";"one, two"', '"0.jpg";"a, b; c"', ["image", "one, two"]),
        ("image\ta, b", "0.jpg\ta dog", ["image", "a, b"]),
        ("image,caption", '0.jpg,"a dog', ["image", "caption"]),
    ],
)
def test_columns_are_where_an_image_stands_apart(header, row, columns):
    way = formats.dialect(header, f"{row}\r\n")
    assert next(csv.reader([header], **way)) == columns


def test_lists_with_another_mark_in_the_name_of_a_column(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    path = tmp_path / "list.csv"

    def texts(out, **options):
        import_data("csv", path, tmp_path / out, **options)
        return [record.texts for record in filters.open_source(str(tmp_path / out))]

    path.write_text("image;caption (en, de)\n0.jpg;a dog, ein Hund\n1.jpg;a cat\n")
    assert formats.guess(str(tmp_path)) == "csv"
    assert texts("p", text_field="caption (en, de)") == [("a dog, ein Hund",), ("a cat",)]
    path.write_text("image,title,title\n0.jpg,a dog,a cat\n")
    with pytest.raises(ValueError, match="list.csv: two columns are called 'title'; rename one"):
        texts("q")
    path.write_text("image,title,,\n0.jpg,a dog,,\n")  # as spreadsheets leave empty columns
    assert texts("r") == [("a dog",)]


@pytest.mark.parametrize("mark", ["\t", ",", ";"])
def test_a_list_without_a_header_is_told_so(tmp_path, mark):
    """The row of the first picture was taken for the columns' names: it was lost, and they were
    said to have no caption."""
    for i in range(3):
        (tmp_path / f"{i}.JPG").write_bytes(encode(i))
    path = tmp_path / "list.csv"
    path.write_text("".join(f"{i}.JPG{mark}a dog {i}\n" for i in range(3)))
    assert formats.guess(str(tmp_path)) == "csv"
    with pytest.raises(ValueError, match="list.csv: its first line is the row of a picture, 0.JPG"):
        import_data("csv", path, tmp_path / "out", text_field="a dog 0")
    path.write_text(f"file_name{mark}text\n" + path.read_text())
    import_data("csv", path, tmp_path / "out")
    found = [record.texts for record in filters.open_source(str(tmp_path / "out"))]
    assert found == [("a dog 0",), ("a dog 1",), ("a dog 2",)]


@pytest.mark.parametrize(
    "table, kept",
    [
        # Each text in quotation marks of its own, whatever it says.
        ('image,title\n0.jpg,"a\nb"\n1.jpg,"see, c.jpg\nd"\n', {"0": "a b", "1": "see, c.jpg d"}),
        ('title,image\n"a\nb",0.jpg\n\n"c",1.jpg\n', {"0": "a b", "1": "c"}),
        ('title,image,x\n"a ""b""",0.jpg,"c\nd"\n', {"0": 'a "b"'}),
        # A lone one in front of a text ends at the next, which may be that of another row.
        ('image\ttitle\n0.jpg\t"a\n1.jpg\tof 5"\n2.jpg\tc\n', {"1": 'of 5"', "2": "c"}),
        ('image,title\n\n0.jpg,"a\n1.jpg,b\n2.jpg,of 5"\n', {"1": "b", "2": 'of 5"'}),
        (',image,title\n0,0.jpg,"a\n1,1.jpg,b, or 5" of it\n2,2.jpg,c\n', {"2": "c"}),
        ('title\timage\n"a\t0.jpg\nof 5"\t1.jpg\nc\t2.jpg\n', {"1": 'of 5"', "2": "c"}),
        ('image,title\n\n0.jpg,"a\n1.jpg,b\n', {"1": "b"}),
    ],
)
def test_a_lone_quotation_mark_in_front_of_a_text_takes_no_other_row(table, kept, tmp_path):
    count = table.count(".jpg") - table.count("c.jpg")
    for i in range(count):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    (tmp_path / "list.csv").write_text(table)
    done = import_data("csv", tmp_path / "list.csv", tmp_path / "out")
    found = {one.key[0]: one.texts[0] for one in filters.open_source(str(tmp_path / "out"))}
    assert found == kept and done["read"] == count
    assert done["quarantined"] == ({"bad_record": count - len(kept)} if len(kept) < count else {})
