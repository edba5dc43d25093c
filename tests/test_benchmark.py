"""Every benchmark runs at a tiny size and reports a rate that fits its time."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import flags_of, tiny_config
from ml_collections import ConfigDict
from PIL import Image
from test_inference import random_params

from coca_jax.apps import benchmark as input_rate
from coca_jax.apps import benchmark as loss_costs
from coca_jax.apps import benchmark as model_times
from coca_jax.apps import benchmark as peer_times
from coca_jax.apps import benchmark as step_times
from coca_jax.cli import benchmark, prepare
from coca_jax.config import Config, read, typed
from coca_jax.data import filters
from coca_jax.interop import open_clip_config
from coca_jax.recipes import base


@pytest.mark.long
def test_rates_are_work_over_time(monkeypatch, capsys):
    """By the command, which prints each number and what it ran on."""
    config = tiny_config(bias=False)
    config.mesh.update(data=8)
    config.loss.captioning_weight = 0.0  # half as much to compile
    config.model.bias = False
    flags_of("benchmark", monkeypatch)
    params = model_times.make_params(typed(config))  # once for both that ask for them
    monkeypatch.setattr(model_times, "make_params", lambda config: params)

    def run(kind, *more):
        benchmark.flags.FLAGS.unparse_flags()
        benchmark.flags.FLAGS(["benchmark", "--repeats=2", *more])
        benchmark.flags.FLAGS.config = config
        result = benchmark.main(["benchmark", kind])
        assert (result["benchmark"], result["devices"]) == (kind, 8 if kind == "train" else 1)
        said = capsys.readouterr()
        assert f"seconds                      {result['seconds']:12.4f}\n" in said.out
        return result, said.err

    result, _ = run("train")
    np.testing.assert_allclose(result["pairs_per_second"] * result["seconds"], 16)
    assert result["seconds_low"] <= result["seconds"] <= result["seconds_high"]
    config.data.features = "kept"
    for kind in ("train", "encode", "caption"):
        with pytest.raises(ValueError, match="data.features=kept: a benchmark draws pixels"):
            run(kind)
    config.data.features = ""
    result, _ = run("encode", "--batch_size=4")
    np.testing.assert_allclose(result["images_per_second"] * result["seconds"], 4)
    most = config.model.text.max_len - 1
    result, _ = run("caption", "--batch_size=2", "--tokens=0", "--num_beams=2")
    np.testing.assert_allclose(result["tokens_per_second"] * result["seconds"], 2 * most)
    quotient = result["late_token_seconds"] / result["early_token_seconds"]
    np.testing.assert_allclose(result["late_over_early"], quotient)


def peer_config():
    config = base.get_config()
    released = open_clip_config.RELEASED["coca_ViT-B-32"]
    config.model = ConfigDict(open_clip_config.to_model(released), convert_dict=True)
    config.model.update(image_size=64, embed_dim=32, dtype="float32")
    config.model.image.update(width=64, depth=1, mlp_dim=256, num_heads=2)
    config.model.text.update(width=32, unimodal_depth=1, multimodal_depth=1, vocab_size=300)
    config.model.text.update(mlp_dim=128, num_heads=2, multimodal_heads=2, multimodal_mlp_dim=128)
    config.model.pooler.update(num_queries=9)
    return config


@pytest.mark.long
def test_the_peer_runs_at_the_same_sizes(monkeypatch):
    pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    config = typed(peer_config())
    params = random_params(model_times.build(config))  # in no time
    monkeypatch.setattr(model_times, "make_params", lambda config: params)
    pixels = model_times.random_batch(config, 2)["image"]
    peer = peer_times.build_peer(config.model)
    for beams in (1, 3):
        ids = peer_times.caption_with_peer(peer, pixels, tokens=7, beams=beams)
        assert ids.shape == (2, 8)
        assert peer_times.END not in ids[:, 1:-1]
    result = model_times.caption(config, 2, 7, 3, repeats=1, compare=True)
    assert result["times_peer"] == result["peer_seconds"] / result["seconds"]
    np.testing.assert_allclose(result["tokens_per_second"] * result["seconds"], 2 * 7)
    embeddings = peer_times.encode_with_peer(peer, pixels)
    assert embeddings.shape == (2, 32)
    np.testing.assert_array_equal(
        embeddings, peer_times.encode_with_peer(peer_times.build_peer(config.model), pixels)
    )
    assert all(
        bool(p.isfinite().all()) and bool(p.std() > 0) for p in peer.parameters() if p.numel() > 1
    )


def test_the_peer_learns_from_captions_of_a_file(tmp_path):
    """Its first loss is that of chance, log 4 among the batch and twice log 300 a word; the same
    batch again loses less."""
    pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    config = peer_config()
    config.batch_size, config.text_lengths, config.optimizer.name = 4, (8, 9), "adamw"
    config.optimizer.learning_rate = 0.02
    config = read(Config, config.to_dict())
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(f"a picture of {n} small things" for n in range(9)))
    first, second = step_times.step_batches(config, str(file))
    assert first["text_valid"].sum(1).tolist() == [8] * 4  # [start], six words, [end]
    assert (first["tokens"] != second["tokens"]).sum() == 4  # the numbers
    assert step_times.lengths_of(first, config) == (9, 9)  # their mask looks a place beyond
    step = step_times.theirs(config)
    losses = [step(first) for _ in range(4)]
    np.testing.assert_allclose(losses[0], np.log(4) + 2 * np.log(300), rtol=0.02)
    assert losses[0] - losses[-1] > 0.2
    (full,) = step_times.step_batches(config, "")
    assert full["text_valid"].all() and (full["tokens"] > 0).all()
    narrow = step_times.theirs(config.change({"model.dtype": "bfloat16"}))
    np.testing.assert_allclose(narrow(first), losses[0], rtol=0.02)
    with pytest.raises(ValueError, match="has 9 captions, a batch 10; give more"):
        step_times.step_batches(config.change({"batch_size": 10}), str(file))
    with pytest.raises(ValueError, match="optimizer.name='muon'; add --config.optimizer.name=adam"):
        peer_times.trainer(config.change({"optimizer.name": "muon"}))
    with pytest.raises(
        ValueError, match="pooler.token_dropout=0.5 hides .* add --config.model.pool"
    ):
        peer_times.trainer(config.change({"model.pooler.token_dropout": 0.5}))
    fewer = peer_times.build_peer(config.model.change({"image.patch_dropout": 0.5}), training=True)
    assert fewer.visual.patch_dropout.prob == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peer_s_step_runs_beside_ours_on_captions_of_their_lengths(tmp_path, dtype):
    """Both steps run, also in processes of their own for their memory; batches take the captions of
    a file in order."""
    pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    config = peer_config()
    config.batch_size, config.model.dtype = 8, dtype
    config.text_lengths = (8, 16)
    config.optimizer.name = "adamw"
    config.mesh.update(data=8)
    lines = [f"a picture of {n} small things" for n in range(17)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    config = read(Config, config.to_dict())
    first, second = step_times.step_batches(config, str(tmp_path / "texts.txt"))
    assert first["text_valid"].sum(1).max() == 8  # [start], six words, [end]
    assert not (first["tokens"] == second["tokens"]).all()
    result = step_times.train(config, 1, True, str(tmp_path / "texts.txt"))
    assert result["times_peer"] == result["peer_seconds"] / result["seconds"]
    assert result["peak_bytes"] > 0 and result["peer_peak_bytes"] > 0
    with pytest.raises(ValueError, match="has 17 captions, a batch 32; give more"):
        config = config.change(dict(batch_size=32))
        step_times.step_batches(config, str(tmp_path / "texts.txt"))


PEAKS = """
import numpy as np
from coca_jax.apps import benchmark as step_times
work = lambda: np.ones(64 << 17)  # 64 MiB, of which nothing stays
print(step_times.added(work), step_times.added(lambda: None))
"""


def test_a_peak_counts_what_is_given_back_too():
    """In a process of its own: threads that other tests have left give memory back meanwhile."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    most, none = map(int, done.stdout.split())
    assert 60 << 20 < most < 80 << 20
    assert none < 4 << 20  # and not a peak of before


def test_the_peer_reads_the_same_records(tmp_path):
    pytest.importorskip("open_clip_train", reason="needs the extra 'parity'")
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    with open(tmp_path / "raw/metadata.jsonl", "w") as file:
        for i in range(12):
            pixels = np.full((20, 30, 3), i * 20, np.uint8) + rng.integers(0, 9, 3, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"raw/{i}.{'png' if i % 2 else 'jpg'}")
            row = dict(file_name=f"{i}.{'png' if i % 2 else 'jpg'}", text=f"picture {i}")
            file.write(json.dumps(row) + "\n")
    prepare.prepare("imagefolder", str(tmp_path / "raw"), str(tmp_path / "out"), progress=False)
    config = tiny_config()
    config.batch_size, config.model.text.vocab_size = 4, 400
    config.data.sources = (dict(path=str(tmp_path / "out")),)
    records = filters.open_source(str(tmp_path / "out")).read(range(12))
    peer_times.write_tar(records, str(tmp_path / "0.tar"))
    batches = peer_times.input_batches(str(tmp_path / "0.tar"), 12, 4, 16)
    images, tokens = zip(*(next(batches) for _ in range(3)))
    assert np.concatenate(images).shape == (12, 3, 16, 16)
    assert len(np.unique(np.concatenate(tokens), axis=0)) == 12
    result = input_rate.read_input(config, 0.3, 0.0, repeats=2, compare=True)
    ours, theirs = (result[f"{who}images_per_second_per_core"] for who in ("", "peer_"))
    assert result["times_peer"] == ours / theirs
    low, high = (result[f"images_per_second_per_core_{end}"] for end in ("low", "high"))
    assert low <= ours <= high
    found = input_rate.read_input(config, 0.4, 0.1, repeats=1)["rss_mib"]
    assert 3 <= len(found) <= 5 and min(found) > 50


def test_no_more_tokens_are_counted_than_the_model_writes():
    config = typed(tiny_config())
    most = config.model.text.max_len - 1
    with pytest.raises(ValueError, match=rf"--tokens={most + 1}: the model writes {most} at most"):
        model_times.caption(config, 2, most + 1, 1, repeats=1)


def test_what_needs_open_clip_is_the_flag_that_was_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as where it is not installed
    config = typed(tiny_config())
    file = tmp_path / "texts.txt"
    file.write_text("a cat\n" * config.batch_size)
    with pytest.raises(ValueError, match="^--texts needs open_clip: pip install"):
        step_times.step_batches(config, str(file))
    with pytest.raises(ValueError, match="^--peer needs open_clip: pip install"):
        peer_times.trainer(config.change({"optimizer.name": "adamw"}))


def test_a_peer_needs_a_batch_of_records():
    with pytest.raises(ValueError, match="reads 60 records .* no batch of 64; add"):
        next(peer_times.input_batches("0.tar", 60, 64, 16))


def test_a_peer_needs_a_model_that_it_has():
    open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    with pytest.raises(ValueError, match="open_clip has only"):
        peer_times.build_peer(tiny_config().model)
    if "correct_cls_mask" not in open_clip.CLIPTextCfg.__dataclass_fields__:  # a later release's
        exact = typed(peer_config()).change({"model.text.cls_mask": "exact"})
        says = "no such model .*'correct_cls_mask'.*add --config.model.text.cls_mask=shifted"
        with pytest.raises(ValueError, match=says):
            peer_times.build_peer(exact.model)


def test_a_peer_is_compared_in_its_own_precision():
    config = tiny_config()
    config.model.dtype = "bfloat16"
    with pytest.raises(ValueError, match="--config.model.dtype=float32"):
        peer_times.build_peer(config.model)


def test_a_peer_is_compared_on_the_same_device(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = typed(tiny_config()).change({"optimizer.name": "adamw"})
    for act in (
        lambda: peer_times.trainer(config),
        lambda: model_times.encode(config, 2, 1, compare=True),
        lambda: model_times.caption(config, 2, 2, 1, 1, compare=True),
    ):
        with pytest.raises(ValueError, match="computes on a gpu: give .* with JAX_PLATFORMS=cpu"):
            act()
    monkeypatch.delattr(os, "sched_setaffinity")  # as on macOS
    with pytest.raises(ValueError, match="which only Linux can; leave out --peer"):
        input_rate.read_input(config, 1.0, 0.0, 1, compare=True)


def test_losses_are_their_definitions_and_beside_them(monkeypatch, capsys):
    rng = np.random.default_rng(0)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 8, 4)))
    naive = loss_costs.naive_contrastive(image, text, 7.0)
    ours = loss_costs.contrastive_loss(image, text, np.float32(7), chunk=4)[0]
    np.testing.assert_allclose(naive, ours, rtol=1e-5)
    found = loss_costs.contrastive(16, 4, 8, 4, repeats=2)
    assert found["time_ratio"] == found["ours_seconds"] / found["naive_seconds"] > 0
    assert 0 < found["ours_seconds_spread"] < 60
    states, kernel = (rng.normal(size=of).astype("float32") for of in ((2, 3, 4), (4, 11)))
    targets, mask = rng.integers(0, 11, (2, 3)), np.array([[1, 1, 0], [1, 0, 0]], bool)
    given = states, kernel, np.zeros(11, np.float32), targets, mask
    naive = loss_costs.naive_captioning(*given)
    np.testing.assert_allclose(naive, loss_costs.captioning_loss(*given)[0], rtol=1e-5)
    told = loss_costs.captioning(64, 8, 500, 8, 2, 64, repeats=1)
    assert told["memory_ratio"] < 0.5  # of 64 x 8 x 500 logits there are 64 x 500
    monkeypatch.setattr(loss_costs, "contrastive", lambda *_: found)
    monkeypatch.setattr(loss_costs, "captioning", lambda *_: told)
    assert loss_costs.run(1) == dict(contrastive=found, captioning=told)
    assert f"({told['memory_ratio']:.3f}), time" in capsys.readouterr().out


def test_flags_of_another_benchmark_are_refused(monkeypatch):
    flags_of("benchmark", monkeypatch)
    for kind, flag, says in (
        ("train", "", "benchmark train needs --config=NAME"),
        ("losses", "--peer", "--peer is of `train` and .*; leave it out of `losses`$"),
        ("losses", "--texts=t", "--texts is of `train`; leave it out of `losses`$"),
        ("losses", "--memory_every=1", "--memory_every is of `input`; leave it out of `losses`$"),
        ("input", "--peer --memory_every=1 --config=tiny", "leave it out of `input --peer`$"),
        ("train", "--batch_size=3 --config=tiny", "of `train`; .* read --config.batch_size$"),
        ("train", "--num_beams=7 --config=tiny", "--num_beams is of `caption`; leave it out"),
        ("encode", "--tokens=9 --config=tiny", "--tokens is of `caption`; leave it out of `encode"),
        ("encode", "--seconds=0.1 --config=tiny", "--seconds is of `input` and `input --peer`;"),
        ("input", "--repeats=2 --config=tiny", "--repeats is of .*; leave it out of `input`$"),
        ("losses", "--config=tiny", "--config is of .*; leave it out of `losses`$"),
    ):
        benchmark.flags.FLAGS.unparse_flags()
        benchmark.flags.FLAGS(["benchmark", *flag.split()])
        with pytest.raises(ValueError, match=says):
            benchmark.main(["benchmark", kind])


def test_unknown_benchmarks_are_named():
    with pytest.raises(ValueError, match="give one of train"):
        benchmark.main(["benchmark", "fly"])


def test_texts_that_are_no_text_file_are_a_line(tmp_path):
    """Before anything is tokenized, so without open_clip."""
    config = read(Config, tiny_config().to_dict())
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(b"\xff\xd8\xff\xe0 and so on")
    for path in (picture, tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError) as error:
            step_times.step_batches(config, str(path))
        assert str(error.value) == f"--texts={path}: give a text file, one caption a line"
