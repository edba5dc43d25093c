"""Clips decoded: which frames are taken, what colours they have, what is refused."""

import io

import numpy as np
import pytest
from clip_cases import RED, animation, numbered, numbers_of
from PIL import Image

from coca_jax.data import images, quarantine, videos
from coca_jax.data.sources.items import Item, Options

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
    frames = numbered(6)
    data = animation(frames, format)
    clip = videos.decode(data, 6)
    assert clip.shape == (6, 16, 16, 3) and clip.dtype == np.uint8
    assert np.abs(clip.astype(int) - frames).max() <= (6 if format == "GIF" else 0)
    assert numbers_of(videos.decode(data, 3)) == [1, 3, 5]
    assert videos.verify(data) == 6 and videos.sniff(data)[1:] == (16, 16)


def test_transparent_frames_go_over_white():
    frames = numbered(3, channels=4)
    frames[1, :4, :, 3] = 0
    frames[2, :4, :, 3] = 128
    for format in ("PNG", "WEBP"):
        data = animation(frames, format)
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
    still, *rest = [Image.fromarray(frame) for frame in numbered(4)]
    still.save(out, "PNG", save_all=True, default_image=True, append_images=rest, duration=50)
    assert numbers_of(videos.decode(out.getvalue(), 3)) == [1, 2, 3]


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


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_open_files_and_animations_of_pil_are_clips(format):
    data = animation(numbered(8), format)
    wanted = videos.decode(data, 4)
    assert numbers_of(wanted) == [1, 3, 5, 7]
    assert np.array_equal(videos.decode(io.BytesIO(data), 4), wanted)
    image = Image.open(io.BytesIO(data))
    image.seek(2)
    assert np.array_equal(videos.decode(image, 4), wanted) and image.tell() == 2
    still = videos.decode(image.copy(), 3)  # of the frame that was shown
    assert numbers_of(still) == [2, 2, 2]


def test_arrays_and_what_is_refused(tmp_path):
    frames = numbered(8)
    assert numbers_of(videos.decode(frames, 4)) == [1, 3, 5, 7]
    assert np.array_equal(videos.decode(frames[2], 2), frames[[2, 2]])
    with pytest.raises(ValueError, match="uint8"):
        videos.decode(frames / 255.0, 4)
    (tmp_path / "bad.webp").write_bytes(b"RIFF\0\0")
    with pytest.raises(ValueError, match="bad.webp"):
        videos.decode(tmp_path / "bad.webp", 4)
    whole = animation(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8), "PNG")
    for cut in (len(whole) // 2, len(whole) - 60):
        with pytest.raises(ValueError, match="damaged"):
            videos.verify(whole[:cut])
        images.decode(whole[:cut])  # its first frame is whole


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_too_many_frames_are_refused_before_any_is_decoded(format, monkeypatch):
    data = animation(numbered(6), format)
    for name, most in (("MAX_FRAMES", 5), ("MAX_CLIP_PIXELS", 6 * 16 * 16 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(videos, name, most)
            for read in (videos.verify, lambda data: videos.decode(data, 2)):
                with pytest.raises(ValueError, match="too many frames"):
                    read(data)
            reason = quarantine.record(Item("key", data, ["text"]), Options())[1]
            assert reason == "too_many_frames"
            assert images.decode(data).shape == (16, 16, 3)  # a still of it is no work
    assert videos.verify(data) == 6


def test_a_gif_of_very_many_frames_is_refused():
    frame = b"\x2c" + bytes(4) + b"\1\0\1\0\0" + b"\2\2\x44\1\0"
    many = b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + frame * (videos.MAX_FRAMES + 1) + b";"
    with pytest.raises(ValueError, match="too many frames: more than 100000 of 1 x 1"):
        videos.verify(many)


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
    frames = numbered(20, side=32)
    data = _video(frames, format, codec)
    assert images.is_video_file(data) and videos.sniff(data) == (images.OTHER, 32, 32)
    clip = videos.decode(io.BytesIO(data), 5)
    assert clip.shape == (5, 32, 32, 3) and numbers_of(clip[:, ::2, ::2]) == [2, 6, 10, 14, 18]
    assert np.abs(clip[:, 16, 4].astype(int) - RED).max() <= 25
    assert videos.verify(data) == 20
    with pytest.raises(ValueError, match="num_frames"):
        images.decode(data)


def test_videos_are_refused_before_they_are_decoded(monkeypatch):
    data = _video(numbered(20, side=32))
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
    frames = numbered(6, side=32, channels=4)
    frames[:, :8, :, 3] = 0
    clip = videos.decode(_video(frames, "mov", "qtrle", "argb"), 6)
    assert clip[2, 2, 20].tolist() == [255, 255, 255] and clip[2, 20, 20].tolist() == [40, 40, 40]
    data = bytearray(_video(numbered(6, side=32)[:, :24]))
    place = data.find(b"tkhd") + 44  # the matrix of a telephone held upright: a quarter clockwise
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in turn)
    clip = videos.decode(bytes(data), 2)
    assert clip.shape == (2, 32, 24, 3) and videos.sniff(bytes(data))[1:] == (32, 24)
    assert np.abs(clip[0, 4, 12].astype(int) - RED).max() <= 25  # the left half is now on top
    assert clip[0, 28, 12, 1] < 60
    rng = np.random.default_rng(0)
    noise = _video(rng.integers(0, 255, (12, 64, 96, 3), np.uint8))
    damaged = bytearray(noise)  # not by zeros, for which FFmpeg 9 has pictures
    for place in rng.integers(noise.find(b"mdat") + 8, noise.find(b"moov"), 20):
        damaged[place] ^= 1 << rng.integers(8)
    for bad in (noise[: len(noise) // 2], bytes(damaged)):
        with pytest.raises(ValueError, match="damaged video"):
            videos.verify(bad)


def test_a_video_file_without_pyav_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV: .*video"):
        videos.decode(b"\0\0\0\x18ftypisom" + bytes(100), 2)
