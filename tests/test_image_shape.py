"""Images and patches that are not square, from the configuration to captions."""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from one_device import train_alone
from ops_cases import drawn
from PIL import Image
from quick_start import drawn_by_numpy  # noqa: F401

import coca_jax
from coca_jax.checkpoints import config_file
from coca_jax.config import Config, Model, read, shapes, typed
from coca_jax.data import augment, images, order
from coca_jax.data.prepare import prepare
from coca_jax.estimate.flops import model_flops
from coca_jax.models import coca, image_encoder, layers
from coca_jax.models.image_encoder import shrink
from coca_jax.parallel import sharding
from coca_jax.recipes import base
from coca_jax.runtime import json_files
from coca_jax.training import warm_start
from coca_jax.training.trainer import Trainer


def test_a_size_is_a_number_or_height_and_width():
    assert shapes.pair(64) == (64, 64) and shapes.pair((48, 96)) == (48, 96)
    assert shapes.words(64) == "64" and shapes.words([48, 96]) == "48 x 96"
    assert shapes.grid((48, 96), 16) == (3, 6) and shapes.grid(48, (8, 16)) == (6, 3)
    model = read(Model, dict(image_size=[48, 96], patch_size=[np.int64(16), 16]))
    assert model.image_size == (48, 96) and model.patch_size == 16  # one number where they agree
    assert model.grid == (3, 6) and model.num_patches == 18
    assert read(Model, json.loads(json.dumps(model.to_dict()))) == model
    config = base.get_config()
    config.model.image_size = (36, 72)
    config.model.image_size = 72
    config.model.image_size = (36, 72)
    assert typed(config).model.grid == (2, 4)


@pytest.mark.parametrize("size", [(8, 16, 24), (8,), (8, 0), (8, "16"), "8x16", (True, 8), 8.0])
def test_what_is_no_size_is_a_line(size):
    with pytest.raises(ValueError, match="model.image_size=.* or a pair"):
        read(Config, dict(model=dict(image_size=size)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image_size": (36, 70)}, r"patch_size=18 does not divide model.image_size=.36, 70"),
        ({"model.patch_size": (18, 17)}, r"patch_size=.18, 17. does not divide"),
        ({"model.image_size": (36, 72), "image_sizes": ((0.5, 36),)}, "give a pair, as"),
        ({"image_sizes": ((0.5, (36, 72)),)}, "give one number, as model.image_size=288"),
        (
            {"model.image_size": (36, 72), "image_sizes": ((0.5, (18, 30)),)},
            "is not a multiple of model.patch_size=18",
        ),
        (
            {"model.image_size": (36, 72), "data.resize": "native"},
            r"model.image_size=.36, 72. does not go with data.resize='native'",
        ),
        (
            {"model.patch_size": (18, 36), "data.resize": "native"},
            r"model.patch_size=.18, 36. does not go with data.resize='native'",
        ),
        (
            {
                "model.image_size": (16, 32),
                "model.patch_size": (4, 8),
                "model.image.conv_widths": (8, 8),
                "model.image.conv_depths": (1, 1),
            },
            r"need model.patch_size=4 .it is .4, 8..",
        ),
    ],
)
def test_what_does_not_fit_together_is_a_line(changes, message):
    config = typed(base.get_config()).change({"steps": 100, "data.sources": ({"path": "x"},)})
    with pytest.raises(ValueError, match=message) as error:
        config.change(changes).check()
    assert "\n" not in str(error.value)


def test_patches_and_their_places_by_a_definition():
    pixels = np.random.default_rng(0).normal(size=(2, 8, 24, 3)).astype(np.float32)
    found = image_encoder.patchify(pixels, (4, 8))
    assert found.shape == (2, 6, 96)
    for row in range(2):
        for column in range(3):
            part = pixels[1, 4 * row : 4 * row + 4, 8 * column : 8 * column + 8]
            np.testing.assert_array_equal(found[1, 3 * row + column], part.ravel())
    places = layers.grid((2, 3), (2, 3))
    assert places.tolist() == [[r, c] for r in range(2) for c in range(3)]
    smaller = layers.grid((1, 3), (2, 6))  # half as many patches down and across
    np.testing.assert_allclose(smaller, [[0.5, 0.5], [0.5, 2.5], [0.5, 4.5]])
    table = layers.grid_waves(1, (2, 3))(None, (7, 8))
    for row in range(2):
        for column in range(3):
            wanted = [
                f(place * 10_000**-wave)
                for place in (row, column)
                for f in (math.sin, math.cos)
                for wave in (0, 0.5)
            ]
            np.testing.assert_allclose(table[1 + 3 * row + column], wanted, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "both"])
def test_an_image_is_seen_by_its_height_and_width(positions):
    """A wide image of wide patches is what a square one of square patches is, whose patches hold
    the same numbers; its places differ from those of a tall one."""

    def build(size, patch):
        config = typed(tiny_config(image_size=size, patch_size=patch, positions=positions)).model
        return coca.build(config)

    def run(module, params, pixels):
        encode = functools.partial(module.apply, method="encode_image")
        return jax.jit(encode)({"params": params}, pixels)[0]

    square, wide = build(16, 8), build((8, 32), (4, 16))
    params = drawn(jax.eval_shape(lambda: coca.init(square, jax.random.key(0))), 0.2)
    pixels = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32)
    patches = image_encoder.patchify(pixels, 8).reshape(2, 2, 2, 4, 16, 3)
    stretched = patches.transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 32, 3)
    found = run(wide, params, stretched)
    np.testing.assert_allclose(found, run(square, params, pixels), atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4 x 16, best 8 x 32: resize them"):
        run(wide, params, np.zeros((1, 8, 24, 3), np.float32))
    with pytest.raises(ValueError, match="square RGB images with a side that is a multiple of 8"):
        run(square, params, stretched)
    with pytest.raises(ValueError, match="packed images go with square images and patches"):
        run(wide, params, np.zeros((1, 4, 196), np.float32))


def test_a_convolutional_stem_takes_wide_images():
    config = typed(tiny_config(image_size=(8, 16), patch_size=4)).change(
        {"model.image.conv_widths": (4, 8), "model.image.conv_depths": (1, 0)}
    )
    module = coca.build(config.model)
    params = drawn(jax.eval_shape(lambda: coca.init(module, jax.random.key(0))))
    pixels = np.random.default_rng(0).normal(size=(2, 8, 16, 3)).astype(np.float32)
    encode = jax.jit(functools.partial(module.apply, method="encode_pixels"))
    found = encode({"params": params}, pixels)
    assert found.shape == (2, 8, 16) and np.isfinite(found).all()
    smaller = encode({"params": params}, pixels[:, :4, :8])
    assert smaller.shape == (2, 2, 16)


def test_a_step_s_operations_go_by_the_number_of_patches():
    square = Model(image_size=288, patch_size=18)
    wide = Model(image_size=(144, 576), patch_size=(9, 36))
    assert model_flops(wide) == model_flops(square)  # as many patches, of as many pixels
    assert model_flops(Model(image_size=(144, 288))) < model_flops(square)


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_pixels_keep_height_and_width_apart(size):
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:30] = 200  # the upper half is light: in every result too
    data = images.encode_bmp(pixels)
    how, *sides = (np.array([value]) for value in images.sniff(data))
    for mode in augment.MODES:
        for resize in ("squash", "crop"):
            plan = augment.plan(mode, how, *sides, order.key(1, 2), size, resize=resize)
            one = {name: values[0] for name, values in plan.items()} | {"how": how[0]}
            for fast in (False, True):
                assert augment.render(data, one, mode, size, fast).shape == (*size, 3)
            if mode == "none":
                found = augment.render(data, one, mode, size)
                assert (found[: size[0] // 2 - 1] == 200).all() and (
                    found[size[0] // 2 + 1 :] == 0
                ).all()
                wanted = images.preprocess_eval(pixels, size, resize)
                assert np.abs(found.astype(int) - wanted).mean() < 3
    # What is cut has the proportions of the result.
    tall = augment.plan("none", how, *sides, order.key(1, 2), size, resize="crop")["box"][0]
    assert tall.tolist() == ([15, 0, 30, 60] if size == (24, 48) else [0, 15, 60, 30])
    small = shrink(jnp.asarray(photo(8, 16))[None], (4, 8))
    means = photo(8, 16).reshape(4, 2, 8, 2, 3).mean((1, 3))
    assert small.shape == (1, 4, 8, 3) and np.abs(small[0] - means).mean() < 20


@pytest.mark.parametrize("size", [(32, 128), (128, 32)])
def test_wide_pictures_are_augmented_as_square_ones_are(size):
    """A turn is a turn, and a cut has the proportions of the result, to which it is stretched."""
    found = []
    for high, wide in ((64, 64), size):
        sides = np.full(500, high), np.full(500, wide)
        how, keys = np.full(500, images.JPEG), order.key(np.arange(500), 3)
        values = []
        for mode in ("drawing", "randaugment"):
            warp = augment.plan(mode, how, *sides, keys, (high, wide))["warp"].astype(np.float64)
            centre = warp @ [(wide - 1) / 2, (high - 1) / 2, 1]
            moved = (centre + 0.5) / [wide, high] - 0.5  # in shares of the sides
            values += [warp[:, :, :2].reshape(500, 4), moved if mode == "drawing" else moved[:0]]
        box = augment.plan("inception", how, *sides, keys, (high, wide))["box"]
        assert box[:, 3].max() == wide and box[:, 2].max() == high
        ratios = box[:, 3] / box[:, 2] * (high / wide)
        middle = np.quantile(ratios, [0.1, 0.5, 0.9])  # sides are whole pixels
        found.append((values, middle))
    (square, of_square), (wide, of_wide) = found
    for got, want in zip(wide, square, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(of_wide, of_square, atol=0.03)


def test_an_identity_map_of_a_wide_result_is_a_resize():
    """Augmentation by maps of pixels where nothing is drawn: the picture as it is."""
    box, square = np.array([[0, 0, 24, 48]]), np.tile(np.eye(2, 3), (1, 1, 1))
    for shrunk in (False, True):
        found = augment._pixel_maps(square, box, (24, 48), np.array([shrunk]))
        np.testing.assert_allclose(found[0], np.eye(2, 3), atol=1e-12)
    half = augment._pixel_maps(square, box, (12, 24), np.array([False]))[0]
    np.testing.assert_allclose(half, [[2, 0, 0.5], [0, 2, 0.5]])  # centres of pixels


def test_positions_of_a_grid_are_resized_to_another():
    rows, columns = np.meshgrid(np.arange(4.0), np.arange(6.0), indexing="ij")
    table = np.stack([rows, columns], -1).reshape(24, 2)
    found = warm_start.resize_positions(table, 12, (4, 6), (2, 6)).reshape(2, 6, 2)
    np.testing.assert_allclose(found[0, :, 1], np.arange(6), atol=1e-5)
    np.testing.assert_allclose(found[:, 0, 0], [0.5, 2.5], atol=0.2)
    turned = warm_start.resize_positions(table, 24, (4, 6), (6, 4)).reshape(6, 4, 2)
    assert np.abs(turned[:, :, 0] - turned[:, :1, 0]).max() < 1e-5  # rows stay rows
    with pytest.raises(ValueError, match="not grids of .3, 3. and .2, 2. patches"):
        warm_start.resize_positions(table, 4, (3, 3), (2, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A run of four steps on wide images, a stage of smaller ones first: (config, workdir,
    pictures)."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "raw").mkdir()
    rows = ["file_name,text"]
    for number in range(16):
        Image.fromarray(photo(20 + number, 40, number)).save(root / f"raw/{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (root / "raw/metadata.csv").write_text("\n".join(rows) + "\n")
    prepare("imagefolder", str(root / "raw"), str(root / "data"), progress=False)
    config = tiny_config(image_size=(8, 32), patch_size=(4, 8), positions="both", bias=False)
    config.model.text.update(vocab_size=320, max_len=12)
    config.data.update(augment="drawing", flip=True, resize="crop")
    config.data.sources = (dict(path=str(root / "data"), kind="caption"),)
    config.image_sizes = ((0.5, (4, 16)),)
    config.loss.contrastive_weight = 0.0  # less to compile, twice
    config.batch_size, config.steps = 8, 4
    train_alone(config, root / "run")
    return config, root / "run", root / "raw"


@pytest.mark.long
def test_a_run_trains_captions_and_explains(data):
    config, workdir, folder = data
    stored = json_files.read_sealed(workdir / "config.json")
    assert stored["model"]["image_size"] == [8, 32] and stored["model"]["patch_size"] == [4, 8]
    assert stored["image_sizes"] == [[0.5, [4, 16]]]
    config_file.check_resumable(typed(config), stored, str(workdir))
    assert "8 x 32 px, patch 4 x 8" in (workdir / "report.html").read_text()
    model = coca_jax.load(str(workdir), devices=jax.devices()[:1])
    paths = [str(folder / f"{number}.png") for number in range(5)]
    assert model.image_size == (8, 32) and model.fit_image(paths[0]).shape == (8, 32, 3)
    embeddings = model.encode_image(paths)
    ready = np.stack([model.fit_image(path) for path in paths])
    np.testing.assert_allclose(model.encode_image(ready), embeddings, atol=1e-5)
    assert len(model.caption(paths)) == 5
    (explained,) = model.explain(paths[:1], ["picture"])
    assert explained.attention.shape == (2, 4)  # rows and columns of patches
    assert explained.words[0].attention.sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.long
def test_a_run_starts_from_weights_of_another_shape(data, one_device_mesh):
    config, workdir, _ = data
    other = config.copy_and_resolve_references()
    other.model.image_size, other.image_sizes = (16, 16), ()
    other.init_from = str(workdir)
    begun = Trainer(other, "new")
    begun.mesh, begun.class_names = one_device_mesh, ()
    begun.model = coca.build(begun.config.model)
    begun.checkpoints = types.SimpleNamespace(steps=lambda: [])
    begun.restore_or_init()
    old = warm_start.read(str(workdir))
    assert old[2] == (2, 4)
    table = np.asarray(old[0]["image_encoder"]["positions"]["value"])
    wanted = warm_start.resize_positions(table, 8, (2, 4), (4, 2))
    params = sharding.unbox(begun.state.params)
    found = np.asarray(params["image_encoder"]["positions"]["value"])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(table - found).max() > 5e-3
