"""Tables of texts as people have them: loose separators and quotes, names of other folders, dicts
in cells, a field that tells the split, tables that are not read."""

import csv
import json

import pytest
from prepare_cases import encode, import_data, reasons_of

from coca_jax.data import formats, sources
from coca_jax.importers import lines, unprepared


def pictures(folder, count, name="{}.jpg"):
    """A folder of `count` pictures; returns it."""
    for i in range(count):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i))
    return folder


def texts_of(out, split="train"):
    return [list(record.texts) for record in sources.open_source(str(out), split)]


def test_a_text_with_a_comma_and_no_quotes_is_not_cut(tmp_path):
    folder = pictures(tmp_path / "a", 3)
    (folder / "metadata.csv").write_text(
        'file_name,text\n0.jpg,a dog, running\n1.jpg,"a cat, asleep"\n2.jpg,a bird,,\n'
    )
    result = import_data("imagefolder", folder, tmp_path / "out")
    assert result["quarantined"] == {"bad_record": 1}
    assert texts_of(tmp_path / "out") == [["a cat, asleep"], ["a bird"]]
    assert reasons_of(tmp_path / "out") == {"metadata.csv#0": "bad_record"}
    rows = list(lines.csv_rows(str(folder / "metadata.csv")))
    assert isinstance(rows[0], csv.Error)
    assert str(rows[0]) == "more cells than columns; quote texts with commas"
    (folder / "list.tsv").write_text("file_name\ttext\n0.jpg\ta dog\trunning\n")
    (row,) = lines.csv_rows(str(folder / "list.tsv"))
    assert str(row) == "more cells than columns; quote texts with tabs"


def test_a_space_behind_the_separator_is_no_part_of_names_and_quotes(tmp_path):
    folder = pictures(tmp_path / "a", 2)
    rows = '0.jpg, "a dog, running"\n1.jpg, a "cat" \n'
    (folder / "metadata.csv").write_text("file_name, text\n" + rows)
    import_data("imagefolder", folder, tmp_path / "out")
    assert texts_of(tmp_path / "out") == [["a dog, running"], ['a "cat"']]
    (folder / "metadata.csv").rename(folder / "list.csv")
    assert formats.guess(str(folder)) == "csv"
    import_data("csv", folder, tmp_path / "out2", text_field="text")
    assert texts_of(tmp_path / "out2") == texts_of(tmp_path / "out")
    # Without it a name may begin with a space.
    (folder / "1.jpg").rename(folder / " 1.jpg")
    (folder / "list.csv").write_text("file_name,text\n 1.jpg,a cat\n")
    import_data("csv", folder, tmp_path / "out3")
    assert texts_of(tmp_path / "out3") == [["a cat"]]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_whose_first_pictures_are_gone_is_read(tmp_path, kind):
    for name in ("cat", "dog"):
        pictures(tmp_path / "a" / name, 4)
    folder = tmp_path / "a"
    (folder / "cat/0.jpg").unlink()
    rows = [(f"{name}/{i}.jpg", f"a nice {name} {i}") for name in ("cat", "dog") for i in range(4)]
    if kind == "csv":
        text = "img,caption\n" + "".join(f"{file},{text}\n" for file, text in rows)
    else:
        text = "".join(json.dumps(dict(img=file, caption=text)) + "\n" for file, text in rows)
    table = folder / f"captions.{kind}"
    table.write_text(text)
    assert formats.guess(str(folder)) == kind
    result = import_data(kind, folder, tmp_path / "out")
    assert (result["written"], result["quarantined"]) == (7, {"missing_image": 1})
    # Evaluation reads the table as training does, and not the names of the folders.
    table.write_text("".join(line for line in text.splitlines(True) if "cat/0" not in line))
    read = unprepared.open_source(dict(path=str(folder)), "test")
    assert [record.texts[0] for record in read] == [text for _, text in rows[1:]]
    # Pictures of which none of the first hundred rows names one are no matter of the table.
    table.write_text("img,caption\n" + "".join(f"none {i}.jpg,x\n" for i in range(100)) + text)
    assert kind == "jsonl" or formats.guess(str(folder)) == "imagefolder"
