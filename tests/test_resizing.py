"""Plain margins that are cut away (data.resize='trim'): however much room there is around a thing,
it is seen alike, in training and in use."""

import base64
import io
import pathlib
import re

import numpy as np
import pytest
from conftest import tiny, tiny_config
from one_device import models_on_one, train_alone  # noqa: F401
from PIL import Image
from quick_start import drawn_by_numpy  # noqa: F401

import coca_jax
from coca_jax.cli import convert
from coca_jax.config import typed
from coca_jax.data import augment, images, order
from coca_jax.data.batches import Batches
from coca_jax.data.prepare import prepare
from coca_jax.inference import export_folder
from coca_jax.interop import export_format
from coca_jax.training import run_vocabulary

ROOT = pathlib.Path(__file__).parents[1]
RED, WHITE, GREEN = (200, 30, 30), (255, 255, 255), (40, 160, 90)


def thing(side: int) -> np.ndarray:
    """uint8 [side, side * 3 // 4, 3]: a red hull that touches all sides, with a green window."""
    pixels = np.full((side, side * 3 // 4, 3), RED, np.uint8)
    pixels[side // 4 : side // 2, side // 8 : side // 3] = GREEN
    pixels[: side // 8, : side // 8] = WHITE
    return pixels


def with_room(pixels: np.ndarray, *room: int, colour=WHITE) -> np.ndarray:
    """`pixels` with so many of `colour` above, below, left and right."""
    above, below, left, right = room
    out = np.full(
        (pixels.shape[0] + above + below, pixels.shape[1] + left + right, 3), colour, np.uint8
    )
    out[above : above + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return out


def encoded(pixels: np.ndarray, kind: str = "PNG", **how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **how)
    return out.getvalue()


def rendered(data: bytes, mode: str, size, key: int, *, trim: bool, fast: bool = False):
    """The pixels that train, by the draws of a key."""
    how, *sides = (np.array([value]) for value in images.sniff(data))
    resize = "trim" if trim else "squash"
    plan = augment.plan(mode, how, *sides, order.key(key), size, resize=resize, fast=fast)
    one = {name: values[0] for name, values in plan.items()} | {"how": how[0]}
    return augment.render(data, one, mode, size, fast, trim)


@pytest.mark.parametrize("size", [48, (36, 60)])
def test_room_around_a_thing_does_not_matter(size):
    seen = [
        images.preprocess_eval(with_room(thing(64), *room), size, "trim")
        for room in ((1, 0, 0, 0), (3, 3, 3, 3), (40, 2, 7, 90))
    ]
    assert all(np.array_equal(one, seen[0]) for one in seen)
    high, wide = seen[0].shape[:2]
    inked = np.argwhere((seen[0] != 255).any(-1))
    height, width = np.ptp(inked, 0) + 1
    # 95% of the height, or of the width where that is the narrow side, and three by four.
    assert abs(height - round(0.95 * min(high, wide / 0.75))) <= 1
    assert abs(width - 0.75 * height) <= 1
    middle = inked.min(0) + (inked.max(0) - inked.min(0)) / 2
    assert np.abs(middle - (np.array([high, wide]) - 1) / 2).max() <= 1
    squashed = [
        images.preprocess_eval(with_room(thing(64), *room), size)
        for room in ((3, 3, 3, 3), (40, 2, 7, 90))
    ]
    assert np.abs(squashed[0].astype(int) - squashed[1]).mean() > 20


def test_margins_of_a_jpeg_are_cut_in_spite_of_its_noise():
    noisy = images.decode(encoded(with_room(thing(64), 30, 31, 32, 33), "JPEG", quality=75))
    assert np.ptp(noisy[:30].astype(int)) > 2  # there is some
    (left,), colour = images.cut([noisy])
    assert np.abs(colour.astype(int) - 255).max() <= 2
    # Ripples stand beside the edges, in blocks of 16 pixels that these pass through.
    assert 64 <= left.shape[0] <= 64 + 16 and 48 <= left.shape[1] <= 48 + 16


def test_what_has_no_plain_margin_stays_whole():
    blank = np.full((20, 30, 3), 77, np.uint8)
    assert images.cut([blank])[0][0].shape == blank.shape
    assert (images.preprocess_eval(blank, 16, "trim") == 77).all()
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(images.cut([photo])[0][0], photo)
    line = with_room(np.full((1, 500, 3), RED, np.uint8), 30, 30, 0, 30)
    assert (images.preprocess_eval(line, 16, "trim") == RED).all(-1).sum() == 15
    dot = with_room(np.array([[RED]], np.uint8), 99, 0, 0, 99)
    assert (images.preprocess_eval(dot, 16, "trim") == RED).all(-1).mean() > 0.8


def test_the_frames_of_a_clip_are_cut_alike():
    """What moves still moves: the box holds all that any frame shows."""
    frames = np.full((3, 60, 60, 3), 255, np.uint8)
    for number, frame in enumerate(frames):
        frame[20:30, 10 + 15 * number : 20 + 15 * number] = RED
    left, _ = images.cut(frames)
    assert [one.shape for one in left] == [(10, 40, 3)] * 3
    places = [np.argwhere((one == RED).all(-1))[:, 1].mean() for one in images.trim(frames, 40)]
    assert places[0] < 7 and 18 < places[1] < 22 and places[2] > 33


def test_drawn_pictures_and_still_clips_are_cut_as_others():
    """Their pixels do not lie in order in memory, or are the same for all frames."""
    pixels = with_room(thing(31), 5, 9, 3, 8)
    drawn = images.read_bmp(images.encode_bmp(pixels))
    assert np.array_equal(images.cut([drawn])[0][0], thing(31))
    wanted = images.preprocess_eval(pixels, 48, "trim")
    assert np.array_equal(images.preprocess_eval(drawn, 48, "trim"), wanted)
    still = np.broadcast_to(pixels, (3, *pixels.shape))
    assert all(np.array_equal(one, wanted) for one in images.trim(still, 48))
    found = rendered(images.encode_bmp(pixels), "none", 48, 0, trim=True)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("side", [40, 64, 300])
def test_what_trains_unaugmented_is_what_is_evaluated(side, fast):
    data = encoded(with_room(thing(side), 10, 20, 30, 40))
    found = rendered(data, "none", 48, 0, trim=True, fast=fast)
    wanted = images.preprocess_eval(images.decode(data), 48, "trim")
    if fast:
        assert np.abs(found.astype(int) - wanted).mean() < 2
    else:
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["drawing", "randaugment"])
@pytest.mark.parametrize("side", [64, 300])
def test_augmentations_are_those_of_a_picture_that_had_no_margin(mode, side):
    """By the same draws the same pixels: the map is scaled to what is left of the picture."""
    left, colour = thing(side), np.array(WHITE, np.uint8)
    bare = images.framed(left, colour, 48)
    for key in range(8):
        found = rendered(encoded(with_room(left, 40, 2, 7, 90)), mode, 48, key, trim=True)
        again = rendered(encoded(with_room(left, 9, 9, 9, 9)), mode, 48, key, trim=True)
        assert np.array_equal(found, again)
        if mode == "drawing":
            wanted = rendered(encoded(bare), mode, 48, key, trim=False)
            # A large one is shrunk first, to whole pixels: up to half a pixel from there.
            assert np.abs(found.astype(int) - wanted).mean() <= (0.01 if side == 64 else 8)


@pytest.mark.parametrize("mode", ["crop", "inception"])
def test_a_cut_at_random_is_refused_beside_it(mode):
    with pytest.raises(ValueError, match=f"data.augment='{mode}' does not go with data.resize='t"):
        tiny(**{"data.resize": "trim", "data.augment": mode})
    tiny(**{"data.resize": "trim", "data.augment": "drawing"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on 16 things with room around them, one evaluation after it: (config,
    workdir, folder of the pictures)."""
    root = tmp_path_factory.mktemp("trim")
    (root / "raw").mkdir()
    rows, rng = ["file_name,text"], np.random.default_rng(0)
    for number in range(16):
        pixels = with_room(thing(24), *rng.integers(1, 20, 4))
        (root / f"raw/{number}.png").write_bytes(encoded(pixels))
        rows.append(f"{number}.png,thing {number}")
    (root / "raw/metadata.csv").write_text("\n".join(rows) + "\n")
    prepare("imagefolder", str(root / "raw"), str(root / "data"), progress=False)
    config = tiny_config(bias=False)
    config.model.text.update(vocab_size=320)
    config.loss.contrastive_weight = 0.0  # less to compile
    config.data.update(resize="trim")
    config.data.sources = (dict(path=str(root / "data"), kind="caption"),)
    config.batch_size, config.steps = 8, 2
    data = dict(path=str(root / "data"), split="train")
    how = dict(max_new_tokens=4)
    task = dict(kind="captioning", name="things", data=data, attention=True, decode=how)
    config.eval.tasks = (task,)
    train_alone(config, root / "run")
    return config, root / "run", root / "raw"


@pytest.mark.long
def test_pictures_come_to_a_trained_model_as_they_trained(run):
    config, workdir, folder = run
    batch = Batches(typed(config), run_vocabulary.load_or_train(config, str(workdir))).batch(0)
    model = coca_jax.load(str(workdir))
    ready = [model.fit_image(str(folder / f"{number}.png")) for number in range(16)]
    assert {row.tobytes() for row in batch["image"]} == {ready[0].tobytes()}  # the same thing
    assert all(np.array_equal(one, ready[0]) for one in ready)
    # Arrays of the model's size are taken for prepared ones; a file of that size is a picture.
    assert np.array_equal(model.fit_image(ready[0]), ready[0])
    small = with_room(thing(8), 4, 4, 5, 5)
    assert np.array_equal(model.fit_image(small), small)
    found = model.fit_image(encoded(small))
    assert (found != 255).any(-1).mean() > 1.5 * (small != 255).any(-1).mean()
    clip = np.stack([with_room(thing(24), 5, 11, 1 + 3 * i, 10 - 3 * i) for i in range(3)])
    frames = model.fit_image(clip, num_frames=3)
    assert frames.shape == (3, 16, 16, 3) and not np.array_equal(frames[0], frames[2])


@pytest.mark.long
def test_the_report_shows_what_was_left_of_a_picture(run):
    """The map over it is of that."""
    page = (run[1] / "report.html").read_text()
    shown = re.findall(r'data-fit="trim".*?base64,([A-Za-z0-9+/=]+)', page, re.DOTALL)
    assert shown
    for one in shown:
        picture = images.decode(base64.b64decode(one))
        assert picture.shape[0] == picture.shape[1] == round(24 / 0.95)


@pytest.mark.long
def test_an_export_keeps_it_and_formats_without_a_word_for_it_are_refused(run, tmp_path):
    _, workdir, folder = run
    model = coca_jax.load(str(workdir))
    export_folder.write(model, str(tmp_path / "export"))
    assert export_format.read_config(str(tmp_path / "export")).data.resize == "trim"
    again, path = coca_jax.load(str(tmp_path / "export")), str(folder / "0.png")
    assert again.checksum() == model.checksum()
    np.testing.assert_array_equal(again.fit_image(path), model.fit_image(path))
    with pytest.raises(ValueError, match="data.resize='trim': transformers"):
        export_folder.write_hub(model, str(tmp_path / "hub"), "me/things")
    with pytest.raises(ValueError, match="data.resize='trim', for which open_clip has no words"):
        convert.to_open_clip(str(workdir), str(tmp_path / "open_clip"))
    assert not (tmp_path / "open_clip").exists() and not list((tmp_path).glob("hub/*"))


def test_programs_are_given_what_the_model_makes_of_a_picture():
    """The line of docs/inference.md that resizes."""
    (line,) = re.findall(r"^pictures = .*$", (ROOT / "docs/inference.md").read_text(), re.M)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    told = dict(Image=Image, size=(64, 64), opened=[Image.fromarray(pixels)])
    exec(line, told)
    wanted = images.preprocess_eval(pixels, 64)
    np.testing.assert_array_equal(np.asarray(told["pictures"][0]), wanted)
