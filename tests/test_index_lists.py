"""An index of pictures that lists name: files as any others, whatever the list or they become."""

import json
import os

import pytest
from test_index_changes import again, call, captions, folder, rows  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_search import embed, encoded, tree

from coca_jax.apps.search import index, parts
from coca_jax.data.sources import files, lists
from coca_jax.data.sources.items import Options, Unit
from coca_jax.runtime.workers import Engine


def write_list(place, texts):
    """Of pictures by their names beside it, as the suffix says."""
    rows = [dict(filepath=name, title=text) for name, text in texts.items()]
    if place.suffix == ".csv":
        lines = ["filepath,title", *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    joined = f"[{','.join(lines)}]" if place.suffix == ".json" else "\n".join(lines) + "\n"
    place.write_text(joined)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_what_a_list_names_are_files(model, folder, monkeypatch, kind):  # noqa: F811
    """Found by their own names, once each, and anew where the list or one of them changed."""
    path, place = folder / f"list.{kind}", f"s/list.{kind}"
    texts = {f"{number}.png": f"picture {number}" for number in range(3)}
    write_list(path, texts)
    assert again(model, place) == (3, 0, 0, 0, 3)
    assert rows(model) == ["s/0.png", "s/1.png", "s/2.png"] and captions() == texts
    before = tree("i")
    assert again(model, f"./{place}") == (0, 0, 0, 0, 3) and tree("i") == before
    texts["3.png"] = "one more"
    write_list(path, texts)
    assert again(model, place) == (1, 0, 0, 0, 4)
    (folder / "0.png").write_bytes((folder / "5.png").read_bytes())
    texts["2.png"] = "said better"
    write_list(path, texts)
    assert again(model, place) == (0, 2, 0, 0, 4) and captions() == texts
    (folder / "1.png").unlink()
    assert again(model, place) == (0, 0, 1, 0, 3)
    monkeypatch.chdir(folder)
    said = []
    assert again(model, path.name, "../i", say=said.append) == (0, 0, 0, 1, 3)
    assert len(said) == 1 and f"{folder}/1.png: no such file" in said[0]
    monkeypatch.chdir(folder.parent)
    assert sorted(rows(model)) == ["s/0.png", "s/2.png", "s/3.png"]
    assert index.Index("i").file(0)[0] == str(folder / "3.png")


def test_a_list_is_embedded_by_shares_and_joined(model, folder):  # noqa: F811
    texts = {f"{number}.png": f"picture {number}" for number in range(6)}
    write_list(folder / "list.csv", texts | {"broken.png": "", "../x.png": ""})
    how = dict(checkpoint="here", batch_size=4, part=3)
    for share, left in (("0/2", 1), ("1/2", 0)):
        there = parts.Parts("i")
        groups = index.groups(["s/list.csv"], there, 3)
        assert index.stage(lambda: model, groups, there, Engine(share=share), **how) == left
    assert index.add(None, groups, there, say=lambda text: None, **how)["skipped"] == 2
    index.finish(there)
    assert embed(model, "s/list.csv", "whole", part=3)["new"] == 6 and tree("i") == tree("whole")


def test_a_list_in_a_bucket_grows(model, folder, gs):  # noqa: F811
    for number in range(2):
        files.filesystem(gs)[0].pipe(f"bucket/s/{number}.png", encoded(number))
    for count in (1, 2):
        lines = ["filepath,title", *(f"{n}.png,picture {n}" for n in range(count)), "up/../../x,"]
        files.filesystem(gs)[0].pipe("bucket/s/list.csv", "\n".join(lines).encode())
        assert again(model, f"{gs}/s/list.csv") == (1, 0, 0, 1, count)
    assert rows(model) == [f"{gs}/s/{number}.png" for number in range(2)]
    assert captions() == {"0.png": "picture 0", "1.png": "picture 1"}


def test_a_list_that_appears_in_an_indexed_folder_names_the_same_files(model, folder):  # noqa: F811
    assert again(model, "s") == (6, 0, 0, 1, 6)
    write_list(folder / "captions.csv", {"0.png": "", "./1.png": "red", "1.png": "blue"})
    assert again(model, "s") == (0, 1, 0, 0, 6)
    assert captions()["1.png"] == "red" and len(rows(model)) == 6


def test_a_row_of_a_list_that_names_no_picture_is_said_and_counted(model, folder):  # noqa: F811
    (folder.parent / "other.png").write_bytes(encoded(90))
    os.symlink("..", folder / "up")
    write_list(folder / "list.csv", {"../other.png": "", "up/other.png": "", "0.png": "", "": "x"})
    said = []
    for new in (1, 0):
        assert again(model, "s/list.csv", say=said.append) == (new, 0, 0, 3, 1)
    assert rows(model) == ["s/0.png"] and said[:3] == said[3:]
    assert "other.png" in said[0] and "outside the input" in said[0]
    assert "s/up/other.png" in said[1] and "outside the input" in said[1]
    assert said[2].startswith("skipped s/list.csv row 4: missing_image (its 'filepath' is empty")


@pytest.mark.parametrize(
    ("fields", "named", "detail"),
    [
        ({"filepath": "", "title": "x"}, "", "its 'filepath' is empty"),
        ({"image": None, "text": "x"}, "", "its 'image' is empty"),
        ({"foto": "", "text": "x"}, "foto", "its 'foto' is empty"),
        ({"foto": "", "text": "x"}, "", "no column of an image file; give --image_field=NAME, one"),
        ({"text": "x"}, "foto", "no column of an image file; give --image_field=NAME, one of text"),
        ({"image": 7, "text": "x"}, "", "no column of an image file; give --image_field=NAME, one"),
    ],
)
def test_a_row_without_a_picture_says_whether_its_column_is_there(fields, named, detail):
    found = lists.row(Unit("list.csv"), 3, fields, Options(image_field=named)).item
    assert (found.key, found.problem) == ("list.csv row 4", "missing_image")
    assert found.detail.startswith(detail)


def test_pictures_elsewhere_that_are_allowed_are_those_of_a_list(model, folder, call, monkeypatch):  # noqa: F811
    (folder.parent / "lists").mkdir()
    other = folder.parent / "other.png"
    other.write_bytes(encoded(90))
    names = ["../s/0.png", str(folder / "1.png"), "../other.png"]
    write_list(folder.parent / "lists/l.csv", {name: f"of {name[-5]}" for name in names})
    given = dict(checkpoint="here", out="i", allow_paths="s")
    assert again(model, "lists", "none") == (0, 0, 0, 3, 0)
    done = call("index", "lists", **given)
    assert [done[key] for key in ("new", "skipped", "pictures")] == [2, 1, 2]
    assert rows(model) == ["s/0.png", "s/1.png"]
    assert captions() == {"0.png": "of 0", "1.png": "of 1"}
    assert call("index", "s", **given)["new"] == 4  # of six, two of which are there
    (folder / "1.png").unlink()
    monkeypatch.chdir(folder)
    done = call("index", "../lists", **given | dict(out="../i", allow_paths="."))
    assert [done[key] for key in ("new", "gone", "skipped", "pictures")] == [0, 1, 1, 5]
    with pytest.raises(ValueError, match="search query: --allow_paths is a flag of index$"):
        call("query", "red", index="../i", allow_paths=".")
