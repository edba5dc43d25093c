"""Which text of several is the caption: the first answer of a conversation, a member of a tar."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_cases import add_member, encode, import_data, reasons_of

from coca_jax.data import filters
from coca_jax.data.sources import fields, formats, tars
from coca_jax.data.sources.items import Options, Unit


def said(*turns):
    """LLaVA's turns."""
    return [{"from": who, "value": what} for who, what in turns]


ASKED = said(
    ("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "On?"), ("gpt", "A mat")
)
ROLES = [dict(role="user", content="hm")]
PARTS = [dict(type="image", text=None), dict(type="text", text="Describe.")]
ANSWER = [dict(type="text", text="A cat.")]


@pytest.mark.parametrize(
    "value, texts",
    [
        (ASKED, ["A cat."]),
        ([dict(role="user", content="hm"), dict(role="assistant", content="A dog.")], ["A dog."]),
        ([dict(role="user", content=PARTS), dict(role="assistant", content=ANSWER)], ["A cat."]),
        ([dict(role="assistant", content=["A", "B"])], ["A", "B"]),
        (said(("system", "s"), ("model", " ")), []),
        ([{"from": "x", "value": "y", "role": "assistant", "content": "A"}, *ROLES], ["A"]),
        # Of other objects the texts count, as before.
        ([{"raw": "a", "from": "x"}, {"raw": "b"}], ["a", "b"]),
        ({"from": "a", "value": "b"}, ["a", "b"]),
        ([], []),
    ],
)
def test_the_first_answer_is_the_caption(value, texts):
    assert fields.strings(value) == texts


@pytest.mark.parametrize("value", [said(("human", "a"), ("human", "b")), said(("gpt", None))])
def test_a_conversation_without_an_answer_is_no_caption(value):
    who = value[0]["from"]
    with pytest.raises(
        ValueError, match=f"conversation of {who}, without an answer of gpt, assist"
    ):
        fields.strings(value)


def test_what_is_no_conversation_has_no_answer():
    with pytest.raises(ValueError, match="no conversation: not all of 2 turns say who speaks"):
        fields.answer([*ROLES, dict(text="hm")])


def write_llava(folder):
    rows = [dict(id=i, image=f"{i}.jpg", conversations=ASKED) for i in range(3)]
    rows.append(dict(id=3, image="0.jpg", conversations=said(("human", "a"))))
    (folder / "llava.json").write_text(json.dumps(rows))
    return "json", folder / "llava.json", {"0.jpg": "bad_record"}


def write_messages(folder):
    turns = [dict(role="user", content="<image>"), dict(role="assistant", content="A cat.")]
    rows = [dict(images=[f"{i}.jpg"], messages=turns) for i in range(3)]
    rows.append(dict(images=["0.jpg", "1.jpg"], messages=turns))
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "jsonl", folder / "m.jsonl", {"m.jsonl line 4": "missing_image"}


def write_parquet(folder):
    turns = [dict(role="user", content=PARTS), dict(role="assistant", content=ANSWER)]
    images = [[dict(bytes=encode(i), path=f"{i}.jpg")] for i in range(3)]
    images.append([images[0][0], images[1][0]])
    table = pa.table({"images": images, "messages": [turns] * 4})
    pq.write_table(table, folder / "m.parquet")
    return "parquet", folder / "m.parquet", {"m.parquet#3": "missing_image"}


def write_tar(folder):
    turns = [*[ASKED] * 3, said(("human", "a"))]
    for i, one in enumerate(turns):
        (folder / f"{i}.jpg").write_bytes(encode(i))
        (folder / f"{i}.json").write_text(json.dumps(dict(id=i, conversations=one)))
    with tarfile.open(folder / "chat-0.tar", "w") as tar:
        for path in sorted(folder.glob("[0-9].*")):
            tar.add(path, path.name)
            path.unlink()
    return "webdataset", folder / "chat-0.tar", {"chat-0.tar/3": "bad_record"}


def test_a_list_names_lists_of_one_image_from_the_folder_above(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "0.jpg").write_bytes(encode(0))
    rows = [dict(images=["0.jpg"], conversations=ASKED)]
    (tmp_path / "annotations/chat.json").write_text(json.dumps(rows))
    result = import_data("json", tmp_path / "annotations/chat.json", tmp_path / "out")
    assert (result["written"], result["with_text"]) == (1, 1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("write", [write_llava, write_messages, write_parquet, write_tar])
def test_conversations_and_lists_of_one_image_are_read(tmp_path, write, in_place):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.jpg").write_bytes(encode(i))
    format, path, reasons = write(tmp_path / "in")
    result = import_data(format, path, tmp_path / "out", in_place=in_place)
    assert (result["read"], result["written"], result["with_text"]) == (4, 3, 3)
    found = list(filters.open_source(str(tmp_path / "out"), "train"))
    assert [(one.image, one.texts) for one in found] == [(encode(i), ("A cat.",)) for i in range(3)]
    assert reasons_of(tmp_path / "out") == reasons


@pytest.mark.parametrize(
    "row, field",
    [
        (dict(images=["a.jpg"], messages=[]), "images"),
        (dict(photos=["a.jpg", "b.PNG"], n=["c"]), "photos"),  # which is one too many, and told
        (dict(images="3", photo="a.jpg"), "photo"),
        (dict(images=["a.jpg"], file_name="b.jpg"), "file_name"),
        (dict(images=[], captions=["a cat"]), ""),
        (dict(images=["a.jpg"], others=["b.jpg"]), ""),
    ],
)
def test_the_field_of_the_images_is_found_by_their_names(row, field):
    assert formats.image_field(row) == field


def test_an_image_is_one_of_several(tmp_path):
    """A field that is named may list images too, and says how many it has."""
    (tmp_path / "0.jpg").write_bytes(encode(0))
    rows = [dict(photos=names, caption="a") for names in (["0.jpg"], ["0.jpg", "0.jpg"])]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_data("jsonl", tmp_path / "m.jsonl", tmp_path / "out", image_field="photos")
    told = json.loads((tmp_path / "out/train-quarantine.jsonl").read_text())
    assert told["detail"] == "its 'photos' has 2 images, and an example has one"


def test_an_empty_member_hides_no_caption_and_no_label(tmp_path):
    """But for that of `recaption`, which says so that it keeps no text."""
    told = dict(caption="a cat", title="cats", label="cat")
    rows = {
        "a": ("", "", told),
        "b": (" \n", " ", told),
        "c": ("a dog", "dog", told),
        "d": ("", "", dict(title="cats", recaption=dict(captions=[]))),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (key, (text, label, fields)) in enumerate(rows.items()):
            add_member(archive, f"{key}.jpg", encode(number))
            add_member(archive, f"{key}.txt", text.encode())
            add_member(archive, f"{key}.cls", label.encode())
            add_member(archive, f"{key}.json", json.dumps(fields).encode())
    items = list(tars.read(Unit(str(tmp_path / "a.tar")), Options()))
    assert [item.texts for item in items] == [["a cat"], ["a cat"], ["a dog"], []]
    assert [item.labels for item in items] == [["cat"], ["cat"], ["dog"], []]
    assert items[0].extra == dict(title="cats")  # what became the text is no other field
