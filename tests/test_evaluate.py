"""The evaluate command on real (small) models: devices, processes, kills, data as it lies there."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from test_inference import no_compile_cache, tiny_parts  # noqa: F401

from coca_jax import inference
from coca_jax.cli import prepare
from coca_jax.data import evaluation_data, vocabulary
from coca_jax.data.evaluation_data import Records
from coca_jax.data.images import decode
from coca_jax.data.sources.items import Options
from coca_jax.evaluation import runner
from coca_jax.evaluation.evaluators import inputs
from coca_jax.evaluation.evaluators.base import Setting, Writing
from coca_jax.interop import export_format

ROOT = pathlib.Path(__file__).parent.parent
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 40, 200)}
COUNT = 13  # not a multiple of anything


def write_folder(folder):
    """An imagefolder with a split 'test': two captions and one or two labels an image."""
    rng = np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    lines = []
    for i in range(COUNT):
        name = list(COLOURS)[i % 3]
        pixels = rng.normal(COLOURS[name], 30, (20, 24, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "test" / f"{i}.png")
        text = [f"a {name} thing", f"picture {i} in {name}"]
        labels = [name, "dark"] if i == 4 else name
        lines.append(json.dumps(dict(file_name=f"{i}.png", text=text, label=labels)))
    (folder / "test" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "colours"
    write_folder(path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """config, params and vocabulary of a tiny random model."""
    path = tmp_path_factory.mktemp("words") / "vocabulary.model"
    texts = [f"a {c} thing, picture {i} in {c}" for i in range(30) for c in COLOURS]
    words = vocabulary.train(texts, 300, str(path), 0)
    config, params = tiny_parts()
    return config, jax.device_get(params), words


def tasks_for(folder, **changes):
    data = dict(path=str(folder), split="test")
    label = dict(data, kind="label")
    names = ["red", "green", "blue", "dark", "thing", "picture"]
    return [
        dict(kind="zero_shot", name="c", data=label, class_names=names, prompts="plain"),
        dict(kind="generative", name="c", data=label, class_names=names),
        dict(kind="retrieval", name="c", data=data, **changes),
        dict(kind="captioning", name="c", data=data, decode=dict(max_new_tokens=8)),
    ]


@pytest.fixture(scope="module")
def on_one(parts, folder, tmp_path_factory):
    """Scores on one device."""
    model = inference.CoCaModel(*parts, batch_size=8, devices=jax.devices()[:1])
    out = tmp_path_factory.mktemp("one")
    return runner.run_tasks(model, tasks_for(folder), str(out)), out, model


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-4), key


def test_scores_are_plain_figures_of_the_model(on_one, folder):
    scores, out, model = on_one
    files = [folder / "test" / f"{i}.png" for i in range(COUNT)]
    images = [path.read_bytes() for path in files]
    names = ["red", "green", "blue", "dark", "thing", "picture"]
    truth = [[list(COLOURS)[i % 3]] + ["dark"] * (i == 4) for i in range(COUNT)]
    texts = model.encode_text([f"a photo of the {n}" for n in names], labels=True)
    guess = (model.encode_image(images) @ texts.T).argmax(1)
    right = [names[g] in t for g, t in zip(guess, truth)]
    assert scores["zero_shot/c/top1"] == pytest.approx(np.mean(right))
    likely = model.score(images, [f"a photo of the {n}" for n in names], labels=True).argmax(1)
    right = [names[g] in t for g, t in zip(likely, truth)]
    assert scores["generative/c/top1"] == pytest.approx(np.mean(right))
    assert scores["retrieval/c/text_to_image_r1_count"] == 2 * COUNT
    assert scores["retrieval/c/num_texts"] == COUNT + 3
    for kind in ("zero_shot", "generative", "retrieval", "captioning"):
        assert scores[f"{kind}/c/num_examples"] == COUNT
    saved = json.loads((out / "eval.json").read_text())
    assert saved == scores
    companions = ("_low", "_high", "_count", "_chance", "_majority", "_references")
    plain = {k for k in saved if not k.endswith(companions)}
    assert saved["zero_shot/c/top1_chance"] == pytest.approx(sum(len(t) for t in truth) / 6 / COUNT)
    chance = [saved[f"retrieval/c/text_to_image_r{k}_chance"] for k in (1, 5)]
    assert 0 < chance[0] < chance[1] < 1
    assert {"captioning/c/bleu4", "captioning/c/cider_d", "captioning/c/rouge_l"} <= plain
    for key in plain:  # each with an interval and the number of its examples
        if "/num_" not in key:
            assert saved[f"{key}_low"] <= saved[key] <= saved[f"{key}_high"]
            # The first image has none before it that its caption could be tried with.
            assert saved[f"{key}_count"] >= COUNT - key.endswith("/image_gain")
    classes = json.loads((out / "eval_classes.json").read_text())["zero_shot/c"]
    assert sum(n for _, _, n in classes["confusion"]) == COUNT == sum(classes["count"])
    assert not (out / "eval_progress.json").exists()
    lines = (out / "eval_captions" / "c.jsonl").read_text().splitlines()
    captions = model.caption(images, max_new_tokens=8)
    assert [json.loads(line)["caption"] for line in lines[1:]] == captions


def test_eight_devices_score_as_one(on_one, parts, folder, tmp_path):
    """13 images in batches of 16 rows over 8 devices: none is lost and none counted twice."""
    model = inference.CoCaModel(*parts, batch_size=16, devices=jax.devices())
    assert model.checksum() == on_one[2].checksum()
    assert_same(runner.run_tasks(model, tasks_for(folder), str(tmp_path)), on_one[0])


class Stopping:
    """A model that is killed at its n-th call of a kind, and counts calls."""

    def __init__(self, model, stop=""):
        self._model, self._stop, self.calls = model, stop, []
        self.batch_size, self.checksum = model.batch_size, model.checksum
        self.num_frames, self.max_len = model.num_frames, model.max_len

    def __getattr__(self, name):
        def call(*args, **how):
            self.calls.append(name)
            if self.calls.count(name) > 1 and name == self._stop:
                raise KeyboardInterrupt
            return getattr(self._model, name)(*args, **how)

        return call


def test_a_killed_evaluation_goes_on(on_one, parts, folder, tmp_path):
    scores, _, model = on_one
    with pytest.raises(KeyboardInterrupt):  # 13 images are two calls of 8 and 5
        runner.run_tasks(Stopping(model, "caption"), tasks_for(folder), str(tmp_path))
    partial = json.loads((tmp_path / "eval.json").read_text())
    assert "retrieval/c/mean_recall" in partial and "captioning/c/bleu4" not in partial
    again = Stopping(model)
    assert runner.run_tasks(again, tasks_for(folder), str(tmp_path)) == scores
    assert set(again.calls) == {"caption", "caption_log_likelihood"}
    assert again.calls.count("caption") == 1
    # All is finished now: the same call begins anew.
    fresh = Stopping(model)
    runner.run_tasks(fresh, tasks_for(folder)[2:3], str(tmp_path))
    assert "encode_image" in fresh.calls
    # Other weights take over nothing.
    with pytest.raises(KeyboardInterrupt):
        runner.run_tasks(Stopping(model, "caption"), tasks_for(folder), str(tmp_path))
    config, params, words = parts
    other = jax.tree.map(lambda x: x * 1.01, params)
    changed = inference.CoCaModel(config, other, words, devices=jax.devices()[:1])
    watched = Stopping(model)
    watched.checksum = changed.checksum
    assert watched.checksum() != model.checksum()
    runner.run_tasks(watched, tasks_for(folder), str(tmp_path))
    assert watched.calls.count("caption") == 2 and "score" in watched.calls


def test_several_calls_with_known_candidates(on_one, folder, tmp_path):
    """known_only leaves images whose text is among the candidates' texts."""
    model = on_one[2]
    few = dict(path=str(folder), split="test", limit=2)
    task = tasks_for(folder, candidates=few, known_only=True)[2]
    scores = runner.run_tasks(model, [task], str(tmp_path))
    # The first two are red and green, so all red and green ones share a text with them.
    assert scores["retrieval/c/num_examples"] == 9


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    for number, name in enumerate(("red", "green")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(12):
            picture = Image.new("RGB", (16, 16), (20 * i, 250 * number, 9))
            picture.save(tmp_path / "in" / name / f"{i}.png")
    damaged = tmp_path / "in/red/7.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    found = [record["key"] for record in Records(dict(path=str(tmp_path / "in"), kind="label"))]
    assert len(found) == 23 and "red/7.png" not in found


class Reads:
    """A model that can do nothing but decode images."""

    num_frames, batch_size = 0, 64
    fit_image = staticmethod(decode)
    tokenize_with_mask = staticmethod(lambda texts, labels: [np.eye(len(texts))] * 2)

    def encode_text(self, texts, *, labels=False):
        return np.ones((len(texts), 2), np.float32)

    def features(self, images):
        return np.stack([decode(image).mean((0, 1)) for image in images]).astype(np.float32)

    encode_image = features


@pytest.mark.parametrize("kind", ["knn", "linear_probe"])
def test_probes_take_names_of_classes_and_leave_out_what_has_no_label(tmp_path, capsys, kind):
    """A file `label<TAB>name`, in another order than the labels', and training data without some
    labels."""
    names = dict(red="vermilion", green="emerald", blue="azure")
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        rows = []
        for i, label in enumerate(list(names) * 6):
            colour = tuple(min(c + i, 255) for c in COLOURS[label])
            Image.new("RGB", (8, 8), colour).save(tmp_path / part / f"{i}.png")
            told = {} if part == "train" and i < 3 else dict(label=label)
            rows.append(json.dumps(dict(file_name=f"{i}.png", text="a colour", **told)))
        (tmp_path / part / "metadata.jsonl").write_text("\n".join(rows))
    path = tmp_path / "names.txt"
    path.write_text("".join(f"{label}\t{name}\n" for label, name in names.items()))
    data = dict(path=str(tmp_path), split="test", kind="label")
    task = dict(kind=kind, name="c", data=data, class_names=str(path))
    out = str(tmp_path / "out")
    setting = Setting(batch_size=64, main_process=True, write=Writing(True), workdir=out)
    got = runner.run_task(Reads(), task, setting)
    assert got[f"{kind}/c/top1"] == 1 and got[f"{kind}/c/num_train"] == 15
    assert got[f"{kind}/c/mean_per_class_low"] == pytest.approx(0.025 ** (1 / 18))  # 18 of 18
    classes = json.loads((tmp_path / "out" / "eval_classes.json").read_text())[f"{kind}/c"]
    assert classes["class_names"] == list(names.values()) and classes["count"] == [6, 6, 6]
    assert f"{kind}/c: skipped 3 training examples without label" in capsys.readouterr().err


# ---- Data as it lies there


def test_folders_and_prepared_data_give_the_same_records(folder, tmp_path):
    plain = list(Records(dict(path=str(folder), split="test")))
    assert len(plain) == COUNT and plain[4]["labels"] == ["red" if 4 % 3 == 0 else "green", "dark"]
    prepare.prepare(
        "imagefolder", str(folder), str(tmp_path / "p"), split="test", options=Options(),
        progress=False,
    )  # fmt: skip
    prepared = list(Records(dict(path=str(tmp_path / "p"), split="test")))
    for a, b in zip(plain, prepared, strict=True):
        assert (a["image"], a["text"], a["labels"]) == (b["image"], b["text"], b["labels"])
    entry = dict(path=str(folder), kind="label")
    assert evaluation_data.class_names(entry, "test") == ["blue", "dark", "green", "red"]
    assert len(Records(dict(path=str(folder), split="test"), limit=5)) == 5
    # The same through tensorflow-datasets, which names no classes here.
    tfds = list(Records(dict(tfds=str(tmp_path / "p"), split="test")))
    assert [r["text"] for r in tfds] == [r["text"] for r in plain]
    assert tfds[7]["image"] == plain[7]["image"]


def test_one_folder_a_class(tmp_path):
    for name in ("big_cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "val" / name / f"{i}.jpg")
    entry = dict(path=str(tmp_path), split="val", kind="label")
    assert [r["labels"] for r in Records(entry)] == [["big cat"]] * 2 + [["dog"]] * 2
    assert evaluation_data.class_names(entry, "test") == ["big cat", "dog"]
    (tmp_path / "val" / "metadata.jsonl").write_text('{"file_name": "none.png"}\nno json\n')
    with pytest.raises(ValueError, match="none of 2 examples can be used"):
        Records(entry)


def test_captions_by_language_are_several_captions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = dict(file_name="a.png", text="A frog.", captions=dict(de="Ein Frosch.", es="Una rana."))
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    entry = dict(path=str(tmp_path), text_field="captions")
    assert next(iter(Records(entry)))["text"] == ["Ein Frosch.", "Una rana."]
    prepare.prepare("imagefolder", str(tmp_path), str(tmp_path / "p"), progress=False)
    entry = dict(path=str(tmp_path / "p"), split="train", text_field="captions")
    assert next(iter(Records(entry)))["text"] == ["Ein Frosch.", "Una rana."]


def test_class_names_from_files(tmp_path):
    path = tmp_path / "names.txt"
    declared = ["n01", "n02", "n03"]

    def read(text):
        path.write_text(text)
        return inputs.read_class_names(str(path), declared)

    assert read("n03\tcat\nn01\tdog\n") == (["cat", "dog"], ["n03", "n01"])
    assert read("n02\n\nn01\n") == (["n02", "n01"], ["n02", "n01"])
    assert read("cat\ndog\ncow\n") == (["cat", "dog", "cow"], declared)
    with pytest.raises(ValueError, match="2 names, none of them among the 3 classes"):
        read("cat\ndog\n")
    for text, says in (
        ("n03\tcat\ndog\n", "names.txt, line 2: 0 tabs"),
        ("\nn03\tcat\nn01\tdog\tbig\n", "names.txt, line 3: 2 tabs"),
        ("n03\tcat\nn01\tdog\nn03\tcow\n", "names.txt: label 'n03'"),
    ):
        with pytest.raises(ValueError, match=says):
            read(text)
    path.write_text("n03\tcat\nn02\tdog\nn01\tcat\n")
    task = dict(kind="zero_shot", name="x", class_names=str(path))
    with pytest.raises(ValueError, match="3 names, 2 distinct, 'cat' twice"):
        inputs.check(task)


def test_how_class_names_are_taken_is_said(tmp_path, capsys):
    path = tmp_path / "names.txt"

    def read(text, declared):
        path.write_text(text)
        inputs.read_class_names(str(path), declared)
        return capsys.readouterr().err

    declared = ["objects", "people", "places", "signs", "travel"]
    by_order = read("a\nb\nc\nd\ne\n", declared)
    assert f"class_names {path}: no name is a class of the data" in by_order
    assert by_order.endswith("a -> objects, b -> people, c -> places, d -> signs, ...\n")
    assert read("a\nb\nc\nd\ne\n", declared) == ""  # once for all tasks
    assert read("objects\npeople\n", declared) == read("objects\ta\nsigns\tb\n", declared) == ""
    said = read("objects\ta\nplacs\tb\nsigns\tc\n", declared)
    assert "labels not in the data: placs; classes without a line: places, people, t" in said
    assert read("objects\ta\nmore\tb\n", declared[:1]) == ""  # a list of more classes than occur


# ---- The command


def command(process, count, port, *flags):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    env |= dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    several = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    several += [f"--process_id={process}"]
    return subprocess.Popen(
        [sys.executable, "-m", "coca_jax.cli.evaluate", *flags, *(several if count > 1 else [])],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_share_the_work(on_one, parts, folder, tmp_path):
    """Two processes of two devices each: the scores of one device, written once."""
    config, params, words = parts
    model = inference.CoCaModel(config, params, words, devices=jax.devices()[:1])
    words.save(str(tmp_path / "vocabulary.model"))
    saved = dict(
        model=config.model.to_dict(),
        preprocess=dict(resize=model.resize, mean=[0.5] * 3, std=[0.5] * 3),
    )
    export_format.write_export(tmp_path / "model", params, saved, tmp_path / "vocabulary.model")
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\ndark\nthing\npicture\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--checkpoint={tmp_path}/model", f"--data={folder}", f"--out={tmp_path}/out"]
    flags += ["--tasks=zero_shot,generative,retrieval,captioning", "--name=c", "--nojava_metrics"]
    flags += [f"--class_names={names}", "--prompts=plain", "--batch_size=8"]
    both = [command(i, 2, port, *flags) for i in range(2)]
    said = [process.communicate(timeout=400) for process in both]
    assert [p.returncode for p in both] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert "{" not in said[1][0]  # process 0 alone prints scores
    got = json.loads(said[0][0].splitlines()[-1])
    # The command writes captions of up to 64 tokens, the other run of eight.
    want = {k: v for k, v in on_one[0].items() if "captioning" not in k or "perplexity" in k}
    assert_same({k: got[k] for k in want}, want)
    assert (tmp_path / "out/eval_checkpoint.txt").read_text() == f"{tmp_path}/model\n"
    lines = (tmp_path / "out" / "eval_captions" / "c.jsonl").read_text().splitlines()
    images = [(folder / "test" / f"{i}.png").read_bytes() for i in range(COUNT)]
    assert [json.loads(line)["caption"] for line in lines[1:]] == model.caption(images)
