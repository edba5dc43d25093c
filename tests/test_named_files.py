"""Names of pictures in lists, and where the pictures are found."""

import unicodedata

from prepare_cases import import_data, reasons_of
from test_tables import pictures, texts_of

from coca_jax.data.sources import formats


def test_names_in_folders_below_and_with_the_other_form_of_accents(tmp_path):
    folder = pictures(tmp_path / "a", 3, unicodedata.normalize("NFD", "Müller {}.jpg"))
    for place in ("x", "y/z"):
        pictures(folder / place, 1, "twice.jpg")
    pictures(folder / "y/z", 1, "once.jpg")
    names = [*(f"Müller {i}.jpg" for i in range(3)), "once.jpg ", "twice.jpg", "y/once.jpg"]
    assert names[0] == unicodedata.normalize("NFC", names[0])
    (folder / "list.csv").write_text(
        "file_name,text\n" + "".join(f"{name},text {i}\n" for i, name in enumerate(names))
    )
    import_data("csv", folder, tmp_path / "out")
    assert texts_of(tmp_path / "out") == [[f"text {i}"] for i in range(4)]
    missing = {"twice.jpg": "missing_image", "y/once.jpg": "missing_image"}
    assert reasons_of(tmp_path / "out") == missing


def test_above_too_many_files_it_is_said_that_folders_below_are_not_looked_through(
    tmp_path, monkeypatch, caplog
):
    pictures(tmp_path / "a", 1, "here.jpg")
    pictures(tmp_path / "a/x", 1, "below.jpg")
    (tmp_path / "a/list.csv").write_text("file_name,text\nhere.jpg,one\nbelow.jpg,two\n")
    monkeypatch.setattr(formats, "_MOST_BELOW", 2)
    import_data("csv", tmp_path / "a", tmp_path / "out")
    assert texts_of(tmp_path / "out") == [["one"]]
    assert reasons_of(tmp_path / "out") == {"below.jpg": "missing_image"}
    (line,) = {record.getMessage() for record in caplog.records}
    assert line == (
        f"{tmp_path}/a and the folders below have more than 2 files; pictures that are named "
        "without their folders are looked for in no folder below: name them as FOLDER/PICTURE"
    )
