"""Data of Hugging Face's `datasets`: from a hub (a local server), and what save_to_disk wrote."""

import io
import json
import random

import numpy as np
import pytest
from hub_stand_in import Hub
from PIL import Image
from prepare_cases import import_data

datasets = pytest.importorskip("datasets", reason="needs the extra 'datasets'")

from coca_jax.data import filters  # noqa: E402
from coca_jax.data.sources import formats, hf_datasets  # noqa: E402
from coca_jax.data.sources.items import Options  # noqa: E402

FLAGS = (
    *("--config=tiny", "--config.steps=3", "--config.batch_size=4", "--config.eval.every_steps=0"),
    *("--config.checkpoint.every_steps=1", "--json"),
)


def png(number):
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pets(count):
    """Pictures with a caption and a label."""
    features = datasets.Features(
        picture=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    rows = dict(
        picture=[dict(bytes=png(n), path=None) for n in range(count)],
        caption=[f"a {'dog' if n % 2 else 'cat'} number {n}" for n in range(count)],
        label=[n % 2 for n in range(count)],
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    (root / "me/pets/data").mkdir(parents=True)
    for split, count in (("train", 12), ("test", 4), ("test_hard", 3)):
        pets(count).to_parquet(str(root / f"me/pets/data/{split}-00000-of-00001.parquet"))
    with Hub(root) as server:
        yield server


def test_a_run_trains_resumes_and_is_scored_on_a_dataset_of_the_hub(hub, commands, tmp_path):
    env = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    train = ["train", "--data=hf://me/pets:caption", "--workdir=run", *FLAGS]
    done = commands.run(train, tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert "12 examples of split 'train' train" in done.stderr
    assert "4 of 'test' are held out" in done.stderr
    done = commands.run([*train, "--config.steps=5"], tmp_path, env)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["steps"] == 5
    score = ["evaluate", "--checkpoint=run", "--data=hf://me/pets:test", "--tasks=zero_shot"]
    done = commands.run([*score, "--out=scores", "--json"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores/eval.json").read_text())
    assert scores["zero_shot/pets_test/top1_count"] == 4
    prepare = ["prepare", "--input=hf://me/pets:test", "--out=copy", "--split=mine"]
    done = commands.run(prepare, tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["written"] == 4  # and none of test_hard
    for name, says in (
        ("me/none", "hf://me/none: `datasets` cannot load it"),
        ("me/pets:dev", "no split 'dev'; it has test, test_hard, train"),
        ("pets", "hf://pets: write hf://OWNER/NAME"),
    ):
        done = commands.run(
            ["train", f"--data=hf://{name}", "--workdir=new", *FLAGS], tmp_path, env
        )
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("several", [True, False])
def test_what_save_to_disk_wrote_is_read_in_place(several, tmp_path):
    whole = pets(11)
    folder = tmp_path / "saved"
    if several:
        datasets.DatasetDict(train=whole, test=pets(3)).save_to_disk(str(folder))
    else:
        whole.save_to_disk(str(folder), num_shards=2)
    assert formats.guess(str(folder)) == "arrow"
    assert hf_datasets.splits(str(folder)) == (["test", "train"] if several else [])
    result = import_data("arrow", folder, tmp_path / "index", in_place=True, check=False)
    assert result["written"] == 11
    source = filters.open_source(str(tmp_path / "index"))
    index = b"".join(path.read_bytes() for path in (tmp_path / "index").iterdir())
    assert png(0)[-1000:] not in index  # references, no images
    for number, record in zip((7, 0), source.read([7, 0]), strict=True):
        assert record.image == png(number) and record.labels == (("cat", "dog")[number % 2],)
        assert record.texts == (f"a {'dog' if number % 2 else 'cat'} number {number}",)
    copied = import_data("arrow", folder, tmp_path / "copy")
    assert copied["written"] == 11
    found = [r.image for r in filters.open_source(str(tmp_path / "copy"))]
    assert found == [png(number) for number in range(11)]


def test_columns_are_found_by_name_and_damage_is_a_line(tmp_path):
    pets(3).rename_column("picture", "left").add_column("right", [1, 2, 3]).save_to_disk(
        str(tmp_path / "a")
    )
    with pytest.raises(ValueError, match="no column 'none'; it has .*'left'"):
        hf_datasets.plan(str(tmp_path / "a"), "", Options(image_field="none"))
    (unit,) = hf_datasets.plan(str(tmp_path / "a"), "", Options())
    assert [item.image for item in hf_datasets.read(unit, Options())] == [png(n) for n in range(3)]
    assert hf_datasets.declared_classes(unit, Options()) == ["cat", "dog"]
    file = next((tmp_path / "a").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="not an Arrow file"):
        hf_datasets.plan(str(tmp_path / "a"), "", Options())


def test_changed_bytes_of_an_arrow_file_are_problems_or_lines_and_never_end_the_process(tmp_path):
    pets(20).rename_column("picture", "image").save_to_disk(str(tmp_path / "a"))
    file = next((tmp_path / "a").glob("*.arrow"))
    whole, dice, found = file.read_bytes(), random.Random(2), set()
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 6)):
            at = dice.randrange(dice.choice((len(data), 3000)))
            data[at : at + 4] = bytes([dice.choice((0, 127, 128, 255))] * 4)
        file.write_bytes(data)
        for check in (True, False):
            options = Options(in_place=True, check=check)
            try:
                for unit in hf_datasets.plan(str(tmp_path / "a"), "", options):
                    found |= {item.problem for item in hf_datasets.read(unit, options)}
            except ValueError as error:
                assert str(file) in str(error)
                found.add("line")
    assert {"", "line", "damaged_archive"} <= found
