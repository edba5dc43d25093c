"""Images in their own aspect ratio: how they are cut into patches, encoded, batched and trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from data_cases import equal
from one_device import train_alone
from ops_cases import drawn
from PIL import Image

import coca_jax
from coca_jax.config import typed
from coca_jax.data import navit
from coca_jax.data.batches import Batches
from coca_jax.data.prepare import prepare
from coca_jax.models import coca, image_encoder
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.training import run_vocabulary

SHAPES = [(20, 20), (12, 40), (48, 10), (16, 24), (9, 90), (33, 21), (64, 64), (5, 7)]


@pytest.mark.parametrize("most", [1, 4, 7, 16, 196, 256])
def test_a_grid_is_the_largest_that_fits_and_keeps_the_aspect(most):
    for height, width in [*SHAPES, (1, 10_000), (10_000, 1), (375, 500), (1080, 1920)]:
        rows, columns = navit.grid(height, width, most)
        assert rows >= 1 <= columns and rows * columns <= most
        assert max(rows, columns) <= 255
        # One side is exact at the scale, the other less than a patch away from it.
        by_rows, by_columns = width * rows / height, height * columns / width
        assert 0 <= columns - by_rows < 1 or 0 <= rows - by_columns < 1 or 1 in (rows, columns)
    side = int(most**0.5)
    assert navit.grid(77, 77, most) == (side, side)


def test_a_square_image_is_packed_as_the_model_cuts_it():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    packed = navit.fitted(image, 4, 16)
    assert packed.shape == (16, 4 * 4 * 3 + 4) and packed.dtype == np.uint8
    assert (packed[:, :-4] == image_encoder.patchify(image[None], 4)[0]).all()
    assert packed[6, -4:].tolist() == [1, 2, 4, 4]
    wide = navit.fitted(np.zeros((10, 40, 3), np.uint8), 4, 16)
    assert wide[:, -4:].max(0).tolist() == [1, 7, 2, 8] and (wide[:, -2] == 2).all()
    padded = navit.fitted(np.full((10, 40, 3), 9, np.uint8), 4, 20)
    assert (padded[16:] == 0).all() and (padded[:16, :-4] == 9).all()


VARIANTS: dict[str, dict] = {
    "learned": {"image.class_token": True},
    "rope": {"positions": "rope", "image.registers": 2, "pooler.kind": "parallel"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    """(model config, its program, parameters) of 4 x 4 patches of a square image."""
    config = typed(tiny_config(image_size=16, patch_size=4))
    config = config.change({f"model.{k}": v for k, v in VARIANTS[request.param].items()})
    module = coca.build(config.model)
    params = drawn(jax.eval_shape(lambda: coca.init(module, jax.random.key(0))), 0.2)
    run = jax.jit(lambda params, x: module.apply({"params": params}, x, method="encode_image"))
    return config.model, run, params


def embed(model, images):
    """(embeddings, image tokens) of uint8 images, packed or square."""
    config, run, params = model
    return run(params, normalise_pixels(jnp.asarray(images), config))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_square_image_with_all_patches_is_embedded_as_ever(model):
    image = picture(16, 16)
    packed = navit.fitted(image, 4, 16)
    square, packed = embed(model, image[None]), embed(model, np.stack([packed, packed]))
    for one, other in zip(square, packed):
        np.testing.assert_allclose(np.concatenate([one, one]), other, atol=2e-6)


def test_padding_changes_no_embedding_whatever_it_holds(model):
    image = picture(8, 12)
    alone = embed(model, navit.pack(image, 4, 6)[None])
    padded = navit.pack(image, 4, 16)
    padded[6:, :-4] = picture(10, 16).reshape(10, -1)  # without a place
    other = navit.pack(picture(12, 4, 2), 4, 16)
    together = embed(model, np.stack([padded, other]))
    for one, two in zip(alone, together):
        np.testing.assert_allclose(one[0], two[0], atol=2e-6)
    assert np.abs(together[0][0] - together[0][1]).max() > 1e-3


def test_an_image_and_its_turned_one_differ(model):
    wide = picture(8, 32)
    tall = np.ascontiguousarray(wide.reshape(2, 4, 8, 4, 3).transpose(2, 1, 0, 3, 4)).reshape(
        32, 8, 3
    )
    first, second = (navit.pack(one, 4, 16) for one in (wide, tall))
    assert sorted(map(bytes, first[:, :-4])) == sorted(map(bytes, second[:, :-4]))
    found = embed(model, np.stack([first, second]))[0]
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.long
def test_every_form_of_the_operations_gives_the_same():
    config = typed(tiny_config(image_size=16, patch_size=4, positions="both")).model
    images = np.stack([navit.pack(picture(*shape, 3), 4, 16) for shape in ((8, 12), (4, 64))])
    pixels = normalise_pixels(jnp.asarray(images), config)
    reference = coca.build(dataclasses.replace(config, implementation="reference"))
    params = drawn(jax.eval_shape(lambda: coca.init(reference, jax.random.key(0))), 0.2)

    def run(module, params):
        embedding, tokens = module.apply({"params": params}, pixels, method="encode_image")
        return (embedding[0] * embedding[1]).sum() + jnp.square(tokens).mean()

    def both(module):
        return jax.jit(jax.value_and_grad(functools.partial(run, module)))(params)

    wanted = both(reference)
    for one, other in zip(
        *map(jax.tree.leaves, (wanted, both(coca.build(config, platform="cpu"))))
    ):
        scale = max(1e-3, float(np.abs(one).max()))
        np.testing.assert_allclose(one, other, atol=2e-5 * scale)
    plain = dataclasses.replace(config, implementation="xla")
    for platform in ("gpu", "tpu"):
        found = jax.jit(functools.partial(run, coca.build(plain, platform=platform)))(params)
        assert float(found) == pytest.approx(float(wanted[0]), rel=1e-5), platform


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A run of two steps on pictures of many shapes: (config, workdir, folder of the pictures)."""
    root = tmp_path_factory.mktemp("native")
    (root / "raw").mkdir()
    rows = ["file_name,text"]
    for number, (height, width) in enumerate(SHAPES * 2):
        Image.fromarray(picture(height, width, number)).save(root / f"raw/{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (root / "raw/metadata.csv").write_text("\n".join(rows) + "\n")
    prepare("imagefolder", str(root / "raw"), str(root / "data"), progress=False)
    config = tiny_config(image_size=16, patch_size=4, positions="both", bias=False)
    config.model.text.update(vocab_size=320, max_len=12)
    config.data.update(resize="native", max_patches=12, augment="crop", flip=True)
    config.data.sources = (dict(path=str(root / "data"), kind="caption"),)
    config.batch_size, config.steps = 8, 2
    train_alone(config, root / "run")
    return config, root / "run", root / "raw"


@pytest.fixture(scope="module")
def trained(data):
    return coca_jax.load(str(data[1]), devices=jax.devices()[:1])


@pytest.mark.long
def test_batches_are_a_function_of_the_step_on_any_number_of_processes(data):
    config, workdir, _ = data
    vocabulary = run_vocabulary.load_or_train(config, str(workdir))
    whole = Batches(typed(config), vocabulary)
    assert whole.batch(3)["image"].shape == (8, 12, 4 * 4 * 3 + 4)
    halves = [
        Batches(typed(config), vocabulary, process_index=index, process_count=2) for index in (0, 1)
    ]
    for step in (5, 3):
        both = [half.batch(step) for half in halves]
        joined = {name: np.concatenate([one[name] for one in both]) for name in both[0]}
        assert equal(whole.batch(step), joined)
    grids = {tuple(row[0, -2:]) for row in whole.batch(3)["image"]}
    assert len(grids) > 3  # shapes differ within a batch


@pytest.mark.long
def test_a_trained_model_takes_images_of_any_shape(data, trained):
    folder, model = data[2], trained
    images = [np.asarray(Image.open(folder / f"{number}.png")) for number in range(5)]
    together = model.encode_image(images)
    for image, embedding in zip(images, together):
        np.testing.assert_allclose(model.encode_image(image)[0], embedding, atol=1e-5)
    ready = np.stack([model.fit_image(image) for image in images])
    assert ready.shape == (5, 12, 52)
    np.testing.assert_allclose(model.encode_image(ready), together, atol=1e-5)
    assert np.isfinite(together).all() and len(model.caption(images)) == 5
    assert model.features(images).shape == (5, 16)
    asked = ["a picture"] * 5
    assert model.answer(ready, asked, max_new_tokens=3) == model.answer(
        images, asked, max_new_tokens=3
    )
    with pytest.raises(ValueError, match="explain takes square images"):
        model.explain(images[:1], ["picture"])


def test_plain_training_pixels_are_those_of_evaluation(data, trained):
    config, workdir, folder = data
    plain = config.copy_and_resolve_references()
    plain.data.update(augment="none", flip=False)
    vocabulary = run_vocabulary.load_or_train(config, str(workdir))
    batch = Batches(typed(plain), vocabulary).batch(0)
    pictures = [trained.fit_image(str(folder / f"{number}.png")).tobytes() for number in range(16)]
    assert all(row.tobytes() in pictures for row in batch["image"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.augment", "drawing"),
        ("data.num_frames", 2),
        ("data.loader", "seqio"),
        ("model.image.patch_dropout", 0.5),
        ("image_sizes", ((0.5, 8),)),
        ("head.kind", "pair"),
    ],
)
def test_what_does_not_go_with_it_is_a_line(data, key, value):
    with pytest.raises(ValueError, match=f"{key}=.*data.resize='"):
        typed(data[0]).change({key: value}).check()


def test_conv_stems_refuse_it(data):
    config = typed(data[0])
    stem = {"model.image.conv_widths": (8, 16), "model.image.conv_depths": (1, 1)}
    with pytest.raises(ValueError, match="model.image.conv_widths=.*'native'"):
        config.change(stem).check()
    with pytest.raises(ValueError, match="max_patches=12 is for data.resize='native'"):
        config.change({"data.resize": "squash"})
    module = coca.build(config.change(stem).model)
    packed = jnp.zeros((1, 12, 52))
    with pytest.raises(ValueError, match="conv_widths"):
        module.init(jax.random.key(0), packed, method="encode_image")
