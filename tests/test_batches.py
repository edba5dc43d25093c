"""Batches: the order, the exact shares, the pixels, and what happens to bad images."""

import io
import json
import shutil

import numpy as np
import pytest
from data_cases import (
    COLOURS,
    damage,
    data_config,
    equal,
    picture,
    take,
    three_sources,
    write_data,
    write_folder,
)
from PIL import Image

from coca_jax.cli import prepare
from coca_jax.config import Entry, typed
from coca_jax.data import filters, images, prompts, texts
from coca_jax.data import vocabulary as vocabularies
from coca_jax.data.batches import open_stream
from coca_jax.data.evaluation_data import Records
from coca_jax.data.mixture import Mixture, class_names, nearest_shares, shares
from coca_jax.data.sources import items
from coca_jax.evaluation.evaluators import base
from coca_jax.training import run_vocabulary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mixture(data):
    config = three_sources(data)
    return config, run_vocabulary.load_or_train(config, str(data / "workdir"))


def test_batches_are_as_the_contract_says(mixture):
    config, vocabulary = mixture
    batch = next(open_stream(config, vocabulary))
    shapes = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
    assert shapes == dict(
        image=("uint8", (8, 16, 16, 3)),
        tokens=("int32", (8, 32)),
        text_valid=("bool", (8, 32)),
        is_label=("bool", (8,)),
        text_id=("int32", (8, 2)),
        prompt_len=("int32", (8,)),
        class_id=("int32", (8,)),
        source=("int32", (8,)),
        index=("int64", (8,)),
    )
    assert np.bincount(batch["source"]).tolist() == [4, 2, 2]
    assert np.array_equal(batch["is_label"], batch["source"] == 1)
    assert np.array_equal(batch["prompt_len"], batch["text_valid"].sum(1))
    assert (batch["class_id"] == -1).all()  # no task head, no class


def test_order_is_independent_of_hosts_and_resume_over_three_epochs(mixture):
    config, vocabulary = mixture
    steps = 120  # examples of each source: 480, 240, 240
    batches = open_stream(config, vocabulary)
    whole = take(batches, steps)
    for processes, start in ((2, 0), (4, 0), (2, 97), (4, 97)):
        parts = [
            take(
                open_stream(
                    config,
                    vocabulary,
                    start_step=start,
                    process_index=index,
                    process_count=processes,
                ),
                12,
            )
            for index in range(processes)
        ]
        for step, hosts in enumerate(zip(*parts), start):
            joined = {k: np.concatenate([h[k] for h in hosts]) for k in hosts[0]}
            assert equal(joined, whole[step])
    for step in (0, 50, 119):  # `prepare inspect` tells the same
        told = Mixture(config).step_examples(step)
        assert [row["index"] for row in told] == whole[step]["index"].tolist()
        assert [row["text"] for row in told] == [
            vocabulary.decode(t) for t in whole[step]["tokens"]
        ]
    epochs = [batches.progress(steps)[f"epoch/{number}"] for number in range(3)]
    assert epochs == [480 / 23, 240 / 17, 3.0]
    resumed = open_stream(config, vocabulary, start_step=37)
    assert all(equal(a, b) for a, b in zip(take(resumed, 5), whole[37:]))
    for number, size in enumerate((23, 17, 80)):
        seen = np.concatenate([b["index"][b["source"] == number] for b in whole])
        assert len(seen) >= 3 * size
        for epoch in range(len(seen) // size):
            assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_texts_belong_to_their_images(mixture):
    config, vocabulary = mixture
    captions = set()
    for batch in take(open_stream(config, vocabulary), 30):
        for tokens, source, index in zip(batch["tokens"], batch["source"], batch["index"]):
            text = vocabulary.decode(tokens)
            if source == 1:
                assert list(COLOURS)[index % 3] in text and "square" in text
            else:
                record = index if source == 0 else index // 2
                assert text in (f"picture {record}", f"number {record}")
                captions |= {text} if source == 0 else set()
    assert len(captions) > 40  # of 46: both captions of an image get their turn


def test_equal_labels_share_their_id_whatever_the_prompt(mixture):
    config, vocabulary = mixture
    ids: dict = {}
    for batch in take(open_stream(config, vocabulary), 10):
        for label, index, text_id in zip(batch["is_label"], batch["index"], batch["text_id"]):
            if label:
                ids.setdefault(index % 3, set()).add(tuple(text_id))
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == 3


def test_label_token_stands_after_begin(mixture):
    config, vocabulary = mixture
    config = config.copy_and_resolve_references()
    config.data.label_token = True
    batch = next(open_stream(config, vocabulary))
    assert np.array_equal(batch["tokens"][:, 1] == vocabulary.label_id, batch["is_label"])


def test_pixels_equal_those_of_evaluation(data, tmp_path):
    config = data_config(dict(path=str(data / "c")), prompts="plain")
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    batch = next(open_stream(config, vocabulary))
    for pixels, index in zip(batch["image"], batch["index"]):
        wanted = images.preprocess_eval(picture(int(index)), 16)
        assert np.abs(pixels.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["crop", "inception", "drawing", "randaugment"])
def test_augmentations_change_pixels_and_repeat(data, mode, tmp_path):
    config = data_config(dict(path=str(data / "c")), augment=mode, flip=True)
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    first, second = (next(open_stream(config, vocabulary)) for _ in range(2))
    assert equal(first, second)
    plain = np.stack([images.preprocess_eval(picture(int(i)), 16) for i in first["index"]])
    changed = np.abs(first["image"].astype(int) - plain).mean((1, 2, 3))
    assert (changed > 0.5).mean() > 0.5


def test_every_format_and_transparency_give_right_pixels(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((60, 45))
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = smooth.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (3, 4), dtype=np.uint8)).resize((60, 45)))
    smooth.save(folder / "0.jpg", quality=95)
    smooth.save(folder / "1.jpg", quality=95, exif=exif)
    smooth.convert("CMYK").save(folder / "2.jpg", quality=95)
    smooth.convert("L").save(folder / "3.png")
    alpha.save(folder / "4.png")
    alpha.save(folder / "5.webp", lossless=True)
    smooth.save(folder / "6.gif")
    Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257).save(folder / "7.png")
    rows = [dict(file_name=p.name, text=p.name) for p in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.prepare("imagefolder", str(folder), str(tmp_path / "out"), progress=False)
    config = data_config(dict(path=str(tmp_path / "out")))
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "workdir"))
    batch = next(open_stream(config, vocabulary))
    for pixels, index in zip(batch["image"], batch["index"]):
        wanted = images.preprocess_eval(images.decode(folder / rows[index]["file_name"]), 16)
        assert np.abs(pixels.astype(int) - wanted).max() <= 6, rows[index]


@pytest.mark.parametrize("fast", [False, True])
def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path, fast):
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, side in enumerate((40, 80, 200, 401)):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        small.resize((side + 30, side), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", quality=95
        )
    rows = [dict(file_name=p.name, text=p.name) for p in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.prepare("imagefolder", str(folder), str(tmp_path / "out"), progress=False)
    config = data_config(dict(path=str(tmp_path / "out")), batch=4)
    with config.unlocked():
        config.data.fast_resize = fast
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "workdir"))
    for mode in ("none", "drawing", "crop"):
        config.data.augment = mode
        batch = next(open_stream(config, vocabulary))
        if mode == "none":
            for pixels, index in zip(batch["image"], batch["index"]):
                wanted = images.preprocess_eval(images.decode(folder / f"{index}.jpg"), 16)
                assert np.abs(pixels.astype(int) - wanted).mean() <= (6 if fast else 4)


def test_undecodable_images_are_stepped_over(tmp_path):
    folder = write_folder(tmp_path / "raw", 30)
    for index in (3, 4, 20):
        damage(folder / f"{index:04d}.png")
    out = str(tmp_path / "out")
    prepare.prepare(
        "imagefolder", str(folder), out, options=items.Options(check=False), progress=False
    )
    config = data_config(dict(path=out), max_bad_fraction=0.2)
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    batches = open_stream(config, vocabulary)
    whole = take(batches, 15)
    seen = np.concatenate([b["index"] for b in whole])
    assert set(seen.tolist()) == set(range(30)) - {3, 4, 20}
    epoch = seen[:30].tolist()
    assert len(set(epoch)) == 27  # three of them twice, in the places of the damaged ones
    assert batches.skipped() == [3] and batches.progress(15)["bad_images"] == 3
    resumed = open_stream(config, vocabulary, start_step=7)
    assert all(equal(a, b) for a, b in zip(take(resumed, 3), whole[7:]))
    config.data.max_bad_fraction = 0.03
    with pytest.raises(ValueError, match="n.: 3 of the 30 images .*max_bad_fraction=0.03"):
        take(open_stream(config, vocabulary), 15)


def test_a_damaged_shard_costs_only_its_damaged_record(tmp_path):
    folder = write_folder(tmp_path / "raw", 30)
    prepare.prepare("imagefolder", str(folder), str(tmp_path / "out"), progress=False)
    shard = tmp_path / "out" / "train-00000-of-00001.array_record"
    content = bytearray(shard.read_bytes())
    place = content.index((folder / "0009.png").read_bytes()) + 20
    content[place : place + 4] = bytes(4)
    shard.write_bytes(content)
    config = data_config(dict(path=str(tmp_path / "out")), max_bad_fraction=0.2)
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path / "run"))  # of the other texts
    batches = open_stream(config, vocabulary)
    seen = np.concatenate([b["index"] for b in take(batches, 15)])
    assert set(seen.tolist()) == set(range(30)) - {9}
    source = filters.open_source(config.data.sources[0])
    with pytest.raises(ValueError, match="record 9 cannot be read: .*; the classes are"):
        source.labels()
    texts = sum(len(source.read([index])[0].texts) for index in range(30) if index != 9)
    place = str(tmp_path / "w.model")
    trained = prepare.train_vocabulary([str(tmp_path / "out")], 300, place, 1000)
    assert trained["sentences"] == texts


def test_where_text_field_and_limit(data):
    path = str(data / "a")
    found = filters.open_source(dict(path=path, where={"group": 1}))
    assert len(found) == 11 and all(json.loads(r.extra)["group"] == 1 for r in found)
    found = filters.open_source(dict(path=path, text_field="group", limit=4))
    assert [r.texts for r in found] == [("0",), ("1",), ("0",), ("1",)]
    assert len(list(Records(dict(path=path, split="train"), limit=5))) == 5
    assert class_names(path) == ["blue", "green", "red", "square"]
    assert Mixture(data_config(dict(path=path), dict(path=path, captions="all"))).num_examples == 69


@pytest.mark.parametrize(
    "weights, batch", [([1.0], 8), ([1, 1, 1], 8), ([7, 1], 128), ([1, 99], 8)]
)
def test_shares_are_whole_rows(weights, batch):
    rows = nearest_shares(weights, batch)
    assert sum(rows) == batch and min(rows) >= 1
    exact = [weight / sum(weights) * batch for weight in weights]
    assert all(abs(a - b) < 1 for a, b in zip(rows, exact))


def test_weights_that_give_no_whole_rows_are_answered_with_some_that_do():
    def of(*weights):
        return [Entry.of(dict(builtin="scenes", weight=weight)) for weight in weights]

    message = r"128 with source weights \[1.0, 0.25\] .* weights \[102, 26\] do; or change"
    with pytest.raises(ValueError, match=message):
        shares(of(1.0, 0.25), 128)
    assert shares(of(102.0, 26.0), 128) == [102, 26]
    assert shares(of(0.333333, 0.333333, 0.333334), 768) == [256] * 3
    with pytest.raises(ValueError, match=r"weights \[349526, 349525, 349525\] do"):
        shares(of(1.0, 1.0, 1.0), 1 << 20)
    assert shares(of(349526.0, 349525.0, 349525.0), 1 << 20) == [349526, 349525, 349525]
    with pytest.raises(ValueError, match="give a batch_size of at least 3"):
        shares(of(1.0, 1.0, 1.0), 2)


def test_errors_come_before_the_work(data, tmp_path):
    path = str(data / "a")
    cases = {
        "not whole numbers": data_config(dict(path=path), dict(path=path), dict(path=path)),
        "no such folder": data_config(dict(path=str(data / "absent"))),
        "`coca-jax prepare --format=imagefolder": data_config(dict(path=str(data / "raw" / "a"))),
        "no split 'test'": data_config(dict(path=path, split="test")),
        "no key 'knd'; did you mean config.data.sources.0..kind": data_config(
            dict(path=path, knd="label")
        ),
        "exactly one of": data_config(dict(kind="label")),
        "no record has": data_config(dict(path=path, where={"group": 9})),
        "data.sources is empty": data_config(),
        "kind='x'": data_config(dict(path=path, kind="x")),
        "data.augment": data_config(dict(path=path), augment="mosaic"),
    }
    vocabulary = run_vocabulary.load_or_train(data_config(dict(path=path)), str(data / "workdir3"))
    for message, config in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_stream(typed(config), vocabulary)
    with pytest.raises(ValueError, match="3 processes"):
        open_stream(data_config(dict(path=path)), vocabulary, process_count=3)


def test_vocabulary_of_a_run(mixture, data, tmp_path, caplog):
    config, vocabulary = mixture
    # Of a start that was stopped, whose data may have been others: used, and said to be.
    again = run_vocabulary.load_or_train(config, str(data / "workdir"))
    assert again.checksum == vocabulary.checksum
    assert (
        f"the {vocabulary.size} pieces of {data}/workdir/vocabulary.model are used" in caplog.text
    )
    shutil.copytree(data / "workdir", tmp_path / "began")
    (tmp_path / "began/config.json").touch()
    caplog.clear()
    run_vocabulary.load_or_train(config, str(tmp_path / "began"))
    assert not caplog.text
    config = config.copy_and_resolve_references()
    config.model.text.vocab_size = 300
    with pytest.raises(ValueError, match="vocab_size=300 is less"):
        run_vocabulary.load_or_train(config, str(data / "workdir"))
    config.model.text.vocab_size = 400
    vocabulary.save(tmp_path / "given.model")
    config.data.vocabulary = str(tmp_path / "given.model")
    given = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    assert given.checksum == vocabulary.checksum and (tmp_path / "run/vocabulary.model").exists()
    # A start that is refused leaves no vocabulary behind for the next one to meet.
    config.model.text.vocab_size = 300
    with pytest.raises(ValueError, match="vocab_size=300 is less"):
        run_vocabulary.load_or_train(config, str(tmp_path / "refused"))
    assert not (tmp_path / "refused/vocabulary.model").exists()
    vocabularies.train(["other texts"] * 50, 320, tmp_path / "run/vocabulary.model", 0)
    with pytest.raises(ValueError, match="or remove that file: no run began here yet"):
        run_vocabulary.load_or_train(config, str(tmp_path / "run"))


def test_label_texts_shuffle_names_and_prompts():
    labels = [["cat", "animal"]] * 400
    draw = texts.Draw(0, 0, np.arange(400))
    found, same = texts.label_texts(labels, prompts.PLAIN, draw)
    assert set(found) == {"a photo of the cat, animal", "a photo of the animal, cat"}
    assert 150 < found.count("a photo of the cat, animal") < 250
    assert len(set(same)) == 1
    assert len(set(texts.label_texts(labels, prompts.VARIED, draw)[0])) > 60


def test_prompt_sets(tmp_path):
    assert prompts.load("plain") == ("a photo of the {}",)
    assert prompts.load("bare") == ("{}",)
    assert len(set(prompts.load("varied"))) >= 40
    assert len(prompts.load("clip")) == 80 == len(set(prompts.CLIP))
    assert set(prompts.load("clip7")) <= set(prompts.CLIP)
    for texts_of_set in prompts.SETS.values():
        assert prompts.check(texts_of_set) == texts_of_set
    (tmp_path / "p.txt").write_text("one {}\n\ntwo {} x\n")
    assert prompts.load(str(tmp_path / "p.txt")) == ("one {}", "two {} x")
    for content, message in (("none\n", "must hold '{}' once"), ("\n", "prompts are empty")):
        (tmp_path / "p.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            prompts.load(str(tmp_path / "p.txt"))
    with pytest.raises(ValueError, match="prompts is 'absent'; use one of bare, plain, photo"):
        prompts.load("absent")


def test_a_set_name_means_the_same_texts_in_training_and_evaluation(tmp_path):
    """Once 'plain' was 'a photo of the {}' for the one and '{}' for the other."""
    for name in prompts.SETS:
        task = dict(kind="zero_shot", name="x", data={}, class_names=["cat", "dog"], prompts=name)
        evaluator = base.get("zero_shot").from_task(task, base.Setting())
        assert evaluator.prompts == prompts.load(name)


def test_damaged_png_header_counts_as_bad():
    data = io.BytesIO()
    Image.fromarray(picture(0)).save(data, "PNG")
    with pytest.raises(ValueError):
        images.sniff(b"GIF?" + data.getvalue())
