"""A stream of batches: the function of the step behind it, its threads, its errors, its end."""

import hashlib
import threading
import time

import numpy as np
import pytest
from data_cases import data_config, equal, take, write_data

from coca_jax.config import typed
from coca_jax.data import batches as batch_module
from coca_jax.data import filters
from coca_jax.data.batches import Batches, DirectStream, fields, open_stream, trained
from coca_jax.data.mixture import Mixture
from coca_jax.data.sources import array_record
from coca_jax.training import run_vocabulary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data):
    config = data_config(
        dict(path=str(data / "a")), dict(path=str(data / "b"), kind="label"), augment="crop"
    )
    return config, run_vocabulary.load_or_train(config, str(data / "run"))


def test_the_batches_are_what_they_were():
    """A change of these numbers breaks the resume of every run: it must be on purpose.

    Drawn scenes at their own size, so that no decoder or resize of a library is in the pixels.
    """
    config = data_config(
        dict(builtin="scenes", weight=3.0), dict(builtin="scenes", kind="label"), batch=8
    )
    config.model.image_size, config.model.patch_size = 64, 8
    mixture = Mixture(config)
    vocabulary = run_vocabulary.vocabularies.train(["a red circle", "blue"] * 9, 300, "memory://v")
    batch = Batches(config, vocabulary, mixture).batch(1000)
    names = ("image", "is_label", "text_id", "source", "index")
    digests = [hashlib.sha256(batch[n].tobytes()).hexdigest()[:16] for n in names]
    assert dict(zip(names, digests)) == dict(
        image="a320f4dd215f9b7a",
        is_label="058cd4aba7e0564f",
        text_id="52c268a7cb41bf28",
        source="01c84f606ffe38ee",
        index="880c56cf466d2856",
    )


def test_a_batch_is_a_function_of_its_step(run):
    config, vocabulary = run
    batches = Batches(config, vocabulary)
    stream = DirectStream(Batches(config, vocabulary), ahead=3)
    streamed = take(stream, 9)
    stream.close()
    for step in (8, 3, 0, 3):  # in any order, and again
        assert equal(batches.batch(step), streamed[step])
    found = [None] * 8
    threads = [
        threading.Thread(target=lambda step=step: found.__setitem__(step, batches.batch(step)))
        for step in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(a, b) for a, b in zip(found, streamed))
    batches.close()


@pytest.mark.parametrize("kind, frames, shape", [
    ("", 0, (16, 16, 3)), ("", 3, (3, 16, 16, 3)), ("pair", 0, (2, 16, 16, 3)),
])  # fmt: skip
def test_one_statement_says_what_a_batch_is(kind, frames, shape):
    config = data_config(num_frames=frames)
    config.head.kind = kind
    statement = fields(config)
    assert statement["image"].shape == shape and statement["tokens"].shape == (32,)
    empty = batch_module.empty(config, 5)
    assert {name: (a.dtype.name, a.shape) for name, a in empty.items()} == {
        name: (field.dtype, (5, *field.shape)) for name, field in statement.items() if field.trains
    }
    assert set(statement) - set(empty) == {"source", "index"}
    assert list(trained(dict.fromkeys(statement, 0), config)) == list(empty)


def test_an_error_is_raised_at_its_batch_and_again(run, monkeypatch):
    config, vocabulary = run
    make = Batches.make

    def fails(self, step):
        if step == 4:
            raise ValueError("batch 4 is bad")
        return make(self, step)

    monkeypatch.setattr(Batches, "make", fails)
    stream = open_stream(config, vocabulary)
    take(stream, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match="batch 4 is bad"):
            next(stream)
    assert stream.step == 4
    stream.close()


def test_few_batches_wait(run, monkeypatch):
    """However long nobody asks, the threads make no more than two and one in waiting."""
    config, vocabulary = run
    steps, make = [], Batches.make

    def counts(self, step):
        steps.append(step)
        return make(self, step)

    monkeypatch.setattr(Batches, "make", counts)
    stream = DirectStream(Batches(config, vocabulary), start_step=10, ahead=2)
    assert not steps
    next(stream)
    deadline = time.monotonic() + 60
    while len(steps) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert sorted(steps) == [10, 11, 12]
    stream.close()


def test_close_ends_the_threads(run):
    config, vocabulary = run
    before = set(threading.enumerate())
    stream = open_stream(config, vocabulary)
    take(stream, 2)
    assert set(threading.enumerate()) - before
    stream.close()
    assert not set(threading.enumerate()) - before
    dropped = open_stream(config, vocabulary)
    next(dropped)
    del dropped  # nobody closed it
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


def test_sources_are_opened_once(run, monkeypatch):
    config, vocabulary = run
    opened, open_entry = [], array_record.open_entry
    monkeypatch.setattr(
        array_record,
        "open_entry",
        lambda entry, split: opened.append(entry) or open_entry(entry, split),
    )
    mixture = Mixture(config)
    assert not opened
    assert sum(1 for _ in mixture.sample_texts(20)) >= 20 and mixture.num_examples == 40
    stream = open_stream(config, vocabulary, mixture)
    next(stream)
    stream.close()
    assert len(opened) == 2 and "source 1: " in mixture.describe()


def test_an_unknown_loader_is_named(run):
    config, vocabulary = run
    config = config.copy_and_resolve_references()
    config.data.loader = "grain"
    with pytest.raises(ValueError, match="data.loader='grain': give one of 'direct', 'seqio'"):
        open_stream(typed(config), vocabulary)
    with pytest.raises(ValueError, match="exactly one of path, builtin, tfds, seqio"):
        filters.open_source(dict(kind="label"))


def test_a_source_that_cannot_be_read_at_all_stops_the_run(run, monkeypatch):
    config, vocabulary = run
    mixture = Mixture(config)

    def gone(indices):
        raise OSError("the disk is gone")

    monkeypatch.setattr(mixture.sources[0], "_read", gone)
    stream = open_stream(config, vocabulary, mixture)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    stream.close()
    assert np.array_equal(mixture.rows(0, 1).here, [4, 4])


def test_texts_that_are_too_long_for_the_model_are_said_once(caplog):
    config = data_config(dict(builtin="scenes", weight=1.0), batch=64)
    config.model.image_size = config.model.patch_size = 8
    vocabulary = run_vocabulary.vocabularies.train(["a red circle", "blue"] * 9, 300, "memory://v")

    def warnings(max_len, process=0):
        config.model.text.max_len = max_len
        mixture = Mixture(config, process_index=process, process_count=2)
        stream = DirectStream(Batches(config, vocabulary, mixture))
        caplog.clear()
        taken = take(stream, 12)
        stream.close()
        full = sum(int(batch["text_valid"][:, -1].sum()) for batch in taken[:8])
        return full, [line for line in caplog.messages if "max_len" in line]

    full, said = warnings(100)
    assert 26 < full < 512 and said == [
        f"scenes [train]: {full} of the first 512 texts fill all model.text.max_len=100 tokens, "
        "and what is longer loses its end; raise it to learn them whole"
    ]
    assert warnings(100, process=1) == (full, [])  # the first process has said it
    full, said = warnings(600)
    assert full == 0 and said == []
    # What no loss and no head reads loses nothing.
    config.head.kind = "classification"
    config.loss.contrastive_weight = config.loss.captioning_weight = 0.0
    assert warnings(100)[0] > 26 and warnings(100)[1] == []
    config.head.kind = "answer"
    assert len(warnings(100)[1]) == 1
