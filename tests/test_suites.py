"""Suites: folders in CLIP_benchmark's layout, the figures against CLIP_benchmark's own code."""

import io
import json
import tarfile

import jax
import numpy as np
import pytest
from conftest import flags_of, tiny_config
from one_device import models_on_one  # noqa: F401
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score
from test_inference import random_params

from coca_jax import inference
from coca_jax.apps.suites import folders, measuring, metrics, pairs, running, tables
from coca_jax.cli import evaluate
from coca_jax.data import vocabulary
from coca_jax.models import coca

CLASSES = ["red", "green", "blue", "dark", "pale", "brown"]
TEMPLATES = ["a {c} thing", "picture in {c}"]


def png(seed, base=None):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, 3) if base is None else base
    pixels = rng.normal(base, 40, (20, 24, 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tars(folder, split, examples, shards=2):
    """examples: dicts suffix -> bytes."""
    (folder / split).mkdir(parents=True)
    for shard, part in enumerate(np.array_split(np.arange(len(examples)), shards)):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
            for number in part:
                for suffix, data in examples[number].items():
                    info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / split / "nshards.txt").write_text(f"{shards}\n")


def array(values):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sets of every layout below one folder."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (6, 3))
    for name, size in (("vtab/colours", 47), ("wds_fairness-geode_test", 40)):
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
        examples = [dict(png=png(i, palette[i % 6]), cls=str(i % 6).encode()) for i in range(size)]
        write_tars(folder, "train", examples)
        if name.startswith("wds"):
            for i, one in enumerate(examples):
                one["json"] = json.dumps(dict(region=["Africa", "Asia", "Europe"][i % 3])).encode()
        write_tars(folder, "test", examples[::-1])
    captions = root / "captions"
    captions.mkdir()
    (captions / "dataset_type.txt").write_text("retrieval\n")
    texts = [[f"picture {i} in {CLASSES[i % 6]}", f"a thing {i}"] for i in range(31)]
    examples = [dict(png=png(100 + i), txt="\n".join(t).encode()) for i, t in enumerate(texts)]
    write_tars(captions, "test", examples)
    several = root / "several"
    several.mkdir()
    (several / "dataset_type.txt").write_text("multilabel\n")
    (several / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (several / "zeroshot_classification_templates.txt").write_text("a {c} thing\n")
    labels = rng.integers(0, 2, (29, 6))
    write_tars(several, "test", [dict(png=png(i), npy=array(x)) for i, x in enumerate(labels)])
    crepe = root / "crepe"
    (crepe / "images").mkdir(parents=True)
    rows = {}
    for i in range(24):
        (crepe / "images" / f"{i}.png").write_bytes(png(300 + i))
        true, false = CLASSES[i % 6], CLASSES[(i + 1) % 6]
        rows[str(2 * i)] = dict(filename=f"{i}.png", caption=true, negative_caption=f"a {false}")
    (crepe / "swap_obj.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocabulary.model"
    texts = [f"a {c} thing, picture {i} in {c}" for i in range(30) for c in CLASSES]
    words = vocabulary.train(texts, 300, str(path), 0)
    config = tiny_config(bias=False)
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=16, unimodal_depth=1, multimodal_depth=1)
    return inference.CoCaModel(
        config, random_params(coca.build(config.model)), words, batch_size=16
    )


@pytest.fixture(scope="module")
def peer(model):
    """CLIP_benchmark's data set and loader of a folder, with our model in its adapter."""
    pytest.importorskip("clip_benchmark", reason="needs the extra 'clip_benchmark'")
    torch = pytest.importorskip("torch")
    from clip_benchmark.datasets import builder

    from coca_jax.evaluation.clip_benchmark import Adapter, register

    register()
    adapter = Adapter(model)

    def make(folder, split="test"):
        data = builder.build_wds_dataset("x", adapter.transform, split, str(folder))
        options = dict(batch_size=None, shuffle=False, num_workers=0)
        loader = torch.utils.data.DataLoader(data.batched(16), **options)
        return data, loader

    return adapter, make


@pytest.mark.torch
@pytest.mark.parametrize("name", ["vtab/colours", "several"])
def test_zero_shot_equals_clip_benchmark(model, peer, root, name):
    from clip_benchmark.metrics import zeroshot_classification

    adapter, make = peer
    data, loader = make(root / name)
    how = dict(device="cpu", amp=False)
    args = (adapter, loader, adapter.tokenizer, data.classes, data.templates)
    wanted = zeroshot_classification.evaluate(*args, **how)
    found = measuring.measure(model, folders.read(str(root / name)), batch_size=8)
    assert len(wanted) in (1, 3)
    for metric, value in wanted.items():
        np.testing.assert_allclose(metrics.value(metric, found), value, atol=1e-4)


@pytest.mark.torch
def test_retrieval_equals_clip_benchmark(model, peer, root):
    from clip_benchmark.metrics import zeroshot_retrieval

    adapter, make = peer
    _, loader = make(root / "captions")
    wanted = zeroshot_retrieval.evaluate(
        adapter, loader, adapter.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    found = measuring.measure(model, folders.read(str(root / "captions")), batch_size=8)
    assert len(wanted) == 6 and 0 < wanted["text_retrieval_recall@10"] < 1
    for metric, value in wanted.items():
        np.testing.assert_allclose(metrics.value(metric, found), value, atol=1e-4)


@pytest.mark.torch
def test_choice_of_captions_equals_clip_benchmark(model, peer, root):
    import torch
    from clip_benchmark.datasets import builder, sugar_crepe
    from clip_benchmark.metrics import image_caption_selection

    adapter, _ = peer
    data = sugar_crepe.SugarCrepe(
        str(root / "crepe" / "images"), str(root / "crepe" / "swap_obj.json"), adapter.transform
    )
    loader = torch.utils.data.DataLoader(
        data, batch_size=7, collate_fn=builder.image_captions_collate_fn
    )
    wanted = image_caption_selection.evaluate(adapter, loader, adapter.tokenizer, "cpu", amp=False)
    found = measuring.measure(model, folders.read(str(root / "crepe")), batch_size=8)
    assert 0 < wanted["acc"] < 1
    for metric, value in wanted.items():
        np.testing.assert_allclose(metrics.value(metric, found), value, atol=1e-4)
    likely = [
        model.score([one["images"][0]], one["texts"])[0].argmax() == 0
        for one in pairs.examples(str(root / "crepe"))
    ]
    assert metrics.value("likelihood_text_acc", found) == np.mean(likely)


@pytest.mark.torch
def test_linear_probe_equals_clip_benchmark(model, peer, root, tmp_path, monkeypatch):
    """CLIP_benchmark's code asks for a GPU; here its tensors stay where they are."""
    import torch
    from clip_benchmark.metrics import linear_probe

    adapter, make = peer

    class Device(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            return other in ("cpu", "cuda")

    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn, "DataParallel", lambda module, device_ids=(): module)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    monkeypatch.setattr(linear_probe.Featurizer, "__init__", _featurizer)
    folder = root / "vtab" / "colours"
    torch.manual_seed(0)
    wanted = linear_probe.evaluate(
        *(adapter, make(folder, "train")[1], make(folder)[1], -1, 64, 0, 0.1, 10, "x", 0),
        *(str(tmp_path / "features"), Device("cpu")),
        amp=False,
    )
    found = measuring.probe(model, folders.read(str(folder)), batch_size=8)
    assert 0.2 < wanted["lp_acc1"] < 1
    np.testing.assert_allclose(metrics.value("lp_acc1", found), wanted["lp_acc1"], atol=1e-4)


def _featurizer(self, model, normalize=True):
    import torch

    torch.nn.Module.__init__(self)
    object.__setattr__(self, "model", model)
    self.normalize = normalize


def test_figures_equal_their_definitions():
    rng = np.random.default_rng(0)
    target, guess = rng.integers(0, 5, 200), rng.integers(0, 6, 200)
    group = rng.integers(0, 3, 200)
    found = dict(target=target, guess=guess, group=group)
    np.testing.assert_allclose(
        metrics.value("F1-macro_all", found),
        f1_score(target, guess, average="macro", labels=np.unique(target)),
    )
    right = guess == target
    np.testing.assert_allclose(
        metrics.value("mean_per_class_recall", found),
        np.mean([right[target == c].mean() for c in range(5)]),
    )
    assert balanced_accuracy_score(target, np.minimum(guess, 4)) == pytest.approx(
        metrics.value("mean_per_class_recall", dict(target=target, guess=np.minimum(guess, 4)))
    )
    worst = min(right[group == g].mean() for g in range(3))
    assert metrics.value("acc_worst_group", found) == worst
    tables_ = [np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.9, 0.1], [0.8, 0.7]])]
    assert measuring.chosen(tables_) == dict(
        image_acc=[1.0, 1.0], text_acc=[1.0, 0.0], acc=[1.0, 0.0]
    )
    # Equal scores, of texts or of images, are no choice; an image alone is not taken for another.
    for table, right in (
        ([[0.5, 0.5], [0.5, 0.5]], (0, 0, 0)),
        ([[0.5, 0.5], [0.1, 0.6]], (1, 0, 0)),
        ([[0.5, 0.4], [0.5, 0.6]], (0, 1, 0)),
        ([[0.5, 0.5]], (1, 0, 0)),
        ([[0.5, 0.4, 0.3]], (1, 1, 1)),
    ):
        names = ("image_acc", "text_acc", "acc")
        assert measuring.chosen([np.array(table)]) == dict(zip(names, [[one] for one in right]))
    assert measuring._jaccard(np.array([0.5, 0.9, 0.1, 0.4]), [1, 3]) == 1 / 3
    assert measuring.cue_prompt("Apple") == "An apple"  # as DataComp's eval_utils/wino_eval.py
    cues = dict(jaccard=np.array([1, 0.5, 0.25, 0]), candidates=np.array([5, 10, 12, 6]))
    assert metrics.value("jaccard_10_12", cues) == 0.375
    assert metrics.value("jaccard", cues) == 0.4375
    assert measuring.numbered(["b", None, "a"]).tolist() == [1, -1, 0]


def test_interval_of_a_difference_is_paired():
    target = np.zeros(400, int)
    first = (np.random.default_rng(0).random(400) < 0.4).astype(int)
    second = first.copy()
    second[:12] = 0  # right where the first was wrong or right: never worse
    change, low, high = metrics.difference(
        "acc1", dict(target=target, guess=first), dict(target=target, guess=second)
    )
    assert change == pytest.approx(first[:12].sum() / 400) and 0 <= low <= change <= high < 0.04
    with pytest.raises(ValueError, match="same examples"):
        metrics.difference("acc1", dict(target=target, guess=first), dict(target=1 + target))


def test_the_interval_of_mean_average_precision_holds_the_mean_over_such_sets(monkeypatch):
    """Sixty classes of ten images each: draws, which hold images twice, lie above the figure."""
    monkeypatch.setattr(metrics, "RESAMPLES", 100)
    name, rng = "mean_average_precision", np.random.default_rng(0)

    def drawn():
        targets = rng.random((200, 60)) < 0.05
        return dict(scores=rng.normal(size=(200, 60)) + 1.5 * targets, targets=targets)

    truth = np.mean([metrics.value(name, drawn()) for _ in range(200)])
    found = [drawn() for _ in range(40)]
    limits = np.array([metrics.interval(name, one) for one in found])
    assert ((limits[:, 0] <= truth) & (truth <= limits[:, 1])).sum() >= 36
    values = np.array([metrics.value(name, one) for one in found])
    assert np.abs(limits.mean(1) - values).max() < 0.01 and values.std() > 0.01
    # A model that is a little better everywhere: the draws of both are the same.
    better = dict(found[0], scores=found[0]["scores"] + 0.1 * found[0]["targets"])
    change, low, high = metrics.difference(name, found[0], better)
    assert 0 < low < change < high < 2 * change and metrics.difference(name, better, better)[1] == 0
    sure = dict(scores=found[0]["targets"].astype(float), targets=found[0]["targets"])
    low, high = metrics.interval(name, sure)
    assert low == pytest.approx(0.025 ** (1 / 200)) and high == 1 == metrics.value(name, sure)


def test_draws_without_any_group_are_left_out_of_its_interval():
    """Of four examples one has a group, and is right: a third of the draws has none of it."""
    zeros = np.zeros(4, int)
    found = dict(target=zeros, guess=zeros, group=np.array([0, -1, -1, -1]), in_top5=zeros == 0)
    for name in ("acc_worst_group", "acc5_worst_group"):
        assert metrics.value(name, found) == 1
        assert metrics.interval(name, found) == pytest.approx((0.025, 1))  # of one, the worst group
    wrong = dict(found, guess=zeros + 1)
    assert metrics.difference("acc_worst_group", found, wrong) == (-1, -1, -1)
    none = metrics.value("acc_worst_group", dict(found, group=zeros - 1))
    assert np.isnan(none)


@pytest.mark.long
def test_a_suite_is_run_once_and_compared(model, root, tmp_path, monkeypatch, capsys):
    found, missing = tables.tasks("clip_benchmark", str(root))
    assert [task.key for task in found] == [
        *("captions", "crepe", "several", "vtab/colours", "wds_fairness-geode_test")
    ]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    how = dict(suite="clip_benchmark", name="tiny")
    flags_of("evaluate", monkeypatch)
    flags = [f"--{k}={v}" for k, v in dict(how, checkpoint="runs/x", root=root, out=one).items()]
    evaluate.flags.FLAGS(["evaluate", *flags])
    monkeypatch.setattr(inference, "load", lambda *_, **__: model)
    scores = evaluate.main(["evaluate"])
    lines = capsys.readouterr().out.splitlines()
    assert scores == json.loads((tmp_path / "one" / "eval.json").read_text())
    assert scores["suite/crepe/acc_count"] == 24
    assert scores["suite/clip_benchmark/average"] == pytest.approx(
        np.mean([scores[f"suite/{running.slug(t.key)}/{t.metric}"] for t in found])
    )
    assert len(lines) == len(found) + 3
    row = (tmp_path / "one" / "suite.csv").read_text().splitlines()
    assert row[0].startswith("name,pretrained,params (M),FLOPs (B),Average perf. on 5 datasets,")
    monkeypatch.setattr(measuring, "measure", None)  # what is finished is not measured again
    assert running.run(model, found, one, **how)[0] == scores
    monkeypatch.undo()
    before = jax.device_get(model.params)
    try:  # another one, of the same programs
        model.set_params(jax.tree.map(lambda x: x + 0.05, before))
        again, _ = running.run(model, found, two, **how)
    finally:
        model.set_params(before)
    rows = evaluate.compare([one, two])["rows"]
    assert len(rows) == 5 and len(capsys.readouterr().out.splitlines()) == 7
    assert any(row["difference"] for row in rows)
    for row in rows:
        name = f"suite/{row['data']}/{row['metric']}"
        assert row["difference"] == pytest.approx(again[name] - scores[name])
        assert row["low"] <= row["difference"] <= row["high"]


def test_datacomp_takes_what_is_there_with_its_own_figures(root, tmp_path):
    found, missing = tables.tasks("datacomp", str(root))
    assert [(task.title, task.metric) for task in found] == [("GeoDE", "acc_worst_group")]
    assert len(tables.DATACOMP) == 38 and len(missing) == 37
    groups = [one["group"] for one in found[0].folder.examples()]
    assert sorted(set(groups)) == ["Africa", "Asia", "Europe"]
    file = tmp_path / "tasklist.yml"
    file.write_text("vtab/colours:\n  name: Colours\n  main_metric: mean_per_class_recall\n")
    (task,), _ = tables.tasks(str(file), str(root))
    assert (task.title, task.metric) == ("Colours", "mean_per_class_recall")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("test/nshards.txt", "3", "2.tar is missing"),
        ("test/nshards.txt", "many", "give the number of tars"),
        ("test/nshards.txt", "²", "give the number of tars"),
        ("classnames.txt", "one\n", "names 1 classes"),
        ("zeroshot_classification_templates.txt", "", "missing or empty"),
        ("zeroshot_classification_templates.txt", "a thing\n", "{}"),
        ("dataset_type.txt", "video", "choose from classification"),
        ("test/0.tar", "rubbish", "damaged"),
        ("classnames.txt", "one\ntwo\n", "class 5 of 2"),
    ],
)
def test_bad_sets_are_a_line(tmp_path, name, text, says):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    write_tars(folder, "test", [dict(png=png(i), cls=b"5") for i in range(3)])
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        list(folders.read(str(folder)).examples())
    assert "\n" not in str(error.value)


def test_command_asks_for_what_it_lacks(commands, tmp_path):
    command = ["evaluate", "--suite=datacomp", "--checkpoint=x", f"--root={tmp_path}"]
    done = commands.run(command, tmp_path)
    assert done.returncode == 2 and "holds no data set of --suite=datacomp" in done.stderr
