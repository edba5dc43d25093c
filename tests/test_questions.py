"""Questions about images and statements about pairs, from files on disk to answers."""

import io
import json
import shutil
import tarfile

import jax
import numpy as np
import pytest
from conftest import tiny_config
from one_device import train_alone as train
from PIL import Image

import coca_jax
from coca_jax.cli.prepare import prepare
from coca_jax.config import typed
from coca_jax.data import filters, mixture, supervision, vocabulary
from coca_jax.data.batches import open_stream
from coca_jax.data.evaluation_data import Records
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import Draw
from coca_jax.data.vocabulary import base
from coca_jax.runtime import json_files
from coca_jax.training import data_flag, run_vocabulary

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "black": (9, 9, 9)}


def png(colour):
    data = io.BytesIO()
    Image.new("RGB", (16, 16), COLOURS[colour]).save(data, "PNG")
    return data.getvalue()


def write_tar(path, examples):
    """examples: key -> {suffix: bytes or something for JSON}."""
    with tarfile.open(path, "w") as archive:
        for key, members in examples.items():
            for suffix, value in members.items():
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Prepared data of four images with three questions each, and no caption."""
    folder = tmp_path_factory.mktemp("asked")
    examples = {}
    for number, name in enumerate(COLOURS):
        qa = [dict(question="what color is it?", answer=name)]
        qa += [dict(question="is it red?", answer="yes" if name == "red" else "no")]
        qa += [dict(question="is it not red?", answer="no" if name == "red" else "yes")]
        examples[f"{number:03d}"] = {"png": png(name), "json": dict(qa=qa)}
    write_tar(folder / "train.tar", examples)
    result = prepare("webdataset", str(folder / "train.tar"), str(folder / "out"), processes=1)
    assert result["written"] == 4 and result["with_text"] == 0
    return str(folder / "out")


def test_questions_without_an_answer_are_left_out():
    given = [
        *(dict(question="a?", answer=none) for none in (None, "", " ", [], [None, ""])),
        *(dict(question=none, answer="b") for none in (None, " ")),
        dict(question="many?", answer=[2, None, "two", " "]),
        dict(question="many?", answer=0),
    ]
    record = Record(b"", (), (), "k", json.dumps(dict(qa=given)))
    assert supervision.questions_of(record, "qa") == [("many?", ("2", "two")), ("many?", ("0",))]


def question_config(path):
    config = tiny_config(bias=False)
    config.model.text.update(vocab_size=300, max_len=24, unimodal_depth=1, multimodal_depth=1)
    config.model.image.depth = 1
    config.batch_size, config.steps = 24, 220
    config.head.kind = "answer"
    config.loss.update(contrastive_weight=0.0, captioning_weight=1.0)
    config.optimizer.update(learning_rate=1e-2, weight_decay=0.0, beta2=0.98, warmup_steps=0)
    source = dict(path=path, split="train", kind="question", questions="qa")
    config.data.sources = (source,)
    config.log.every_steps = 50
    config.eval.tasks = (
        dict(kind="classification", name="asked", data=source),
        dict(kind="answers", name="asked", data=source),
    )
    return config


def test_each_question_is_an_example(asked):
    source = filters.open_source(dict(path=asked, kind="question", questions="qa"))
    assert len(source) == 12
    records = source.read([0, 4, 11])
    assert [r.texts[0] for r in records] == ["what color is it?", "is it red?", "is it not red?"]
    assert [r.labels for r in records] == [("red",), ("no",), ("yes",)]
    assert records[0].image == png("red") and len({r.key for r in records}) == 3
    assert source.read_texts([4])[0].texts == ("is it red?",)
    entry = dict(path=asked, kind="question", questions="qa")
    assert mixture.class_names(entry, "train") == sorted([*COLOURS, "yes", "no"])
    with pytest.raises(ValueError, match="no record has a question and an answer"):
        filters.open_source(dict(path=asked, kind="question", questions="other"))


def test_questions_are_chosen_by_their_answers(asked):
    entry = dict(path=asked, kind="question", questions="qa")
    source = filters.open_source(dict(entry, answers=("yes", "no")))
    assert len(source) == 8 and {r.labels[0] for r in source} == {"yes", "no"}
    assert [r.texts[0] for r in source.read([0, 1])] == ["is it red?", "is it not red?"]
    colours = filters.open_source(dict(entry, answers=tuple(COLOURS)))
    assert [r.labels for r in colours] == [(name,) for name in COLOURS]
    with pytest.raises(ValueError, match="no record has .* one of .'pink'."):
        filters.open_source(dict(entry, answers=("pink",)))


def test_a_question_that_holds_the_border_of_questions_and_answers_stays_whole(tmp_path):
    words = vocabulary.train(["what is it? yes"] * 9, 300, str(tmp_path / "v"))
    record, draw = Record(b"", ("what\x1fis it?",), ("yes\x1fno",), "k"), Draw(0, 0, np.arange(1))
    kind = supervision.Question()
    tokens, _, prompt = kind.encode(words, kind.choose([record], {}, draw)[0], 40, False)
    assert words.decode(tokens[0, : prompt[0]]) == "what is it?"


def test_own_data_are_asked_as_the_recipe_asks(asked, tmp_path, capsys):
    """Questions were taken from texts and labels, whatever the recipe says."""
    recipe = typed(question_config("of_the_recipe"))
    answers = [tuple(COLOURS), ("yes", "no")]
    entry = dict(recipe.data.sources[0].to_dict(), path="of_the_recipe")
    both = [dict(entry, answers=some, weight=w) for some, w in zip(answers, (1.0, 2.0))]
    of_two = recipe.change({"data.sources": tuple(both)})
    workdir, images = str(tmp_path / "run"), tmp_path / "mine"
    images.mkdir()
    for split in ("train", "test"):
        shutil.copy(asked.removesuffix("out") + "train.tar", images / f"{split}.tar")
    flag = [f"{images}:question"]
    found = data_flag.apply(of_two, flag, workdir)
    place = dict(path=f"{workdir}/data/mine", kind="question", questions="qa")
    assert [s.to_dict() for s in found.data.sources] == [
        dict(place, split="train", answers=some, weight=rows)
        for some, rows in zip(answers, (8, 16))
    ]
    assert [t["data"] for t in found.eval.tasks] == [dict(place, split="test")]
    assert (
        "questions of their field 'qa', of which its `answers` in the recipe"
        in capsys.readouterr().err
    )
    # A run that goes on finds its sources, before its data are looked at.
    json_files.write_sealed(
        tmp_path / "run" / "config.json", json.loads(json.dumps(found.to_dict()))
    )
    assert data_flag.apply(of_two, flag, workdir) == found
    # A recipe that says nothing of the field would ask nothing, or something else.
    for source in (dict(entry, questions=""), dict(path="x")):
        other = recipe.change({"data.sources": (source,)})
        with pytest.raises(ValueError, match="in the field 'qa', which the recipe does not name; "):
            data_flag.apply(other, [f"{asked}:question"], str(tmp_path / "other"))


def test_question_and_answer_share_a_row(asked, tmp_path, monkeypatch):
    words = vocabulary.train(
        ["is it not red?", "what color is it? green"] * 9, 310, str(tmp_path / "v")
    )
    tokens, valid, prompt = words.encode_answers(["is it red?", "a b " * 40], ["yes", "no"], 32)
    question = [words.bos_id, *words.encode("is it red?")]
    assert tokens[0, : prompt[0]].tolist() == question
    assert words.decode(tokens[0, prompt[0] :]) == "yes"
    assert prompt[1] == 28 and words.decode(tokens[1, 28:]) == "no"  # cut, with room to answer
    assert valid.sum(1)[0] == len(question) + len(words.encode("yes")) + 1
    said = []
    monkeypatch.setattr(
        base.logging,
        "log_first_n",
        lambda level, text, n, *values: said.append(text % values),
    )
    words.encode_answers(["is it red?", "is it?"], ["zzzzzzzz" * 4, "no"], 32)
    assert len(said) == 1 and "model.text.max_len=32 cuts the answer 'zzzz" in said[0]


@pytest.fixture(scope="module")
def learned(asked, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("learned"))
    return workdir, train(question_config(asked), workdir)


@pytest.mark.long
def test_questions_are_learned_by_heart_by_head_and_decoder(learned, asked):
    workdir, summary = learned
    assert summary["classification/asked/top1"] == 1.0
    assert summary["answers/asked/exact_match"] == 1.0
    assert summary["answers/asked/exact_match_count"] == 12
    model = coca_jax.load(workdir, devices=jax.devices()[:1])
    images = [png("green"), png("red"), png("red")]
    questions = ["what color is it?", "is it red?", "is it not red?"]
    best = model.classify(images, questions).argmax(1)
    assert [model.class_names[i] for i in best] == ["green", "yes", "no"]
    assert model.answer(images, questions) == ["green", "yes", "no"]
    with pytest.raises(ValueError, match="2 texts for 3 images"):
        model.classify(images, questions[:2])
    with pytest.raises(ValueError, match="2 questions for 3 images"):
        model.answer(images, questions[:2])


def test_an_answer_outside_the_classes_is_named_or_skipped(asked, tmp_path):
    config = question_config(asked)
    config.steps, config.eval.tasks = 1, ()
    (tmp_path / "classes.txt").write_text("yes\nno\n")
    config.head.classes = str(tmp_path / "classes.txt")
    words = vocabulary.load(_words(config, tmp_path))
    with pytest.raises(ValueError, match="'train.tar/00.*not among the 2 classes"):
        next(open_stream(config, words, class_names=["yes", "no"]))
    config.head.unknown = "skip"
    class_id = next(open_stream(config, words, class_names=["yes", "no"]))["class_id"]
    assert (class_id == -1).sum() == 8 and (class_id == 0).sum() == 8  # two epochs of twelve


def _words(config, folder):
    run_vocabulary.load_or_train(config, str(folder))
    return str(folder / run_vocabulary.VOCABULARY_FILE)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Prepared pairs of images, each with a statement that holds or not."""
    folder = tmp_path_factory.mktemp("pairs")
    examples = {}
    for i, left in enumerate(COLOURS):
        for j, right in enumerate(COLOURS):
            truth = "True" if left == right else "False"
            fields = dict(text="both have the same color", label=truth)
            members = {"left.png": png(left), "right.png": png(right), "json": fields}
            examples[f"{i}{j}"] = members
    write_tar(folder / "train.tar", examples)
    out, options = str(folder / "out"), prepare_options("left.png,right.png")
    result = prepare("webdataset", str(folder / "train.tar"), out, options=options, processes=1)
    assert result["written"] == 16
    return out


def prepare_options(image_field):
    from coca_jax.data.sources.items import Options

    return Options(image_field=image_field)


def found_pixels():
    """Red beside blue, red beside red: uint8 [2, 2, 16, 16, 3]."""
    red, blue = (np.broadcast_to(np.uint8(COLOURS[c]), (16, 16, 3)) for c in ("red", "blue"))
    return np.stack([np.stack([red, blue]), np.stack([red, red])])


@pytest.mark.long
def test_pairs_reach_the_model_in_order_and_are_evaluated(pairs, tmp_path):
    config = question_config(pairs)
    source = dict(path=pairs, split="train", kind="question")
    config.data.sources = (source,)
    config.batch_size, config.steps = 16, 4
    config.head.kind = "pair"
    config.loss.captioning_weight = 0.0
    config.eval.tasks = (dict(kind="classification", name="pairs", data=source),)
    summary = train(config, str(tmp_path / "run"))
    assert summary["classification/pairs/top1_count"] == 16
    model = coca_jax.load(str(tmp_path / "run"), devices=jax.devices()[:1])
    assert model.class_names == ["False", "True"]
    words = vocabulary.load(str(tmp_path / "run" / "vocabulary.model"))
    batch = next(open_stream(config, words, class_names=model.class_names))
    assert batch["image"].shape == (16, 2, 16, 16, 3)
    same = (batch["image"][:, 0] == batch["image"][:, 1]).all((1, 2, 3))
    np.testing.assert_array_equal(batch["class_id"], same)
    records = list(Records(source))
    assert (records[1]["image"], records[1]["second"]) == (png("red"), png("green"))
    texts = ["both have the same color"] * 2
    found = model.classify([[png("red"), png("blue")], [png("red"), png("red")]], texts)
    assert found.shape == (2, 2)
    np.testing.assert_allclose(model.classify(found_pixels(), texts), found, atol=1e-6)


def test_single_images_are_refused_as_pairs(asked, tmp_path):
    config = question_config(asked)
    config.steps, config.eval.tasks = 1, ()
    config.head.kind, config.loss.captioning_weight = "pair", 0.0
    with pytest.raises(ValueError, match="has one image and head.kind='pair' takes two"):
        next(open_stream(config, vocabulary.load(_words(config, tmp_path)), class_names=["yes"]))
    config.data.augment = "crop"
    with pytest.raises(ValueError, match="pairs are not augmented"):
        train(config, str(tmp_path / "other"))
