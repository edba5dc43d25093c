"""A captioner on a locked encoder: what is taken, what moves, and tokens that are kept."""

import json
import os
import resource
import shutil
import signal
import types
from unittest import mock

import jax
import numpy as np
import pytest
from one_device import train_alone
from quick_start import drawn_by_numpy, first_state  # noqa: F401
from test_inference import random_params
from test_train import tiny_run

from coca_jax.checkpoints import manager
from coca_jax.config import Config, Model, Optimizer, read, typed
from coca_jax.data import feature_cache, images, vocabulary
from coca_jax.data.batches import Batches, trained
from coca_jax.data.sources import source as random_access
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import Draw
from coca_jax.interop import export_format
from coca_jax.models import coca, two_towers
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.parallel import sharding
from coca_jax.runtime import activity
from coca_jax.training import feature_extraction, optimizer, setup, trainer, warm_start
from coca_jax.training.state import trainable
from coca_jax.training.train_step import loss_and_metrics

ROWS = 80  # 40 images, 2 augmentations


def locked_run(start, **data):
    """A run on the encoder of `start`, of captions alone."""
    config = tiny_run(2)
    config.update(init_from=str(start), init_parts="image")
    config.optimizer.update(image_learning_rate=0.0, weight_decay=0.1)
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption", limit=40),)
    config.data.update(dict(augment="drawing", augmentations=2, max_bad_fraction=1.0) | data)
    return config


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocabulary.model"
    vocabulary.train(["a red circle", "a blue square above it", "two dogs"] * 9, 300, str(path), 0)
    return path


@pytest.fixture(scope="module")
def start(words, tmp_path_factory):
    """Weights of the model, as an export."""
    config = typed(tiny_run())
    params = random_params(coca.build(config.model))
    folder = tmp_path_factory.mktemp("start") / "weights"
    export_format.write_export(folder, params, {"model": config.model.to_dict()}, words)
    return folder


def rng(seed):
    return jax.random.key(seed)


@pytest.fixture(scope="module", autouse=True)
def damaged_images():
    """Some scenes do not decode."""
    encode = images.encode_bmp

    def broken(image):
        return b"BM" + bytes(40) if int(image.sum()) % 7 == 0 else encode(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "encode_bmp", broken)
        yield


@pytest.fixture(scope="module")
def kept(start, words, tmp_path_factory):
    """A run with kept tokens: (workdir, its config)."""
    workdir = tmp_path_factory.mktemp("kept")
    config = locked_run(start, features=str(workdir / "features"), vocabulary=str(words))
    train_alone(config, str(workdir))
    return workdir, config


def flat(tree):
    return export_format.flatten(tree)


def of_place(config, workdir):
    """(the run, its state before the first step, the kept tokens)."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = trainer.Trainer(config, str(workdir))
        run.mesh = mesh
        run.open_data()
        state = first_state(run.model, run.config, mesh)
        run.state = warm_start.apply(state, run.config.init_from, parts="image")
        return run, run.state, feature_extraction.keep(run)


def places(folder):
    (found,) = folder.iterdir()
    return found, np.fromfile(found / "rows.bin", feature_cache.ROW)


def test_the_encoder_is_taken_and_stays_and_the_rest_learns(start, kept):
    before = flat(warm_start.read(str(start))[0])
    after = flat(manager.load_params(str(kept[0]))[0])
    assert before.keys() == after.keys()
    same = {n for n in after if np.array_equal(before[n], after[n])}
    locked_names = {n for n in after if n.startswith("image_encoder")}
    assert same == locked_names
    small = trainable(after_tree := manager.load_params(str(kept[0]))[0], typed(kept[1]))
    assert "image_encoder" not in small and len(small) == len(after_tree) - 1


def test_kept_tokens_give_the_losses_of_encoding_each_time(start, words, kept, tmp_path):
    """Also where images do not decode and others stand in for them."""
    run, state, tokens = of_place(kept[1], tmp_path / "run")
    rows = places(kept[0] / "features")[1]
    assert len(rows) == ROWS and 0 < (rows["state"] == feature_cache.BAD).sum() < ROWS // 2
    plain = run.config.change({"data.features": ""})
    made = {}
    for name, config, more in (("kept", run.config, tokens), ("plain", plain, ())):
        batches = Batches(config, run.vocabulary, features=more)
        assert ("encoded" in batches.batch(0)) == (name == "kept")
        found = [batches.batch(step) for step in range(3)]
        batches.close()
        step = jax.jit(
            lambda params, batch, config=config: loss_and_metrics(
                params, run.model, config, batch, rng(0)
            )[1]
        )
        made[name] = [step(state.params, trained(batch, config)) for batch in found]
        made[name + " rows"] = [batch["index"] for batch in found]
    np.testing.assert_array_equal(made["kept rows"], made["plain rows"])
    for one, two in zip(made["kept"], made["plain"]):
        for loss in ("loss", "contrastive_loss", "captioning_loss"):
            np.testing.assert_allclose(one[loss], two[loss], rtol=1e-5)


def test_tokens_go_on_where_they_were_and_damage_is_a_line(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(feature_extraction, "SAY_SECONDS", -1.0)
    found, rows = places(kept[0] / "features")
    whole = (found / "tokens.bin").read_bytes()
    folder = tmp_path / "features"
    shutil.copytree(kept[0] / "features", folder)
    place = folder / found.name
    cut = rows.copy()
    cut["state"][10:] = feature_cache.MISSING
    cut.tofile(place / "rows.bin")
    (place / "tokens.bin").write_bytes(whole[: 10 * 256].ljust(len(whole), b"\0"))
    config = kept[1].copy_and_resolve_references()
    config.data.features = str(folder)
    parts = activity.parts()
    run, _, tokens = of_place(config, tmp_path / "run")
    assert activity.parts() - parts >= 2  # a block, read and kept: no hang
    said = capsys.readouterr().err
    assert f"features: 64 of {ROWS - 10} images, 1 min left" in said
    assert f"this run reads {2 * config.batch_size} of these at most" in said
    assert (place / "tokens.bin").read_bytes() == whole
    np.testing.assert_array_equal(np.fromfile(place / "rows.bin", feature_cache.ROW), rows)
    (place / "tokens.bin").write_bytes(bytes(len(whole)))
    batches = Batches(run.config, run.vocabulary, features=tokens)
    with pytest.raises(ValueError, match="tokens.bin is damaged; delete"):
        batches.batch(0)
    (place / "tokens.bin").write_bytes(whole)
    assert np.isfinite(batches.batch(0)["encoded"]).all()
    tokens[0]._known["image"] ^= 1
    with pytest.raises(ValueError, match="another image than the one whose tokens were kept"):
        batches.batch(0)
    batches.close()
    other = feature_cache.about(run.config, run.mixture.sources[0], 0, {"kernel": 1})
    assert feature_cache.Features(str(folder), other, ROWS, run.config).path != place
    small = run.config.change({"data.features_gib": 1e-6})
    with pytest.raises(ValueError, match="more than data.features_gib=1e-06; raise it"):
        feature_cache.Features(str(tmp_path / "none"), other, ROWS, small)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_ends_the_work_and_damages_no_kept_row(tmp_path):
    """The system takes a part of what does not fit, and says so in the number it returns alone."""
    config = read(Config, locked_run("x").to_dict())
    one = feature_cache.Features(str(tmp_path), {"x": 1}, 8, config)
    size = int(np.prod(one.shape)) * one.dtype.itemsize
    records = [Record(b"image %d" % n, (), (), str(n)) for n in range(8)]
    tokens = np.ones((4, *one.shape), one.dtype)
    free, was = r"[\d.e+]+ GiB free; make room", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size + size // 2, was[1]))
        one.write(np.arange(4), records[:4], tokens)
        with pytest.raises(OSError, match=f"{one.path}: File too large for kept tokens, {free}"):
            one.write(np.arange(4, 8), records[4:], tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, before)
    one.close()
    again = feature_cache.Features(str(tmp_path), {"x": 1}, 8, config)
    assert again.missing().tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(again.read(3, records[3]), tokens[3])
    again.write(np.arange(4, 8), records[4:], tokens)
    np.testing.assert_array_equal(again.read(4, records[4]), tokens[0])
    again.close()


def test_the_room_is_that_of_all_sources(tmp_path, monkeypatch):
    config = read(Config, locked_run("x").to_dict())
    size = int(np.prod(feature_cache.shape(config))) * 4
    room = types.SimpleNamespace(free=10 * size)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda place: room)
    one = feature_cache.Features(str(tmp_path), {"x": 1}, 6, config)
    assert one.to_come == 6 * size
    with pytest.raises(ValueError, match="GiB are needed and .* free; give a folder on a larger"):
        feature_cache.Features(str(tmp_path), {"x": 2}, 6, config, one.to_come)
    feature_cache.Features(str(tmp_path), {"x": 3}, 4, config, one.to_come).close()
    one.close()


def test_two_parts_of_data_without_a_fingerprint_keep_their_tokens_apart():
    """As of seqio and TFDS, where the parts have equally many records."""
    of = dict(seqio="tasks:pictures")
    entries = (dict(of, where={"language": "de"}), dict(of, where={"language": "en"}), of)
    config = typed(locked_run("")).change({"data.sources": entries, "data.augmentations": 0})
    source = random_access.Source("seqio pictures", 3, lambda indices: [])
    found = [feature_cache.about(config, source, number, {}) for number in range(3)]
    assert len({json.dumps(one) for one in found}) == 3
    assert found[2]["records"] == "seqio pictures, 3 records"  # as ever


def test_augmentations_that_are_all_the_same_are_kept_once():
    """In the folder of a run without, whatever the seed."""
    plain = typed(locked_run("", augment="none", augmentations=0))
    source = random_access.Source("pictures", 3, lambda indices: [])
    for changes, rows in (
        ({"data.augmentations": 8, "seed": 1}, 1),
        ({"data.augmentations": 8, "data.flip": True}, 8),
        ({"data.augmentations": 1, "data.augment": "crop"}, 1),
    ):
        config = plain.change(changes)
        assert feature_cache.augmentations(config) == rows
        found, wanted = (feature_cache.about(one, source, 0, {}) for one in (config, plain))
        assert (found == wanted) == ("seed" in changes)
    draw = Draw(0, 0, np.arange(5))
    read = feature_cache.Tokens(plain.change({"data.augmentations": 8}), ()).plan(
        [], draw, draw.positions
    )
    assert read["row"].tolist() == [0, 1, 2, 3, 4]


def test_warnings_are_told_before_hours_go_into_tokens(monkeypatch, tmp_path, capsys):
    class Begun(Exception):
        pass

    run = trainer.Trainer(locked_run("", augment="none", augmentations=8), str(tmp_path))
    run.mixture = types.SimpleNamespace(
        num_examples=1000, remark_small=str, remark_uneven=lambda: "uneven"
    )
    monkeypatch.setattr(feature_extraction, "keep", mock.Mock(side_effect=Begun))
    with pytest.raises(Begun):
        run.open_batches()
    said = capsys.readouterr().err.splitlines()
    assert [line[:43] for line in said] == ["warning: data.augmentations=8 has no effect", "uneven"]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tokens_are_those_of_towers_of_another_family(family, words, tmp_path):
    sizes = locked_run("").model.to_dict() | dict(family=family, dtype="float32")
    clip = family == "clip"
    sizes["image"] = dict(sizes["image"]) | dict(
        class_token=clip, pre_norm=clip, final_norm=not clip, patch_bias=not clip
    )
    sizes["activation"] = "quick_gelu" if clip else "gelu"
    model = read(Model, sizes)
    towers = two_towers.build(model)
    params = random_params(towers, two_towers)
    export_format.write_export(tmp_path / "towers", params, {"model": model.to_dict()}, words)
    config = locked_run(tmp_path / "towers", features=str(tmp_path / "features"))
    config.data.update(augment="none", augmentations=0, vocabulary=str(words))
    config.model.image.update(model.to_dict()["image"])
    config.model.activation = model.activation
    run, state, tokens = of_place(config, tmp_path / "run")
    batches = Batches(run.config, run.vocabulary, features=tokens)
    plain = Batches(run.config.change({"data.features": ""}), run.vocabulary)
    pixels = normalise_pixels(plain.batch(0)["image"], model)
    encode = jax.jit(lambda x: towers.apply({"params": params}, x, method="encode_pixels"))
    wanted = encode(pixels)
    np.testing.assert_allclose(batches.batch(0)["encoded"], wanted, atol=1e-5)
    assert wanted.shape == (16, 4 + clip, 16)
    batches.close(), plain.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.image_learning_rate": 1e-5}, "caches the tokens of a frozen image encoder"),
        ({"data.augmentations": 0}, "augmentations=0 draws a new augmentation"),
        ({"image_sizes": ((0.5, 16),)}, "image_sizes=.* does not go with data.features"),
        ({"model.image.patch_dropout": 0.5}, "patch_dropout=0.5 does not go"),
        ({"init_from": ""}, "init_parts='image' needs init_from"),
        ({"head.kind": "classification"}, "encoder_learning_rate=0 with a task head"),
        ({"data.loader": "seqio"}, "data.loader='seqio' does not go with"),
    ],
)
def test_what_does_not_go_together_is_a_line(changes, message):
    config = read(Config, locked_run("runs/x", features="f").to_dict())
    with pytest.raises(ValueError, match=message):
        config.change(changes).check()


def test_kept_tokens_in_what_is_no_folder_are_refused_before_anything_is_made(start, tmp_path):
    file = tmp_path / "metadata.jsonl"
    file.write_text("{}")
    for place in (file, file / "below"):
        config = typed(locked_run(start, features=str(place)))
        with pytest.raises(ValueError, match=r"^data.features: .*metadata.jsonl is a file\); give"):
            setup.check_devices(config)
    with pytest.raises(ValueError, match="data.features=gs://b/f is no folder of this machine"):
        setup.check_devices(config.change({"data.features": "gs://b/f"}))
    setup.check_devices(config.change({"data.features": str(tmp_path / "new")}))
    assert os.listdir(tmp_path) == ["metadata.jsonl"] and file.read_text() == "{}"


def test_a_slowly_tuned_encoder_has_its_own_rate():
    config = typed(locked_run("x")).optimizer
    config = dict(config.to_dict(), learning_rate=1e-3, image_learning_rate=1e-5, layer_decay=0.5)
    model = coca.build(typed(tiny_run()).model)
    params = jax.eval_shape(lambda: sharding.unbox(coca.init(model, rng(0))))
    rates = optimizer.rate_factors(params, read(Optimizer, config), False)
    found = flat(rates)
    assert found["image_encoder/final_norm/scale"] == pytest.approx(0.01)
    assert found["image_encoder/patch_embedding/kernel"] == pytest.approx(0.01 * 0.5**3)
    assert found["generative_pooler/query/value"] == 1.0


def keeping(start):
    config = locked_run(start, augmentations=0)
    config.optimizer.ema = 0.0
    config.init_parts = "all"
    config.optimizer.update(image_learning_rate=-1.0, keep_embeddings=True)
    config.loss.contrastive_weight = 0.0
    return config


def test_embeddings_are_kept_bit_for_bit_while_captions_learn(start, words, tmp_path):
    config = keeping(start)
    config.data.vocabulary = str(words)
    train_alone(config, str(tmp_path / "run"))
    before = flat(warm_start.read(str(start))[0])
    after = flat(manager.load_params(str(tmp_path / "run"))[0])
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert {name.split("/")[1] for name in moved} == {"multimodal", "multimodal_norm", "head"}
    names = {name for name in after if name.startswith("text_decoder/multimodal/")}
    assert len(moved & names) > len(names) / 2


@pytest.mark.parametrize("kind", ["cascade", "parallel", "open_clip"])
def test_what_is_kept_is_what_embeddings_are_made_of(kind):
    """Gradients of both embeddings are there exactly where keep_embeddings does not train."""
    config = typed(keeping("x")).change({"model.pooler.kind": kind})
    model = coca.build(config.model)
    params, draws = random_params(model), np.random.default_rng(0)
    image = draws.standard_normal((2, config.model.image_size, config.model.image_size, 3))
    tokens = np.arange(8).reshape(2, 4) + 5

    def embeddings(params):
        one = model.apply({"params": params}, image, method="encode_image")[0]
        two = model.apply({"params": params}, tokens, tokens > 0, method="encode_text")
        return (one @ matrix + two @ matrix).sum()

    matrix = draws.standard_normal((config.model.embed_dim, 3))
    slopes = flat(jax.jit(jax.grad(embeddings))(params))
    free = flat(trainable(params, config))
    parts = {name.split("/")[0] for name in free}
    assert ("generative_pooler" in parts) == (kind == "parallel")
    assert not any(np.asarray(slopes[name]).any() for name in free)
    rest = [n for n in slopes if n not in free and not n.endswith(("key/bias", "log_scale"))]
    assert sum(np.asarray(slopes[n]).any() for n in rest) > 0.9 * len(rest)


def test_an_encoder_without_weights_is_not_locked(tmp_path):
    config = locked_run("")
    config.init_parts = "all"
    with pytest.raises(ValueError, match="image_learning_rate=0 locks the image encoder and needs"):
        setup.check(typed(config), str(tmp_path))
    with pytest.raises(ValueError, match="keep_embeddings keeps what weights have"):
        setup.check(typed(keeping("")), str(tmp_path))
    with pytest.raises(ValueError, match="contrastive_weight=1.0 does not go with .*keep_embed"):
        typed(keeping("x")).change({"loss.contrastive_weight": 1.0}).check()
