"""seqio: its loader gives the batches of the direct one, and users' own Tasks are sources."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from data_cases import damage, data_config, picture, take, three_sources, write_data, write_folder

from coca_jax.data import filters, images
from coca_jax.data.batches import Batches, open_stream
from coca_jax.data.mixture import Mixture, head_classes
from coca_jax.data.prepare import prepare
from coca_jax.data.sources.items import Options
from coca_jax.training import run_vocabulary

# Found, not imported: each worker that runs tests would import TensorFlow to collect them.
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("seqio", "tensorflow")),
    reason="needs the extra 'seqio'",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mixture(data):
    config = three_sources(data, where={"group": 1}, label_token=True)
    return config, run_vocabulary.load_or_train(config, str(data / "seqio"))


def streams(config, vocabulary, **where):
    """The streams of the direct loader and of seqio."""
    classes = head_classes(config)
    for loader in ("direct", "seqio"):
        config.data.loader = loader
        yield open_stream(config, vocabulary, class_names=classes, **where)


def assert_equal(config, vocabulary, steps, **where):
    """Both loaders give the same batches; returns their streams."""
    direct, by_seqio = streams(config, vocabulary, **where)
    for a, b in zip(take(direct, steps), take(by_seqio, steps)):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
            np.testing.assert_array_equal(a[name], b[name], name)
    direct.close()
    by_seqio.close()
    return direct, by_seqio


@pytest.mark.parametrize("where", [{}, dict(start_step=97, process_index=1, process_count=4)])
def test_batches_equal_those_of_the_direct_loader(mixture, where):
    config, vocabulary = mixture
    direct, by_seqio = assert_equal(config, vocabulary, 12, **where)
    assert direct.progress(12) == by_seqio.progress(12) and direct.step == by_seqio.step


def test_the_same_bad_images_are_stepped_over(data, tmp_path):
    folder = write_folder(tmp_path / "raw", 30)
    for index in (3, 4, 20):
        damage(folder / f"{index:04d}.png")
    prepare(
        "imagefolder", str(folder), str(tmp_path / "p"), options=Options(check=False),
        progress=False,
    )  # fmt: skip
    shard = tmp_path / "p" / "train-00000-of-00001.array_record"
    content = bytearray(shard.read_bytes())
    place = content.index((folder / "0009.png").read_bytes()) + 20
    content[place : place + 4] = bytes(4)
    shard.write_bytes(content)
    config = data_config(dict(path=str(tmp_path / "p")), max_bad_fraction=0.2)
    vocabulary = run_vocabulary.load_or_train(data_config(dict(path=str(data / "c"))), tmp_path)
    for stream in assert_equal(config, vocabulary, 8):
        assert stream.skipped() == [4]
    config.data.max_bad_fraction = 0.05
    for stream in streams(config, vocabulary):
        with pytest.raises(ValueError, match="max_bad_fraction=0.05; first: "):
            take(stream, 8)
        stream.close()


def test_what_a_head_cannot_learn_is_one_line_here_too(data, tmp_path):
    config = data_config(dict(path=str(data / "b"), kind="label"))
    config.head.kind = "classification"
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    config.head.classes = str(tmp_path / "classes.txt")
    vocabulary = run_vocabulary.load_or_train(config, tmp_path)
    for stream in streams(config, vocabulary):
        for _ in range(2):  # asked again, it says so again
            with pytest.raises(
                ValueError, match=r"^data source .* not among the 2 classes"
            ) as found:
                next(stream)
            assert "\n" not in str(found.value) and stream.step == 0
        stream.close()


def test_tasks_and_their_mixture_are_registered(mixture):
    import seqio

    from coca_jax.data import seqio_tasks

    config, vocabulary = mixture
    batches = Batches(config, vocabulary)
    seqio_tasks.register(config, vocabulary, batches, start_step=5)
    found = seqio.get_mixture_or_task("coca_jax.train")
    assert [task.name for task in found.tasks] == [f"coca_jax.source_{n:03d}" for n in range(3)]
    assert [found.get_rate(task) for task in found.tasks] == [4.0, 2.0, 2.0]
    task = seqio.TaskRegistry.get("coca_jax.source_001")
    dataset = task.get_dataset(split="train", shuffle=False)
    example = next(dataset.as_numpy_iterator())
    want = batches.batch(5)
    row = int(np.flatnonzero(want["source"] == 1)[0])
    assert example["tokens"].tolist() == want["tokens"][row].tolist()
    pixels = images.decode(example["image"])
    assert np.array_equal(pixels, picture(int(example["index"])))
    assert task.output_features["tokens"].vocabulary.decode(example["tokens"]) in (
        example["text"].decode()
    )


@pytest.mark.long
def test_eleven_sources_stay_in_their_places(data, tmp_path):
    """seqio sorts tasks by name, and 10 comes before 2 in the alphabet."""
    config = data_config(*[dict(path=str(data / "c"), limit=n + 1) for n in range(11)], batch=11)
    vocabulary = run_vocabulary.load_or_train(config, tmp_path)
    assert_equal(config, vocabulary, 1)


TASKS = """
import seqio, tensorflow as tf

def examples_of(pixels_only):
    def examples(split, shuffle_files, seed=None):
        def example(n):
            pixels = tf.fill([12, 10, 3], tf.cast(n * 20, tf.uint8))
            image = pixels if pixels_only else tf.io.encode_png(pixels)
            text = tf.strings.join(["picture ", tf.strings.as_string(n)])
            label = tf.where(n % 2 == 0, "even", "odd")
            return dict(image=image, text=text, label=[label, "all"], number=n)
        return tf.data.Dataset.range(9 if split == "train" else 3).map(example)
    return examples

for name, dtype, rank in (("bytes", tf.string, 0), ("pixels", tf.uint8, 3)):
    seqio.TaskRegistry.add(
        f"my_pictures_{name}",
        source=seqio.FunctionDataSource(examples_of(name == "pixels"), splits=["train", "test"]),
        preprocessors=[lambda dataset: dataset.filter(lambda x: x["number"] != 4)],
        output_features={
            "image": seqio.ContinuousFeature(dtype=dtype, rank=rank),
            "text": seqio.Feature(seqio.PassThroughVocabulary(1), dtype=tf.string, rank=0),
        },
    )
"""


@pytest.fixture(scope="module")
def my_tasks(tmp_path_factory):
    """A module of a user's own that registers Tasks."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "my_tasks.py").write_text(TASKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "my_tasks"
    sys.modules.pop("my_tasks", None)


@pytest.mark.parametrize("name", ["my_pictures_bytes", "my_pictures_pixels"])
def test_a_task_of_the_user_is_a_source(my_tasks, name):
    entry = dict(seqio=name, module=my_tasks)
    found = filters.open_source(entry)
    assert len(found) == 8 and len(filters.open_source(entry, "test")) == 3
    records = found.read([7, 0, 4])  # any of them, in any order
    assert [r.texts for r in records] == [("picture 8",), ("picture 0",), ("picture 5",)]
    assert [r.labels for r in records] == [("even", "all"), ("even", "all"), ("odd", "all")]
    assert [json.loads(r.extra) for r in records] == [dict(number=n) for n in (8, 0, 5)]
    assert images.decode(records[0].image)[0, 0].tolist() == [160] * 3
    odd = filters.open_source(dict(entry, where={"number": [1, 5, 7]}))
    assert [r.texts for r in odd] == [("picture 1",), ("picture 5",), ("picture 7",)]
    labelled = filters.open_source(dict(entry, text_field="label"))
    assert labelled.read([0])[0].texts == ("even", "all")


def test_training_on_a_task_of_the_user(my_tasks, tmp_path):
    entries = (
        dict(seqio="my_pictures_bytes", module=my_tasks),
        dict(seqio="my_pictures_pixels", module=my_tasks, kind="label"),
    )
    config = data_config(*entries, batch=8)
    config.model.text.vocab_size = 300
    vocabulary = run_vocabulary.load_or_train(config, tmp_path)
    assert_equal(config, vocabulary, 3)
    batch = Batches(config, vocabulary).batch(0)
    for image, tokens, index, label in zip(
        batch["image"], batch["tokens"], batch["index"].tolist(), batch["is_label"]
    ):
        number = index + (index >= 4)
        assert image.min() == image.max() == number * 20
        assert label or vocabulary.decode(tokens) == f"picture {number}"
    assert Mixture(config).num_examples == 16


def test_a_module_in_the_current_folder_is_found(my_tasks, tmp_path, monkeypatch):
    (tmp_path / "tasks_here.py").write_text(TASKS.replace("my_pictures_", "pictures_here_"))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    entry = dict(seqio="pictures_here_bytes", module="tasks_here")
    assert len(filters.open_source(entry)) == 8
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1
    with pytest.raises(ValueError, match="current folder and in those of PYTHONPATH"):
        filters.open_source(dict(entry, module="tasks_there"))


def test_what_is_wrong_with_a_task_is_said(my_tasks):
    entry = dict(seqio="my_pictures_bytes", module=my_tasks)
    cases = {
        "no such Task; registered are: .*my_pictures_bytes": dict(entry, seqio="my_picture"),
        "module='my_task', which registers it": dict(entry, module="my_task"),
        "no split 'validation'; it has": dict(entry, split="validation"),
        "no feature 'picture' .image_field.; it has": dict(entry, image_field="picture"),
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            filters.open_source(wrong)
