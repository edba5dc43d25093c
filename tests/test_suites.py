"""`evaluate --suite`: datasets in CLIP_benchmark's layout, scored by CLIP_benchmark itself."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.torch]
pytest.importorskip("torch")
pytest.importorskip("clip_benchmark", reason="needs the extra 'clip-benchmark'")

from conftest import tiny_config  # noqa: E402
from test_inference import random_params  # noqa: E402

import coca_jax  # noqa: E402
from coca_jax import inference  # noqa: E402
from coca_jax.data import vocabulary  # noqa: E402
from coca_jax.inference import export_folder  # noqa: E402
from coca_jax.models import coca  # noqa: E402

CLASSES = ["red", "green", "blue", "dark"]


def write_tar(folder, examples):
    """examples: dicts of suffix -> bytes."""
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for number, example in enumerate(examples):
            for suffix, data in example.items():
                info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "test/nshards.txt").write_text("1\n")


def picture(number):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def exported(tmp_path):
    texts = [f"a {c} thing, a picture of {c} and {i}" for i in range(30) for c in CLASSES]
    words = vocabulary.train(texts, 300, str(tmp_path / "vocabulary.model"), 0)
    config = tiny_config(bias=False)
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=16, unimodal_depth=1, multimodal_depth=1)
    model = inference.CoCaModel(config, random_params(coca.build(config.model)), words)
    export_folder.write(model, str(tmp_path / "exported"))
    return tmp_path / "exported"


@pytest.fixture
def sets(tmp_path):
    labelled = tmp_path / "sets/colours"
    images = [picture(number) for number in range(12)]
    write_tar(labelled, [dict(png=png(x), cls=str(n % 4).encode()) for n, x in enumerate(images)])
    (labelled / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (labelled / "zeroshot_classification_templates.txt").write_text("a {c} thing\nin {c}\n")
    captions = tmp_path / "sets/captions"
    texts = [f"a picture of {CLASSES[n % 4]} and {n}" for n in range(12)]
    write_tar(captions, [dict(png=png(x), txt=t.encode()) for x, t in zip(images, texts)])
    (captions / "dataset_type.txt").write_text("retrieval\n")
    return images, texts


def test_a_suite_is_scored_by_clip_benchmark(sets, exported, commands, tmp_path):
    images, texts = sets
    command = ["evaluate", f"--checkpoint={exported}", "--root=sets/{dataset}", "--out=out"]
    done = commands.run([*command, "--suite=wds/colours,wds/captions"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/eval.json").read_text())
    model = coca_jax.load(str(exported))
    embeddings = model.encode_image(images)
    classes = [
        model.encode_text([f"a {name} thing", f"in {name}"], labels=True).mean(0)
        for name in CLASSES
    ]
    classes = np.stack([x / np.linalg.norm(x) for x in classes])
    right = (embeddings @ classes.T).argmax(1) == np.arange(12) % 4
    assert found["suite/colours/acc1"] == pytest.approx(right.mean())
    right = (embeddings @ model.encode_text(texts).T).argmax(1) == np.arange(12)
    assert found["suite/captions/text_retrieval_recall@1"] == pytest.approx(right.mean())
    assert json.loads((tmp_path / "out/suite/colours.json").read_text())["dataset"] == "wds/colours"
    done = commands.run([*command, "--suite=wds/none"], tmp_path)
    assert done.returncode == 2 and "--suite=wds/none" in done.stderr.splitlines()[-1]
