"""The row that a suite writes into a table of several models, and the figure that counts."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from test_suite_parts import Colours, folder, tar_set, write  # noqa: F401

from coca_jax.apps.suites import folders, measuring, metrics, running, tables
from coca_jax.cli import evaluate


def test_a_row_goes_into_the_columns_of_the_table_that_is_there(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("name,MNIST,ImageNet 1k\nother,0.1,0.2\n")
    for value in (0.5, 0.25):
        running.write_row(str(file), {"name": "mine", "ImageNet 1k": value, "New": 0.75})
    assert file.read_text().splitlines() == [
        *("name,MNIST,ImageNet 1k,New", "other,0.1,0.2,", "mine,,0.2500,0.7500")
    ]


def test_a_spreadsheet_s_table_keeps_its_rows(tmp_path):
    """With a byte order mark, lines of its own, a short row and a break in a cell."""
    file = tmp_path / "table.csv"
    file.write_bytes('\ufeffname,MNIST,note\r\nmine,0.1,"a\r\nb"\r\nother,0.2\r\n'.encode())
    running.write_row(str(file), {"name": "mine", "MNIST": 0.5})
    rows, columns = running.read_table(str(file))
    assert columns == ["name", "MNIST", "note"]
    assert [list(row.values()) for row in rows] == [
        ["mine", "0.5000", "a\r\nb"],
        ["other", "0.2", ""],
    ]


@pytest.mark.parametrize(
    "data, says",
    [
        (b"name,MNIST\na,0.1\nb,0.2,0.3\n", "line 3 has more cells than there are columns; mend"),
        (b"name,MNIST,MNIST\na,0.1,0.2\n", "two columns 'MNIST'; rename one"),
        ("name\ncafé\n".encode("latin-1"), "can't decode byte 0xe9 .*; mend it, or give another"),
    ],
)
def test_a_bad_table_is_refused_before_anything_is_measured(tmp_path, data, says):
    file = tmp_path / "table.csv"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"table.csv: .*{says}") as error:
        running.run(None, [], str(tmp_path), suite="x", name="y", table=str(file))
    assert "\n" not in str(error.value) and file.read_bytes() == data


def test_pairs_that_were_counted_otherwise_are_measured_once_more(tmp_path):
    """By the account of what the scores depend on, which of other sets is as it was."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = dict(filename="a.png", caption="one", negative_caption="two")
    (tmp_path / "pairs.json").write_text(json.dumps({"0": row}))
    (tmp_path / "plain/test/red").mkdir(parents=True)
    (tmp_path / "plain/test/blue").mkdir(parents=True)
    for name in ("red", "blue"):
        Image.new("RGB", (4, 4)).save(tmp_path / "plain/test" / name / "a.png")
    for place, more in (("pairs.json", ["ties are wrong", "images are drawn"]), ("plain", [])):
        task = tables.Task(place, place, folders.read(str(tmp_path / place)))
        assert json.loads(running._data(task, []))[4:] == more


def test_rows_of_one_image_are_one_image_of_retrieval(tmp_path):
    """As of a list with a row a caption: the copies were wrong answers to each other's captions."""
    rows = []
    for name, colour in (("a.png", (250, 0, 0)), ("b.png", (0, 0, 250))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
        what = "red" if name == "a.png" else "blue"
        rows += [dict(file_name=name, text=f"{what} {number}") for number in range(3)]
    write(tmp_path, "metadata.jsonl", rows[::2] + rows[1::2])
    task = tables.Task("plain", "plain", folders.read(str(tmp_path)))
    outcome = measuring.measure(Colours(), task.folder, batch_size=2)
    assert outcome["texts"].tolist() == [3, 3]
    for name in ("image_retrieval_recall@1", "text_retrieval_recall@1"):
        assert metrics.value(name, outcome) == 1
    assert json.loads(running._data(task, []))[4:] == ["an image is one, however many rows it has"]


def test_the_interval_of_pairs_draws_an_image_with_all_that_is_asked_of_it(folder):  # noqa: F811
    """And with all pieces of it; ten questions of an image are worth one where they are alike."""
    row = dict(image_path="a.png", true_caption="blue", false_caption="red")
    whole = dict(row, bbox_x=5, bbox_y=0, bbox_w=5, bbox_h=8)
    other = dict(row, image_path="b.png", true_caption="a", false_caption="b")
    write(folder, "aro.json", [row, other, whole, other])
    found = measuring.measure(Colours(), folders.read(str(folder)), batch_size=8)
    assert found["image"].tolist() == [0, 1, 0, 1]
    right, image = np.arange(40) % 2 == 0, np.arange(40) % 2
    right[:2] = False, True  # of 20 rows of each of two images one is unlike the others
    low, high = metrics.interval("acc", dict(acc=right, image=image))
    assert (low, high) == (0.05, 0.95) and metrics.interval("acc", dict(acc=right))[0] > 0.3
    old = dict(acc=~right)  # as earlier versions kept it
    change = metrics.difference("acc", dict(acc=right, image=image), old)
    np.testing.assert_allclose(change, (0, -0.9, 0.9), atol=1e-12)


def test_recalls_of_many_hold_no_matrix_of_all_similarities():
    """Of 4,000 images of five captions it took 900 MB; of equal ones the first comes."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3000, 4)).astype(np.float32)
    images[7] = images[3]
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    image_of = np.repeat(np.arange(3000), 3)
    texts = images[image_of] + 0.05 * rng.normal(size=(9000, 4)).astype(np.float32)
    tracemalloc.start()
    found = metrics.of_retrieval(images, texts, image_of)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(images) * len(texts)
    scores = texts @ images.T
    own = scores[np.arange(9000), image_of][:, None]
    others = (scores > own).sum(1)
    others[21:24] += 1  # image 3 comes before its copy
    for k in (1, 5, 10):
        hits = np.bincount(image_of, others < k, minlength=3000)
        assert abs(found[f"images_{k}"] - hits).sum() <= 2  # products differ in their last digit
    assert not found["images_1"][7] and found["images_5"][7] == found["images_5"][3]


def test_a_row_is_called_by_the_model_s_place():
    names = {"runs/a/": "a", "runs/a/checkpoints/2000": "a/2000", "b/checkpoints/2000/": "b/2000"}
    names |= {"weights": "weights", "2000": "2000", "coca_ViT-B-32:tag": "coca_ViT-B-32:tag"}
    assert {place: evaluate.called(place) for place in names} == names


def test_texts_of_a_set_are_read_as_windows_writes_them_or_named(tmp_path):
    """A byte order mark was of the first class's name, and of its prompts."""
    example = dict(png=b"x", cls=b"0")
    texts = dict(classnames="red\nblue\n", dataset_type="multilabel\n")
    path = tar_set(tmp_path / "set", example, **texts)
    for file in (*(tmp_path / "set").glob("*.txt"), tmp_path / "set/test/nshards.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfset\r\n")
    found = folders.read(path)
    assert (found.kind, found.class_names, found.prompts) == (
        *("multilabel", ("red", "blue")),
        ("a {}",),
    )
    captions = tar_set(
        tmp_path / "told", dict(png=b"x", txt=b"\xef\xbb\xbfa\r\nb"), dataset_type="retrieval"
    )
    assert [one["texts"] for one in folders.read(captions).examples()] == [["a", "b"]]
    (task,), left = tables.tasks(str(tmp_path / "list.txt"), str(tmp_path))
    assert task.key == "set" and not left
    (tmp_path / "set/classnames.txt").write_bytes("caf\u00e9\nblue\n".encode("latin-1"))
    with pytest.raises(ValueError, match="set/classnames.txt: not UTF-8 text"):
        folders.read(path)
    (tmp_path / "set/dataset_type.txt").write_bytes(b"")  # as where there is none
    (tmp_path / "set/classnames.txt").write_text("red\nblue")
    assert folders.read(path).kind == "classification"


def test_cues_count_by_their_own_figure_where_a_suite_names_none(folder, tmp_path_factory):  # noqa: F811
    """They have no `acc`: the suite measured them, and ended there."""
    rows = [
        dict(cue="red", candidates=["a", "b"], associations=["a"]),
        dict(cue="blue", candidates=["a", "b", "c"], associations=["a", "b"]),
    ]
    write(folder, "test.jsonl", rows)
    out = tmp_path_factory.mktemp("out")
    (out / "sets.txt").write_text(folder.name)
    for suite, root in (("clip_benchmark", folder), (str(out / "sets.txt"), folder.parent)):
        (task,), _ = tables.tasks(suite, str(root))
        assert task.metric == "jaccard"
        found, _ = running.run(Colours(), [task], str(out / task.title), suite="s", name="m")
        name = f"suite/{task.key}/jaccard"
        assert found[name] == found["suite/s/average"] == (1 + 1) / 2
        assert f"{name}_10_12" not in found  # of examples with ten candidates, of which none has
