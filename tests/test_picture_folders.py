"""Folders of pictures as people and their tools leave them: splits by names, texts beside pictures,
class folders, what a line says of them."""

import os

from prepare_cases import encode, import_data, write_tar

from coca_jax.data import sources
from coca_jax.importers import splits, unprepared


def beside(folder, texts, suffix=".txt", first=0):
    """A picture for each name, numbered, with its text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, text) in enumerate(texts.items(), first):
        (folder / f"{name}.jpg").write_bytes(encode(number))
        if text is not None:
            (folder / f"{name}{suffix}").write_text(text)
    return folder


def in_folders(root, folders, count=3):
    """`count` pictures in each of the folders, all of them different."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            (root / folder / f"{i}.jpg").write_bytes(encode(100 * number + i))
    return root


def brought(format, input, out, split="train", **options):
    """{key: (texts, labels)} of what is imported, its images being those of the input."""
    import_data(format, input, out, split=split, **options)
    found = list(sources.open_source(str(out), split))
    return {record.key: (record.texts, record.labels) for record in found}


def test_a_split_by_names_has_its_own_pictures(tmp_path):
    names = [f"test_{i:02d}" for i in range(4)] + [f"train_{i:02d}" for i in range(4, 12)]
    folder = beside(tmp_path / "a", {name: f"text of {name}" for name in names})
    for split, own in (("train", names[4:]), ("test", names[:4])):
        found = brought("sidecars", folder, tmp_path / "p", split)
        assert found == {name: ((f"text of {name}",), ()) for name in own}
    record = next(iter(sources.open_source(str(tmp_path / "p"), "train")))
    assert record.image == encode(4)
    # A pattern, too, stands for the pictures that it fits.
    found = brought("sidecars", f"{folder}/*_1?.jpg", tmp_path / "q")
    assert sorted(found) == ["train_10", "train_11"]


def test_names_of_pictures_make_splits_only_where_all_tell_one(tmp_path, capsys):
    names = ("dog", "cat", "steam train", "test tube")
    folder = beside(tmp_path / "a", {name: f"a {name}" for name in names})
    assert splits.splits_of("sidecars", str(folder)) == []
    found = brought("sidecars", folder, tmp_path / "p")
    assert {texts[0] for texts, _ in found.values()} == {f"a {name}" for name in names}
    # Of tars some may tell a split; the others are named.
    for number, name in enumerate(("bus", "plane", "train", "val")):
        write_tar(tmp_path / f"{name}.tar", 2, start=2 * number)
    capsys.readouterr()
    assert len(brought("webdataset", tmp_path, tmp_path / "q")) == 2
    line = f"{tmp_path}: 2 of 4 files name no split and are not read: bus.tar, plane.tar\n"
    assert capsys.readouterr().err == line
    assert len(brought("webdataset", tmp_path, tmp_path / "q", "val")) == 2
    assert capsys.readouterr().err == ""


def test_texts_that_were_edited_are_evaluated_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = dict(path=str(tmp_path / "a"), kind="caption")

    def read():
        found = unprepared.open_source(entry, "test")
        return [text for record in found for text in record.texts]

    beside(tmp_path / "a/below", {"1": "one", "2": "two"})
    beside(tmp_path / "a", {"3": "three"}, first=2)
    assert sorted(read()) == ["one", "three", "two"]
    folder = (tmp_path / "a/below").stat()
    (tmp_path / "a/below/1.txt").write_text("a longer one")
    os.utime(tmp_path / "a/below", ns=(folder.st_atime_ns, folder.st_mtime_ns))
    assert sorted(read()) == ["a longer one", "three", "two"]
    text = tmp_path / "a/3.txt"  # of the same size
    edited = text.stat().st_mtime_ns + 10**9
    text.write_text("drei!")
    os.utime(text, ns=(edited, edited))
    assert sorted(read()) == ["a longer one", "drei!", "two"]
    (tmp_path / "a/run.log").write_text("of a run")  # is neither a picture nor a text of one
    assert sorted(read()) == ["a longer one", "drei!", "two"]
    assert len(list((tmp_path / "cache/coca_jax/indexes").glob("*.lock"))) == 3
