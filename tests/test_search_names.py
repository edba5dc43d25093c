"""Pictures of an index whose names, or what is said of them, are no UTF-8."""

import json
import os
import types

from test_index_changes import again, captions, folder  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401

from coca_jax.apps.search import index
from coca_jax.apps.search.parts import Known
from coca_jax.data.sources.fields import printable
from coca_jax.runtime import storage


def test_a_picture_whose_name_is_no_utf8_is_not_gone(tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.jpg")
    there = [name, str(tmp_path / "lost.jpg")]
    files = {printable(one): Known(row) for row, one in enumerate(there)}
    parts = types.SimpleNamespace(
        files=files, base=os.getcwd(), whole_path=storage.whole_path, grouped=dict
    )
    assert "\\" in printable(name)
    with open(name, "wb"):
        assert index.gone([str(tmp_path)], parts) == [1]


def test_a_class_folder_whose_name_is_no_utf8_is_a_caption(model, folder):  # noqa: F811
    below = os.fsencode(folder) + b"/caf\xe9"
    os.mkdir(below)
    os.rename(folder / "1.png", below + b"/1.png")
    assert again(model, "s") == (6, 0, 0, 1, 6)
    assert captions()["1.png"] == r"caf\udce9" and captions()["2.png"] == ""
    assert again(model, "s") == (0, 0, 0, 1, 6)


def test_half_of_a_character_in_a_list_is_told_by_its_number(model, folder):  # noqa: F811
    rows = [dict(image="1.png", text="a \ud83d kite"), dict(image="2.png", text="a kite")]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert again(model, "s/list.jsonl") == (2, 0, 0, 0, 2)
    assert captions() == {"1.png": r"a \ud83d kite", "2.png": "a kite"}
    assert again(model, "s/list.jsonl") == (0, 0, 0, 0, 2)
