"""Names of pictures in lists, and where the pictures are found."""

from prepare_cases import import_data, reasons_of
from test_tables import pictures, texts_of

from coca_jax.data.sources import formats


def test_a_name_without_a_folder_is_found_below_unless_several_have_it(tmp_path):
    folder = pictures(tmp_path / "a", 1, "Müller.jpg")
    for place in ("x", "y/z"):
        pictures(folder / place, 1, "twice.jpg")
    pictures(folder / "y/z", 1, "once.jpg")
    names = ["Müller.jpg", "once.jpg", "twice.jpg", "y/once.jpg", r"x\twice.jpg"]
    (folder / "list.csv").write_text(
        "file_name,text\n" + "".join(f"{name},text {i}\n" for i, name in enumerate(names))
    )
    import_data("csv", folder, tmp_path / "out")
    assert texts_of(tmp_path / "out") == [["text 0"], ["text 1"]]
    assert reasons_of(tmp_path / "out") == dict.fromkeys(names[2:], "missing_image")


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
    assert line.startswith(f"{tmp_path}/a: more than 2 files")
