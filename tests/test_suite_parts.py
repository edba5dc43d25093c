"""Parts of the suites that need neither a model nor the peer: lists of pairs, the probe, the
adapter."""

import importlib
import io
import json
import os
import sys
import tarfile
import types

import numpy as np
import pytest
from conftest import flags_of
from PIL import Image

from coca_jax import inference
from coca_jax.apps.suites import compare, folders, linear_probe, measuring, pairs, running, tables
from coca_jax.cli import evaluate
from coca_jax.evaluation import clip_benchmark


def png(colour, size=(10, 8)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def colours(data):
    """Of a picture's left and right half, as mean RGB."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    half = pixels.shape[1] // 2
    return [pixels[:, part].mean((0, 1)).round().tolist() for part in np.s_[:half, half:]]


@pytest.fixture
def folder(tmp_path):
    """Three pictures below `images`, of which the first is half red and half blue."""
    (tmp_path / "images").mkdir()
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[:, :5, 0] = pixels[:, 5:, 2] = 200
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    for name in ("b", "c"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png((0, 50, 0)))
    return tmp_path


def write(folder, name, rows):
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else json.dumps(rows)
    (folder / name).write_text(lines)
    return str(folder / name)


def test_each_layout_of_pairs_gives_its_examples(folder):
    winoground = dict(image_0="a", image_1="b", caption_0="one", caption_1="two")
    path = write(folder, "examples.jsonl", [winoground])
    (one,) = pairs.examples(path)
    assert one["texts"] == ["one", "two"] and len(one["images"]) == 2
    assert one["images"][0] == (folder / "images/a.png").read_bytes()
    vil = dict(cue="colour", candidates=["a", "b", "c"], associations='["c", "a"]')
    (one,) = pairs.examples(write(folder, "vil.jsonl", [vil]))
    assert (one["cue"], one["right"], len(one["images"])) == ("colour", [2, 0], 3)
    aro = dict(image_path="a.png", true_caption="blue", false_caption="red")
    aro |= dict(bbox_x=5, bbox_y=0, bbox_w=5, bbox_h=8)
    (one,) = pairs.examples(write(folder, "aro.json", [aro]))
    assert one["texts"] == ["blue", "red"] and colours(one["images"][0]) == [[0, 0, 200]] * 2
    (folder / "notes.json").write_text("[1, 2]")
    (folder / "broken.json").write_text("{")
    (folder / "aro.json").write_bytes(b"\xef\xbb\xbf" + (folder / "aro.json").read_bytes())
    names = [place.name for place in pairs.lists(str(folder))]
    assert names == ["aro.json", "examples.jsonl", "vil.jsonl"]


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(caption_0=7), "caption_0=7 is not a text"),
        (dict(image_0=7), "image 7 is not a name"),
        (dict(image_0="../a"), "does not lie below the list's folder"),
        (dict(image_0="http://x/a.png"), "does not lie below the list's folder"),
        (dict(image_0="absent"), "no image absent beside it, nor in images, val2017"),
    ],
)
def test_a_bad_pair_is_a_line(folder, change, says):
    row = dict(image_0="a", image_1="b", caption_0="one", caption_1="two") | change
    path = write(folder, "examples.jsonl", [row])
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        list(pairs.examples(path))


def test_a_row_of_no_layout_and_numbers_that_are_none_are_a_line(folder):
    good = dict(image_path="a.png", true_caption="blue", false_caption="red")
    with pytest.raises(ValueError, match="row 1: .* is no such pair"):
        list(pairs.examples(write(folder, "aro.json", [good, dict(image_path="a.png")])))
    boxed = good | dict(bbox_x="left", bbox_y=0, bbox_w=5, bbox_h=8)
    with pytest.raises(ValueError, match="bbox_x=left is not a number of pixels"):
        list(pairs.examples(write(folder, "aro.json", [boxed])))
    vil = dict(cue="colour", candidates="[1, 2]", associations="[]")
    with pytest.raises(ValueError, match=r"\[1, 2\] is not a list of names"):
        list(pairs.examples(write(folder, "vil.jsonl", [vil])))


@pytest.mark.torch
def array(values):
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def tar_set(folder, members, **files):
    """A set of one tar with one example of these members; files: its texts by their names."""
    texts = dict(classnames="red\nblue\n", zeroshot_classification_templates="a {c}\n") | files
    (folder / "test").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "test/nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"some/s0.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(folder)


def test_an_example_s_group_and_captions_are_where_sets_have_them(tmp_path):
    image = dict(jpg=b"of the jpg", png=b"of the png")  # of several the first that the peer takes
    of_class = image | dict(cls=b"1")
    for number, (members, group) in enumerate(
        (
            (of_class | dict(npy=array([7, 3])), dict(group=7)),
            (of_class | dict(json=b'{"income": "low"}'), dict(group="low")),
            (of_class | dict(json=b'{"caption": "a"}'), {}),
        )
    ):
        found = folders.read(tar_set(tmp_path / str(number), members))
        assert found.one_label and found.prompts == ("a {}",)
        assert list(found.examples()) == [dict(image=b"of the png", target=1) | group]
    for number, (members, texts) in enumerate(
        (
            (dict(txt=b"one\ntwo\n"), ["one", "two"]),
            (dict(json=b'{"captions": ["one", "two"]}'), ["one", "two"]),
            (dict(json=b'{"text": "one"}'), ["one"]),
        )
    ):
        kind = dict(dataset_type="Retrieval\n")
        found = folders.read(tar_set(tmp_path / f"texts{number}", image | members, **kind))
        assert not found.one_label
        assert list(found.examples()) == [dict(image=b"of the png", texts=texts)]


HUGE = array(np.zeros(10)).replace(b"(10,)", b"(%d,)" % 10**13).replace(b" " * 12, b"", 1)


@pytest.mark.parametrize(
    "members, kind, says",
    [
        (dict(cls=b"1"), "classification", r"0.tar/some/s0: no image, one of .webp, .png, .jpg"),
        (dict(png=b"x"), "classification", r"0.tar/some/s0: no .cls, but \['png'\]"),
        (dict(png=b"x", cls=b"red"), "classification", "0.tar/some/s0: invalid literal"),
        (dict(png=b"x"), "multilabel", r"0.tar/some/s0: no .npy, but \['png'\]"),
        (dict(png=b"x", npy=b""), "multilabel", "0.tar/some/s0: .npy is damaged: EOF"),
        (dict(png=b"x", npy=b"PK"), "multilabel", "0.tar/some/s0: .npy is damaged"),
        (
            dict(png=b"x", npy=HUGE),
            "multilabel",
            "0.tar/some/s0: .npy is damaged: .*10000000000000",
        ),
        (dict(png=b"x", cls=b"0", npy=array([])), "classification", ".npy holds 0 float64"),
        (dict(png=b"x", cls=b"0", npy=array([np.inf])), "classification", "give finite numbers"),
        (dict(png=b"x", cls=b"0", npy=array(["a"])), "classification", ".npy holds 1 <U1"),
        (dict(png=b"x"), "retrieval", "0.tar/some/s0: no caption, as lines of .txt or captions"),
        (dict(png=b"x", json=b'{"text": [3]}'), "retrieval", "0.tar/some/s0: no caption, as lines"),
        (dict(png=b"x" * 1001, cls=b"1"), "classification", "0.tar/some/s0.png has 1001 bytes"),
    ],
)
def test_an_example_that_lacks_something_is_a_line(tmp_path, monkeypatch, members, kind, says):
    monkeypatch.setattr(folders, "MAX_MEMBER", 1000)
    found = folders.read(tar_set(tmp_path / "set", members, dataset_type=kind))
    with pytest.raises(ValueError, match=says) as error:
        list(found.examples())
    assert "\n" not in str(error.value)


def test_folders_of_pictures_and_lists_of_pairs_are_sets_too(folder, tmp_path_factory):
    """One folder a class: labels; a list with texts: captions."""
    plain = tmp_path_factory.mktemp("plain")
    for name in ("blue", "dark_red"):
        (plain / "test" / name).mkdir(parents=True)
        (plain / "test" / name / "0.png").write_bytes(png(name.partition("_")[2] or name))
    found = folders.read(str(plain))
    assert (found.kind, found.class_names) == ("classification", ("blue", "dark red"))
    assert found.one_label and "a photo of a {}" in found.prompts
    assert [one["target"] for one in found.examples()] == [0, 1]
    assert [colours(one["image"])[0] for one in found.examples()] == [[0, 0, 255], [255, 0, 0]]
    texts = tmp_path_factory.mktemp("texts")
    (texts / "a.png").write_bytes(png("blue"))
    (texts / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "all blue"}\n')
    found = folders.read(str(texts))
    assert (found.kind, found.class_names, found.one_label) == ("retrieval", (), False)
    assert list(found.examples()) == [dict(image=png("blue"), texts=["all blue"])]
    row = dict(filename="b.png", caption="dark", negative_caption="light")
    write(folder, "swap.json", {"0": row})
    found = folders.read(str(folder))
    assert (found.kind, found.layout) == ("selection", "pairs")
    assert [one["texts"] for one in found.examples()] == [["dark", "light"]]
    assert folders.is_set(str(folder), "test") and not folders.is_set(str(texts), "test")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        folders.read(str(texts / "none"))


def test_the_probe_learns_what_a_line_parts_and_draws_alike():
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    centres = np.eye(3, 6, dtype=np.float32)
    classes = rng.integers(0, 3, 300)
    features = centres[classes] + 0.2 * rng.normal(size=(300, 6)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    train, test = (features[:200], classes[:200]), (features[200:], classes[200:])
    found = linear_probe.guesses(*train, test[0])
    assert (found == test[1]).mean() > 0.97
    assert (found == linear_probe.guesses(*train, test[0])).all()
    shuffled = linear_probe.guesses(train[0], rng.permutation(train[1]), test[0])
    assert (shuffled == test[1]).mean() < 0.6


@pytest.mark.torch
def test_the_adapter_gives_what_the_model_gives_as_tensors():
    torch = pytest.importorskip("torch")
    seen = []

    def tokenize_with_mask(texts, *, labels):
        seen.append((texts, labels))
        ids = np.arange(len(texts) * 4).reshape(len(texts), 4)
        return ids, ids % 2 == 0

    def encode_tokens(ids, valid):
        assert ids.dtype == np.int32 and valid.dtype == bool
        return ids.sum(1, keepdims=True) * valid.sum(1, keepdims=True)

    model = types.SimpleNamespace(
        tokenize_with_mask=tokenize_with_mask,
        fit_image=lambda image: np.asarray(image.resize((2, 2))),
        encode_image=lambda images: images.reshape(len(images), -1).astype(np.float64),
        encode_tokens=encode_tokens,
    )
    adapter = clip_benchmark.Adapter(model, labels=True)
    assert adapter.eval() is adapter and adapter.to("cpu") is adapter
    tokens = adapter.tokenizer("a cat")
    assert tokens.shape == (1, 2, 4) and seen == [(["a cat"], True)]
    assert adapter.encode_text(adapter.tokenizer(["a", "b"])).tolist() == [[12.0], [44.0]]
    pixels = adapter.transform(Image.new("RGB", (6, 6), (9, 8, 7)))
    assert pixels.shape == (2, 2, 3)
    found = adapter.encode_image(pixels[None])
    assert found.dtype == torch.float32 and found.tolist() == [[9, 8, 7] * 4]
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3]])
    assert clip_benchmark.accuracy(scores, torch.tensor([2, 0]), (1, 2)) == [0.5, 1.0]


def test_the_adapter_joins_the_peer_s_kinds_or_says_what_it_lacks(monkeypatch, capsys):
    with pytest.raises(ValueError, match="--pretrained=best: choose from captions, labels"):
        clip_benchmark.load("runs/demo", "best")
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", None)
    with pytest.raises(SystemExit) as ended:
        clip_benchmark.main()
    assert ended.value.code == 2
    assert "CLIP_benchmark cannot be imported" in capsys.readouterr().err
    peer = types.SimpleNamespace(TYPE2FUNC={}, MODEL_TYPES=["open_clip"], accuracy=None)
    ran = []
    peer.main = lambda: ran.append(peer.TYPE2FUNC["coca_jax"])
    monkeypatch.setattr(importlib, "import_module", lambda name: peer)
    clip_benchmark.main()
    clip_benchmark.register()
    assert ran == [clip_benchmark.load] and peer.accuracy is clip_benchmark.accuracy
    assert peer.MODEL_TYPES == ["open_clip", "coca_jax"]


def test_likelihoods_that_are_no_numbers_choose_nothing(folder):
    """The first of several NaN is the largest to NumPy, and the right text is the first."""
    row = dict(filename="a.png", caption="one", negative_caption="two")
    (folder / "swap.json").write_text(json.dumps({"0": row}))
    model = types.SimpleNamespace(
        encode_image=lambda images: np.ones((len(images), 2)),
        encode_text=lambda texts: np.ones((len(texts), 2)),
        caption_log_likelihood=lambda images, texts: (np.full(len(texts), np.nan), texts),
    )
    with pytest.raises(ValueError, match="caption likelihoods: 2 of 2 are not finite"):
        measuring.measure(model, folders.read(str(folder)), batch_size=8)


class Colours:
    """A model that tells red from blue."""

    params, batch_size, num_frames, step = {"w": np.zeros(3)}, 8, 0, 3

    def checksum(self):
        return "same-weights"

    def encode_image(self, images):
        return np.asarray([colours(image)[0] for image in images]) / 255

    def encode_text(self, texts, *, labels=False):
        return np.asarray([[1.0, 0, 0] if "red" in text else [0, 0, 1.0] for text in texts])


def test_two_sets_of_one_name_in_the_scores_are_refused(tmp_path):
    for name in ("a/b", "a-b"):
        tar_set(tmp_path / "sets" / name, dict(png=b"x", cls=b"0"))
    (tmp_path / "one.txt").write_text("a/b\n")
    (tmp_path / "both.txt").write_text("a/b\na-b\n")
    root = str(tmp_path / "sets")
    for suite in ("clip_benchmark", str(tmp_path / "both.txt")):
        with pytest.raises(ValueError, match="a-b and a/b would both be a-b in the scores"):
            tables.tasks(suite, root)
    assert [task.key for task in tables.tasks(str(tmp_path / "one.txt"), root)[0]] == ["a/b"]


def test_a_suite_notes_whose_scores_a_folder_holds_before_the_first(tmp_path, monkeypatch):
    """One that is killed in its first set is another checkpoint's no more."""
    tar_set(tmp_path / "sets/tars", dict(png=png("red"), cls=b"0"))
    flags_of("evaluate", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def score(checkpoint):
        evaluate.flags.FLAGS.unparse_flags()
        flags = ["--suite=clip_benchmark", "--root=sets", "--out=scores"]
        evaluate.flags.FLAGS(["evaluate", f"--checkpoint={checkpoint}", *flags])
        return evaluate.main(["evaluate"])

    def killed(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "load", lambda *_, **__: Colours())
    with monkeypatch.context() as now:
        now.setattr(Colours, "encode_image", killed)
        with pytest.raises(KeyboardInterrupt):
            score("runs/a")
    with pytest.raises(ValueError, match="--out=scores holds the scores of runs/a; give another"):
        score("runs/b")
    assert score("runs/a")["suite/tars/acc1"] == 1


def test_a_set_is_measured_again_when_its_files_are_corrected(tmp_path, monkeypatch, caplog):
    """In folders of classes, in tars whose padding keeps their size, and in lists of pairs; with
    the scores written among the data."""
    for name, width in (("blue", 10), ("red", 30)):
        (tmp_path / "plain" / "test" / name).mkdir(parents=True)
        (tmp_path / "plain" / "test" / name / "0.png").write_bytes(png(name, (width, 8)))
    wrong = tar_set(tmp_path / "tars", dict(png=png("red"), cls=b"0"), classnames="blue\nred")
    (tmp_path / "red.png").write_bytes(png("red"))
    row = dict(filename="red.png", caption="red", negative_caption="blue")
    write(tmp_path, "pairs.json", {"0": row})
    keys = ("plain", "tars", "pairs.json")
    sets = [tables.Task(key, key, folders.read(str(tmp_path / key))) for key in keys]
    how = dict(suite="mine", name="colours")

    def scores(out):
        found, _ = running.run(Colours(), sets, str(tmp_path / out), **how)
        return [found[f"suite/{key}/{one.metric}"] for key, one in zip(keys, sets)]

    assert scores("plain/out") == [1, 0, 1]
    kept_file = tmp_path / "plain/out/suite/plain.json"
    for text in ("", '{"request": ', "[]", '{"request": {}}'):  # measured again, and written anew
        kept_file.write_text(text)
        with pytest.raises(ValueError, match="plain.json or the .npz beside it is damaged"):
            compare.compare(str(tmp_path / "plain/out"), [str(tmp_path / "plain/out")])
        assert scores("plain/out") == [1, 0, 1] and str(kept_file) in caplog.text
        caplog.clear()
    with monkeypatch.context() as kept:
        kept.setattr(measuring, "measure", None)
        assert scores("plain/out") == [1, 0, 1]
    classes = tmp_path / "plain" / "test"
    for old, new in (("blue", "x"), ("red", "blue"), ("x", "red")):
        (classes / old).rename(classes / new)
    size = os.path.getsize(f"{wrong}/test/0.tar")
    tar_set(tmp_path / "tars", dict(png=png("red"), cls=b"1"), classnames="blue\nred")
    assert os.path.getsize(f"{wrong}/test/0.tar") == size
    (tmp_path / "red.png").write_bytes(png("blue"))
    assert scores("plain/out") == [0, 1, 0]
