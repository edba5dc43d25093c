"""`coca_jax.apps.batched`: a model as a function of columns, by itself and in four data engines."""

import io
import pickle

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from test_inference import random_params

import coca_jax
from coca_jax import inference
from coca_jax.apps import batched
from coca_jax.data import vocabulary
from coca_jax.inference import export_folder
from coca_jax.models import coca

COUNT = 7


def picture(number):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))


def png(number):
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    texts = [f"a picture of thing {n}" for n in range(300)]
    words = vocabulary.train(texts, 300, str(folder / "vocabulary.model"), 0)
    config = tiny_config(bias=False)
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=16, unimodal_depth=1, multimodal_depth=1)
    model = inference.CoCaModel(config, random_params(coca.build(config.model)), words)
    export_folder.write(model, str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def model(exported):
    return coca_jax.load(exported)


@pytest.fixture
def columns():
    return dict(
        id=list(range(COUNT)),
        image=[png(number) for number in range(COUNT)],
        text=[f"a picture of thing {number}" for number in range(COUNT)],
    )


def test_captions_of_images_in_every_form_and_reasons_for_bad_ones(
    model, exported, columns, tmp_path
):
    picture(1).save(tmp_path / "1.png")
    images = [png(0), str(tmp_path / "1.png"), picture(2), np.asarray(picture(3))]
    images += [dict(bytes=png(4), path=None), b"no image", None]
    wanted = model.caption([picture(number) for number in range(5)])
    found = batched("captions", exported)(dict(columns, image=images))
    assert found["caption"] == [*wanted, "", ""] and found["id"] == list(range(7))
    assert found["error"][:5] == [""] * 5 and all(found["error"][5:]) and "image" not in found
    short = batched("captions", exported, max_new_tokens=2)(columns)["caption"]
    assert short == model.caption(columns["image"], max_new_tokens=2)


def test_embeddings_and_scores(model, exported, columns):
    columns["image"][2] = b"no image"
    found = batched("embeddings", exported)(columns)
    good = [number for number in range(COUNT) if number != 2]
    images = model.encode_image([picture(number) for number in good])
    np.testing.assert_allclose(found["image_embedding"][good], images, atol=1e-6)
    assert np.isnan(found["image_embedding"][2]).all() and found["error"][2]
    texts = model.encode_text(columns["text"])
    np.testing.assert_allclose(found["text_embedding"], texts, atol=1e-6)
    scores = batched("scores", exported)(columns)["score"]
    np.testing.assert_allclose(scores[good], (images * texts[good]).sum(1), atol=1e-6)
    assert np.isnan(scores[2])
    with pytest.raises(ValueError, match="no column 'text'; there are image"):
        batched("scores", exported)(dict(image=[]))
    with pytest.raises(ValueError, match="'labels'.*captions, embeddings, scores"):
        batched("labels", exported)
    with pytest.raises(ValueError, match="num_beams .*'captions'"):
        batched("scores", exported, num_beams=3)


def test_it_is_pickled_without_its_model(exported, columns):
    annotate = batched("captions", exported)
    first = annotate(columns)
    data = pickle.dumps(annotate)
    assert len(data) < 1000 and pickle.loads(data)(columns) == first


def test_in_datasets_map(model, exported, columns):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    found = data.map(batched("captions", exported), batched=True, batch_size=4)
    assert found["caption"][:] == model.caption(columns["image"])
    data = data.cast_column("image", datasets.Image(decode=False))
    found = data.map(batched("scores", exported), batched=True, batch_size=4)
    assert np.isfinite(found["score"][:]).all() and found["id"][:] == columns["id"]


@pytest.mark.long
def test_in_ray_data(model, exported, columns):
    ray = pytest.importorskip("ray")
    import ray.data  # noqa: F811

    ray.init(num_cpus=1, include_dashboard=False, ignore_reinit_error=True)
    try:
        data = ray.data.from_items([dict(zip(columns, row)) for row in zip(*columns.values())])
        found = data.map_batches(batched("captions", exported), batch_size=4).take_all()
    finally:
        ray.shutdown()
    found = sorted(found, key=lambda row: row["id"])
    assert [row["caption"] for row in found] == model.caption(columns["image"])


def test_in_daft(model, exported, columns):
    daft = pytest.importorskip("daft", reason="needs daft")
    annotate = batched("captions", exported)

    @daft.func.batch(return_dtype=daft.DataType.string())
    def caption(images):
        return annotate(dict(image=images.to_pylist()))["caption"]

    found = daft.from_pydict(columns).select("id", caption(daft.col("image")).alias("caption"))
    assert found.to_pydict()["caption"] == model.caption(columns["image"])


def test_in_spark(model, exported, columns):
    pytest.importorskip("pyspark", reason="needs pyspark and Java")
    import pandas as pd
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[1]").getOrCreate()
    annotate = batched("captions", exported)

    def captions(frames):
        for frame in frames:
            yield pd.DataFrame(annotate(frame.to_dict("list")))

    try:
        data = spark.createDataFrame(pd.DataFrame(columns))
        schema = "id long, text string, caption string, error string"
        found = data.mapInPandas(captions, schema).orderBy("id").collect()
    finally:
        spark.stop()
    assert [row["caption"] for row in found] == model.caption(columns["image"])
