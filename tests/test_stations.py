"""A batch and a photo go where CONTRIBUTING.md says, in that order: calls of runs are watched."""

import itertools
import pathlib
import re
import sys
import threading
import types

import data_cases
import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from test_inference import random_params

import coca_jax
from coca_jax import inference
from coca_jax.data import vocabulary
from coca_jax.data.batches import Batches, DirectStream
from coca_jax.metrics import TimeBuckets
from coca_jax.models import coca
from coca_jax.recipes import typed
from coca_jax.training import programs
from coca_jax.training.feed import Feed
from coca_jax.training.state import state_shardings

PACKAGE = pathlib.Path(coca_jax.__file__).parent
PAGE = (PACKAGE.parent / "CONTRIBUTING.md").read_text()


def stations(title):
    """[(names, files)] of each row of the table below that heading."""
    text = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!station|---)(.+?) \| (.+?) \|$", text, re.M)
    return [(re.findall("`(.+?)`", names), re.findall("`(.+?)`", files)) for names, files in rows]


class Watch:
    """Which functions of the package were called in this block, by any thread that began in it:
    {(file, qualified name): how many others before it}."""

    def __enter__(self):
        self.calls, number, root = {}, itertools.count(), f"{PACKAGE}/"

        def look(frame, event, _):
            code = frame.f_code
            named = not code.co_qualname.endswith(">")  # no comprehension
            if event == "call" and named and code.co_filename.startswith(root):
                key = code.co_filename.removeprefix(root), code.co_qualname
                if key not in self.calls:
                    self.calls[key] = next(number)

        threading.setprofile(look)
        sys.setprofile(look)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def first(self, name, files):
        """When `name`, or a method of it, was called in these files (folders end in '/'); of what
        makes functions, when what it made was."""
        found = {
            qualified: number
            for (file, qualified), number in self.calls.items()
            if f".{name}." in f".{qualified}."
            and any(file == at or at.endswith("/") and file.startswith(at) for at in files)
        }
        assert found, f"nothing called {name} in {files}"
        made = [number for qualified, number in found.items() if f"{name}.<locals>." in qualified]
        return min(made or found.values())

    def check(self, rows):
        """Each file had a call, each name too, and the first name of each row after that of the
        row before it."""
        order = []
        for names, files in rows:
            for file in files:
                assert any(called.startswith(file) for called, _ in self.calls), f"{file}: unused"
            order.append([self.first(name, files) for name in names][0])
        assert order == sorted(order), [(names[0], at) for (names, _), at in zip(rows, order)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocabulary.model"
    texts = [f"{word} {number}" for word in ("picture", "number") for number in range(8)]
    vocabulary.train(texts * 9, 300, str(path), 0)
    return vocabulary.load(path)


def small(**data):
    config = tiny_config(bias=False)
    config.batch_size, config.model.image.depth = 4, 1
    config.model.text.update(vocab_size=320, unimodal_depth=1, multimodal_depth=1)
    config.data.update(data)
    return config


def traced_only(step, **_):
    """In place of jax.jit."""
    return lambda *given: jax.eval_shape(step, *given)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.long
def test_a_batch_goes_through_the_stations_of_the_table(words, tmp_path, one_device_mesh):
    """The step is traced, as before it is compiled, and not run."""
    raw = data_cases.write_folder(tmp_path / "raw", 8)
    data_cases.prepare("imagefolder", str(raw), str(tmp_path / "data"), progress=False)
    given = small(sources=(dict(path=str(tmp_path / "data"), kind="caption", weight=1.0),))
    given.text_lengths = (4,)
    config, mesh = typed(given), one_device_mesh
    model = coca.build(config.model)
    run = types.SimpleNamespace(config=config, mesh=mesh, model=model, steps=5)
    run.buckets, run.begin, run.say = TimeBuckets(), str, str
    state, _ = state_shardings(model, config, mesh)
    stream = DirectStream(Batches(config, words))
    traced = types.SimpleNamespace(**vars(jax) | dict(jit=traced_only))
    step = programs.Programs(run)
    with pytest.MonkeyPatch.context() as patch, Watch() as watch:
        patch.setattr(programs, "jax", traced)
        feed = Feed(stream, config, mesh, run.buckets)
        _, metrics = step(1, state, next(feed))
    feed.close()
    stream.close()
    assert metrics["loss"].shape == ()
    watch.check(stations("A batch, disk to gradient"))


def test_a_photo_goes_through_the_stations_of_the_table(words, tmp_path):
    config = small()
    model = inference.CoCaModel(
        config, random_params(coca.build(config.model)), words, devices=jax.devices()[:1]
    )
    Image.fromarray(data_cases.picture(3)).save(tmp_path / "cat.jpg")
    rows = stations("A photo, path to caption")
    with Watch() as watch:
        assert len(model.caption([str(tmp_path / "cat.jpg")])) == 1
    watch.check(rows)
    with Watch() as watch:
        (embedding,) = model.encode_image([str(tmp_path / "cat.jpg")])
    np.testing.assert_allclose(np.linalg.norm(embedding), 1, rtol=1e-5)
    shared = ("ImageReader.batches", "read_image", "open_image", "Devices.put")
    watch.check([row for row in rows if row[0][0] in shared])
