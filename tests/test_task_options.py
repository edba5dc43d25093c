"""Evaluations that a recipe asks for in the wrong words are refused before it trains."""

import json

import pytest
from PIL import Image

from coca_jax.config import typed
from coca_jax.data import evaluation_data
from coca_jax.data.evaluation_data import Records
from coca_jax.evaluation.evaluators import base
from coca_jax.training import recipes


def test_a_task_s_unknown_key_is_refused_with_the_nearest():
    known = [task for name in recipes.names() for task in typed(recipes.load(name)).eval.tasks]
    for task in known:
        base.check_keys(task, base.get(task["kind"]))
    wrong = dict(kind="zero_shot", name="mine", data=dict(path="data/mine"), prompt="photo")
    with pytest.raises(ValueError, match="zero_shot of mine: unknown key 'prompt'.*'prompts"):
        base.check([wrong])
    wrong = dict(kind="knn", name="mine", data=dict(path="data/mine"), xyz=1)
    with pytest.raises(ValueError, match="unknown key 'xyz'.*kind, name, .*, train_limit"):
        base.check([wrong])


SCENES = dict(builtin="scenes")
WRONG = [
    (dict(prompts="fotos"), "prompts is 'fotos'; use one of bare, plain, photo"),
    (dict(limit=-3), "zero_shot of mine: limit=-3: give a whole number from 0"),
    (dict(limit="many"), "limit='many': give a whole number"),
    (dict(data="data/mine"), "data='data/mine': give a dict"),
    (dict(data=dict(path="x", pth="y")), "zero_shot of mine: data.pth: no key.*data.path"),
    (dict(data=dict(builtin="scene")), "builtin='scene': there is 'scenes'"),
    (dict(data=dict(SCENES, split="val")), "split is 'val'; use one of train, test, heldout"),
    (dict(data=dict(split="test")), "give exactly one of path, builtin"),
    (dict(data=dict(SCENES, where={"a": "b"})), "where=.*: .*builtin='scenes'"),
    (dict(data=dict(SCENES, label_field="a")), "label_field='a': .*builtin='scenes'"),
    (dict(data=dict(path="x", scenery="varied")), "mine: data.scenery='varied' is for data by bui"),
    (dict(data=dict(SCENES, limit=3)), "limit=3: .*builtin='scenes'.*the task's limit"),
    (dict(class_names="names.txt"), "class_names names.txt: no such file"),
    (dict(class_names=["cat", "cat"]), "of mine: class_names: 2 names, 1 distinct"),
    (dict(class_names=3), "class_names=3: give a string or a tuple"),
    (dict(kind="retrieval", candidates="texts"), "candidates='texts': give a dict"),
    (dict(kind="retrieval", known_only=True), "known_only=True without candidates"),
    (dict(kind="retrieval", candidates=dict(path="no/such")), "data source no/such"),
    (dict(kind="captioning", attention="no"), "attention='no': give True or False"),
    (dict(kind="captioning", decode=3), "decode=3: give a dict"),
    (
        dict(kind="captioning", decode=dict(num_beam=3)),
        "unknown field 'num_beam'. Did you mean 'num_beams'",
    ),
    (dict(kind="captioning", decode=dict(num_beams=3.5)), "num_beams=3.5: give a whole number"),
    (dict(kind="captioning", decode=dict(num_beams=0)), "decode: num_beams=0"),
    (dict(kind="knn", train_limit=-1), "train_limit=-1: give a whole number from 0"),
    (dict(kind="knn", train=dict(path="no/such")), "data source no/such"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_a_task_cannot_have_is_refused_before_any_work(change, message):
    task = dict(dict(kind="zero_shot", name="mine", data=SCENES), **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        base.check([task])


@pytest.mark.parametrize("key", ["name", "data"])
def test_a_task_without_what_each_needs_is_refused(key):
    task = dict(kind="zero_shot", name="mine", data=SCENES)
    del task[key]
    with pytest.raises(ValueError, match=f"{key!r} is missing"):
        base.check([task])


def test_two_tasks_of_one_kind_need_two_names():
    """The second would take the place of the first in eval.json."""
    task = dict(kind="zero_shot", name="mine", data=SCENES)
    base.check([task, dict(task, name="other"), dict(task, kind="retrieval")])
    with pytest.raises(ValueError, match="zero_shot of mine: defined twice"):
        base.check([task, task])


def test_a_file_of_class_names_is_read_before_any_work(tmp_path):
    path = tmp_path / "names.txt"
    task = dict(kind="zero_shot", name="mine", data=SCENES, class_names=str(path))
    path.write_text("red circle\tcircle\nblue square\tsquare\n")
    base.check([task])
    path.write_text("red circle\tcircle\nblue square\tcircle\n")
    with pytest.raises(ValueError, match="names.txt: 2 names, 1 distinct"):
        base.check([task])
    path.write_text("red circle\tcircle\nblue square\n")
    with pytest.raises(ValueError, match="line 2: .*label<TAB>name"):
        base.check([task])


def test_a_split_that_a_probe_learns_from_must_be_there(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "a.png")
    task = dict(kind="knn", name="mine", data=dict(path=str(tmp_path)))
    with pytest.raises(ValueError, match="knn of mine: data .* have no split 'train'; .* test"):
        base.check([task])
    base.check([dict(task, kind="zero_shot")])


@pytest.mark.parametrize(
    ("need", "kind", "field"), [("label", "caption", "labels"), ("caption", "label", "text")]
)
def test_scenes_are_drawn_for_what_a_task_needs(need, kind, field):
    """As the records of a folder are read: a task's data need not say what its kind says."""
    records = Records(dict(SCENES, kind=kind), limit=3, need=need)
    assert len(records) == 3 and all(record[field] for record in records)


def test_a_limit_counts_the_records_that_have_what_a_task_needs(tmp_path):
    """It cut before the others were left out: of 2 one was scored, and 1 said there was none."""
    rows = [dict(file_name=f"{number}.png", label="red") for number in range(7)]
    for row in rows[1::2]:
        row["text"] = "a colour" if row["file_name"] == "1.png" else "red"
    for row in rows:
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dict(path=str(tmp_path), split="test")

    def found(limit, **how):
        records = Records(data, limit, **how)
        return [record["key"] for record in records], records.left_out

    assert found(2, need="caption") == (["1.png", "3.png"], 2)
    assert found(1, need="caption") == (["1.png"], 1)
    assert found(0, need="caption") == (["1.png", "3.png", "5.png"], 4)
    assert found(1, need="caption", known={"red"}) == (["3.png"], 2)
    assert found(2, need="label") == (["0.png", "1.png"], 0) and found(2)[0] == ["0.png", "1.png"]


def test_a_probe_does_not_learn_from_what_it_scores(tmp_path):
    """In a folder without folders of splits all splits are the same pictures."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    task = dict(kind="linear_probe", name="mine", data=dict(path=str(tmp_path)))
    with pytest.raises(ValueError, match="of mine: .* would be both .* and scored"):
        base.check([task])
    with pytest.raises(ValueError, match="scenes would be both .* and scored"):
        base.check([dict(task, data=SCENES, train=dict(SCENES, split="test"))])
    base.check([dict(task, data=SCENES)])


def test_data_that_tasks_share_are_gone_through_once(tmp_path, monkeypatch):
    """In a plain folder every picture's texts are read for it."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    calls, count = [], evaluation_data.counts
    monkeypatch.setattr(evaluation_data, "counts", lambda data: calls.append(data) or count(data))
    task = dict(kind="zero_shot", name="mine", data=dict(path=str(tmp_path), kind="label"))
    searched = dict(kind="retrieval", data=dict(path=str(tmp_path), kind="caption"))
    with pytest.raises(ValueError, match="retrieval of mine: no example of .* has a caption"):
        base.check([task, dict(task, kind="generative"), dict(task, **searched)])
    assert len(calls) == 1
