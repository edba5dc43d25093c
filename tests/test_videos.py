"""Clips: which frames are taken, what colours they have, and what becomes of them in a batch."""

import io
import json

import jax
import numpy as np
import pytest
from conftest import params_of, random_batch, tiny_config
from PIL import Image

from coca_jax import inference, partitioning, prepare
from coca_jax.configs import base
from coca_jax.data import gif_blocks, images, run_vocabulary, videos
from coca_jax.data.loaders import open_stream
from coca_jax.evaluators import tasks
from coca_jax.evaluators.records import Records
from coca_jax.importers import checks
from coca_jax.importers.items import Item, Options
from coca_jax.inference import caption_files
from coca_jax.models import coca
from coca_jax.models.pixels import shrink
from coca_jax.training.gradients import loss_and_metrics

RED, BLUE, GREEN, WHITE = (220, 30, 30), (30, 30, 220), (30, 200, 30), (255, 255, 255)


@pytest.fixture(scope="module", autouse=True)
def no_compile_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def _animation(frames, format="WEBP", **options):
    out = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    if format == "WEBP":
        options |= dict(lossless=True, exact=True)
    pictures[0].save(
        out, format, save_all=True, append_images=pictures[1:], duration=50, loop=0, **options
    )
    return out.getvalue()


def _numbered(count, side=16, channels=3):
    """Frames that say which they are: frame i is gray 20 + 10 i, its left half red."""
    frames = np.zeros((count, side, side, channels), np.uint8)
    frames[..., :3] = (20 + 10 * np.arange(count))[:, None, None, None]
    frames[:, :, : side // 2, :3] = RED
    if channels == 4:
        frames[..., 3] = 255
    return frames


def _numbers(clip):
    """Which frames of `_numbered` a clip holds."""
    return ((clip[:, 8, 12, 0].astype(int) - 20 + 5) // 10).tolist()


# ---- Sampling


@pytest.mark.parametrize(
    ("count", "total", "wanted"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, [1, 3, 5, 7]),
        (8, 1, [4]),
        (100, 4, [12, 37, 62, 87]),
        (5, 3, [0, 2, 4]),
        (3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
        (1, 3, [0, 0, 0]),
        (6, 3, [1, 3, 5]),
    ],
)
def test_frames_are_the_middles_of_equal_segments(count, total, wanted):
    assert videos.sample(count, videos.middles(total)).tolist() == wanted
    exact = [(2 * i + 1) * count // (2 * total) for i in range(total)]
    assert exact == wanted


def test_jittered_frames_stay_in_their_segments():
    low = videos.sample(90, np.zeros(9))
    high = videos.sample(90, np.full(9, 1 - 1e-9))
    assert low.tolist() == list(range(0, 90, 10)) and high.tolist() == list(range(9, 90, 10))


# ---- Colours


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_frames_in_order(format):
    frames = _numbered(6)
    data = _animation(frames, format)
    clip = videos.decode(data, 6)
    assert clip.shape == (6, 16, 16, 3) and clip.dtype == np.uint8
    assert np.abs(clip.astype(int) - frames).max() <= (6 if format == "GIF" else 0)
    assert _numbers(videos.decode(data, 3)) == [1, 3, 5]
    assert videos.verify(data) == 6 and videos.sniff(data)[1:] == (16, 16)


def test_transparent_frames_go_over_white():
    frames = _numbered(3, channels=4)
    frames[1, :4, :, 3] = 0
    frames[2, :4, :, 3] = 128
    for format in ("PNG", "WEBP"):
        data = _animation(frames, format)
        clip = videos.decode(data, 3)
        assert clip[0, 0, 12].tolist() == [20, 20, 20], format
        assert clip[1, 0, 12].tolist() == [255, 255, 255]
        # 40 * 128/255 + 255 * 127/255, rounded: 20.08 + 127 = 147
        assert clip[2, 0, 12].tolist() == [147, 147, 147]
        assert clip[2, 8, 12].tolist() == [40, 40, 40]
        assert videos.decode_rgba(data, videos.middles(3)).shape == (3, 16, 16, 4)


def _gif(frames):
    """A GIF of 4 x 4 written by hand. frames: (x, y, w, h, palette indices, disposal, transparent
    index or None); the palette is red, green, blue, black."""

    def codes(indices):
        bits = []
        for number, value in enumerate(indices):
            for code in [4, value] if number % 2 == 0 else [value]:  # 4 clears: codes of 3 bits
                bits += [code >> k & 1 for k in range(3)]
        bits += [1, 0, 1] + [0] * 7
        packed = np.packbits(bits[: len(bits) // 8 * 8], bitorder="little").tobytes()
        return b"\2" + bytes([len(packed)]) + packed + b"\0"

    data = b"GIF89a" + bytes([4, 0, 4, 0, 0x81, 0, 0])
    data += bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0])
    for x, y, w, h, indices, disposal, key in frames:
        flags = disposal << 2 | (key is not None)
        data += b"\x21\xf9\4" + bytes([flags, 5, 0, key or 0, 0])
        data += b"\x2c" + bytes([x, 0, y, 0, w, 0, h, 0, 0]) + codes(indices)
    return data + b";"


def test_palette_animations_are_composed():
    """Patches, transparent indices and all three disposals, against colours worked out by hand."""
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    kept = _gif([
        (0, 0, 4, 4, [0] * 16, 1, None),
        (1, 1, 2, 2, [3, 1, 1, 1], 1, 3),  # index 3 shows what is below
        (3, 3, 1, 1, [2], 1, None),
    ])  # fmt: skip
    clip = videos.decode(kept, 3)
    assert clip[1, 1, 1].tolist() == red and clip[1, 2, 2].tolist() == green
    assert clip[2, 2, 2].tolist() == green and clip[2, 3, 3].tolist() == blue
    cleared = _gif([
        (0, 0, 4, 4, [3] * 15 + [1], 2, 3),
        (1, 1, 2, 2, [1] * 4, 2, 3),
        (3, 3, 1, 1, [2], 2, 3),
    ])  # fmt: skip
    clip = videos.decode(cleared, 3)
    assert clip[0, 0, 0].tolist() == white and clip[0, 3, 3].tolist() == green
    assert clip[1, 1, 1].tolist() == green and clip[1, 3, 3].tolist() == white
    assert clip[2, 1, 1].tolist() == white and clip[2, 3, 3].tolist() == blue
    restored = _gif([
        (0, 0, 4, 4, [1] * 16, 1, None),
        (1, 1, 2, 2, [2] * 4, 3, None),
        (3, 3, 1, 1, [0], 1, 3),
    ])  # fmt: skip
    clip = videos.decode(restored, 3)
    assert clip[1, 1, 1].tolist() == blue and clip[2, 1, 1].tolist() == green
    assert clip[2, 3, 3].tolist() == red
    # A frame that is jumped to is what it is in sequence.
    assert np.array_equal(videos.decode(kept, 1)[0], videos.decode(kept, 3)[1])


def test_the_still_of_a_png_is_not_a_frame():
    out = io.BytesIO()
    still, *rest = [Image.fromarray(frame) for frame in _numbered(4)]
    still.save(out, "PNG", save_all=True, default_image=True, append_images=rest, duration=50)
    assert _numbers(videos.decode(out.getvalue(), 3)) == [1, 2, 3]


def test_one_frame_equals_the_image():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 10, 4), dtype=np.uint8)
    for format, shown in (("PNG", pixels), ("WEBP", pixels), ("JPEG", pixels[..., :3])):
        out = io.BytesIO()
        Image.fromarray(shown).save(out, format)
        data = out.getvalue()
        clip = videos.decode(data, 1)
        assert np.array_equal(clip, images.decode(data)[None]), format
        assert np.array_equal(videos.decode(data, 3), np.repeat(clip, 3, 0))
    stored = Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    stored.save(out, "JPEG", exif=exif)
    assert np.array_equal(videos.decode(out.getvalue(), 1)[0], images.decode(out.getvalue()))
    assert videos.sniff(out.getvalue())[1:] == (10, 12)
    # Two pictures in one file that are no frames in time.
    out = io.BytesIO()
    stored.save(out, "TIFF", save_all=True, append_images=[Image.new("RGB", (10, 12))])
    assert np.array_equal(videos.decode(out.getvalue(), 2), np.stack([pixels[..., :3]] * 2))


def test_arrays_and_what_is_refused(tmp_path):
    frames = _numbered(8)
    assert _numbers(videos.decode(frames, 4)) == [1, 3, 5, 7]
    assert np.array_equal(videos.decode(frames[2], 2), frames[[2, 2]])
    with pytest.raises(ValueError, match="uint8"):
        videos.decode(frames / 255.0, 4)
    (tmp_path / "bad.webp").write_bytes(b"RIFF\0\0")
    with pytest.raises(ValueError, match="bad.webp"):
        videos.decode(tmp_path / "bad.webp", 4)
    whole = _animation(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8), "PNG")
    for cut in (len(whole) // 2, len(whole) - 60):
        with pytest.raises(ValueError, match="damaged"):
            videos.verify(whole[:cut])
        images.decode(whole[:cut])  # its first frame is whole


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_too_many_frames_are_refused_before_any_is_decoded(format, monkeypatch):
    data = _animation(_numbered(6), format)
    for name, most in (("MAX_FRAMES", 5), ("MAX_CLIP_PIXELS", 6 * 16 * 16 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(videos, name, most)
            for read in (videos.verify, lambda data: videos.decode(data, 2)):
                with pytest.raises(ValueError, match="too many frames"):
                    read(data)
            reason = checks.record(Item("key", data, ["text"]), Options())[1]
            assert reason == "too_many_frames"
            assert images.decode(data).shape == (16, 16, 3)  # a still of it is no work
    assert videos.verify(data) == 6


def test_frames_of_a_gif_are_counted_by_its_blocks():
    for count in (1, 2, 7):
        data = _animation(_numbered(count), "GIF")
        assert gif_blocks.count_frames(data, 100) == count
        assert gif_blocks.count_frames(data[:-20], 100) >= count - 1
    assert gif_blocks.count_frames(data, 3) == 4
    frame = b"\x2c" + bytes(4) + b"\1\0\1\0\0" + b"\2\2\x44\1\0"
    many = b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + frame * (videos.MAX_FRAMES + 1) + b";"
    with pytest.raises(ValueError, match="too many frames: more than 100000 of 1 x 1"):
        videos.verify(many)
    assert gif_blocks.count_frames(b"GIF89a", 9) == gif_blocks.count_frames(b"", 9) == 0


# ---- Video files


def _video(frames, format="mp4", codec="libx264", pix_fmt="yuv420p", **options):
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra 'video')")
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        kind = "rgba" if frames.shape[-1] == 4 else "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=kind)))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
def test_video_files(format, codec):
    frames = _numbered(20, side=32)
    data = _video(frames, format, codec)
    assert images.is_video_file(data) and videos.sniff(data) == (images.OTHER, 32, 32)
    clip = videos.decode(data, 5)
    assert clip.shape == (5, 32, 32, 3) and _numbers(clip[:, ::2, ::2]) == [2, 6, 10, 14, 18]
    assert np.abs(clip[:, 16, 4].astype(int) - RED).max() <= 25
    assert videos.verify(data) == 20
    with pytest.raises(ValueError, match="num_frames"):
        images.decode(data)


def test_videos_are_refused_before_they_are_decoded(monkeypatch):
    data = _video(_numbered(20, side=32))
    for name, most in (("MAX_FRAMES", 19), ("MAX_CLIP_PIXELS", 20 * 32 * 32 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(videos, name, most)
            for read in (videos.verify, lambda data: videos.decode(data, 2)):
                with pytest.raises(ValueError, match="too many frames"):
                    read(data)
    half = videos.middles(2)
    for read in (videos.sniff, lambda data, most: videos.decode_rgba(data, half, most)):
        with pytest.raises(ValueError, match="too many pixels: 32 x 32, limit 1000"):
            read(data, 1000)
    # FFmpeg knows formats that name other files; none is opened, whatever it begins like.
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    with pytest.raises(ValueError, match="no picture in it"):
        videos._open(playlist)


def test_video_files_that_need_care():
    frames = _numbered(6, side=32, channels=4)
    frames[:, :8, :, 3] = 0
    clip = videos.decode(_video(frames, "mov", "qtrle", "argb"), 6)
    assert clip[2, 2, 20].tolist() == [255, 255, 255] and clip[2, 20, 20].tolist() == [40, 40, 40]
    data = bytearray(_video(_numbered(6, side=32)[:, :24]))
    place = data.find(b"tkhd") + 44  # the matrix of a telephone held upright: a quarter clockwise
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in turn)
    clip = videos.decode(bytes(data), 2)
    assert clip.shape == (2, 32, 24, 3) and videos.sniff(bytes(data))[1:] == (32, 24)
    assert np.abs(clip[0, 4, 12].astype(int) - RED).max() <= 25  # the left half is now on top
    assert clip[0, 28, 12, 1] < 60
    rng = np.random.default_rng(0)
    noise = _video(rng.integers(0, 255, (12, 64, 96, 3), np.uint8))
    damaged = noise[: len(noise) // 2] + bytes(2000) + noise[len(noise) // 2 + 2000 :]
    for bad in (noise[: len(noise) // 2], damaged):
        with pytest.raises(ValueError, match="damaged video"):
            videos.verify(bad)


def test_a_video_file_without_pyav_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV: .*video"):
        videos.decode(b"\0\0\0\x18ftypisom" + bytes(100), 2)


# ---- Prepared data and batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve animations, the last three in the split 'test', and a damaged one."""
    root = tmp_path_factory.mktemp("videos")
    (root / "raw").mkdir()
    lines = []
    for index in range(12):
        frames = _numbered(10, channels=4 if index % 2 else 3)
        frames[:, :4, :4, :3] = 20 * index
        format = ("WEBP", "GIF", "PNG")[index % 3]
        name = f"{index:02d}.{format.lower()}"
        (root / "raw" / name).write_bytes(_animation(frames, format))
        split = "test" if index >= 9 else "train"
        group = "even" if index % 2 == 0 else "odd"
        lines.append(dict(file_name=name, text=f"clip {index}", label=group, split=split))
    whole = _animation(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8), "PNG")
    (root / "raw" / "bad.png").write_bytes(whole[: len(whole) // 2])
    lines.append(dict(file_name="bad.png", text="bad", label="odd", split="train"))
    (root / "raw" / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for split in ("train", "test"):
        options = prepare.Options(where=(("split", (split,)),))
        prepare.prepare(
            "imagefolder", str(root / "raw"), str(root / "out"), split=split, options=options,
            progress=False,
        )  # fmt: skip
    return root


def _config(data, num_frames, batch=4, **data_keys):
    config = base.get_config()
    config.batch_size = batch
    config.model.image_size = 16
    config.model.text.vocab_size, config.model.text.max_len = 300, 16
    config.data.sources = (dict(path=str(data / "out"), kind="caption"),)
    config.data.update(num_frames=num_frames, **data_keys)
    return config


def _batches(config, data, count, **where):
    words = run_vocabulary.load_or_train(config, str(data / "workdir"))
    batches = open_stream(config, words, **where)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_animations_are_prepared_as_they_are(data):
    manifest = json.loads((data / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["count"] == 9 and manifest["splits"]["test"]["count"] == 3
    assert manifest["splits"]["train"]["quarantined"] == {"damaged_image": 1}
    quarantine = (data / "out" / "train-quarantine.jsonl").read_text()
    assert json.loads(quarantine)["key"] == "bad.png"
    for record in Records(dict(path=str(data / "out"), split="train")):
        assert record["image"] == (data / "raw" / record["key"]).read_bytes()


def test_a_batch_holds_the_frames_in_order(data):
    (batch,) = _batches(_config(data, 5), data, 1)
    assert batch["image"].shape == (4, 5, 16, 16, 3) and batch["image"].dtype == np.uint8
    for clip, index in zip(batch["image"], batch["index"].tolist()):
        assert _numbers(clip) == [1, 3, 5, 7, 9]
        assert np.abs(clip[:, 1, 1].astype(int) - 20 * index).max() <= 6
    (one,) = _batches(_config(data, 1), data, 1)
    assert np.array_equal(one["image"][:, 0], batch["image"][:, 2])


def test_all_frames_of_a_clip_are_augmented_alike(data):
    (batch,) = _batches(_config(data, 5, augment="drawing", flip=True), data, 1)
    left = batch["image"][:, :, 4:12, 2:14].astype(int)
    red = (left[..., 0] - left[..., 1] > 40).mean((2, 3))  # the red half, wherever it was put
    assert np.ptp(red, axis=1).max() < 0.15 and (batch["image"][:, 0] != batch["image"][:, 4]).any()
    (other,) = _batches(_config(data, 5, augment="none"), data, 1)
    assert not np.array_equal(other["image"], batch["image"])


def test_jitter_is_a_function_of_seed_and_step(data):
    config = _config(data, 2, frame_jitter=True)
    first, resumed = _batches(config, data, 4), _batches(config, data, 2, start_step=2)
    for a, b in zip(first[2:], resumed):
        assert np.array_equal(a["image"], b["image"])
    halves = [
        _batches(config, data, 1, process_index=index, process_count=2)[0] for index in (0, 1)
    ]
    joined = np.concatenate([half["image"] for half in halves])
    assert np.array_equal(joined, first[0]["image"])
    places = np.array([_numbers(clip) for batch in first for clip in batch["image"]])
    assert (places[:, 0] < 5).all() and (places[:, 1] >= 5).all()
    assert len(set(places[:, 0].tolist())) > 2
    other = _config(data, 2, frame_jitter=True)
    other.seed = 1
    assert _batches(other, data, 1)[0]["image"].tolist() != first[0]["image"].tolist()


def test_an_undecodable_clip_is_replaced(data, tmp_path):
    options = prepare.Options(where=(("split", ("train",)),), verify=False)
    prepare.prepare(
        "imagefolder", str(data / "raw"), str(tmp_path), options=options, progress=False
    )
    config = _config(data, 5, max_bad_fraction=0.5)
    config.data.sources = (dict(path=str(tmp_path), kind="caption"),)
    seen = set()
    for batch in _batches(config, data, 3):
        seen |= set(batch["index"].tolist())
        assert all(_numbers(clip) == [1, 3, 5, 7, 9] for clip in batch["image"])
    assert 9 not in seen and len(seen) >= 8


# ---- The model


@pytest.fixture(scope="module")
def model(data):
    config = tiny_config()
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=16, unimodal_depth=1, multimodal_depth=1)
    words = run_vocabulary.load_or_train(_config(data, 4), str(data / "workdir"))
    module = coca.build(config.model)
    params = params_of(module)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.2 * rng.standard_normal(x.shape), np.float32), params
    )
    return inference.CoCaModel(config, params, words, batch_size=8)


@pytest.fixture(scope="module")
def video_model(model):
    return inference.CoCaModel(
        model.config, model.params, model.vocabulary, batch_size=8, num_frames=4
    )


CLIPS = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)


def test_a_video_is_the_mean_of_its_frames(model, video_model):
    frames = model.encode_image(CLIPS.reshape(-1, 16, 16, 3)).reshape(3, 4, -1)
    mean = frames.mean(1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(video_model.encode_video(CLIPS), mean, atol=1e-5)
    np.testing.assert_allclose(video_model.encode_image(CLIPS), mean, atol=1e-5)
    shuffled = CLIPS[:, [2, 0, 3, 1]]
    np.testing.assert_allclose(video_model.encode_video(shuffled), mean, atol=1e-5)


def test_a_clip_of_one_frame_is_the_image(model, video_model):
    stills = CLIPS[:, 0]
    wanted = model.encode_image(stills)
    np.testing.assert_allclose(model.encode_video(stills[:, None], 1), wanted, atol=1e-5)
    repeated = list(stills)  # a model of clips repeats a still
    np.testing.assert_allclose(video_model.encode_video(repeated), wanted, atol=1e-5)
    assert video_model.caption(repeated, max_tokens=4) == model.caption(stills, max_tokens=4)


def test_the_decoder_attends_to_the_tokens_of_all_frames(model):
    pixels = (CLIPS / 255 - 0.5) / 0.5
    module, params = coca.build(model.config.model), {"params": model.params}

    @jax.jit
    def run(pixels):
        tokens = module.apply(params, pixels, method="encode_image")[1]
        encoded = module.apply(params, pixels.reshape(-1, 16, 16, 3), method="encode_pixels")
        return tokens, module.apply(params, encoded.reshape(3, 16, 16), method="pool")[1]

    tokens, wanted = run(pixels)  # each frame has 4 patches: 16 tokens a clip
    np.testing.assert_allclose(tokens, wanted, atol=1e-5)
    assert tokens.shape == (3, 4, 16)
    other = pixels.copy()
    other[:, 3] = 0
    assert np.abs(run(other)[0] - tokens).max() > 1e-3


@pytest.fixture(scope="module")
def head_model(model):
    """(config, module, params) with a head over 3 classes; no class is likelier at first, so the
    classifier is drawn."""
    config = model.config.copy_and_resolve_references()
    config.head.kind = "classification"
    module = coca.build(config.model, head=config.head, num_classes=3)
    shapes = jax.eval_shape(
        lambda key: partitioning.unbox(coca.init(module, key)), jax.random.key(0)
    )
    rng = np.random.default_rng(2)
    head = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes["head"])
    return config, module, dict(model.params, head=head)


def test_a_head_pools_the_tokens_of_all_frames(head_model):
    config, module, params = head_model
    pixels = ((CLIPS / 255 - 0.5) / 0.5).astype(np.float32)

    @jax.jit
    def run(pixels):
        frames = module.apply(
            {"params": params}, pixels.reshape(-1, 16, 16, 3), method="encode_pixels"
        )
        tokens = frames.reshape(3, -1, frames.shape[-1])
        alone = module.task_head.apply({"params": params["head"]}, tokens)
        return module.apply({"params": params}, pixels, method="classify"), alone

    logits, alone = run(pixels)
    np.testing.assert_allclose(logits, alone, atol=1e-4)
    np.testing.assert_allclose(run(pixels[:, ::-1])[0], logits, atol=1e-4)  # a set of frames
    repeated = np.repeat(pixels[:, :1], 4, 1)
    classify = jax.jit(lambda x: module.apply({"params": params}, x, method="classify"))
    still = classify(pixels[:, 0])
    np.testing.assert_allclose(run(repeated)[0], still, atol=1e-4)
    assert np.abs(logits - still).max() > 1e-2


def test_training_on_equal_frames_is_training_on_the_image(head_model):
    config, module, params = head_model
    config.batch_size = 4
    batch = random_batch(config) | dict(class_id=np.array([0, 1, 2, 0], np.int32),
                                        prompt_len=np.ones(4, np.int32))  # fmt: skip
    clips = batch | dict(image=np.repeat(batch["image"][:, None], 3, 1))

    @jax.jit
    def run(batch):
        def loss(params):
            return loss_and_metrics(params, module, config, batch, jax.random.key(0))[0]

        return jax.value_and_grad(loss)(params)

    (loss, grads), (clip_loss, clip_grads) = run(batch), run(clips)
    assert np.isfinite(loss) and abs(loss - clip_loss) < 1e-4
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(clip_grads)):
        np.testing.assert_allclose(a, b, atol=2e-4)
    small = shrink(clips["image"], 8)  # a stage of a size curriculum
    assert small.shape == (4, 3, 8, 8, 3)
    np.testing.assert_allclose(small[:, 1], shrink(batch["image"], 8), atol=1e-4)


def test_paths_captions_and_zero_shot(video_model, data, tmp_path):
    paths = [str(data / "raw" / name) for name in ("00.webp", "01.gif", "02.png")]
    arrays = np.stack([videos.decode(path, 4) for path in paths])
    np.testing.assert_allclose(
        video_model.encode_video(paths), video_model.encode_video(arrays), atol=1e-5
    )
    assert len(video_model.caption(paths, max_tokens=3)) == 3
    np.testing.assert_allclose(video_model.zero_shot(paths, ["a", "b"]).sum(1), 1, atol=1e-5)
    lines = list(caption_files.caption_files(video_model, [*paths, str(data / "raw" / "bad.png")],
                                       max_tokens=3))  # fmt: skip
    assert ["error" in line for line in lines] == [False, False, False, True]
    with pytest.raises(ValueError, match="num_frames"):
        inference.CoCaModel(video_model.config, video_model.params, video_model.vocabulary,
                            num_frames=-1)  # fmt: skip


def test_zero_shot_and_retrieval_of_videos(video_model, data, tmp_path):
    entry = dict(path=str(data / "out"), split="test")
    asked = [
        dict(kind="zeroshot", name="clips", data=dict(entry, kind="label"), templates="bare"),
        dict(kind="retrieval", name="clips", data=entry),
    ]
    scores = tasks.run_tasks(video_model, asked, str(tmp_path))
    paths = [str(data / "raw" / name) for name in ("09.webp", "10.gif", "11.png")]
    found = video_model.zero_shot(paths, ["even", "odd"], ["{}"]).argmax(1)
    assert scores["zeroshot/clips/top1"] == pytest.approx(np.mean(found == [1, 0, 1]))
    similar = video_model.similarity(paths, ["clip 9", "clip 10", "clip 11"])
    ranks = (similar >= np.diag(similar)[:, None]).sum(1)
    assert scores["retrieval/clips/image_to_text_r1"] == pytest.approx((ranks == 1).mean())
    assert scores["retrieval/clips/num_images"] == 3
