"""Files by their names: hidden ones are not read, each image has a key of its own, and lists name
images as they are spelled."""

import tarfile

import fsspec
import pytest
from prepare_cases import encode, import_data, reasons_of
from test_tables import pictures, texts_of

from coca_jax.data import filters
from coca_jax.data.sources import files, formats, image_folder, lists
from coca_jax.data.sources.items import Options

HIDDEN = (".ipynb_checkpoints/0", "__MACOSX/0", ".hid", "._0")


@pytest.fixture
def folder(tmp_path):
    """Two pictures with a text beside each, and hidden ones."""
    for number, name in enumerate(("0", "1", *HIDDEN)):
        picture = tmp_path / "a" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(encode(number))
        picture.with_name(f"{picture.stem}.txt").write_text(f"text of {name}")
    return tmp_path / "a"


def texts(format, input, out, **options):
    """{key: texts} of what is imported."""
    import_data(format, input, out, **options)
    return {record.key: record.texts for record in filters.open_source(str(out))}


@pytest.mark.parametrize("pattern", ["*.jpg", "**/*.jpg", "[0-9]*", "{0,1}.jp?", "?.jpg"])
def test_a_pattern_names_hidden_files_only_behind_a_dot(pattern, folder):
    def found(pattern):
        names = files.find(str(folder / pattern), ("*.jpg",))
        return {name.removeprefix(f"{folder}/") for name in names if name.endswith(".jpg")}

    assert found(pattern) == {"0.jpg", "1.jpg"}
    assert found(".h*.jpg") == {".hid.jpg"} and found(".ipynb*/*") == {".ipynb_checkpoints/0.jpg"}
    below = folder / ".ipynb_checkpoints"  # which the user names
    assert files.find(f"{below}/*.jpg", ()) == [f"{below}/0.jpg"]


def test_a_pattern_in_a_bucket_names_no_hidden_files():
    system = fsspec.filesystem("memory")
    for name in ("0.jpg", ".1.jpg", ".d/2.jpg"):
        system.pipe_file(f"/hidden/{name}", b"")
    try:
        assert files.find("memory://hidden/**/*.jpg", ()) == ["memory://hidden/0.jpg"]
    finally:
        system.rm("/hidden", recursive=True)


def test_hidden_files_are_not_read_from_a_folder_a_pattern_or_a_tar(folder, tmp_path):
    wanted = {"0": ("text of 0",), "1": ("text of 1",)}
    assert texts("sidecars", folder, tmp_path / "of folder") == wanted
    assert texts("sidecars", folder / "*.jpg", tmp_path / "of pattern") == wanted
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, ".")
    found = texts("webdataset", tmp_path / "a.tar", tmp_path / "of tar")
    assert found == {f"a.tar/{key}": told for key, told in wanted.items()}


def test_pictures_of_one_stem_have_keys_of_their_own(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "a.png", "b.jpg", "a.jpg.jpeg")):
        (folder / name).write_bytes(encode(number))
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    (folder / "a.jpg.txt").write_text("three")
    assert texts("sidecars", folder, tmp_path / "p") == {
        **{"a.jpg": ("one",), "a.png": ("one",), "b": ("two",), "a.jpg.jpeg": ("three",)}
    }
    assert texts("sidecars", folder / "*.png", tmp_path / "q") == {"a.png": ("one",)}


def test_an_empty_text_hides_no_caption_of_its_name(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for number, (text, caption) in enumerate((("", "one"), (" \n", "two"), ("own", "three"))):
        (folder / f"{number}.jpg").write_bytes(encode(number))
        (folder / f"{number}.txt").write_text(text)
        (folder / f"{number}.caption").write_text(caption)
    assert texts("sidecars", folder, tmp_path / "p") == {
        "0": ("one",),
        "1": ("two",),
        "2": ("own",),
    }


def test_pictures_below_a_list_are_looked_for_anew_and_hidden_ones_do_not_count(tmp_path):
    def found(out):
        import_data("csv", tmp_path / "a" / "list.csv", tmp_path / out)
        return [record.texts for record in filters.open_source(str(tmp_path / out))]

    for number, name in enumerate(("b/0.jpg", "b/.ipynb_checkpoints/0.jpg")):
        (tmp_path / "a" / name).parent.mkdir(parents=True)
        (tmp_path / "a" / name).write_bytes(encode(number))
    (tmp_path / "a" / "list.csv").write_text("image,text\n0.jpg,no. 0\n1.jpg,no. 1\n")
    assert found("p") == [("no. 0",)]
    (tmp_path / "a" / "b" / "1.jpg").write_bytes(encode(2))
    assert found("q") == [("no. 0",), ("no. 1",)]


def test_the_texts_of_a_folder_are_looked_for_once_and_after_it_has_changed(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(lists, "ROWS_PER_UNIT", 1)
    asked, listing = [], files.listing
    monkeypatch.setattr(files, "listing", lambda *of: asked.append(of) or listing(*of))

    def read(units):
        return {
            item.key: item.texts
            for unit in units
            for item in image_folder.read_sidecars(unit, Options())
        }

    units = image_folder.plan_sidecars(str(folder), "", Options())
    assert len(units) == 2 and read(units) == {"0": ["text of 0"], "1": ["text of 1"]}
    assert len(asked) == 1
    (folder / "0.txt").rename(folder / "0.caption")
    (folder / "1.png").write_bytes(encode(9))  # which takes the name
    assert read(units) == {"0": ["text of 0"], "1.jpg": ["text of 1"]}
    assert len(asked) == 2


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
