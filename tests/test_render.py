"""The pixels that train: decoders, resizes, warps and the operations of RandAugment."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from coca_jax.data import augment, images, order


def _photo(width, height, seed=0):
    """Smooth colours with some detail on top, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    fine = Image.fromarray(rng.integers(96, 160, (height // 3, width // 3, 3), dtype=np.uint8))
    parts = [
        np.asarray(p.resize((width, height), Image.Resampling.BICUBIC), float)
        for p in (coarse, fine)
    ]
    return np.clip(parts[0] + parts[1] - 128, 0, 255).astype(np.uint8)


def _encode(pixels, format="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def _render(data, mode, size, fast=False, keys=None, **options):
    how, height, width = (np.array([value]) for value in images.sniff(data))
    keys = order.key(1, 2) if keys is None else keys
    plan = augment.plan(mode, how, height, width, keys, size, fast=fast, **options)
    one = {name: values[0] for name, values in plan.items()}
    return augment.render(data, one | {"how": how[0]}, mode, size, fast), one


@pytest.mark.parametrize("side", [(64, 48), (500, 375), (224, 224), (100, 400)])
def test_unaugmented_pixels_are_those_of_evaluation(side):
    for format in ("JPEG", "PNG", "WEBP"):
        data = _encode(_photo(*side), format)
        found, plan = _render(data, "none", 64)
        assert plan["ratio"] == (2 if side == (500, 375) and format == "JPEG" else 1)
        wanted = images.preprocess_eval(images.decode(data), 64)
        if plan["ratio"] == 1:
            assert np.array_equal(found, wanted)
        else:
            assert np.abs(found.astype(int) - wanted).mean() < 1


def test_a_turned_tiff_trains_whole():
    """Its size was taken for turned twice, and a third of the picture cut out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encode(_photo(30, 90), "TIFF", exif=exif)
    wanted = images.preprocess_eval(images.decode(data), 16)
    assert np.array_equal(_render(data, "none", 16)[0], wanted)


@pytest.mark.parametrize("height", [100, 200, 224, 300, 448, 500, 1000, 1600])
def test_the_fast_resize_is_close_to_the_exact_one(height):
    """Also where an image grows, and where it shrinks much more in one direction."""
    pixels = _photo(375, height)
    fast, exact = (augment.resize(pixels, 224, fast=way).astype(int) for way in (True, False))
    assert np.abs(fast - exact).mean() < 1.0
    assert np.percentile(np.abs(fast - exact), 99) <= 6


def test_the_fast_resize_does_not_alias():
    """Stripes too fine for the result turn gray; plain interpolation would keep some of them."""
    stripes = np.repeat(np.tile([0, 255], 224)[None, :, None], 448, 0).repeat(3, 2).astype(np.uint8)
    assert np.ptp(augment.resize(stripes, 224, fast=True)[4:-4, 4:-4]) <= 2


@pytest.mark.parametrize("fast", [False, True])
def test_crops_show_what_the_plan_says(fast):
    pixels = _photo(500, 375)
    data = _encode(pixels, quality=95, subsampling=0)
    for number in range(10):
        found, plan = _render(data, "inception", 64, fast, order.key(number), flip=True)
        # The cut is to the pixel of what was decoded.
        top, left, height, width = plan["box"] // plan["ratio"] * plan["ratio"]
        cut = Image.fromarray(pixels[top : top + height, left : left + width])
        wanted = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR))
        wanted = wanted[:, ::-1] if plan["warp"][0, 0] < 0 else wanted
        assert np.abs(found.astype(int) - wanted).mean() < 6


def test_jpegs_that_the_fast_decoder_refuses_are_read_by_the_careful_one():
    whole = _encode(_photo(60, 40))
    data = whole[:-2] + bytes(4) + whole[-2:]  # libjpeg warns of these four bytes
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(data)
    found, _ = _render(data, "none", 32)
    assert np.array_equal(found, images.preprocess_eval(images.decode(data), 32))
    with pytest.raises(ValueError, match="damaged image"):
        _render(whole[: len(whole) // 2], "none", 32)


def test_drawings_keep_their_background():
    rgba = np.zeros((72, 72, 4), np.uint8)
    rgba[24:48, 24:48] = (200, 30, 30, 255)
    data = _encode(rgba, "PNG")
    for number in range(20):
        found, plan = _render(data, "drawing", 64, keys=order.key(number))
        ground = plan["colour"] @ np.append(plan["background"], 1.0)
        corner = np.clip(ground, 0, 255)
        assert np.abs(found[0, 0] - corner).max() <= 2
        inside = np.clip(plan["colour"] @ (200, 30, 30, 1), 0, 255)
        assert np.abs(found[32, 32] - inside).max() <= 2


def test_some_drawings_become_line_drawings():
    """A dark line a pixel or two wide along the edge, as dark however pale the inside is."""
    rgba = np.zeros((72, 72, 4), np.uint8)
    rgba[20:52, 20:52] = (200, 30, 30, 255)
    data = _encode(rgba, "PNG")
    outlined = pale = 0
    for number in range(100):
        found, plan = _render(data, "drawing", 64, keys=order.key(number))
        assert (plan["op"][0] == augment.OUTLINE) == (plan["strength"][0] > 0)
        unlined = plan | dict(how=images.sniff(data)[0], op=np.array([augment.KEEP]))
        plain = augment.render(data, unlined, "drawing", 64)
        line = plain.astype(int).sum(2) - found.astype(int).sum(2)
        if plan["strength"][0] < 1:
            continue
        outlined += 1
        assert line[32, 32] == 0 and line[0, 0] == 0 and line.max() > 60
        assert 60 < (line > 30).sum() < 600  # of a perimeter of 80 to 140 pixels, in the picture
        pale += bool(plain[32, 32].min() > 150)
    assert outlined > 25 and pale >= 5


def test_an_identity_warp_changes_nothing():
    pixels = _photo(32, 32)
    plan = dict(
        how=images.OTHER, box=[0, 0, 32, 32], ratio=1, shrink=False,
        warp=np.eye(2, 3, dtype=np.float32), colour=np.eye(3, 4, dtype=np.float32),
        background=np.full(3, 255.0), op=np.zeros(1, int), strength=np.zeros(1),
    )  # fmt: skip
    assert np.array_equal(augment.render(_encode(pixels, "PNG"), plan, "drawing", 32), pixels)


def test_operations_are_those_of_pil():
    pixels = _photo(32, 32) // 2 + 40
    image = Image.fromarray(pixels)
    for op, strength, wanted in (
        (augment.EQUALIZE, 0, ImageOps.equalize(image)),
        (augment.POSTERIZE, 5, ImageOps.posterize(image, 5)),
        (augment.SOLARIZE, 110, ImageOps.solarize(image, 110)),
        (augment.INVERT, 0, ImageOps.invert(image)),
        (augment.AUTOCONTRAST, 0, ImageOps.autocontrast(image)),
    ):
        found = augment.operate(pixels, op, strength)
        assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1, op
    sharper = augment.operate(pixels, augment.SHARPEN, 1.9)
    same = augment.operate(pixels, augment.SHARPEN, 1.0)
    assert np.array_equal(same, pixels) and sharper.std() > pixels.std()


def test_randaugment_has_as_many_operations_and_is_as_strong_as_asked():
    keys = order.key(np.arange(400))
    sides = np.full(400, 32)
    how = np.full(400, images.JPEG)

    def plan(*randaugment):
        return augment.plan("randaugment", how, sides, sides, keys, 32, randaugment=randaugment)

    weak, strong, three = plan(1, 10), plan(1, 20), plan(3, 10)
    assert weak["op"].shape == (400, 1) and three["op"].shape == (400, 3)
    moves = [np.abs(p["warp"][:, 0, 2] - plan(1, 0)["warp"][:, 0, 2]) for p in (weak, strong)]
    shifted = (weak["warp"][:, 0, 0] == 1) & (weak["warp"][:, 0, 1] == 0) & (moves[0] > 0.1)
    assert shifted.sum() > 10  # translations along x: 0.45 of the side at magnitude 30
    np.testing.assert_allclose(moves[0][shifted], 32 * 0.45 * 10 / 30, rtol=1e-4)
    np.testing.assert_allclose(moves[1][shifted], 32 * 0.45 * 20 / 30, rtol=1e-4)
