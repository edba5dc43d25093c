"""A captioner on a locked encoder: what is taken, what moves, and tokens that are kept."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_heads import train_alone
from test_train import tiny_run

from coca_jax import checkpointing, export_format, run_config
from coca_jax.config import Model, read
from coca_jax.data import features
from coca_jax.inference.loading import load
from coca_jax.metrics import read_metrics
from coca_jax.models import two_towers
from coca_jax.partitioning import unbox

LOSSES = ("loss", "contrastive_loss", "captioning_loss", "gradient_norm")


def locked_run(start, steps=3, **data):
    """A run on the encoder of `start`, of captions alone."""
    config = tiny_run(steps)
    config.update(init_from=str(start), init_parts="image")
    config.optimizer.update(image_learning_rate=0.0, weight_decay=0.1, warmup_steps=0)
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption", limit=40),)
    config.data.update(dict(augment="drawing", augmentations=2) | data)
    return config


def flat(place):
    return export_format.flatten(checkpointing.load_params(str(place))[0])


def losses(workdir):
    rows = read_metrics(str(workdir))
    return np.array([[row[name] for name in LOSSES] for row in rows])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A contrastive-only run of one step."""
    workdir = tmp_path_factory.mktemp("start")
    config = tiny_run(1)
    config.optimizer.warmup_steps = 0
    config.loss.captioning_weight = 0.0
    train_alone(config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def plain(start, tmp_path_factory):
    """A locked run that encodes each batch."""
    workdir = tmp_path_factory.mktemp("plain")
    train_alone(locked_run(start), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def kept(start, tmp_path_factory):
    """The same with kept tokens: (workdir, folder of the tokens)."""
    workdir = tmp_path_factory.mktemp("kept")
    folder = workdir / "features"
    train_alone(locked_run(start, features=str(folder)), str(workdir))
    return workdir, folder


def test_the_encoder_is_taken_and_stays_and_the_rest_learns(start, plain):
    before, after = flat(start), flat(plain)
    assert before.keys() == after.keys()
    same = {n for n in after if np.array_equal(before[n], after[n])}
    locked = {n for n in after if n.startswith("image_encoder")}
    # Softmax does not see a bias of all keys.
    assert locked <= same and all(n.endswith("key/bias") for n in same - locked)
    assert json.loads((plain / "config.json").read_text())["init_parts"] == "image"
    assert checkpointing.find_step(str(plain))[1] == 3


def test_kept_tokens_give_the_losses_of_encoding(plain, kept):
    np.testing.assert_allclose(losses(kept[0]), losses(plain), rtol=2e-5)
    one, two = flat(plain), flat(kept[0])
    worst = max(np.abs(one[name] - two[name]).max() for name in one)
    assert worst < 1e-4


def places(folder):
    (found,) = folder.iterdir()
    rows = np.fromfile(found / "rows.bin", features.ROW)
    return found, rows


def test_tokens_are_computed_once_and_go_on_where_they_were(start, kept, tmp_path):
    found, rows = places(kept[1])
    assert len(rows) == 80 and (rows["state"] == features.GOOD).all()
    assert (found / "tokens.bin").stat().st_size == 80 * 4 * 16 * 4
    folder = tmp_path / "features"
    shutil.copytree(kept[1], folder)
    place = folder / found.name
    cut = rows.copy()
    cut["state"][30:] = features.MISSING
    cut.tofile(place / "rows.bin")
    tokens = bytearray((place / "tokens.bin").read_bytes())
    tokens[40 * 256 :] = bytes(40 * 256)
    (place / "tokens.bin").write_bytes(tokens)
    train_alone(locked_run(start, 1, features=str(folder)), str(tmp_path / "run"))
    assert (place / "tokens.bin").read_bytes() == (found / "tokens.bin").read_bytes()
    np.testing.assert_array_equal(np.fromfile(place / "rows.bin", features.ROW), rows)


def test_damage_and_other_images_are_a_line(start, kept, tmp_path):
    found, rows = places(kept[1])
    for name in ("tokens.bin", "rows.bin"):
        folder = tmp_path / name
        shutil.copytree(kept[1], folder)
        place = folder / found.name
        if name == "tokens.bin":
            data = bytearray((place / name).read_bytes())
            data[::64] = bytes(x ^ 1 for x in data[::64])
            (place / name).write_bytes(data)
            message = "tokens.bin is damaged; delete"
        else:
            changed = rows.copy()
            changed["image"] ^= 1
            changed.tofile(place / name)
            message = "is another image than the one whose tokens were kept"
        with pytest.raises(ValueError, match=message):
            train_alone(locked_run(start, 2, features=str(folder)), str(tmp_path / f"run-{name}"))


def test_images_that_do_not_decode_are_replaced_alike(start, tmp_path, monkeypatch):
    """With kept tokens as without."""
    from coca_jax.data import drawn

    encode = drawn.images.encode_bmp

    def broken(image):
        return b"BM" + bytes(40) if int(image.sum()) % 7 == 0 else encode(image)

    monkeypatch.setattr(drawn.images, "encode_bmp", broken)
    more = dict(max_bad_fraction=1.0, augment="none", augmentations=0)
    one = locked_run(start, 2, **more)
    two = locked_run(start, 2, features=str(tmp_path / "features"), **more)
    for config, name in ((one, "one"), (two, "two")):
        train_alone(config, str(tmp_path / name))
    rows = places(tmp_path / "features")[1]
    bad = int((rows["state"] == features.BAD).sum())
    assert 0 < bad < 20 and len(rows) == 40
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_decoder_learns_on_towers_of_another_family(family, plain, tmp_path):
    """Its tokens are those of the towers."""
    sizes = locked_run("").model.to_dict() | dict(family=family, dtype="float32")
    clip = family == "clip"
    sizes["image"] = dict(sizes["image"]) | dict(
        class_token=clip, pre_norm=clip, final_norm=not clip, patch_bias=not clip
    )
    sizes["pooler"] = dict(sizes["pooler"]) | dict(num_heads=4)
    sizes["activation"] = "quick_gelu" if clip else "gelu"
    model = read(Model, sizes)
    params = jax.device_get(unbox(two_towers.init(two_towers.build(model), jax.random.key(3))))
    words = plain / "vocabulary.model"
    written = model.to_dict()
    export_format.write_export(tmp_path / "towers", params, {"model": written}, words)
    towers = load(str(tmp_path / "towers"))
    config = locked_run(tmp_path / "towers", 2, features=str(tmp_path / "features"))
    config.model.image.update(written["image"])
    config.model.activation = written["activation"]
    config.data.vocabulary = str(words)
    train_alone(config, str(tmp_path / "run"))
    captioner = load(str(tmp_path / "run"))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(captioner.features(pictures), towers.features(pictures), atol=1e-5)
    assert len(captioner.caption(pictures)) == 2
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.image_learning_rate": 1e-5}, "keeps the tokens of a frozen image encoder"),
        ({"data.augmentations": 0}, "augmentations=0 draws a new one"),
        ({"image_sizes": ((0.5, 16),)}, "image_sizes=.* does not go with data.features"),
        ({"model.image.patch_dropout": 0.5}, "patch_dropout=0.5 does not go"),
        ({"init_from": ""}, "init_parts='image' needs init_from"),
        ({"head.kind": "classification"}, "goes with no task head"),
        ({"data.loader": "seqio"}, "needs data.loader='direct'"),
    ],
)
def test_what_does_not_go_together_is_a_line(changes, message):
    config = run_config.read(run_config.Config, locked_run("runs/x", features="f").to_dict())
    with pytest.raises(ValueError, match=message):
        run_config.check(config.change(changes))


def test_too_many_bytes_are_refused_before_they_are_written(start, tmp_path):
    config = locked_run(start, 1, features=str(tmp_path / "features"), features_gib=1e-6)
    with pytest.raises(ValueError, match="more than data.features_gib=1e-06; raise it"):
        train_alone(config, str(tmp_path / "run"))
    assert not list((tmp_path / "features").iterdir()) if (tmp_path / "features").exists() else True


def test_a_slowly_tuned_encoder_moves_at_its_own_rate(start, tmp_path):
    config = locked_run(start, 1)
    config.optimizer.update(
        name="adamw", learning_rate=1e-2, image_learning_rate=1e-4, weight_decay=0.0
    )
    config.optimizer.update(schedule="constant", warmup_steps=0, clip_norm=0.0, ema=0.0)
    train_alone(config, str(tmp_path / "run"))
    before, after = flat(start), flat(tmp_path / "run")
    moved = {n: np.abs(after[n] - before[n]).max() for n in after if n.startswith("image_encoder")}
    # Adam's first step is the rate itself, wherever there is a gradient.
    assert 5e-5 < max(moved.values()) < 1.05e-4
